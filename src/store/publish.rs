//! What an agent tells the fleet: its host and its apps, on a lease, so that it goes when the agent does.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use etcd_client::{GetOptions, PutOptions, Txn, TxnOp};
use tokio::{sync::watch::Receiver, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    belief::Update,
    claim::{Claim, HostInfo, TTL, seconds},
    client::{Connection, EtcdConfig, StoreError},
    read::LARGEST,
};
use crate::{
    model::status::{AppStatus, HostStatus, VERSION},
    retry::Retry,
};

/// Shortest time between two writes: a deploy changes its status many times a second.
const GATHER: Duration = Duration::from_millis(500);
/// Operations in one transaction; etcd takes 128.
const BATCH: usize = 100;
/// Bytes of keys and values in one transaction; etcd takes requests of 1.5 MiB, and one status is far smaller.
const BATCH_BYTES: usize = 512 * 1024;

/// How publishing goes, for whoever reports of it.
#[derive(Debug, Default)]
pub struct Publishing(Mutex<Option<Failing>>);

/// Since when nothing could be published, and when that was last logged.
#[derive(Debug, Clone, Copy)]
struct Failing {
    since: Instant,
    logged: Instant,
}

impl Publishing {
    /// How long nothing could be written that was to be.
    pub fn failing_for(&self) -> Duration {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).map(|f| f.since.elapsed()).unwrap_or_default()
    }

    fn succeeded(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Takes a failure. True once a lease: what was published before is gone with it.
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

/// Publishes every status, until cancelled; then takes it back.
///
/// Nothing is written to a store that is not believed: what agents write makes revisions, and by its revision an older
/// store is known. Nor to one in which somebody else has the name of this host.
pub async fn publish(
    config: EtcdConfig,
    claim: Arc<Claim>,
    mut statuses: Receiver<(HostStatus, BTreeMap<String, String>)>,
    updates: Receiver<Update>,
    publishing: Arc<Publishing>,
    token: CancellationToken,
) {
    let mut retry = Retry::new(Duration::from_millis(200), Duration::from_secs(15));
    let mut turn = 0;
    loop {
        let mut publisher = Publisher {
            config: &config,
            claim: &claim,
            updates: &updates,
            publishing: &publishing,
            told: BTreeMap::new(),
            written: None,
        };
        let ended = publisher.session(turn, &mut statuses, &token).await;
        // A session that wrote something was a good one: the name goes with the lease, and must not wait for long.
        if publisher.written.is_some() {
            retry.reset();
        }
        match ended {
            Ok(()) => return,
            Err(error) => {
                // A name that another agent has is told by whoever reads the store.
                if publishing.failed() && !matches!(error, StoreError::Doubt(_)) {
                    tracing::warn!(
                        "no status could be published for {} s, and what was is gone from the store: {error}",
                        TTL.as_secs()
                    );
                } else {
                    tracing::debug!("publishing pauses: {error}");
                }
                if matches!(error, StoreError::Doubt(_)) {
                    // Whoever reads the store finds out whose the name is now.
                    claim.doubted.notify_one();
                }
            }
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
    updates: &'c Receiver<Update>,
    publishing: &'c Publishing,
    told: BTreeMap<String, String>,
    /// The revision at which the key of the host was written last; nothing before it was looked for.
    written: Option<i64>,
}

impl Publisher<'_> {
    async fn session(
        &mut self,
        turn: usize,
        statuses: &mut Receiver<(HostStatus, BTreeMap<String, String>)>,
        token: &CancellationToken,
    ) -> Result<(), StoreError> {
        let mut connection = Connection::open(self.config, turn).await?;
        let granted =
            connection.client.lease_grant(seconds(TTL), None).await.map_err(connection.failed("taking a lease"))?;
        let (lease, etcd) = (granted.id(), granted.header().map_or(0, etcd_client::ResponseHeader::cluster_id));
        let (mut keeper, mut answers) =
            connection.client.lease_keep_alive(lease).await.map_err(connection.failed("keeping the lease"))?;
        let mut renew_at = Instant::now() + TTL / 3;
        let mut write_at = Some(Instant::now());
        loop {
            tokio::select! {
                () = token.cancelled() => break,
                () = tokio::time::sleep_until(renew_at) => {
                    keeper.keep_alive().await.map_err(connection.failed("renewing the lease"))?;
                    let answer = tokio::time::timeout(self.config.command_timeout, answers.message()).await;
                    let left = answer.ok().and_then(Result::ok).flatten().map_or(0, |a| a.ttl());
                    if left <= 0 {
                        let reason = "it is lost".to_owned();
                        return Err(StoreError::Call { endpoint: connection.endpoint.clone(), operation: "renewing the lease", reason });
                    }
                    renew_at = Instant::now() + TTL / 3;
                }
                changed = statuses.changed(), if write_at.is_none() => {
                    if changed.is_err() {
                        break;
                    }
                    write_at = Some(Instant::now() + GATHER);
                }
                () = tokio::time::sleep_until(write_at.unwrap_or(renew_at)), if write_at.is_some() => {
                    let (believed, known) = { let update = self.updates.borrow(); (update.believed, update.etcd) };
                    if !believed {
                        write_at = Some(Instant::now() + GATHER);
                        continue;
                    }
                    // Whoever reads the store may have come to another member than this.
                    if known != etcd {
                        let reason = "this is another etcd than the one that is believed".to_owned();
                        return Err(StoreError::Call { endpoint: connection.endpoint.clone(), operation: "publishing", reason });
                    }
                    let wanted = self.keys(&statuses.borrow_and_update());
                    self.write(&mut connection, lease, wanted).await?;
                    self.publishing.succeeded();
                    write_at = None;
                }
            }
        }
        // The keys go with their lease: what no agent says is not said any more, and the name is free.
        let returned = connection.client.lease_revoke(lease).await;
        returned.map(|_| ()).map_err(connection.failed("returning the lease"))
    }

    fn keys(&self, (status, labels): &(HostStatus, BTreeMap<String, String>)) -> BTreeMap<String, String> {
        let prefix = &self.config.prefix;
        let info = HostInfo {
            version: VERSION,
            host: status.host.clone(),
            owner: Some(self.claim.owner().clone()),
            labels: labels.clone(),
            mode: status.mode,
            agent: status.agent.clone(),
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
            add(prefix.app_state(&app.app, &status.host), serde_json::to_string(app));
        }
        keys
    }

    /// Writes what differs from what was published, and nothing else. The key of the host goes first, by itself; each
    /// transaction after it holds only while nobody else has written that key since: so an agent that lost its name writes
    /// nothing more, and statuses of apps never keep the host from being seen.
    async fn write(
        &mut self,
        connection: &mut Connection,
        lease: i64,
        wanted: BTreeMap<String, String>,
    ) -> Result<(), StoreError> {
        let host = self.config.prefix.host_state(self.claim.host());
        let put =
            |(k, v): (&String, &String)| TxnOp::put(k.clone(), v.clone(), Some(PutOptions::new().with_lease(lease)));
        let is_new = |(k, v): &(&String, &String)| self.told.get(*k) != Some(*v);
        let gone = self.told.keys().filter(|k| !wanted.contains_key(*k));
        let gone = gone.map(|k| (TxnOp::delete(k.clone(), None), k.len()));
        let fresh = wanted.iter().filter(|(k, _)| **k != host).filter(is_new);
        let fresh = fresh.map(|(k, v)| (put((k, v)), k.len() + v.len()));
        let batches = batches(gone.chain(fresh));
        if let Some(of_host) = wanted.get_key_value(&host)
            && (self.written.is_none() || is_new(&of_host))
        {
            let written = match self.written {
                Some(revision) => revision,
                None => self.claim.look(connection, &self.config.prefix).await?,
            };
            self.written = Some(self.commit(connection, written, vec![put(of_host)]).await?);
            self.claim.holds();
        }
        for batch in batches {
            let written = match self.written {
                Some(revision) => revision,
                None => self.claim.look(connection, &self.config.prefix).await?,
            };
            self.commit(connection, written, batch).await?;
        }
        self.told = wanted;
        Ok(())
    }

    /// One transaction, while the key of the host is as it was at this revision; its own revision.
    async fn commit(
        &self,
        connection: &mut Connection,
        written: i64,
        operations: Vec<TxnOp>,
    ) -> Result<i64, StoreError> {
        let txn = Txn::new().when([self.claim.unchanged(&self.config.prefix, written)]).and_then(operations);
        let answer = connection.client.txn(txn).await.map_err(connection.failed("publishing"))?;
        if !answer.succeeded() {
            // Whose it is now, the next session finds out.
            let reason = "another agent wrote to the key of this host".to_owned();
            let endpoint = connection.endpoint.clone();
            return Err(StoreError::Call { endpoint, operation: "publishing", reason });
        }
        Ok(answer.header().map_or(written, etcd_client::ResponseHeader::revision))
    }
}

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

/// What all agents told of their apps. For `demae status` where no agent answers.
///
/// # Errors
/// If no member answers; the last error.
pub async fn published(config: &EtcdConfig) -> Result<Vec<AppStatus>, StoreError> {
    super::each_member(config, async |connection: Connection| {
        let failed = connection.failed("reading what agents published");
        let options = GetOptions::new().with_prefix();
        let mut kv = connection.client.kv_client().max_decoding_message_size(LARGEST);
        let answer = kv.get(config.prefix.app_states(), Some(options)).await.map_err(failed)?;
        Ok(answer.kvs().iter().filter_map(|kv| serde_json::from_slice(kv.value()).ok()).collect())
    })
    .await
}
