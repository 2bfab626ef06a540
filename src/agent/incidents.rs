//! How often the instances of an app ended or fell ill by themselves lately: one that is up may be so for the hundredth time.

use std::{collections::VecDeque, time::Duration};

use crate::model::time::{Timestamp, humane};

/// How long one is remembered.
const REMEMBERED: Duration = Duration::from_secs(600);
/// So many within that time are reported.
const MANY: usize = 3;
/// Most that are kept.
const MOST: usize = 100;

/// When it happened, the last one last.
#[derive(Debug, Default)]
pub(super) struct Incidents(VecDeque<Timestamp>);

impl Incidents {
    pub(super) fn push(&mut self, now: Timestamp) {
        self.0.push_back(now);
        if self.0.len() > MOST {
            self.0.pop_front();
        }
    }

    /// Forgets what is long past.
    pub(super) fn age(&mut self, now: Timestamp) {
        while self.0.front().is_some_and(|at| now.since(*at) > REMEMBERED) {
            self.0.pop_front();
        }
    }

    /// What status says of them, if they are many.
    pub(super) fn told(&self) -> Option<String> {
        let count = self.0.len();
        (count >= MANY)
            .then(|| format!("unstable: it ended or became unhealthy {count} times within {}", humane(REMEMBERED)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_many_incidents_within_the_window_are_reported() {
        let at = |seconds: i64| Timestamp::from_millis(seconds * 1000);
        let mut incidents = Incidents::default();
        (0..2).for_each(|n| incidents.push(at(n)));
        assert_eq!(incidents.told(), None);
        incidents.push(at(2));
        assert!(incidents.told().is_some_and(|told| told.starts_with("unstable")));
        incidents.age(at(602));
        assert_eq!(incidents.told(), None, "the first two are long past");
    }
}
