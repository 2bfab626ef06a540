//! How a store is known again after it was out of sight.
//!
//! etcd keeps what a key said at each revision until that revision is compacted. So the newest thing that was read of a
//! store is a question only that store can answer: what did this key say at this revision? One that was restored from a
//! backup of before has written something else at it, or nothing, however far it has counted on since.

use etcd_client::{Error, GetOptions};

use super::{
    client::{Connection, StoreError},
    keys::Prefix,
    read::Contents,
};

/// gRPC's `OUT_OF_RANGE`, with which etcd answers for a revision that is compacted or not there yet.
/// <https://grpc.io/docs/guides/status-codes/>
const OUT_OF_RANGE: i32 = 11;

/// A key, and a revision that wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Landmark {
    /// Without the prefix.
    pub key: Vec<u8>,
    /// The revision.
    pub revision: i64,
}

impl Landmark {
    /// The newest of what is known of a store: whatever a backup does not have, it does not have this.
    pub fn newest(known: &Contents) -> Option<Self> {
        let (key, entry) = known.entries.iter().max_by_key(|(_, entry)| entry.modified())?;
        Some(Self { key: key.clone(), revision: entry.modified() })
    }

    /// Whether a read shows it as it was, so that nobody needs to ask.
    pub fn is_in(&self, contents: &Contents) -> bool {
        contents.entries.get(&self.key).is_some_and(|entry| entry.modified() == self.revision)
    }

    /// Whether a store has no such thing in its history. One that has compacted that revision cannot tell, and is not
    /// said to be another one.
    ///
    /// # Errors
    /// If the call fails.
    pub(super) async fn is_unknown_to(&self, connection: &Connection, prefix: &Prefix) -> Result<bool, StoreError> {
        let key = [prefix.key("").as_bytes(), &self.key].concat();
        let then = GetOptions::new().with_revision(self.revision).with_keys_only();
        match connection.client.kv_client().get(key, Some(then)).await {
            Ok(answer) => Ok(answer.kvs().first().is_none_or(|kv| kv.mod_revision() != self.revision)),
            Err(Error::GRpcStatus(status)) if status.code() as i32 == OUT_OF_RANGE => Ok(false),
            Err(e) => Err(connection.failed("looking for what was read before")(e)),
        }
    }
}
