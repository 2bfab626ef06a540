//! What commands answer: unknown app, wrong command line, agent down, missing key.
#![expect(clippy::disallowed_methods, reason = "a test runs programs and writes files of its own")]

use std::{
    fs,
    io::Read as _,
    os::unix::fs::PermissionsExt as _,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use crate::support::{
    lab::{Lab, Setup},
    wait::until,
};
use demae::model::status::State;

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn unknown_app_is_an_error() {
    let lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    for args in [vec!["status", "typo"], vec!["status", "-o", "json", "typo"], vec!["plan", "typo"]] {
        let output = lab.demae(&args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        assert!(text(&output.stderr).contains("no app `typo`"), "{args:?}: {}", text(&output.stderr));
    }
    assert_eq!(lab.demae(&["status", "web"]).status.code(), Some(0));
}

#[test]
fn usage_error_and_failure_have_different_exit_codes() {
    let lab = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    for args in [
        vec!["ready", "--wait", "soon"],
        vec!["agent", "--once", "--timeout", "soon"],
        vec!["events", "--type", "nonsense"],
        vec!["adopt", "x"],
        vec!["nonsense"],
    ] {
        assert_eq!(lab.demae(&args).status.code(), Some(64), "{args:?}");
    }
    // Without access to Docker nothing is started.
    let dir = lab.path("dev");
    let dev = lab
        .demae_with(&[("DOCKER_HOST", "unix:///nowhere/docker.sock")], &["dev", "--dir", dir.to_str().expect("text")]);
    assert_eq!(dev.status.code(), Some(75), "{}", text(&dev.stderr));
    assert!(text(&dev.stderr).contains("Docker does not answer"), "{}", text(&dev.stderr));
    assert!(fs::read_dir(&dir).map_or(0, Iterator::count) == 0, "no file is left");
}

#[test]
fn status_watch_without_an_agent_says_so_once() {
    let mut lab = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    let mut command = Command::new(env!("CARGO_BIN_EXE_demae"));
    command.args(["status", "--watch"]).env("DEMAE_CONFIG", lab.path("agent.toml"));
    command.env("DEMAE_METRICS", format!("http://{}/metrics", lab.metrics)).env_remove("ETCDCTL_ENDPOINTS");
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("demae runs");
    let mut stderr = child.stderr.take().expect("a pipe");
    // It asks again after 250 ms, 500 ms and so on: many times before an agent has started and stopped.
    lab.start_agent(&[]);
    lab.wait_ready();
    lab.stop_agent();
    let began = Instant::now();
    until("time for a few more requests has passed", || began.elapsed() > Duration::from_secs(3));
    child.kill().expect("it runs");
    child.wait().expect("it ends");
    let mut printed = String::new();
    stderr.read_to_string(&mut printed).expect("text");
    assert!((1..=2).contains(&printed.matches("note: no agent answers").count()), "{printed}");
}

#[test]
fn plan_uses_the_release_key_in_the_ledger() {
    let mut lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    lab.stop_agent();
    lab.del("secret/release-key");
    let plan = lab.demae(&["plan"]);
    assert_eq!((plan.status.code(), text(&plan.stdout).as_str()), (Some(0), "web: nothing to do\n"));
    // Nor does it plan what an agent would hold back.
    lab.del("apps/");
    let plan = lab.demae(&["plan"]);
    assert!(!text(&plan.stdout).contains("stop"), "{}", text(&plan.stdout));
    assert!(text(&plan.stderr).contains("the store is not trusted"), "{}", text(&plan.stderr));
}

#[test]
fn changed_password_file_is_read_again() {
    let mut lab = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    let etcd = lab.etcd.to_string();
    let etcdctl = |args: &[&str]| {
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").args(["--endpoints", &etcd]).args(args);
        let output = command.output().expect("etcdctl runs");
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    };
    let secret = lab.path("password");
    let keep = |word: &str| {
        fs::write(&secret, format!("{word}\n")).expect("a file");
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).expect("rights");
    };
    keep("first");
    let file = lab.path("agent.toml");
    let config = fs::read_to_string(&file).expect("a file");
    let user = format!("[etcd]\nuser = \"root\"\npassword_file = \"{}\"\n", secret.display());
    fs::write(&file, config.replace("[etcd]\n", &user)).expect("a file");
    lab.put("apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    for args in [&["user", "add", "root:first"][..], &["user", "grant-role", "root", "root"], &["auth", "enable"]] {
        etcdctl(args);
    }
    lab.start_agent(&[]);
    lab.wait_app("web", "converged", |s| s.state == State::Converged);
    // The wrong password, then the right one.
    keep("wrong");
    lab.stop_etcd();
    lab.start_etcd();
    until("the store error names the user and the password", || {
        let error = lab.status().and_then(|s| s.store.error).unwrap_or_default();
        error.contains("user `root`") && error.contains("password")
    });
    keep("first");
    until("the store is read again", || lab.status().is_some_and(|s| s.store.error.is_none()));
    lab.stop_agent();
}
