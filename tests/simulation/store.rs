//! etcd, played: revisions, a watch that loses news, backups that come back, other clusters at the same address. What is
//! made of it is demae's own.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use demae::{
    model::{name::AppName, release::ReleaseKey},
    store::{Acceptance, Belief, Change, Contents, Entry, Identity, Landmark, News, Reading, Shelf, StoreError},
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
    subscribers: Vec<mpsc::UnboundedSender<News>>,
}

pub struct Store {
    scene: Arc<Scene>,
    etcd: Mutex<Etcd>,
    /// Told by the agent that it is to be read in full.
    pub doubted: Arc<Notify>,
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
}

impl Store {
    pub fn new(scene: Arc<Scene>) -> Self {
        let etcd = Etcd { up: true, data: Data::new(1), backup: None, subscribers: Vec::new() };
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
        // etcd's watches have lost events more than once.
        etcd.subscribers.retain(|s| self.scene.chance.one_in(25) || s.send(news.clone()).is_ok());
    }

    /// Another state of things, at the same address.
    pub fn replace(&self, data: Data) {
        let mut etcd = self.etcd();
        etcd.data = data;
        etcd.subscribers.clear();
    }

    pub fn set_up(&self, up: bool) {
        let mut etcd = self.etcd();
        etcd.up = up;
        if !up {
            etcd.subscribers.clear();
        }
    }

    fn subscribe(&self, from: i64) -> mpsc::UnboundedReceiver<News> {
        let (out, news) = mpsc::unbounded_channel();
        let mut etcd = self.etcd();
        let changes: Vec<Change> = etcd.data.changes.iter().filter(|c| c.revision >= from).cloned().collect();
        let (head, id) = (etcd.data.revision, etcd.data.etcd);
        let _ = out.send(News { changes: Vec::new(), head, etcd: id, opened: true });
        if !changes.is_empty() {
            let _ = out.send(News { changes, head, etcd: id, opened: false });
        }
        etcd.subscribers.push(out);
        news
    }

    /// Keeps an agent's belief as the store is: the same list-then-watch as the real one, without a network.
    pub async fn watch(self: Arc<Self>, mut belief: Belief) {
        belief.recall();
        loop {
            let Err(error) = self.session(&mut belief).await else { continue };
            belief.fail(&error);
            self.scene.note_belief();
            let longest = if matches!(error, StoreError::Doubt(_)) { 3_000 } else { 10_000 };
            tokio::time::sleep(self.scene.chance.millis(100, longest)).await;
        }
    }

    async fn session(&self, belief: &mut Belief) -> Result<(), StoreError> {
        let mut read_to = 0;
        self.read_all(belief, &mut read_to).await?;
        let mut news = self.subscribe(read_to + 1);
        let mut resync = Instant::now() + self.scene.chance.millis(48_000, 72_000);
        let mut look_at = Instant::now() + self.scene.chance.millis(2_000, 4_000);
        loop {
            tokio::select! {
                biased;
                message = news.recv() => {
                    tokio::time::sleep(self.scene.chance.millis(1, 30)).await;
                    let ended = || StoreError::Watch { endpoint: "etcd".into(), reason: "was closed".into() };
                    let news = message.ok_or_else(ended)?;
                    if news.deletes() && self.etcd().data.key.is_none() {
                        self.read_all(belief, &mut read_to).await?;
                    } else {
                        let taken = belief.take_news(news);
                        self.survive(belief, taken)?;
                    }
                }
                () = self.doubted.notified() => self.read_all(belief, &mut read_to).await?,
                () = tokio::time::sleep_until(look_at), if belief.is_doubtful() => {
                    if belief.is_to_be_read() {
                        self.read_all(belief, &mut read_to).await?;
                    }
                    look_at = Instant::now() + self.scene.chance.millis(2_000, 4_000);
                }
                () = tokio::time::sleep_until(resync), if belief.is_doubtful() => return Ok(()),
                () = tokio::time::sleep_until(resync) => {
                    self.read_all(belief, &mut read_to).await?;
                    resync = Instant::now() + self.scene.chance.millis(48_000, 72_000);
                }
            }
        }
    }

    async fn read_all(&self, belief: &mut Belief, read_to: &mut i64) -> Result<(), StoreError> {
        let ended = self.read(belief, read_to).await;
        self.survive(belief, ended)
    }

    /// What is not believed ends no session.
    fn survive(&self, belief: &mut Belief, ended: Result<(), StoreError>) -> Result<(), StoreError> {
        let ended = match ended {
            Err(error) if error.is_about_contents() => {
                belief.fail(&error);
                Ok(())
            }
            other => other,
        };
        self.scene.note_belief();
        ended
    }

    async fn read(&self, belief: &mut Belief, read_to: &mut i64) -> Result<(), StoreError> {
        tokio::time::sleep(self.scene.chance.millis(1, 20)).await;
        if !self.etcd().up {
            return Err(StoreError::Connect { endpoint: "etcd".into(), reason: "connection refused".into() });
        }
        let landmark = belief.begin_read();
        let mut reading = self.found();
        *read_to = reading.identity.revision;
        tokio::time::sleep(self.scene.chance.millis(0, 20)).await;
        reading.forgotten =
            landmark.filter(|l| !l.is_in(&reading.contents) && !self.knows(l, reading.identity.revision));
        let key = match &reading.key {
            Some(key) => key.clone(),
            None => {
                belief.check(&reading)?;
                let key = belief.key().cloned().unwrap_or_else(|| ReleaseKey::new("the key of this store"));
                self.etcd().data.key.get_or_insert(key).clone()
            }
        };
        belief.take_read(reading, key)
    }

    /// Whether this was written in the store that answers now, at that revision, as far as it can tell.
    fn knows(&self, landmark: &Landmark, revision: i64) -> bool {
        if landmark.revision < self.etcd().data.compacted {
            return !landmark.is_leapt_over(revision);
        }
        let is_it =
            |c: &Change| c.revision == landmark.revision && c.key.as_ref() == Some(&landmark.key) && c.value.is_some();
        self.etcd().data.changes.iter().any(is_it)
    }

    fn found(&self) -> Reading {
        let etcd = self.etcd();
        let data = &etcd.data;
        let cluster = data.entries.get(b"cluster".as_slice()).map(|e| String::from_utf8_lossy(e.value()).into_owned());
        let identity = Identity {
            cluster,
            etcd: data.etcd,
            revision: data.revision,
            whole: data.revision,
            key: data.key.as_ref().map(demae::store::fingerprint),
        };
        let contents = Contents::new(data.entries.clone(), data.revision);
        Reading { contents, identity, key: data.key.clone(), forgotten: None }
    }

    /// What a person writes who takes this store because of a block of this kind, and that all of these leave.
    pub fn accept(&self, leaving: impl Iterator<Item = AppName>, kind: Option<String>) -> Vec<u8> {
        let identity = self.found().identity;
        serde_json::to_vec(&Acceptance { identity: Some(identity), leaving: leaving.collect(), kind, at: None })
            .expect("JSON")
    }

    /// Whether an app has a spec.
    pub fn has(&self, app: &AppName) -> bool {
        self.etcd().data.entries.contains_key(format!("apps/{app}/spec").as_bytes())
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

pub const RESYNC: Duration = Duration::from_secs(60);
