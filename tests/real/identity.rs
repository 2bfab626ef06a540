//! Which containers an agent owns, and what it may remove: two agents of one name, a lost ledger, successive deletions.
#![expect(clippy::disallowed_methods, reason = "a test writes files of its own")]

use std::fs;

use crate::support::{
    containers::only,
    lab::{Lab, Setup},
    load::{Client, Load},
    wait::until,
};
use demae::model::status::State;

fn worker(lab: &Lab) -> String {
    format!("image: \"{}\"\nnetwork_mode: none\nstop_grace_period: 1s\n", lab.image("v1"))
}

#[test]
fn agent_with_the_name_of_another_does_not_touch_its_containers() {
    let mut lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.port_spec(&lab.image("v1"), "web.test", ""));
    let before = only(&lab, "web");
    let load = Load::start(lab.ingress, "web.test", vec![Client::get(false)]);
    until("requests are served", || load.requests() > 50);

    // Another etcd, other directories, the same name and engine.
    let mut other = Lab::with(&Setup { no_agent: true, top: "resync = \"1s\"\n", ..Setup::default() });
    let file = other.path("agent.toml");
    let text = fs::read_to_string(&file).expect("a file").replace(&other.host, &lab.host);
    fs::write(&file, text).expect("a file");
    other.start_agent(&[]);
    until("the other agent reports foreign containers", || {
        other.status().and_then(|s| s.proxy).is_some_and(|note| note.contains("belong to another agent"))
    });
    let doctor = String::from_utf8_lossy(&other.demae(&["doctor"]).stdout).into_owned();
    assert!(doctor.contains("belong to another agent"), "{doctor}");
    // Its desired state has the app too: nothing is created beside the foreign container.
    other.put("apps/web/spec", &other.port_spec(&lab.image("v1"), "web.test", ""));
    let blocked = other.wait_app("web", "blocked", |s| s.state == State::Blocked);
    assert!(blocked.is("foreign") && blocked.reason.contains("demae adopt"), "{blocked:?}");
    assert_eq!(only(&lab, "web"), before);
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);

    // Explicitly, once the first agent is gone for good.
    lab.stop_agent();
    let id = fs::read_to_string(lab.path("state/agent.id")).expect("an id").trim().to_owned();
    assert_eq!(other.demae(&["adopt", "nonsense"]).status.code(), Some(64));
    let adopted = other.demae(&["adopt", &id]);
    assert!(adopted.status.success(), "{}", String::from_utf8_lossy(&adopted.stderr));
    until("the app is not blocked any more", || other.app("web").is_some_and(|s| s.state != State::Blocked));
    other.stop_agent();
}

#[test]
fn nothing_is_removed_without_a_ledger() {
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
    until("the store is quarantined", || {
        lab.status().and_then(|s| s.store.block).is_some_and(|block| block.kind == "mass_removal")
    });
    assert_eq!(lab.containers(), before);
    // With the right prefix everything is as before.
    lab.stop_agent();
    fs::write(&file, text).expect("a file");
    lab.start_agent(&[]);
    until("all have converged", || {
        lab.status().is_some_and(|s| {
            s.store.block.is_none() && s.apps.iter().filter(|a| a.state == State::Converged).count() == 2
        })
    });
    assert_eq!(lab.containers(), before);
}

#[test]
fn successive_deletions_are_held_back_like_a_mass_removal() {
    let lab = Lab::with(&Setup { top: "delete_grace = \"100ms\"\n", ..Setup::default() });
    let apps: Vec<String> = (0..10).map(|n| format!("app{n}")).collect();
    let spec = worker(&lab);
    lab.put_all(&apps.iter().map(|app| (format!("apps/{app}/spec"), spec.clone())).collect::<Vec<_>>());
    until("all have converged", || {
        lab.status().is_some_and(|s| s.apps.iter().filter(|a| a.state == State::Converged).count() == 10)
    });
    for app in &apps[..9] {
        lab.del(&format!("apps/{app}/"));
    }
    let held = || lab.status().and_then(|s| s.store.block).is_some_and(|block| block.kind == "mass_removal");
    until("the rest is held back", held);
    // Deletions that arrive together are judged together, so up to five are within the limit.
    until("those within the limit are removed", || {
        let left = lab.status().map_or(0, |s| s.apps.len());
        (5..10).contains(&left) && lab.containers().len() == left
    });
    assert!(held());
    // A person confirms the removal.
    let confirmed = lab.demae(&["confirm", "--yes"]);
    assert!(confirmed.status.success(), "{}", String::from_utf8_lossy(&confirmed.stderr));
    until("they are removed", || lab.containers().len() == 1);
    // The confirmed removals do not count against the last one.
    lab.del("apps/app9/");
    until("it is removed too", || lab.containers().is_empty());
}

#[test]
fn deletion_reverted_at_once_costs_nothing() {
    let lab = Lab::new();
    let spec = lab.socket_spec(&lab.image("v1"), "web.test", "");
    lab.deploy("web", "apps/web/spec", &spec);
    let before = only(&lab, "web");
    let load = Load::start(lab.ingress, "web.test", vec![Client::get(false), Client::get(true)]);
    until("requests are served", || load.requests() > 50);
    for _ in 0..5 {
        lab.put("apps/web/spec", &spec);
        lab.del("apps/web/spec");
        lab.wait_app("web", "within its delete grace", |s| s.is("deletion"));
        lab.put("apps/web/spec", &spec);
        lab.wait_app("web", "converged as before", |s| s.state == State::Converged);
    }
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    assert_eq!(only(&lab, "web"), before);
    // A deletion that is not reverted removes the app.
    lab.del("apps/web/");
    until("it is removed", || {
        lab.containers().is_empty() && lab.get("web.test", "/").is_ok_and(|(code, _)| code == 404)
    });
}
