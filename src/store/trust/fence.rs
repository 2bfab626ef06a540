//! The fence: whether a store's history contains the last write of this agent.
//!
//! After each accepted change of what this host runs, the agent writes a new nonce to `state/fence/<host>` and keeps it
//! in its ledger. The key hangs on no lease. A store that was restored from a backup holds an older nonce however its
//! revisions have grown since, and another store holds none: one comparison, which neither compaction nor a bumped
//! revision can mislead.
//!
//! The nonce is in the ledger before it is in the store (`pending`), and is acknowledged when the write was seen to
//! succeed. A crash between the two leaves a store with the previous nonce; `FenceMatch::Unacknowledged` is that case.

use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

/// How many nonces the key and the ledger hold. A host whose disk was restored finds its own among those of the store as
/// long as fewer changes than these have followed.
const REMEMBERED: usize = 64;
/// The version of the value of the key.
const VERSION: u32 = 1;

/// A random word, written once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Nonce(String);

impl Nonce {
    /// A nonce with this text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

/// The value of `state/fence/<host>`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Fence {
    /// The version of this form.
    #[serde(default)]
    pub version: u32,
    /// The last nonces, the newest last.
    #[serde(default)]
    pub nonces: Vec<Nonce>,
}

/// The nonces that this agent knows of, as the ledger keeps them.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FenceRecord {
    /// Nonces that are in the store, the newest last.
    pub acknowledged: Vec<Nonce>,
    /// Nonces that may be in the store: their write was not seen to succeed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pending: Vec<Nonce>,
}

/// How the fence of a store compares with the record of this agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FenceMatch {
    /// The store holds the newest nonce of this agent.
    Current,
    /// The store holds the nonce from before the pending ones: their write may have been lost in a crash.
    Unacknowledged,
    /// The store has no fence for this host, and had one.
    Missing,
    /// The store holds other nonces: it is an older state of the store, or another one.
    Older,
}

impl FenceRecord {
    /// The record of an agent that takes a store as it is, with the nonces it holds.
    pub fn rebased(found: Option<&Fence>) -> Self {
        Self { acknowledged: found.map(|fence| fence.nonces.clone()).unwrap_or_default(), pending: Vec::new() }
    }

    /// How the fence of a store compares with this record.
    pub fn compare(&self, found: Option<&Fence>) -> FenceMatch {
        let shown = |nonce: &Nonce| found.is_some_and(|fence| fence.nonces.contains(nonce));
        match self.newest() {
            None => FenceMatch::Current,
            Some(newest) if shown(newest) => FenceMatch::Current,
            Some(_) if self.pending.is_empty() && found.is_none() => FenceMatch::Missing,
            Some(_) => match self.acknowledged.last() {
                None if found.is_none() => FenceMatch::Unacknowledged,
                Some(_) if found.is_none() => FenceMatch::Missing,
                // Without a pending write, the last acknowledged nonce is the newest one, and it is not there.
                last if last.is_some_and(shown) || self.pending.iter().any(shown) => FenceMatch::Unacknowledged,
                _ => FenceMatch::Older,
            },
        }
    }

    /// Adds a nonce that is to be written.
    pub fn advance(&mut self, nonce: Nonce) {
        self.pending.push(nonce);
        trim(&mut self.pending);
    }

    /// Takes that the store holds this nonce.
    pub fn acknowledge(&mut self, nonce: &Nonce) {
        if let Some(at) = self.pending.iter().position(|pending| pending == nonce) {
            self.acknowledged.extend(self.pending.drain(..=at));
            trim(&mut self.acknowledged);
        }
    }

    /// The value to write and its newest nonce; `None` if nothing is pending.
    pub fn to_write(&self) -> Option<(Fence, Nonce)> {
        let newest = self.pending.last()?.clone();
        let mut nonces: Vec<Nonce> = self.acknowledged.iter().chain(&self.pending).cloned().collect();
        trim(&mut nonces);
        Some((Fence { version: VERSION, nonces }, newest))
    }

    fn newest(&self) -> Option<&Nonce> {
        self.pending.last().or(self.acknowledged.last())
    }
}

fn trim(nonces: &mut Vec<Nonce>) {
    nonces.drain(..nonces.len().saturating_sub(REMEMBERED));
}

/// The record that the reader of the store, which adds nonces, shares with the publisher, which writes them.
#[derive(Debug, Default)]
pub struct SharedFence {
    record: Mutex<FenceRecord>,
    /// Notified when a nonce is to be written.
    pub(in crate::store) pending: Notify,
}

impl SharedFence {
    /// The record.
    pub fn record(&self) -> FenceRecord {
        self.lock().clone()
    }

    /// Replaces the record, and keeps what was acknowledged meanwhile.
    pub(in crate::store) fn replace(&self, record: FenceRecord) {
        let mut shared = self.lock();
        let acknowledged = shared.acknowledged.last().cloned();
        *shared = record;
        if let Some(nonce) = acknowledged {
            shared.acknowledge(&nonce);
        }
        if !shared.pending.is_empty() {
            self.pending.notify_one();
        }
    }

    /// Takes that the store holds this nonce.
    pub fn acknowledge(&self, nonce: &Nonce) {
        self.lock().acknowledge(nonce);
    }

    fn lock(&self) -> MutexGuard<'_, FenceRecord> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nonces(words: &[&str]) -> Vec<Nonce> {
        words.iter().copied().map(Nonce::new).collect()
    }

    fn record(acknowledged: &[&str], pending: &[&str]) -> FenceRecord {
        FenceRecord { acknowledged: nonces(acknowledged), pending: nonces(pending) }
    }

    #[test]
    fn a_store_is_current_only_with_the_newest_nonce() {
        use FenceMatch::{Current, Missing, Older, Unacknowledged};
        let none: &[&str] = &[];
        for (acknowledged, pending, found, expected) in [
            (none, none, None, Current),
            (none, none, Some(vec!["x"]), Current),
            (&["a", "b"], none, Some(vec!["a", "b"]), Current),
            (&["a", "b"], none, Some(vec!["a", "b", "c"]), Current),
            (&["a", "b"], none, Some(vec!["a"]), Older),
            (&["a", "b"], none, Some(vec!["x"]), Older),
            (&["a", "b"], none, None, Missing),
            (&["a"], &["b"], Some(vec!["a", "b"]), Current),
            (&["a"], &["b"], Some(vec!["a"]), Unacknowledged),
            (&["a"], &["b", "c"], Some(vec!["a", "b"]), Unacknowledged),
            (&["z", "a"], &["b"], Some(vec!["z"]), Older),
            (&["a"], &["b"], None, Missing),
            (none, &["b"], None, Unacknowledged),
            (none, &["b"], Some(vec!["x"]), Older),
        ] {
            let found = found.map(|words| Fence { version: 1, nonces: nonces(&words) });
            let ours = record(acknowledged, pending);
            assert_eq!(ours.compare(found.as_ref()), expected, "{ours:?} beside {found:?}");
        }
    }

    #[test]
    fn a_nonce_is_pending_until_it_is_acknowledged() {
        let mut ours = record(&["a"], &[]);
        assert_eq!(ours.to_write(), None);
        ours.advance(Nonce::new("b"));
        ours.advance(Nonce::new("c"));
        let (value, newest) = ours.to_write().expect("two are pending");
        assert_eq!((value.nonces, newest.clone()), (nonces(&["a", "b", "c"]), Nonce::new("c")));
        ours.acknowledge(&Nonce::new("b"));
        assert_eq!(ours, record(&["a", "b"], &["c"]));
        ours.acknowledge(&Nonce::new("b"));
        ours.acknowledge(&newest);
        assert_eq!(ours, record(&["a", "b", "c"], &[]));
        for n in 0..REMEMBERED + 9 {
            ours.advance(Nonce::new(n.to_string()));
        }
        assert_eq!(ours.to_write().map(|(value, _)| value.nonces.len()), Some(REMEMBERED));
    }

    #[test]
    fn an_acknowledgement_survives_the_next_change() {
        let shared = SharedFence::default();
        let mut ours = record(&["a"], &["b"]);
        shared.replace(ours.clone());
        shared.acknowledge(&Nonce::new("b"));
        ours.advance(Nonce::new("c"));
        shared.replace(ours);
        assert_eq!(shared.record(), record(&["a", "b"], &["c"]));
    }
}
