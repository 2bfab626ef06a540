//! The source of an agent in service: an etcd cluster.

use std::sync::Arc;

use etcd_client::{Event, EventType, WatchOptions, WatchResponse, WatchStream};
use tokio::sync::Notify;

use super::{
    claim::Claim,
    client::{Connection, EtcdConfig, StoreError},
    contents::{Entry, Write},
    keys::Prefix,
    read::{LARGEST, Proof, Reading, fleet_acceptance, make_release_key, prove, read, release_key},
    source::{Session, Source, Watch},
    trust::FleetAcceptance,
    update::{Change, News},
};
use crate::model::release::ReleaseKey;

/// A cluster and the claim of one host's name in it.
#[derive(Debug)]
pub struct EtcdCluster {
    config: Arc<EtcdConfig>,
    claim: Arc<Claim>,
}

/// A connection to one member.
pub struct EtcdSession {
    connection: Connection,
    config: Arc<EtcdConfig>,
    claim: Arc<Claim>,
}

/// A watch of the desired range.
pub struct EtcdWatch {
    stream: WatchStream,
    connection: Connection,
    prefix: Prefix,
}

impl EtcdCluster {
    /// For the agent with this claim.
    pub fn new(config: EtcdConfig, claim: Arc<Claim>) -> Self {
        Self { config: Arc::new(config), claim }
    }
}

impl Source for EtcdCluster {
    type Session = EtcdSession;

    fn members(&self) -> usize {
        self.config.endpoints.len()
    }

    fn resync_requested(&self) -> Arc<Notify> {
        self.claim.resync_requested()
    }

    async fn open(&self, turn: usize) -> Result<EtcdSession, StoreError> {
        let connection = Connection::open(&self.config, turn).await?;
        Ok(EtcdSession { connection, config: self.config.clone(), claim: self.claim.clone() })
    }
}

impl Session for EtcdSession {
    type Watch = EtcdWatch;

    async fn read(&self, newest: Option<Write>) -> Result<Reading, StoreError> {
        read(&self.connection, &self.config.prefix, self.claim.host(), newest.as_ref()).await
    }

    async fn prove(&self, since: i64) -> Result<Proof, StoreError> {
        prove(&self.connection, &self.config.prefix, self.claim.host(), since).await
    }

    async fn fleet_acceptance(&self) -> Result<Option<FleetAcceptance>, StoreError> {
        fleet_acceptance(&self.connection, &self.config.prefix).await
    }

    async fn release_key(&self) -> Result<Option<ReleaseKey>, StoreError> {
        release_key(&self.connection, &self.config.prefix).await
    }

    async fn make_release_key(&self, known: Option<&ReleaseKey>) -> Result<ReleaseKey, StoreError> {
        make_release_key(&self.connection, &self.config.prefix, known).await
    }

    async fn has_name(&self) -> Result<bool, StoreError> {
        Ok(self.claim.look(&self.connection, &self.config.prefix).await? != 0)
    }

    async fn take_name(&self) -> Result<(), StoreError> {
        self.claim.take(&self.connection, &self.config.prefix).await
    }

    async fn watch(&self, from: i64) -> Result<EtcdWatch, StoreError> {
        let (first, end) = self.config.prefix.desired_range();
        let mut client = self.connection.client.watch_client().max_decoding_message_size(LARGEST);
        let options = WatchOptions::new().with_range(end).with_start_revision(from).with_fragment();
        // Opening waits for the first answer, which a member without a leader may never send.
        let opened = tokio::time::timeout(self.config.command_timeout, client.watch(first, Some(options))).await;
        let Ok(opened) = opened else {
            return Err(StoreError::silent(&self.connection.endpoint, self.config.command_timeout));
        };
        let stream = opened.map_err(self.connection.failed("opening the watch"))?;
        Ok(EtcdWatch { stream, connection: self.connection.clone(), prefix: self.config.prefix.clone() })
    }
}

impl Watch for EtcdWatch {
    async fn next(&mut self) -> Result<News, StoreError> {
        let message = self.stream.message().await.map_err(self.connection.failed("watching"))?;
        self.news(message.as_ref())
    }

    async fn ask(&mut self) -> Result<(), StoreError> {
        self.stream.request_progress().await.map_err(self.connection.failed("asking the watch for progress"))
    }

    fn endpoint(&self) -> &str {
        &self.connection.endpoint
    }
}

impl EtcdWatch {
    /// The changes of a message. A cancelled watch stays open and silent, so its message counts as the end of the stream.
    fn news(&self, message: Option<&WatchResponse>) -> Result<News, StoreError> {
        let ended = |reason: String| StoreError::Watch { endpoint: self.connection.endpoint.clone(), reason };
        let message = message.ok_or_else(|| ended("was closed".into()))?;
        if message.canceled() {
            return Err(ended(match message.compact_revision() {
                0 => format!("was cancelled: {}", message.cancel_reason()),
                n => format!("fell behind: history before revision {n} is gone"),
            }));
        }
        let change = |event: &Event| {
            let kv = event.kv()?;
            let entry = || Entry::new(kv.value().to_vec(), kv.create_revision(), kv.mod_revision());
            let value = (event.event_type() == EventType::Put).then(entry);
            let key = self.prefix.strip(kv.key()).map(<[u8]>::to_vec);
            Some(Change { key, revision: kv.mod_revision(), value })
        };
        Ok(News {
            changes: message.events().iter().filter_map(change).collect(),
            head: message.header().map_or(0, etcd_client::ResponseHeader::revision),
            etcd: message.header().map_or(0, etcd_client::ResponseHeader::cluster_id),
            opened: message.created(),
        })
    }
}
