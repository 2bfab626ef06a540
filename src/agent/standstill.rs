//! The agent gets no time for a while: its machine is suspended or starved, or somebody stops it. The world goes on, and what
//! was seen and decided before is worth nothing afterwards.

use std::time::Duration;

use tokio::time::Instant;

use super::{Agent, app::AppState};
use crate::{machine::Machine, model::time::Timestamp};

/// A round of the loop begins every 5 s at least. One that comes so much later means that the agent stood still.
const STANDSTILL: Duration = Duration::from_secs(10);
/// Longest time from a decision to the beginning of its step. It is longer only if the step had to wait for its turn, or the
/// agent stood still.
const LATEST_BEGIN: Duration = Duration::from_secs(5);
/// Longest wait for the store to be read again: as long as etcd may take for an answer. Without etcd, what was last read has
/// to do.
const REREAD: Duration = Duration::from_secs(5);
/// How often it is looked whether it was.
pub(super) const REREAD_LOOK: Duration = Duration::from_millis(10);

/// Whether a step is not to be begun any more.
pub(super) fn is_late(decided: Timestamp, now: Timestamp) -> bool {
    now.since(decided) > LATEST_BEGIN
}

impl<M: Machine> Agent<M> {
    /// Begins a round of the loop.
    pub(super) fn begin_round(&mut self) {
        let now = self.machine.now();
        let since = now.since(std::mem::replace(&mut self.round, now));
        if since > STANDSTILL {
            tracing::warn!("the agent got no time to run for {} s; everything is looked at again", since.as_secs());
            self.outlets.metrics.stood_still();
            self.look_anew();
        }
        let read = self.read_or_tried();
        self.rereading.take_if(|(until, before)| read > *before || Instant::now() >= *until);
    }

    /// Nothing is done before store, containers, instances and nginx were asked again.
    pub(super) fn look_anew(&mut self) {
        self.machine.forget_health();
        self.apps.values_mut().for_each(AppState::look_anew);
        self.proxy.stale = true;
        self.proxy.outdated = self.proxy.observing;
        self.proxy.dirty = true;
        self.relist = true;
        if self.snapshot.is_some() {
            self.rereading = Some((Instant::now() + REREAD, self.read_or_tried()));
            self.outlets.doubted.notify_one();
        }
    }

    /// How often the store was read in full, or could not be.
    fn read_or_tried(&self) -> u64 {
        let update = self.updates.borrow();
        update.reads + update.errors.values().sum::<u64>()
    }
}
