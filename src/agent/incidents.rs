//! Recent crashes and health failures of an app's instances: an instance that is up may have restarted a hundred times.

use std::{collections::VecDeque, time::Duration};

use crate::model::time::{Timestamp, human};

/// How long an incident counts.
const REMEMBERED: Duration = Duration::from_secs(600);
/// This many within that time are reported.
const MANY: usize = 3;
/// Most incidents kept.
const MOST: usize = 100;

/// Times of incidents, oldest first.
#[derive(Debug, Default)]
pub(super) struct Incidents(VecDeque<Timestamp>);

impl Incidents {
    pub(super) fn push(&mut self, now: Timestamp) {
        self.0.push_back(now);
        if self.0.len() > MOST {
            self.0.pop_front();
        }
    }

    /// Drops incidents outside of the window.
    pub(super) fn age(&mut self, now: Timestamp) {
        while self.0.front().is_some_and(|at| now.since(*at) > REMEMBERED) {
            self.0.pop_front();
        }
    }

    /// A sentence for the status, if there are many.
    pub(super) fn summary(&self) -> Option<String> {
        let count = self.0.len();
        (count >= MANY)
            .then(|| format!("unstable: it ended or became unhealthy {count} times within {}", human(REMEMBERED)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn incidents_are_reported_only_above_threshold_within_window() {
        let at = |seconds: i64| Timestamp::from_millis(seconds * 1000);
        let mut incidents = Incidents::default();
        (0..2).for_each(|n| incidents.push(at(n)));
        assert_eq!(incidents.summary(), None);
        incidents.push(at(2));
        assert!(incidents.summary().is_some_and(|summary| summary.starts_with("unstable")));
        incidents.age(at(602));
        assert_eq!(incidents.summary(), None, "the first two are long past");
    }
}
