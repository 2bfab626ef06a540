//! What an agent takes for its own, and what may leave: two agents of one name, a lost ledger, deletions one by one.
#![expect(clippy::disallowed_methods, reason = "a test writes files of its own")]

mod support;

use std::fs;

use demae::model::status::State;
use support::{
    containers::only,
    lab::{Lab, Setup},
    load::{Client, Load},
    wait::until,
};

fn worker(lab: &Lab) -> String {
    format!("image: \"{}\"\nnetwork_mode: none\nstop_grace_period: 1s\n", lab.image("v1"))
}

#[test]
fn an_agent_with_the_name_of_another_leaves_its_containers_alone() {
    let mut lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.port_spec(&lab.image("v1"), "web.test", ""));
    let before = only(&lab, "web");
    let load = Load::start(lab.ingress, "web.test", vec![Client::get(false)]);
    until("requests flow", || load.requests() > 50);

    // Another etcd, other directories, the same name and engine.
    let mut other = Lab::with(&Setup { no_agent: true, top: "resync = \"1s\"\n", ..Setup::default() });
    let file = other.path("agent.toml");
    let text = fs::read_to_string(&file).expect("a file").replace(&other.host, &lab.host);
    fs::write(&file, text).expect("a file");
    other.start_agent(&[]);
    until("the other agent tells whose containers they are", || {
        other.status().and_then(|s| s.proxy).is_some_and(|note| note.contains("belong to another agent"))
    });
    let doctor = String::from_utf8_lossy(&other.demae(&["doctor"]).stdout).into_owned();
    assert!(doctor.contains("belong to another agent"), "{doctor}");
    // It wants the app too: nothing is created beside it.
    other.put("apps/web/spec", &other.port_spec(&lab.image("v1"), "web.test", ""));
    let blocked = other.wait_app("web", "blocked", |s| s.state == State::Blocked);
    assert!(blocked.reason.contains("another agent") && blocked.reason.contains("demae adopt"), "{}", blocked.reason);
    assert_eq!(only(&lab, "web"), before);
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);

    // On purpose, once the first one is gone for good.
    lab.stop_agent();
    let id = fs::read_to_string(lab.path("state/agent.id")).expect("an id").trim().to_owned();
    assert_eq!(other.demae(&["adopt", "nonsense"]).status.code(), Some(64));
    let adopted = other.demae(&["adopt", &id]);
    assert!(adopted.status.success(), "{}", String::from_utf8_lossy(&adopted.stderr));
    until("it is not blocked any more", || other.app("web").is_some_and(|s| s.state != State::Blocked));
    other.stop_agent();
}

#[test]
fn without_a_ledger_nothing_leaves_unseen() {
    let mut lab = Lab::new();
    for n in 0..2 {
        lab.deploy(&format!("app{n}"), &format!("apps/app{n}/spec"), &worker(&lab));
    }
    let before = lab.containers();
    lab.stop_agent();
    fs::remove_file(lab.path("state/ledger")).expect("there is one");
    let file = lab.path("agent.toml");
    let text = fs::read_to_string(&file).expect("a file");
    fs::write(&file, text.replace("[etcd]\n", "[etcd]\nprefix = \"/demea\"\n")).expect("a file");
    lab.start_agent(&[]);
    until("the store is not taken", || {
        lab.status().and_then(|s| s.store.block).is_some_and(|block| block.kind == "mass_removal")
    });
    assert_eq!(lab.containers(), before);
    // The right prefix again, and all is as it was.
    lab.stop_agent();
    fs::write(&file, text).expect("a file");
    lab.start_agent(&[]);
    until("all is well", || {
        lab.status().is_some_and(|s| {
            s.store.block.is_none() && s.apps.iter().filter(|a| a.state == State::Converged).count() == 2
        })
    });
    assert_eq!(lab.containers(), before);
}

#[test]
fn deletions_one_after_the_other_are_held_back_as_many_at_once_are() {
    let lab = Lab::with(&Setup { top: "delete_grace = \"100ms\"\n", ..Setup::default() });
    let apps: Vec<String> = (0..10).map(|n| format!("app{n}")).collect();
    let spec = worker(&lab);
    lab.put_all(&apps.iter().map(|app| (format!("apps/{app}/spec"), spec.clone())).collect::<Vec<_>>());
    until("all run", || {
        lab.status().is_some_and(|s| s.apps.iter().filter(|a| a.state == State::Converged).count() == 10)
    });
    for app in &apps[..9] {
        lab.del(&format!("apps/{app}/"));
    }
    let held = || lab.status().and_then(|s| s.store.block).is_some_and(|block| block.kind == "mass_removal");
    until("the rest is held back", held);
    until("those that were let go have left", || lab.containers().len() == 5);
    assert!(held());
    // A person says that it is meant.
    let confirmed = lab.demae(&["confirm", "--yes"]);
    assert!(confirmed.status.success(), "{}", String::from_utf8_lossy(&confirmed.stderr));
    until("they leave", || lab.containers().len() == 1);
    // What was confirmed is not held against the last one.
    lab.del("apps/app9/");
    until("it leaves too", || lab.containers().is_empty());
}

#[test]
fn a_deletion_that_is_undone_at_once_costs_nothing() {
    let lab = Lab::new();
    let spec = lab.socket_spec(&lab.image("v1"), "web.test", "");
    lab.deploy("web", "apps/web/spec", &spec);
    let before = only(&lab, "web");
    let load = Load::start(lab.ingress, "web.test", vec![Client::get(false), Client::get(true)]);
    until("requests flow", || load.requests() > 50);
    for _ in 0..5 {
        lab.put("apps/web/spec", &spec);
        lab.del("apps/web/spec");
        lab.wait_app("web", "about to leave", |s| s.reason.contains("put back"));
        lab.put("apps/web/spec", &spec);
        lab.wait_app("web", "as it was", |s| s.state == State::Converged);
    }
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    assert_eq!(only(&lab, "web"), before);
    // One that is meant leaves all the same.
    lab.del("apps/web/");
    until("it has left", || lab.containers().is_empty() && lab.get("web.test", "/").is_ok_and(|(code, _)| code == 404));
}
