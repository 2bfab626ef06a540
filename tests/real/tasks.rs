//! `demae run` and `demae exec`: commands of a person, with their own input, output and exit code.
#![expect(clippy::disallowed_methods, reason = "a test runs programs")]

use std::{
    io::{Read as _, Write as _},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use crate::support::{lab::Lab, process::docker, wait::until};

fn demae(lab: &Lab, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_demae"));
    command.args(args).env("DEMAE_CONFIG", lab.path("agent.toml")).env_remove("ETCDCTL_ENDPOINTS");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// The exit code and the two outputs of a command that gets this text.
fn with_input(lab: &Lab, args: &[&str], input: &str) -> (i32, String, String) {
    let mut child = demae(lab, args).spawn().expect("demae runs");
    let (mut typed, input) = (child.stdin.take().expect("a pipe"), input.to_owned());
    // One that does not read it may have ended.
    let writing = std::thread::spawn(move || drop(typed.write_all(input.as_bytes())));
    let output = child.wait_with_output().expect("it ends");
    writing.join().expect("it has written");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

/// Containers of tasks of the lab.
fn tasks(lab: &Lab) -> String {
    docker(&["ps", "-aq", "--filter", &format!("label=demae.task-host={}", lab.host)])
}

fn is_running(id: &str) -> bool {
    docker(&["inspect", "--format", "{{.State.Running}}", id]) == "true"
}

#[test]
fn commands_of_a_person_have_their_own_input_output_and_exit_code() {
    let lab = Lab::new();
    lab.put("env/web/GREETING", "hello");
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let serving = lab.containers();

    // In the container of the app. Its image has one program, which is its entry point.
    let (code, out, err) = with_input(&lab, &["exec", "-i", "web", "--", "/app", "cat"], "one\ntwo\n");
    assert_eq!((code, out.as_str(), err.as_str()), (0, "one\ntwo\n", ""));
    assert_eq!(with_input(&lab, &["exec", "web", "--", "/app", "cat"], "not passed on").1, "");
    assert_eq!(with_input(&lab, &["exec", "web", "--", "/app", "exit", "7", "0"], "").0, 7);
    let (code, _, err) = with_input(&lab, &["exec", "web", "--", "/nowhere"], "");
    assert_eq!(code, 127, "{err}");
    let (code, _, err) = with_input(&lab, &["exec", "web", "--", "/name"], "");
    assert_eq!(code, 126, "a file that is no program: {err}");
    let (code, _, err) = with_input(&lab, &["exec", "none", "--", "/app"], "");
    assert!(code == 125 && err.contains("no container of `none`"), "{err}");
    assert_eq!(with_input(&lab, &["exec", "-t", "web", "--", "/app"], "").0, 125, "there is no terminal");

    // In one of its own.
    let (code, out, err) = with_input(&lab, &["run", "-i", "web", "--", "cat"], "three\n");
    assert_eq!((code, out.as_str()), (0, "three\n"), "{err}");
    for code in ["0", "3", "200"] {
        let (found, _, err) = with_input(&lab, &["run", "web", "--", "exit", code, "0"], "");
        assert_eq!(found.to_string(), code, "{err}");
    }
    let (code, _, err) = with_input(&lab, &["run", "none", "--", "exit", "0", "0"], "");
    assert!(code == 125 && err.contains("no app `none`"), "{err}");
    assert_eq!(with_input(&lab, &["run", "web"], "").0, 64, "there is no command");
    assert_eq!(
        with_input(&lab, &["run", "web", "--endpoints", "127.0.0.1:1", "--dial-timeout", "300ms", "--", "x"], "").0,
        125
    );

    // Ctrl-C ends it, and nothing is left.
    let mut child = demae(&lab, &["run", "web", "--", "exit", "0", "600000"]).spawn().expect("demae runs");
    until("its container runs", || tasks(&lab).lines().count() == 1 && is_running(&tasks(&lab)));
    let began = Instant::now();
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(killed.is_ok_and(|status| status.success()));
    assert!(child.wait().is_ok_and(|status| !status.success()));
    assert!(began.elapsed() < Duration::from_secs(30));
    assert_eq!(tasks(&lab), "", "containers are left");

    // So does a reader that goes away, and a command that prints much before it reads holds up nothing.
    let mut child = demae(&lab, &["run", "web", "--", "flood"]).spawn().expect("demae runs");
    let mut some = [0; 1000];
    child.stdout.take().expect("a pipe").read_exact(&mut some).expect("it prints");
    let mut err = String::new();
    child.stderr.take().expect("a pipe").read_to_string(&mut err).expect("it ends");
    assert!(child.wait().is_ok_and(|status| !status.success()));
    assert_eq!(tasks(&lab), "", "containers are left: {err}");
    let large = "x".repeat(4 << 20);
    let (code, out, _) = with_input(&lab, &["exec", "-i", "web", "--", "/app", "print-then-cat", "4000000"], &large);
    assert_eq!((code, out.len()), (0, 4_000_000 + large.len()));

    // On a terminal: each key goes to the command, which has the terminal's size.
    let programs = Path::new(env!("CARGO_BIN_EXE_demae")).parent().expect("a directory").display();
    let mut script = Command::new("script");
    script.args(["-qec", "demae run -it web -- cat", "/dev/null"]).env("PATH", format!("{programs}:/usr/bin:/bin"));
    script.env("DEMAE_CONFIG", lab.path("agent.toml")).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = script.spawn().expect("script runs");
    let (mut typed, mut shown) = (child.stdin.take().expect("a pipe"), child.stdout.take().expect("a pipe"));
    until("its container runs", || tasks(&lab).lines().count() == 1 && is_running(&tasks(&lab)));
    // A line, and the end of the input.
    typed.write_all(b"typed\r\x04").expect("written");
    let mut text = String::new();
    shown.read_to_string(&mut text).expect("it ends");
    assert!(child.wait().is_ok_and(|status| status.success()), "{text}");
    // Once by the terminal of the container, and once by the command.
    assert_eq!(text.matches("typed").count(), 2, "{text:?}");
    assert_eq!((tasks(&lab), lab.containers()), (String::new(), serving), "the app was not touched");
}
