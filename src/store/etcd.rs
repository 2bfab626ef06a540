//! A store that is kept in etcd.

use std::sync::Arc;

use etcd_client::{Event, EventType, WatchOptions, WatchResponse, WatchStream};
use tokio::sync::Notify;

use super::{
    belief::{Change, News},
    claim::Claim,
    client::{Connection, EtcdConfig, StoreError},
    keys::Prefix,
    landmark::Landmark,
    read::{Entry, LARGEST, Reading, make_release_key, read, release_key},
    source::{Session, Source, Watch},
};
use crate::model::release::ReleaseKey;

/// A cluster, seen by the agent of one host.
#[derive(Debug)]
pub struct EtcdCluster {
    config: Arc<EtcdConfig>,
    claim: Arc<Claim>,
}

/// A member of it.
pub struct EtcdSession {
    connection: Connection,
    config: Arc<EtcdConfig>,
    claim: Arc<Claim>,
}

/// A watch of all that people write.
pub struct EtcdWatch {
    stream: WatchStream,
    connection: Connection,
    prefix: Prefix,
}

impl EtcdCluster {
    /// For the agent that says this of its name.
    pub fn new(config: EtcdConfig, claim: Arc<Claim>) -> Self {
        Self { config: Arc::new(config), claim }
    }
}

impl Source for EtcdCluster {
    type Session = EtcdSession;

    fn members(&self) -> usize {
        self.config.endpoints.len()
    }

    fn doubted(&self) -> Arc<Notify> {
        self.claim.doubted()
    }

    async fn open(&self, turn: usize) -> Result<EtcdSession, StoreError> {
        let connection = Connection::open(&self.config, turn).await?;
        Ok(EtcdSession { connection, config: self.config.clone(), claim: self.claim.clone() })
    }
}

impl Session for EtcdSession {
    type Watch = EtcdWatch;

    async fn read(&self, landmark: Option<Landmark>) -> Result<Reading, StoreError> {
        read(&self.connection, &self.config.prefix, landmark).await
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
        let (first, end) = self.config.prefix.intent();
        let mut client = self.connection.client.watch_client().max_decoding_message_size(LARGEST);
        let options = WatchOptions::new().with_range(end).with_start_revision(from).with_fragment();
        // Opening waits for the first answer, which a member without a leader may never give.
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
    /// A cancelled watch stays open and says nothing for ever, so it is taken for one that ended.
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
