//! What an agent tells the fleet: its host and its apps, on a lease, so that it goes when the agent does.

use std::{collections::BTreeMap, time::Duration};

use etcd_client::{GetOptions, PutOptions, Txn, TxnOp};
use serde::Serialize;
use tokio::{sync::watch::Receiver, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    belief::Update,
    client::{Connection, EtcdConfig, StoreError},
};
use crate::{
    model::{
        desired::HostMode,
        name::HostName,
        status::{AppStatus, HostStatus, VERSION},
    },
    retry::Retry,
};

/// How long the keys outlive their agent.
const TTL: Duration = Duration::from_secs(30);
/// Shortest time between two writes: a deploy changes its status many times a second.
const GATHER: Duration = Duration::from_millis(500);
/// Operations in one transaction; etcd takes 128.
const BATCH: usize = 100;

/// What `state/hosts/<host>` says.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HostInfo {
    /// The version of this form.
    pub version: u32,
    /// The host.
    pub host: HostName,
    /// Its labels, merged.
    pub labels: BTreeMap<String, String>,
    /// Whether it takes apps.
    pub mode: HostMode,
    /// The version of the agent.
    pub agent: String,
}

/// Publishes every status, until cancelled; then takes it back.
///
/// Nothing is written to a store that is not believed: what agents write makes revisions, and by its revision an older
/// store is known.
pub async fn publish(
    config: EtcdConfig,
    mut statuses: Receiver<(HostStatus, BTreeMap<String, String>)>,
    updates: Receiver<Update>,
    token: CancellationToken,
) {
    let mut retry = Retry::new(Duration::from_millis(200), Duration::from_secs(15));
    let mut turn = 0;
    loop {
        let mut publisher = Publisher { config: &config, updates: &updates, told: BTreeMap::new() };
        match publisher.session(turn, &mut statuses, &token).await {
            Ok(()) => return,
            Err(error) => tracing::debug!("publishing pauses: {error}"),
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
    updates: &'c Receiver<Update>,
    told: BTreeMap<String, String>,
}

impl Publisher<'_> {
    async fn session(
        &mut self,
        turn: usize,
        statuses: &mut Receiver<(HostStatus, BTreeMap<String, String>)>,
        token: &CancellationToken,
    ) -> Result<(), StoreError> {
        let mut connection = Connection::open(self.config, turn).await?;
        let ttl = i64::try_from(TTL.as_secs()).unwrap_or(30);
        let lease = connection.client.lease_grant(ttl, None).await.map_err(connection.failed("taking a lease"))?.id();
        let (mut keeper, mut answers) =
            connection.client.lease_keep_alive(lease).await.map_err(connection.failed("keeping the lease"))?;
        let mut renew_at = Instant::now() + TTL / 3;
        let mut write_at = Some(Instant::now());
        loop {
            tokio::select! {
                () = token.cancelled() => {
                    // The keys go with their lease: what no agent says is not said any more.
                    return connection.client.lease_revoke(lease).await.map(|_| ()).map_err(connection.failed("returning the lease"));
                }
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
                        return Ok(());
                    }
                    write_at = Some(Instant::now() + GATHER);
                }
                () = tokio::time::sleep_until(write_at.unwrap_or(renew_at)), if write_at.is_some() => {
                    if !self.updates.borrow().believed {
                        write_at = Some(Instant::now() + GATHER);
                        continue;
                    }
                    let wanted = self.keys(&statuses.borrow_and_update());
                    self.write(&mut connection, lease, wanted).await?;
                    write_at = None;
                }
            }
        }
    }

    fn keys(&self, (status, labels): &(HostStatus, BTreeMap<String, String>)) -> BTreeMap<String, String> {
        let prefix = &self.config.prefix;
        let info = HostInfo {
            version: VERSION,
            host: status.host.clone(),
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

    /// Writes what differs from what was told, and nothing else.
    async fn write(
        &mut self,
        connection: &mut Connection,
        lease: i64,
        wanted: BTreeMap<String, String>,
    ) -> Result<(), StoreError> {
        let gone = self.told.keys().filter(|k| !wanted.contains_key(*k)).map(|k| TxnOp::delete(k.clone(), None));
        let fresh = wanted
            .iter()
            .filter(|(k, v)| self.told.get(*k) != Some(v))
            .map(|(k, v)| TxnOp::put(k.clone(), v.clone(), Some(PutOptions::new().with_lease(lease))));
        let operations: Vec<TxnOp> = gone.chain(fresh).collect();
        for batch in operations.chunks(BATCH) {
            let txn = Txn::new().and_then(batch.to_vec());
            connection.client.txn(txn).await.map_err(connection.failed("publishing"))?;
        }
        self.told = wanted;
        Ok(())
    }
}

/// What all agents told of their apps. For `demae status` where no agent answers.
///
/// # Errors
/// If no member answers; the last error.
pub async fn published(config: &EtcdConfig) -> Result<Vec<AppStatus>, StoreError> {
    super::each_member(config, async |mut connection: Connection| {
        let failed = connection.failed("reading what agents published");
        let options = GetOptions::new().with_prefix();
        let answer = connection.client.get(config.prefix.app_states(), Some(options)).await.map_err(failed)?;
        Ok(answer.kvs().iter().filter_map(|kv| serde_json::from_slice(kv.value()).ok()).collect())
    })
    .await
}
