//! What an agent holds to be the desired state: what it kept, what it reads, what it does not believe. It knows no
//! network; whoever reads the store hands over what was found.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use tokio::{sync::watch::Sender, time::Instant};

use super::{
    client::StoreError,
    keys::Prefix,
    landmark::Landmark,
    last_good::LastGood,
    ledger::{self, Ledger, LedgerError, Shelf},
    read::{Contents, Entry, Reader, Reading, fingerprint},
    standing::{Acceptance, Brake, Found, Identity, Standing},
};
use crate::model::{
    desired::{DesiredApp, Snapshot},
    name::{AppName, HostName},
    release::ReleaseKey,
    status::{StoreBlock, StoreStatus},
    time::Timestamp,
};

/// What is known of the store.
#[derive(Debug, Clone, Default)]
pub struct Update {
    /// What is wanted; `None` before the first read.
    pub snapshot: Option<Arc<Snapshot>>,
    /// When the news arrived.
    pub seen: Option<Instant>,
    /// For status.
    pub status: StoreStatus,
    /// When the store was last proven to be as it was read; `None` before the first read. People are told by the wall
    /// clock, which may be set.
    pub proven: Option<Instant>,
    /// Whether the store is the one that is gone by: nothing is written to one that is not.
    pub believed: bool,
    /// Its etcd's own id of its cluster.
    pub etcd: u64,
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

/// One change that the watch told of.
#[derive(Debug, Clone)]
pub struct Change {
    /// The key without the prefix; `None` for one that is not below it.
    pub key: Option<Vec<u8>>,
    /// When.
    pub revision: i64,
    /// What it says now; `None` if it was deleted.
    pub value: Option<Entry>,
}

/// One message of the watch.
#[derive(Debug, Clone)]
pub struct News {
    /// What changed, in order.
    pub changes: Vec<Change>,
    /// The revision of the store when it was sent.
    pub head: i64,
    /// etcd's own id of its cluster.
    pub etcd: u64,
    /// Whether it only says that the watch was opened.
    pub opened: bool,
}

impl News {
    /// Whether anything was deleted.
    pub fn deletes(&self) -> bool {
        self.changes.iter().any(|change| change.value.is_none())
    }

    /// Adds what came after it.
    pub fn add(&mut self, next: Self) {
        self.changes.extend(next.changes);
        self.head = self.head.max(next.head);
        self.etcd = next.etcd;
        self.opened &= next.opened;
    }
}

/// The desired state as one agent believes it. All changes go through here, whether read or told of.
pub struct Belief {
    prefix: Prefix,
    viewer: Viewer,
    shelf: Arc<dyn Shelf>,
    standing: Standing,
    /// Whether the store has been read by this agent.
    proven: bool,
    /// What an earlier agent kept, until it is needed or the store was read.
    kept: Option<Snapshot>,
    /// The revision that the ledger on disk is of.
    on_disk: i64,
    reader: Reader,
    updates: Sender<Update>,
    contents: Contents,
    last_good: LastGood,
    /// The newest revision seen, for people; `contents` may still miss a part of it.
    shown: i64,
    key: Option<ReleaseKey>,
    /// When what is on disk was kept by an earlier agent.
    saved: Option<Timestamp>,
    /// What people had accepted when the last read was begun.
    consent: Option<Vec<u8>>,
    /// Whether what was last read is not believed.
    doubtful: bool,
    /// Whether that came from another etcd than the one that is gone by.
    elsewhere: bool,
    /// Whether why it is not is on disk.
    hold_kept: bool,
    /// Whether anything has changed in the store since it was read and not believed.
    stirred: bool,
}

impl Belief {
    /// Nothing is believed yet.
    pub fn new(prefix: Prefix, viewer: Viewer, shelf: Arc<dyn Shelf>, updates: Sender<Update>) -> Self {
        Self {
            reader: Reader::new(viewer.host.clone(), viewer.labels.clone()),
            standing: Standing { here: viewer.traces.clone(), ..Standing::default() },
            proven: false,
            kept: None,
            on_disk: 0,
            contents: Contents::default(),
            last_good: LastGood::default(),
            shown: 0,
            key: None,
            saved: None,
            consent: None,
            doubtful: false,
            elsewhere: false,
            hold_kept: false,
            stirred: false,
            prefix,
            viewer,
            shelf,
            updates,
        }
    }

    /// What an earlier agent kept: what the store is held against, and gone by until it is read.
    pub fn recall(&mut self) {
        let (standing, kept) = recall(self.shelf.as_ref(), &self.viewer, &self.prefix, &mut self.reader);
        self.standing = standing;
        let (ledger, snapshot) = match kept {
            Ok(Some(kept)) => kept,
            Ok(None) => return,
            Err(e) => return tracing::warn!("{e}; nothing is changed until the store is read"),
        };
        self.on_disk = ledger.identity.revision;
        self.saved = Some(ledger.saved);
        self.last_good = LastGood::recalled(ledger.last_good, &snapshot);
        self.contents = ledger.contents;
        self.key = Some(ledger.key);
        self.kept = Some(unproven(snapshot));
        self.updates.send_if_modified(|u| {
            u.status.stale_since = Some(ledger.saved);
            u.status.revision = self.contents.revision;
            u.status.synced = Some(ledger.saved);
            false
        });
    }

    /// To be told before the store is read: what it must know if it is the one from before; `None` while nothing is known
    /// of it.
    pub fn begin_read(&mut self) -> Option<Landmark> {
        self.consent = self.shelf.acceptance();
        self.stirred = false;
        let head = self.standing.identity.as_ref()?.revision;
        let kept_for = || Timestamp::now().since(self.saved.unwrap_or_default());
        let proven = self.updates.borrow().proven;
        let age = if self.proven { proven.map(|at| at.elapsed()) } else { None };
        Landmark::newest(&self.contents, head, age.unwrap_or_else(kept_for))
    }

    /// Between two full reads while the watch works.
    pub fn resync(&self) -> Duration {
        self.viewer.resync
    }

    /// The key that release ids are made with, once one is known.
    pub fn key(&self) -> Option<&ReleaseKey> {
        self.key.as_ref()
    }

    /// Whether what was last read is not believed. Then the watch only tells whether it is to be read again.
    pub fn is_doubtful(&self) -> bool {
        self.doubtful
    }

    /// Whether what is not believed came from another etcd than the one that is gone by: members that did not answer may
    /// lead to the right one.
    pub fn is_elsewhere(&self) -> bool {
        self.doubtful && self.elsewhere
    }

    /// Whether what is not believed may be another thing by now, or people may have accepted it.
    pub fn is_to_be_read(&self) -> bool {
        self.doubtful && (self.stirred || self.consent != self.shelf.acceptance())
    }

    /// Takes that the store could not be read, or is not believed.
    pub fn fail(&mut self, error: &StoreError) {
        if let StoreError::Doubt(block) = error
            && error.is_about_contents()
        {
            self.doubtful = true;
            // Another etcd is known by its id for as long as it answers. It says nothing of what the right one holds.
            if !self.elsewhere {
                self.hold(block);
            }
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
        // Whatever it was: until the store is read, what was kept has to do.
        if let Some(snapshot) = self.kept.take().filter(|_| !self.proven) {
            tracing::warn!(apps = snapshot.apps.len(), "going on with what was kept on disk");
            self.updates.send_modify(|u| u.snapshot = Some(Arc::new(snapshot)));
        }
    }

    /// Remembers that something was wrong, over a restart too: else a store that is put back key by key would be taken
    /// half-way.
    fn hold(&mut self, block: &StoreBlock) {
        if self.standing.held.as_ref() == Some(block) && self.hold_kept {
            return;
        }
        self.standing.held = Some(block.clone());
        if let (Some(identity), Some(key)) = (self.standing.identity.clone(), self.key.clone()) {
            // Nothing was proven by it.
            let proven = self.updates.borrow().status.synced.unwrap_or_else(Timestamp::now);
            let kept = self.keep((&self.contents, &key), &self.last_good, &identity, (proven, Some(block)));
            self.hold_kept = kept.is_ok();
            kept.unwrap_or_else(|e| tracing::warn!("{e}"));
        }
    }

    /// What people accepted has had its time if it was needed; and if it was there before a read that was believed without
    /// it. Else it would be consent to the same thing another day. A read that was begun before says nothing of it.
    fn use_up(&self, needed: bool, found: &Identity) {
        let was_there = self.consent.is_some() && self.consent == self.shelf.acceptance();
        if needed || was_there && self.accepted().is_settled_by(found) {
            self.shelf.use_up();
        }
    }

    fn accepted(&self) -> Acceptance {
        let text = self.shelf.acceptance().unwrap_or_default();
        let accepted: Acceptance = serde_json::from_slice(&text).unwrap_or_default();
        if accepted.holds(Timestamp::now()) { accepted } else { Acceptance::default() }
    }

    /// Takes contents, unless they are doubtful: of another store, or without most apps. Then nothing changes. Tells also
    /// whether it took a person's word.
    fn believe(
        &mut self,
        contents: Contents,
        key: ReleaseKey,
        found: Identity,
        forgotten: Option<&Landmark>,
    ) -> Result<(Arc<Snapshot>, bool), StoreError> {
        // On a copy, so that what is not believed leaves nothing behind.
        let mut reader = self.reader.clone();
        let snapshot = reader.snapshot(&contents, &key);
        let judged = Found { identity: &found, contents: &contents, snapshot: &snapshot, forgotten };
        let needed = self.judge(judged)?;
        let mut last_good = self.last_good.clone();
        last_good.follow(&self.contents, &snapshot);
        self.keep((&contents, &key), &last_good, &found, (Timestamp::now(), None)).map_err(StoreError::Ledger)?;
        self.use_up(needed, &found);
        self.on_disk = found.revision;
        self.standing.believe(found, &snapshot);
        if needed {
            // What a person accepted is not held against what comes next.
            self.standing.left.clear();
        }
        (self.reader, self.contents, self.last_good) = (reader, contents, last_good);
        (self.key, self.proven) = (Some(key), true);
        Ok((Arc::new(snapshot), needed))
    }

    fn judge(&mut self, found: Found<'_>) -> Result<bool, StoreError> {
        self.elsewhere = self.standing.identity.as_ref().is_some_and(|known| known.etcd != found.identity.etcd);
        self.standing.judge(found, &self.contents, self.viewer.brake, &self.accepted()).map_err(StoreError::Doubt)
    }

    /// Keeps contents on disk before anything is done by them: an agent that starts without the store must never go
    /// back behind what an earlier one has done.
    fn keep(
        &self,
        (contents, key): (&Contents, &ReleaseKey),
        last_good: &LastGood,
        identity: &Identity,
        (proven, held): (Timestamp, Option<&StoreBlock>),
    ) -> Result<(), String> {
        let owner = (&self.viewer.host, &self.prefix);
        self.shelf.keep(&ledger::text(owner, identity, proven, (contents, key), last_good.kept(), held))
    }

    /// Whether a store is believed, before anything is written to it: it may have no release key yet. Which apps are wanted does not depend on the key.
    ///
    /// # Errors
    /// Why it is not.
    pub fn check(&mut self, reading: &Reading) -> Result<(), StoreError> {
        let Reading { contents, identity, forgotten, .. } = reading;
        let trial = self.reader.clone().snapshot(contents, &ReleaseKey::new(""));
        let found = Found { identity, contents, snapshot: &trial, forgotten: forgotten.as_ref() };
        self.judge(found).map(|_| ())
    }

    /// Takes a full read, with the key that release ids are made with from now on. True if only since a person accepted it:
    /// it may be another store, of which a watch from before says nothing.
    ///
    /// # Errors
    /// If it is not believed, or cannot be kept on disk. Then nothing changes.
    pub fn take_read(&mut self, reading: Reading, key: ReleaseKey) -> Result<bool, StoreError> {
        let Reading { contents, identity: found, forgotten, .. } = reading;
        // It may have been made since.
        let found = Identity { key: Some(fingerprint(&key)), ..found };
        let revision = contents.revision;
        let unchanged = self.standing.identity.as_ref().is_some_and(|known| known.is_earlier_than(&found))
            && self.standing.held.is_none()
            && self.key.as_ref() == Some(&key)
            && self.contents.entries == contents.entries;
        let (snapshot, accepted) = if self.proven && unchanged {
            self.contents = contents;
            self.use_up(false, &found);
            // What others write makes revisions too, and the highest one seen is to be known after a restart. The
            // contents are on disk already, so a disk that is full is no reason to stop here.
            if revision > self.on_disk {
                match self.keep((&self.contents, &key), &self.last_good, &found, (Timestamp::now(), None)) {
                    Ok(()) => self.on_disk = revision,
                    Err(e) => tracing::warn!("the store's revision cannot be kept on disk: {e}"),
                }
            }
            self.standing.identity = Some(found);
            (None, false)
        } else {
            let (snapshot, accepted) = self.believe(contents, key, found, forgotten.as_ref())?;
            (Some(snapshot), accepted)
        };
        self.shown = revision;
        self.doubtful = false;
        self.tell(snapshot, revision, revision);
        self.updates.send_if_modified(|u| {
            // Of another store, or of an older one, both may be less than before.
            (u.head, u.read_to) = (revision, revision);
            u.reads += 1;
            false
        });
        Ok(accepted)
    }

    /// Takes one message of the watch. While the store is not believed, it is only a reason to read it again.
    ///
    /// # Errors
    /// If what it leads to is not believed, or cannot be kept on disk. Then nothing changes.
    pub fn take_news(&mut self, news: News) -> Result<(), StoreError> {
        self.stirred |= !news.changes.is_empty();
        if self.doubtful {
            return Ok(());
        }
        let (silent, newest) = (news.changes.is_empty(), news.changes.iter().map(|c| c.revision).max());
        let mut changed = false;
        // What is not believed is thrown away, so it is changed on a copy; most messages change nothing.
        let mut contents = if silent { Contents::default() } else { self.contents.clone() };
        for Change { key, revision, value } in news.changes {
            // A full read may have run ahead of the watch.
            let Some(key) = key.filter(|_| revision > contents.revision) else { continue };
            match value {
                Some(entry) => contents.entries.insert(key, entry),
                None => contents.entries.remove(&key),
            };
            changed = true;
        }
        let mut snapshot = None;
        // Parts of one revision may come in several messages; only the next revision closes it.
        if let Some(newest) = newest {
            contents.revision = contents.revision.max(newest - 1);
            self.shown = self.shown.max(newest);
            if changed && let Some(key) = self.key.clone() {
                let key_of = Some(fingerprint(&key));
                let whole = self.standing.identity.as_ref().map_or(0, |known| known.whole);
                let (cluster, etcd) = (contents.cluster(), news.etcd);
                let found = Identity { cluster, etcd, revision: newest, whole, key: key_of };
                snapshot = Some(self.believe(contents, key, found, None)?.0);
            } else {
                self.contents = contents;
            }
        }
        // A message without news is a sign of life, and says that there was nothing else up to its revision.
        let read_to = if silent && !news.opened { news.head } else { self.shown };
        self.tell(snapshot, news.head, read_to);
        Ok(())
    }

    /// Tells the agent. Without a new snapshot only the time of the last proof changes, which wakes nobody.
    fn tell(&self, snapshot: Option<Arc<Snapshot>>, head: i64, read_to: i64) {
        let revision = self.shown;
        let etcd = self.standing.identity.as_ref().map_or(0, |known| known.etcd);
        self.updates.send_if_modified(|u| {
            u.etcd = etcd;
            let recovered = u.status.error.take().is_some() | u.status.block.take().is_some();
            u.status.stale_since = None;
            u.believed = true;
            u.status.revision = revision;
            u.head = u.head.max(head);
            u.read_to = u.read_to.max(read_to);
            u.status.synced = Some(Timestamp::now());
            u.proven = Some(Instant::now());
            let news = snapshot.is_some();
            if let Some(snapshot) = snapshot {
                u.snapshot = Some(snapshot);
                u.seen = Some(Instant::now());
            }
            news || recovered
        });
    }
}

/// What an earlier agent believed, and the ledger that tells it, or why it does not.
pub(super) fn recall(
    shelf: &dyn Shelf,
    viewer: &Viewer,
    prefix: &Prefix,
    reader: &mut Reader,
) -> (Standing, Result<Option<(Ledger, Snapshot)>, LedgerError>) {
    let mut standing = Standing { here: viewer.traces.clone(), ..Standing::default() };
    let read = shelf.ledger().map_err(LedgerError::Read);
    let parsed = read.and_then(|text| text.map(|text| Ledger::parse(&text, &viewer.host, prefix)).transpose());
    match parsed {
        Ok(None) => {
            // What an earlier agent believed is gone, and its apps are here: nothing leaves unseen.
            standing.strict = !viewer.traces.is_empty();
            (standing, Ok(None))
        }
        Ok(Some(ledger)) => {
            let is_of_host = |(key, _): &(&Vec<u8>, &Entry)| key.starts_with(b"hosts/");
            let hosts =
                ledger.contents.entries.iter().filter(is_of_host).map(|(k, e)| (k.clone(), e.clone())).collect();
            for (app, entries) in &ledger.last_good {
                reader.remember(app, entries, &hosts, &ledger.key);
            }
            let snapshot = reader.snapshot(&ledger.contents, &ledger.key);
            standing.believe(ledger.identity.clone(), &snapshot);
            standing.held = ledger.held.clone();
            (standing, Ok(Some((ledger, snapshot))))
        }
        Err(e) => {
            standing.distrust(&e);
            (standing, Err(e))
        }
    }
}

/// The last good snapshot as it holds while the store cannot be read. That an app was not wanted then is no reason to
/// take it away now.
pub(super) fn unproven(snapshot: Snapshot) -> Snapshot {
    let keep = |(app, desired): (AppName, DesiredApp)| {
        let desired = match desired {
            DesiredApp::Absent(why) => DesiredApp::Kept(format!("{why}, as the store last said")),
            other => other,
        };
        (app, desired)
    };
    Snapshot { proven: false, apps: snapshot.apps.into_iter().map(keep).collect(), ..snapshot }
}
