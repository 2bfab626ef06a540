//! What the loop last saw, as gauges.

use std::{collections::BTreeMap, sync::Arc};

use prometheus::proto::MetricFamily;

use super::{
    app::{AppSeries, Families},
    family::Family,
};
use crate::{
    model::{
        desired::HostMode,
        name::{AppName, HostName},
        status::{State, StoreBlock},
        time::Timestamp,
    },
    plan::wait::{Block, Wait},
};

/// One host, as it was after the loop's last round.
#[derive(Debug, Clone)]
pub struct View {
    /// The host.
    pub host: HostName,
    /// What all keys begin with.
    pub prefix: String,
    /// Whether it takes apps.
    pub mode: HostMode,
    /// The store.
    pub store: StoreView,
    /// Keys of the store that belong to no app because they cannot be read.
    pub unreadable: usize,
    /// nginx workers that finish the requests of an older configuration.
    pub draining_workers: usize,
    /// Its apps.
    pub apps: Vec<AppView>,
}

/// The store, as it was last read.
#[derive(Debug, Clone, Default)]
pub struct StoreView {
    /// When it was last proven to be as it was read.
    pub synced: Option<Timestamp>,
    /// The revision last read.
    pub revision: i64,
    /// Revisions that it has made and that were not proven to be read yet.
    pub lag: i64,
    /// The kind of what keeps it from being believed.
    pub block: Option<String>,
    /// Full reads so far.
    pub reads: u64,
    /// Failures so far, by kind.
    pub errors: BTreeMap<&'static str, u64>,
}

/// One app.
#[derive(Debug, Clone)]
pub struct AppView {
    /// The app.
    pub app: AppName,
    /// In one word.
    pub state: State,
    /// Instances that are wanted.
    pub wanted: usize,
    /// Containers that run, of whatever release.
    pub running: usize,
    /// Instances that serve and are healthy.
    pub healthy: usize,
    /// Since when it is not as it should be.
    pub unconverged: Option<Timestamp>,
    /// When the release that serves was proven.
    pub proven: Option<Timestamp>,
    /// The release that is wanted.
    pub wants: Option<ReleaseView>,
    /// The release that serves.
    pub serves: Option<ReleaseView>,
    /// Kinds of what a person must end.
    pub blocks: Vec<&'static str>,
    /// Kinds of what ends by itself.
    pub waits: Vec<&'static str>,
    /// Connections to instances that are leaving.
    pub draining: usize,
    /// What was counted of it.
    pub series: Arc<AppSeries>,
}

/// A release, as people know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReleaseView {
    /// Its id.
    pub release: String,
    /// The version of its image.
    pub version: String,
}

impl View {
    /// Nothing was seen yet.
    pub fn new(host: HostName, prefix: String) -> Self {
        let (mode, store, apps) = (HostMode::Active, StoreView::default(), Vec::new());
        Self { host, prefix, mode, store, unreadable: 0, draining_workers: 0, apps }
    }

    pub(super) fn families(&self, now: Timestamp) -> Vec<MetricFamily> {
        let mut families = self.of_host(now);
        families.extend(self.of_apps(now));
        families.extend(self.of_reasons());
        families
    }

    #[expect(clippy::cast_precision_loss, reason = "Prometheus knows no other numbers")]
    fn of_host(&self, now: Timestamp) -> Vec<MetricFamily> {
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        let host = [("host", self.host.as_str()), ("prefix", &self.prefix), ("mode", self.mode.as_str())];
        let age = self.store.synced.map_or(f64::INFINITY, |at| now.since(at).as_secs_f64());
        let oldest = self.apps.iter().filter_map(|a| a.unconverged).min();
        let mut errors = Family::counter("demae_store_errors_total", "Errors of the store, by kind");
        for kind in crate::store::StoreError::KINDS {
            errors.add(&[("kind", kind)], self.store.errors.get(kind).copied().unwrap_or(0) as f64);
        }
        let mut blocked = Family::gauge(
            "demae_store_blocked",
            "Whether the store is not believed (1) or is (0), by kind; a person must end it",
        );
        for kind in StoreBlock::KINDS {
            blocked.add(&[("kind", kind)], f64::from(u8::from(self.store.block.as_deref() == Some(kind))));
        }
        let gauge = |name: &str, help: &str, value: f64| Family::gauge(name, help).with(&[], value).done();
        vec![
            Family::gauge("demae_build_info", "The version of this agent").with(&version, 1.0).done(),
            Family::gauge("demae_host_info", "This host, and whether it takes apps").with(&host, 1.0).done(),
            gauge(
                "demae_oldest_change_seconds",
                "Age of the oldest change that has not converged, but for apps that people hold back",
                oldest.map_or(0.0, |at| now.since(at).as_secs_f64()),
            ),
            gauge(
                "demae_nginx_draining_workers",
                "nginx workers of an older configuration",
                self.draining_workers as f64,
            ),
            gauge("demae_store_sync_age_seconds", "Time since the store was last proven to be as it was read", age),
            gauge("demae_store_revision", "Revision of the store last read", self.store.revision as f64),
            gauge(
                "demae_store_revision_lag",
                "Revisions that the store has made and that were not proven to be read yet",
                self.store.lag as f64,
            ),
            Family::counter("demae_store_reads_total", "Full reads of the store")
                .with(&[], self.store.reads as f64)
                .done(),
            errors.done(),
            gauge(
                "demae_store_unreadable_keys",
                "Keys that belong to no app because they cannot be read",
                self.unreadable as f64,
            ),
            blocked.done(),
        ]
    }

    #[expect(clippy::cast_precision_loss, reason = "Prometheus knows no other numbers")]
    fn of_apps(&self, now: Timestamp) -> Vec<MetricFamily> {
        let mut converged =
            Family::gauge("demae_app_converged", "Whether the app is as it should be on this host (1) or not (0)");
        let mut wanted = Family::gauge("demae_app_instances_wanted", "Instances wanted on this host");
        let mut running = Family::gauge("demae_app_instances_running", "Containers that run, of whatever release");
        let mut healthy =
            Family::gauge("demae_app_instances_healthy", "Instances that serve on this host and are healthy");
        let mut since = Family::gauge(
            "demae_app_unconverged_seconds",
            "Time since the app is not as it should be; 0 while it is, or while people hold it back",
        );
        let mut proven = Family::gauge(
            "demae_app_proven_timestamp_seconds",
            "When the release that serves first answered through nginx on this host",
        );
        let mut release =
            Family::gauge("demae_app_release_info", "The releases that are wanted and that serve on this host");
        let mut draining = 0;
        let mut counted = Families::new();
        for app in &self.apps {
            let label = [("app", app.app.as_str())];
            converged.add(&label, f64::from(u8::from(app.state == State::Converged)));
            wanted.add(&label, app.wanted as f64);
            running.add(&label, app.running as f64);
            healthy.add(&label, app.healthy as f64);
            since.add(&label, app.unconverged.map_or(0.0, |at| now.since(at).as_secs_f64()));
            if let Some(at) = app.proven {
                proven.add(&label, at.as_millis() as f64 / 1000.0);
            }
            for (role, of) in [("wanted", &app.wants), ("serving", &app.serves)] {
                if let Some(of) = of {
                    let name = app.app.as_str();
                    let labels = [("app", name), ("role", role), ("release", &of.release), ("version", &of.version)];
                    release.add(&labels, 1.0);
                }
            }
            draining += app.draining;
            app.series.collect(&mut counted);
        }
        let draining = Family::gauge("demae_drain_connections", "Connections to instances that are leaving")
            .with(&[], draining as f64);
        let counted = [counted.convergence, counted.first_answer, counted.restarts, counted.flaps];
        [converged, wanted, running, healthy, since, proven, release, draining]
            .into_iter()
            .chain(counted)
            .map(Family::done)
            .collect()
    }

    /// By state, and why not: how many, and which.
    #[expect(clippy::cast_precision_loss, reason = "Prometheus knows no other numbers")]
    fn of_reasons(&self) -> Vec<MetricFamily> {
        let mut states = Family::gauge("demae_apps", "Apps by state");
        for state in State::ALL {
            let count = self.apps.iter().filter(|a| a.state == state).count();
            states.add(&[("state", state.as_str())], count as f64);
        }
        let [blocks, block] = reasons("block", "that a person must end", &Block::KINDS, &self.apps, |a| &a.blocks);
        let [waits, wait] = reasons("wait", "that ends by itself", &Wait::KINDS, &self.apps, |a| &a.waits);
        vec![states.done(), blocks, block, waits, wait]
    }
}

/// How many apps have a reason of each kind not to be converged, and which.
#[expect(clippy::cast_precision_loss, reason = "Prometheus knows no other numbers")]
fn reasons(
    name: &str,
    what: &str,
    kinds: &[&str],
    apps: &[AppView],
    of: impl Fn(&AppView) -> &[&'static str],
) -> [MetricFamily; 2] {
    let mut counts = Family::gauge(&format!("demae_{name}s"), &format!("How many apps have something {what}, by kind"));
    for kind in kinds {
        let count = apps.iter().filter(|a| of(a).contains(kind)).count();
        counts.add(&[("kind", kind)], count as f64);
    }
    let mut each =
        Family::gauge(&format!("demae_app_{name}"), &format!("1 while the app has something {what}, by kind"));
    for app in apps {
        let mut known = of(app).to_vec();
        known.sort_unstable();
        known.dedup();
        for kind in known {
            each.add(&[("app", app.app.as_str()), ("kind", kind)], 1.0);
        }
    }
    [counts.done(), each.done()]
}
