//! A deploy, beside the least that any tool could do: from the put to the first answer by the new release, and until
//! the old one is removed.
//!
//! The floor does only what cannot be left out: put, watch, create, start, ask, rename, stop, remove. It knows nothing
//! of plans, drains, proofs or crashes. Each round runs it twice and demae once, in turns of order, so that every figure
//! is a ratio taken in one run; the floor against itself shows the noise. The verdict is the 95 % interval of the median
//! ratio by bootstrap: met if all of it is at most the goal, missed if all of it is above, else undecided.
//!
//! `DEMAE_BENCH_ROUNDS` (30), `DEMAE_BENCH_START_MS` (0): how long the app takes to listen, `DEMAE_BENCH_VHOSTS` (0):
//! other virtual hosts in nginx.
#![expect(
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a program for people, which starts programs and keeps files of its own"
)]

#[path = "../tests/support/mod.rs"]
mod support;

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use bollard::{
    Docker,
    models::{ContainerCreateBody, HostConfig, Mount, MountType},
    query_parameters::{CreateContainerOptionsBuilder, RemoveContainerOptionsBuilder, StopContainerOptionsBuilder},
};
use demae::model::status::State;
use support::{
    lab::Lab,
    load::{Client, Load},
    wait::until,
};

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(default)
}

fn main() {
    // `cargo test` runs benches too, to see that they start; measuring is `cargo bench`'s.
    if !std::env::args().any(|a| a == "--bench") {
        return;
    }
    let rounds = usize::try_from(number("DEMAE_BENCH_ROUNDS", 30)).expect("a number");
    let start_ms = number("DEMAE_BENCH_START_MS", 0).to_string();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");

    let mut lab = Lab::new();
    let image = lab.image("v1");
    let mut floor = Floor::new(&lab, &image, &start_ms, &runtime);
    lab.stop_nginx();
    floor.add_to_nginx(&lab, number("DEMAE_BENCH_VHOSTS", 0));
    lab.start_nginx();
    floor.deploy(&runtime);
    let spec = lab.socket_spec(&image, "demae.test", "");
    let spec = spec.replace("SOCKET: /run/app/app.sock", &format!("SOCKET: /run/app/app.sock, START_MS: {start_ms}"));
    lab.deploy("web", "apps/web/spec", &spec);

    let clients = |keep_alive| Client::get(keep_alive).pausing(Duration::from_millis(8));
    let load = |host: &str| Load::start(lab.ingress, host, vec![clients(true), clients(false)]);
    let (floor_load, demae_load) = (load("floor.test"), load("demae.test"));
    until("requests flow", || floor_load.requests() > 50 && demae_load.requests() > 50);
    let reloads = lab.metric("demae_nginx_reloads_total", "done");

    let (mut first, mut done) = (Columns::default(), Columns::default());
    for round in 0..rounds {
        let mut order = ["floor", "demae", "again"];
        order.rotate_left(round % 3);
        let mut took: HashMap<&str, (f64, f64)> = HashMap::new();
        for what in order {
            let figures = if what == "demae" {
                demae_round(&lab, &demae_load, round, &runtime)
            } else {
                floor_round(&mut floor, &floor_load, &runtime)
            };
            took.insert(what, figures);
        }
        first.push(took["floor"].0, took["again"].0, took["demae"].0);
        done.push(took["floor"].1, took["again"].1, took["demae"].1);
    }
    let (floor_tally, demae_tally) = (floor_load.stop(), demae_load.stop());
    floor.remove(&runtime);

    println!(
        "\n{rounds} rounds; the app listens after {start_ms} ms; {} other virtual hosts",
        number("DEMAE_BENCH_VHOSTS", 0)
    );
    first.report("put -> first answer by the new release", 1.15);
    done.report("put -> old instance removed", 1.15);
    println!(
        "reloads of nginx over {rounds} deploys by demae: {}",
        lab.metric("demae_nginx_reloads_total", "done") - reloads
    );
    for (who, tally) in [("floor", floor_tally), ("demae", demae_tally)] {
        let lost = tally.failed + tally.stale;
        println!("{who}: requests: {}  failed: {lost}  slowest: {:?}", tally.requests, tally.slowest);
    }
}

/// One deploy by demae: first answer and end, in milliseconds after the put.
fn demae_round(lab: &Lab, load: &Load, round: usize, runtime: &tokio::runtime::Runtime) -> (f64, f64) {
    let before = lab.containers();
    let began = Instant::now();
    lab.put("apps/web/restart", &format!("round {round}"));
    let docker = Docker::connect_with_unix_defaults().expect("Docker");
    until("the old instance is removed", || runtime.block_on(docker.inspect_container(&before[0], None)).is_err());
    let done = millis(began.elapsed());
    let status = lab.wait_app("web", "converged", |s| s.state == State::Converged);
    let release = status.release.expect("a release");
    let first = load.so_far().first_seen.get(&release).copied().expect("the new release answered");
    (millis(first - began), done)
}

fn floor_round(floor: &mut Floor, load: &Load, runtime: &tokio::runtime::Runtime) -> (f64, f64) {
    let (release, began, ended) = floor.deploy(runtime);
    let mut first = None;
    until("the floor's new release answered", || {
        first = load.so_far().first_seen.get(&release).copied();
        first.is_some()
    });
    (millis(first.expect("just seen") - began), millis(ended))
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// The least that any tool could do.
struct Floor {
    dir: PathBuf,
    image: String,
    start_ms: String,
    host: String,
    etcd: String,
    docker: Docker,
    watch: etcd_client::WatchStream,
    count: u32,
    old: Option<String>,
}

impl Floor {
    fn new(lab: &Lab, image: &str, start_ms: &str, runtime: &tokio::runtime::Runtime) -> Self {
        let dir = lab.path("floor");
        fs::create_dir_all(&dir).expect("a directory");
        let etcd = lab.etcd.to_string();
        let watch = runtime.block_on(async {
            let mut client = etcd_client::Client::connect([&etcd], None).await.expect("etcd");
            let mut watch = client.watch("/floor", None).await.expect("a watch");
            watch.message().await.expect("it is made");
            watch
        });
        let docker = runtime.block_on(async { Docker::connect_with_unix_defaults().expect("Docker") });
        let (image, start_ms, host) = (image.to_owned(), start_ms.to_owned(), lab.host.clone());
        Self { dir, image, start_ms, host, etcd, docker, watch, count: 0, old: None }
    }

    /// A virtual host of its own in the lab's nginx, and as many others as are asked for.
    fn add_to_nginx(&self, lab: &Lab, others: u64) {
        let server = |name: &str| {
            format!(
                "server {{ listen {}; server_name {name}; location / {{ proxy_pass http://unix:{}/current:; proxy_http_version 1.1; }} }}\n",
                lab.ingress,
                self.dir.display()
            )
        };
        let mut text = server("floor.test");
        text.extend((0..others).map(|n| server(&format!("other{n}.test"))));
        fs::write(self.dir.join("floor.conf"), text).expect("a file");
        let conf = fs::read_to_string(lab.path("nginx.conf")).expect("a file");
        let include = format!("http {{ server_names_hash_max_size 8192; include {}/floor.conf;", self.dir.display());
        fs::write(lab.path("nginx.conf"), conf.replacen("http {", &include, 1)).expect("a file");
    }

    fn deploy(&mut self, runtime: &tokio::runtime::Runtime) -> (String, Instant, Duration) {
        self.count += 1;
        let release = format!("floor{}", self.count);
        let dir = self.dir.join(&release);
        fs::create_dir(&dir).expect("a directory");
        let began = Instant::now();
        let mut put = Command::new("etcdctl");
        put.env("ETCDCTL_API", "3").args(["--endpoints", &self.etcd, "put", "/floor", &release]).stdout(Stdio::null());
        assert!(put.status().expect("etcdctl runs").success());
        runtime.block_on(async {
            self.watch.message().await.expect("it is told").expect("it is open");
            let mount = Mount {
                typ: Some(MountType::BIND),
                source: Some(dir.display().to_string()),
                target: Some("/run/app".into()),
                ..Default::default()
            };
            let body = ContainerCreateBody {
                image: Some(self.image.clone()),
                env: Some(vec![
                    "SOCKET=/run/app/app.sock".into(),
                    format!("DEMAE_RELEASE={release}"),
                    format!("START_MS={}", self.start_ms),
                ]),
                labels: Some(HashMap::from([("demae.host".to_owned(), format!("{}-floor", self.host))])),
                host_config: Some(HostConfig { mounts: Some(vec![mount]), init: Some(true), ..Default::default() }),
                ..Default::default()
            };
            let options = CreateContainerOptionsBuilder::default().name(&format!("{}-{release}", self.host)).build();
            let id = self.docker.create_container(Some(options), body).await.expect("created").id;
            self.docker.start_container(&id, None).await.expect("started");
            let socket = dir.join("app.sock");
            while !answers(&socket).await {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            let beside = self.dir.join("next");
            std::os::unix::fs::symlink(&socket, &beside).expect("a symlink");
            fs::rename(&beside, self.dir.join("current")).expect("renamed");
            if let Some(old) = self.old.replace(id) {
                let options = StopContainerOptionsBuilder::default().t(2).build();
                self.docker.stop_container(&old, Some(options)).await.expect("stopped");
                let options = RemoveContainerOptionsBuilder::default().v(true).build();
                self.docker.remove_container(&old, Some(options)).await.expect("removed");
            }
        });
        (release, began, began.elapsed())
    }

    fn remove(&self, runtime: &tokio::runtime::Runtime) {
        if let Some(old) = &self.old {
            let options = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
            runtime.block_on(self.docker.remove_container(old, Some(options))).expect("removed");
        }
    }
}

async fn answers(socket: &Path) -> bool {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let asking = async {
        let mut stream = tokio::net::UnixStream::connect(socket).await?;
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok::<_, std::io::Error>(text.starts_with("HTTP/1.1 200"))
    };
    asking.await.unwrap_or(false)
}

/// Figures of all rounds, in milliseconds.
#[derive(Default)]
struct Columns {
    floor: Vec<f64>,
    again: Vec<f64>,
    demae: Vec<f64>,
}

impl Columns {
    fn push(&mut self, floor: f64, again: f64, demae: f64) {
        self.floor.push(floor);
        self.again.push(again);
        self.demae.push(demae);
    }

    fn report(&self, what: &str, goal: f64) {
        let noise = interval(&self.again, &self.floor);
        let ratio = interval(&self.demae, &self.floor);
        let verdict = if ratio.2 <= goal {
            "met"
        } else if ratio.0 > goal {
            "missed"
        } else {
            "undecided"
        };
        println!("\n{what}");
        println!("  floor        {:7.1} ms (median)", median(&self.floor));
        println!(
            "  floor again  {:7.1} ms  ratio {:.2} [{:.2}, {:.2}]",
            median(&self.again),
            noise.1,
            noise.0,
            noise.2
        );
        println!(
            "  demae        {:7.1} ms  ratio {:.2} [{:.2}, {:.2}]  goal {goal}: {verdict}",
            median(&self.demae),
            ratio.1,
            ratio.0,
            ratio.2
        );
    }
}

fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

/// The median of the paired ratios, with its 95 % bootstrap interval. The resampling is seeded, so that one set of
/// figures has one verdict.
fn interval(figures: &[f64], floor: &[f64]) -> (f64, f64, f64) {
    let ratios: Vec<f64> = figures.iter().zip(floor).map(|(f, l)| f / l).collect();
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut next = || {
        // xorshift64, Marsaglia 2003.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state >> 33).unwrap_or(0)
    };
    let mut medians: Vec<f64> = (0..2000)
        .map(|_| median(&(0..ratios.len()).map(|_| ratios[next() % ratios.len()]).collect::<Vec<_>>()))
        .collect();
    medians.sort_by(f64::total_cmp);
    (medians[50], median(&ratios), medians[1949])
}
