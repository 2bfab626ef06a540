//! What is done only if a person says so: most apps leave, another store is taken. What they said is for once.
#![expect(clippy::disallowed_methods, reason = "a test moves directories of its own")]

mod support;

use std::{fs, time::Duration};

use demae::model::status::State;
use support::{
    doubts::{all_run, block, init, said, wait_block, workers},
    lab::Lab,
    load::{Load, mixed},
    wait::until,
};

#[test]
fn most_apps_leave_only_if_a_person_says_so() {
    let lab = Lab::new();
    let specs = workers(&lab, ["a", "b", "c", "d", "e"]);
    lab.put_all(&specs);
    until("all run", || all_run(&lab, 5));
    let before = lab.containers();
    lab.del("apps/");
    let found = wait_block(&lab, "mass_removal");
    assert!(found.message.contains("5 of the 5 apps of this host would leave at once"), "{found}");
    // The keys come back one by one. Though most are there at some moment, nothing leaves on the way.
    for (key, spec) in &specs[..4] {
        lab.put(key, spec);
    }
    // The second of two reads began after all that.
    for round in ["1", "2"] {
        let reads = lab.metric("demae_store_errors_total", "doubt");
        lab.put("env/common/ROUND", round);
        until("it was read again", || lab.metric("demae_store_errors_total", "doubt") > reads);
    }
    assert_eq!((block(&lab).map(|b| b.kind), lab.containers()), (Some("mass_removal".into()), before.clone()));
    // It is as if nothing had been.
    lab.put(&specs[4].0, &specs[4].1);
    until("it is believed again", || block(&lab).is_none());
    assert_eq!(lab.containers(), before);
    // One after the other they may leave.
    lab.del("apps/a/");
    until("one leaves", || lab.containers().len() == 4);
    lab.del("apps/");
    wait_block(&lab, "mass_removal");
    let confirm = lab.demae(&["confirm", "--yes"]);
    assert!(
        confirm.status.success() && said(&confirm).contains("would leave this host: b, c, d, e"),
        "{}",
        said(&confirm)
    );
    until("they leave", || lab.containers().is_empty() && lab.traces().is_empty());
    assert!(block(&lab).is_none());
    // Draining a host is one key, and means all of them.
    lab.put_all(&specs);
    until("all run again", || all_run(&lab, 5));
    lab.put(&format!("hosts/{}/mode", lab.host), "drained");
    until("all leave", || lab.containers().is_empty());
}

#[test]
fn another_store_is_taken_only_if_a_person_says_so() {
    let mut lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    until("requests flow", || load.requests() > 50);
    lab.stop_etcd();
    fs::rename(lab.path("etcd"), lab.path("etcd-before")).expect("moved");
    lab.start_etcd();
    wait_block(&lab, "other_store");
    // It holds over a restart of the agent.
    lab.stop_agent();
    lab.start_agent(&[]);
    wait_block(&lab, "other_store");
    lab.wait_app("web", "served by what was kept", |s| s.healthy == 1);
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    let confirm = lab.demae(&["confirm", "--yes"]);
    assert!(
        !confirm.status.success() && said(&confirm).contains("`demae confirm` is not for this"),
        "{}",
        said(&confirm)
    );
    let accept = lab.demae(&["store", "accept", "--yes"]);
    assert!(accept.status.success(), "{}", said(&accept));
    until("what the new store does not have leaves", || block(&lab).is_none() && lab.containers().is_empty());
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v2"), "web.test", ""));
    assert!(!lab.path("state/accepted.json").exists(), "what was accepted is used up");
}

/// The keys come back between a person's consent and the agent's next look.
#[test]
fn consent_that_was_not_needed_is_none_for_another_day() {
    let mut lab = Lab::new();
    init(&lab);
    let specs = workers(&lab, ["a", "b", "c", "d"]);
    lab.put_all(&specs);
    until("all run", || all_run(&lab, 4));
    let before = lab.containers();
    lab.del("apps/");
    wait_block(&lab, "mass_removal");
    lab.stop_agent();
    assert!(lab.demae(&["confirm", "--yes"]).status.success());
    lab.put_all(&specs);
    lab.start_agent(&[]);
    until("it is believed", || lab.status().is_some_and(|s| s.store.stale_since.is_none() && s.apps.len() == 4));
    assert!(block(&lab).is_none());
    until("what was accepted is forgotten", || !lab.path("state/accepted.json").exists());
    lab.del("apps/");
    wait_block(&lab, "mass_removal");
    assert_eq!(lab.containers(), before);
}

/// The same for a store that was wiped: a person accepts it, and then puts everything back.
#[test]
fn consent_to_a_wiped_store_that_came_back_is_none_for_another_day() {
    let mut lab = Lab::new();
    init(&lab);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let before = lab.containers();
    let (cluster, spec) = (lab.get_key("cluster"), lab.get_key("apps/web/spec"));
    lab.del("");
    wait_block(&lab, "sentinel_missing");
    lab.stop_agent();
    let accept = lab.demae(&["store", "accept", "--yes"]);
    assert!(accept.status.success() && said(&accept).contains("would leave this host: web"), "{}", said(&accept));
    lab.put("apps/web/spec", &spec);
    lab.put("cluster", &cluster);
    lab.start_agent(&[]);
    lab.wait_app("web", "as before", |s| s.state == State::Converged);
    until("what was accepted is forgotten", || !lab.path("state/accepted.json").exists());
    lab.del("");
    wait_block(&lab, "sentinel_missing");
    assert_eq!(lab.containers(), before);
}
