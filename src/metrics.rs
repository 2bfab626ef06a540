//! What the agent counts and measures, for Prometheus.
//!
//! One value, made once and handed around. Labels come from bounded sets only: never an id, an address or an error.

use std::{collections::BTreeSet, time::Duration};

use prometheus::{
    Encoder as _, Gauge, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder, core::Collector,
};

use crate::model::name::AppName;

/// All metrics of an agent.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Change seen in the store until the app is converged.
    pub convergence: HistogramVec,
    /// Change seen in the store until the new release answered through nginx.
    pub first_answer: HistogramVec,
    /// Instances wanted.
    pub wanted: IntGaugeVec,
    /// Instances that serve and are healthy.
    pub healthy: IntGaugeVec,
    /// 1 where an app is as it should be.
    pub converged: IntGaugeVec,
    /// Blocks by kind.
    pub blocks: IntGaugeVec,
    /// Waits by kind.
    pub waits: IntGaugeVec,
    /// Steps by kind and outcome.
    pub steps: IntCounterVec,
    /// Failed steps by the kind of error.
    pub step_failures: IntCounterVec,
    /// How long steps take.
    pub step_seconds: HistogramVec,
    /// Reloads of nginx by outcome.
    pub reloads: IntCounterVec,
    /// How long reloads take, until a new worker answers.
    pub reload_seconds: HistogramVec,
    /// Drains by how they ended.
    pub drains: IntCounterVec,
    /// How long drains take.
    pub drain_seconds: HistogramVec,
    /// Seconds since the store was proven to be as it was read.
    pub sync_age: Gauge,
    /// The revision last read.
    pub revision: IntGauge,
    /// Full reads of the store.
    pub store_reads: IntGauge,
    /// Errors of the store by kind.
    pub store_errors: IntGaugeVec,
    /// Full lists of containers.
    pub lists: IntCounter,
}

fn ladder() -> Vec<f64> {
    vec![0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0, 300.0]
}

impl Metrics {
    /// Registers all of them.
    ///
    /// # Errors
    /// If two have one name: a mistake in this file.
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new_custom(None, None)?;
        let histogram = |name: &str, help: &str, labels: &[&str]| {
            HistogramVec::new(HistogramOpts::new(name, help).buckets(ladder()), labels)
        };
        let counter = |name: &str, help: &str, labels: &[&str]| IntCounterVec::new(Opts::new(name, help), labels);
        let gauge = |name: &str, help: &str, labels: &[&str]| IntGaugeVec::new(Opts::new(name, help), labels);
        let metrics = Self {
            convergence: histogram(
                "demae_convergence_seconds",
                "Time from a change in the store to the app being converged",
                &["app"],
            )?,
            first_answer: histogram(
                "demae_first_answer_seconds",
                "Time from a change in the store to the first answer of the new release through nginx",
                &["app"],
            )?,
            wanted: gauge("demae_app_instances_wanted", "Instances wanted on this host", &["app"])?,
            healthy: gauge(
                "demae_app_instances_healthy",
                "Instances that serve on this host and are healthy",
                &["app"],
            )?,
            converged: gauge(
                "demae_app_converged",
                "Whether the app is as it should be on this host (1) or not (0)",
                &["app"],
            )?,
            blocks: gauge("demae_blocks", "Things that a person must end, by kind", &["kind"])?,
            waits: gauge("demae_waits", "Things that end by themselves, by kind", &["kind"])?,
            steps: counter("demae_steps_total", "Steps taken, by kind and outcome", &["kind", "outcome"])?,
            step_failures: counter(
                "demae_step_failures_total",
                "Steps that failed, by kind and the kind of error",
                &["kind", "error"],
            )?,
            step_seconds: histogram("demae_step_seconds", "How long steps take, by kind", &["kind"])?,
            reloads: counter("demae_nginx_reloads_total", "Reloads of nginx, by outcome", &["outcome"])?,
            reload_seconds: histogram(
                "demae_nginx_reload_seconds",
                "Time from a new nginx configuration to a worker that answers with it",
                &[],
            )?,
            drains: counter(
                "demae_drains_total",
                "Instances drained, by whether all requests ended (complete) or time ran out (cut)",
                &["outcome"],
            )?,
            drain_seconds: histogram("demae_drain_seconds", "How long instances take to drain", &[])?,
            sync_age: Gauge::new(
                "demae_store_sync_age_seconds",
                "Seconds since the store was last proven to be as it was read",
            )?,
            revision: IntGauge::new("demae_store_revision", "Revision of the store last read")?,
            store_reads: IntGauge::new("demae_store_reads", "Full reads of the store since the agent started")?,
            store_errors: gauge(
                "demae_store_errors",
                "Errors of the store since the agent started, by kind",
                &["kind"],
            )?,
            lists: IntCounter::new("demae_docker_lists_total", "Full lists of containers")?,
            registry,
        };
        let all: [Box<dyn Collector>; 19] = [
            Box::new(metrics.convergence.clone()),
            Box::new(metrics.first_answer.clone()),
            Box::new(metrics.wanted.clone()),
            Box::new(metrics.healthy.clone()),
            Box::new(metrics.converged.clone()),
            Box::new(metrics.blocks.clone()),
            Box::new(metrics.waits.clone()),
            Box::new(metrics.steps.clone()),
            Box::new(metrics.step_failures.clone()),
            Box::new(metrics.step_seconds.clone()),
            Box::new(metrics.reloads.clone()),
            Box::new(metrics.reload_seconds.clone()),
            Box::new(metrics.drains.clone()),
            Box::new(metrics.drain_seconds.clone()),
            Box::new(metrics.sync_age.clone()),
            Box::new(metrics.revision.clone()),
            Box::new(metrics.store_reads.clone()),
            Box::new(metrics.store_errors.clone()),
            Box::new(metrics.lists.clone()),
        ];
        for collector in all {
            metrics.registry.register(collector)?;
        }
        let build = gauge("demae_build_info", "The version of this agent", &["version"])?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        metrics.registry.register(Box::new(build))?;
        metrics.registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
        // A vector without children prints nothing, and a rate over nothing is not zero.
        for outcome in ["done", "failed"] {
            metrics.reloads.with_label_values(&[outcome]);
            for kind in crate::plan::step::StepKind::ALL {
                metrics.steps.with_label_values(&[kind.as_str(), outcome]);
            }
        }
        for outcome in ["complete", "cut"] {
            metrics.drains.with_label_values(&[outcome]);
        }
        Ok(metrics)
    }

    /// In Prometheus' text format.
    ///
    /// # Errors
    /// If a metric cannot be written as text: a mistake in this file.
    pub fn render(&self) -> Result<Vec<u8>, prometheus::Error> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }

    /// Drops the series of apps that are gone.
    pub fn forget(&self, app: &AppName) {
        for vector in [&self.wanted, &self.healthy, &self.converged] {
            // It may never have had one.
            let _ = vector.remove_label_values(&[app.as_str()]);
        }
        for vector in [&self.convergence, &self.first_answer] {
            let _ = vector.remove_label_values(&[app.as_str()]);
        }
    }

    /// Sets a vector by kind to these counts, and everything else it knows to zero.
    pub fn set_kinds<'k>(vector: &IntGaugeVec, known: &mut BTreeSet<&'k str>, kinds: impl Iterator<Item = &'k str>) {
        let mut counts = std::collections::BTreeMap::<&str, i64>::new();
        for kind in kinds {
            *counts.entry(kind).or_default() += 1;
            known.insert(kind);
        }
        for kind in known.iter() {
            vector.with_label_values(&[kind]).set(counts.get(kind).copied().unwrap_or(0));
        }
    }

    /// The time since the store was proven.
    pub fn set_sync_age(&self, age: Option<Duration>) {
        self.sync_age.set(age.map_or(f64::INFINITY, |a| a.as_secs_f64()));
    }
}
