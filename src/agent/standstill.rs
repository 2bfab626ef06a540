//! Standstills: the agent does not run for a while because its machine was suspended or starved, or the process was
//! stopped. Observations and decisions from before a standstill are stale.

use std::time::Duration;

use tokio::time::Instant;

use super::{Agent, app::AppState};
use crate::{machine::Machine, model::time::Timestamp};

/// A round of the loop begins every 5 s at least. A delay beyond that of this much is a standstill.
const STANDSTILL: Duration = Duration::from_secs(10);
/// Longest time from a decision to the start of its step. Exceeded only if the step waited for a permit, or the agent
/// stood still.
const MAX_DECISION_AGE: Duration = Duration::from_secs(5);
/// Longest wait for a re-read of the store: as long as etcd may take for an answer. Without etcd, the last read has to
/// do.
const REREAD_TIMEOUT: Duration = Duration::from_secs(5);
/// Poll interval for the re-read.
pub(super) const REREAD_POLL: Duration = Duration::from_millis(10);

/// Whether a decision is too old for its step to start.
pub(super) fn is_expired(decided: Timestamp, now: Timestamp) -> bool {
    now.since(decided) > MAX_DECISION_AGE
}

impl<M: Machine> Agent<M> {
    /// Begins a round of the loop.
    pub(super) fn begin_round(&mut self) {
        let now = self.machine.now();
        let since = now.since(std::mem::replace(&mut self.round, now));
        if since > STANDSTILL {
            tracing::warn!("the agent got no time to run for {} s; everything is observed again", since.as_secs());
            self.outlets.metrics.standstill_detected();
            self.invalidate_all();
        }
        self.look_at_policy();
        let read = self.read_attempts();
        self.rereading.take_if(|(until, before)| read > *before || Instant::now() >= *until);
    }

    /// Invalidates everything: nothing is done before store, containers, health and nginx were read again.
    pub(super) fn invalidate_all(&mut self) {
        self.machine.reset_health();
        self.apps.values_mut().for_each(AppState::invalidate);
        self.proxy.fresh.invalidate();
        self.relist = true;
        if self.snapshot.is_some() {
            self.rereading = Some((Instant::now() + REREAD_TIMEOUT, self.read_attempts()));
            self.outlets.resync_requested.notify_one();
        }
    }

    /// Number of full reads of the store, failed ones included.
    fn read_attempts(&self) -> u64 {
        let update = self.updates.borrow();
        update.reads + update.errors.values().sum::<u64>()
    }
}
