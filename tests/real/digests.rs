//! One image for all hosts: agents with an engine of their own each, and a tag that is moved.

use std::collections::BTreeSet;

use demae::model::{
    fleet::{ResolvedImage, Rollout, RolloutPhase},
    status::{AppStatus, State},
};

use crate::support::{
    engine::Engine,
    fleet::{Fleet, expect_none_lost},
    lab::{Lab, Setup},
    names::free_address,
    registry::Registry,
    wait::until,
};

/// The tag that is moved.
const TAG: &str = "live";

/// Two hosts that share etcd and a registry.
struct Site {
    // In the order in which they are dropped.
    registry: Registry,
    fleet: Fleet,
    engines: Vec<Engine>,
}

impl Site {
    fn new() -> Self {
        let engines: Vec<Engine> = (0..2).map(|_| Engine::with_ports()).collect();
        let first = Lab::with(&Setup { no_agent: true, ..Setup::default() });
        let second = Lab::with(&Setup { no_agent: true, etcd: Some(first.etcd), ..Setup::default() });
        let registry = Registry::start(free_address(), first.dir.path());
        let mut fleet = Fleet(vec![first, second]);
        for (lab, engine) in fleet.0.iter_mut().zip(&engines) {
            lab.start_agent(&[("DOCKER_HOST", &engine.host())]);
        }
        Self { registry, fleet, engines }
    }

    /// From now on the tag means this version.
    fn push(&self, version: &str) {
        self.registry.push(&self.fleet.store().image(version), TAG);
    }

    fn put_spec(&self, more: &str) {
        let store = self.fleet.store();
        let more = format!("network_mode: none\npull_policy: always\n{more}");
        store.put("apps/web/spec", &store.socket_spec(&self.registry.name(TAG), "web.test", &more));
    }

    fn record(&self, release: &str) -> Option<ResolvedImage> {
        serde_json::from_str(&self.fleet.store().get_key(&format!("state/digests/web/{release}"))).ok()
    }

    /// Waits until a new release is on both hosts.
    fn wait_done(&self, before: &Rollout) -> Rollout {
        let done = self.fleet.wait_phase(Some(before.release.as_str()), RolloutPhase::Done);
        self.expect_one_image(&done);
        done
    }

    /// All hosts have converged on the image that is in the store.
    fn expect_one_image(&self, rollout: &Rollout) {
        let record = self.record(rollout.release.as_str()).expect("a record");
        for lab in &self.fleet.0 {
            let is_on =
                |a: &AppStatus| a.state == State::Converged && a.release.as_deref() == Some(rollout.release.as_str());
            let app = lab.wait_app("web", "converged", is_on);
            assert_eq!(app.digest.as_ref(), Some(&record.digest), "{}", lab.host);
        }
    }

    fn versions(&self) -> BTreeSet<String> {
        self.fleet.versions().into_values().collect()
    }
}

#[test]
fn every_host_runs_the_image_that_the_first_one_pulled() {
    let site = Site::new();
    let update = "deploy: {update_config: {parallelism: 1, monitor: 2s}}\n";
    site.push("v1");
    site.put_spec(update);
    let first = site.fleet.wait_phase(None, RolloutPhase::Done);
    site.expect_one_image(&first);
    let loads = site.fleet.load();

    // The tag is moved while the release is on one host.
    site.push("v2");
    site.fleet.store().put("apps/web/restart", "1");
    let second = site.fleet.wait_phase(Some(first.release.as_str()), RolloutPhase::Rolling);
    until("the first host has pulled", || site.record(second.release.as_str()).is_some());
    assert!(site.versions().contains("v1"), "a host is to come");
    site.push("v3");
    let second = site.wait_done(&first);
    assert_eq!(site.versions(), ["v2".to_owned()].into());

    // Going back means the image of that time, also where it has to be pulled again.
    let old = site.record(first.release.as_str()).expect("a record");
    let reference = format!("{}@{}", site.registry.name(TAG).replace(&format!(":{TAG}"), ""), old.digest);
    let engine = &site.engines[1];
    let id = engine.docker(&["inspect", "--type", "image", "--format", "{{.Id}}", &reference]);
    assert!(id.starts_with("sha256:"), "it is there: {id}");
    engine.docker(&["rmi", "-f", &id]);
    let succeeds = |args: &[&str]| {
        let (code, _, err) = site.fleet.store().ask(args);
        assert_eq!(code, 0, "{args:?}: {err}");
    };
    succeeds(&["rollback", "web", first.release.as_str(), "--timeout", "60s"]);
    assert_eq!(site.versions(), ["v1".to_owned()].into());
    site.expect_one_image(&first);

    // And so does the release before, once it is wanted again.
    site.fleet.store().del("apps/web/release");
    until("the pin is gone", || site.versions() == ["v2".to_owned()].into());

    // What the tag means now is another release.
    succeeds(&["redeploy", "web", "--timeout", "60s"]);
    assert_eq!(site.versions(), ["v3".to_owned()].into());
    site.wait_done(&second);
    expect_none_lost(loads);
}

#[test]
fn instances_run_from_the_image_of_their_release_command() {
    let site = Site::new();
    site.push("v1");
    site.put_spec("release_command: [exit, '0', '2000']\n");
    let store = site.fleet.store();
    until("the command runs", || !store.list("state/commands/web/").is_empty() && !site.engines.iter().all(is_idle));
    site.push("v2");
    let done = site.fleet.wait_phase(None, RolloutPhase::Done);
    site.expect_one_image(&done);
    assert_eq!(site.versions(), ["v1".to_owned()].into());
}

fn is_idle(engine: &Engine) -> bool {
    engine.docker(&["ps", "-q"]).is_empty()
}
