//! What the reader of the store takes in and gives out: messages of the watch, and updates for the rest of the agent.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;

use super::{contents::Entry, trust::Brake};
use crate::model::{
    desired::Snapshot,
    name::{AppName, HostName},
    status::StoreStatus,
};

/// What the agent knows of the store.
#[derive(Debug, Clone, Default)]
pub struct Update {
    /// The accepted desired state; `None` before the first read.
    pub snapshot: Option<Arc<Snapshot>>,
    /// When its last change arrived.
    pub seen: Option<Instant>,
    /// For status.
    pub status: StoreStatus,
    /// When the store was last found to be as the snapshot says; `None` before the first read. Monotonic: the time in
    /// `status` is of the wall clock, which may be set.
    pub proven: Option<Instant>,
    /// True while the store is the accepted one. Nothing is written to another one.
    pub trusted: bool,
    /// The cluster id of its etcd.
    pub etcd: u64,
    /// The newest revision that the store has reported.
    pub head: i64,
    /// All that was written up to this revision is known.
    pub read_to: i64,
    /// Full reads so far.
    pub reads: u64,
    /// Comparisons with the store so far that found nothing missing.
    pub resyncs: u64,
    /// Failures so far, by kind.
    pub errors: BTreeMap<&'static str, u64>,
}

/// The host that reads the store, and how.
#[derive(Debug, Clone)]
pub struct Viewer {
    /// The host.
    pub host: HostName,
    /// The labels of its own configuration.
    pub labels: BTreeMap<String, String>,
    /// Between two comparisons with the store while the watch works.
    pub resync: Duration,
    /// The limits of a mass removal.
    pub brake: Brake,
    /// Apps that have left traces on this host: what a first read is compared with.
    pub traces: BTreeSet<AppName>,
}

/// One change of the desired range.
#[derive(Debug, Clone)]
pub struct Change {
    /// The key without the prefix; `None` for one that is not below it.
    pub key: Option<Vec<u8>>,
    /// The revision of the change.
    pub revision: i64,
    /// The new entry; `None` if the key was deleted.
    pub value: Option<Entry>,
}

/// One message of the watch.
#[derive(Debug, Clone)]
pub struct News {
    /// What changed, in order.
    pub changes: Vec<Change>,
    /// The revision of the store when it was sent.
    pub head: i64,
    /// etcd's cluster id.
    pub etcd: u64,
    /// True for the message that the watch was opened.
    pub opened: bool,
}

impl News {
    /// True if anything was deleted.
    pub fn deletes(&self) -> bool {
        self.changes.iter().any(|change| change.value.is_none())
    }

    /// Appends the next message.
    pub fn add(&mut self, next: Self) {
        self.changes.extend(next.changes);
        self.head = self.head.max(next.head);
        self.etcd = next.etcd;
        self.opened &= next.opened;
    }
}
