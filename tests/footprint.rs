//! After each fault, what the agent holds is what it held before: files, tasks, and what lies on its disk.
#![allow(clippy::print_stdout, reason = "a test tells its figures")]

mod support;

use std::{fs, path::PathBuf, time::Instant};

use support::lab::{Lab, PATIENCE, docker, pause, until};

use demae::model::status::State;

/// What an agent holds.
#[derive(Debug, PartialEq)]
struct Footprint {
    files: f64,
    tasks: f64,
    /// Files and directories below its two directories.
    disk: usize,
    /// Kilobytes in them, each file in whole blocks of 4.
    kilobytes: u64,
}

fn footprint(lab: &Lab) -> Footprint {
    Footprint {
        files: lab.metric("process_open_fds", ""),
        tasks: lab.metric("demae_tasks", ""),
        disk: all(lab).len(),
        kilobytes: all(lab).iter().filter_map(|p| p.symlink_metadata().ok()).map(|m| m.len().div_ceil(4096) * 4).sum(),
    }
}

/// Everything below the agent's directories.
fn all(lab: &Lab) -> Vec<PathBuf> {
    let (mut found, mut todo) = (Vec::new(), vec![lab.path("state"), lab.path("run")]);
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() && !path.is_symlink() {
                todo.push(path.clone());
            }
            found.push(path);
        }
    }
    found.sort();
    found
}

/// How often each fault comes: what each leaves behind adds up.
const ROUNDS: usize = 4;
/// Connections that happen to be open just now, and their tasks. Fewer than rounds.
const MOVES: f64 = 2.0;

/// A fault, and the end of it.
type Fault = (&'static str, fn(&mut Lab));

const FAULTS: [Fault; 7] = [
    ("the store is wiped, and put back", |lab| {
        let kept = ["cluster", "apps/web/spec", "apps/api/spec"].map(|key| (key, lab.get_key(key)));
        lab.del("");
        until("the agent does not believe it", || lab.status().is_some_and(|s| s.store.block.is_some()));
        for (key, value) in kept {
            lab.put(key, &value);
        }
        until("it is believed again", || lab.status().is_some_and(|s| s.store.block.is_none()));
    }),
    ("etcd is away", |lab| {
        lab.stop_etcd();
        until("the agent notices", || lab.status().is_some_and(|s| s.store.error.is_some()));
        lab.start_etcd();
    }),
    ("nginx is away", |lab| {
        lab.stop_nginx();
        until("the agent notices", || lab.status().is_some_and(|s| s.proxy.is_some()));
        lab.start_nginx();
    }),
    ("a container is killed", |lab| {
        docker(&["kill", &lab.containers()[0]]);
    }),
    ("a container is removed", |lab| {
        docker(&["rm", "-f", &lab.containers()[0]]);
    }),
    ("a release fails", |lab| {
        lab.put("env/web/MOOD", "exit");
        lab.wait_app("web", "halted", |a| a.state == State::Blocked);
        lab.del("env/web/MOOD");
    }),
    ("a spec is broken", |lab| {
        let good = lab.get_key("apps/web/spec");
        lab.put("apps/web/spec", "image: [");
        lab.wait_app("web", "invalid", |a| a.state == State::Invalid);
        lab.put("apps/web/spec", &good);
    }),
];

#[test]
fn what_the_agent_holds_is_as_before_after_each_fault() {
    let mut lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    lab.deploy("api", "apps/api/spec", &lab.socket_spec(&lab.image("v1"), "api.test", ""));
    assert!(lab.demae(&["init"]).status.success());
    let at_rest = |lab: &Lab| {
        let converged = |app| lab.app(app).is_some_and(|a| a.state == State::Converged && a.healthy == a.wanted);
        let whole = lab.status().is_some_and(|s| s.store.error.is_none() && s.proxy.is_none());
        whole && converged("web") && converged("api") && lab.containers().len() == 2
    };
    // Once for what is only made at first need: connections that are kept, files that are remembered.
    for (_, fault) in FAULTS {
        fault(&mut lab);
        until("the fault is over", || at_rest(&lab));
    }
    let before = footprint(&lab);
    for (what, fault) in FAULTS {
        for _ in 0..ROUNDS {
            fault(&mut lab);
            until("the fault is over", || at_rest(&lab));
        }
        let mut now = footprint(&lab);
        let began = Instant::now();
        while !(at_rest(&lab)
            && now.files <= before.files + MOVES
            && now.tasks <= before.tasks + MOVES
            && now.disk == before.disk
            && now.kilobytes <= before.kilobytes + 4)
        {
            assert!(
                began.elapsed() < PATIENCE,
                "after `{what}` it holds {now:?}, and {before:?} before: {:#?}",
                all(&lab)
            );
            pause();
            now = footprint(&lab);
        }
        println!("{what}: {now:?}, and {before:?} before");
    }
}
