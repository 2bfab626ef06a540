//! Several hosts: agents with an nginx each, on one etcd and one Docker engine.
#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "no answer is no version; a test tells its figures"
)]

use std::{collections::BTreeMap, time::Duration};

use demae::model::{
    fleet::{Rollout, RolloutPhase},
    status::State,
};

use super::{
    lab::{Lab, Setup},
    load::{Load, get, mixed},
    wait::until,
};

/// Hosts with one etcd, in the order of their names.
pub struct Fleet(pub Vec<Lab>);

impl Fleet {
    /// So many hosts.
    pub fn new(count: usize) -> Self {
        let first = Lab::new();
        let etcd = Some(first.etcd);
        let others = (1..count).map(|_| Lab::with(&Setup { etcd, ..Setup::default() }));
        let mut hosts: Vec<Lab> = [first].into_iter().chain(others.collect::<Vec<_>>()).collect();
        // The one that runs etcd stays the last to be dropped.
        hosts[1..].sort_by(|a, b| a.host.cmp(&b.host));
        Self(hosts)
    }

    /// The host that runs etcd.
    pub fn store(&self) -> &Lab {
        &self.0[0]
    }

    /// The rollout of `web`.
    pub fn rollout(&self) -> Option<Rollout> {
        serde_json::from_str(&self.store().get_key("state/rollouts/web")).ok()
    }

    /// Waits for a phase.
    pub fn wait_phase(&self, release_other_than: Option<&str>, phase: RolloutPhase) -> Rollout {
        let is_it =
            |r: &Rollout| r.phase == phase && release_other_than.is_none_or(|other| r.release.as_str() != other);
        until(&format!("the rollout is {}", phase.as_str()), || self.rollout().is_some_and(|r| is_it(&r)));
        self.rollout().expect("a rollout")
    }

    /// The version that each host answers with.
    pub fn versions(&self) -> BTreeMap<String, String> {
        let version = |lab: &Lab| {
            let (_, body) = get(lab.ingress, "web.test", "/").unwrap_or_default();
            body.split_whitespace().find_map(|word| word.strip_prefix("version=")).unwrap_or("none").to_owned()
        };
        self.0.iter().map(|lab| (lab.host.clone(), version(lab))).collect()
    }

    /// The first release of `web`, on all hosts.
    pub fn serve(&self, monitor: &str) -> Rollout {
        self.put_spec(monitor);
        let rollout = self.wait_phase(None, RolloutPhase::Done);
        for lab in &self.0 {
            lab.wait_app("web", "converged", |app| app.state == State::Converged);
        }
        rollout
    }

    /// Puts its spec.
    pub fn put_spec(&self, monitor: &str) {
        let store = self.store();
        let more = format!("deploy: {{update_config: {{parallelism: 1, monitor: {monitor}}}}}\n");
        store.put("apps/web/spec", &store.socket_spec(&store.image("v1"), "web.test", &more));
    }

    /// Load on all hosts.
    pub fn load(&self) -> Vec<Load> {
        self.0.iter().map(|lab| Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(10)))).collect()
    }
}

/// Ends the load, of which no request may have failed.
pub fn expect_none_lost(loads: Vec<Load>) {
    for load in loads {
        let tally = load.stop();
        println!("requests: {}  failed: {}  stale: {}", tally.requests, tally.failed, tally.stale);
        assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
        assert!(tally.requests > 100, "too few requests: {}", tally.requests);
    }
}
