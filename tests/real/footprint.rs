//! After each fault the agent's footprint is as before: file descriptors, tasks, and files on its disk.
#![allow(clippy::disallowed_methods, clippy::print_stdout, reason = "a test runs programs, and tells its figures")]

use std::{fs, time::Instant};

use crate::support::{
    containers::{ids, inspect, kill_and_wait, only},
    disk::Disk,
    lab::{Lab, Setup},
    process::{docker, signal},
    relay::{Relay, is},
    wait::{PATIENCE, pause, until},
};
use demae::model::status::State;

/// A host with Docker behind a proxy and its state on a small disk, which is dropped before the lab.
struct Site {
    relay: Relay,
    disk: Disk,
    lab: Lab,
}

/// Resources that an agent holds.
#[derive(Debug, PartialEq)]
struct Footprint {
    files: f64,
    tasks: f64,
    /// Files and directories below its state and run directories.
    disk: usize,
    /// Kilobytes in them, each file rounded up to blocks of 4.
    kilobytes: u64,
}

fn footprint(lab: &Lab) -> Footprint {
    let on_disk = lab.files();
    let sizes = on_disk.iter().filter_map(|p| fs::symlink_metadata(p).ok()).map(|m| m.len().div_ceil(4096) * 4);
    Footprint {
        files: lab.metric("process_open_fds", ""),
        tasks: lab.metric("demae_tasks", ""),
        disk: on_disk.len(),
        kilobytes: sizes.sum(),
    }
}

/// Repetitions of each fault: leaks add up.
const ROUNDS: usize = 3;
/// Connections that happen to be open, and their tasks. Fewer than rounds.
const TOLERANCE: f64 = 2.0;

/// The start time of `web`'s container, and whether it runs.
fn runs(lab: &Lab) -> String {
    inspect(&only(lab, "web"), "{{.State.StartedAt}} {{.State.Running}}")
}

/// A fault, and its end.
type Fault = (&'static str, fn(&mut Site));

/// Of etcd, nginx and the engine.
const OF_OTHERS: [Fault; 8] = [
    ("the store is wiped, and put back", |Site { lab, .. }| {
        let keys = ["cluster", "apps/web/spec", "apps/web/restart", "apps/api/spec"];
        let kept = keys.map(|key| (key, lab.get_key(key))).into_iter().filter(|(_, value)| !value.is_empty());
        let kept: Vec<(&str, String)> = kept.collect();
        lab.del("");
        until("the store is quarantined", || lab.status().is_some_and(|s| s.store.block.is_some()));
        for (key, value) in kept {
            lab.put(key, &value);
        }
        until("the store is trusted again", || lab.status().is_some_and(|s| s.store.block.is_none()));
    }),
    ("etcd is down", |Site { lab, .. }| {
        lab.stop_etcd();
        until("the agent notices", || lab.status().is_some_and(|s| s.store.error.is_some()));
        lab.start_etcd();
    }),
    ("etcd hangs", |Site { lab, .. }| {
        lab.signal_etcd("-STOP");
        until("the agent notices", || lab.status().is_some_and(|s| s.store.error.is_some()));
        lab.signal_etcd("-CONT");
    }),
    ("the lease is lost", |Site { lab, .. }| {
        let key = format!("state/hosts/{}", lab.host);
        until("the agent has published its host", || !lab.get_key(&key).is_empty());
        lab.revoke_leases();
        until("the host is published again", || !lab.get_key(&key).is_empty());
    }),
    ("nginx is down", |Site { lab, .. }| {
        lab.stop_nginx();
        until("the agent notices", || lab.status().is_some_and(|s| s.proxy.is_some()));
        lab.start_nginx();
    }),
    ("the engine is down", |Site { lab, relay, .. }| {
        // Requests end without a response, and open connections are closed.
        relay.hold(|_| true);
        relay.cut();
        until("the agent notices", || {
            relay.cut();
            lab.status().is_some_and(|s| s.proxy.is_some_and(|note| note.contains("Docker does not answer")))
        });
        relay.pass();
    }),
    ("the engine stalls for a moment", |Site { lab, relay, .. }| {
        let before = runs(lab);
        relay.hold(|_| true);
        docker(&["kill", &only(lab, "web")]);
        until("calls hang", || relay.held() > 0);
        relay.pass();
        until("it runs again", || runs(lab) != before && runs(lab).ends_with("true"));
    }),
    ("another agent takes the name", |Site { lab, .. }| {
        let key = format!("state/hosts/{}", lab.host);
        let other = format!("{{\"host\": \"{}\", \"owner\": {{\"id\": \"other\", \"run\": \"1\"}}}}", lab.host);
        lab.put(&key, &other);
        until("it is reported", || lab.status().is_some_and(|s| s.store.block.is_some_and(|b| b.kind == "name_taken")));
        lab.del(&key);
        until("the name is free again", || lab.status().is_some_and(|s| s.store.block.is_none()));
    }),
];

/// Of apps, files and the agent itself.
const OF_THIS_HOST: [Fault; 9] = [
    ("a container is killed", |Site { lab, .. }| kill_and_wait(lab, "web", "web.test")),
    ("a container is removed", |Site { lab, .. }| {
        let before = only(lab, "web");
        docker(&["rm", "-f", &before]);
        until("it is recreated", || ids(lab, "web").first().is_some_and(|id| *id != before));
    }),
    ("a release fails", |Site { lab, .. }| {
        lab.put("env/web/MOOD", "exit");
        lab.wait_app("web", "halted", |a| a.state == State::Blocked);
        lab.del("env/web/MOOD");
    }),
    ("a spec is broken", |Site { lab, .. }| {
        let good = lab.get_key("apps/web/spec");
        lab.put("apps/web/spec", "image: [");
        lab.wait_app("web", "invalid", |a| a.state == State::Invalid);
        lab.put("apps/web/spec", &good);
    }),
    ("the engine loses answers", |Site { lab, relay, .. }| {
        let (before, release) = (relay.lost(), lab.app("web").and_then(|a| a.release));
        relay.lose_next(is("POST", "/containers/create"));
        lab.put("apps/web/restart", &format!("{before}"));
        until("an answer is lost", || relay.lost() > before);
        lab.wait_app("web", "converged on another release", |a| a.state == State::Converged && a.release != release);
    }),
    ("the disk is full", |Site { lab, disk, .. }| {
        disk.fill();
        let release = lab.app("web").and_then(|a| a.release);
        lab.put("apps/web/restart", &format!("after {release:?}"));
        until("the ledger cannot be written", || {
            lab.status().is_some_and(|s| s.store.error.is_some_and(|e| e.contains("No space left")))
        });
        disk.clear();
        lab.wait_app("web", "converged on another release", |a| a.state == State::Converged && a.release != release);
    }),
    ("an image cannot be pulled", |Site { lab, .. }| {
        lab.put("apps/web/image", "127.0.0.1:1/none:v1");
        lab.wait_app("web", "waiting for the image", |a| a.is("image"));
        lab.del("apps/web/image");
    }),
    ("nginx's own files are broken", |Site { lab, .. }| {
        let (conf, spec) = (lab.path("nginx.conf"), lab.get_key("apps/api/spec"));
        let good = fs::read_to_string(&conf).expect("a file");
        fs::write(&conf, format!("{good}\nbroken;\n")).expect("a file");
        lab.put("apps/api/spec", &spec.replace("api.test", "other.test"));
        until("it is reported", || lab.status().is_some_and(|s| s.proxy.is_some_and(|note| note.contains("nginx -t"))));
        fs::write(&conf, good).expect("a file");
        lab.put("apps/api/spec", &spec);
    }),
    ("the agent stands still", |Site { lab, .. }| {
        let pid = lab.agent_pid().expect("it runs");
        let (before, ran) = (lab.metric("demae_standstills_total", ""), runs(lab));
        signal(pid, "-STOP");
        docker(&["kill", &only(lab, "web")]);
        let began = Instant::now();
        until("the standstill is long enough", || began.elapsed().as_secs() > 10);
        signal(pid, "-CONT");
        until("it detects the standstill", || lab.metric("demae_standstills_total", "") > before);
        until("it runs again", || runs(lab) != ran && runs(lab).ends_with("true"));
    }),
];

#[test]
fn agent_footprint_is_unchanged_after_faults_of_what_it_uses() {
    expect_unchanged(&OF_OTHERS);
}

#[test]
fn agent_footprint_is_unchanged_after_faults_of_apps_and_files() {
    expect_unchanged(&OF_THIS_HOST);
}

fn expect_unchanged(faults: &[Fault]) {
    // Changes without an event are seen soon.
    let mut lab = Lab::with(&Setup { no_agent: true, top: "resync = \"1s\"", ..Setup::default() });
    let disk = Disk::mount(lab.path("state"));
    let relay = Relay::start(&lab.path("docker.sock"));
    lab.start_agent(&[("DOCKER_HOST", &relay.host())]);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    lab.deploy("api", "apps/api/spec", &lab.socket_spec(&lab.image("v1"), "api.test", ""));
    assert!(lab.demae(&["init"]).status.success());
    let mut site = Site { relay, disk, lab };
    let at_rest = |lab: &Lab| {
        let converged = |app| lab.app(app).is_some_and(|a| a.state == State::Converged && a.healthy == a.wanted);
        let whole = lab.status().is_some_and(|s| s.store.error.is_none() && s.proxy.is_none());
        // The leader has a connection of its own, and leads again some seconds after it has lost its lease.
        let leads = || !lab.get_key("state/leader").is_empty();
        whole && converged("web") && converged("api") && lab.containers().len() == 2 && leads()
    };
    // Run once first: connections that are kept and caches are only created at first need.
    for (_, fault) in faults {
        fault(&mut site);
        until("the fault is over", || at_rest(&site.lab));
    }
    let before = footprint(&site.lab);
    for (what, fault) in faults {
        for _ in 0..ROUNDS {
            fault(&mut site);
            until("the fault is over", || at_rest(&site.lab));
        }
        let lab = &site.lab;
        let mut now = footprint(lab);
        let began = Instant::now();
        while !(at_rest(lab)
            && now.files <= before.files + TOLERANCE
            && now.tasks <= before.tasks + TOLERANCE
            && now.disk == before.disk
            && now.kilobytes <= before.kilobytes + 4)
        {
            assert!(
                began.elapsed() < PATIENCE,
                "after `{what}` it holds {now:?}, and {before:?} before: {:#?}",
                lab.files()
            );
            pause();
            now = footprint(lab);
        }
        println!("{what}: {now:?}, and {before:?} before");
    }
}
