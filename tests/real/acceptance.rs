//! What needs a person's confirmation: mass removals and a new store. A confirmation is used once.
#![expect(clippy::disallowed_methods, reason = "a test moves directories of its own")]

use std::{fs, time::Duration};

use crate::support::{
    lab::Lab,
    load::{Load, mixed},
    trust::{all_converged, block, init, output_of, wait_block, workers},
    wait::until,
};
use demae::model::status::State;

#[test]
fn mass_removal_needs_confirmation() {
    let lab = Lab::new();
    let specs = workers(&lab, ["a", "b", "c", "d", "e"]);
    lab.put_all(&specs);
    until("all have converged", || all_converged(&lab, 5));
    let before = lab.containers();
    lab.del("apps/");
    let found = wait_block(&lab, "mass_removal");
    assert!(found.message.contains("5 of the 5 apps of this host would leave at once"), "{found}");
    // The keys come back one by one. Though most exist at some point, nothing is removed on the way.
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
    // All keys are back: no confirmation is needed.
    lab.put(&specs[4].0, &specs[4].1);
    until("the store is trusted again", || block(&lab).is_none());
    assert_eq!(lab.containers(), before);
    // Removals one after the other are allowed.
    lab.del("apps/a/");
    until("one is removed", || lab.containers().len() == 4);
    lab.del("apps/");
    wait_block(&lab, "mass_removal");
    let confirm = lab.demae(&["confirm", "--yes"]);
    assert!(
        confirm.status.success() && output_of(&confirm).contains("would be removed from this host: b, c, d, e"),
        "{}",
        output_of(&confirm)
    );
    until("they are removed", || lab.containers().is_empty() && lab.traces().is_empty());
    assert!(block(&lab).is_none());
    // Draining a host is one key, and applies to all apps.
    lab.put_all(&specs);
    until("all have converged again", || all_converged(&lab, 5));
    lab.put(&format!("hosts/{}/mode", lab.host), "drained");
    until("all are removed", || lab.containers().is_empty());
}

#[test]
fn another_store_needs_acceptance() {
    let mut lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    until("requests are served", || load.requests() > 50);
    lab.stop_etcd();
    fs::rename(lab.path("etcd"), lab.path("etcd-before")).expect("moved");
    lab.start_etcd();
    wait_block(&lab, "other_store");
    // The quarantine survives a restart of the agent.
    lab.stop_agent();
    lab.start_agent(&[]);
    wait_block(&lab, "other_store");
    lab.wait_app("web", "served from the ledger", |s| s.healthy == 1);
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    let confirm = lab.demae(&["confirm", "--yes"]);
    assert!(
        !confirm.status.success() && output_of(&confirm).contains("`demae confirm` is not for this"),
        "{}",
        output_of(&confirm)
    );
    let accept = lab.demae(&["store", "accept", "--yes"]);
    assert!(accept.status.success(), "{}", output_of(&accept));
    until("apps that the new store lacks are removed", || block(&lab).is_none() && lab.containers().is_empty());
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v2"), "web.test", ""));
    assert!(!lab.path("state/accepted.json").exists(), "the acceptance is cleared");
}

/// The keys come back between the confirmation and the agent's next read.
#[test]
fn unused_confirmation_does_not_outlive_its_block() {
    let mut lab = Lab::new();
    init(&lab);
    let specs = workers(&lab, ["a", "b", "c", "d"]);
    lab.put_all(&specs);
    until("all have converged", || all_converged(&lab, 4));
    let before = lab.containers();
    lab.del("apps/");
    wait_block(&lab, "mass_removal");
    lab.stop_agent();
    assert!(lab.demae(&["confirm", "--yes"]).status.success());
    lab.put_all(&specs);
    lab.start_agent(&[]);
    until("the store is trusted", || lab.status().is_some_and(|s| s.store.stale_since.is_none() && s.apps.len() == 4));
    assert!(block(&lab).is_none());
    until("the acceptance is cleared", || !lab.path("state/accepted.json").exists());
    lab.del("apps/");
    wait_block(&lab, "mass_removal");
    assert_eq!(lab.containers(), before);
}

/// The same for a wiped store: a person accepts it and then puts everything back.
#[test]
fn unused_acceptance_of_a_wiped_store_does_not_outlive_its_block() {
    let mut lab = Lab::new();
    init(&lab);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let before = lab.containers();
    let (cluster, spec) = (lab.get_key("cluster"), lab.get_key("apps/web/spec"));
    lab.del("");
    wait_block(&lab, "sentinel_missing");
    lab.stop_agent();
    let accept = lab.demae(&["store", "accept", "--yes"]);
    assert!(
        accept.status.success() && output_of(&accept).contains("would be removed from this host: web"),
        "{}",
        output_of(&accept)
    );
    lab.put("apps/web/spec", &spec);
    lab.put("cluster", &cluster);
    lab.start_agent(&[]);
    lab.wait_app("web", "converged as before", |s| s.state == State::Converged);
    until("the acceptance is cleared", || !lab.path("state/accepted.json").exists());
    lab.del("");
    wait_block(&lab, "sentinel_missing");
    assert_eq!(lab.containers(), before);
}
