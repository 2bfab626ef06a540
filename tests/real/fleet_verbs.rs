//! Verbs that change an app on all its hosts and wait: what they print, and each exit code.
#![allow(clippy::disallowed_methods, reason = "a test runs programs")]

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _},
    process::{Child, ChildStderr, Command, Output, Stdio},
    time::Duration,
};

use demae::model::{fleet::RolloutPhase, status::State};
use serde_json::Value;

use crate::support::{
    fleet::{Fleet, expect_none_lost},
    json_schema::problems,
    lab::{Lab, Setup},
    wait::until,
};

/// No command of these tests may take so long; by default it would wait for 15 minutes.
const LONGEST: Duration = Duration::from_secs(100);

/// The exit code and the two outputs of a command, as CI sees it.
fn run(lab: &Lab, args: &[&str]) -> (i32, String, String) {
    let began = std::time::Instant::now();
    let ended = of(&lab.demae_with(&[("GITHUB_ACTIONS", "true")], args));
    assert!(began.elapsed() < LONGEST, "{args:?} took {:?}: {ended:?}", began.elapsed());
    ended
}

fn of(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

/// Starts a command, and does not wait for it.
fn start(lab: &Lab, args: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_demae"));
    command.args(args).env("DEMAE_CONFIG", lab.path("agent.toml")).env_remove("ETCDCTL_ENDPOINTS");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("demae runs")
}

/// A wait that has said what it waits for.
struct Waiting {
    child: Child,
    stderr: BufReader<ChildStderr>,
}

impl Waiting {
    fn start(lab: &Lab, args: &[&str]) -> Self {
        let mut child = start(lab, args);
        let mut stderr = BufReader::new(child.stderr.take().expect("a pipe"));
        let mut line = String::new();
        stderr.read_line(&mut line).expect("it says what it waits for");
        assert!(!line.is_empty(), "it ended");
        Self { child, stderr }
    }

    /// The exit code, and the rest of what it says.
    fn end(mut self) -> (i32, String) {
        let mut rest = String::new();
        self.stderr.read_to_string(&mut rest).expect("it ends");
        (self.child.wait().expect("it ended").code().unwrap_or(-1), rest)
    }
}

fn json(lab: &Lab, args: &[&str]) -> (i32, Value) {
    let (code, out, err) = run(lab, args);
    (code, serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}{err}")))
}

#[test]
fn good_and_bad_deploys_are_told_apart() {
    let fleet = Fleet::new(2);
    let store = fleet.store();
    let first = fleet.serve("300ms");
    let loads = fleet.load();
    let v2 = store.image("v2");

    // 0: on every host, with a variable in the same release.
    let (code, out, err) = run(store, &["deploy", "web", &v2, "--env", "MOOD=well"]);
    assert_eq!(code, 0, "{out}{err}");
    let second = fleet.rollout().expect("a rollout").release;
    assert!(out.starts_with(&format!("web {second} converged on 2 hosts in ")), "{out}");
    assert_eq!(out.lines().count(), 1, "{out}");
    assert!(fleet.versions().values().all(|version| version == "v2"));
    // The same again is so already.
    let (code, out, err) = run(store, &["deploy", "web", &v2]);
    assert_eq!((code, out.contains(second.as_str())), (0, true), "{out}{err}");

    // 3: it fails on one host; the evidence is printed, and the next commands.
    let (code, out, err) = run(store, &["deploy", "web", &v2, "--env", "MOOD=exit"]);
    assert_eq!((code, out.as_str()), (3, ""), "{err}");
    assert!(err.contains("::error title=web on "), "{err}");
    assert!(err.contains("demae retry web"), "{err}");
    assert!(fleet.versions().values().all(|version| version == "v2"), "what served serves");
    // `wait` gives the same answer, as an object too.
    let (code, shown) = json(store, &["wait", "web", "-o", "json"]);
    assert_eq!((code, shown["outcome"].as_str()), (3, Some("failed")), "{shown}");
    assert!(shown["hosts"].as_array().is_some_and(|hosts| hosts.iter().any(|h| h["verdict"].is_string())), "{shown}");

    // What `status` prints is as its schema says, with the evidence of a failure too.
    let (code, schema, _) = run(store, &["schema", "status"]);
    assert_eq!(code, 0);
    let schema: Value = serde_json::from_str(&schema).expect("it is JSON");
    for args in [&["status", "-o", "json"][..], &["status", "--fleet", "-o", "json"]] {
        let (_, shown) = json(store, args);
        assert_eq!(problems(&schema, &shown), Vec::<String>::new(), "{args:?}: {shown}");
        assert!(!shown["apps"].as_array().expect("apps").is_empty());
    }
    // The progress as objects, a line each, beside the answer.
    let (_, _, err) = run(store, &["wait", "web", "--progress", "json"]);
    let line: Value = serde_json::from_str(err.lines().next().expect("a line")).expect("an object");
    assert!(line["host"].is_string() && line["state"].is_string() && line["done"].is_boolean(), "{err}");

    // A release that fails again after another try, and one that does not.
    let bad = fleet.wait_phase(Some(second.as_str()), RolloutPhase::Reverted);
    let (code, _, err) = run(store, &["retry", "web"]);
    assert_eq!(code, 3, "{err}");
    let again = fleet.wait_phase(Some(second.as_str()), RolloutPhase::Reverted);
    assert!(again.release == bad.release && again.changed > bad.changed, "it was tried again");
    let (code, out, err) = run(store, &["deploy", "web", &v2, "--env", "MOOD=well"]);
    assert_eq!(code, 0, "{out}{err}");
    let (code, _, err) = run(store, &["retry", "web"]);
    assert_eq!(code, 1, "nothing failed: {err}");

    // Back, without and with a name. What failed is nothing to go back to.
    let (code, out, err) = run(store, &["rollback", "web"]);
    assert_eq!((code, out.contains(first.release.as_str())), (0, true), "{out}{err}");
    assert!(fleet.versions().values().all(|version| version == "v1"));
    let (code, _, err) = run(store, &["rollback", "web", bad.release.as_str()]);
    assert_eq!(code, 1, "{err}");
    let (code, out, err) = run(store, &["rollback", "web", second.as_str()]);
    assert_eq!((code, out.contains(second.as_str())), (0, true), "{out}{err}");
    // A deploy ends the pin, and a new release of the same image is another one.
    let (code, out, err) = run(store, &["deploy", "web", &store.image("v1")]);
    assert_eq!(code, 0, "{out}{err}");
    assert_eq!(store.get_key("apps/web/release"), "");
    let (code, out, err) = run(store, &["redeploy", "web"]);
    assert_eq!((code, out.contains("converged on 2 hosts")), (0, true), "{out}{err}");
    expect_none_lost(loads);
}

#[test]
fn what_is_wrong_is_refused_and_nothing_is_written() {
    let lab = Lab::with(&Setup { sections: "[rollouts]\nenabled = false\n", ..Setup::default() });
    let spec = lab.path("web.yaml");
    fs::write(&spec, lab.socket_spec(&lab.image("v1"), "web.test", "")).expect("a file");
    let spec = spec.to_str().expect("a path");
    lab.put("apps/other/spec", "image: [");
    until("the store has been used", || !lab.get_key("secret/release-key").is_empty());
    for (args, expected, words) in [
        (vec!["deploy", "web", "web:v1"], 1, "no app `web`"),
        (vec!["deploy", "WEB", "web:v1"], 1, "WEB"),
        (vec!["deploy", "web", "no image", "--spec", spec], 1, "image"),
        (vec!["deploy", "web", "web:v1", "--spec", "/nowhere.yaml"], 1, "/nowhere.yaml"),
        (vec!["deploy", "other", "web:v1"], 1, "`other` would be invalid"),
        (vec!["deploy", "web", "web:v1", "--env", "NAME"], 64, "NAME=VALUE"),
        (vec!["deploy", "web", "web:v1", "--timeout", "soon"], 64, "--timeout"),
        (vec!["deploy", "web"], 64, "IMAGE"),
        (vec!["redeploy", "web"], 1, "no app `web`"),
        (vec!["rollback", "web"], 1, "no app `web`"),
        (vec!["promote", "web"], 1, "no app `web`"),
        (vec!["retry", "web"], 1, "no app `web`"),
        (vec!["wait", "web"], 1, "no app `web`"),
        (vec!["wait", "web", "--release", "x"], 1, "x"),
        (vec!["hosts", "drain", "nowhere"], 1, "nowhere"),
        (vec!["status", "--fleet", "web"], 1, "no app `web`"),
    ] {
        let (code, out, err) = run(&lab, &args);
        assert_eq!((code, out.as_str()), (expected, ""), "{args:?}: {err}");
        assert!(err.contains(words), "{args:?}: {err}");
    }
    assert_eq!((lab.get_key("apps/web/spec"), lab.get_key("apps/web/image")), (String::new(), String::new()));
    // 75: the store is not reached, and nothing is written.
    let (code, _, err) = run(&lab, &["deploy", "web", "web:v1", "--endpoints", "127.0.0.1:1"]);
    assert_eq!(code, 75, "{err}");

    // Without rollouts each host goes by itself, and the answer is the same.
    let image = lab.image("v1");
    let (code, out, err) = run(&lab, &["deploy", "web", &image, "--spec", spec]);
    assert_eq!((code, out.contains("converged on 1 host in")), (0, true), "{out}{err}");
    let (code, _, err) = run(&lab, &["deploy", "web", &image, "--env", "MOOD=exit"]);
    assert_eq!(code, 3, "{err}");
    let (code, _, err) = run(&lab, &["retry", "web"]);
    assert_eq!(code, 3, "it was tried again: {err}");
    let (code, _, err) = run(&lab, &["rollback", "web"]);
    assert_eq!(code, 1, "no release is kept: {err}");
}

#[test]
fn waits_end_with_what_holds_them_up() {
    let mut fleet = Fleet::new(2);
    fleet.serve("100ms");
    let v2 = fleet.store().image("v2");
    let v1 = fleet.store().image("v1");

    // 6, and 0 if that is what is asked for; then the promotion.
    let more = "deploy: {update_config: {canary: 1, monitor: 100ms}}\n";
    let spec = fleet.store().path("canary.yaml");
    fs::write(&spec, fleet.store().socket_spec(&v2, "web.test", more)).expect("a file");
    let spec = spec.to_str().expect("a path").to_owned();
    let (code, _, err) = run(fleet.store(), &["promote", "web"]);
    assert_eq!(code, 1, "nothing waits: {err}");
    let (code, _, err) = run(fleet.store(), &["deploy", "web", &v2, "--spec", &spec]);
    assert_eq!((code, err.contains("demae promote web")), (6, true), "{err}");
    let (code, out, err) = run(fleet.store(), &["wait", "web", "--until", "canary"]);
    assert_eq!(code, 0, "{out}{err}");
    let (code, out, err) = run(fleet.store(), &["promote", "web"]);
    assert_eq!(code, 0, "{out}{err}");
    assert!(fleet.versions().values().all(|version| version == "v2"));

    // 4: a person froze the fleet, or paused the app. It goes on once they say so.
    fleet.store().put("freeze", "a sale");
    let (code, _, err) = run(fleet.store(), &["deploy", "web", &v1, "--until", "canary"]);
    assert_eq!((code, err.contains("a sale")), (4, true), "{err}");
    // 124: written, and not decided in time; 0 if it is not to be waited for.
    let (code, _, err) = run(fleet.store(), &["wait", "web", "--timeout", "200ms"]);
    assert_eq!((code, err.contains("demae wait web --release")), (124, true), "{err}");
    let (code, out, err) = run(fleet.store(), &["deploy", "web", &v1, "--detach"]);
    assert_eq!((code, out.contains("is wanted")), (0, true), "{out}{err}");

    // 130: Ctrl-C. 5: another change comes between.
    let interrupted = Waiting::start(fleet.store(), &["wait", "web"]);
    let pid = interrupted.child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().is_ok_and(|status| status.success()));
    let (code, err) = interrupted.end();
    assert_eq!((code, err.contains("demae wait web --release")), (130, true), "{err}");
    let superseded = Waiting::start(fleet.store(), &["wait", "web"]);
    fleet.store().put("apps/web/restart", "1");
    let (code, err) = superseded.end();
    assert_eq!(code, 5, "{err}");

    // A deploy that is killed leaves a rollout that finishes by itself.
    fleet.store().del("freeze");
    let before = fleet.rollout().expect("a rollout").release;
    let mut killed = start(fleet.store(), &["deploy", "web", &v1, "--env", "MOOD=well"]);
    until("its rollout is opened", || fleet.rollout().is_some_and(|rollout| rollout.release != before));
    killed.kill().expect("it ends");
    killed.wait().expect("it ended");
    let more = ["wait", "web", "--until", "canary"];
    let (code, _, err) = run(fleet.store(), &more);
    assert!([0, 6].contains(&code), "{code}: {err}");
    fleet.wait_phase(Some(before.as_str()), RolloutPhase::Waiting);

    // The store goes away in the wait, and comes back: the wait goes on.
    let promoted = fleet.store().get_key("apps/web/promote");
    let waiting = start(fleet.store(), &["promote", "web"]);
    until("it is promoted", || fleet.store().get_key("apps/web/promote") != promoted);
    let store = &mut fleet.0[0];
    store.stop_etcd();
    store.start_etcd();
    let (code, out, err) = of(&waiting.wait_with_output().expect("it ends"));
    assert_eq!(code, 0, "{out}{err}");
}

#[test]
fn hosts_are_listed_and_drained_and_the_last_one_is_kept() {
    let fleet = Fleet::new(2);
    fleet.serve("100ms");
    let (store, other) = (fleet.store(), &fleet.0[1]);
    assert_eq!(run(store, &["wait", "web"]).0, 0, "both hosts say that they have converged");
    let (code, out, err) = run(store, &["status", "--fleet"]);
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("2/2") && out.contains("done"), "{out}");
    assert!(err.contains("leads since"), "{err}");
    let (code, shown) = json(store, &["hosts", "-o", "json"]);
    let hosts = shown["hosts"].as_array().expect("hosts");
    assert_eq!((code, hosts.len()), (0, 2), "{shown}");
    assert_eq!(hosts.iter().filter(|host| host["leader"] == true).count(), 1, "{shown}");
    assert!(hosts.iter().all(|host| host["capacity"]["cpus"].as_u64() > Some(0)), "{shown}");

    let (code, out, err) = run(store, &["hosts", "drain", &other.host]);
    assert_eq!((code, out), (0, format!("{} is drained\n", other.host)), "{err}");
    assert!(err.contains("web has left"), "{err}");
    assert_eq!(other.containers().len(), 0);
    let (code, _, err) = run(store, &["hosts", "drain", &store.host]);
    assert_eq!(code, 1, "{err}");
    assert!(err.contains("web would serve nowhere"), "{err}");
    assert_eq!(store.get_key(&format!("hosts/{}/mode", store.host)), "");
    // Labels, and what is left of a host that is gone.
    let name = other.host.clone();
    let (code, out, err) = run(store, &["hosts", "label", &name, "role=web", "zone=a"]);
    assert_eq!(code, 0, "{out}{err}");
    assert_eq!(store.get_key(&format!("hosts/{name}/labels")), r#"{"role":"web","zone":"a"}"#);
    assert_eq!(run(store, &["hosts", "label", &name, "zone-"]).0, 0);
    assert_eq!(store.get_key(&format!("hosts/{name}/labels")), r#"{"role":"web"}"#);
    assert_eq!(run(store, &["hosts", "label", &name, "nonsense"]).0, 64);
    assert_eq!(run(store, &["hosts", "label", "nowhere", "a=b"]).0, 1);
    until("its agent has them", || {
        let (_, shown) = json(store, &["hosts", "-o", "json"]);
        let hosts = shown["hosts"].as_array().expect("hosts").clone();
        hosts.iter().any(|host| host["host"] == name.as_str() && host["labels"]["role"] == "web")
    });
    let (code, _, err) = run(store, &["hosts", "forget", &name]);
    assert!(code == 1 && err.contains("is up"), "{err}");
    let (code, out, err) = run(store, &["hosts", "cordon", &other.host]);
    assert_eq!((code, out), (0, format!("{} is cordoned\n", other.host)), "{err}");
    let (code, _, err) = run(store, &["hosts", "activate", &other.host]);
    assert_eq!(code, 0, "{err}");
    other.wait_app("web", "converged again", |app| app.state == State::Converged);
    let (code, out, _) = run(store, &["hosts"]);
    assert_eq!((code, out.lines().count()), (0, 3), "{out}");
    let mut fleet = fleet;
    fleet.0[1].kill_agent();
    let store = fleet.store();
    until("its lease has ended", || run(store, &["hosts", "forget", &name]).0 == 0);
    let (code, out, _) = run(store, &["hosts"]);
    assert_eq!((code, out.lines().count(), store.list(&format!("hosts/{name}/")).len()), (0, 2, 0), "{out}");
}

#[test]
fn waiting_host_heals_and_goes_on_with_its_turn() {
    let fleet = Fleet::new(2);
    let first = fleet.serve("100ms");
    let store = fleet.store();
    store.put("freeze", "a sale");
    store.put("apps/web/image", &store.image("v2"));
    fleet.wait_phase(Some(first.release.as_str()), RolloutPhase::Rolling);
    for lab in &fleet.0 {
        lab.wait_app("web", "waiting", |app| app.is("turn"));
        for name in &lab.containers() {
            crate::support::process::docker(&["rm", "-f", name]);
        }
        until("it serves again", || {
            crate::support::load::get(lab.ingress, "web.test", "/").is_ok_and(|(code, _)| code == 200)
        });
    }
    assert!(fleet.versions().values().all(|version| version == "v1"), "{:?}", fleet.versions());
    store.del("freeze");
    fleet.wait_phase(Some(first.release.as_str()), RolloutPhase::Done);
    assert!(fleet.versions().values().all(|version| version == "v2"));
}
