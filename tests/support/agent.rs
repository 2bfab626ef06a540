//! The agent of a lab, and its command line.
#![allow(clippy::disallowed_methods, reason = "a test starts programs and reads what they wrote")]

use std::{
    fs,
    path::Path,
    process::{Child, Command, Output},
    time::{Duration, Instant},
};

use super::{
    lab::Lab,
    process::{kill, quiet, signal},
    wait::until,
};

impl Lab {
    /// Starts the agent, without waiting for anything.
    pub fn start_agent(&mut self, env: &[(&str, &str)]) {
        self.start_agent_of(Path::new(env!("CARGO_BIN_EXE_demae")), env);
    }

    /// Starts this program as the agent, without waiting for anything.
    pub fn start_agent_of(&mut self, program: &Path, env: &[(&str, &str)]) {
        let mut command = Command::new(program);
        command.args(["agent", "--config"]).arg(self.path("agent.toml")).envs(env.iter().copied());
        command.env_remove("ETCDCTL_ENDPOINTS");
        self.agent_process = Some(quiet(&mut command, &self.path("agent.log")));
    }

    /// Waits until it has read etcd, Docker and nginx. Changes that it finds at its start are older than it, so it does
    /// not time them.
    pub fn wait_ready(&self) {
        until("the agent is ready", || self.demae(&["ready"]).status.success());
    }

    /// `kill -9`.
    pub fn kill_agent(&mut self) {
        kill(&mut self.agent_process);
    }

    /// SIGTERM, and how long it took.
    pub fn stop_agent(&mut self) -> Duration {
        let began = Instant::now();
        if let Some(mut child) = self.agent_process.take() {
            signal(child.id(), "-TERM");
            let status = child.wait().expect("the agent ends");
            assert!(status.success(), "the agent ended with {status}\n{}", self.agent_log());
        }
        began.elapsed()
    }

    /// Whether the agent ended by itself.
    pub fn agent_ended(&mut self) -> bool {
        match &mut self.agent_process {
            Some(child) => child.try_wait().expect("a child").is_some(),
            None => true,
        }
    }

    pub fn agent_pid(&self) -> Option<u32> {
        self.agent_process.as_ref().map(Child::id)
    }

    pub fn agent_log(&self) -> String {
        fs::read_to_string(self.path("agent.log")).unwrap_or_default()
    }

    /// `demae` with the lab's configuration.
    pub fn demae(&self, args: &[&str]) -> Output {
        self.demae_with(&[], args)
    }

    /// The same; its exit code, and what it prints to standard output and to standard error.
    pub fn ask(&self, args: &[&str]) -> (i32, String, String) {
        let output = self.demae(args);
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
    }

    /// Runs the program as an operator would, with environment variables.
    pub fn demae_with(&self, env: &[(&str, &str)], args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_demae"));
        command.args(args).envs(env.iter().copied()).env("DEMAE_CONFIG", self.path("agent.toml"));
        command.env("DEMAE_METRICS", format!("http://{}/metrics", self.metrics)).env_remove("ETCDCTL_ENDPOINTS");
        command.output().expect("demae runs")
    }
}
