//! From the put to the first response by the new release, and until the old container is removed.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    time::{Duration, Instant},
};

use bollard::{Docker, query_parameters::EventsOptionsBuilder};
use demae::model::status::State;
use futures_util::StreamExt as _;
use tokio::runtime::Runtime;

use super::{
    bare::{Bare, HOST},
    change_all,
    figures::{Figures, median},
};
use crate::support::{
    containers::only,
    lab::{Lab, Setup},
    load::{Client, Load, Tally},
    wait::{PATIENCE, until},
};

/// The column of the bare steps, and of the same once more, which shows the noise.
pub const BARE: &str = "bare steps";
pub const AGAIN: &str = "bare steps again";
/// The column of demae.
pub const DEMAE: &str = "demae";
/// The column of another host, whose releases are no rollouts.
pub const ALONE: &str = "without rollouts";

/// How requests reach the app.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// A unix socket behind a symlink.
    Socket,
    /// An address of its own, behind the kernel's table. The bare steps beside it are those behind a socket, in the same
    /// network.
    Table,
    /// A published port; each switch reloads nginx.
    Port,
}

/// What is measured.
#[derive(Debug, Clone)]
pub struct Plan {
    pub route: Route,
    /// In each, every column runs once, in rotating order.
    pub rounds: usize,
    /// How long the app takes until it listens.
    pub start_ms: usize,
    /// Other virtual hosts in nginx.
    pub vhosts: usize,
    /// Other apps on the host.
    pub apps: usize,
    /// Whether each release is a rollout, of this host alone; then another host takes none, as a column of its own.
    pub rollouts: bool,
}

/// The figures of a run.
pub struct Outcome {
    pub plan: Plan,
    /// Milliseconds from the put to the first response by the new release.
    pub first: Figures,
    /// Milliseconds from the put until the old container was removed.
    pub removed: Figures,
    /// Milliseconds from the arrival of the change to each step's end, as demae reports them.
    pub moments: BTreeMap<String, Vec<f64>>,
    /// Reloads of nginx by demae.
    pub reloads: f64,
    pub bare: Tally,
    pub demae: Tally,
}

/// Runs a plan.
pub fn measure(plan: Plan) -> Outcome {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let tcp_routes = plan.route == Route::Table;
    let without = Setup { tcp_routes, sections: "[rollouts]\nenabled = false\n", ..Setup::default() };
    let with = Setup { tcp_routes, ..Setup::default() };
    let mut lab = Lab::with(if plan.rollouts { &with } else { &without });
    let alone = plan.rollouts.then(|| Lab::with(&without));
    let image = lab.image("v1");
    let mut bare = runtime.block_on(Bare::new(&lab, &plan, &image));
    lab.stop_nginx();
    lab.start_nginx();
    runtime.block_on(bare.deploy());
    change_all(&lab, plan.apps, "spec", |_| format!("image: \"{image}\"\nnetwork_mode: none\n"));
    let spec = match plan.route {
        Route::Socket => lab.socket_spec(&image, "demae.test", ""),
        Route::Table | Route::Port => lab.port_spec(&image, "demae.test", "environment: {}\n"),
    };
    let spec = spec.replace("environment: {", &format!("environment: {{START_MS: \"{}\", ", plan.start_ms));
    for lab in [&lab].into_iter().chain(&alone) {
        lab.deploy("web", "apps/web/spec", &spec);
    }

    let client = |keep_alive| Client::get(keep_alive).pausing(Duration::from_millis(8));
    let load = |lab: &Lab, host: &str| Load::start(lab.ingress, host, vec![client(true), client(false)]);
    let (bare_load, demae_load) = (load(&lab, HOST), load(&lab, "demae.test"));
    let alone = alone.map(|lab| (load(&lab, "demae.test"), lab));
    until("requests flow", || bare_load.requests() > 50 && demae_load.requests() > 50);
    let reloads = lab.metric("demae_nginx_reloads_total", "done");
    let (mut first, mut removed, mut moments) = (Figures::default(), Figures::default(), BTreeMap::new());
    for round in 0..plan.rounds {
        let mut order: Vec<&str> = [BARE, DEMAE, AGAIN].into_iter().chain(alone.as_ref().map(|_| ALONE)).collect();
        let columns = order.len();
        order.rotate_left(round % columns);
        for column in order {
            let (until_first, until_removed) = match (column, &alone) {
                (DEMAE, _) => demae_round(&lab, &demae_load, round, &runtime, &mut moments),
                (ALONE, Some((load, lab))) => demae_round(lab, load, round, &runtime, &mut BTreeMap::new()),
                _ => {
                    let deployed = runtime.block_on(bare.deploy());
                    let answered = || bare_load.so_far().first_seen.get(&deployed.release).copied();
                    until("the new release of the bare steps answered", || answered().is_some());
                    (answered().expect("just seen") - deployed.began, deployed.took)
                }
            };
            first.push(column, until_first);
            removed.push(column, until_removed);
        }
    }
    let (bare_tally, demae_tally) = (bare_load.stop(), demae_load.stop());
    let reloads = lab.metric("demae_nginx_reloads_total", "done") - reloads;
    Outcome { plan, first, removed, moments, reloads, bare: bare_tally, demae: demae_tally }
}

fn demae_round(
    lab: &Lab,
    load: &Load,
    round: usize,
    runtime: &Runtime,
    moments: &mut BTreeMap<String, Vec<f64>>,
) -> (Duration, Duration) {
    let filters = [("container", only(lab, "web")), ("event", "destroy".to_owned())];
    let filters: HashMap<&str, Vec<String>> = filters.into_iter().map(|(name, value)| (name, vec![value])).collect();
    let removal = runtime.spawn(async move {
        let docker = Docker::connect_with_unix_defaults().expect("Docker");
        let options = EventsOptionsBuilder::default().filters(&filters).build();
        docker.events(Some(options)).next().await.expect("an event").expect("an event");
        Instant::now()
    });
    let release = lab.app("web").and_then(|s| s.release);
    let began = Instant::now();
    lab.put("apps/web/restart", &format!("round {round}"));
    let removed = runtime.block_on(async { tokio::time::timeout(PATIENCE, removal).await });
    let removed = removed.expect("it is removed").expect("no panic") - began;
    let status = lab.wait_app("web", "converged", |s| s.state == State::Converged && s.release != release);
    for moment in status.timeline {
        moments.entry(moment.what).or_default().push(moment.ms as f64);
    }
    let release = status.release.expect("a release");
    let first = load.so_far().first_seen.get(&release).copied().expect("the new release answered");
    (first - began, removed)
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Plan { route, rounds, start_ms, vhosts, apps, rollouts } = &self.plan;
        let rollouts = if *rollouts { "" } else { ", without rollouts" };
        writeln!(
            f,
            "{route:?}: {rounds} rounds; the app listens after {start_ms} ms; {vhosts} other virtual hosts, {apps} other apps{rollouts}"
        )?;
        write!(f, "put → first response by the new release\n{}", self.first.table(BARE))?;
        write!(f, "put → old container removed\n{}", self.removed.table(BARE))?;
        if self.plan.rollouts {
            let more = self.first.difference(DEMAE, ALONE);
            let (low, median, high) = (more.low, more.median, more.high);
            writeln!(f, "a rollout adds to the first response: {median:+.1} ms [{low:+.1}, {high:+.1}]")?;
        }
        let mut moments: Vec<(f64, &String)> = self.moments.iter().map(|(what, ms)| (median(ms), what)).collect();
        moments.sort_by(|a, b| a.0.total_cmp(&b.0));
        let moments: Vec<String> = moments.into_iter().map(|(ms, what)| format!("{what} {ms:.0}")).collect();
        writeln!(f, "demae's own account, medians in ms: {}", moments.join(", "))?;
        writeln!(f, "reloads of nginx by demae: {}", self.reloads)?;
        for (name, tally) in [(BARE, &self.bare), (DEMAE, &self.demae)] {
            let Tally { requests, failed, stale, slowest, .. } = tally;
            writeln!(
                f,
                "{name}: {requests} requests, {failed} failed, {stale} on reused connections, slowest {slowest:?}"
            )?;
        }
        Ok(())
    }
}
