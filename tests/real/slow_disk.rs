//! A disk that takes long to sync: the agent answers meanwhile, and syncs little before it acts.
#![expect(clippy::disallowed_methods, reason = "a test runs programs, reads what they wrote, and tells its figures")]

use std::{
    fs,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use crate::support::{
    containers::{inspect, only},
    lab::Lab,
    load::get,
    process::signal,
    wait::until,
};
use demae::model::status::State;

/// strace, attached to the agent of a lab. It detaches at the end.
struct Trace {
    child: Child,
    file: std::path::PathBuf,
}

impl Trace {
    fn attach(lab: &Lab, options: &[&str]) -> Self {
        let file = lab.path("strace.log");
        let pid = lab.agent_pid().expect("the agent runs").to_string();
        let mut strace = Command::new("strace");
        strace.args(["-f", "-ttt", "-e", "trace=fsync,fdatasync"]).args(options).args(["-p", &pid, "-o"]).arg(&file);
        let child = strace.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("strace runs");
        let status = format!("/proc/{pid}/status");
        let is_traced = || {
            let text = fs::read_to_string(&status).expect("the agent runs");
            text.lines().any(|line| line.starts_with("TracerPid:") && line.trim_end() != "TracerPid:\t0")
        };
        until("it is attached", is_traced);
        Self { child, file }
    }

    /// Times of the calls, in seconds since 1970.
    fn calls(&self) -> Vec<f64> {
        let text = fs::read_to_string(&self.file).expect("a trace");
        let is_call = |line: &&str| line.contains("sync(") && !line.contains("resumed>");
        text.lines().filter(is_call).filter_map(|line| line.split_whitespace().nth(1)?.parse().ok()).collect()
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        signal(self.child.id(), "-TERM");
        let _ = self.child.wait();
    }
}

#[test]
fn agent_answers_within_300_ms_while_each_sync_takes_1500_ms() {
    let lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let trace = Trace::attach(&lab, &["-e", "inject=fsync,fdatasync:delay_enter=1500000"]);
    let image = lab.image("v2");
    lab.put("apps/web/image", &image);
    let (began, mut slowest, mut asked) = (Instant::now(), Duration::ZERO, 0);
    let is_done =
        || lab.app("web").is_some_and(|app| app.state == State::Converged && app.image.as_deref() == Some(&image));
    while !is_done() {
        let at = Instant::now();
        let (code, _) = get(lab.metrics, "localhost", "/healthz").expect("an answer");
        (slowest, asked) = (slowest.max(at.elapsed()), asked + 1);
        assert_eq!(code, 200);
        assert!(began.elapsed() < Duration::from_secs(120), "the deploy goes on");
    }
    let syncs = trace.calls().len();
    println!(
        "{asked} requests to /healthz during a deploy of {:?} with {syncs} syncs: slowest {slowest:?}",
        began.elapsed()
    );
    assert!(syncs > 3, "the disk was slow");
    assert!(slowest < Duration::from_millis(300), "{slowest:?}");
}

#[test]
fn change_of_a_variable_costs_few_syncs_before_its_container_is_created() {
    let lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let trace = Trace::attach(&lab, &[]);
    lab.deploy("web", "env/web/GREETING", "hello");
    let created = inspect(&only(&lab, "web"), "{{.Created}}");
    let created: jiff::Timestamp = created.parse().expect("a time");
    let created = created.as_nanosecond() as f64 / 1e9;
    let calls = trace.calls();
    let before = calls.iter().filter(|at| **at < created).count();
    println!("{before} syncs before the container was created, {} in all", calls.len());
    assert!((1..=6).contains(&before), "{before} syncs");
}
