//! Faults that occur on a host sooner or later, one after the other, each awaited until Prometheus has seen it.
#![allow(clippy::disallowed_methods, reason = "a test starts programs")]

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use demae::model::status::{AppStatus, HostStatus, State};

use super::{dashboards::Prometheus, load};

const PATIENCE: Duration = Duration::from_secs(90);

/// The host to inject the faults into.
pub struct Site<'a> {
    /// Its name in demae.
    pub host: &'a str,
    /// Address of its nginx.
    pub ingress: SocketAddr,
    /// Address of its agent.
    pub agent: SocketAddr,
    /// The Prometheus that scrapes it.
    pub prometheus: Prometheus,
    /// Puts a key below the prefix.
    pub put: &'a dyn Fn(&str, &str),
    /// Deletes all keys with this prefix, below demae's prefix.
    pub del: &'a dyn Fn(&str),
    /// An image of the example app with this version.
    pub image: &'a dyn Fn(&str) -> String,
    /// A line for specs: the user that apps run as.
    pub user: &'a str,
}

impl Site<'_> {
    /// A spec in socket mode.
    pub fn socket_spec(&self, image: &str, host: &str) -> String {
        format!(
            "image: \"{image}\"\n{}environment: {{SOCKET: /run/app/app.sock}}\nhealthcheck: {{http: /healthz, interval: 1s, start_period: 10s}}\n\
             ingress: {{hosts: [{host}], socket: /run/app/app.sock, drain: 10s}}\nstop_grace_period: 2s\n",
            self.user
        )
    }

    /// A spec in port mode.
    pub fn port_spec(&self, image: &str, host: &str, drain: &str) -> String {
        format!(
            "image: \"{image}\"\nhealthcheck: {{http: /healthz, interval: 1s, start_period: 10s}}\n\
             ingress: {{hosts: [{host}], port: 8080, drain: {drain}}}\nstop_grace_period: 2s\n"
        )
    }

    pub fn app(&self, app: &str) -> Option<AppStatus> {
        let (_, body) = load::get(self.agent, "localhost", "/status").ok()?;
        let status: HostStatus = serde_json::from_str(&body).ok()?;
        status.apps.into_iter().find(|a| a.app == app)
    }

    pub fn wait_app(&self, app: &str, what: &str, fits: impl Fn(&AppStatus) -> bool) -> AppStatus {
        let mut last = None;
        wait(&format!("`{app}` is {what}"), || {
            last = self.app(app);
            last.as_ref().is_some_and(&fits)
        });
        last.expect("a status")
    }

    /// Puts a key and waits until the app has converged on another release.
    pub fn deploy(&self, app: &str, key: &str, value: &str) -> AppStatus {
        let before = self.app(app).and_then(|a| a.release);
        (self.put)(key, value);
        self.wait_app(app, "converged on another release", |s| s.state == State::Converged && s.release != before)
    }

    /// Waits until a query has at least this value.
    pub fn scraped(&self, query: &str, at_least: f64) {
        wait(&format!("Prometheus has seen `{query}` at {at_least}"), || {
            self.prometheus.value(query).is_some_and(|v| v >= at_least)
        });
    }

    fn container(&self, app: &str) -> String {
        let labels = [format!("label=demae.host={}", self.host), format!("label=demae.app={app}")];
        let output = Command::new("docker").args(["ps", "-q", "--filter", &labels[0], "--filter", &labels[1]]).output();
        let text = String::from_utf8(output.expect("docker runs").stdout).expect("text");
        text.lines().next().expect("a container").to_owned()
    }
}

/// Blocks that need a person: a failing release, an invalid spec, a paused app; and one that Docker refuses. Undone by
/// [`mend`].
pub fn block(site: &Site<'_>) {
    let sick = site.socket_spec(&(site.image)("v1"), "sick.test").replace("app.sock}", "app.sock, MOOD: sick}");
    (site.put)("apps/sick/spec", &sick.replace("start_period: 10s", "start_period: 1s, retries: 1"));
    (site.put)("apps/typo/spec", "imagee: x\n");
    let nowhere = format!("image: \"{}\"\nnetwork_mode: nowhere-{}\n", (site.image)("v1"), site.host);
    (site.put)("apps/lost/spec", &nowhere);
    (site.put)("apps/held/paused", "for a test");
    (site.put)("apps/held/spec", &site.socket_spec(&(site.image)("v1"), "held.test"));
    for (app, kind) in [("sick", "halted"), ("typo", "invalid"), ("held", "paused")] {
        site.scraped(&format!("demae_app_block{{app=\"{app}\",kind=\"{kind}\"}}"), 1.0);
    }
    site.scraped("sum(demae_docker_errors_total{kind=\"refused\"})", 1.0);
    site.scraped("sum(demae_step_failures_total{error=\"docker\"})", 1.0);
}

/// Undoes [`block`] once the alert for the failing release fires, and waits until it is resolved.
pub fn mend(site: &Site<'_>) {
    let fires = || site.prometheus.firing().iter().any(|a| a == "DemaeReleaseHalted");
    wait("the alert for a release that failed", fires);
    for app in ["sick", "typo", "lost", "held"] {
        (site.del)(&format!("apps/{app}/"));
    }
    wait("no app is blocked", || site.prometheus.value("sum(demae_blocks)") == Some(0.0));
    wait("the alert is resolved", || !fires());
}

/// Drift without a change in the store: one instance dies, another becomes unhealthy.
pub fn drift(site: &Site<'_>, app: &str, virtual_host: &str) {
    let status = Command::new("docker").args(["kill", &site.container(app)]).stdout(Stdio::null()).status();
    assert!(status.expect("docker runs").success());
    site.scraped("sum(demae_drift_repaired_total{kind=\"container\"})", 1.0);
    site.scraped(&format!("sum(demae_container_restarts_total{{app=\"{app}\"}})"), 1.0);
    site.wait_app(app, "converged again", |s| s.state == State::Converged && s.healthy > 0);
    load::get(site.ingress, virtual_host, "/sicken").expect("it answers");
    site.scraped(&format!("sum(demae_health_flaps_total{{app=\"{app}\"}})"), 1.0);
    site.wait_app(app, "replaced", |s| s.state == State::Converged && s.healthy > 0);
}

/// A stream outlives the drain of its instance and also keeps an nginx worker. The app has a port and is on v2.
/// `while_draining` is called meanwhile.
pub fn cut(site: &Site<'_>, app: &str, virtual_host: &str, while_draining: impl FnOnce()) {
    (site.put)(&format!("apps/{app}/spec"), &site.port_spec(&(site.image)("v1"), virtual_host, "12s"));
    // An instance drains for as long as the spec that it was created from says.
    site.deploy(app, &format!("apps/{app}/image"), &(site.image)("v1"));
    let mut stream = TcpStream::connect(site.ingress).expect("a connection");
    write!(stream, "GET /stream?600 HTTP/1.1\r\nHost: {virtual_host}\r\n\r\n").expect("it is written");
    stream.read_exact(&mut [0]).expect("the answer begins");
    (site.put)(&format!("apps/{app}/image"), &(site.image)("v2"));
    site.scraped(&format!("sum(demae_app_wait{{app=\"{app}\",kind=\"drain\"}})"), 1.0);
    site.scraped("sum(demae_drain_connections)", 1.0);
    site.scraped("sum(demae_nginx_draining_workers)", 1.0);
    while_draining();
    site.scraped("sum(demae_drains_total{outcome=\"cut\"})", 1.0);
    site.wait_app(app, "converged", |s| s.state == State::Converged);
}

/// Waits until a condition holds.
pub fn wait(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
