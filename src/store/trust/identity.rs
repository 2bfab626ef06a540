//! Which store it is: the cluster key, etcd's cluster id, the revision, the release key.

use serde::{Deserialize, Serialize};

use super::{OTHER_STORE, block};
use crate::model::status::StoreBlock;

/// What tells one store from another, and a store from an earlier state of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Identity {
    /// The value of `cluster`; `None` if `demae init` was never run.
    pub cluster: Option<String>,
    /// etcd's own cluster id.
    pub etcd: u64,
    /// The highest revision seen.
    pub revision: i64,
    /// The fingerprint of the key that release ids are made with; `None` if the store has none.
    #[serde(default)]
    pub key: Option<String>,
}

impl Identity {
    /// True if `found` is the same cluster at this revision or later.
    pub(in crate::store) fn is_earlier_than(&self, found: &Self) -> bool {
        (&self.cluster, self.etcd) == (&found.cluster, found.etcd) && self.revision <= found.revision
    }

    /// Why a store with the identity `found` cannot be the accepted one, if it cannot.
    pub(super) fn contradicts(&self, found: &Self) -> Option<StoreBlock> {
        match (&self.cluster, &found.cluster) {
            (Some(known), None) => {
                let message = format!(
                    "the store has no `cluster` key, and had one that said `{known}`: it was wiped, or is another one"
                );
                return Some(block("sentinel_missing", message));
            }
            (Some(known), Some(found)) if known != found => {
                let message = format!(
                    "the store's `cluster` key says `{found}`, and said `{known}` before: this is another store"
                );
                return Some(block(OTHER_STORE, message));
            }
            _ => {}
        }
        if self.etcd != found.etcd {
            let message = format!(
                "etcd's cluster id is {:x}, and was {:x} before: this is another etcd, or one that was restored",
                found.etcd, self.etcd
            );
            return Some(block(OTHER_STORE, message));
        }
        if let (Some(known), Some(found)) = (&self.key, &found.key)
            && known != found
        {
            let message =
                "the store's `secret/release-key` is another one: every container would be replaced".to_owned();
            let remedy = "if a new host made it in a store that had been wiped: stop the agent there and delete the key, and an agent from before puts its own back; else `demae store accept`".to_owned();
            return Some(StoreBlock { remedy, ..block(OTHER_STORE, message) });
        }
        if found.revision < self.revision {
            let message = format!(
                "the store is at revision {}, and was at {} before: it was restored from a backup",
                found.revision, self.revision
            );
            return Some(block("older_revision", message));
        }
        None
    }
}
