//! The agent's metrics, for Prometheus.
//!
//! Several sources are combined at each scrape:
//! - [`Metrics`], of the host as a whole. Every series exists from the start, so counting is a few atomic operations and no
//!   lock;
//! - [`AppSeries`], of one app. They are owned by the loop and only written here, so they live as long as the app;
//! - [`View`], the state after the last round of the loop. It is rebuilt each round and immutable;
//! - [`HostGauges`] and [`FleetGauges`], as they were last read, of this machine and of rollouts.
//!
//! So a scrape can never block a deploy. Labels come from bounded sets: never an id, an address or an error.

mod app;
mod fleet;
mod host_gauges;
mod text;
mod view;

use std::time::Duration;

use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder,
    core::Collector,
};

pub use app::{AppSeries, ChangeOutcome};
pub use fleet::{FleetGauges, LeaderGauges};
pub use host_gauges::{Disk, HostGauges};
use text::Text;
pub use view::{AppView, ReleaseView, StoreView, View};

use crate::{
    execute::StepError,
    host::docker::{Failure, Meter, Operation},
    model::{
        event::{Outcome, What},
        fleet::TransactionKind,
        time::Timestamp,
    },
    plan::step::StepKind,
};

/// Buckets for durations of steps, in seconds.
const STEP_BUCKETS: &[f64] = &[0.005, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0];
/// Buckets for calls to Docker, in seconds: an inspect takes under a millisecond, a start 0.2 s, a stop its grace
/// period.
const CALL_BUCKETS: &[f64] = &[0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0];
/// Buckets of a pull, in seconds.
const PULL_BUCKETS: &[f64] = &[0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0];

/// Kinds of drift: state repaired without a change in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Drift {
    /// A container was stopped, paused or removed.
    Container,
    /// A route symlink.
    Route,
    /// An env-file, or a file of nginx.
    File,
    /// nginx served something else.
    Nginx,
}

impl Drift {
    /// Every kind.
    pub const ALL: [Self; 4] = [Self::Container, Self::Route, Self::File, Self::Nginx];

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Container => "container",
            Self::Route => "route",
            Self::File => "file",
            Self::Nginx => "nginx",
        }
    }
}

/// The outcome of delivering an event to the webhook.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// It was accepted.
    Delivered,
    /// It was refused, or all attempts failed.
    Failed,
    /// It was never attempted: the queue was full for too long.
    Dropped,
}

impl Delivery {
    /// Every outcome.
    pub const ALL: [Self; 3] = [Self::Delivered, Self::Failed, Self::Dropped];

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Delivered => "delivered",
            Self::Failed => "failed",
            Self::Dropped => "dropped",
        }
    }
}

/// Metrics of the host as a whole.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    steps: IntCounterVec,
    step_failures: IntCounterVec,
    step_seconds: HistogramVec,
    pull_bytes: IntCounter,
    images_removed: IntCounter,
    pull_seconds: Histogram,
    drift: IntCounterVec,
    reloads: IntCounterVec,
    reload_seconds: Histogram,
    reload_failing: IntGauge,
    reloads_skipped: IntCounter,
    reloads_coalesced: IntCounter,
    drains: IntCounterVec,
    drain_seconds: Histogram,
    connections_cut: IntCounter,
    docker_seconds: HistogramVec,
    docker_errors: IntCounterVec,
    lists: IntCounter,
    standstills: IntCounter,
    events: IntCounterVec,
    deliveries: IntCounterVec,
    rollout_writes: IntCounterVec,
}

/// Creates and registers collectors.
struct Registrar(Registry);

impl Registrar {
    fn keep<C: Collector + Clone + 'static>(&self, collector: C) -> Result<C, prometheus::Error> {
        self.0.register(Box::new(collector.clone()))?;
        Ok(collector)
    }

    fn counter(&self, name: &str, help: &str) -> Result<IntCounter, prometheus::Error> {
        self.keep(IntCounter::new(name, help)?)
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, prometheus::Error> {
        self.keep(IntCounterVec::new(Opts::new(name, help), labels)?)
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Result<Histogram, prometheus::Error> {
        self.keep(Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec()))?)
    }

    fn histograms(
        &self,
        name: &str,
        help: &str,
        label: &str,
        buckets: &[f64],
    ) -> Result<HistogramVec, prometheus::Error> {
        self.keep(HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), &[label])?)
    }
}

impl Metrics {
    /// Registers all metrics, each with every series that it will ever have.
    ///
    /// # Errors
    /// If two have one name: a mistake in this file.
    pub fn new() -> Result<Self, prometheus::Error> {
        let make = Registrar(Registry::new_custom(None, None)?);
        let metrics = Self {
            steps: make.counters("demae_steps_total", "Steps taken, by kind and outcome", &["kind", "outcome"])?,
            step_failures: make.counters(
                "demae_step_failures_total",
                "Steps that failed, by kind and the kind of error",
                &["kind", "error"],
            )?,
            step_seconds: make.histograms(
                "demae_step_seconds",
                "How long steps take, by kind",
                "kind",
                STEP_BUCKETS,
            )?,
            pull_bytes: make.counter("demae_pull_bytes_total", "Bytes of images downloaded")?,
            images_removed: make.counter("demae_images_removed_total", "Images removed to make room")?,
            pull_seconds: make.histogram("demae_pull_seconds", "How long pulls that succeeded took", PULL_BUCKETS)?,
            drift: make.counters(
                "demae_drift_repaired_total",
                "Drift repaired without a change in the store, by kind",
                &["kind"],
            )?,
            reloads: make.counters("demae_nginx_reloads_total", "Reloads of nginx, by outcome", &["outcome"])?,
            reload_seconds: make.histogram(
                "demae_nginx_reload_seconds",
                "Time from a new nginx configuration to a worker that answers with it",
                STEP_BUCKETS,
            )?,
            reload_failing: make.keep(IntGauge::new(
                "demae_nginx_reload_failing",
                "Whether the last attempt to change nginx failed (1) or succeeded (0)",
            )?)?,
            reloads_skipped: make
                .counter("demae_nginx_reloads_skipped_total", "Changes that nginx did not have to be reloaded for")?,
            reloads_coalesced: make
                .counter("demae_nginx_reloads_coalesced_total", "Changes that shared the reload of another one")?,
            drains: make.counters(
                "demae_drains_total",
                "Instances drained, by whether all requests ended (complete) or time ran out (cut)",
                &["outcome"],
            )?,
            drain_seconds: make.histogram("demae_drain_seconds", "How long instances take to drain", STEP_BUCKETS)?,
            connections_cut: make.counter(
                "demae_drain_connections_cut_total",
                "Connections that were left when the drain time of their instance was over",
            )?,
            docker_seconds: make.histograms(
                "demae_docker_call_seconds",
                "How long calls to Docker take, by operation",
                "operation",
                CALL_BUCKETS,
            )?,
            docker_errors: make.counters(
                "demae_docker_errors_total",
                "Calls to Docker that failed, by operation and kind",
                &["operation", "kind"],
            )?,
            lists: make.counter("demae_docker_lists_total", "Full lists of containers")?,
            standstills: make
                .counter("demae_standstills_total", "Times that the agent got no time to run for 10 s or more")?,
            events: make.counters("demae_events_total", "Events emitted, by type", &["type"])?,
            deliveries: make.counters(
                "demae_webhook_deliveries_total",
                "Events for the webhook, by outcome",
                &["outcome"],
            )?,
            rollout_writes: make.counters(
                "demae_rollout_writes_total",
                "Records of rollouts that this agent wrote, as the leader or in its turn, by kind and outcome",
                &["kind", "outcome"],
            )?,
            registry: make.0,
        };
        metrics.registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
        metrics.begin();
        Ok(metrics)
    }

    /// Creates every series at once: a rate over a missing series is not zero, and a later one would need a lock.
    fn begin(&self) {
        for outcome in [Outcome::Done, Outcome::Failed].map(Outcome::as_str) {
            self.reloads.with_label_values(&[outcome]);
            for kind in StepKind::ALL {
                self.steps.with_label_values(&[kind.as_str(), outcome]);
            }
        }
        for kind in StepKind::ALL.map(StepKind::as_str) {
            self.step_seconds.with_label_values(&[kind]);
            for error in StepError::KINDS {
                self.step_failures.with_label_values(&[kind, error]);
            }
        }
        for outcome in ["complete", "cut"] {
            self.drains.with_label_values(&[outcome]);
        }
        for operation in Operation::MEASURED.map(Operation::as_str) {
            self.docker_seconds.with_label_values(&[operation]);
            for kind in Failure::ALL {
                self.docker_errors.with_label_values(&[operation, kind.as_str()]);
            }
        }
        for kind in Drift::ALL {
            self.drift.with_label_values(&[kind.as_str()]);
        }
        for kind in What::TYPES {
            self.events.with_label_values(&[kind]);
        }
        for outcome in Delivery::ALL {
            self.deliveries.with_label_values(&[outcome.as_str()]);
        }
        for kind in TransactionKind::ALL {
            for made in [Some(true), Some(false), None] {
                self.rollout_writes.with_label_values(&[kind.as_str(), written(made)]);
            }
        }
    }

    /// A record of a rollout was to be written; `made` is `None` if the store could not be asked.
    pub fn rollout_written(&self, kind: TransactionKind, made: Option<bool>) {
        self.rollout_writes.with_label_values(&[kind.as_str(), written(made)]).inc();
    }

    /// A step succeeded, or failed with this kind of error.
    pub fn stepped(&self, kind: StepKind, error: Option<&'static str>, took: Duration) {
        let outcome = if error.is_none() { Outcome::Done } else { Outcome::Failed };
        self.steps.with_label_values(&[kind.as_str(), outcome.as_str()]).inc();
        self.step_seconds.with_label_values(&[kind.as_str()]).observe(took.as_secs_f64());
        if let Some(error) = error {
            self.step_failures.with_label_values(&[kind.as_str(), error]).inc();
        }
    }

    /// Drift was repaired.
    pub fn repaired(&self, drift: Drift) {
        self.drift.with_label_values(&[drift.as_str()]).inc();
    }

    /// nginx was reloaded once for this many changes.
    pub fn reloaded(&self, changes: usize, took: Duration) {
        self.reloads.with_label_values(&[Outcome::Done.as_str()]).inc();
        self.reload_seconds.observe(took.as_secs_f64());
        self.reload_failing.set(0);
        self.reloads_coalesced.inc_by(u64::try_from(changes.saturating_sub(1)).unwrap_or(u64::MAX));
    }

    /// nginx could not be changed.
    pub fn reload_failed(&self) {
        self.reloads.with_label_values(&[Outcome::Failed.as_str()]).inc();
        self.reload_failing.set(1);
    }

    /// nginx serves the live set after all.
    pub fn reload_recovered(&self) {
        self.reload_failing.set(0);
    }

    /// A change needed no reload.
    pub fn reload_skipped(&self) {
        self.reloads_skipped.inc();
    }

    /// nginx had the configuration already: only the set of rejected vhosts changed.
    pub fn reload_unneeded(&self) {
        self.reloads_skipped.inc();
        self.reload_failing.set(0);
    }

    /// An instance has drained, or its drain time was over with this many connections left, as far as counted.
    pub fn drained(&self, cut: Option<usize>, took: Duration) {
        self.drains.with_label_values(&[if cut.is_some() { "cut" } else { "complete" }]).inc();
        self.drain_seconds.observe(took.as_secs_f64());
        self.connections_cut.inc_by(u64::try_from(cut.unwrap_or(0)).unwrap_or(u64::MAX));
    }

    /// All containers were listed.
    pub fn listed(&self) {
        self.lists.inc();
    }

    /// The agent did not run for a while.
    pub fn standstill_detected(&self) {
        self.standstills.inc();
    }

    /// An event was emitted.
    pub fn event_emitted(&self, what: &What) {
        self.events.with_label_values(&[what.as_str()]).inc();
    }

    /// The delivery of this many events to the webhook ended.
    pub fn delivered(&self, outcome: Delivery, count: u64) {
        self.deliveries.with_label_values(&[outcome.as_str()]).inc_by(count);
    }

    /// All of it in Prometheus' text format.
    ///
    /// # Errors
    /// If a metric cannot be written as text: a mistake in this module.
    pub fn render(
        &self,
        view: &View,
        host_gauges: &HostGauges,
        fleet: &FleetGauges,
        now: Timestamp,
    ) -> Result<String, prometheus::Error> {
        let mut text = String::new();
        TextEncoder::new().encode_utf8(&self.registry.gather(), &mut text)?;
        let mut text = Text::from(text);
        view.write(now, &mut text);
        host_gauges.write(&mut text);
        fleet.write(now, &mut text);
        Ok(text.finish())
    }
}

/// What became of a write.
fn written(made: Option<bool>) -> &'static str {
    match made {
        Some(true) => "made",
        Some(false) => "refused",
        None => "failed",
    }
}

impl Meter for Metrics {
    fn called(&self, operation: Operation, took: Duration, failure: Option<Failure>) {
        self.docker_seconds.with_label_values(&[operation.as_str()]).observe(took.as_secs_f64());
        if let Some(failure) = failure {
            self.docker_errors.with_label_values(&[operation.as_str(), failure.as_str()]).inc();
        }
    }

    fn pulled(&self, bytes: u64, took: Duration) {
        self.pull_bytes.inc_by(bytes);
        self.pull_seconds.observe(took.as_secs_f64());
    }

    fn removed_image(&self) {
        self.images_removed.inc();
    }
}
