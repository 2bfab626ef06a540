//! Simulated etcd: revisions, a watch that loses events, restored backups, other clusters at the same address. The
//! store code of demae itself is real.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use demae::{
    model::{name::AppName, release::ReleaseKey},
    store::{
        Acceptance, Change, Contents, Entry, Fence, FenceMatch, FleetAcceptance, Identity, News, Proof, Reading,
        Session, SharedFence, Source, StateStore, StoreError, Update, Watch, Write,
    },
};
use tokio::{
    sync::{Notify, mpsc},
    time::Instant,
};

use crate::scene::Scene;

/// The key of the host's mode.
pub const MODE: &str = "hosts/host1/mode";

/// The contents of an etcd.
#[derive(Clone)]
pub struct Data {
    pub etcd: u64,
    pub revision: i64,
    pub entries: BTreeMap<Vec<u8>, Entry>,
    pub key: Option<ReleaseKey>,
    pub fence: Option<Fence>,
    pub fleet_acceptance: Option<FleetAcceptance>,
    changes: Vec<Change>,
    /// History before this revision is compacted.
    pub compacted: i64,
}

pub struct Etcd {
    pub up: bool,
    pub data: Data,
    pub backup: Option<Data>,
    /// The data behind one of the addresses, if it is the wrong one.
    pub stray: Option<Data>,
    subscribers: Vec<Subscriber>,
}

/// A watch, on etcd's side.
struct Subscriber {
    news: mpsc::UnboundedSender<News>,
    /// True if it delivers nothing any more, undetected.
    silent: bool,
    /// True if it watches the wrong etcd, whose data never changes.
    stray: bool,
}

pub struct Store {
    scene: Arc<Scene>,
    etcd: Mutex<Etcd>,
    /// Notified by the agent to request a full read.
    pub resync_requested: Arc<Notify>,
}

/// The store as the agent sees it.
pub struct Members(pub Arc<Store>);

/// A connection to one member.
pub struct Connected {
    store: Arc<Store>,
    stray: bool,
}

/// A watch on that connection.
pub struct Watching {
    store: Arc<Store>,
    own: mpsc::WeakUnboundedSender<News>,
    news: mpsc::UnboundedReceiver<News>,
    /// The event in flight, and when it arrives.
    in_flight: Option<(Instant, News)>,
}

impl Data {
    /// A new cluster.
    pub fn new(etcd: u64) -> Self {
        Self {
            etcd,
            revision: 1,
            entries: BTreeMap::new(),
            key: None,
            fence: None,
            fleet_acceptance: None,
            changes: Vec::new(),
            compacted: 0,
        }
    }

    fn write(&mut self, key: &[u8], value: Option<&[u8]>) {
        self.revision += 1;
        let created = self.entries.get(key).map_or(self.revision, Entry::created);
        let value = value.map(|v| Entry::new(v.to_vec(), created, self.revision));
        match &value {
            Some(entry) => self.entries.insert(key.to_vec(), entry.clone()),
            None => self.entries.remove(key),
        };
        self.changes.push(Change { key: Some(key.to_vec()), revision: self.revision, value });
    }

    /// True if the history has this write. It is unknown in a compacted one.
    fn has_in_history(&self, write: &Write) -> bool {
        let is_it =
            |c: &Change| c.revision == write.revision && c.key.as_ref() == Some(&write.key) && c.value.is_some();
        write.revision >= self.compacted && self.changes.iter().any(is_it)
    }

    fn found(&self) -> Reading {
        let cluster = self.entries.get(b"cluster".as_slice()).map(|e| String::from_utf8_lossy(e.value()).into_owned());
        let identity = Identity {
            cluster,
            etcd: self.etcd,
            revision: self.revision,
            key: self.key.as_ref().map(demae::store::fingerprint),
        };
        let contents = Contents::new(self.entries.clone(), self.revision);
        Reading {
            contents,
            identity,
            key: self.key.clone(),
            fence: self.fence.clone(),
            fleet_acceptance: self.fleet_acceptance.clone(),
            has_newest: true,
        }
    }
}

impl Store {
    pub fn new(scene: Arc<Scene>) -> Self {
        let etcd = Etcd { up: true, data: Data::new(1), backup: None, stray: None, subscribers: Vec::new() };
        Self { scene, etcd: Mutex::new(etcd), resync_requested: Arc::default() }
    }

    pub fn etcd(&self) -> MutexGuard<'_, Etcd> {
        self.etcd.lock().expect("one thread")
    }

    pub fn put(&self, key: &str, value: &str) {
        self.write(key, Some(value));
    }

    pub fn delete(&self, key: &str) {
        self.write(key, None);
    }

    /// Deletes all keys at once, as `etcdctl del --prefix` does.
    pub fn delete_all(&self) {
        let mut etcd = self.etcd();
        etcd.data.revision += 1;
        let revision = etcd.data.revision;
        (etcd.data.key, etcd.data.fence, etcd.data.fleet_acceptance) = (None, None, None);
        let keys = std::mem::take(&mut etcd.data.entries).into_keys();
        let changes: Vec<Change> = keys.map(|key| Change { key: Some(key), revision, value: None }).collect();
        etcd.data.changes.extend(changes.clone());
        self.notify(&mut etcd, changes);
    }

    fn write(&self, key: &str, value: Option<&str>) {
        let mut etcd = self.etcd();
        etcd.data.write(key.as_bytes(), value.map(str::as_bytes));
        let changes = etcd.data.changes.last().cloned().into_iter().collect();
        self.notify(&mut etcd, changes);
    }

    fn notify(&self, etcd: &mut Etcd, changes: Vec<Change>) {
        let news = News { changes, head: etcd.data.revision, etcd: etcd.data.etcd, opened: false };
        let chance = &self.scene.chance;
        for subscriber in etcd.subscribers.iter_mut().filter(|s| !s.stray) {
            subscriber.silent |= chance.one_in(100);
        }
        // etcd's watches have lost events more than once.
        etcd.subscribers.retain(|s| s.stray || s.silent || chance.one_in(25) || s.news.send(news.clone()).is_ok());
    }

    /// Replaces the data at the same address.
    pub fn replace(&self, data: Data) {
        let mut etcd = self.etcd();
        etcd.data = data;
        etcd.subscribers.clear();
    }

    /// Sets the data behind one of the addresses.
    pub fn set_stray(&self, data: Option<Data>) {
        let mut etcd = self.etcd();
        etcd.stray = data;
        etcd.subscribers.retain(|s| !s.stray);
    }

    pub fn set_up(&self, up: bool) {
        let mut etcd = self.etcd();
        etcd.up = up;
        if !up {
            etcd.subscribers.clear();
        }
    }

    fn reach(&self) -> Result<(), StoreError> {
        if self.etcd().up {
            return Ok(());
        }
        Err(StoreError::Connect { endpoint: ADDRESS.into(), reason: "connection refused".into() })
    }

    async fn answer(&self) -> Result<(), StoreError> {
        tokio::time::sleep(self.scene.chance.millis(1, 10)).await;
        self.reach()
    }

    /// The acceptance that a person writes for this store, a block of this kind, and the removal of these apps.
    pub fn accept(&self, leaving: impl Iterator<Item = AppName>, kind: Option<String>) -> Vec<u8> {
        let identity = self.etcd().data.found().identity;
        serde_json::to_vec(&Acceptance { identity: Some(identity), leaving: leaving.collect(), kind, at: None })
            .expect("JSON")
    }

    /// Accepts this store for the whole fleet.
    pub fn accept_for_fleet(&self, leaving: BTreeSet<AppName>) {
        let mut etcd = self.etcd();
        let identity = etcd.data.found().identity;
        let at = demae::model::time::Timestamp::now();
        let id = etcd.data.revision.to_string();
        etcd.data.fleet_acceptance = Some(FleetAcceptance { version: 1, id, identity, leaving, at });
    }

    /// The agent's publisher, reduced to its fence: writes and responses are lost now and then.
    pub async fn write_fences(self: Arc<Self>, fence: Arc<SharedFence>, updates: tokio::sync::watch::Receiver<Update>) {
        loop {
            tokio::time::sleep(self.scene.chance.millis(100, 1_000)).await;
            let (trusted, known) = {
                let update = updates.borrow();
                (update.trusted, update.etcd)
            };
            let record = fence.record();
            let Some((value, newest)) = record.to_write().filter(|_| trusted) else { continue };
            let mut etcd = self.etcd();
            if !etcd.up || etcd.data.etcd != known || self.scene.chance.one_in(20) {
                continue;
            }
            match record.compare(etcd.data.fence.as_ref()) {
                FenceMatch::Older => {
                    self.resync_requested.notify_one();
                    continue;
                }
                FenceMatch::Current => {}
                FenceMatch::Unacknowledged | FenceMatch::Missing => {
                    etcd.data.fence = Some(value);
                    etcd.data.revision += 1;
                }
            }
            if !self.scene.chance.one_in(20) {
                fence.acknowledge(&newest);
            }
        }
    }

    /// True if the host's mode is `drained`.
    pub fn is_drained(&self) -> bool {
        self.etcd().data.entries.get(MODE.as_bytes()).is_some_and(|entry| entry.value() == b"drained")
    }

    /// True if an app has a spec.
    pub fn has(&self, app: &AppName) -> bool {
        self.etcd().data.entries.contains_key(format!("apps/{app}/spec").as_bytes())
    }
}

impl Etcd {
    /// The data that a member serves.
    fn at(&mut self, stray: bool) -> &mut Data {
        match &mut self.stray {
            Some(other) if stray => other,
            _ => &mut self.data,
        }
    }
}

impl Source for Members {
    type Session = Connected;

    fn members(&self) -> usize {
        2
    }

    fn resync_requested(&self) -> Arc<Notify> {
        self.0.resync_requested.clone()
    }

    async fn open(&self, turn: usize) -> Result<Connected, StoreError> {
        tokio::time::sleep(self.0.scene.chance.millis(1, 20)).await;
        self.0.reach()?;
        Ok(Connected { store: self.0.clone(), stray: turn % 2 == 1 && self.0.etcd().stray.is_some() })
    }

    fn jittered(&self, duration: Duration) -> Duration {
        let millis = u64::try_from(duration.as_millis()).expect("small");
        self.0.scene.chance.millis(millis * 4 / 5, millis * 6 / 5)
    }
}

impl Session for Connected {
    type Watch = Watching;

    async fn read(&self, newest: Option<Write>) -> Result<Reading, StoreError> {
        self.store.answer().await?;
        let mut reading = self.store.etcd().at(self.stray).found();
        self.store.answer().await?;
        let is_known = |w: &Write| reading.contents.shows(w) || self.store.etcd().at(self.stray).has_in_history(w);
        reading.has_newest = newest.as_ref().is_none_or(is_known);
        Ok(reading)
    }

    async fn prove(&self, since: i64) -> Result<Proof, StoreError> {
        self.store.answer().await?;
        let mut etcd = self.store.etcd();
        let data = etcd.at(self.stray);
        let written = data.entries.iter().filter(|(_, entry)| entry.modified() > since);
        Ok(Proof {
            revision: data.revision,
            etcd: data.etcd,
            total: data.entries.len(),
            written: written.map(|(key, entry)| Write { key: key.clone(), revision: entry.modified() }).collect(),
            key: data.key.as_ref().map(demae::store::fingerprint),
            fence: data.fence.clone(),
            fleet_acceptance: data.fleet_acceptance.clone(),
        })
    }

    async fn fleet_acceptance(&self) -> Result<Option<FleetAcceptance>, StoreError> {
        self.store.answer().await?;
        Ok(self.store.etcd().at(self.stray).fleet_acceptance.clone())
    }

    async fn release_key(&self) -> Result<Option<ReleaseKey>, StoreError> {
        self.store.answer().await?;
        Ok(self.store.etcd().at(self.stray).key.clone())
    }

    async fn make_release_key(&self, known: Option<&ReleaseKey>) -> Result<ReleaseKey, StoreError> {
        self.store.answer().await?;
        let key = known.cloned().unwrap_or_else(|| ReleaseKey::new("the key of this store"));
        Ok(self.store.etcd().at(self.stray).key.get_or_insert(key).clone())
    }

    async fn has_name(&self) -> Result<bool, StoreError> {
        Ok(true)
    }

    async fn take_name(&self) -> Result<(), StoreError> {
        Ok(())
    }

    async fn watch(&self, from: i64) -> Result<Watching, StoreError> {
        self.store.answer().await?;
        let (out, news) = mpsc::unbounded_channel();
        let own = out.downgrade();
        let mut etcd = self.store.etcd();
        let data = etcd.at(self.stray);
        let changes: Vec<Change> = data.changes.iter().filter(|c| c.revision >= from).cloned().collect();
        let (head, id) = (data.revision, data.etcd);
        let _ = out.send(News { changes: Vec::new(), head, etcd: id, opened: true });
        if !changes.is_empty() {
            let _ = out.send(News { changes, head, etcd: id, opened: false });
        }
        etcd.subscribers.push(Subscriber { news: out, silent: false, stray: self.stray });
        Ok(Watching { store: self.store.clone(), own, news, in_flight: None })
    }
}

impl Watch for Watching {
    async fn next(&mut self) -> Result<News, StoreError> {
        if self.in_flight.is_none() {
            let closed = || StoreError::Watch { endpoint: ADDRESS.into(), reason: "was closed".into() };
            let news = self.news.recv().await.ok_or_else(closed)?;
            self.in_flight = Some((Instant::now() + self.store.scene.chance.millis(1, 30), news));
        }
        let (at, _) = self.in_flight.as_ref().expect("it was just set");
        tokio::time::sleep_until(*at).await;
        Ok(self.in_flight.take().expect("it is still set").1)
    }

    async fn ask(&mut self) -> Result<(), StoreError> {
        let Some(own) = self.own.upgrade() else { return Ok(()) };
        let mut etcd = self.store.etcd();
        let asks = |s: &&Subscriber| s.news.same_channel(&own) && !s.silent;
        let Some(stray) = etcd.subscribers.iter().find(asks).map(|s| s.stray) else { return Ok(()) };
        let data = etcd.at(stray);
        let _ = own.send(News { changes: Vec::new(), head: data.revision, etcd: data.etcd, opened: false });
        Ok(())
    }

    fn endpoint(&self) -> &str {
        ADDRESS
    }
}

/// The agent's disk, reduced to its store files.
#[derive(Default)]
pub struct Disk {
    pub ledger: Mutex<Option<Vec<u8>>>,
    pub head: Mutex<Option<Vec<u8>>>,
    pub accepted: Mutex<Option<Vec<u8>>>,
    pub full: std::sync::atomic::AtomicBool,
}

impl StateStore for Disk {
    fn ledger(&self) -> Result<Option<Vec<u8>>, String> {
        Ok(self.ledger.lock().expect("one thread").clone())
    }

    fn write_ledger(&self, text: &[u8]) -> Result<(), String> {
        if self.full.load(std::sync::atomic::Ordering::Relaxed) {
            return Err("no space left on device".into());
        }
        *self.ledger.lock().expect("one thread") = Some(text.to_vec());
        Ok(())
    }

    fn acceptance(&self) -> Option<Vec<u8>> {
        self.accepted.lock().expect("one thread").clone()
    }

    fn head(&self) -> Option<Vec<u8>> {
        self.head.lock().expect("one thread").clone()
    }

    fn write_head(&self, text: &[u8]) {
        *self.head.lock().expect("one thread") = Some(text.to_vec());
    }

    fn clear_acceptance(&self) {
        *self.accepted.lock().expect("one thread") = None;
    }
}

const ADDRESS: &str = "etcd";
pub const RESYNC: Duration = Duration::from_secs(60);
