//! Rollouts over several hosts: agents with an nginx each, on one etcd and one Docker engine.
#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "no answer is no version; a test tells its figures"
)]

use std::time::{Duration, Instant};

use demae::model::fleet::{Leader, RolloutPhase};

use crate::support::{
    fleet::{Fleet, expect_none_lost},
    lab::Lab,
    load::get,
    wait::until,
};

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
        most = most.max(fleet.store().list("state/permits/").len());
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

#[test]
fn release_that_fails_while_it_is_monitored_is_taken_back() {
    let fleet = Fleet::new(2);
    let good = fleet.serve("200ms");
    fleet.put_spec("20s");
    let loads = fleet.load();
    fleet.store().put("env/web/SICK_AFTER_MS", "1500");
    until("requests are on the new release", || {
        let body = |lab: &Lab| get(lab.ingress, "web.test", "/").unwrap_or_default().1;
        fleet.0.iter().any(|lab| !body(lab).contains(good.release.as_str()))
    });
    let reverted = fleet.wait_phase(Some(good.release.as_str()), RolloutPhase::Reverted);
    let tried = fleet
        .0
        .iter()
        .filter(|lab| !lab.get_key(&format!("state/verdicts/web/{}/{}", reverted.release, lab.host)).is_empty());
    assert_eq!(tried.count(), 1);
    for lab in &fleet.0 {
        let (_, body) = get(lab.ingress, "web.test", "/").expect("an answer");
        assert!(body.contains(good.release.as_str()), "{body}");
    }
    expect_none_lost(loads);
}

#[test]
fn killed_leader_is_replaced_and_a_late_host_catches_up() {
    let mut fleet = Fleet::new(3);
    let first = fleet.serve("1s");
    let loads = fleet.load();
    let leader: Leader = serde_json::from_str(&fleet.store().get_key("state/leader")).expect("a leader");
    let image = fleet.store().image("v2");
    fleet.store().put("apps/web/image", &image);
    let at = fleet.0.iter().position(|lab| lab.host == leader.host.as_str()).expect("the leader's host");
    // A host that is killed in its own turn holds up the rollout.
    let has_turn = |lab: &Lab| !lab.get_key(&format!("state/permits/{}/web", lab.host)).is_empty();
    until("another host has a turn", || !has_turn(&fleet.0[at]) && fleet.0.iter().any(has_turn));
    fleet.0[at].kill_agent();
    let killed = Instant::now();
    let others = |fleet: &Fleet| {
        fleet.versions().into_iter().filter(|(host, _)| *host != leader.host.as_str()).collect::<Vec<_>>()
    };
    until("the others serve the new release", || others(&fleet).iter().all(|(_, version)| version == "v2"));
    println!("without the leader: {:?}", killed.elapsed());
    fleet.wait_phase(Some(first.release.as_str()), RolloutPhase::Done);
    let next: Leader = serde_json::from_str(&fleet.store().get_key("state/leader")).expect("a leader");
    assert_ne!(next.host, leader.host);
    fleet.0[at].start_agent(&[]);
    until("the late host serves it too", || fleet.versions().values().all(|version| version == "v2"));
    expect_none_lost(loads);
}

#[test]
fn pin_goes_back_and_freeze_holds() {
    let fleet = Fleet::new(2);
    let store = fleet.store();
    let first = fleet.serve("200ms");
    let image = store.image("v2");
    store.put("freeze", "a sale");
    store.put("apps/web/image", &image);
    // The rollout is opened, and no host gets a turn.
    fleet.wait_phase(Some(first.release.as_str()), RolloutPhase::Rolling);
    for lab in &fleet.0 {
        lab.wait_app("web", "waiting", |app| app.is("turn"));
        assert_eq!(lab.get_key(&format!("state/permits/{}/web", lab.host)), "");
    }
    store.del("freeze");
    let second = fleet.wait_phase(Some(first.release.as_str()), RolloutPhase::Done);
    store.put("apps/web/release", first.release.as_str());
    let pinned = fleet.wait_phase(Some(second.release.as_str()), RolloutPhase::Restored);
    assert!(pinned.pinned && pinned.release == first.release);
    until("all hosts serve the pinned release", || fleet.versions().values().all(|version| version == "v1"));
    store.del("apps/web/release");
    until("all hosts serve the wanted release", || fleet.versions().values().all(|version| version == "v2"));
}

#[test]
fn agent_that_is_killed_in_its_turn_ends_it_after_its_start() {
    let mut fleet = Fleet::new(2);
    let first = fleet.serve("2s");
    let loads = fleet.load();
    let image = fleet.store().image("v2");
    fleet.store().put("apps/web/image", &image);
    until("one host serves the new release", || fleet.versions().values().any(|version| version == "v2"));
    let switched = fleet.versions().into_iter().find(|(_, version)| version == "v2").expect("a host").0;
    let at = fleet.0.iter().position(|lab| lab.host == switched).expect("its host");
    fleet.0[at].kill_agent();
    assert_eq!(fleet.versions().values().filter(|version| *version == "v2").count(), 1, "its nginx serves on");
    fleet.0[at].start_agent(&[]);
    fleet.wait_phase(Some(first.release.as_str()), RolloutPhase::Done);
    assert!(fleet.versions().values().all(|version| version == "v2"));
    expect_none_lost(loads);
}

#[test]
fn canary_waits_for_its_promotion() {
    let fleet = Fleet::new(2);
    let store = fleet.store();
    let first = fleet.serve("100ms");
    let more = "deploy: {update_config: {canary: 1, monitor: 100ms}}\n";
    store.put("apps/web/spec", &store.socket_spec(&store.image("v2"), "web.test", more));
    let waiting = fleet.wait_phase(Some(first.release.as_str()), RolloutPhase::Waiting);
    let served = fleet.versions();
    assert_eq!(served.values().filter(|version| *version == "v2").count(), 1, "{served:?}");
    // Another name promotes nothing: the next decision is seen by what it leaves as it is.
    store.put("apps/web/promote", first.release.as_str());
    store.put("apps/web/promote", waiting.release.as_str());
    fleet.wait_phase(Some(first.release.as_str()), RolloutPhase::Done);
    assert!(fleet.versions().values().all(|version| version == "v2"));
}
