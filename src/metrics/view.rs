//! Gauges of the state after the loop's last round.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    app::{self, AppSeries},
    text::Text,
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
    /// The prefix of all keys.
    pub prefix: String,
    /// Whether it takes apps.
    pub mode: HostMode,
    /// The store.
    pub store: StoreView,
    /// Unreadable keys of the store that belong to no app.
    pub unreadable: usize,
    /// nginx workers that finish the requests of an older configuration.
    pub draining_workers: usize,
    /// Its apps.
    pub apps: Vec<AppView>,
}

/// The store, as it was last read.
#[derive(Debug, Clone, Default)]
pub struct StoreView {
    /// When it was last in sync, for an earlier agent too.
    pub synced: Option<Timestamp>,
    /// The same for this agent, by the monotonic clock.
    pub proven: Option<Instant>,
    /// The revision last read.
    pub revision: i64,
    /// Revisions that it has made and that are not known to be read yet.
    pub lag: i64,
    /// The kind of its quarantine.
    pub block: Option<String>,
    /// Full reads so far.
    pub reads: u64,
    /// Comparisons so far that found nothing missing.
    pub resyncs: u64,
    /// Failures so far, by kind.
    pub errors: BTreeMap<&'static str, u64>,
    /// How long publishing has failed.
    pub unpublished: Duration,
}

/// One app.
#[derive(Debug, Clone)]
pub struct AppView {
    /// The app.
    pub app: AppName,
    /// Its state.
    pub state: State,
    /// Number of wanted instances.
    pub wanted: usize,
    /// Running containers, of any release.
    pub running: usize,
    /// Healthy instances that serve.
    pub healthy: usize,
    /// Since when it has not been converged.
    pub unconverged: Option<Timestamp>,
    /// When the release that serves was proven.
    pub proven: Option<Timestamp>,
    /// The wanted release.
    pub wants: Option<ReleaseView>,
    /// The serving release.
    pub serves: Option<ReleaseView>,
    /// Kinds of its blocks.
    pub blocks: Vec<&'static str>,
    /// Kinds of its waits.
    pub waits: Vec<&'static str>,
    /// Connections to draining instances.
    pub draining: usize,
    /// Its counters and histograms.
    pub series: Arc<AppSeries>,
}

/// A release, for the labels of a metric.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReleaseView {
    /// Its id.
    pub release: String,
    /// The version of its image.
    pub version: String,
}

impl View {
    /// An empty view.
    pub fn new(host: HostName, prefix: String) -> Self {
        let (mode, store, apps) = (HostMode::Active, StoreView::default(), Vec::new());
        Self { host, prefix, mode, store, unreadable: 0, draining_workers: 0, apps }
    }

    pub(super) fn write(&self, now: Timestamp, text: &mut Text) {
        self.write_host(now, text);
        self.write_store(now, text);
        self.write_apps(now, text);
        app::write(&self.apps.iter().map(|a| a.series.as_ref()).collect::<Vec<_>>(), text);
        reasons("block", "that an operator must resolve", &Block::KINDS, &self.apps, |a| &a.blocks, text);
        reasons("wait", "that ends by itself", &Wait::KINDS, &self.apps, |a| &a.waits, text);
    }

    #[expect(clippy::cast_precision_loss, reason = "Prometheus knows no other numbers")]
    fn write_host(&self, now: Timestamp, text: &mut Text) {
        text.family("demae_build_info", "gauge", "The version of this agent");
        text.series("demae_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1.0);
        text.family("demae_host_info", "gauge", "This host, and whether it takes apps");
        let labels = [("host", self.host.as_str()), ("prefix", &self.prefix), ("mode", self.mode.as_str())];
        text.series("demae_host_info", &labels, 1.0);
        let oldest = self.apps.iter().filter_map(|a| a.unconverged).min();
        text.single(
            "demae_oldest_change_seconds",
            "gauge",
            "Age of the oldest change that has not converged, except for apps that are paused or cordoned",
            oldest.map_or(0.0, |at| now.since(at).as_secs_f64()),
        );
        text.single(
            "demae_nginx_draining_workers",
            "gauge",
            "nginx workers of an older configuration",
            self.draining_workers as f64,
        );
        text.single(
            "demae_drain_connections",
            "gauge",
            "Connections to draining instances",
            self.apps.iter().map(|a| a.draining).sum::<usize>() as f64,
        );
        text.family("demae_apps", "gauge", "Apps by state");
        for state in State::ALL {
            let count = self.apps.iter().filter(|a| a.state == state).count();
            text.series("demae_apps", &[("state", state.as_str())], count as f64);
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "Prometheus knows no other numbers")]
    fn write_store(&self, now: Timestamp, text: &mut Text) {
        let store = &self.store;
        let proven = store.proven.map(|at| at.elapsed());
        let age = proven.or_else(|| Some(now.since(store.synced?)));
        let age = age.map_or(f64::INFINITY, |age| age.as_secs_f64());
        for (name, kind, help, value) in [
            ("demae_store_sync_age_seconds", "gauge", "Time since the store was last proven to be as it was read", age),
            ("demae_store_revision", "gauge", "Revision of the store last read", store.revision as f64),
            (
                "demae_store_revision_lag",
                "gauge",
                "Revisions that the store has made and that were not proven to be read yet",
                store.lag as f64,
            ),
            ("demae_store_reads_total", "counter", "Full reads of the store", store.reads as f64),
            (
                "demae_store_resyncs_total",
                "counter",
                "Comparisons with the store that found nothing missing",
                store.resyncs as f64,
            ),
            (
                "demae_status_unpublished_seconds",
                "gauge",
                "How long no status could be published to the store",
                store.unpublished.as_secs_f64(),
            ),
            (
                "demae_store_unreadable_keys",
                "gauge",
                "Keys that belong to no app because they cannot be read",
                self.unreadable as f64,
            ),
        ] {
            text.single(name, kind, help, value);
        }
        text.family("demae_store_errors_total", "counter", "Errors of the store, by kind");
        for kind in crate::store::StoreError::KINDS {
            let count = store.errors.get(kind).copied().unwrap_or(0);
            text.series("demae_store_errors_total", &[("kind", kind)], count as f64);
        }
        let help = "Whether the store is not trusted (1) or is (0), by reason; an operator must resolve it";
        text.family("demae_store_blocked", "gauge", help);
        for kind in StoreBlock::KINDS {
            let blocked = store.block.as_deref() == Some(kind);
            text.series("demae_store_blocked", &[("kind", kind)], f64::from(u8::from(blocked)));
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "Prometheus knows no other numbers")]
    fn write_apps(&self, now: Timestamp, text: &mut Text) {
        type Of<'a> = &'a dyn Fn(&AppView) -> Option<f64>;
        let families: [(&str, &str, Of<'_>); 6] = [
            ("demae_app_converged", "Whether the app is converged on this host (1) or not (0)", &|a| {
                Some(f64::from(u8::from(a.state == State::Converged)))
            }),
            ("demae_app_instances_wanted", "Instances wanted on this host", &|a| Some(a.wanted as f64)),
            ("demae_app_instances_running", "Containers that run, of whatever release", &|a| Some(a.running as f64)),
            ("demae_app_instances_healthy", "Instances that serve on this host and are healthy", &|a| {
                Some(a.healthy as f64)
            }),
            (
                "demae_app_unconverged_seconds",
                "Time since the app was last converged; 0 while it is, or while it is paused or cordoned",
                &|a| Some(a.unconverged.map_or(0.0, |at| now.since(at).as_secs_f64())),
            ),
            (
                "demae_app_proven_timestamp_seconds",
                "When the release that serves first answered through nginx on this host",
                &|a| a.proven.map(|at| at.as_millis() as f64 / 1000.0),
            ),
        ];
        for (name, help, of) in families {
            text.family(name, "gauge", help);
            for app in &self.apps {
                if let Some(value) = of(app) {
                    text.series(name, &[("app", app.app.as_str())], value);
                }
            }
        }
        let name = "demae_app_release_info";
        text.family(name, "gauge", "The releases that are wanted and that serve on this host");
        for app in &self.apps {
            for (role, of) in [("wanted", &app.wants), ("serving", &app.serves)] {
                if let Some(of) = of {
                    let labels =
                        [("app", app.app.as_str()), ("role", role), ("release", &of.release), ("version", &of.version)];
                    text.series(name, &labels, 1.0);
                }
            }
        }
    }
}

/// The number of apps with each kind of block or wait, and the apps.
#[expect(clippy::cast_precision_loss, reason = "Prometheus knows no other numbers")]
fn reasons(
    what: &str,
    help: &str,
    kinds: &[&str],
    apps: &[AppView],
    of: impl Fn(&AppView) -> &[&'static str],
    text: &mut Text,
) {
    let (all, one) = (format!("demae_{what}s"), format!("demae_app_{what}"));
    text.family(&all, "gauge", &format!("How many apps have something {help}, by kind"));
    for kind in kinds {
        let count = apps.iter().filter(|a| of(a).contains(kind)).count();
        text.series(&all, &[("kind", kind)], count as f64);
    }
    text.family(&one, "gauge", &format!("1 while the app has something {help}, by kind"));
    for app in apps {
        // Each kind once, for any number of instances.
        for kind in kinds.iter().filter(|kind| of(app).contains(kind)) {
            text.series(&one, &[("app", app.app.as_str()), ("kind", kind)], 1.0);
        }
    }
}
