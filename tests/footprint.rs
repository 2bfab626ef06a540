//! After each fault, what the agent holds is what it held before: files, tasks, and what lies on its disk.
#![allow(clippy::print_stdout, reason = "a test tells its figures")]

mod support;

use std::time::Instant;

use support::lab::{Lab, PATIENCE, docker, pause, until};

use demae::model::status::State;

/// What an agent holds.
#[derive(Debug, PartialEq)]
struct Footprint {
    files: f64,
    tasks: f64,
    /// What lies on its disk, without the numbers that count up.
    disk: usize,
}

fn footprint(lab: &Lab) -> Footprint {
    Footprint {
        files: lab.metric("process_open_fds", ""),
        tasks: lab.metric("demae_tasks", ""),
        disk: lab.traces().len(),
    }
}

/// How often each fault comes: what each leaves behind adds up.
const ROUNDS: usize = 4;
/// Connections that happen to be open just now, and their tasks. Fewer than rounds.
const MOVES: f64 = 2.0;

/// A fault, and the end of it.
type Fault = (&'static str, fn(&mut Lab));

const FAULTS: [Fault; 6] = [
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
            && now.disk == before.disk)
        {
            assert!(
                began.elapsed() < PATIENCE,
                "after `{what}` it holds {now:?}, and {before:?} before: {:#?}",
                lab.traces()
            );
            pause();
            now = footprint(&lab);
        }
        println!("{what}: {now:?}, and {before:?} before");
    }
}
