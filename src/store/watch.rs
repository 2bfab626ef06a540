//! List, then watch from the next revision. After any gap: list again.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use etcd_client::{EventType, WatchOptions, WatchResponse, WatchStream};
use tokio::{sync::watch::Sender, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    client::{Connection, EtcdConfig, StoreError},
    read::{Contents, Entry, ReadKey, Reader, read},
};
use crate::{
    model::{desired::Snapshot, name::HostName, release::ReleaseKey, status::StoreStatus, time::Timestamp},
    retry::{Retry, jittered},
};

/// How often the watch is asked for a sign of life, and how long it may take to give one.
const PROGRESS: Duration = Duration::from_secs(10);
/// The watch must have worked for this long before failures count from one again.
const STEADY: Duration = Duration::from_secs(60);

/// What is known of the store.
#[derive(Debug, Clone, Default)]
pub struct Update {
    /// What is wanted; `None` before the first read.
    pub snapshot: Option<Arc<Snapshot>>,
    /// When the news arrived.
    pub seen: Option<Instant>,
    /// For status.
    pub status: StoreStatus,
    /// The newest revision that the store has told of.
    pub head: i64,
    /// All that happened up to this revision is known.
    pub read_to: i64,
    /// Full reads so far, for metrics.
    pub reads: u64,
    /// Failures so far, by kind, for metrics.
    pub errors: BTreeMap<&'static str, u64>,
}

/// Who reads: the host, its own labels, and how often everything is read again.
#[derive(Debug, Clone)]
pub struct Viewer {
    /// The host.
    pub host: HostName,
    /// The labels of its own configuration.
    pub labels: BTreeMap<String, String>,
    /// Between two full reads while the watch works.
    pub resync: Duration,
}

/// Keeps `updates` as the store is, until cancelled.
pub async fn watch(config: EtcdConfig, viewer: Viewer, updates: Sender<Update>, token: CancellationToken) {
    let reader = Reader::new(viewer.host.clone(), viewer.labels.clone());
    let mut watcher =
        Watcher { config, resync: viewer.resync, reader, updates, contents: Contents::default(), shown: 0, key: None };
    let mut retry = Retry::new(Duration::from_millis(100), Duration::from_secs(10));
    let mut turn = 0;
    loop {
        let began = Instant::now();
        let ended = tokio::select! {
            () = token.cancelled() => return,
            ended = watcher.session(turn) => ended,
        };
        let Err(error) = ended;
        tracing::warn!(kind = error.kind(), "{error}; reading everything again soon");
        watcher.updates.send_modify(|u| {
            u.status.error = Some(error.to_string());
            *u.errors.entry(error.kind()).or_default() += 1;
        });
        if began.elapsed() > STEADY {
            retry.reset();
        }
        turn += 1;
        tokio::select! {
            () = token.cancelled() => return,
            () = tokio::time::sleep(retry.pause()) => {}
        }
    }
}

struct Watcher {
    config: EtcdConfig,
    resync: Duration,
    reader: Reader,
    updates: Sender<Update>,
    contents: Contents,
    /// The newest revision seen, for people; `contents` may still miss a part of it.
    shown: i64,
    key: Option<ReleaseKey>,
}

impl Watcher {
    /// One connection, from its first read to whatever ends it.
    async fn session(&mut self, turn: usize) -> Result<std::convert::Infallible, StoreError> {
        let connection = Connection::open(&self.config, turn).await?;
        self.read_all(&connection).await?;
        let (from, to) = self.config.prefix.intent();
        let mut client = connection.client.watch_client().max_decoding_message_size(256 << 20);
        let options =
            WatchOptions::new().with_range(to).with_start_revision(self.contents.revision + 1).with_fragment();
        // Opening waits for the first answer, which a member without a leader may never give.
        let opened = tokio::time::timeout(self.config.command_timeout, client.watch(from, Some(options))).await;
        let mut stream = match opened {
            Ok(opened) => opened.map_err(connection.failed("opening the watch"))?,
            Err(_) => return Err(silent(&connection, self.config.command_timeout)),
        };
        let mut resync_at = Instant::now() + jittered(self.resync);
        let mut asked = false;
        let mut sign_by = Instant::now() + PROGRESS;
        loop {
            tokio::select! {
                message = stream.message() => {
                    self.take(&connection, message)?;
                    asked = false;
                    sign_by = Instant::now() + PROGRESS;
                }
                () = tokio::time::sleep_until(sign_by) => {
                    if asked {
                        return Err(silent(&connection, PROGRESS * 2));
                    }
                    ask(&connection, &mut stream).await?;
                    asked = true;
                    sign_by = Instant::now() + PROGRESS;
                }
                () = tokio::time::sleep_until(resync_at) => {
                    self.read_all(&connection).await?;
                    resync_at = Instant::now() + jittered(self.resync);
                }
            }
        }
    }

    async fn read_all(&mut self, connection: &Connection) -> Result<(), StoreError> {
        let (contents, key) = read(connection, &self.config.prefix, ReadKey::OrCreate).await?;
        let same = self.key.as_ref() == Some(&key) && self.contents.entries == contents.entries;
        self.contents = contents;
        self.key = Some(key);
        let snapshot = if same { None } else { self.snapshot() };
        self.shown = self.contents.revision;
        let revision = self.contents.revision;
        self.tell(snapshot, revision, revision);
        self.updates.send_if_modified(|u| {
            u.reads += 1;
            false
        });
        Ok(())
    }

    fn snapshot(&mut self) -> Option<Arc<Snapshot>> {
        let key = self.key.as_ref()?;
        Some(Arc::new(self.reader.snapshot(&self.contents, key)))
    }

    /// Takes one message of the watch. Any that is not news or a sign of life ends the session: a cancelled watch stays
    /// open and says nothing for ever.
    fn take(
        &mut self,
        connection: &Connection,
        message: Result<Option<WatchResponse>, etcd_client::Error>,
    ) -> Result<(), StoreError> {
        let ended = |reason: String| StoreError::Watch { endpoint: connection.endpoint.clone(), reason };
        let message = message.map_err(connection.failed("watching"))?.ok_or_else(|| ended("was closed".into()))?;
        if message.canceled() {
            return Err(ended(match message.compact_revision() {
                0 => format!("was cancelled: {}", message.cancel_reason()),
                n => format!("fell behind: history before revision {n} is gone"),
            }));
        }
        let mut changed = false;
        for event in message.events() {
            let Some(kv) = event.kv() else { continue };
            // A full read may have run ahead of the watch.
            if kv.mod_revision() <= self.contents.revision {
                continue;
            }
            let Some(rest) = self.config.prefix.strip(kv.key()) else { continue };
            match event.event_type() {
                EventType::Put => {
                    let entry = Entry::new(kv.value().to_vec(), kv.create_revision(), kv.mod_revision());
                    self.contents.entries.insert(rest.to_vec(), entry);
                }
                EventType::Delete => {
                    self.contents.entries.remove(rest);
                }
            }
            changed = true;
        }
        // Parts of one revision may come in several messages; only the next revision closes it.
        if let Some(newest) =
            message.events().iter().filter_map(|e| e.kv()).map(etcd_client::KeyValue::mod_revision).max()
        {
            self.contents.revision = self.contents.revision.max(newest - 1);
            self.shown = self.shown.max(newest);
        }
        let snapshot = if changed { self.snapshot() } else { None };
        let head = message.header().map_or(0, etcd_client::ResponseHeader::revision);
        // A message without news is a sign of life, and says that there was nothing else up to its revision.
        let read_to = if message.events().is_empty() && !message.created() { head } else { self.shown };
        self.tell(snapshot, head, read_to);
        Ok(())
    }

    /// Tells the agent. Without a new snapshot only the time of the last proof changes, which wakes nobody.
    fn tell(&self, snapshot: Option<Arc<Snapshot>>, head: i64, read_to: i64) {
        let revision = self.shown;
        self.updates.send_if_modified(|u| {
            let recovered = u.status.error.take().is_some();
            u.status.revision = revision;
            u.head = u.head.max(head);
            u.read_to = u.read_to.max(read_to);
            u.status.synced = Some(Timestamp::now());
            let news = snapshot.is_some();
            if let Some(snapshot) = snapshot {
                u.snapshot = Some(snapshot);
                u.seen = Some(Instant::now());
            }
            news || recovered
        });
    }
}

async fn ask(connection: &Connection, stream: &mut WatchStream) -> Result<(), StoreError> {
    stream.request_progress().await.map_err(connection.failed("asking the watch for progress"))
}

fn silent(connection: &Connection, after: Duration) -> StoreError {
    let reason = format!("gave no sign of life for {} s", after.as_secs());
    StoreError::Watch { endpoint: connection.endpoint.clone(), reason }
}
