//! From another version of the agent to this one and back, under load, and both on one etcd.

use std::{path::PathBuf, time::Duration};

use crate::support::{
    containers::inspect,
    lab::{Lab, Setup},
    load::{Client, Load},
    process::docker,
    wait::until,
};
use demae::model::status::State;

const APPS: usize = 20;

/// The program of the other version, see `scripts/upgrade.sh`.
fn other() -> PathBuf {
    std::env::var_os("DEMAE_OTHER_VERSION").expect("`make upgrade FROM=<commit>` sets DEMAE_OTHER_VERSION").into()
}

fn host(n: usize) -> String {
    format!("app{n}.test")
}

/// Each container with the time of its start.
fn running(lab: &Lab) -> Vec<String> {
    let filter = format!("label=demae.host={}", lab.host);
    let ids = docker(&["ps", "-q", "--no-trunc", "--filter", &filter]);
    let mut found: Vec<String> = ids.lines().map(|id| inspect(id, "{{.Id}} {{.State.StartedAt}}")).collect();
    found.sort();
    found
}

fn wait_all(lab: &Lab) {
    until("all apps are converged", || {
        lab.status().is_some_and(|status| {
            status.apps.len() == APPS
                && status.apps.iter().all(|app| app.state == State::Converged && app.healthy == 1)
                && status.store.block.is_none()
                && status.store.stale_since.is_none()
        })
    });
}

#[test]
#[ignore = "needs the program of another version: make upgrade FROM=<commit>"]
fn upgrade_and_downgrade_replace_no_container_and_lose_no_request() {
    let mut lab = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    let (image, other) = (lab.image("v1"), other());
    let spec = |n: usize| {
        if n.is_multiple_of(2) { lab.socket_spec(&image, &host(n), "") } else { lab.port_spec(&image, &host(n), "") }
    };
    let all: Vec<(String, String)> = (0..APPS).map(|n| (format!("apps/app{n}/spec"), spec(n))).collect();
    lab.put_all(&all);
    lab.start_agent_of(&other, &[]);
    wait_all(&lab);
    assert!(lab.demae(&["init"]).status.success());
    let before = running(&lab);
    assert_eq!(before.len(), APPS);
    let client = || vec![Client::get(false).pausing(Duration::from_millis(20)), Client::post(true)];
    let loads: Vec<Load> = (0..4).map(|n| Load::start(lab.ingress, &host(n), client())).collect();
    // Up, down and up again: by a stop and by a kill.
    for (round, is_other) in [false, true, false, true, false].into_iter().enumerate() {
        if round < 2 {
            lab.stop_agent();
        } else {
            lab.kill_agent();
        }
        if is_other {
            lab.start_agent_of(&other, &[]);
        } else {
            lab.start_agent(&[]);
        }
        wait_all(&lab);
        assert_eq!(running(&lab), before, "round {round}: a container was replaced or restarted");
    }
    // What this version does next works on what the other one left.
    lab.deploy("app0", "apps/app0/image", &lab.image("v2"));
    lab.deploy("app1", "apps/app1/image", &lab.image("v2"));
    let mut requests = 0;
    for load in loads {
        let tally = load.stop();
        // A reload for a port may end a connection that the client was about to use again.
        assert_eq!(tally.failed, 0, "{:#?}", tally.reasons);
        requests += tally.requests;
    }
    println!("5 changes of version, {APPS} apps, {requests} requests, 0 failed");
}

/// A key of a version to come costs this one a warning, and the app nothing.
#[test]
fn unknown_key_below_an_app_is_a_warning() {
    let lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    lab.put("apps/web/made_up", "of a version to come");
    until("it is reported", || {
        lab.status().is_some_and(|s| s.unreadable.iter().any(|problem| problem.key == "apps/web/made_up"))
    });
    lab.deploy("web", "apps/web/image", &lab.image("v2"));
    assert_eq!(lab.app("web").map(|app| app.state), Some(State::Converged));
    let info: serde_json::Value =
        serde_json::from_str(&lab.get_key(&format!("state/hosts/{}", lab.host))).expect("the host is published");
    let features: Vec<&str> = info["features"].as_array().into_iter().flatten().filter_map(|f| f.as_str()).collect();
    assert_eq!(features, [demae::store::FEATURES, &[demae::store::ROLLOUTS]].concat());
}
