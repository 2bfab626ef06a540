//! Two machines with one host name: one acts, the other reports it and touches nothing.
#![expect(clippy::disallowed_methods, reason = "a test writes files of its own")]

use std::{fs, time::Duration};

use crate::support::{
    lab::{Lab, Setup},
    load::{Load, mixed},
    process::docker,
    wait::until,
};
use demae::model::status::State;

/// Another machine with the same store and host name.
fn namesake(first: &Lab) -> Lab {
    let second = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    let file = second.path("agent.toml");
    let text = fs::read_to_string(&file).expect("a file");
    let text = text.replace(&second.etcd.to_string(), &first.etcd.to_string()).replace(&second.host, &first.host);
    fs::write(&file, text).expect("a file");
    second
}

fn is_blocked(lab: &Lab) -> bool {
    lab.status().and_then(|s| s.store.block).is_some_and(|b| b.kind == "name_taken")
}

fn is_free(lab: &Lab) -> bool {
    lab.status().is_some_and(|s| s.store.block.is_none())
}

/// A field of the host name's owner: `id` or `run`.
fn of_owner(lab: &Lab, what: &str) -> String {
    let text = lab.get_key(&format!("state/hosts/{}", lab.host));
    let info: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    info["owner"][what].as_str().unwrap_or_default().to_owned()
}

fn owner(lab: &Lab) -> String {
    of_owner(lab, "id")
}

fn id(lab: &Lab) -> String {
    fs::read_to_string(lab.path("state/agent.id")).unwrap_or_default().trim().to_owned()
}

fn wait_name(lab: &Lab) {
    until("it owns its name", || !id(lab).is_empty() && owner(lab) == id(lab));
}

/// They even share an engine, where each would treat the other's containers as its own.
#[test]
fn second_machine_with_the_same_name_does_not_act() {
    let mut first = Lab::new();
    first.deploy("web", "apps/web/spec", &first.socket_spec(&first.image("v1"), "web.test", ""));
    wait_name(&first);
    let containers = || docker(&["ps", "-aq", "--no-trunc", "--filter", &format!("label=demae.host={}", first.host)]);
    let before = containers();
    assert!(!before.is_empty(), "there is a container of that host");
    let load = Load::start(first.ingress, "web.test", mixed(Duration::from_millis(5)));
    let mut second = namesake(&first);
    second.start_agent(&[]);
    until("the second one is blocked", || is_blocked(&second));
    assert_eq!(containers(), before, "it has touched nothing");
    until("the block is exported", || second.metric("demae_store_blocked", "name_taken") == 1.0);
    let output_of = |args: &[&str]| {
        let output = second.demae(args);
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    };
    let doctor = output_of(&["doctor"]);
    assert!(doctor.contains(&format!("another agent has the name `{}`", first.host)), "{doctor}");
    let accept = output_of(&["store", "accept", "--yes"]);
    assert!(
        accept.contains("`demae store accept` is not for this: give one of the two machines another name"),
        "{accept}"
    );

    // The first one continues as before.
    first.deploy("web", "apps/web/image", &first.image("v2"));
    assert!(is_blocked(&second) && is_free(&first));
    assert_eq!(owner(&first), id(&first));
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);

    // Once it releases its name, the other one may claim it.
    first.del("apps/");
    until("all are removed", || containers().is_empty());
    first.stop_agent();
    until("the name is free", || is_free(&second));
    first.put("apps/web/spec", &second.socket_spec(&first.image("v1"), "web.test", ""));
    second.wait_app("web", "converged", |s| s.state == State::Converged);
    until("the second one owns the name", || owner(&first) == id(&second));
    first.start_agent(&[]);
    until("the first one is blocked now", || is_blocked(&first));
    second.wait_app("web", "converged", |s| s.state == State::Converged);
}

#[test]
fn killed_agent_does_not_delay_the_next_run() {
    let mut lab = Lab::new();
    wait_name(&lab);
    let known = id(&lab);
    lab.kill_agent();
    assert_eq!(owner(&lab), known, "its lease is still valid");
    lab.start_agent(&[]);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    assert_eq!((id(&lab), owner(&lab)), (known.clone(), known));
    assert!(!lab.agent_log().contains("has the name"), "{}", lab.agent_log());
}

#[test]
fn copied_state_directory_is_detected() {
    let first = Lab::new();
    wait_name(&first);
    let mut copy = namesake(&first);
    fs::create_dir_all(copy.path("state")).expect("a directory");
    fs::copy(first.path("state/agent.id"), copy.path("state/agent.id")).expect("a copy");
    let run = of_owner(&first, "run");
    copy.start_agent(&[]);
    until("the copy has claimed the name", || of_owner(&first, "run") != run);
    // At its next write the first one finds the key changed.
    first.put(&format!("hosts/{}/labels", first.host), "rack: '7'");
    until("the first one stops acting", || is_blocked(&first));
    assert!(is_free(&copy), "and only that one");
    let block = first.status().and_then(|s| s.store.block).map(|b| b.to_string()).unwrap_or_default();
    assert!(block.contains("a copy of this one's state directory"), "{block}");
    copy.stop_agent();
    until("the first one acts again once the copy has stopped", || is_free(&first));
    first.deploy("web", "apps/web/spec", &first.socket_spec(&first.image("v1"), "web.test", ""));
}
