//! Drains: while an app waits for nothing else, its connections are counted without observing all of it.

use std::time::Duration;

use super::app::AppState;
use crate::{
    model::{name::ContainerId, time::Timestamp},
    plan::wait::Wait,
};

/// Shortest and longest interval between two counts of connections.
const MIN_COUNT_PAUSE: Duration = Duration::from_millis(15);
const MAX_COUNT_PAUSE: Duration = Duration::from_millis(500);

impl AppState {
    /// The instances whose connections are to be counted, if the plan waits for nothing else: an observation of the whole
    /// app costs Docker a list and an inspection of each instance.
    pub(super) fn drains(&self, now: Timestamp) -> Option<Vec<ContainerId>> {
        let plan = self.planned.as_ref().filter(|plan| plan.step.is_none() && self.fresh.is_rested())?;
        let observed = self.observed.as_ref()?;
        let is_draining = |wait: &Wait| match wait {
            Wait::Drain { key, connections: Some(_), until, .. } if now < *until => {
                observed.instances.iter().find(|i| i.key == *key).map(|i| i.id.clone())
            }
            _ => None,
        };
        let ids: Option<Vec<ContainerId>> = plan.waits.iter().map(is_draining).collect();
        ids.filter(|ids| !ids.is_empty() && self.busy.is_none())
    }

    /// Takes a count. Returns false if the app is to be observed: a drain is over, or has begun anew, or the plan is not
    /// the one that waited.
    pub(super) fn on_counted(&mut self, counts: &[(ContainerId, Option<usize>)], now: Timestamp) -> bool {
        let Some(ids) = self.drains(now) else { return false };
        let (Some(observed), Some(plan)) = (&mut self.observed, &mut self.planned) else { return false };
        let mut next = now.plus(MAX_COUNT_PAUSE);
        let since = *self.counting_since.get_or_insert(now);
        for id in ids {
            let count = counts.iter().find(|(counted, _)| *counted == id).and_then(|(_, count)| *count);
            let instance = observed.instances.iter_mut().find(|i| i.id == id);
            let (Some(count), Some(instance)) = (count, instance) else { return false };
            if instance.connections.is_none_or(|before| (before == 0) != (count == 0)) {
                return false;
            }
            instance.connections = Some(count);
            if count == 0 {
                instance.idle_at = Some(now);
            }
            for wait in &mut plan.waits {
                if let Wait::Drain { key, connections, until, .. } = wait
                    && *key == instance.key
                {
                    (*connections, next) = (Some(count), next.min(*until));
                }
            }
        }
        // Often at first, rarely later: most drains take milliseconds.
        let pause = (now.since(since) / 10).clamp(MIN_COUNT_PAUSE, MAX_COUNT_PAUSE);
        self.wake = Some(next.min(now.plus(pause)));
        true
    }
}
