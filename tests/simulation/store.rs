//! etcd, played: revisions, a watch that loses news, backups that come back, other clusters at the same address. What is
//! made of it is demae's own.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use demae::{
    model::{name::AppName, release::ReleaseKey},
    store::{
        Acceptance, Change, Contents, Entry, Identity, Landmark, News, Reading, Session, Shelf, Source, StoreError,
        Watch,
    },
};
use tokio::{
    sync::{Notify, mpsc},
    time::Instant,
};

use crate::scene::Scene;

/// What etcd has.
#[derive(Clone)]
pub struct Data {
    pub etcd: u64,
    pub revision: i64,
    pub entries: BTreeMap<Vec<u8>, Entry>,
    pub key: Option<ReleaseKey>,
    changes: Vec<Change>,
    /// Before this revision nothing is known.
    pub compacted: i64,
}

pub struct Etcd {
    pub up: bool,
    pub data: Data,
    pub backup: Option<Data>,
    /// What one of the addresses leads to by mistake.
    pub stray: Option<Data>,
    subscribers: Vec<Subscriber>,
}

/// Somebody who watches, as etcd knows of it.
struct Subscriber {
    news: mpsc::UnboundedSender<News>,
    /// Whether nothing gets through any more, and nobody has noticed.
    deaf: bool,
    /// Whether it watches what it came to by mistake, which nobody changes.
    stray: bool,
}

pub struct Store {
    scene: Arc<Scene>,
    etcd: Mutex<Etcd>,
    /// Told by the agent that it is to be read in full.
    pub doubted: Arc<Notify>,
}

/// The store as an agent is given it.
pub struct Members(pub Arc<Store>);

/// A connection to one member.
pub struct Connected {
    store: Arc<Store>,
    stray: bool,
}

/// A watch through it.
pub struct Watching {
    store: Arc<Store>,
    own: mpsc::WeakUnboundedSender<News>,
    news: mpsc::UnboundedReceiver<News>,
    /// What is on its way, and when it arrives.
    coming: Option<(Instant, News)>,
}

impl Data {
    /// A new cluster.
    pub fn new(etcd: u64) -> Self {
        Self { etcd, revision: 1, entries: BTreeMap::new(), key: None, changes: Vec::new(), compacted: 0 }
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

    /// Whether this was written in the store that answers now, at that revision, as far as it can tell.
    fn knows(&self, landmark: &Landmark, revision: i64) -> bool {
        if landmark.revision < self.compacted {
            return !landmark.is_leapt_over(revision);
        }
        let is_it =
            |c: &Change| c.revision == landmark.revision && c.key.as_ref() == Some(&landmark.key) && c.value.is_some();
        self.changes.iter().any(is_it)
    }

    fn found(&self) -> Reading {
        let cluster = self.entries.get(b"cluster".as_slice()).map(|e| String::from_utf8_lossy(e.value()).into_owned());
        let identity = Identity {
            cluster,
            etcd: self.etcd,
            revision: self.revision,
            whole: self.revision,
            key: self.key.as_ref().map(demae::store::fingerprint),
        };
        let contents = Contents::new(self.entries.clone(), self.revision);
        Reading { contents, identity, key: self.key.clone(), forgotten: None }
    }
}

impl Store {
    pub fn new(scene: Arc<Scene>) -> Self {
        let etcd = Etcd { up: true, data: Data::new(1), backup: None, stray: None, subscribers: Vec::new() };
        Self { scene, etcd: Mutex::new(etcd), doubted: Arc::default() }
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

    /// All keys in one go, as `etcdctl del --prefix` does.
    pub fn delete_all(&self) {
        let mut etcd = self.etcd();
        etcd.data.revision += 1;
        let revision = etcd.data.revision;
        etcd.data.key = None;
        let keys = std::mem::take(&mut etcd.data.entries).into_keys();
        let changes: Vec<Change> = keys.map(|key| Change { key: Some(key), revision, value: None }).collect();
        etcd.data.changes.extend(changes.clone());
        self.tell(&mut etcd, changes);
    }

    fn write(&self, key: &str, value: Option<&str>) {
        let mut etcd = self.etcd();
        etcd.data.write(key.as_bytes(), value.map(str::as_bytes));
        let changes = etcd.data.changes.last().cloned().into_iter().collect();
        self.tell(&mut etcd, changes);
    }

    fn tell(&self, etcd: &mut Etcd, changes: Vec<Change>) {
        let news = News { changes, head: etcd.data.revision, etcd: etcd.data.etcd, opened: false };
        let chance = &self.scene.chance;
        for subscriber in etcd.subscribers.iter_mut().filter(|s| !s.stray) {
            subscriber.deaf |= chance.one_in(100);
        }
        // etcd's watches have lost events more than once.
        etcd.subscribers.retain(|s| s.stray || s.deaf || chance.one_in(25) || s.news.send(news.clone()).is_ok());
    }

    /// Another state of things, at the same address.
    pub fn replace(&self, data: Data) {
        let mut etcd = self.etcd();
        etcd.data = data;
        etcd.subscribers.clear();
    }

    /// Where one of the addresses leads.
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

    /// What a person writes who takes this store because of a block of this kind, and that all of these leave.
    pub fn accept(&self, leaving: impl Iterator<Item = AppName>, kind: Option<String>) -> Vec<u8> {
        let identity = self.etcd().data.found().identity;
        serde_json::to_vec(&Acceptance { identity: Some(identity), leaving: leaving.collect(), kind, at: None })
            .expect("JSON")
    }

    /// Whether an app has a spec.
    pub fn has(&self, app: &AppName) -> bool {
        self.etcd().data.entries.contains_key(format!("apps/{app}/spec").as_bytes())
    }
}

impl Etcd {
    /// What a member answers with.
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

    fn doubted(&self) -> Arc<Notify> {
        self.0.doubted.clone()
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

    async fn read(&self, landmark: Option<Landmark>) -> Result<Reading, StoreError> {
        self.store.answer().await?;
        let mut reading = self.store.etcd().at(self.stray).found();
        self.store.answer().await?;
        let knows = |l: &Landmark| self.store.etcd().at(self.stray).knows(l, reading.identity.revision);
        reading.forgotten = landmark.filter(|l| !l.is_in(&reading.contents) && !knows(l));
        Ok(reading)
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
        etcd.subscribers.push(Subscriber { news: out, deaf: false, stray: self.stray });
        Ok(Watching { store: self.store.clone(), own, news, coming: None })
    }
}

impl Watch for Watching {
    async fn next(&mut self) -> Result<News, StoreError> {
        if self.coming.is_none() {
            let closed = || StoreError::Watch { endpoint: ADDRESS.into(), reason: "was closed".into() };
            let news = self.news.recv().await.ok_or_else(closed)?;
            self.coming = Some((Instant::now() + self.store.scene.chance.millis(1, 30), news));
        }
        let (at, _) = self.coming.as_ref().expect("it was just put there");
        tokio::time::sleep_until(*at).await;
        Ok(self.coming.take().expect("it is still there").1)
    }

    async fn ask(&mut self) -> Result<(), StoreError> {
        let Some(own) = self.own.upgrade() else { return Ok(()) };
        let mut etcd = self.store.etcd();
        let asks = |s: &&Subscriber| s.news.same_channel(&own) && !s.deaf;
        let Some(stray) = etcd.subscribers.iter().find(asks).map(|s| s.stray) else { return Ok(()) };
        let data = etcd.at(stray);
        let _ = own.send(News { changes: Vec::new(), head: data.revision, etcd: data.etcd, opened: false });
        Ok(())
    }

    fn endpoint(&self) -> &str {
        ADDRESS
    }
}

/// The agent's disk, as far as the store is concerned.
#[derive(Default)]
pub struct Disk {
    pub ledger: Mutex<Option<Vec<u8>>>,
    pub accepted: Mutex<Option<Vec<u8>>>,
    pub full: std::sync::atomic::AtomicBool,
}

impl Shelf for Disk {
    fn ledger(&self) -> Result<Option<Vec<u8>>, String> {
        Ok(self.ledger.lock().expect("one thread").clone())
    }

    fn keep(&self, text: &[u8]) -> Result<(), String> {
        if self.full.load(std::sync::atomic::Ordering::Relaxed) {
            return Err("no space left on device".into());
        }
        *self.ledger.lock().expect("one thread") = Some(text.to_vec());
        Ok(())
    }

    fn acceptance(&self) -> Option<Vec<u8>> {
        self.accepted.lock().expect("one thread").clone()
    }

    fn use_up(&self) {
        *self.accepted.lock().expect("one thread") = None;
    }
}

const ADDRESS: &str = "etcd";
pub const RESYNC: Duration = Duration::from_secs(60);
