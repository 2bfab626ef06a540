//! Counters and histograms of one app.

use std::{
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use super::text::Text;
use crate::model::{change::Change, name::AppName};

/// Upper bounds of the buckets for durations of changes, in seconds, and as text.
const BUCKETS: [(f64, &str); 9] = [
    (0.2, "0.2"),
    (0.5, "0.5"),
    (1.0, "1"),
    (2.0, "2"),
    (5.0, "5"),
    (10.0, "10"),
    (30.0, "30"),
    (60.0, "60"),
    (300.0, "300"),
];

/// A lock-free histogram. A reader may see an observation in its bucket and not yet in the sum; the next scrape has
/// both.
#[derive(Debug, Default)]
struct Histogram {
    /// By bucket, not cumulative; the last one has no bound.
    counts: [AtomicU64; BUCKETS.len() + 1],
    micros: AtomicU64,
}

impl Histogram {
    fn observe(&self, took: Duration) {
        let seconds = took.as_secs_f64();
        let bucket = BUCKETS.iter().position(|(bound, _)| seconds <= *bound).unwrap_or(BUCKETS.len());
        if let Some(count) = self.counts.get(bucket) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        self.micros.fetch_add(u64::try_from(took.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn write(&self, name: &str, app: &str, change: &str, text: &mut Text) {
        let line = |text: &mut Text, part: &str| text.put(&[name, part, "{app=\"", app, "\",change=\"", change, "\""]);
        let mut sum = 0;
        for (count, bound) in self.counts.iter().zip(BUCKETS.iter().map(|(_, bound)| *bound).chain(["+Inf"])) {
            sum += count.load(Ordering::Relaxed);
            line(text, "_bucket");
            text.put(&[",le=\"", bound, "\"} "]);
            text.count(sum);
        }
        line(text, "_sum");
        text.put(&["} "]);
        text.number(Duration::from_micros(self.micros.load(Ordering::Relaxed)).as_secs_f64());
        line(text, "_count");
        text.put(&["} "]);
        text.count(sum);
    }
}

/// What became of a change in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeOutcome {
    /// The app converged.
    Converged,
    /// The release failed.
    Failed,
    /// Another change came before it had answered.
    Superseded,
    /// A person must act before it can go on: it is invalid, paused or cordoned.
    Held,
}

impl ChangeOutcome {
    /// Every outcome.
    pub const ALL: [Self; 4] = [Self::Converged, Self::Failed, Self::Superseded, Self::Held];

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Converged => "converged",
            Self::Failed => "failed",
            Self::Superseded => "superseded",
            Self::Held => "held",
        }
    }
}

/// Counters of changes, by kind and outcome. Those of a kind exist from its first change on.
type Outcomes = [OnceLock<[AtomicU64; ChangeOutcome::ALL.len()]>; Change::ALL.len()];

/// One histogram per kind of change, created by the first change of its kind.
type ByChange = [OnceLock<Histogram>; Change::ALL.len()];

/// Metrics of one app. Owned by the app's state in the loop, and dropped with it.
#[derive(Debug)]
pub struct AppSeries {
    app: AppName,
    convergence: ByChange,
    first_answer: ByChange,
    outcomes: Outcomes,
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
            outcomes: Outcomes::default(),
            restarts: AtomicU64::new(0),
            flaps: AtomicU64::new(0),
        };
        // A rate misses the first value of a series that begins above 0. The common kinds begin at 0; all of them would
        // be many.
        for change in [Change::Image, Change::Environment] {
            histogram(&series.convergence, change);
            histogram(&series.first_answer, change);
            outcomes(&series.outcomes, change);
        }
        series
    }

    /// What became of a change is known.
    pub fn ended(&self, change: Change, outcome: ChangeOutcome) {
        if let Some(count) = outcomes(&self.outcomes, change).get(outcome as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The app converged, this long after a change was seen.
    pub fn converged(&self, change: Change, took: Duration) {
        histogram(&self.convergence, change).observe(took);
    }

    /// A new release answered through nginx, this long after a change was seen.
    pub fn answered(&self, change: Change, took: Duration) {
        histogram(&self.first_answer, change).observe(took);
    }

    /// Containers were restarted.
    pub fn restarted(&self, times: u64) {
        self.restarts.fetch_add(times, Ordering::Relaxed);
    }

    /// An instance in service became unhealthy.
    pub fn flapped(&self) {
        self.flaps.fetch_add(1, Ordering::Relaxed);
    }
}

fn histogram(histograms: &ByChange, change: Change) -> &Histogram {
    // Discriminants follow the order of `ALL`, which a test checks.
    histograms[change as usize].get_or_init(Histogram::default)
}

fn outcomes(all: &Outcomes, change: Change) -> &[AtomicU64; ChangeOutcome::ALL.len()] {
    all[change as usize].get_or_init(Default::default)
}

/// The value of a family for an app.
type Of<T> = fn(&AppSeries) -> &T;

/// Writes the metrics of these apps.
pub(super) fn write(apps: &[&AppSeries], text: &mut Text) {
    let histograms: [(&str, &str, Of<ByChange>); 2] = [
        (
            "demae_convergence_seconds",
            "Time from a change in the store to the app being converged, by kind of change",
            |s| &s.convergence,
        ),
        (
            "demae_first_answer_seconds",
            "Time from a change in the store to the first answer of the new release through nginx, by kind of change",
            |s| &s.first_answer,
        ),
    ];
    for (name, help, of) in histograms {
        text.family(name, "histogram", help);
        for series in apps {
            for (place, change) in of(series).iter().zip(Change::ALL) {
                if let Some(histogram) = place.get() {
                    histogram.write(name, series.app.as_str(), change.as_str(), text);
                }
            }
        }
    }
    let name = "demae_changes_total";
    text.family(name, "counter", "Changes in the store, by kind and by what became of them on this host");
    for series in apps {
        for (place, change) in series.outcomes.iter().zip(Change::ALL) {
            for (count, outcome) in place.get().into_iter().flatten().zip(ChangeOutcome::ALL) {
                let (app, change, outcome) = (series.app.as_str(), change.as_str(), outcome.as_str());
                text.put(&[name, "{app=\"", app, "\",change=\"", change, "\",outcome=\"", outcome, "\"} "]);
                text.count(count.load(Ordering::Relaxed));
            }
        }
    }
    let counters: [(&str, &str, Of<AtomicU64>); 2] = [
        ("demae_container_restarts_total", "Containers in service that had ended and were started again", |s| {
            &s.restarts
        }),
        ("demae_health_flaps_total", "Instances in service that went from healthy to unhealthy", |s| &s.flaps),
    ];
    for (name, help, of) in counters {
        text.family(name, "counter", help);
        for series in apps {
            text.put(&[name, "{app=\"", series.app.as_str(), "\"} "]);
            text.count(of(series).load(Ordering::Relaxed));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn change_discriminants_follow_all() {
        assert!(Change::ALL.iter().enumerate().all(|(n, change)| *change as usize == n));
        assert!(ChangeOutcome::ALL.iter().enumerate().all(|(n, outcome)| *outcome as usize == n));
    }

    #[test]
    fn histogram_buckets_are_cumulative() {
        let histogram = Histogram::default();
        for millis in [100, 200, 201, 299_000, 301_000] {
            histogram.observe(Duration::from_millis(millis));
        }
        let mut text = Text::default();
        histogram.write("x", "web", "image", &mut text);
        let text = text.finish();
        for line in [
            "x_bucket{app=\"web\",change=\"image\",le=\"0.2\"} 2\n",
            "x_bucket{app=\"web\",change=\"image\",le=\"0.5\"} 3\n",
            "x_bucket{app=\"web\",change=\"image\",le=\"60\"} 3\n",
            "x_bucket{app=\"web\",change=\"image\",le=\"300\"} 4\n",
            "x_bucket{app=\"web\",change=\"image\",le=\"+Inf\"} 5\n",
            "x_sum{app=\"web\",change=\"image\"} 600.501\n",
            "x_count{app=\"web\",change=\"image\"} 5\n",
        ] {
            assert!(text.contains(line), "{line} in\n{text}");
        }
    }
}
