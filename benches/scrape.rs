//! The cost of a scrape, and what it delays: the agent's own listener with the metrics of many apps, scraped over
//! loopback; and the cost of counting a deploy, with and without concurrent scrapes.
//!
//! `DEMAE_BENCH_APPS=200`, `DEMAE_BENCH_SCRAPES=300`.
#![expect(clippy::print_stdout, reason = "a program for people")]

#[path = "../tests/support/load.rs"]
#[expect(dead_code, reason = "the tests use all of it")]
mod load;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use demae::{
    events::Events,
    host::docker::{Meter as _, Operation},
    http::{self, HttpState},
    metrics::{AppSeries, AppView, HostGauges, Metrics, ReleaseView, View},
    model::{
        change::Change,
        desired::HostMode,
        name::{AppName, HostName},
        status::{HostStatus, State, StoreStatus},
        time::Timestamp,
    },
    plan::step::StepKind,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

fn main() {
    let number = |name: &str, default: usize| std::env::var(name).map_or(default, |v| v.parse().expect("a number"));
    let (apps, scrapes) = (number("DEMAE_BENCH_APPS", 200), number("DEMAE_BENCH_SCRAPES", 300));
    let host = HostName::try_from("bench").expect("a name");
    let metrics = Arc::new(Metrics::new().expect("metrics"));
    let series: Vec<Arc<AppSeries>> = (0..apps).map(|n| Arc::new(AppSeries::new(name(n)))).collect();
    for each in &series {
        for change in [Change::New, Change::Image, Change::Environment, Change::Spec] {
            each.converged(change, Duration::from_millis(300));
            each.answered(change, Duration::from_millis(200));
        }
    }
    let mut view = View::new(host.clone(), "/demae".to_owned());
    view.apps = series.iter().enumerate().map(|(n, series)| app(n, series.clone())).collect();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let (address, end) = runtime.block_on(serve(host, metrics.clone(), view));

    // The metrics of a deploy: a call to Docker, a step, and at its end the durations.
    let deploy = |n: usize| {
        metrics.called(Operation::Create, Duration::from_millis(7), None);
        metrics.stepped(StepKind::Create, None, Duration::from_millis(8));
        series[n % apps].converged(Change::Image, Duration::from_millis(300));
    };
    let alone = measure(&deploy, || false, 200_000);

    let quiet: Vec<Duration> = (0..scrapes).map(|_| scrape(address).0).collect();
    let (mut took, mut size, mut count) = (Vec::new(), 0, 0);
    let done = AtomicBool::new(false);
    let concurrent = std::thread::scope(|scope| {
        let measuring = scope.spawn(|| measure(&deploy, || done.load(Ordering::Relaxed), usize::MAX));
        for _ in 0..scrapes {
            let (duration, text) = scrape(address);
            took.push(duration);
            (size, count) = (text.len(), text.lines().filter(|l| !l.starts_with('#')).count());
        }
        done.store(true, Ordering::Relaxed);
        measuring.join().expect("it measures")
    });
    end.cancel();
    println!("{apps} apps: {count} series, {} KB", size / 1024);
    for (what, mut took) in [("alone", quiet), ("while deploys are counted without a pause", took)] {
        took.sort();
        let at = |percent: usize| millis(took[(took.len() * percent / 100).min(took.len() - 1)]);
        println!("a scrape {what}: median {:.1} ms, 99 % {:.1} ms, slowest {:.1} ms", at(50), at(99), at(100));
    }
    println!(
        "counting a deploy, median: {} ns alone, {} ns with concurrent scrapes: x {:.2}",
        alone.0,
        concurrent.0,
        ratio(concurrent.0, alone.0)
    );
    println!("counting a deploy, 99.9 %: {} ns alone, {} ns with concurrent scrapes", alone.1, concurrent.1);
}

/// One scrape, as by Prometheus: its duration, and its text.
fn scrape(address: SocketAddr) -> (Duration, String) {
    let began = Instant::now();
    let (status, text) = load::get(address, "localhost", "/metrics").expect("metrics");
    assert_eq!(status, 200);
    (began.elapsed(), text)
}

/// The cost of counting, in nanoseconds: the median and the 99.9th percentile.
fn measure(deploy: &impl Fn(usize), done: impl Fn() -> bool, max: usize) -> (u128, u128) {
    let mut took = Vec::new();
    while took.len() < max && !done() {
        let began = Instant::now();
        deploy(took.len());
        took.push(began.elapsed().as_nanos());
    }
    took.sort_unstable();
    (took[took.len() / 2], took[took.len() * 999 / 1000])
}

#[expect(clippy::cast_precision_loss, reason = "nanoseconds of a moment")]
fn ratio(a: u128, b: u128) -> f64 {
    a as f64 / b.max(1) as f64
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

fn name(n: usize) -> AppName {
    AppName::try_from(format!("app-{n}")).expect("a name")
}

fn app(n: usize, series: Arc<AppSeries>) -> AppView {
    let release = |version: &str| Some(ReleaseView { release: format!("{n:012x}"), version: version.to_owned() });
    AppView {
        app: name(n),
        state: State::Converging,
        wanted: 2,
        running: 3,
        healthy: 2,
        unconverged: Some(Timestamp::now()),
        proven: Some(Timestamp::now()),
        wants: release("v42"),
        serves: release("v41"),
        blocks: vec!["halted"],
        waits: vec!["health", "drain"],
        draining: 3,
        series,
    }
}

async fn serve(host: HostName, metrics: Arc<Metrics>, view: View) -> (SocketAddr, CancellationToken) {
    let end = CancellationToken::new();
    let status = HostStatus {
        tcp_routes: None,
        version: demae::model::status::VERSION,
        host: host.clone(),
        mode: HostMode::Active,
        agent: String::new(),
        store: StoreStatus::default(),
        proxy: None,
        apps: Vec::new(),
        unreadable: Vec::new(),
    };
    let http_state = HttpState {
        events: Events::new(host, metrics.clone()),
        metrics,
        view: watch::channel(Arc::new(view)).1,
        host_gauges: watch::channel(HostGauges::default()).1,
        leader_gauges: watch::channel(None).1,
        takes_turns: watch::channel(true).1,
        status: watch::channel(status).1,
        pulse: watch::channel(tokio::time::Instant::now()).1,
        ready: watch::channel(true).1,
        end: end.clone(),
    };
    let listener = http::bind(([127, 0, 0, 1], 0).into()).await.expect("a port");
    let address = listener.local_addr().expect("an address");
    #[expect(clippy::disallowed_methods, reason = "it ends with the program")]
    tokio::spawn(http::serve(listener, http_state));
    (address, end)
}
