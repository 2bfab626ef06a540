//! Publishes what an agent knows: its host and its apps, on its lease, and its fence, on none.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use etcd_client::{Compare, CompareOp, GetOptions, PutOptions, Txn, TxnOp};
use tokio::{sync::watch::Receiver, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    claim::{Claim, HostInfo},
    client::{Connection, EtcdConfig, StoreError},
    lease::{Lease, TTL},
    read::{LARGEST, value},
    trust::{Fence, FenceMatch, SharedFence},
    update::Update,
};
use crate::{
    model::{
        fleet::Capacity,
        status::{AppStatus, HostStatus, VERSION},
        text::json,
    },
    retry::Retry,
};

/// Shortest time between two writes: a deploy changes its status many times a second.
const GATHER: Duration = Duration::from_millis(500);
/// Longest wait for the last write of an agent that ends.
const LAST_WRITE: Duration = Duration::from_secs(1);
/// Operations in one transaction; etcd takes 128.
const BATCH: usize = 100;
/// Bytes of keys and values in one transaction; etcd takes requests of 1.5 MiB, and one status is far smaller.
const BATCH_BYTES: usize = 512 * 1024;

/// Whether publishing works, for status.
#[derive(Debug, Default)]
pub struct Publishing(Mutex<Option<Failing>>);

/// Since when nothing could be published, and when that was last logged.
#[derive(Debug, Clone, Copy)]
struct Failing {
    since: Instant,
    logged: Instant,
}

impl Publishing {
    /// How long writes have been failing; zero if they are not.
    pub fn failing_for(&self) -> Duration {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).map(|f| f.since.elapsed()).unwrap_or_default()
    }

    fn succeeded(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Records a failure. Returns true once per lease duration: what was published before is gone with the lease.
    fn failed(&self) -> bool {
        let now = Instant::now();
        let mut failing = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let failing = failing.get_or_insert(Failing { since: now, logged: now });
        let is_due = failing.logged.elapsed() > TTL;
        if is_due {
            failing.logged = now;
        }
        is_due
    }
}

/// What the publisher reads.
pub struct Sources {
    /// The status of the host and its labels.
    pub statuses: Receiver<(HostStatus, BTreeMap<String, String>)>,
    /// The lease of this agent.
    pub leases: Receiver<Option<Lease>>,
    /// What is known of the store.
    pub updates: Receiver<Update>,
    /// The nonces that are to be written.
    pub fence: Arc<SharedFence>,
    /// Whether this host takes turns in rollouts.
    pub takes_turns: Receiver<bool>,
    /// Its machine, if that is known.
    pub capacity: Option<Capacity>,
}

/// Publishes every status until cancelled.
///
/// Nothing is written to a store that is not trusted, nor while another agent holds the name of this host.
pub async fn publish(
    config: EtcdConfig,
    claim: Arc<Claim>,
    mut sources: Sources,
    publishing: Arc<Publishing>,
    token: CancellationToken,
) {
    let mut retry = Retry::new(Duration::from_millis(200), Duration::from_secs(5));
    let mut turn = 0;
    let (mut published, mut lease) = (BTreeMap::new(), None);
    loop {
        let mut publisher = Publisher {
            config: &config,
            claim: &claim,
            publishing: &publishing,
            published: &mut published,
            lease: &mut lease,
            host_revision: None,
            is_complete: false,
            capacity: sources.capacity.clone(),
            address: None,
        };
        let ended = publisher.session(turn, &mut sources, &token).await;
        // A session that wrote everything was a good one: the name goes with the lease, and must not wait for long.
        if publisher.is_complete {
            retry.reset();
        }
        // What was under way may be written or not: each key is written anew, or deleted.
        published.values_mut().for_each(String::clear);
        let Err(error) = ended else { return };
        let is_untrusted = matches!(error, StoreError::Untrusted(_));
        if publishing.failed() && !is_untrusted {
            tracing::warn!(
                "no status could be published for {} s, and what was is gone from the store: {error}",
                TTL.as_secs()
            );
        } else {
            tracing::debug!("publishing pauses: {error}");
        }
        if is_untrusted {
            // The reader of the store reports who holds the name, or that the store is another one.
            claim.resync_requested.notify_one();
        }
        turn += 1;
        tokio::select! {
            () = token.cancelled() => return,
            () = tokio::time::sleep(retry.pause()) => {}
        }
    }
}

struct Publisher<'c> {
    config: &'c EtcdConfig,
    claim: &'c Claim,
    publishing: &'c Publishing,
    /// Keys and values as they were last written on the lease.
    published: &'c mut BTreeMap<String, String>,
    /// The lease that they hang on.
    lease: &'c mut Option<Lease>,
    /// The revision of our last write to the key of the host; `None` before it was read or written.
    host_revision: Option<i64>,
    /// True once everything was written.
    is_complete: bool,
    capacity: Option<Capacity>,
    address: Option<IpAddr>,
}

impl Publisher<'_> {
    async fn session(
        &mut self,
        turn: usize,
        sources: &mut Sources,
        token: &CancellationToken,
    ) -> Result<(), StoreError> {
        let mut connection = Connection::open(self.config, turn).await?;
        self.address = own_address(&connection.endpoint).await;
        let mut write_at = Some(Instant::now());
        loop {
            tokio::select! {
                () = token.cancelled() => {
                    // The next start finds a fence that needs no look into the history.
                    if sources.updates.borrow().trusted {
                        let _ = tokio::time::timeout(LAST_WRITE, self.write_fence(&mut connection, &sources.fence)).await;
                    }
                    return Ok(());
                }
                changed = sources.leases.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    self.host_revision = None;
                    write_at = Some(Instant::now());
                }
                Ok(()) = sources.takes_turns.changed(), if write_at.is_none() => {
                    write_at = Some(Instant::now());
                }
                () = sources.fence.pending.notified(), if write_at.is_none() => {
                    write_at = Some(Instant::now() + GATHER);
                }
                changed = sources.statuses.changed(), if write_at.is_none() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    write_at = Some(Instant::now() + GATHER);
                }
                () = tokio::time::sleep_until(write_at.unwrap_or_else(Instant::now)), if write_at.is_some() => {
                    let lease = *sources.leases.borrow_and_update();
                    let (trusted, etcd) = { let update = sources.updates.borrow(); (update.trusted, update.etcd) };
                    let Some(lease) = lease.filter(|lease| trusted && lease.etcd == etcd) else {
                        if trusted && self.publishing.failed() {
                            tracing::warn!("no status could be published for {} s: etcd grants no lease", TTL.as_secs());
                        }
                        write_at = Some(Instant::now() + GATHER);
                        continue;
                    };
                    if self.lease.replace(lease) != Some(lease) {
                        // What hung on the lease before is gone with it.
                        self.published.clear();
                    }
                    let takes_turns = *sources.takes_turns.borrow_and_update();
                    let wanted = self.keys(&sources.statuses.borrow_and_update(), takes_turns);
                    self.write(&mut connection, lease, wanted).await?;
                    self.write_fence(&mut connection, &sources.fence).await?;
                    self.publishing.succeeded();
                    self.is_complete = true;
                    write_at = None;
                }
            }
        }
    }

    fn keys(
        &self,
        (status, labels): &(HostStatus, BTreeMap<String, String>),
        takes_turns: bool,
    ) -> BTreeMap<String, String> {
        let prefix = &self.config.prefix;
        let info = HostInfo {
            version: VERSION,
            host: status.host.clone(),
            owner: Some(self.claim.owner().clone()),
            labels: labels.clone(),
            mode: status.mode,
            agent: status.agent.clone(),
            features: FEATURES
                .iter()
                .chain(takes_turns.then_some(&ROLLOUTS))
                .map(|feature| (*feature).to_owned())
                .collect(),
            address: self.address,
            capacity: self.capacity.clone(),
        };
        let mut keys = BTreeMap::new();
        let mut add = |key: String, value: Result<String, serde_json::Error>| match value {
            Ok(text) => {
                keys.insert(key, text);
            }
            Err(e) => tracing::error!("`{key}` cannot be written as JSON: {e}"),
        };
        add(prefix.host_state(&status.host), serde_json::to_string(&info));
        for app in &status.apps {
            add(prefix.app_state(&status.host, &app.app), serde_json::to_string(app));
        }
        keys
    }

    /// Writes what differs from what was published, and nothing else. The key of the host goes first, by itself; each
    /// transaction after it holds only while that key has not been written by another agent since. So an agent that lost
    /// its name writes nothing more, and statuses of apps never keep the host from being seen.
    async fn write(
        &mut self,
        connection: &mut Connection,
        lease: Lease,
        wanted: BTreeMap<String, String>,
    ) -> Result<(), StoreError> {
        let host = self.config.prefix.host_state(self.claim.host());
        let options = || Some(PutOptions::new().with_lease(lease.id));
        let put = |(k, v): (&String, &String)| TxnOp::put(k.clone(), v.clone(), options());
        let is_new = |(k, v): &(&String, &String)| self.published.get(*k) != Some(*v);
        let gone = self.published.keys().filter(|k| !wanted.contains_key(*k));
        let gone = gone.map(|k| (TxnOp::delete(k.clone(), None), k.len()));
        let fresh = wanted.iter().filter(|(k, _)| **k != host).filter(is_new);
        let fresh = fresh.map(|(k, v)| (put((k, v)), k.len() + v.len()));
        let batches = batches(gone.chain(fresh));
        if let Some(of_host) = wanted.get_key_value(&host)
            && (self.host_revision.is_none() || is_new(&of_host))
        {
            let revision = self.host_revision(connection).await?;
            self.host_revision = Some(self.commit(connection, revision, vec![put(of_host)]).await?);
            self.claim.holds();
        }
        for batch in batches {
            let revision = self.host_revision(connection).await?;
            self.commit(connection, revision, batch).await?;
        }
        *self.published = wanted;
        Ok(())
    }

    async fn host_revision(&self, connection: &Connection) -> Result<i64, StoreError> {
        match self.host_revision {
            Some(revision) => Ok(revision),
            None => self.claim.look(connection, &self.config.prefix).await,
        }
    }

    /// One transaction, while the key of the host is as it was at this revision. Returns its own revision.
    async fn commit(
        &self,
        connection: &mut Connection,
        revision: i64,
        operations: Vec<TxnOp>,
    ) -> Result<i64, StoreError> {
        let txn = Txn::new().when([self.claim.unchanged(&self.config.prefix, revision)]).and_then(operations);
        let answer = connection.client.txn(txn).await.map_err(connection.failed("publishing"))?;
        if !answer.succeeded() {
            // The next session finds out whose it is now.
            let reason = "another agent wrote to the key of this host".to_owned();
            let endpoint = connection.endpoint.clone();
            return Err(StoreError::Call { endpoint, operation: "publishing", reason });
        }
        Ok(answer.header().map_or(revision, etcd_client::ResponseHeader::revision))
    }

    /// Writes the nonces that are pending, over the fence that the store holds now and no other, and only while the key of
    /// the host is ours: the fence of an agent that took the name is never written over.
    async fn write_fence(&self, connection: &mut Connection, fence: &SharedFence) -> Result<(), StoreError> {
        let record = fence.record();
        let Some((wanted, newest)) = record.to_write() else { return Ok(()) };
        let key = self.config.prefix.fence(self.claim.host());
        let (held, revision): (Option<Fence>, i64) = value(connection, &key).await?;
        match record.compare(held.as_ref()) {
            // The answer to an earlier write was lost.
            FenceMatch::Current => {
                fence.acknowledge(&newest);
                return Ok(());
            }
            FenceMatch::Older => return Err(self.replaced(connection)),
            FenceMatch::Unacknowledged | FenceMatch::Missing => {}
        }
        let text = json(&wanted);
        let is_unchanged = Compare::mod_revision(key.clone(), CompareOp::Equal, revision);
        let is_ours = self.claim.unchanged(&self.config.prefix, self.host_revision(connection).await?);
        let txn = Txn::new().when([is_unchanged, is_ours]).and_then([TxnOp::put(key, text, None)]);
        let answer = connection.client.txn(txn).await.map_err(connection.failed("writing the fence"))?;
        if !answer.succeeded() {
            return Err(self.replaced(connection));
        }
        fence.acknowledge(&newest);
        Ok(())
    }

    /// The store was exchanged since it was read: the reader is to look at it.
    fn replaced(&self, connection: &Connection) -> StoreError {
        self.claim.resync_requested.notify_one();
        let reason = "the fence of this host is not the one that was read".to_owned();
        StoreError::Call { endpoint: connection.endpoint.clone(), operation: "writing the fence", reason }
    }
}

/// The address of this machine from which it reaches an endpoint; `None` if that is this machine itself. Nothing is sent:
/// a datagram socket that is connected has chosen its route.
async fn own_address(endpoint: &str) -> Option<IpAddr> {
    let peer = endpoint.split_once("://").map_or(endpoint, |(_, rest)| rest);
    let look = async {
        let peer = tokio::net::lookup_host(peer).await.ok()?.next()?;
        let any: IpAddr = if peer.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = tokio::net::UdpSocket::bind((any, 0)).await.ok()?;
        socket.connect(peer).await.ok()?;
        Some(socket.local_addr().ok()?.ip()).filter(|own| !own.is_loopback())
    };
    tokio::time::timeout(LAST_WRITE, look).await.ok().flatten()
}

/// The feature of a host that takes turns in rollouts.
pub const ROLLOUTS: &str = "rollouts";

/// What this version understands beyond the first one, for clients that write to hosts of several versions.
pub const FEATURES: &[&str] = &["fence", "fleet-acceptance", "unknown-keys-are-warnings"];

/// Operations, each with its size in bytes, in transactions that etcd takes.
fn batches(operations: impl Iterator<Item = (TxnOp, usize)>) -> Vec<Vec<TxnOp>> {
    let mut batches: Vec<(Vec<TxnOp>, usize)> = Vec::new();
    for (operation, size) in operations {
        match batches.last_mut() {
            Some((batch, bytes)) if batch.len() < BATCH && *bytes + size <= BATCH_BYTES => {
                batch.push(operation);
                *bytes += size;
            }
            _ => batches.push((vec![operation], size)),
        }
    }
    batches.into_iter().map(|(batch, _)| batch).collect()
}

/// The statuses of all apps on all hosts. What cannot be parsed is logged and left out.
///
/// # Errors
/// If no member answers; the last error.
pub async fn published(config: &EtcdConfig) -> Result<Vec<AppStatus>, StoreError> {
    super::each_member(config, async |connection: Connection| {
        let failed = connection.failed("reading what agents published");
        let options = GetOptions::new().with_prefix();
        let mut kv = connection.client.kv_client().max_decoding_message_size(LARGEST);
        let answer = kv.get(config.prefix.app_states(), Some(options)).await.map_err(failed)?;
        let parse = |kv: &etcd_client::KeyValue| match serde_json::from_slice(kv.value()) {
            Ok(status) => Some(status),
            Err(e) => {
                tracing::warn!("`{}` is not a status that this version can read: {e}", kv.key_str().unwrap_or("?"));
                None
            }
        };
        Ok(answer.kvs().iter().filter_map(parse).collect())
    })
    .await
}
