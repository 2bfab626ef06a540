//! Whose the name of a host is: one agent's at a time, as long as its lease lasts.
//!
//! Two machines with one name would each start every app of that host, and on one engine take each other's containers for
//! their own. So an agent goes by a store only while it holds its name there. The agent is known by a random id in its
//! state directory, and each of its runs by another one: what a killed run has left is taken over at once.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use etcd_client::{Compare, CompareOp, PutOptions, Txn, TxnOp};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use super::{
    client::{Connection, EtcdConfig, StoreError},
    keys::Prefix,
    read::random_id,
};
use crate::model::{
    desired::HostMode,
    name::HostName,
    status::{NAME_TAKEN, StoreBlock},
};

/// How long the keys outlive their agent.
pub(super) const TTL: Duration = Duration::from_secs(30);

/// Who holds a name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// The agent, over all of its runs.
    pub id: String,
    /// This run of it.
    pub run: String,
}

/// What `state/hosts/<host>` says.
///
/// It is read back for its owner, whatever version wrote it: all else may be missing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostInfo {
    /// The version of this form.
    #[serde(default)]
    pub version: u32,
    /// The host.
    pub host: HostName,
    /// Who has this name; nothing from an agent that does not say so.
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
}

/// What one run of an agent says of its name.
#[derive(Debug)]
pub struct Claim {
    host: HostName,
    owner: Owner,
    /// Whoever reads the store waits here.
    pub(super) doubted: Arc<Notify>,
    /// Whether this run has held the name already. Whoever has it then with our own id is no earlier run of ours.
    held: AtomicBool,
}

/// What was found at the key of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holder {
    /// Nobody.
    None,
    /// This agent, or one that is too old to say who it is.
    Us,
    /// Another agent.
    Other,
    /// One with our own id, and it is not us: a copy of our disk.
    Copy,
}

impl Claim {
    /// For one run of the agent with this id.
    ///
    /// # Errors
    /// If the system gives no random numbers.
    pub fn new(host: HostName, id: String) -> std::io::Result<Self> {
        let run = random_id()?[..16].to_owned();
        Ok(Self { host, owner: Owner { id, run }, doubted: Arc::default(), held: false.into() })
    }

    /// Told when the name may be somebody else's by now, or the store another one: then the store is read in full, at once.
    pub fn doubted(&self) -> Arc<Notify> {
        self.doubted.clone()
    }

    /// The id for an agent that has none yet.
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

    /// Who this is.
    pub fn owner(&self) -> &Owner {
        &self.owner
    }

    fn has_held(&self) -> bool {
        self.held.load(Ordering::Relaxed)
    }

    /// Whether the name may be held: the revision at which its key was written last, 0 if nobody has it.
    ///
    /// # Errors
    /// If it is somebody else's, or cannot be read.
    pub(super) async fn look(&self, connection: &Connection, prefix: &Prefix) -> Result<i64, StoreError> {
        let (revision, found) = read(connection, prefix, &self.host).await?;
        match holder(found.as_ref(), revision, &self.owner.id, self.has_held().then_some(&self.owner.run)) {
            Holder::None | Holder::Us => Ok(revision),
            Holder::Other => Err(StoreError::Doubt(taken(&self.host))),
            Holder::Copy => Err(StoreError::Doubt(copied(&self.host))),
        }
    }

    /// Takes the name if nobody has it. Whoever publishes holds it from then on; until that it lasts as long as a lease.
    ///
    /// # Errors
    /// If somebody else was faster, or it cannot be written.
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
        // Ours or not, it is somebody's now.
        self.look(connection, prefix).await.map(|_| ())
    }

    /// For a transaction that only holds while nobody wrote to the name's key since this revision.
    pub(super) fn unchanged(&self, prefix: &Prefix, revision: i64) -> Compare {
        Compare::mod_revision(prefix.host_state(&self.host), CompareOp::Equal, revision)
    }

    /// This run has written the key of the name.
    pub(super) fn holds(&self) {
        self.held.store(true, Ordering::Relaxed);
    }
}

/// Why an agent with this id could not hold the name of its host; nothing if it could. Writes nothing. An agent that was
/// never started has no id, and is nobody's earlier run.
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
    // What makes no sense was not written by an agent, and keeps nobody's name.
    Ok((kv.mod_revision(), serde_json::from_slice(kv.value()).ok()))
}

/// `run` is ours, once we have held the name.
fn holder(found: Option<&HostInfo>, revision: i64, id: &str, run: Option<&String>) -> Holder {
    match found.and_then(|info| info.owner.as_ref()) {
        _ if revision == 0 => Holder::None,
        Some(owner) if owner.id != id => Holder::Other,
        Some(owner) if run.is_some_and(|run| owner.run != *run) => Holder::Copy,
        // One that does not say who it is holds nobody's name.
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

/// For etcd, which counts in seconds.
pub(super) fn seconds(time: Duration) -> i64 {
    i64::try_from(time.as_secs()).unwrap_or(i64::MAX)
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
    fn a_name_is_somebody_elses_only_if_they_say_so() {
        let run = "r1".to_owned();
        assert_eq!(holder(None, 0, "a", None), Holder::None);
        assert_eq!(holder(None, 7, "a", None), Holder::Us, "something unreadable keeps nobody from work");
        assert_eq!(holder(Some(&info(None)), 7, "a", Some(&run)), Holder::Us, "an agent from before there were ids");
        assert_eq!(holder(Some(&info(Some(("a", "r0")))), 7, "a", None), Holder::Us, "an earlier run, that was killed");
        assert_eq!(holder(Some(&info(Some(("a", "r1")))), 7, "a", Some(&run)), Holder::Us);
        assert_eq!(holder(Some(&info(Some(("a", "r2")))), 7, "a", Some(&run)), Holder::Copy, "two runs at one time");
        assert_eq!(holder(Some(&info(Some(("b", "r1")))), 7, "a", None), Holder::Other);
        assert_eq!(holder(Some(&info(Some(("b", "r1")))), 7, "", None), Holder::Other, "never started");
    }
}
