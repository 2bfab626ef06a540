//! The claim of a host's name: one agent holds it at a time, as long as its lease lasts.
//!
//! Two machines with one name would each start every app of that host, and on one engine take each other's containers for
//! their own. So an agent applies a store only while it holds its name there. The agent has a random id in its state
//! directory, and each of its runs another one: a new run takes over the name of a killed one at once.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use etcd_client::{Compare, CompareOp, PutOptions, Txn, TxnOp};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use super::{
    client::{Connection, EtcdConfig, StoreError},
    keys::Prefix,
    lease::{TTL, seconds},
    random_id,
};
use crate::model::{
    desired::HostMode,
    fleet::Capacity,
    name::HostName,
    status::{NAME_TAKEN, StoreBlock},
};

/// The holder of a name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// The id of the agent, the same in all of its runs.
    pub id: String,
    /// The id of this run.
    pub run: String,
}

/// What `state/hosts/<host>` says.
///
/// It is read back for its owner, whatever version wrote it: all other fields may be missing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostInfo {
    /// The version of this form.
    #[serde(default)]
    pub version: u32,
    /// The host.
    pub host: HostName,
    /// The holder of this name; `None` from a version that did not write it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<Owner>,
    /// Its labels, merged.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Whether it takes apps.
    #[serde(default)]
    pub mode: HostMode,
    /// The version of the agent.
    #[serde(default)]
    pub agent: String,
    /// What this agent understands beyond the first version.
    #[serde(default)]
    pub features: Vec<String>,
    /// The address from which it reaches etcd; `None` if that is on this machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// Its machine, if Docker answered when the agent started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity: Option<Capacity>,
}

/// The claim of one run of an agent.
#[derive(Debug)]
pub struct Claim {
    host: HostName,
    owner: Owner,
    /// Notified when the store is to be read in full at once.
    pub(super) resync_requested: Arc<Notify>,
    /// True once this run has held the name. Another run with our id is then no earlier run of ours, but a copy.
    held: AtomicBool,
}

/// The holder by the key of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holder {
    /// The name is free.
    None,
    /// This agent, or one of a version that does not write its id.
    Us,
    /// Another agent.
    Other,
    /// Another run with our own id, at the same time: a copy of our disk.
    Copy,
}

impl Claim {
    /// For one run of the agent with this id.
    ///
    /// # Errors
    /// If the system gives no random numbers.
    pub fn new(host: HostName, id: String) -> std::io::Result<Self> {
        let run = random_id()?[..16].to_owned();
        Ok(Self { host, owner: Owner { id, run }, resync_requested: Arc::default(), held: false.into() })
    }

    /// Notified when another agent may hold the name, or the store may be another one: it is then read in full at once.
    pub fn resync_requested(&self) -> Arc<Notify> {
        self.resync_requested.clone()
    }

    /// A new id, for an agent that has none yet.
    ///
    /// # Errors
    /// If the system gives no random numbers.
    pub fn fresh_id() -> std::io::Result<String> {
        Ok(random_id()?[..16].to_owned())
    }

    /// The name.
    pub(super) fn host(&self) -> &HostName {
        &self.host
    }

    /// The ids of this agent and run.
    pub fn owner(&self) -> &Owner {
        &self.owner
    }

    fn has_held(&self) -> bool {
        self.held.load(Ordering::Relaxed)
    }

    /// The revision of the last write of the name's key; 0 if the name is free.
    ///
    /// # Errors
    /// If another agent holds it, or it cannot be read.
    pub(super) async fn look(&self, connection: &Connection, prefix: &Prefix) -> Result<i64, StoreError> {
        let (revision, found) = read(connection, prefix, &self.host).await?;
        match holder(found.as_ref(), revision, &self.owner.id, self.has_held().then_some(&self.owner.run)) {
            Holder::None | Holder::Us => Ok(revision),
            Holder::Other => Err(StoreError::Untrusted(taken(&self.host))),
            Holder::Copy => Err(StoreError::Untrusted(copied(&self.host))),
        }
    }

    /// Claims the name if it is free, on a lease of its own, until the publisher puts the key on the lease of the agent.
    ///
    /// # Errors
    /// If another agent was faster, or it cannot be written.
    pub(super) async fn take(&self, connection: &Connection, prefix: &Prefix) -> Result<(), StoreError> {
        let failed = connection.failed("taking the name of this host");
        let mut client = connection.client.clone();
        let lease = client.lease_grant(seconds(TTL), None).await.map_err(&failed)?.id();
        let key = prefix.host_state(&self.host);
        let info = serde_json::json!({ "host": self.host, "owner": self.owner }).to_string();
        let put = TxnOp::put(key, info, Some(PutOptions::new().with_lease(lease)));
        let txn = Txn::new().when([self.unchanged(prefix, 0)]).and_then([put]);
        if client.txn(txn).await.map_err(&failed)?.succeeded() {
            self.holds();
        }
        // Ours or not, it is held now.
        self.look(connection, prefix).await.map(|_| ())
    }

    /// A condition of a transaction: the name's key was not written since this revision.
    pub(super) fn unchanged(&self, prefix: &Prefix, revision: i64) -> Compare {
        Compare::mod_revision(prefix.host_state(&self.host), CompareOp::Equal, revision)
    }

    /// Records that this run has written the key of the name.
    pub(super) fn holds(&self) {
        self.held.store(true, Ordering::Relaxed);
    }
}

/// Why an agent with this id could not hold the name of its host; `None` if it could. Writes nothing. An agent that was
/// never started has no id.
///
/// # Errors
/// If no member answers; the last error.
pub async fn claimed(config: &EtcdConfig, host: &HostName, id: Option<&str>) -> Result<Option<StoreBlock>, StoreError> {
    super::each_member(config, async |connection: Connection| {
        let (revision, found) = read(&connection, &config.prefix, host).await?;
        let other = holder(found.as_ref(), revision, id.unwrap_or_default(), None) == Holder::Other;
        Ok(other.then(|| taken(host)))
    })
    .await
}

async fn read(
    connection: &Connection,
    prefix: &Prefix,
    host: &HostName,
) -> Result<(i64, Option<HostInfo>), StoreError> {
    let failed = connection.failed("reading who has the name of this host");
    let answer = connection.client.kv_client().get(prefix.host_state(host), None).await.map_err(failed)?;
    let Some(kv) = answer.kvs().first() else { return Ok((0, None)) };
    // An unreadable value was not written by an agent, and holds no name.
    Ok((kv.mod_revision(), serde_json::from_slice(kv.value()).ok()))
}

/// `run` is ours, once we have held the name.
fn holder(found: Option<&HostInfo>, revision: i64, id: &str, run: Option<&String>) -> Holder {
    match found.and_then(|info| info.owner.as_ref()) {
        _ if revision == 0 => Holder::None,
        Some(owner) if owner.id != id => Holder::Other,
        Some(owner) if run.is_some_and(|run| owner.run != *run) => Holder::Copy,
        // A version that does not write its id holds no name.
        _ => Holder::Us,
    }
}

fn taken(host: &HostName) -> StoreBlock {
    StoreBlock {
        kind: NAME_TAKEN.to_owned(),
        message: format!("another agent has the name `{host}` in this store"),
        remedy: format!(
            "give one of the two machines another name (`host` in the agent's file); if this one is to take the other's place, stop the other: its name is free {} s after its last sign of life",
            TTL.as_secs()
        ),
    }
}

fn copied(host: &HostName) -> StoreBlock {
    StoreBlock {
        kind: NAME_TAKEN.to_owned(),
        message: format!("another agent with a copy of this one's state directory has taken the name `{host}`"),
        remedy: "stop it, give it another name (`host` in the agent's file), and remove the file `agent.id` of its state directory".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(owner: Option<(&str, &str)>) -> HostInfo {
        let mut info = serde_json::json!({ "host": "web1" });
        if let Some((id, run)) = owner {
            info["owner"] = serde_json::json!({ "id": id, "run": run });
        }
        serde_json::from_value(info).expect("it is one")
    }

    #[test]
    fn a_name_is_held_by_another_agent_only_if_its_key_says_so() {
        let run = "r1".to_owned();
        assert_eq!(holder(None, 0, "a", None), Holder::None);
        assert_eq!(holder(None, 7, "a", None), Holder::Us, "an unreadable value holds no name");
        assert_eq!(holder(Some(&info(None)), 7, "a", Some(&run)), Holder::Us, "an agent from before there were ids");
        assert_eq!(holder(Some(&info(Some(("a", "r0")))), 7, "a", None), Holder::Us, "an earlier run, that was killed");
        assert_eq!(holder(Some(&info(Some(("a", "r1")))), 7, "a", Some(&run)), Holder::Us);
        assert_eq!(holder(Some(&info(Some(("a", "r2")))), 7, "a", Some(&run)), Holder::Copy, "two runs at one time");
        assert_eq!(holder(Some(&info(Some(("b", "r1")))), 7, "a", None), Holder::Other);
        assert_eq!(holder(Some(&info(Some(("b", "r1")))), 7, "", None), Holder::Other, "never started");
    }
}
