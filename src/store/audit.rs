//! Whether watches have brought all that was written. etcd has lost events of watches more than once, and what a leader or
//! a host has not heard of would hold a rollout up for ever.

use std::{collections::BTreeMap, time::Duration};

use tokio::time::Instant;

use super::{keys::KeyRange, update::Change};
use crate::retry::jittered;

/// Comparisons that differ before events count as lost: they may be under way.
const PROOFS: u32 = 4;
/// Between two of these.
const AGAIN: Duration = Duration::from_secs(1);

/// Keys that were written after a revision, in ranges, as of a later one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// That revision.
    pub revision: i64,
    /// How many keys there are, also those that were written before.
    pub total: i64,
    /// The mod revisions of those that were written since; deleted ones are not among them.
    pub keys: BTreeMap<Vec<u8>, i64>,
}

/// Compares, now and then, what watches have brought with what was written.
pub struct Audit {
    ranges: Vec<KeyRange>,
    every: Duration,
    account: Account,
    differing: u32,
    /// When the next comparison is due.
    pub due: Instant,
}

impl Audit {
    /// Of watches of these ranges that begin after a revision, at which there were so many keys.
    pub fn new(ranges: &[KeyRange], revision: i64, keys: usize, every: Duration) -> Self {
        let total = i64::try_from(keys).unwrap_or(i64::MAX);
        Self {
            ranges: ranges.to_vec(),
            every,
            account: Account { revision, total, events: Vec::new() },
            differing: 0,
            due: Instant::now() + jittered(every),
        }
    }

    /// What is watched.
    pub(super) fn ranges(&self) -> &[KeyRange] {
        &self.ranges
    }

    /// As of which revision the last comparison was.
    pub(super) fn since(&self) -> i64 {
        self.account.revision
    }

    /// Takes what a watch has brought.
    pub fn take(&mut self, changes: &[Change]) {
        self.account.events.extend(changes.iter().filter_map(Event::of));
    }

    /// Compares. Returns false if events are lost.
    pub(super) fn settle(&mut self, written: &Written) -> bool {
        self.differing = if self.account.settle(written) { 0 } else { self.differing + 1 };
        self.due = Instant::now() + if self.differing == 0 { jittered(self.every) } else { AGAIN };
        self.differing < PROOFS
    }
}

/// What watches have brought since the last comparison.
#[derive(Debug)]
struct Account {
    /// As of which that comparison was.
    revision: i64,
    /// How many keys there were then.
    total: i64,
    events: Vec<Event>,
}

#[derive(Debug)]
struct Event {
    key: Vec<u8>,
    revision: i64,
    /// How many keys there are more since.
    more: i64,
}

impl Event {
    fn of(change: &Change) -> Option<Self> {
        let more = match &change.value {
            Some(entry) => i64::from(entry.created() == entry.modified()),
            None => -1,
        };
        Some(Self { key: change.key.clone()?, revision: change.revision, more })
    }
}

impl Account {
    /// Whether the events lead to what is there. If so, the next comparison goes on from there.
    fn settle(&mut self, written: &Written) -> bool {
        let is_before = |event: &&Event| event.revision <= written.revision;
        let total = self.total + self.events.iter().filter(is_before).map(|event| event.more).sum::<i64>();
        let mut newest: BTreeMap<&[u8], i64> = BTreeMap::new();
        for event in self.events.iter().filter(is_before) {
            let known = newest.entry(&event.key).or_default();
            *known = (*known).max(event.revision);
        }
        let is_known = |(key, revision): (&Vec<u8>, &i64)| newest.get(key.as_slice()) == Some(revision);
        if total != written.total || !written.keys.iter().all(is_known) {
            return false;
        }
        (self.revision, self.total) = (written.revision, total);
        self.events.retain(|event| event.revision > written.revision);
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::store::contents::Entry;

    /// The create and mod revisions of keys.
    type Keys = BTreeMap<Vec<u8>, (i64, i64)>;

    /// Keys after these writes, and the changes that led there.
    fn played(writes: &[(u8, bool)]) -> (Keys, Vec<Change>) {
        let (mut keys, mut changes) = (Keys::new(), Vec::new());
        for ((key, is_put), revision) in writes.iter().zip(1_i64..) {
            let key = vec![*key];
            if *is_put {
                let (created, _) = *keys.entry(key.clone()).or_insert((revision, 0));
                keys.insert(key.clone(), (created, revision));
                let value = Some(Entry::new(Vec::new(), created, revision));
                changes.push(Change { key: Some(key), revision, value });
            } else if keys.remove(&key).is_some() {
                changes.push(Change { key: Some(key), revision, value: None });
            }
        }
        (keys, changes)
    }

    fn written(keys: &Keys, since: i64, revision: i64) -> Written {
        let later = keys.iter().filter(|(_, (_, modified))| *modified > since);
        let keys_since = later.map(|(key, (_, modified))| (key.clone(), *modified)).collect();
        Written { revision, total: i64::try_from(keys.len()).expect("few"), keys: keys_since }
    }

    proptest! {
        #[test]
        fn events_that_change_what_is_there_are_missed(
            writes in prop::collection::vec((0..4u8, any::<bool>()), 1..30),
            looks in prop::collection::vec(0..30usize, 0..4),
            lost in 0..30usize,
            ahead in 0..3usize,
        ) {
            let new = || Account { revision: 0, total: 0, events: Vec::new() };
            // With all events every look finds them, also if the watch is ahead of the look.
            let mut account = new();
            let mut looks: Vec<usize> = looks.into_iter().map(|at| at.min(writes.len())).collect();
            looks.sort_unstable();
            let mut taken = 0;
            let (_, all) = played(&writes);
            for at in looks {
                let revision = i64::try_from(at).expect("few");
                let until = revision + i64::try_from(ahead).expect("few");
                let brought: Vec<&Change> = all.iter().filter(|c| c.revision > taken && c.revision <= until).collect();
                account.events.extend(brought.into_iter().filter_map(Event::of));
                taken = taken.max(until);
                let (keys, _) = played(&writes[..at]);
                prop_assert!(account.settle(&written(&keys, account.revision, revision)));
            }
            // Without one of them the last look differs, unless a later event has made up for it.
            let (keys, all) = played(&writes);
            prop_assume!(!all.is_empty());
            let lost = &all[lost % all.len()];
            let is_last = all.iter().filter(|c| c.key == lost.key).all(|c| c.revision <= lost.revision);
            let mut account = new();
            account.events.extend(all.iter().filter(|c| c.revision != lost.revision).filter_map(Event::of));
            let revision = i64::try_from(writes.len()).expect("few");
            let is_settled = account.settle(&written(&keys, 0, revision));
            prop_assert!(!(is_last && is_settled), "{lost:?} is not missed");
        }
    }
}
