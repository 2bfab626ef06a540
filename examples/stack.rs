//! Exercises the whole stack once it is up: deploys under load, counted; the results read back from Prometheus; etcd
//! stopped for two minutes; mishaps; and every query of every dashboard.
//!
//! `scripts/stack.sh` brings the stack up, passes its addresses by variables, and takes it down. Exits non-zero if any
//! check fails.
#![expect(
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a program for people, which starts programs and keeps files of its own"
)]

#[path = "../tests/support/dashboards.rs"]
mod dashboards;
#[path = "../tests/support/load.rs"]
#[expect(dead_code, reason = "the tests use all of it")]
mod load;
#[path = "../tests/support/mishaps.rs"]
mod mishaps;
#[path = "../tests/support/registry.rs"]
#[expect(dead_code, reason = "the tests use all of it")]
mod registry;

use std::{
    env,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use dashboards::{Prometheus, now, questions};
use demae::model::status::State;
use load::{Client, Load, Tally};
use mishaps::{Site, wait};
use registry::Registry;

/// How long etcd is down.
const OUTAGE: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    let stack = Stack::from_env();
    let (put, del, image) =
        (|key: &str, value: &str| stack.put(key, value), |key: &str| stack.del(key), |v: &str| stack.image(v));
    let site = Site {
        host: &stack.host,
        ingress: stack.ingress,
        agent: stack.agent,
        prometheus: stack.prometheus,
        put: &put,
        del: &del,
        image: &image,
        user: "",
    };
    let mut failed = 0;
    let mut check = |passed: bool, what: &str| {
        println!("{} {what}", if passed { "ok  " } else { "FAIL" });
        failed += u32::from(!passed);
    };
    let began = now();
    stack.wait_healthy();
    site.wait_app("hello", "converged: the example that the stack brings", |s| s.state == State::Converged);
    // A rate covers only what happened between two scrapes.
    site.scraped("up{job=\"demae\"}", 1.0);
    println!("all services are healthy, the example serves, and Prometheus scrapes the agent");

    println!("\n== v1, then v2 under load ==");
    let registry = Registry::start(stack.registry, &stack.work);
    registry.push(&stack.image("v1"), "v1");
    site.deploy("shop", "apps/shop/spec", &site.socket_spec(&registry.name("v1"), "shop.test"));
    site.deploy("api", "apps/api/spec", &site.port_spec(&stack.image("v1"), "api.test", "10s"));
    let load = Load::start(stack.ingress, "shop.test", clients());
    wait("requests flow", || load.requests() > 200);
    let status = site.deploy("shop", "apps/shop/image", &stack.image("v2"));
    let moments: Vec<String> = status.timeline.iter().map(|m| format!("{} {}", m.what, m.ms)).collect();
    println!("     ms: {}", moments.join(", "));
    site.deploy("shop", "env/shop/GREETING", "hello");
    site.scraped("demae_app_release_info{app=\"shop\",role=\"serving\",version=\"v2\"}", 1.0);
    let tally = load.stop();
    check(lost(&tally) == 0 && tally.versions.len() == 2, &summary(&tally));
    site.deploy("api", "apps/api/image", &stack.image("v2"));
    site.scraped("sum(demae_convergence_seconds_count{app=\"shop\",change=\"image\"})", 1.0);
    site.scraped("sum(demae_convergence_seconds_count{app=\"api\",change=\"image\"})", 1.0);

    println!("\n== results in Prometheus ==");
    for (what, query) in [
        (
            "v2 of shop: from put to first answer, s",
            "sum(demae_first_answer_seconds_sum{app=\"shop\",change=\"image\"})",
        ),
        ("v2 of shop: from put to converged, s", "sum(demae_convergence_seconds_sum{app=\"shop\",change=\"image\"})"),
        ("apps that are converged", "sum(demae_app_converged)"),
        ("reloads of nginx", "sum(demae_nginx_reloads_total{outcome=\"done\"})"),
        ("changes that needed none", "sum(demae_nginx_reloads_skipped_total)"),
        ("drains cut short", "sum(demae_drains_total{outcome=\"cut\"})"),
    ] {
        let value = stack.prometheus.value(query);
        check(value.is_some(), &format!("{what}: {}", value.map_or("no data".to_owned(), |v| format!("{v:.3}"))));
    }
    // Rules reflect the deploys once they were evaluated again.
    let after = now();
    wait("the rules were evaluated again", || {
        stack.prometheus.value("min(timestamp(prefix:demae_oldest_change_seconds:max))") > Some(after + 1.0)
    });
    let (fired, pending) = (stack.prometheus.fired(began, now()), stack.prometheus.alerts("pending"));
    check(fired.is_empty(), &format!("alerts that fired during the deploys, or after them: {fired:?}"));
    check(pending.is_empty(), &format!("alerts that would fire if this went on: {pending:?}"));

    println!("\n== etcd is down for {} s ==", OUTAGE.as_secs());
    let stale = || stack.prometheus.firing().iter().any(|a| a == "DemaeStoreStale");
    let load = Load::start(stack.ingress, "shop.test", clients());
    stack.service("etcd", "stop");
    let gone = Instant::now();
    wait("the age of the store rises", || stack.prometheus.value("max(demae_store_sync_age_seconds)") > Some(30.0));
    println!("     after {:3} s: the store's age is above 30 s", gone.elapsed().as_secs());
    wait("the alert for it fires", stale);
    println!("     after {:3} s: DemaeStoreStale fires", gone.elapsed().as_secs());
    std::thread::sleep(OUTAGE.saturating_sub(gone.elapsed()));
    let age = stack.prometheus.value("max(demae_store_sync_age_seconds)").unwrap_or_default();
    check(age > 90.0, &format!("the store's age at the end of it: {age:.0} s"));
    stack.service("etcd", "start");
    let back = Instant::now();
    wait("the alert is gone", || !stale());
    println!("     {:3} s after its return: no alert", back.elapsed().as_secs());
    let tally = load.stop();
    check(lost(&tally) == 0, &format!("meanwhile: {}", summary(&tally)));
    site.deploy("shop", "env/shop/GREETING", "again");
    check(stack.prometheus.firing().is_empty(), "a deploy after its return converges, and nothing fires");

    println!("\n== mishaps, and all dashboards ==");
    mishaps::block(&site);
    mishaps::drift(&site, "shop", "shop.test");
    mishaps::cut(&site, "api", "api.test", || ());
    mishaps::mend(&site);
    let all = questions(&Path::new(env!("CARGO_MANIFEST_DIR")).join("dashboards"));
    let values = dashboards::values(&stack.host, &["shop", "sick", "api"], "30s");
    let unanswered = stack.prometheus.unanswered(&all, &values, began, now());
    check(unanswered.is_empty(), &format!("queries of dashboards: {}  without data: {}", all.len(), unanswered.len()));
    unanswered.iter().for_each(|u| println!("     {u}"));
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The same as in the demo: kept and new connections, GET and POST, some slow.
fn clients() -> Vec<Client> {
    let pause = Duration::from_millis(5);
    let clients = [(true, false), (false, false), (true, true), (false, true)];
    let quick = clients.map(|(keep_alive, post)| Client { post, ..Client::get(keep_alive) }.pausing(pause));
    quick.into_iter().chain([Client::slow(true, 2000), Client::slow(false, 2000)]).collect()
}

fn lost(tally: &Tally) -> u64 {
    tally.failed + tally.stale
}

fn summary(tally: &Tally) -> String {
    let mut text = format!("requests: {}  failed: {}  by version: {:?}", tally.requests, lost(tally), tally.versions);
    for reason in &tally.reasons {
        text.push_str(&format!("\n     {reason}"));
    }
    text
}

/// Addresses of the stack.
struct Stack {
    project: String,
    host: String,
    app: String,
    etcd: SocketAddr,
    ingress: SocketAddr,
    agent: SocketAddr,
    prometheus: Prometheus,
    registry: SocketAddr,
    work: PathBuf,
}

impl Stack {
    fn from_env() -> Self {
        let get = |name: &str| env::var(name).unwrap_or_else(|_| panic!("`{name}` is not set: run scripts/stack.sh"));
        let port = |name: &str| SocketAddr::from(([127, 0, 0, 1], get(name).parse().expect("a port")));
        Self {
            project: get("COMPOSE_PROJECT_NAME"),
            host: get("DEMAE_STACK_HOST"),
            app: get("DEMAE_STACK_APP"),
            etcd: port("DEMAE_STACK_ETCD_PORT"),
            ingress: port("DEMAE_STACK_NGINX_PORT"),
            agent: port("DEMAE_STACK_AGENT_PORT"),
            prometheus: Prometheus(port("DEMAE_STACK_PROMETHEUS_PORT")),
            registry: port("DEMAE_STACK_REGISTRY_PORT"),
            work: get("DEMAE_STACK_WORK").into(),
        }
    }

    fn image(&self, version: &str) -> String {
        format!("{}:{version}", self.app)
    }

    fn etcdctl(&self, args: &[&str]) {
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").arg("--endpoints").arg(self.etcd.to_string()).args(args);
        run(&mut command);
    }

    fn put(&self, key: &str, value: &str) {
        self.etcdctl(&["put", &format!("/demae/{key}"), value]);
    }

    fn del(&self, key: &str) {
        self.etcdctl(&["del", "--prefix", &format!("/demae/{key}")]);
    }

    /// Containers of the project, by service and state.
    fn containers(&self) -> Vec<(String, String, String)> {
        let project = format!("label=com.docker.compose.project={}", self.project);
        let format = "{{.ID}}\t{{.Label \"com.docker.compose.service\"}}\t{{.Status}}";
        let output = Command::new("docker").args(["ps", "-a", "--filter", &project, "--format", format]).output();
        let text = String::from_utf8(output.expect("docker runs").stdout).expect("text");
        let fields = |line: &str| {
            let mut fields = line.split('\t').map(str::to_owned);
            Some((fields.next()?, fields.next()?, fields.next()?))
        };
        text.lines().filter_map(fields).collect()
    }

    fn wait_healthy(&self) {
        let mut last = Vec::new();
        let began = Instant::now();
        loop {
            last.clone_from(&self.containers());
            let of = |service: &str| last.iter().find(|c| c.1 == service).map_or("", |c| &c.2);
            let healthy = ["etcd", "nginx", "agent", "prometheus"].iter().all(|s| of(s).contains("(healthy)"));
            if healthy && of("example").starts_with("Exited (0)") {
                return;
            }
            assert!(began.elapsed() < Duration::from_secs(90), "the stack is not healthy: {last:#?}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Stops or starts a service.
    fn service(&self, service: &str, verb: &str) {
        let found = self.containers().into_iter().find(|c| c.1 == service).expect("a container");
        run(Command::new("docker").args([verb, &found.0]));
    }
}

fn run(command: &mut Command) {
    let status = command.stdout(Stdio::null()).status();
    assert!(status.as_ref().is_ok_and(std::process::ExitStatus::success), "{command:?}: {status:?}");
}
