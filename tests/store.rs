//! The store: history that is gone, and a store that wants to know who asks.
#![expect(clippy::disallowed_methods, reason = "a test runs programs and writes files of its own")]

mod support;

use std::{
    process::{Command, Stdio},
    time::Duration,
};

use demae::model::status::State;
use support::{
    containers::is_done,
    etcd::Etcd,
    lab::{Lab, Setup},
    load::{Client, Load},
    names::free_address,
    wait::until,
    wire::{Wire, named},
};

fn etcdctl(lab: &Lab, args: &[&str]) -> String {
    let mut command = Command::new("etcdctl");
    command.env("ETCDCTL_API", "3").args(["--endpoints", &lab.etcd.to_string()]).args(args).stdin(Stdio::null());
    let output = command.output().expect("etcdctl runs");
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A lab whose agent reaches etcd by a wire, with an app that serves.
fn wired(top: &str) -> (Lab, Wire) {
    let mut lab = Lab::with(&Setup { no_agent: true, top, ..Setup::default() });
    let wire = Wire::lead(&lab);
    lab.start_agent(&[]);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    (lab, wire)
}

#[test]
fn what_was_missed_while_history_went_is_found() {
    let (lab, wire) = wired("");
    // Between its next read of the store and its next watch the store goes on, and forgets how.
    let mut reads = 0;
    wire.hold(move |bytes| {
        reads += named("/demae/apps/", bytes);
        reads > 1
    });
    wire.cut();
    until("it has read, and is about to watch", || wire.is_holding());
    for n in 0..5 {
        lab.put("env/web/GREETING", &format!("number {n}"));
    }
    lab.compact();
    wire.release();
    until("it is told that history is gone", || lab.agent_log().contains("fell behind: history before revision"));
    until("the last change is there", || {
        lab.get("web.test", "/env?GREETING").is_ok_and(|(_, body)| body == "number 4")
    });
    lab.wait_app("web", "converged", |s| s.state == State::Converged);
    assert_eq!(lab.containers().len(), 1);
}

/// The connection is well, and one message of the watch does not arrive. etcd itself has lost events more than once.
#[test]
fn what_the_watch_loses_is_found_by_the_next_full_read() {
    let (lab, wire) = wired("resync = \"2s\"");
    wire.swallow_one();
    lab.put("apps/web/image", &lab.image("v2"));
    until("the message is lost", || wire.swallowed() == 1);
    until("the change is there", || lab.get("web.test", "/").is_ok_and(|(_, body)| body.contains("v2")));
    assert!(!lab.agent_log().contains("reading everything again"), "nothing was wrong with the session");
}

/// The connection answers its keep-alives, other calls are answered too, and the watch says nothing, not even when asked.
#[test]
fn a_watch_that_says_nothing_is_found_dead() {
    let (lab, wire) = wired("");
    wire.swallow_all();
    lab.put("apps/web/image", &lab.image("v2"));
    until("it is told", || lab.agent_log().contains("the watch gave no sign of life for 20 s"));
    assert!(lab.metric("demae_store_errors_total", "watch") >= 1.0);
    wire.swallow_none();
    until("the change is there", || lab.get("web.test", "/").is_ok_and(|(_, body)| body.contains("v2")));
    until("all is well again", || lab.status().is_some_and(|s| s.store.error.is_none()));
}

/// What an agent may do, as the documentation names it.
const RIGHTS: [&[&str]; 3] = [
    &["role", "grant-permission", "agent", "read", "/demae/apps/", "/demae/hosts0"],
    &["role", "grant-permission", "agent", "readwrite", "/demae/secret/release-key"],
    &["role", "grant-permission", "agent", "readwrite", "--prefix=true", "/demae/state/"],
];

/// As the user who may do anything.
fn as_root(lab: &Lab, args: &[&str]) -> String {
    etcdctl(lab, &[&["--user", "root:secret"], args].concat())
}

/// A store that wants to know who asks: `root` with the password `secret`, and `agent` with `word`.
fn want_users(lab: &Lab) {
    for args in
        [&["user", "add", "root:secret"][..], &["user", "grant-role", "root", "root"], &["role", "add", "agent"]]
            .into_iter()
            .chain(RIGHTS)
            .chain([&["user", "add", "agent:word"][..], &["user", "grant-role", "agent", "agent"], &["auth", "enable"]])
    {
        // `root` needs its role before anything else; on some versions it has it from the start.
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").args(["--endpoints", &lab.etcd.to_string()]).args(args);
        let output = command.stdin(Stdio::null()).output().expect("etcdctl runs");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() || text.contains("role name not found"), "{args:?}: {text}");
    }
}

#[test]
fn a_store_with_users_is_read_with_the_rights_that_the_documentation_names() {
    let mut lab = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    lab.put("apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    want_users(&lab);
    lab.start_agent(&[("ETCDCTL_USER", "agent"), ("ETCDCTL_PASSWORD", "wrong")]);
    until("the refusal is told", || {
        lab.status().is_some_and(|s| s.store.error.is_some_and(|e| e.contains("authentication failed")))
    });
    assert!(lab.containers().is_empty());
    lab.kill_agent();
    lab.start_agent(&[("ETCDCTL_USER", "agent:word")]);
    lab.wait_app("web", "converged", |s| s.state == State::Converged);
    until("it is published", || as_root(&lab, &["get", "--prefix", "/demae/state/apps/web/"]).contains("converged"));

    // Who may read and not write is told of it before an agent is.
    let doctor = || {
        let output = lab.demae_with(&[("ETCDCTL_USER", "agent:word")], &["doctor"]);
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    assert!(!doctor().contains("permission denied"), "{}", doctor());
    as_root(&lab, &["role", "revoke-permission", "--prefix=true", "agent", "/demae/state/"]);
    let told = doctor();
    assert!(told.contains("asking whether it may be written") && told.contains("permission denied"), "{told}");
    assert!(told.contains("give this user the rights that docs/keys.md names"), "{told}");
}

/// A token lives for 2 s here, and is not asked for while the store is quiet.
#[test]
fn a_token_that_ran_out_is_renewed() {
    let mut lab = Lab::with(&Setup { no_agent: true, top: "resync = \"4s\"", ..Setup::default() });
    lab.stop_etcd();
    let peers = [("short", free_address())];
    let _etcd = Etcd::start(lab.dir.path(), "short", lab.etcd, &peers, &["--auth-token-ttl", "2"]);
    until("etcd takes connections", || std::net::TcpStream::connect(lab.etcd).is_ok());
    lab.put("apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    want_users(&lab);
    lab.start_agent(&[("ETCDCTL_USER", "agent:word")]);
    lab.wait_app("web", "converged", |s| s.state == State::Converged);
    let reads = lab.metric("demae_store_reads_total", "");
    until("it was read again and again", || lab.metric("demae_store_reads_total", "") >= reads + 3.0);
    let image = lab.image("v2");
    as_root(&lab, &["put", "/demae/apps/web/image", &image]);
    lab.wait_app("web", "converged", is_done(&image));
    let published = || as_root(&lab, &["get", "--prefix", "/demae/state/apps/web/"]);
    until("it is published", || published().contains(&image));
    assert!(lab.status().is_some_and(|s| s.store.error.is_none() && s.store.block.is_none()));
}

#[test]
fn rights_that_are_taken_away_take_nothing_else_away() {
    let mut lab = Lab::with(&Setup { no_agent: true, top: "resync = \"5s\"", ..Setup::default() });
    lab.put("apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    want_users(&lab);
    lab.start_agent(&[("ETCDCTL_USER", "agent:word")]);
    lab.wait_app("web", "converged", |s| s.state == State::Converged);
    let pause = Duration::from_millis(5);
    let load = Load::start(
        lab.ingress,
        "web.test",
        vec![Client::get(true).pausing(pause), Client::post(false).pausing(pause)],
    );
    let take: &[&str] = &["role", "revoke-permission", "agent", "/demae/apps/", "/demae/hosts0"];
    let delete: &[&str] = &["user", "delete", "agent"];
    let put_back: &[&[&str]] = &[&["user", "add", "agent:word"], &["user", "grant-role", "agent", "agent"]];
    for (round, (faults, told, mends)) in
        [(take, "permission denied", &RIGHTS[..1]), (delete, "authentication failed", put_back)].into_iter().enumerate()
    {
        let containers = lab.containers();
        as_root(&lab, faults);
        until("the refusal is told", || lab.status().is_some_and(|s| s.store.error.is_some_and(|e| e.contains(told))));
        let app = lab.app("web").expect("what was read last holds");
        assert_eq!((app.state, lab.containers()), (State::Converged, containers));
        let wanted = lab.image(if round == 0 { "v2" } else { "v1" });
        as_root(&lab, &["put", "/demae/apps/web/image", &wanted]);
        for mend in mends {
            as_root(&lab, mend);
        }
        lab.wait_app("web", "converged on what was put meanwhile", |a| {
            a.state == State::Converged && a.image.as_ref() == Some(&wanted)
        });
        until("nobody complains", || lab.status().is_some_and(|s| s.store.error.is_none()));
    }
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "of {}: {:#?}", tally.requests, tally.reasons);
}
