//! From the start of an agent until it is ready, on a host where everything is as wanted; and what it costs at rest.
#![allow(clippy::disallowed_methods, reason = "a benchmark reads files of its own")]

use std::{
    collections::HashMap,
    fmt, fs,
    time::{Duration, Instant},
};

use bollard::{
    Docker,
    query_parameters::{InspectContainerOptions, ListContainersOptionsBuilder},
};
use futures_util::future::join_all;

use super::figures::{Figures, Interval};
use crate::support::{
    lab::{Lab, Setup},
    load,
};

/// One list of all containers, and an inspection of each, in parallel.
pub const LIST: &str = "list and inspect";
/// From the start of the agent until it is ready.
pub const READY: &str = "ready";

/// The figures of a run.
pub struct Outcome {
    pub apps: usize,
    pub figures: Figures,
    /// Calls to Docker until the agent was ready, by operation, of the last round.
    pub calls: Vec<(&'static str, f64)>,
    /// Resident memory afterwards, in KiB.
    pub resident: u64,
    /// CPU time of the agent at rest, as a part of one core.
    pub cpu: f64,
}

/// Runs an agent with so many apps, and starts it anew in each round. `rest` is how long it is watched at rest.
pub fn measure(apps: usize, rounds: usize, rest: Duration) -> Outcome {
    let mut lab = Lab::with(&Setup { top: "resync = \"60s\"", ..Setup::default() });
    let image = lab.image("v1");
    let spec = |n: usize| {
        // At rest, hardly anything is to be probed.
        let spec = lab.socket_spec(&image, &format!("app{n}.test"), "network_mode: none\n");
        spec.replace("interval: 1s", "interval: 60s")
    };
    super::change_all(&lab, apps, "spec", spec);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let mut figures = Figures::default();
    let mut calls = Vec::new();
    for _ in 0..rounds {
        lab.stop_agent();
        figures.push(LIST, runtime.block_on(list_and_inspect(&lab.host)));
        let began = Instant::now();
        lab.start_agent(&[]);
        let is_ready = || load::get(lab.metrics, "localhost", "/readyz").is_ok_and(|(code, _)| code == 200);
        while !is_ready() {
            assert!(began.elapsed() < Duration::from_secs(60), "the agent is not ready");
            std::thread::sleep(Duration::from_millis(1));
        }
        figures.push(READY, began.elapsed());
        let count =
            |operation: &str| lab.metric("demae_docker_call_seconds_count", &format!("operation=\"{operation}\""));
        calls = ["list", "inspect", "inspect_image"].map(|operation| (operation, count(operation))).into();
    }
    let pid = lab.agent_pid().expect("it runs");
    let before = cpu_time(pid);
    std::thread::sleep(rest);
    let cpu = (cpu_time(pid) - before) / rest.as_secs_f64().max(0.001);
    Outcome { apps, figures, calls, resident: resident(pid), cpu }
}

async fn list_and_inspect(host: &str) -> Duration {
    let docker = Docker::connect_with_unix_defaults().expect("Docker");
    let began = Instant::now();
    let filters = HashMap::from([("label", vec![format!("demae.host={host}")])]);
    let options = ListContainersOptionsBuilder::default().all(true).filters(&filters).build();
    let listed = docker.list_containers(Some(options)).await.expect("a list");
    let ids = listed.into_iter().filter_map(|container| container.id);
    let inspect = |id: String| {
        let docker = docker.clone();
        async move { docker.inspect_container(&id, None::<InspectContainerOptions>).await.expect("inspected") }
    };
    join_all(ids.map(inspect)).await;
    began.elapsed()
}

/// Resident memory of a process, in KiB.
fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("a line");
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number")
}

/// CPU time of a process, in seconds: the first field of each thread's `schedstat` is nanoseconds on a CPU.
fn cpu_time(pid: u32) -> f64 {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("it runs").flatten();
    let of = |path: std::path::PathBuf| {
        let text = fs::read_to_string(path.join("schedstat")).unwrap_or_default();
        text.split_whitespace().next().and_then(|n| n.parse::<f64>().ok()).unwrap_or(0.0)
    };
    threads.map(|thread| of(thread.path())).sum::<f64>() / 1e9
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Interval { low, median, high } = self.figures.ratio(READY, LIST);
        writeln!(
            f,
            "start of an agent with {} apps: × {median:.2} [{low:.2}, {high:.2}]\n{}",
            self.apps,
            self.figures.table(LIST)
        )?;
        let calls: Vec<String> = self.calls.iter().map(|(operation, count)| format!("{operation} {count}")).collect();
        writeln!(f, "calls until ready: {}", calls.join(", "))?;
        writeln!(
            f,
            "resident memory {:.1} MB; at rest {:.3} % of a core",
            self.resident as f64 / 1024.0,
            self.cpu * 100.0
        )
    }
}
