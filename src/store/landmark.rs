//! How a store is known again after it was out of sight.
//!
//! etcd keeps what a key said at each revision until that revision is compacted. So the newest thing that was read of a
//! store is a question only that store can answer: what did this key say at this revision? One that was restored from a
//! backup of before has written something else at it, or nothing, however far it has counted on since.
//!
//! `etcdutl snapshot restore --bump-revision --mark-compacted` takes that answer away. It leaves a leap in the revision
//! behind that nobody can have written.

use std::time::Duration;

use etcd_client::{Error, GetOptions};

use super::{
    client::{Connection, StoreError},
    keys::Prefix,
    read::Contents,
};

/// gRPC's `OUT_OF_RANGE`, with which etcd answers for a revision that is compacted or not there yet.
/// <https://grpc.io/docs/guides/status-codes/>
const OUT_OF_RANGE: i32 = 11;

/// More revisions than any etcd makes in a second: twice the 50,104 of its own benchmark.
/// <https://etcd.io/docs/v3.5/op-guide/performance/>
const FASTEST: u64 = 100_000;
/// What clocks and long calls may be off by.
const SLACK: Duration = Duration::from_secs(600);

/// A key, a revision that wrote it, and how far the store was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Landmark {
    /// Without the prefix.
    pub key: Vec<u8>,
    /// The revision.
    pub revision: i64,
    /// The highest revision that was seen of the store.
    pub head: i64,
    /// How long ago that was.
    pub age: Duration,
}

impl Landmark {
    /// The newest of what is known of a store: whatever a backup does not have, it does not have this.
    pub fn newest(known: &Contents, head: i64, age: Duration) -> Option<Self> {
        let (key, entry) = known.entries.iter().max_by_key(|(_, entry)| entry.modified())?;
        Some(Self { key: key.clone(), revision: entry.modified(), head, age })
    }

    /// Whether a read shows it as it was, so that nobody needs to ask.
    pub fn is_in(&self, contents: &Contents) -> bool {
        contents.entries.get(&self.key).is_some_and(|entry| entry.modified() == self.revision)
    }

    /// Whether a store has come further than it can have by itself.
    pub fn is_leapt_over(&self, revision: i64) -> bool {
        let most = FASTEST.saturating_mul((self.age + SLACK).as_secs());
        u64::try_from(revision.saturating_sub(self.head)).is_ok_and(|leap| leap > most)
    }

    /// Whether a store that is at a revision has no such thing in its history. One that has compacted it cannot tell, and
    /// is only said to be another one if it has leapt.
    ///
    /// # Errors
    /// If the call fails.
    pub(super) async fn is_unknown_to(
        &self,
        connection: &Connection,
        prefix: &Prefix,
        revision: i64,
    ) -> Result<bool, StoreError> {
        let key = [prefix.key("").as_bytes(), &self.key].concat();
        let then = GetOptions::new().with_revision(self.revision).with_keys_only();
        match connection.client.kv_client().get(key, Some(then)).await {
            Ok(answer) => Ok(answer.kvs().first().is_none_or(|kv| kv.mod_revision() != self.revision)),
            Err(Error::GRpcStatus(status)) if status.code() as i32 == OUT_OF_RANGE => Ok(self.is_leapt_over(revision)),
            Err(e) => Err(connection.failed("looking for what was read before")(e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leap_is_what_nobody_can_have_written() {
        let at = |age: u64| {
            let age = Duration::from_secs(age);
            Landmark { key: b"apps/web/spec".to_vec(), revision: 7, head: 100, age }
        };
        // etcd's documentation bumps by a billion.
        assert!(at(0).is_leapt_over(1_000_000_100) && at(3600).is_leapt_over(1_000_000_100));
        assert!(!at(86_400).is_leapt_over(1_000_000_100), "in a day it may have been written");
        assert!(!at(0).is_leapt_over(50_000_000) && !at(0).is_leapt_over(100) && !at(0).is_leapt_over(3));
        assert!(!at(u64::MAX / 2).is_leapt_over(i64::MAX));
    }
}
