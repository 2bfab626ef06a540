//! Rollouts over several hosts: agents with an nginx each, on one etcd and one Docker engine.
#![allow(clippy::disallowed_methods, clippy::print_stdout, reason = "a test runs programs, and tells its figures")]

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use demae::model::{
    fleet::{Rollout, RolloutPhase},
    status::State,
};

use crate::support::{
    lab::{Lab, Setup},
    load::{Load, get, mixed},
    wait::until,
};

/// Hosts with one etcd, in the order of their names.
struct Fleet(Vec<Lab>);

impl Fleet {
    fn new(count: usize) -> Self {
        let sections = "[rollouts]\nenabled = true\n";
        let first = Lab::with(&Setup { sections, ..Setup::default() });
        let etcd = Some(first.etcd);
        let others = (1..count).map(|_| Lab::with(&Setup { sections, etcd, ..Setup::default() }));
        let mut hosts: Vec<Lab> = [first].into_iter().chain(others.collect::<Vec<_>>()).collect();
        // The one that runs etcd stays the last to be dropped.
        hosts[1..].sort_by(|a, b| a.host.cmp(&b.host));
        Self(hosts)
    }

    fn store(&self) -> &Lab {
        &self.0[0]
    }

    fn rollout(&self) -> Option<Rollout> {
        serde_json::from_str(&self.store().get_key("state/rollouts/web")).ok()
    }

    fn wait_phase(&self, release_other_than: Option<&str>, phase: RolloutPhase) -> Rollout {
        let is_it =
            |r: &Rollout| r.phase == phase && release_other_than.is_none_or(|other| r.release.as_str() != other);
        until(&format!("the rollout is {}", phase.as_str()), || self.rollout().is_some_and(|r| is_it(&r)));
        self.rollout().expect("a rollout")
    }

    /// The version that each host answers with.
    fn versions(&self) -> BTreeMap<String, String> {
        let version = |lab: &Lab| {
            let (_, body) = get(lab.ingress, "web.test", "/").unwrap_or_default();
            body.split_whitespace().find_map(|word| word.strip_prefix("version=")).unwrap_or("none").to_owned()
        };
        self.0.iter().map(|lab| (lab.host.clone(), version(lab))).collect()
    }

    fn serve(&self, monitor: &str) -> Rollout {
        let store = self.store();
        let more = format!("deploy: {{update_config: {{parallelism: 1, monitor: {monitor}}}}}\n");
        store.put("apps/web/spec", &store.socket_spec(&store.image("v1"), "web.test", &more));
        let rollout = self.wait_phase(None, RolloutPhase::Done);
        for lab in &self.0 {
            lab.wait_app("web", "converged", |app| app.state == State::Converged);
        }
        rollout
    }

    /// Load on all hosts.
    fn load(&self) -> Vec<Load> {
        self.0.iter().map(|lab| Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(10)))).collect()
    }
}

fn expect_none_lost(loads: Vec<Load>) {
    for load in loads {
        let tally = load.stop();
        println!("requests: {}  failed: {}  stale: {}", tally.requests, tally.failed, tally.stale);
        assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
        assert!(tally.requests > 100, "too few requests: {}", tally.requests);
    }
}

#[test]
fn release_goes_over_the_hosts_one_after_the_other() {
    let fleet = Fleet::new(3);
    let first = fleet.serve("500ms");
    let loads = fleet.load();
    let began = Instant::now();
    let image = fleet.store().image("v2");
    fleet.store().put("apps/web/image", &image);
    // A host answers with the new release only while it has a turn, or has proven it.
    let mut most = 0;
    until("all hosts serve the new release", || {
        let permits = fleet.0.iter().filter(|lab| !lab.get_key(&format!("state/permits/{}/web", lab.host)).is_empty());
        most = most.max(permits.count());
        fleet.versions().values().all(|version| version == "v2")
    });
    let done = fleet.wait_phase(Some(first.release.as_str()), RolloutPhase::Done);
    println!("three hosts in {:?}", began.elapsed());
    assert_eq!(most, 1, "turns at a time");
    assert!(began.elapsed() >= Duration::from_millis(1500), "each host is monitored: {:?}", began.elapsed());
    assert_eq!(done.from.as_ref(), Some(&first.release));
    expect_none_lost(loads);
}

#[test]
fn bad_release_reaches_one_host_and_its_fleet_goes_back() {
    let fleet = Fleet::new(3);
    let good = fleet.serve("500ms");
    let loads = fleet.load();
    fleet.store().put("env/web/MOOD", "exit");
    let reverted = fleet.wait_phase(Some(good.release.as_str()), RolloutPhase::Reverted);
    assert_eq!(reverted.from.as_ref(), Some(&good.release));
    let verdicts = fleet
        .0
        .iter()
        .filter(|lab| !lab.get_key(&format!("state/verdicts/web/{}/{}", reverted.release, lab.host)).is_empty());
    assert_eq!(verdicts.count(), 1, "hosts that tried it");
    for lab in &fleet.0 {
        let app = lab
            .wait_app("web", "back", |app| app.release.as_deref() == Some(good.release.as_str()) && app.healthy == 1);
        assert!(app.is("turn"), "it says why it runs another release than the wanted one: {app:?}");
    }
    // A mended release is rolled out again.
    fleet.store().put("env/web/MOOD", "well");
    let done = fleet.wait_phase(Some(reverted.release.as_str()), RolloutPhase::Done);
    assert_eq!(done.from.as_ref(), Some(&good.release), "a release that failed is nothing to go back to");
    expect_none_lost(loads);
}
