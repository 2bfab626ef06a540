//! The store: compacted history, lost watch messages, and authentication.
#![expect(clippy::disallowed_methods, reason = "a test runs programs and writes files of its own")]

use std::{
    process::{Command, Stdio},
    time::Duration,
};

use crate::support::{
    containers::is_done,
    etcd::Etcd,
    lab::{Lab, Setup},
    load::{Client, Load},
    names::free_address,
    wait::until,
    wire::{Wire, count_key},
};
use demae::model::status::{AppStatus, State};

fn etcdctl(lab: &Lab, args: &[&str]) -> String {
    let mut command = Command::new("etcdctl");
    command.env("ETCDCTL_API", "3").args(["--endpoints", &lab.etcd.to_string()]).args(args).stdin(Stdio::null());
    let output = command.output().expect("etcdctl runs");
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A lab whose agent reaches etcd through a proxy, with a serving app.
fn lab_with_wire(top: &str) -> (Lab, Wire) {
    lab_with(top, "")
}

fn lab_with(top: &str, sections: &str) -> (Lab, Wire) {
    let mut lab = Lab::with(&Setup { no_agent: true, top, sections, ..Setup::default() });
    let wire = Wire::intercept(&lab);
    lab.start_agent(&[]);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    (lab, wire)
}

#[test]
fn changes_missed_by_a_compacted_watch_are_found() {
    // A leader reads the same range.
    let (lab, wire) = lab_with("", "[rollouts]\nenabled = false\n");
    // Between the agent's next read and its next watch the store changes and is compacted.
    let mut reads = 0;
    wire.hold(move |bytes| {
        reads += count_key("/demae/apps/", bytes);
        reads > 1
    });
    wire.cut();
    until("it has read, and its watch request is held", || wire.is_holding());
    for n in 0..5 {
        lab.put("env/web/GREETING", &format!("number {n}"));
    }
    lab.compact();
    wire.release();
    until("the compaction is detected", || lab.agent_log().contains("fell behind: history before revision"));
    until("the last change is served", || {
        lab.get("web.test", "/env?GREETING").is_ok_and(|(_, body)| body == "number 4")
    });
    lab.wait_app("web", "converged", |s| s.state == State::Converged);
    assert_eq!(lab.containers().len(), 1);
}

/// The connection works, and one watch message is lost. etcd itself has lost events more than once.
#[test]
fn event_lost_by_the_watch_is_found_by_the_next_resync() {
    // With rollouts the next message may be one of their records, which come by watches of their own.
    let (lab, wire) = lab_with("resync = \"2s\"", "[rollouts]\nenabled = false\n");
    wire.drop_next_watch_message();
    lab.put("apps/web/image", &lab.image("v2"));
    until("the message is lost", || wire.dropped() == 1);
    until("the change is served", || lab.get("web.test", "/").is_ok_and(|(_, body)| body.contains("v2")));
    assert!(!lab.agent_log().contains("reading everything again"), "nothing was wrong with the session");
}

/// The same for what leaders and hosts tell each other: whichever message of a rollout is lost, it goes on.
#[test]
fn events_of_rollouts_that_are_lost_are_found_by_the_next_resync() {
    let (lab, wire) = lab_with("resync = \"2s\"", "");
    let images = [lab.image("v2"), lab.image("v1")];
    for round in 0..6 {
        let at = ["apps/web/image", "env/web/GREETING"][round % 2];
        let value = if round % 2 == 0 { images[round / 2 % 2].clone() } else { format!("number {round}") };
        let before = lab.app("web").and_then(|app| app.release);
        wire.drop_next_watch_message();
        lab.put(at, &value);
        until("the message is lost", || wire.dropped() > round);
        let is_done = |app: &AppStatus| app.state == State::Converged && app.release != before;
        lab.wait_app("web", "converged on another release", is_done);
    }
}

/// The connection answers keep-alives and other calls, and the watch is silent, even to progress requests.
#[test]
fn silent_watch_is_detected() {
    let (lab, wire) = lab_with_wire("");
    wire.drop_watch_messages();
    lab.put("apps/web/image", &lab.image("v2"));
    until("the silent watch is detected", || lab.agent_log().contains("the watch gave no sign of life for 20 s"));
    until("it is counted", || lab.metric("demae_store_errors_total", "watch") >= 1.0);
    wire.deliver_watch_messages();
    until("the change is served", || lab.get("web.test", "/").is_ok_and(|(_, body)| body.contains("v2")));
    until("the store error is gone", || lab.status().is_some_and(|s| s.store.error.is_none()));
}

/// The permissions of an agent, as documented.
const PERMISSIONS: [&[&str]; 3] = [
    &["role", "grant-permission", "agent", "read", "/demae/apps/", "/demae/hosts0"],
    &["role", "grant-permission", "agent", "readwrite", "/demae/secret/release-key"],
    &["role", "grant-permission", "agent", "readwrite", "--prefix=true", "/demae/state/"],
];

/// Runs etcdctl as root.
fn as_root(lab: &Lab, args: &[&str]) -> String {
    etcdctl(lab, &[&["--user", "root:secret"], args].concat())
}

/// Enables authentication: `root` with the password `secret`, and `agent` with `word`.
fn enable_auth(lab: &Lab) {
    for args in
        [&["user", "add", "root:secret"][..], &["user", "grant-role", "root", "root"], &["role", "add", "agent"]]
            .into_iter()
            .chain(PERMISSIONS)
            .chain([&["user", "add", "agent:word"][..], &["user", "grant-role", "agent", "agent"], &["auth", "enable"]])
    {
        // `root` needs its role first; on some versions it has it from the start.
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").args(["--endpoints", &lab.etcd.to_string()]).args(args);
        let output = command.stdin(Stdio::null()).output().expect("etcdctl runs");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() || text.contains("role name not found"), "{args:?}: {text}");
    }
}

#[test]
fn documented_etcd_permissions_are_sufficient() {
    let mut lab = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    lab.put("apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    enable_auth(&lab);
    lab.start_agent(&[("ETCDCTL_USER", "agent"), ("ETCDCTL_PASSWORD", "wrong")]);
    until("the failed login is reported", || {
        lab.status().is_some_and(|s| s.store.error.is_some_and(|e| e.contains("authentication failed")))
    });
    assert!(lab.containers().is_empty());
    lab.kill_agent();
    lab.start_agent(&[("ETCDCTL_USER", "agent:word")]);
    lab.wait_app("web", "converged", |s| s.state == State::Converged);
    until("the status is published", || {
        as_root(&lab, &["get", "--prefix", "/demae/state/apps/"]).contains("converged")
    });

    // `doctor` reports missing write permissions before an agent needs them.
    let doctor = || {
        let output = lab.demae_with(&[("ETCDCTL_USER", "agent:word")], &["doctor"]);
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    for args in ROLLOUT_PERMISSIONS {
        as_root(&lab, args);
    }
    assert!(!doctor().contains("permission denied"), "{}", doctor());
    as_root(&lab, &["role", "revoke-permission", "--prefix=true", "agent", "/demae/state/"]);
    let report = doctor();
    assert!(report.contains("asking whether it may be written") && report.contains("permission denied"), "{report}");
    assert!(report.contains("give this user the rights that docs/keys.md names"), "{report}");
}

/// Further permissions of an agent, to take turns and to lead, as documented.
const ROLLOUT_PERMISSIONS: [&[&str]; 3] = [
    &["role", "grant-permission", "agent", "read", "--prefix=true", "/demae/secret/releases/"],
    &["role", "grant-permission", "agent", "read", "/demae/apps/", "/demae/state0"],
    &["role", "grant-permission", "agent", "readwrite", "--prefix=true", "/demae/secret/releases/"],
];

#[test]
fn agent_without_the_rights_for_rollouts_converges_by_itself_until_it_has_them() {
    let mut lab = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    lab.put("apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    enable_auth(&lab);
    lab.start_agent(&[("ETCDCTL_USER", "agent:word")]);
    let doctor = |lab: &Lab| {
        let output = lab.demae_with(&[("ETCDCTL_USER", "agent:word")], &["doctor"]);
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let features = |lab: &Lab| as_root(lab, &["get", &format!("/demae/state/hosts/{}", lab.host)]);
    lab.wait_app("web", "converged without turns", |s| s.state == State::Converged);
    until("no turns are published", || {
        let found = features(&lab);
        found.contains("features") && !found.contains("\"rollouts\"")
    });
    assert!(doctor(&lab).contains("takes no turns, and converges by itself"), "{}", doctor(&lab));
    assert!((lab.metric("demae_rollouts_enabled", "") - 0.0).abs() < f64::EPSILON);
    let before = lab.containers();

    for args in ROLLOUT_PERMISSIONS {
        as_root(&lab, args);
    }
    until("turns are published", || features(&lab).contains("\"rollouts\""));
    until("a rollout of what runs is opened", || {
        as_root(&lab, &["get", "/demae/state/rollouts/web"]).contains("\"phase\":\"restored\"")
    });
    assert_eq!(lab.containers(), before, "nothing is restarted");
    assert!(doctor(&lab).contains("this host takes turns, and may be the leader"), "{}", doctor(&lab));
    as_root(&lab, &["put", "/demae/apps/web/image", &lab.image("v2")]);
    lab.wait_app("web", "converged in its turn", |s| {
        s.state == State::Converged && s.image.as_ref().is_some_and(|image| image.ends_with("v2"))
    });
    assert!(as_root(&lab, &["get", "/demae/state/rollouts/web"]).contains("\"phase\":\"done\""));
}

/// A token expires after 2 s here, and is not used while the store is quiet.
#[test]
fn expired_token_is_renewed() {
    let mut lab = Lab::with(&Setup { no_agent: true, top: "resync = \"4s\"", ..Setup::default() });
    lab.stop_etcd();
    let peers = [("short", free_address())];
    let _etcd = Etcd::start(lab.dir.path(), "short", lab.etcd, &peers, &["--auth-token-ttl", "2"]);
    until("etcd takes connections", || std::net::TcpStream::connect(lab.etcd).is_ok());
    lab.put("apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    enable_auth(&lab);
    lab.start_agent(&[("ETCDCTL_USER", "agent:word")]);
    lab.wait_app("web", "converged", |s| s.state == State::Converged);
    let resyncs = lab.metric("demae_store_resyncs_total", "");
    until("several resyncs have run", || lab.metric("demae_store_resyncs_total", "") >= resyncs + 3.0);
    let image = lab.image("v2");
    as_root(&lab, &["put", "/demae/apps/web/image", &image]);
    lab.wait_app("web", "converged", is_done(&image));
    let published = || as_root(&lab, &["get", "--prefix", "/demae/state/apps/"]);
    until("the status is published", || published().contains(&image));
    assert!(lab.status().is_some_and(|s| s.store.error.is_none() && s.store.block.is_none()));
}

#[test]
fn revoked_etcd_permissions_stop_nothing() {
    let mut lab = Lab::with(&Setup { no_agent: true, top: "resync = \"5s\"", ..Setup::default() });
    lab.put("apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    enable_auth(&lab);
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
    for (round, (faults, error, repairs)) in
        [(take, "permission denied", &PERMISSIONS[..1]), (delete, "authentication failed", put_back)]
            .into_iter()
            .enumerate()
    {
        let containers = lab.containers();
        as_root(&lab, faults);
        until("the refusal is reported", || {
            lab.status().is_some_and(|s| s.store.error.is_some_and(|e| e.contains(error)))
        });
        let app = lab.app("web").expect("the last read stays in effect");
        assert_eq!((app.state, lab.containers()), (State::Converged, containers));
        let wanted = lab.image(if round == 0 { "v2" } else { "v1" });
        as_root(&lab, &["put", "/demae/apps/web/image", &wanted]);
        for repair in repairs {
            as_root(&lab, repair);
        }
        lab.wait_app("web", "converged on what was put meanwhile", |a| {
            a.state == State::Converged && a.image.as_ref() == Some(&wanted)
        });
        until("the store error is gone", || lab.status().is_some_and(|s| s.store.error.is_none()));
    }
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "of {}: {:#?}", tally.requests, tally.reasons);
}
