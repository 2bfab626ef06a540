//! List, then watch from the next revision. After any gap: list again.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use etcd_client::{EventType, WatchOptions, WatchResponse, WatchStream};
use tokio::{sync::watch::Sender, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    client::{Connection, EtcdConfig, StoreError},
    keys::Prefix,
    ledger::{self, Ledger, LedgerError, Shelf},
    read::{Contents, Entry, Reader, fingerprint, make_release_key, read},
    standing::{Acceptance, Brake, Found, Identity, Standing},
};
use crate::{
    model::{
        desired::{DesiredApp, Snapshot},
        name::{AppName, HostName},
        release::ReleaseKey,
        status::{StoreBlock, StoreStatus},
        time::Timestamp,
    },
    retry::{Retry, jittered},
};

/// How often the watch is asked for a sign of life, and how long it may take to give one.
const PROGRESS: Duration = Duration::from_secs(10);
/// The watch must have worked for this long before failures count from one again.
const STEADY: Duration = Duration::from_secs(60);
/// How soon a store that is not believed is read again: a person may be about to accept it.
const DOUBTFUL: Duration = Duration::from_secs(3);

/// What is known of the store.
#[derive(Debug, Clone, Default)]
pub struct Update {
    /// What is wanted; `None` before the first read.
    pub snapshot: Option<Arc<Snapshot>>,
    /// When the news arrived.
    pub seen: Option<Instant>,
    /// For status.
    pub status: StoreStatus,
    /// Whether the store is the one that is gone by: nothing is written to one that is not.
    pub believed: bool,
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
    /// How much may leave at once.
    pub brake: Brake,
    /// Apps that have left traces on this host: what a first read is held against.
    pub traces: BTreeSet<AppName>,
}

/// Keeps `updates` as the store is, until cancelled. While the store cannot be read, it is as it was last.
pub async fn watch(
    config: EtcdConfig,
    viewer: Viewer,
    shelf: Arc<dyn Shelf>,
    updates: Sender<Update>,
    token: CancellationToken,
) {
    let mut watcher = Watcher::new(config, viewer, shelf, updates);
    let mut kept = watcher.take_ledger();
    let mut retry = Retry::new(Duration::from_millis(100), Duration::from_secs(10));
    let mut turn = 0;
    let mut last = String::new();
    loop {
        let began = Instant::now();
        let ended = tokio::select! {
            () = token.cancelled() => return,
            ended = watcher.session(turn) => ended,
        };
        let Err(error) = ended;
        // The same trouble is news once.
        let text = error.to_string();
        if last == text {
            tracing::debug!(kind = error.kind(), "{text}; reading everything again soon");
        } else {
            tracing::warn!(kind = error.kind(), "{text}; reading everything again soon");
        }
        last = text;
        watcher.fail(&error);
        // Whatever ended the first session: until the store is read, what was kept has to do.
        if let Some(snapshot) = kept.take().filter(|_| !watcher.proven) {
            tracing::warn!(apps = snapshot.apps.len(), "going on with what was kept on disk");
            watcher.tell_kept(snapshot);
        }
        if began.elapsed() > STEADY {
            retry.reset();
        }
        turn += 1;
        let pause = if matches!(error, StoreError::Doubt(_)) { retry.pause().min(DOUBTFUL) } else { retry.pause() };
        tokio::select! {
            () = token.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// What an earlier agent believed, and the ledger that tells it.
pub(super) fn recall(
    shelf: &dyn Shelf,
    viewer: &Viewer,
    prefix: &Prefix,
    reader: &mut Reader,
) -> (Standing, Option<(Ledger, Snapshot)>) {
    let mut standing = Standing { here: viewer.traces.clone(), ..Standing::default() };
    let read = shelf.ledger().map_err(LedgerError::Read);
    let parsed = read.and_then(|text| text.map(|text| Ledger::parse(&text, &viewer.host, prefix)).transpose());
    match parsed {
        Ok(None) => (standing, None),
        Ok(Some(ledger)) => {
            let snapshot = reader.snapshot(&ledger.contents, &ledger.key);
            standing.believe(ledger.identity.clone(), &snapshot);
            standing.held = ledger.held.clone();
            (standing, Some((ledger, snapshot)))
        }
        Err(e) => {
            tracing::warn!("{e}; nothing is changed until the store is read");
            standing.distrust(&e);
            (standing, None)
        }
    }
}

/// The last good snapshot as it holds while the store cannot be read. That an app was not wanted then is no reason to
/// take it away now.
fn unproven(snapshot: Snapshot) -> Snapshot {
    let keep = |(app, desired): (AppName, DesiredApp)| {
        let desired = match desired {
            DesiredApp::Absent(why) => DesiredApp::Kept(format!("{why}, as the store last said")),
            other => other,
        };
        (app, desired)
    };
    Snapshot { proven: false, apps: snapshot.apps.into_iter().map(keep).collect(), ..snapshot }
}

struct Watcher {
    config: EtcdConfig,
    viewer: Viewer,
    shelf: Arc<dyn Shelf>,
    standing: Standing,
    /// Whether the store has been read by this agent.
    proven: bool,
    /// The revision that the ledger on disk is of.
    on_disk: i64,
    reader: Reader,
    updates: Sender<Update>,
    contents: Contents,
    /// The newest revision seen, for people; `contents` may still miss a part of it.
    shown: i64,
    key: Option<ReleaseKey>,
}

impl Watcher {
    fn new(config: EtcdConfig, viewer: Viewer, shelf: Arc<dyn Shelf>, updates: Sender<Update>) -> Self {
        Self {
            reader: Reader::new(viewer.host.clone(), viewer.labels.clone()),
            standing: Standing { here: viewer.traces.clone(), ..Standing::default() },
            proven: false,
            on_disk: 0,
            contents: Contents::default(),
            shown: 0,
            key: None,
            config,
            viewer,
            shelf,
            updates,
        }
    }

    /// What an earlier agent kept: what the store is held against, and gone by until it is read.
    fn take_ledger(&mut self) -> Option<Snapshot> {
        let (standing, ledger) = recall(self.shelf.as_ref(), &self.viewer, &self.config.prefix, &mut self.reader);
        self.standing = standing;
        let (ledger, snapshot) = ledger?;
        self.on_disk = ledger.identity.revision;
        self.contents = ledger.contents;
        self.key = Some(ledger.key);
        self.updates.send_if_modified(|u| {
            u.status.stale_since = Some(ledger.saved);
            u.status.revision = self.contents.revision;
            u.status.synced = Some(ledger.saved);
            false
        });
        Some(unproven(snapshot))
    }

    fn tell_kept(&self, snapshot: Snapshot) {
        self.updates.send_modify(|u| u.snapshot = Some(Arc::new(snapshot)));
    }

    fn fail(&mut self, error: &StoreError) {
        if let StoreError::Doubt(block) = error {
            self.hold(block);
        }
        self.updates.send_modify(|u| {
            // Whoever answers next may be another one: nothing is written to it before it was read.
            u.believed = false;
            match error {
                StoreError::Doubt(block) => (u.status.error, u.status.block) = (None, Some(block.clone())),
                other => u.status.error = Some(other.to_string()),
            }
            *u.errors.entry(error.kind()).or_default() += 1;
        });
    }

    /// Remembers that something was wrong, over a restart too: else a store that is put back key by key would be taken
    /// half-way.
    fn hold(&mut self, block: &StoreBlock) {
        if self.standing.held.as_ref() == Some(block) {
            return;
        }
        self.standing.held = Some(block.clone());
        if let (Some(identity), Some(key)) = (self.standing.identity.clone(), self.key.clone()) {
            let kept = self.keep(&self.contents, &key, &identity, Some(block));
            kept.unwrap_or_else(|e| tracing::warn!("{e}"));
        }
    }

    fn accepted(&self) -> Acceptance {
        let text = self.shelf.acceptance().unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    /// Takes contents, unless they are doubtful: of another store, or without most apps. Then nothing changes.
    fn believe(&mut self, contents: Contents, key: ReleaseKey, found: Identity) -> Result<Arc<Snapshot>, StoreError> {
        // On a copy, so that what is not believed leaves nothing behind.
        let mut reader = self.reader.clone();
        let snapshot = reader.snapshot(&contents, &key);
        let needed = self.judge(&contents, &snapshot, &found)?;
        self.keep(&contents, &key, &found, None).map_err(StoreError::Ledger)?;
        if needed {
            self.shelf.use_up();
        }
        self.on_disk = found.revision;
        self.standing.believe(found, &snapshot);
        (self.reader, self.contents, self.key, self.proven) = (reader, contents, Some(key), true);
        Ok(Arc::new(snapshot))
    }

    fn judge(&self, contents: &Contents, snapshot: &Snapshot, identity: &Identity) -> Result<bool, StoreError> {
        let found = Found { identity, contents, snapshot };
        self.standing.judge(found, &self.contents, self.viewer.brake, &self.accepted()).map_err(StoreError::Doubt)
    }

    /// Keeps contents on disk before anything is done by them: an agent that starts without the store must never go
    /// back behind what an earlier one has done.
    fn keep(
        &self,
        contents: &Contents,
        key: &ReleaseKey,
        identity: &Identity,
        held: Option<&StoreBlock>,
    ) -> Result<(), String> {
        let owner = (&self.viewer.host, &self.config.prefix);
        self.shelf.keep(&ledger::text(owner, identity, Timestamp::now(), (contents, key), held))
    }

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
        let mut resync_at = Instant::now() + jittered(self.viewer.resync);
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
                    resync_at = Instant::now() + jittered(self.viewer.resync);
                }
            }
        }
    }

    async fn read_all(&mut self, connection: &Connection) -> Result<(), StoreError> {
        let (contents, found, key) = read(connection, &self.config.prefix).await?;
        let revision = contents.revision;
        let unchanged = self.standing.identity.as_ref().is_some_and(|known| known.is_earlier_than(&found))
            && self.standing.held.is_none()
            && self.key.is_some()
            && self.key == key
            && self.contents.entries == contents.entries;
        let snapshot = if self.proven && unchanged {
            self.contents = contents;
            // What others write makes revisions too, and the highest one seen is to be known after a restart. The
            // contents are on disk already, so a disk that is full is no reason to stop here.
            if let Some(key) = key.filter(|_| revision > self.on_disk) {
                match self.keep(&self.contents, &key, &found, None) {
                    Ok(()) => self.on_disk = revision,
                    Err(e) => tracing::warn!("the store's revision cannot be kept on disk: {e}"),
                }
            }
            self.standing.identity = Some(found);
            None
        } else {
            let key = match key {
                Some(key) => key,
                None => {
                    // Nothing is written to a store that is not believed. Which apps are wanted does not depend on it.
                    let trial = self.reader.clone().snapshot(&contents, &ReleaseKey::new(""));
                    self.judge(&contents, &trial, &found)?;
                    make_release_key(connection, &self.config.prefix, self.key.as_ref()).await?
                }
            };
            let found = Identity { key: Some(fingerprint(&key)), ..found };
            Some(self.believe(contents, key, found)?)
        };
        self.shown = revision;
        self.tell(snapshot, revision, revision);
        self.updates.send_if_modified(|u| {
            // Of another store, or of an older one, both may be less than before.
            (u.head, u.read_to) = (revision, revision);
            u.reads += 1;
            false
        });
        Ok(())
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
        // What is not believed is thrown away, so it is changed on a copy; most messages change nothing.
        let mut contents = if message.events().is_empty() { Contents::default() } else { self.contents.clone() };
        for event in message.events() {
            let Some(kv) = event.kv() else { continue };
            // A full read may have run ahead of the watch.
            if kv.mod_revision() <= contents.revision {
                continue;
            }
            let Some(rest) = self.config.prefix.strip(kv.key()) else { continue };
            match event.event_type() {
                EventType::Put => {
                    let entry = Entry::new(kv.value().to_vec(), kv.create_revision(), kv.mod_revision());
                    contents.entries.insert(rest.to_vec(), entry);
                }
                EventType::Delete => {
                    contents.entries.remove(rest);
                }
            }
            changed = true;
        }
        let head = message.header().map_or(0, etcd_client::ResponseHeader::revision);
        let mut snapshot = None;
        // Parts of one revision may come in several messages; only the next revision closes it.
        if let Some(newest) =
            message.events().iter().filter_map(|e| e.kv()).map(etcd_client::KeyValue::mod_revision).max()
        {
            contents.revision = contents.revision.max(newest - 1);
            self.shown = self.shown.max(newest);
            if changed && let Some(key) = self.key.clone() {
                let etcd = message.header().map_or(0, etcd_client::ResponseHeader::cluster_id);
                let found =
                    Identity { cluster: contents.cluster(), etcd, revision: newest, key: Some(fingerprint(&key)) };
                snapshot = Some(self.believe(contents, key, found)?);
            } else {
                self.contents = contents;
            }
        }
        // A message without news is a sign of life, and says that there was nothing else up to its revision.
        let read_to = if message.events().is_empty() && !message.created() { head } else { self.shown };
        self.tell(snapshot, head, read_to);
        Ok(())
    }

    /// Tells the agent. Without a new snapshot only the time of the last proof changes, which wakes nobody.
    fn tell(&self, snapshot: Option<Arc<Snapshot>>, head: i64, read_to: i64) {
        let revision = self.shown;
        self.updates.send_if_modified(|u| {
            let recovered = u.status.error.take().is_some() | u.status.block.take().is_some();
            u.status.stale_since = None;
            u.believed = true;
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
