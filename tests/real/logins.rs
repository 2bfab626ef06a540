//! Logins at a registry: by Docker's file, by the agent's, and by credential helpers that fail in many ways.
#![expect(clippy::disallowed_methods, reason = "a test writes files of its own")]

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use crate::support::{
    lab::{Lab, Setup},
    load::{Client, Load},
    names::free_address,
    process::docker,
    registry::{FIRST, Registry, SECOND, USER},
};
use demae::model::status::{AppStatus, State};

/// A credential helper that runs this, and notes each call.
fn helper(path: &Path, does: &str) {
    let calls = path.with_extension("calls");
    fs::write(path, format!("#!/bin/sh\necho \"$1 $(cat)\" >> {}\n{does}\n", calls.display())).expect("a file");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("a mode");
}

fn hands_out(path: &Path, password: &str) {
    helper(path, &format!("echo '{{\"ServerURL\": \"x\", \"Username\": \"{USER}\", \"Secret\": \"{password}\"}}'"));
}

/// What the helper was asked, a line each.
fn calls(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path.with_extension("calls")).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

/// Restarts the agent with another section in its file.
fn restart_with(lab: &mut Lab, section: &str) {
    lab.kill_agent();
    let file = lab.path("agent.toml");
    let text = fs::read_to_string(&file).expect("a file");
    let (kept, _) = text.split_once("# logins\n").unwrap_or((&text, ""));
    fs::write(&file, format!("{kept}# logins\n{section}")).expect("a file");
    lab.start_agent(&[]);
}

#[test]
fn images_are_pulled_with_the_login_of_this_host() {
    let mut lab = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    let registry = Registry::start_with_password(free_address(), lab.dir.path());
    for version in ["v1", "v2"] {
        registry.push(&lab.image(version), version);
    }
    // Every change pulls, and is another release.
    let spec = lab.socket_spec(&registry.name("v1"), "web.test", "pull_policy: always\n");
    let file = lab.path("docker.json");
    let change = |lab: &Lab, value: &str| lab.put("env/web/CHANGE", value);
    let converged = |lab: &Lab, value: &str| {
        let before = lab.wait_app("web", "there", |app| app.release.is_some()).release;
        change(lab, value);
        lab.wait_app("web", "converged on another release", |app| {
            app.state == State::Converged && app.release != before
        });
    };
    let held_up = |lab: &Lab, part: &str| -> AppStatus {
        lab.wait_app("web", &format!("held up: {part}"), |app| app.reason.contains(part))
    };

    // Without a login a person must act. With one in Docker's file, which is read again, it goes on by itself.
    restart_with(&mut lab, &format!("[docker]\nconfig = \"{}\"\n", file.display()));
    lab.put("apps/web/spec", &spec);
    let status = lab.wait_app("web", "blocked", |app| app.state == State::Blocked);
    assert!(status.is("image_missing") && status.reason.contains("no basic auth credentials"), "{}", status.reason);
    fs::write(&file, registry.config(FIRST.0)).expect("a file");
    lab.wait_app("web", "converged with the login", |app| app.state == State::Converged);
    let load = Load::start(lab.ingress, "web.test", vec![Client::get(true)]);
    // A file that cannot be read is not a file without a login.
    fs::write(&file, "{\"auths\": [").expect("a file");
    change(&lab, "1");
    held_up(&lab, "is not a configuration file of Docker: line 1");
    let (code, out, err) = lab.ask(&["doctor"]);
    assert!(code == 1 && out.contains("is not a configuration file of Docker"), "{out}{err}");

    // A name and a password in the agent's file come first.
    let secret = lab.path("secret");
    fs::write(&secret, format!("{}\n", FIRST.0)).expect("a file");
    let host = registry.host();
    let password = format!("username = \"{USER}\"\npassword_file = \"{}\"\n", secret.display());
    restart_with(&mut lab, &format!("[[registry]]\nhost = \"{host}\"\n{password}"));
    lab.wait_app("web", "converged by the agent's file", |app| app.state == State::Converged);

    // A helper is asked once for many pulls, and once more when the registry refuses its token.
    let program = lab.path("helper");
    hands_out(&program, FIRST.0);
    let section = format!("[[registry]]\nhost = \"{host}\"\nhelper = \"{}\"\n", program.display());
    restart_with(&mut lab, &section);
    converged(&lab, "2");
    converged(&lab, "3");
    assert_eq!(calls(&program), [format!("get {host}")]);
    registry.change_password(SECOND);
    hands_out(&program, SECOND.0);
    converged(&lab, "4");
    assert_eq!(calls(&program).len(), 2, "{:?}", calls(&program));

    // Helpers that fail hold up the change and nothing else.
    restart_with(&mut lab, &section);
    helper(&program, "echo no such vault; exit 1");
    change(&lab, "5");
    let status = held_up(&lab, "failed with exit status: 1: no such vault");
    assert!(status.state == State::Converging && status.is("image"), "{status:?}");
    helper(&program, "echo '{\"Username\": \"pull\", \"Secret\": \"hunter2\"}'; exit 1");
    held_up(&lab, "is not shown, since it may be a login");
    helper(&program, "echo 'Secret: hunter2'");
    held_up(&lab, "printed something else than a JSON object");
    // What it has started ends with it.
    helper(&program, &format!("sleep 987 & echo $! > {}; wait", lab.path("sleeper").display()));
    held_up(&lab, "does not answer within 10 s");
    let sleeper = fs::read_to_string(lab.path("sleeper")).expect("a file");
    assert!(!Path::new(&format!("/proc/{}/cwd", sleeper.trim())).exists(), "it has ended");
    fs::remove_file(&program).expect("removed");
    held_up(&lab, "is not a program on this host");
    assert!(lab.get("web.test", "/").is_ok_and(|(code, _)| code == 200), "what serves serves");
    hands_out(&program, SECOND.0);
    lab.wait_app("web", "converged", |app| app.state == State::Converged);

    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    let (log, status) = (lab.agent_log(), lab.get_key(&format!("state/apps/{}/web", lab.host)));
    for secret in [FIRST.0, SECOND.0, "hunter2"] {
        assert!(!log.contains(secret) && !status.contains(secret), "a login is in the log");
    }
    for id in lab.containers() {
        docker(&["rm", "-f", &id]);
    }
}
