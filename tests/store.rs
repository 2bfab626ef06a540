//! The store: history that is gone, and a store that wants to know who asks.
#![expect(clippy::disallowed_methods, reason = "a test runs programs and writes files of its own")]

mod support;

use std::process::{Command, Stdio};

use demae::model::status::State;
use support::lab::{Lab, Setup, until};

fn etcdctl(lab: &Lab, args: &[&str]) -> String {
    let mut command = Command::new("etcdctl");
    command.env("ETCDCTL_API", "3").args(["--endpoints", &lab.etcd.to_string()]).args(args).stdin(Stdio::null());
    let output = command.output().expect("etcdctl runs");
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn what_was_missed_while_history_went_is_found() {
    let mut lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    // The agent is held still while the store changes and forgets how.
    let pid = lab.agent_pid().expect("it runs").to_string();
    let signal = |name: &str| assert!(Command::new("kill").args([name, &pid]).status().expect("kill runs").success());
    signal("-STOP");
    for n in 0..5 {
        lab.put("env/web/GREETING", &format!("number {n}"));
    }
    etcdctl(&lab, &["compact", &lab.revision().to_string()]);
    lab.stop_etcd();
    lab.start_etcd();
    signal("-CONT");
    until("the last change is there", || {
        lab.get("web.test", "/env?GREETING").is_ok_and(|(_, body)| body == "number 4")
    });
    lab.wait_app("web", "converged", |s| s.state == State::Converged);
    assert_eq!(lab.containers().len(), 1);
}

#[test]
fn a_store_with_users_is_read_with_the_rights_that_the_documentation_names() {
    let mut lab = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    lab.put("apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    for args in [
        &["user", "add", "root:secret"][..],
        &["user", "grant-role", "root", "root"],
        &["role", "add", "agent"],
        &["role", "grant-permission", "agent", "read", "/demae/apps/", "/demae/hosts0"],
        &["role", "grant-permission", "agent", "readwrite", "/demae/secret/release-key"],
        &["role", "grant-permission", "agent", "readwrite", "--prefix=true", "/demae/state/"],
        &["user", "add", "agent:word"],
        &["user", "grant-role", "agent", "agent"],
        &["auth", "enable"],
    ] {
        // `root` needs its role before anything else; on some versions it has it from the start.
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").args(["--endpoints", &lab.etcd.to_string()]).args(args);
        let output = command.stdin(Stdio::null()).output().expect("etcdctl runs");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() || text.contains("role name not found"), "{args:?}: {text}");
    }
    lab.start_agent(&[("ETCDCTL_USER", "agent"), ("ETCDCTL_PASSWORD", "wrong")]);
    until("the refusal is told", || {
        lab.status().is_some_and(|s| s.store.error.is_some_and(|e| e.contains("authentication failed")))
    });
    assert!(lab.containers().is_empty());
    lab.kill_agent();
    lab.start_agent(&[("ETCDCTL_USER", "agent:word")]);
    lab.wait_app("web", "converged", |s| s.state == State::Converged);
    let published = etcdctl(&lab, &["--user", "root:secret", "get", "--prefix", "/demae/state/apps/web/"]);
    until("it is published", || {
        published.contains("converged")
            || etcdctl(&lab, &["--user", "root:secret", "get", "--prefix", "/demae/state/apps/web/"])
                .contains("converged")
    });
}
