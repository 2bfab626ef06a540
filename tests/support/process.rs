//! Processes that tests run.
#![allow(clippy::disallowed_methods, reason = "a test starts programs and writes files of its own")]

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
};

pub fn docker(args: &[&str]) -> String {
    let output = Command::new("docker").args(args).env("DOCKER_CLI_HINTS", "false").output().expect("docker runs");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// A command, for tests that start no other process.
pub fn command(program: &str) -> Command {
    Command::new(program)
}

/// Runs a program that must succeed.
pub fn run(command: &mut Command) {
    let status = command.status().expect("it runs");
    assert!(status.success(), "{command:?}: {status}");
}

/// Starts a program with its output in a log file.
pub fn quiet(command: &mut Command, log: &Path) -> Child {
    let log = fs::File::options().create(true).append(true).open(log).expect("a log");
    command.stdin(Stdio::null()).stdout(log.try_clone().expect("a log")).stderr(log).spawn().expect("it starts")
}

/// Sends `-STOP`, `-CONT` and the like.
pub fn signal(pid: u32, name: &str) {
    run(Command::new("kill").args([name, &pid.to_string()]));
}

pub(super) fn kill(child: &mut Option<Child>) {
    if let Some(mut child) = child.take() {
        // It may have exited by itself.
        let _ = child.kill();
        child.wait().expect("it ends");
    }
}
