//! The store vanishes, is wiped, replaced, restored, or loses most apps: everything keeps serving, and the status says
//! what a person has to do.
#![expect(clippy::disallowed_methods, reason = "a test moves directories of its own")]

use std::{fs, process::Command, time::Duration};

use crate::support::{
    containers::{ids, only},
    etcd::Etcd,
    lab::{Lab, Setup},
    load::{self, Load, mixed},
    names::free_address,
    process::docker,
    trust::{all_converged, block, init, output_of, wait_block, workers},
    wait::until,
};
use demae::model::status::State;

/// Copies a directory, as a backup of a disk would.
fn copy(from: &std::path::Path, to: &std::path::Path) {
    let status = Command::new("cp").arg("-a").arg(from).arg(to).status().expect("cp runs");
    assert!(status.success());
}

#[test]
fn agent_started_without_its_store_uses_the_ledger() {
    let mut lab = Lab::new();
    init(&lab);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    lab.deploy("gone", "apps/gone/spec", &lab.socket_spec(&lab.image("v1"), "gone.test", ""));
    lab.deploy("web", "apps/web/image", &lab.image("v2"));
    let before = lab.app("web").and_then(|a| a.release);
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    until("requests are served", || load.requests() > 50);
    lab.kill_agent();
    lab.stop_etcd();
    // An app that is missing from the ledger: whether it is wanted is unknown.
    let ledger = lab.path("state/ledger");
    let mode = fs::metadata(&ledger).map(|m| std::os::unix::fs::PermissionsExt::mode(&m.permissions()) & 0o777);
    assert_eq!(mode.expect("a ledger"), 0o600, "only root may read it");
    lab.start_agent(&[]);
    let status = lab.wait_app("web", "converged without the store", |s| s.state == State::Converged && s.healthy == 1);
    assert_eq!(status.release, before, "the proven release is kept");
    let host = lab.status().expect("a status");
    assert!(host.store.stale_since.is_some() && host.store.error.is_some(), "{:?}", host.store);
    let printed = output_of(&lab.demae(&["status"]));
    assert!(printed.contains("runs on the state kept on disk, last confirmed at"), "{printed}");
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);

    // Drift is repaired, including a removed container.
    let container = lab.containers().into_iter().find(|c| c.contains(".web.")).expect("a container");
    docker(&["rm", "-f", &container]);
    until("it is recreated", || lab.get("web.test", "/").is_ok_and(|(code, body)| code == 200 && body.contains("v2")));
    lab.wait_app("web", "converged", |s| s.state == State::Converged && s.healthy == 1);
    assert_eq!(lab.get("gone.test", "/").map(|(code, _)| code), Ok(200));

    // The store is back, and its current state applies.
    lab.start_etcd();
    until("the store is read", || lab.status().is_some_and(|s| s.store.stale_since.is_none()));
    lab.del("apps/gone/");
    until("the deleted app is removed", || lab.lists_no("gone") && lab.containers().len() == 1);
    assert_eq!(lab.app("web").and_then(|a| a.release), before);
}

#[test]
fn damaged_ledger_stops_nothing_and_is_rewritten() {
    let mut lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    lab.stop_agent();
    lab.stop_etcd();
    let ledger = lab.path("state/ledger");
    let whole = fs::read(&ledger).expect("a ledger");
    fs::write(&ledger, &whole[..whole.len() / 2]).expect("a file");
    lab.start_agent(&[]);
    until("the damage is logged", || lab.agent_log().contains("the ledger is damaged"));
    assert_eq!(lab.get("web.test", "/").map(|(code, _)| code), Ok(200));
    assert_eq!(lab.containers().len(), 1);
    lab.start_etcd();
    lab.wait_app("web", "converged", |s| s.state == State::Converged && s.healthy == 1);
    assert_ne!(fs::read(&ledger).expect("a ledger").len(), whole.len() / 2, "the ledger is complete again");

    // Without the ledger it is unknown whether running apps were wanted, so even one removal needs confirmation.
    lab.stop_agent();
    fs::write(&ledger, &whole[..whole.len() / 2]).expect("a file");
    lab.del("apps/web/");
    lab.start_agent(&[]);
    let found = wait_block(&lab, "mass_removal");
    assert!(found.message.contains("1 of the 1 apps of this host would leave at once: web"), "{found}");
    assert_eq!(lab.get("web.test", "/").map(|(code, _)| code), Ok(200));
    assert!(lab.demae(&["confirm", "--yes"]).status.success());
    until("it is removed", || lab.containers().is_empty());
}

#[test]
fn wiped_store_stops_nothing_and_is_trusted_once_restored() {
    let lab = Lab::new();
    init(&lab);
    let spec = lab.socket_spec(&lab.image("v1"), "web.test", "");
    lab.deploy("web", "apps/web/spec", &spec);
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    let release = lab.app("web").and_then(|a| a.release);
    let sentinel = lab.get_key("cluster");
    lab.del("");
    let found = wait_block(&lab, "sentinel_missing");
    assert!(found.remedy.contains("demae store accept"), "{found}");
    until("the quarantine is exported", || lab.metric("demae_store_blocked", "sentinel_missing") == 1.0);
    let printed = output_of(&lab.demae(&["status"]));
    assert!(
        printed.contains("the store is not trusted, and nothing changes: the store has no `cluster` key"),
        "{printed}"
    );
    let planned = output_of(&lab.demae(&["plan"]));
    assert!(
        planned.contains(
            "the store is not trusted; this is the plan for the last accepted state: the store has no `cluster` key"
        ),
        "{planned}"
    );
    let shown = lab.demae(&["store", "accept"]);
    assert!(!shown.status.success(), "stdin is not a terminal");
    assert!(output_of(&shown).contains("would be removed from this host: web"), "{}", output_of(&shown));
    // Everything is put back: nothing was lost, and nothing is replaced.
    lab.put("apps/web/spec", &spec);
    lab.put("cluster", &sentinel);
    until("the store is trusted", || block(&lab).is_none());
    let status = lab.wait_app("web", "converged as before", |s| s.state == State::Converged);
    assert_eq!(status.release, release, "the release key was put back too");
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
}

#[test]
fn restored_backup_is_detected() {
    let mut lab = Lab::new();
    init(&lab);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    lab.stop_etcd();
    copy(&lab.path("etcd"), &lab.path("etcd-backup"));
    lab.start_etcd();
    lab.deploy("web", "apps/web/image", &lab.image("v2"));
    lab.stop_etcd();
    fs::remove_dir_all(lab.path("etcd")).expect("removed");
    fs::rename(lab.path("etcd-backup"), lab.path("etcd")).expect("moved");
    lab.start_etcd();
    wait_block(&lab, "older_revision");
    // Others write on, and the revision passes the last seen one. It is another history all the same.
    for n in 0..40 {
        lab.put("env/other/COUNT", &n.to_string());
    }
    lab.stop_agent();
    lab.start_agent(&[]);
    wait_block(&lab, "older_revision");
    let body = lab.get("web.test", "/").expect("it answers").1;
    assert!(body.contains("v2"), "the older image is not rolled out: {body}");
    let accept = lab.demae(&["store", "accept", "--yes"]);
    assert!(output_of(&accept).contains("would get another release: web"), "{}", output_of(&accept));
    until("the backup is applied", || lab.get("web.test", "/").is_ok_and(|(_, body)| body.contains("v1")));
    lab.wait_app("web", "converged", |s| s.state == State::Converged);
}

/// Keys put after the backup are missing from it, as if they had been deleted; and once the restored store has counted
/// on, its revision shows nothing either.
#[test]
fn restored_backup_with_newer_writes_removes_nothing() {
    let mut lab = Lab::new();
    init(&lab);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    lab.stop_etcd();
    copy(&lab.path("etcd"), &lab.path("etcd-backup"));
    lab.start_etcd();
    let late = lab.socket_spec(&lab.image("v1"), "late.test", "");
    lab.deploy("late", "apps/late/spec", &late);
    let before = lab.containers();
    lab.stop_agent();
    let seen = lab.revision();
    lab.stop_etcd();
    fs::remove_dir_all(lab.path("etcd")).expect("removed");
    fs::rename(lab.path("etcd-backup"), lab.path("etcd")).expect("moved");
    lab.start_etcd();
    while lab.revision() <= seen {
        lab.put("env/other/COUNT", "1");
    }
    lab.start_agent(&[]);
    wait_block(&lab, "older_revision");
    assert_eq!(lab.containers(), before);
    let accept = lab.demae(&["store", "accept"]);
    assert!(output_of(&accept).contains("would be removed from this host: late"), "{}", output_of(&accept));
    // The lost key is put back, and nothing has to be accepted.
    lab.put("apps/late/spec", &late);
    until("the store is trusted again", || block(&lab).is_none());
    assert_eq!(lab.containers(), before);
}

/// A store that has compacted the last seen revision cannot tell whether it had it.
#[test]
fn compacted_store_stays_trusted() {
    let mut lab = Lab::new();
    init(&lab);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    lab.stop_agent();
    lab.del("apps/web/");
    lab.compact();
    lab.start_agent(&[]);
    until("the deleted app is removed", || lab.containers().is_empty());
    assert_eq!(block(&lab), None);
}

#[test]
fn last_valid_spec_is_kept_over_a_restart() {
    let mut lab = Lab::new();
    init(&lab);
    lab.put("env/common/COLOUR", "blue");
    let spec = lab.socket_spec(&lab.image("v1"), "web.test", "env_from: [common]");
    lab.deploy("web", "apps/web/spec", &spec);
    let release = lab.app("web").and_then(|a| a.release);
    lab.put("apps/web/spec", "image: [");
    lab.wait_app("web", "invalid", |a| a.state == State::Invalid);
    lab.put("env/common/COLOUR", "green");
    // First with the store, then without.
    for etcd in [true, false] {
        lab.kill_agent();
        if !etcd {
            lab.stop_etcd();
        }
        docker(&["rm", "-f", &only(&lab, "web")]);
        lab.start_agent(&[]);
        until("it is recreated", || ids(&lab, "web").len() == 1);
        lab.wait_app("web", "still invalid, and serving", |a| a.state == State::Invalid && a.healthy == 1);
        until("it serves the last valid value", || {
            lab.get("web.test", "/env?COLOUR").is_ok_and(|(_, body)| body == "blue")
        });
        assert_eq!(lab.app("web").and_then(|a| a.release), release);
    }
    lab.start_etcd();
    lab.deploy("web", "apps/web/spec", &spec);
    until("the new valid value is served", || {
        lab.get("web.test", "/env?COLOUR").is_ok_and(|(_, body)| body == "green")
    });
}

/// `demae init` was not run, and few apps are here. The release key is wiped too.
#[test]
fn wipe_of_a_store_without_cluster_key_is_detected() {
    let lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let (before, spec) = (lab.containers(), lab.get_key("apps/web/spec"));
    lab.del("");
    let found = wait_block(&lab, "sentinel_missing");
    assert!(found.message.contains("no `secret/release-key` any more"), "{found}");
    assert_eq!(lab.containers(), before);
    lab.put("apps/web/spec", &spec);
    until("the store is trusted again", || block(&lab).is_none());
    until("the key is put back", || lab.get_key("secret/release-key").len() == 64);
    assert_eq!(lab.containers(), before);
    // A single deleted app is removed.
    lab.del("apps/web/");
    until("it is removed", || lab.containers().is_empty());
}

/// Agents must not put load on a quarantined store. etcd's counters show that time has passed.
#[test]
fn untrusted_store_is_read_again_only_on_change_or_acceptance() {
    let lab = Lab::new();
    init(&lab);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let progress_requests = || -> f64 {
        let (_, text) = load::get(lab.etcd, "localhost", "/metrics").expect("metrics of etcd");
        let name = "grpc_server_msg_received_total{grpc_method=\"Watch\"";
        let count = text.lines().find(|l| l.starts_with(name)).and_then(|l| l.rsplit(' ').next()?.parse().ok());
        count.unwrap_or_else(|| panic!("etcd counts {name}: {text}"))
    };
    let rejected_reads = || lab.metric("demae_store_errors_total", "doubt");
    let cluster = lab.get_key("cluster");
    lab.del("cluster");
    wait_block(&lab, "sentinel_missing");
    // The event that the watch delivered was read once.
    until("the event was read", || rejected_reads() == 2.0);
    let known = progress_requests();
    until("a progress request was sent", || progress_requests() > known);
    assert_eq!(rejected_reads(), 2.0, "nothing was read meanwhile");
    lab.put("env/web/GREETING", "again");
    until("a change is read", || rejected_reads() == 3.0);
    // So is a change that the watch does not see.
    let key = lab.get_key("secret/release-key");
    lab.del("secret/release-key");
    until("the missing key is detected", || rejected_reads() == 4.0);
    lab.put("secret/release-key", &key);
    lab.put("cluster", &cluster);
    until("the store is trusted again", || block(&lab).is_none());
    until("the change is served", || lab.get("web.test", "/env?GREETING").is_ok_and(|(_, body)| body == "again"));
}

#[test]
fn unreadable_mode_starts_nothing_after_a_restart() {
    let mut lab = Lab::new();
    let mode = format!("hosts/{}/mode", lab.host);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    lab.put(&mode, "drained");
    until("it is removed", || lab.containers().is_empty());
    lab.put(&mode, "draned");
    until("the mode is reported", || output_of(&lab.demae(&["status"])).contains("this is not a mode"));
    lab.kill_agent();
    lab.start_agent(&[]);
    lab.wait_ready();
    until("the mode is reported again", || output_of(&lab.demae(&["status"])).contains("this is not a mode"));
    assert!(lab.containers().is_empty());
    lab.put(&mode, "active");
    lab.wait_app("web", "converged", |s| s.state == State::Converged && s.healthy == 1);
}

/// One of two endpoints belongs to another etcd.
#[test]
fn untrusted_member_does_not_block_the_other_members() {
    let mut lab = Lab::with(&Setup { no_agent: true, top: "resync = \"2s\"", ..Setup::default() });
    let other_etcd = free_address();
    let _etcd = Etcd::start(lab.dir.path(), "other_etcd", other_etcd, &[("other_etcd", free_address())], &[]);
    until("it takes connections", || std::net::TcpStream::connect(other_etcd).is_ok());
    let config = fs::read_to_string(lab.path("agent.toml")).expect("a file");
    let both = format!("endpoints = [\"{}\", \"{other_etcd}\"]", lab.etcd);
    fs::write(lab.path("agent.toml"), config.replace(&format!("endpoints = [\"{}\"]", lab.etcd), &both))
        .expect("a file");
    lab.start_agent(&[]);
    init(&lab);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    lab.put_all(&workers(&lab, ["other"]));
    until("both have converged", || all_converged(&lab, 2));
    let before = lab.containers();
    let other_etcdctl = |words: &[&str]| {
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").args(["--endpoints", &other_etcd.to_string()]).args(words);
        let output = command.output().expect("etcdctl runs");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    lab.stop_etcd();
    wait_block(&lab, "sentinel_missing");
    assert_eq!(lab.containers(), before);
    // The publisher rotates through the members on its own, and takes a lease before it knows their cluster.
    until("the publisher has reached it too", || !other_etcdctl(&["lease", "list"]).contains("found 0 leases"));
    lab.start_etcd();
    until("the right one is used again", || {
        lab.status().is_some_and(|s| s.store.block.is_none() && s.store.error.is_none())
    });
    let image = lab.image("v2");
    lab.deploy("web", "apps/web/image", &image);
    let key = format!("state/apps/{}/web", lab.host);
    until("the status is published to the right one", || lab.get_key(&key).contains(&image));
    assert_eq!(other_etcdctl(&["get", "--prefix", "/", "--keys-only"]), "", "nothing is written to the other one");
    // Keys that the other etcd lacks do not quarantine a removal in the right one.
    lab.stop_etcd();
    wait_block(&lab, "sentinel_missing");
    lab.stop_agent();
    lab.start_etcd();
    lab.del("apps/other/");
    lab.start_agent(&[]);
    until("it is removed", || lab.containers().len() == 1);
    assert!(block(&lab).is_none());
}

#[test]
fn first_read_that_would_remove_running_apps_is_held_back() {
    let mut lab = Lab::new();
    lab.put_all(&workers(&lab, ["a", "b", "c", "d"]));
    until("all have converged", || all_converged(&lab, 4));
    lab.stop_agent();
    // As after an upgrade from a demae without a ledger, with a wrong prefix.
    fs::remove_file(lab.path("state/ledger")).expect("removed");
    lab.del("apps/");
    lab.start_agent(&[]);
    wait_block(&lab, "mass_removal");
    assert_eq!(lab.containers().len(), 4);
}

#[test]
fn mistyped_prefix_removes_nothing() {
    let mut lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    lab.stop_agent();
    let config = fs::read_to_string(lab.path("agent.toml")).expect("a file");
    fs::write(lab.path("agent.toml"), config.replace("[etcd]\n", "[etcd]\nprefix = \"/damae\"\n")).expect("a file");
    lab.start_agent(&[]);
    let found = wait_block(&lab, "other_store");
    assert!(found.message.contains("prefix `/demae`"), "{found}");
    assert_eq!(lab.get("web.test", "/").map(|(code, _)| code), Ok(200));
    assert!(output_of(&lab.demae(&["store", "accept"])).contains("would be removed from this host: web"));
    lab.stop_agent();
    fs::write(lab.path("agent.toml"), config).expect("a file");
    lab.start_agent(&[]);
    lab.wait_app("web", "converged as before", |s| s.state == State::Converged);
    assert_eq!(lab.get_key("secret/release-key").len(), 64);
}

#[test]
fn etcd_restarts_during_deploys_lose_no_request() {
    let mut lab = Lab::with(&Setup { sections: "[rollouts]\nenabled = false\n", ..Setup::default() });
    init(&lab);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    lab.image("v2");
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    until("requests are served", || load.requests() > 50);
    let rounds = std::env::var("DEMAE_ETCD_ROUNDS").map_or(4, |n| n.parse().expect("a number"));
    for round in 0..rounds {
        let version = if round % 2 == 0 { "v2" } else { "v1" };
        // During the deploy, at another step each time.
        let moments = ["write_env_file", "create", "start", "switch", "stop"];
        let moment = format!("\"step\":\"{}\"", moments[round % moments.len()]);
        let known = lab.agent_log().matches(&moment).count();
        lab.put("apps/web/image", &lab.image(version));
        until("a step of the deploy", || lab.agent_log().matches(&moment).count() > known);
        lab.stop_etcd();
        lab.wait_app("web", "deployed without the store", |s| {
            s.state == State::Converged && s.image == Some(lab.image(version))
        });
        lab.start_etcd();
        until("the store is read again", || lab.status().is_some_and(|s| s.store.error.is_none()));
    }
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    println!("{rounds} times without etcd: requests: {}  failed: {}", tally.requests, tally.failed + tally.stale);
}

#[test]
fn turn_without_etcd_is_finished_once_it_is_back_and_loses_no_request() {
    let mut lab = Lab::new();
    init(&lab);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    lab.image("v2");
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    until("requests are served", || load.requests() > 50);
    for (moment, version) in [("create", "v2"), ("switch", "v1")] {
        let moment = format!("\"step\":\"{moment}\"");
        let known = lab.agent_log().matches(&moment).count();
        lab.put("apps/web/image", &lab.image(version));
        until("a step of the deploy", || lab.agent_log().matches(&moment).count() > known);
        lab.stop_etcd();
        until("the store is missed", || lab.status().is_some_and(|s| s.store.error.is_some()));
        lab.start_etcd();
        lab.wait_app("web", "deployed", |s| s.state == State::Converged && s.image == Some(lab.image(version)));
    }
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
}
