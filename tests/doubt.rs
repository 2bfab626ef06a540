//! The store vanishes, is wiped, is another one, is an older one, or takes most apps away: what serves goes on serving,
//! and a person is told what to do.
#![expect(clippy::disallowed_methods, reason = "a test moves directories of its own")]

mod support;

use std::{fs, process::Command, time::Duration};

use demae::model::status::State;
use support::{
    containers::{ids, only},
    doubts::{all_run, block, init, said, wait_block, workers},
    etcd::Etcd,
    lab::{Lab, Setup},
    load::{self, Load, mixed},
    names::free_address,
    process::docker,
    wait::until,
};

/// Copies a directory, as a backup of a disk would.
fn copy(from: &std::path::Path, to: &std::path::Path) {
    let status = Command::new("cp").arg("-a").arg(from).arg(to).status().expect("cp runs");
    assert!(status.success());
}

#[test]
fn an_agent_that_starts_without_its_store_goes_by_what_it_kept() {
    let mut lab = Lab::new();
    init(&lab);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    lab.deploy("gone", "apps/gone/spec", &lab.socket_spec(&lab.image("v1"), "gone.test", ""));
    lab.deploy("web", "apps/web/image", &lab.image("v2"));
    let before = lab.app("web").and_then(|a| a.release);
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    until("requests flow", || load.requests() > 50);
    lab.kill_agent();
    lab.stop_etcd();
    // An app that what was kept does not know: nobody knows whether it is wanted.
    let ledger = lab.path("state/ledger");
    let mode = fs::metadata(&ledger).map(|m| std::os::unix::fs::PermissionsExt::mode(&m.permissions()) & 0o777);
    assert_eq!(mode.expect("a ledger"), 0o600, "it holds what only root may see");
    lab.start_agent(&[]);
    let status = lab.wait_app("web", "known without the store", |s| s.state == State::Converged && s.healthy == 1);
    assert_eq!(status.release, before, "and it is the release that was proven");
    let host = lab.status().expect("a status");
    assert!(host.store.stale_since.is_some() && host.store.error.is_some(), "{:?}", host.store);
    let printed = said(&lab.demae(&["status"]));
    assert!(printed.contains("goes by what it kept on disk; that was last proven at"), "{printed}");
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);

    // Drift is repaired, also that of a container that is gone for good.
    let container = lab.containers().into_iter().find(|c| c.contains(".web.")).expect("a container");
    docker(&["rm", "-f", &container]);
    until("it is made anew", || lab.get("web.test", "/").is_ok_and(|(code, body)| code == 200 && body.contains("v2")));
    lab.wait_app("web", "converged", |s| s.state == State::Converged && s.healthy == 1);
    assert_eq!(lab.get("gone.test", "/").map(|(code, _)| code), Ok(200));

    // The store is back, and what it says now holds.
    lab.start_etcd();
    until("it is read", || lab.status().is_some_and(|s| s.store.stale_since.is_none()));
    lab.del("apps/gone/");
    until("what was deleted leaves", || lab.app("gone").is_none() && lab.containers().len() == 1);
    assert_eq!(lab.app("web").and_then(|a| a.release), before);
}

#[test]
fn a_damaged_ledger_stops_nothing_and_is_written_anew() {
    let mut lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    lab.stop_agent();
    lab.stop_etcd();
    let ledger = lab.path("state/ledger");
    let whole = fs::read(&ledger).expect("a ledger");
    fs::write(&ledger, &whole[..whole.len() / 2]).expect("a file");
    lab.start_agent(&[]);
    until("it says so", || lab.agent_log().contains("the ledger is damaged"));
    assert_eq!(lab.get("web.test", "/").map(|(code, _)| code), Ok(200));
    assert_eq!(lab.containers().len(), 1);
    lab.start_etcd();
    lab.wait_app("web", "converged", |s| s.state == State::Converged && s.healthy == 1);
    assert_ne!(fs::read(&ledger).expect("a ledger").len(), whole.len() / 2, "it is whole again");

    // Whether what runs here was wanted is not known without it, so nothing leaves unseen, be it one app.
    lab.stop_agent();
    fs::write(&ledger, &whole[..whole.len() / 2]).expect("a file");
    lab.del("apps/web/");
    lab.start_agent(&[]);
    let found = wait_block(&lab, "mass_removal");
    assert!(found.message.contains("1 of the 1 apps of this host would leave at once: web"), "{found}");
    assert_eq!(lab.get("web.test", "/").map(|(code, _)| code), Ok(200));
    assert!(lab.demae(&["confirm", "--yes"]).status.success());
    until("it leaves", || lab.containers().is_empty());
}

#[test]
fn a_wiped_store_stops_nothing_and_may_come_back() {
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
    until("it is measured", || lab.metric("demae_store_blocked", "sentinel_missing") == 1.0);
    let printed = said(&lab.demae(&["status"]));
    assert!(
        printed.contains("the store is not believed, and nothing changes: the store has no `cluster` key"),
        "{printed}"
    );
    let planned = said(&lab.demae(&["plan"]));
    assert!(planned.contains("the store is not taken now, and this is what an agent does by what it took last: the store has no `cluster` key"), "{planned}");
    let shown = lab.demae(&["store", "accept"]);
    assert!(!shown.status.success(), "nobody is there to be asked");
    assert!(said(&shown).contains("would leave this host: web"), "{}", said(&shown));
    // Somebody puts everything back: nothing was lost, and nothing is replaced.
    lab.put("apps/web/spec", &spec);
    lab.put("cluster", &sentinel);
    until("it is believed", || block(&lab).is_none());
    let status = lab.wait_app("web", "as it was", |s| s.state == State::Converged);
    assert_eq!(status.release, release, "the key that names releases was put back too");
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
}

#[test]
fn a_store_from_a_backup_is_noticed() {
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
    // Others write on, and the revision passes the one that was seen. The history is another one all the same.
    for n in 0..40 {
        lab.put("env/other/COUNT", &n.to_string());
    }
    lab.stop_agent();
    lab.start_agent(&[]);
    wait_block(&lab, "older_revision");
    let body = lab.get("web.test", "/").expect("it answers").1;
    assert!(body.contains("v2"), "the older image is not rolled out: {body}");
    let accept = lab.demae(&["store", "accept", "--yes"]);
    assert!(said(&accept).contains("would get another release: web"), "{}", said(&accept));
    until("the backup holds", || lab.get("web.test", "/").is_ok_and(|(_, body)| body.contains("v1")));
    lab.wait_app("web", "converged", |s| s.state == State::Converged);
}

/// What was only put after the backup is missing from it, as if somebody had deleted it; and once the restored store has
/// counted on, its revision says nothing either.
#[test]
fn a_backup_that_others_have_written_to_takes_nothing_away() {
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
    let found = wait_block(&lab, "older_revision");
    assert!(found.message.starts_with("`apps/late/spec` was written at revision "), "{found}");
    assert_eq!(lab.containers(), before);
    let accept = lab.demae(&["store", "accept"]);
    assert!(said(&accept).contains("would leave this host: late"), "{}", said(&accept));
    // What was lost is put back, and nobody has to accept anything.
    lab.put("apps/late/spec", &late);
    until("it is believed again", || block(&lab).is_none());
    assert_eq!(lab.containers(), before);
}

/// A store that has compacted what was seen last cannot say whether it knows it.
#[test]
fn a_store_that_has_forgotten_what_it_may_forget_is_believed() {
    let mut lab = Lab::new();
    init(&lab);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    lab.stop_agent();
    lab.del("apps/web/");
    lab.compact();
    lab.start_agent(&[]);
    until("what was deleted leaves", || lab.containers().is_empty());
    assert_eq!(block(&lab), None);
}

#[test]
fn what_made_sense_last_is_known_after_a_restart() {
    let mut lab = Lab::new();
    init(&lab);
    lab.put("env/common/COLOUR", "blue");
    let spec = lab.socket_spec(&lab.image("v1"), "web.test", "env_from: [common]");
    lab.deploy("web", "apps/web/spec", &spec);
    let release = lab.app("web").and_then(|a| a.release);
    lab.put("apps/web/spec", "image: [");
    lab.wait_app("web", "invalid", |a| a.state == State::Invalid);
    lab.put("env/common/COLOUR", "green");
    // Once with the store, once without.
    for etcd in [true, false] {
        lab.kill_agent();
        if !etcd {
            lab.stop_etcd();
        }
        docker(&["rm", "-f", &only(&lab, "web")]);
        lab.start_agent(&[]);
        until("it is made anew", || ids(&lab, "web").len() == 1);
        lab.wait_app("web", "still invalid, and serving", |a| a.state == State::Invalid && a.healthy == 1);
        until("it answers", || lab.get("web.test", "/env?COLOUR").is_ok_and(|(_, body)| body == "blue"));
        assert_eq!(lab.app("web").and_then(|a| a.release), release);
    }
    lab.start_etcd();
    lab.deploy("web", "apps/web/spec", &spec);
    until("what is good now holds", || lab.get("web.test", "/env?COLOUR").is_ok_and(|(_, body)| body == "green"));
}

/// Nobody ran `demae init`, and few apps are here. The key that releases are named by goes with them.
#[test]
fn a_store_without_identity_is_not_wiped_unseen() {
    let lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let (before, spec) = (lab.containers(), lab.get_key("apps/web/spec"));
    lab.del("");
    let found = wait_block(&lab, "sentinel_missing");
    assert!(found.message.contains("no `secret/release-key` any more"), "{found}");
    assert_eq!(lab.containers(), before);
    lab.put("apps/web/spec", &spec);
    until("it is believed again", || block(&lab).is_none());
    until("the key is put back", || lab.get_key("secret/release-key").len() == 64);
    assert_eq!(lab.containers(), before);
    // One that is taken away by itself leaves.
    lab.del("apps/web/");
    until("it leaves", || lab.containers().is_empty());
}

/// A fleet that does not believe its store does not weigh it down. What etcd counts tells that time has passed.
#[test]
fn a_store_that_is_not_believed_is_read_again_only_for_a_reason() {
    let lab = Lab::new();
    init(&lab);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let asked = || -> f64 {
        let (_, text) = load::get(lab.etcd, "localhost", "/metrics").expect("metrics of etcd");
        let name = "grpc_server_msg_received_total{grpc_method=\"Watch\"";
        let count = text.lines().find(|l| l.starts_with(name)).and_then(|l| l.rsplit(' ').next()?.parse().ok());
        count.unwrap_or_else(|| panic!("etcd counts {name}: {text}"))
    };
    let doubts = || lab.metric("demae_store_errors_total", "doubt");
    let cluster = lab.get_key("cluster");
    lab.del("cluster");
    wait_block(&lab, "sentinel_missing");
    // What the watch told of was read once.
    until("it was read", || doubts() == 2.0);
    let signs = asked();
    until("the watch was asked for a sign of life", || asked() > signs);
    assert_eq!(doubts(), 2.0, "nothing was read meanwhile");
    lab.put("env/web/GREETING", "again");
    until("a change is read", || doubts() == 3.0);
    // So is one that the watch does not see.
    let key = lab.get_key("secret/release-key");
    lab.del("secret/release-key");
    until("the key is missed", || doubts() == 4.0);
    lab.put("secret/release-key", &key);
    lab.put("cluster", &cluster);
    until("it is believed again", || block(&lab).is_none());
    until("the change is there", || lab.get("web.test", "/env?GREETING").is_ok_and(|(_, body)| body == "again"));
}

#[test]
fn a_mode_that_cannot_be_read_starts_nothing_after_a_restart() {
    let mut lab = Lab::new();
    let mode = format!("hosts/{}/mode", lab.host);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    lab.put(&mode, "drained");
    until("it leaves", || lab.containers().is_empty());
    lab.put(&mode, "draned");
    until("it is told", || said(&lab.demae(&["status"])).contains("this is not a mode"));
    lab.kill_agent();
    lab.start_agent(&[]);
    lab.wait_app("web", "blocked", |s| s.state == State::Blocked && s.reason.contains("cordoned"));
    assert!(lab.containers().is_empty());
    lab.put(&mode, "active");
    lab.wait_app("web", "converged", |s| s.state == State::Converged && s.healthy == 1);
}

/// One of two endpoints leads to an etcd of somebody else's.
#[test]
fn a_member_that_is_not_believed_keeps_nobody_from_the_others() {
    let mut lab = Lab::with(&Setup { no_agent: true, top: "resync = \"2s\"", ..Setup::default() });
    let stranger = free_address();
    let _etcd = Etcd::start(lab.dir.path(), "stranger", stranger, &[("stranger", free_address())], &[]);
    until("it takes connections", || std::net::TcpStream::connect(stranger).is_ok());
    let config = fs::read_to_string(lab.path("agent.toml")).expect("a file");
    let both = format!("endpoints = [\"{}\", \"{stranger}\"]", lab.etcd);
    fs::write(lab.path("agent.toml"), config.replace(&format!("endpoints = [\"{}\"]", lab.etcd), &both))
        .expect("a file");
    lab.start_agent(&[]);
    init(&lab);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    lab.put_all(&workers(&lab, ["other"]));
    until("both run", || all_run(&lab, 2));
    let before = lab.containers();
    let strange = |words: &[&str]| {
        let mut asked = Command::new("etcdctl");
        asked.env("ETCDCTL_API", "3").args(["--endpoints", &stranger.to_string()]).args(words);
        let told = asked.output().expect("etcdctl runs");
        assert!(told.status.success(), "{told:?}");
        String::from_utf8_lossy(&told.stdout).into_owned()
    };
    lab.stop_etcd();
    wait_block(&lab, "sentinel_missing");
    assert_eq!(lab.containers(), before);
    // Whoever publishes goes from member to member by itself, and takes a lease before it knows anything.
    until("who publishes has come there too", || !strange(&["lease", "list"]).contains("found 0 leases"));
    lab.start_etcd();
    until("the right one is asked again", || {
        lab.status().is_some_and(|s| s.store.block.is_none() && s.store.error.is_none())
    });
    let image = lab.image("v2");
    lab.deploy("web", "apps/web/image", &image);
    let key = format!("state/apps/web/{}", lab.host);
    until("the right one is told of it", || lab.get_key(&key).contains(&image));
    assert_eq!(strange(&["get", "--prefix", "/", "--keys-only"]), "", "and the stranger of nothing");
    // What the stranger lacks is no reason to doubt what leaves the right one.
    lab.stop_etcd();
    wait_block(&lab, "sentinel_missing");
    lab.stop_agent();
    lab.start_etcd();
    lab.del("apps/other/");
    lab.start_agent(&[]);
    until("it has left", || lab.containers().len() == 1);
    assert!(block(&lab).is_none());
}

#[test]
fn a_first_read_that_takes_away_what_runs_here_is_held_back() {
    let mut lab = Lab::new();
    lab.put_all(&workers(&lab, ["a", "b", "c", "d"]));
    until("all run", || all_run(&lab, 4));
    lab.stop_agent();
    // As after an upgrade from a demae that kept no ledger, with a prefix that is not the right one.
    fs::remove_file(lab.path("state/ledger")).expect("removed");
    lab.del("apps/");
    lab.start_agent(&[]);
    wait_block(&lab, "mass_removal");
    assert_eq!(lab.containers().len(), 4);
}

#[test]
fn a_prefix_that_was_mistyped_takes_nothing_away() {
    let mut lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    lab.stop_agent();
    let config = fs::read_to_string(lab.path("agent.toml")).expect("a file");
    fs::write(lab.path("agent.toml"), config.replace("[etcd]\n", "[etcd]\nprefix = \"/damae\"\n")).expect("a file");
    lab.start_agent(&[]);
    let found = wait_block(&lab, "other_store");
    assert!(found.message.contains("prefix `/demae`"), "{found}");
    assert_eq!(lab.get("web.test", "/").map(|(code, _)| code), Ok(200));
    assert!(said(&lab.demae(&["store", "accept"])).contains("would leave this host: web"));
    lab.stop_agent();
    fs::write(lab.path("agent.toml"), config).expect("a file");
    lab.start_agent(&[]);
    lab.wait_app("web", "as it was", |s| s.state == State::Converged);
    assert_eq!(lab.get_key("secret/release-key").len(), 64);
}

#[test]
fn etcd_comes_and_goes_while_apps_are_deployed() {
    let mut lab = Lab::new();
    init(&lab);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    lab.image("v2");
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    until("requests flow", || load.requests() > 50);
    let rounds = std::env::var("DEMAE_ETCD_ROUNDS").map_or(4, |n| n.parse().expect("a number"));
    for round in 0..rounds {
        let version = if round % 2 == 0 { "v2" } else { "v1" };
        // In the middle of it, at another moment each time.
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
