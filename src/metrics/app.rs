//! What is counted of one app.

use std::{
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use prometheus::{Histogram, HistogramOpts, core::Collector as _};

use super::{CHANGE_BUCKETS, family::Family};
use crate::model::{change::Change, name::AppName};

/// By kind of change. A histogram is made by the first change of its kind.
type ByChange = [OnceLock<Option<Histogram>>; Change::ALL.len()];

/// What is counted of one app. It belongs to whoever counts, and goes with the app.
#[derive(Debug)]
pub struct AppSeries {
    app: AppName,
    convergence: ByChange,
    first_answer: ByChange,
    restarts: AtomicU64,
    flaps: AtomicU64,
}

impl AppSeries {
    /// Nothing is counted yet.
    pub fn new(app: AppName) -> Self {
        let series = Self {
            app,
            convergence: ByChange::default(),
            first_answer: ByChange::default(),
            restarts: AtomicU64::new(0),
            flaps: AtomicU64::new(0),
        };
        // A rate sees nothing of a series that begins above 0. The common kinds begin at 0; all of them would be many.
        for change in [Change::Image, Change::Environment] {
            series.histogram(&series.convergence, change);
            series.histogram(&series.first_answer, change);
        }
        series
    }

    /// The app is as it should be, so long after a change was seen.
    pub fn converged(&self, change: Change, took: Duration) {
        self.observe(&self.convergence, change, took);
    }

    /// A new release answered through nginx, so long after a change was seen.
    pub fn answered(&self, change: Change, took: Duration) {
        self.observe(&self.first_answer, change, took);
    }

    /// Containers were started again that had ended.
    pub fn restarted(&self, times: u64) {
        self.restarts.fetch_add(times, Ordering::Relaxed);
    }

    /// An instance in service became unhealthy.
    pub fn flapped(&self) {
        self.flaps.fetch_add(1, Ordering::Relaxed);
    }

    fn observe(&self, histograms: &ByChange, change: Change, took: Duration) {
        if let Some(histogram) = self.histogram(histograms, change) {
            histogram.observe(took.as_secs_f64());
        }
    }

    fn histogram<'h>(&self, histograms: &'h ByChange, change: Change) -> Option<&'h Histogram> {
        let place = Change::ALL.iter().position(|c| *c == change).and_then(|n| histograms.get(n));
        place.and_then(|place| {
            place
                .get_or_init(|| {
                    // The name is the family's, which this one is put into; its own is not shown.
                    let opts = HistogramOpts::new("by_change", "by_change").buckets(CHANGE_BUCKETS.to_vec());
                    let opts = opts.const_label("app", self.app.as_str()).const_label("change", change.as_str());
                    Histogram::with_opts(opts).ok()
                })
                .as_ref()
        })
    }

    /// Adds what was counted to the families.
    pub(super) fn collect(&self, families: &mut Families) {
        let app = [("app", self.app.as_str())];
        #[expect(clippy::cast_precision_loss, reason = "Prometheus knows no other numbers")]
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed) as f64;
        families.restarts.add(&app, value(&self.restarts));
        families.flaps.add(&app, value(&self.flaps));
        for (from, to) in
            [(&self.convergence, &mut families.convergence), (&self.first_answer, &mut families.first_answer)]
        {
            for histogram in from.iter().filter_map(|place| place.get()?.as_ref()) {
                to.take(histogram.collect());
            }
        }
    }
}

/// The families that series of apps go into.
pub(super) struct Families {
    pub(super) convergence: Family,
    pub(super) first_answer: Family,
    pub(super) restarts: Family,
    pub(super) flaps: Family,
}

impl Families {
    pub(super) fn new() -> Self {
        Self {
            convergence: Family::histogram(
                "demae_convergence_seconds",
                "Time from a change in the store to the app being converged, by kind of change",
            ),
            first_answer: Family::histogram(
                "demae_first_answer_seconds",
                "Time from a change in the store to the first answer of the new release through nginx, by kind of change",
            ),
            restarts: Family::counter(
                "demae_container_restarts_total",
                "Containers in service that had ended and were started again",
            ),
            flaps: Family::counter(
                "demae_health_flaps_total",
                "Instances in service that went from healthy to unhealthy",
            ),
        }
    }
}
