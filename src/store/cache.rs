//! The desired state that this agent has accepted, kept up with reads and news of the store. It knows no network.

use std::{sync::Arc, time::Duration};

use tokio::{sync::watch::Sender, time::Instant};

use super::{
    client::StoreError,
    contents::{Contents, Entry, Write},
    interpret::Interpreter,
    keys::Prefix,
    last_good::LastGood,
    random_id,
    read::{Proof, Reading, fingerprint},
    recall::{Recalled, recall, unproven},
    trust::{
        Acceptance, Acceptances, Continuity, Fence, FenceMatch, FenceRecord, FleetAcceptance, Found, Head, Identity,
        Ledger, Nonce, SharedFence, StateStore, StoreTrust,
    },
    update::{Change, News, Update, Viewer},
};
use crate::model::{desired::Snapshot, release::ReleaseKey, status::StoreBlock, text::json, time::Timestamp};

/// The last read that was refused.
#[derive(Debug, Default)]
struct Rejected {
    /// True if it came from an etcd with another cluster id.
    other_cluster: bool,
    /// True if the watch has brought changes since.
    changed_since: bool,
}

/// The accepted desired state of one agent. All changes go through here, whether read or watched.
pub struct DesiredCache {
    prefix: Prefix,
    viewer: Viewer,
    disk: Arc<dyn StateStore>,
    fence: Arc<SharedFence>,
    trust: StoreTrust,
    interpreter: Interpreter,
    updates: Sender<Update>,
    contents: Contents,
    /// What `contents` mean for this host; `None` before the first read or ledger.
    accepted: Option<Arc<Snapshot>>,
    last_good: LastGood,
    key: Option<ReleaseKey>,
    /// True once this agent has read the store and accepted it.
    proven: bool,
    /// The snapshot of the ledger, until it is needed or the store was read.
    kept: Option<Snapshot>,
    /// The newest revision seen; `contents` may still lack a part of it.
    shown: i64,
    /// The revision of the last read or comparison, at which `contents` had every key of the store.
    complete_at: i64,
    /// What people had accepted on this host when the last read began.
    acceptance_at_read_start: Option<Vec<u8>>,
    /// The fence record when the last read began. The publisher may write a nonce while a read is under way, which that
    /// read need not show.
    fence_at_read_start: FenceRecord,
    /// Set while the last read is not trusted.
    rejected: Option<Rejected>,
    /// True if the quarantine is in the ledger.
    quarantine_persisted: bool,
    /// The revision in the head on disk.
    head_written: i64,
}

impl DesiredCache {
    /// An empty cache.
    pub fn new(
        prefix: Prefix,
        viewer: Viewer,
        disk: Arc<dyn StateStore>,
        fence: Arc<SharedFence>,
        updates: Sender<Update>,
    ) -> Self {
        Self {
            interpreter: Interpreter::new(viewer.host.clone(), viewer.labels.clone()),
            trust: StoreTrust { placed_apps: viewer.traces.clone(), ..StoreTrust::default() },
            accepted: None,
            proven: false,
            kept: None,
            contents: Contents::default(),
            last_good: LastGood::default(),
            shown: 0,
            complete_at: 0,
            key: None,
            acceptance_at_read_start: None,
            fence_at_read_start: FenceRecord::default(),
            rejected: None,
            quarantine_persisted: false,
            head_written: 0,
            prefix,
            viewer,
            disk,
            fence,
            updates,
        }
    }

    /// Loads the ledger: what the store is compared with, and the desired state until it is read.
    pub fn recall(&mut self) {
        let (trust, kept) = recall(self.disk.as_ref(), &self.viewer, &self.prefix, &mut self.interpreter);
        self.trust = trust;
        let Recalled { ledger, snapshot, proven } = match kept {
            Ok(Some(recalled)) => recalled,
            Ok(None) => return,
            Err(e) => return tracing::warn!("{e}; nothing is changed until the store is read"),
        };
        self.last_good = LastGood::recalled(ledger.last_good, &snapshot);
        self.contents = ledger.contents;
        self.shown = self.contents.revision;
        self.complete_at = proven;
        self.key = Some(ledger.key);
        self.fence.replace(ledger.fence.unwrap_or_default());
        self.quarantine_persisted = ledger.quarantine.is_some();
        self.accepted = Some(Arc::new(snapshot.clone()));
        self.kept = Some(unproven(snapshot));
        self.updates.send_if_modified(|u| {
            u.status.stale_since = Some(ledger.saved);
            u.status.revision = self.contents.revision;
            u.status.synced = Some(ledger.saved);
            false
        });
    }

    /// Called before each read. Returns the newest accepted write, which the store must have in its history.
    pub fn begin_read(&mut self) -> Option<Write> {
        self.acceptance_at_read_start = self.disk.acceptance();
        self.fence_at_read_start = self.fence.record();
        if let Some(rejected) = &mut self.rejected {
            rejected.changed_since = false;
        }
        self.contents.newest()
    }

    /// Between two comparisons with the store while the watch works.
    pub fn resync(&self) -> Duration {
        self.viewer.resync
    }

    /// The key that release ids are made with, once it is known.
    pub fn key(&self) -> Option<&ReleaseKey> {
        self.key.as_ref()
    }

    /// Called before each comparison with the store. Returns the revision up to which everything that was written is in
    /// the cache.
    pub fn begin_proof(&mut self) -> i64 {
        self.fence_at_read_start = self.fence.record();
        self.proven_to()
    }

    fn proven_to(&self) -> i64 {
        self.updates.borrow().read_to.min(self.contents.revision)
    }

    /// True while the last read is not trusted. The watch then only tells when to read again.
    pub fn is_untrusted(&self) -> bool {
        self.rejected.is_some()
    }

    /// True if the untrusted read came from an etcd with another cluster id: members that did not answer may have the
    /// right store.
    pub fn is_other_cluster(&self) -> bool {
        self.rejected.as_ref().is_some_and(|rejected| rejected.other_cluster)
    }

    /// True if the untrusted store has changed, or a person has accepted it on this host.
    pub fn is_to_be_read(&self) -> bool {
        let is_accepted = || self.acceptance_at_read_start != self.disk.acceptance();
        self.rejected.as_ref().is_some_and(|rejected| rejected.changed_since || is_accepted())
    }

    /// Records that the store could not be read, or is not trusted.
    pub fn fail(&mut self, error: &StoreError) {
        if let StoreError::Untrusted(block) = error
            && error.is_about_contents()
        {
            // Another cluster is known by its id for as long as it answers. It says nothing of what the right one holds.
            if !self.is_other_cluster() {
                self.quarantine(block);
            }
        }
        self.updates.send_modify(|u| {
            // The next connection may lead to another store: nothing is written before it was read.
            u.trusted = false;
            match error {
                StoreError::Untrusted(block) => (u.status.error, u.status.block) = (None, Some(block.clone())),
                other => u.status.error = Some(other.to_string()),
            }
            *u.errors.entry(error.kind()).or_default() += 1;
        });
        // Until the store is read, the ledger has to do, whatever the error was.
        if let Some(snapshot) = self.kept.take().filter(|_| !self.proven) {
            tracing::warn!(apps = snapshot.apps.len(), "going on with what was kept on disk");
            self.updates.send_modify(|u| u.snapshot = Some(Arc::new(snapshot)));
        }
    }

    /// Keeps the reason of a refusal over a restart too: else a store that is restored key by key would be taken half-way.
    fn quarantine(&mut self, block: &StoreBlock) {
        if self.trust.quarantine.as_ref() == Some(block) && self.quarantine_persisted {
            return;
        }
        self.trust.quarantine = Some(block.clone());
        if let (Some(identity), Some(key)) = (self.trust.identity.clone(), self.key.clone()) {
            let ledger = Ledger {
                identity,
                // The refused read proves nothing.
                saved: self.updates.borrow().status.synced.unwrap_or_else(Timestamp::now),
                contents: self.contents.clone(),
                key,
                last_good: self.last_good.kept().clone(),
                quarantine: Some(block.clone()),
                fence: Some(self.fence.record()),
                fleet_acceptance: self.trust.fleet_acceptance.clone(),
            };
            let written = self.write(&ledger);
            self.quarantine_persisted = written.is_ok();
            written.unwrap_or_else(|e| tracing::warn!("{e}"));
        }
    }

    fn write(&self, ledger: &Ledger) -> Result<(), String> {
        self.disk.write_ledger(&ledger.text(&self.viewer.host, &self.prefix))
    }

    /// Clears an acceptance on this host that was needed, or that was there before a read that was trusted without it: else
    /// it would count for the same refusal another day. A read that began before it says nothing of it.
    fn clear_acceptance(&self, needed: bool, found: &Identity) {
        let was_there =
            self.acceptance_at_read_start.is_some() && self.acceptance_at_read_start == self.disk.acceptance();
        if needed || was_there && self.acceptance().is_settled_by(found) {
            self.disk.clear_acceptance();
        }
    }

    fn acceptance(&self) -> Acceptance {
        // One that cannot be read accepts nothing.
        let accepted = self.disk.acceptance().and_then(|text| serde_json::from_slice::<Acceptance>(&text).ok());
        accepted.filter(|accepted| accepted.is_valid(Timestamp::now())).unwrap_or_default()
    }

    fn judge(&mut self, found: Found<'_>, fleet: Option<&FleetAcceptance>) -> Result<bool, StoreError> {
        let accepted = Acceptances { host: self.acceptance(), fleet: fleet.cloned() };
        self.trust.judge(found, &self.contents, self.viewer.brake, &accepted).map_err(|block| {
            let other_cluster = self.trust.identity.as_ref().is_some_and(|known| known.etcd != found.identity.etcd);
            self.rejected.get_or_insert_default().other_cluster = other_cluster;
            StoreError::Untrusted(block)
        })
    }

    fn continuity(&self, reading: &Reading, snapshot: &Snapshot) -> Continuity {
        let is_unchanged = self.accepted.as_ref().is_some_and(|accepted| accepted.has_same_effect(snapshot));
        let fence = self.fence_at_read_start.compare(reading.fence.as_ref());
        // A key that was deleted before the last accepted revision is of an earlier state of the store. One that was
        // created since the store was last read may have been missed by the watch.
        let is_back = |(key, entry): (&Vec<u8>, &Entry)| {
            entry.modified() <= self.contents.revision
                && entry.created() <= self.complete_at
                && !self.contents.entries.contains_key(key)
        };
        let has_newest = reading.has_newest && !reading.contents.entries.iter().any(is_back);
        Continuity::Read { fence, has_newest, is_unchanged }
    }

    /// Judges a read before anything is written to its store, which may have no release key yet.
    ///
    /// # Errors
    /// Why it is not trusted.
    pub fn check(&mut self, reading: &Reading) -> Result<(), StoreError> {
        let key = self.key.clone().unwrap_or_else(|| ReleaseKey::new(""));
        let snapshot = self.interpreter.clone().snapshot(&reading.contents, &key);
        let continuity = self.continuity(reading, &snapshot);
        let found = Found { identity: &reading.identity, contents: &reading.contents, snapshot: &snapshot, continuity };
        self.judge(found, reading.fleet_acceptance.as_ref()).map(|_| ())
    }

    /// Takes a full read, with the key that release ids are made with from now on. Returns true if it is trusted only
    /// because a person accepted it: a watch that was opened before may be of another store.
    ///
    /// # Errors
    /// If it is not trusted, or cannot be kept on disk. Then nothing changes.
    pub fn take_read(&mut self, reading: Reading, key: ReleaseKey) -> Result<bool, StoreError> {
        let revision = reading.contents.revision;
        // On a copy, so that what is not trusted leaves nothing behind.
        let mut interpreter = self.interpreter.clone();
        let snapshot = interpreter.snapshot(&reading.contents, &key);
        let continuity = self.continuity(&reading, &snapshot);
        let Reading { contents, identity, fence, fleet_acceptance: fleet, .. } = reading;
        // The release key may have been made since.
        let identity = Identity { key: Some(fingerprint(&key)), ..identity };
        let found = Found { identity: &identity, contents: &contents, snapshot: &snapshot, continuity };
        let needed = self.judge(found, fleet.as_ref())?;
        let is_same = self.proven && self.contents.entries == contents.entries && self.key.as_ref() == Some(&key);
        let mut record = self.fence.record();
        let fence_match = self.fence_at_read_start.compare(fence.as_ref());
        // An older fence is that of a store in which nothing has changed for this host: it counts from there.
        let is_new_store =
            needed || self.accepted.is_none() || record == FenceRecord::default() || fence_match == FenceMatch::Older;
        if is_new_store {
            record = FenceRecord::rebased(fence.as_ref());
        } else if fence_match == FenceMatch::Current {
            acknowledge(&mut record, fence.as_ref());
        } else {
            tracing::warn!(
                "the store has no up-to-date fence of this host, and is trusted by its history; writing it anew"
            );
        }
        let must_fence = is_new_store || !matches!(fence_match, FenceMatch::Current);
        // An acceptance for the fleet is used up by the first read that shows it, needed or not.
        let fleet = fleet.map(|fleet| fleet.id).or_else(|| self.trust.fleet_acceptance.clone());
        let next = Accepting { interpreter, contents, key, identity, snapshot, record, must_fence, fleet };
        let snapshot = self.accept(next, needed)?;
        self.rejected = None;
        (self.shown, self.complete_at) = (revision, revision);
        self.publish((!is_same).then_some(snapshot), revision, revision);
        self.updates.send_if_modified(|u| {
            // Of another store, or of an older state, both may be less than before.
            (u.head, u.read_to) = (revision, revision);
            u.reads += 1;
            false
        });
        self.write_head();
        Ok(needed)
    }

    /// Accepts contents. The ledger is written before anything is done by them: an agent that starts without the store
    /// must never go back behind what an earlier one has done. Contents that change nothing on this host need no write.
    fn accept(&mut self, next: Accepting, needed: bool) -> Result<Arc<Snapshot>, StoreError> {
        let Accepting { interpreter, contents, key, identity, snapshot, mut record, must_fence, fleet } = next;
        let mut last_good = self.last_good.clone();
        last_good.follow(&self.contents, &snapshot);
        let has_effect = !self.accepted.as_ref().is_some_and(|accepted| accepted.has_same_effect(&snapshot));
        if has_effect || must_fence {
            let nonce = random_id().map_err(|source| StoreError::File { path: "/dev/urandom".into(), source })?;
            record.advance(Nonce::new(&nonce[..16]));
        }
        let is_on_disk = self.proven
            && !has_effect
            && !must_fence
            && self.trust.quarantine.is_none()
            && self.trust.fleet_acceptance == fleet
            && self.key.as_ref() == Some(&key);
        if !is_on_disk {
            let ledger = Ledger {
                identity: identity.clone(),
                saved: Timestamp::now(),
                contents: contents.clone(),
                key: key.clone(),
                last_good: last_good.kept().clone(),
                quarantine: None,
                fence: Some(record.clone()),
                fleet_acceptance: fleet.clone(),
            };
            self.write(&ledger).map_err(StoreError::Ledger)?;
            self.quarantine_persisted = false;
        }
        self.clear_acceptance(needed, &identity);
        self.fence.replace(record);
        self.trust.fleet_acceptance = fleet;
        self.trust.accept(identity, &snapshot);
        if needed {
            // An accepted removal does not count towards the next one.
            self.trust.removed_recently.clear();
        }
        let snapshot = Arc::new(snapshot);
        self.accepted = Some(snapshot.clone());
        (self.interpreter, self.contents, self.last_good) = (interpreter, contents, last_good);
        (self.key, self.proven) = (Some(key), true);
        Ok(snapshot)
    }

    /// Compares the cache with what the store says was written.
    pub fn take_proof(&mut self, proof: &Proof) -> ProofResult {
        let is_current =
            |known: &Identity| known.etcd == proof.etcd && known.key == proof.key && known.revision <= proof.revision;
        let is_same_store = self.rejected.is_none()
            && self.trust.identity.as_ref().is_some_and(is_current)
            && !matches!(
                self.fence_at_read_start.compare(proof.fence.as_ref()),
                FenceMatch::Missing | FenceMatch::Older
            );
        if !is_same_store {
            return ProofResult::OtherStore;
        }
        if !self.contents.matches(proof.total, self.proven_to(), &proof.written) {
            return ProofResult::Differs;
        }
        // An acceptance that this host does not need is used up by being seen.
        if let Some(fleet) = &proof.fleet_acceptance {
            self.trust.fleet_acceptance = Some(fleet.id.clone());
        }
        self.contents.revision = self.contents.revision.max(proof.revision);
        self.shown = self.shown.max(proof.revision);
        self.complete_at = self.complete_at.max(proof.revision);
        if let Some(known) = &mut self.trust.identity {
            known.revision = proof.revision;
        }
        self.publish(None, proof.revision, proof.revision);
        self.updates.send_if_modified(|u| {
            u.resyncs += 1;
            false
        });
        self.write_head();
        ProofResult::Same
    }

    /// Takes one message of the watch. While the store is not trusted, it is only a reason to read it again.
    ///
    /// # Errors
    /// If what it leads to is not trusted, or cannot be kept on disk. Then nothing changes.
    pub fn take_news(&mut self, news: News) -> Result<(), StoreError> {
        if let Some(rejected) = &mut self.rejected {
            rejected.changed_since |= !news.changes.is_empty();
            return Ok(());
        }
        let (silent, newest) = (news.changes.is_empty(), news.changes.iter().map(|c| c.revision).max());
        let mut changed = false;
        // What is not trusted is dropped, so it is changed on a copy; most messages change nothing.
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
                snapshot = Some(self.take_watched(contents, key, news.etcd, newest)?);
            } else {
                self.contents = contents;
            }
        }
        // A message without changes says that there was nothing else up to its revision.
        let read_to = if silent && !news.opened { news.head } else { self.shown };
        self.publish(snapshot, news.head, read_to);
        Ok(())
    }

    fn take_watched(
        &mut self,
        contents: Contents,
        key: ReleaseKey,
        etcd: u64,
        revision: i64,
    ) -> Result<Arc<Snapshot>, StoreError> {
        let identity = Identity { cluster: contents.cluster(), etcd, revision, key: Some(fingerprint(&key)) };
        let mut interpreter = self.interpreter.clone();
        let snapshot = interpreter.snapshot(&contents, &key);
        let continuity = Continuity::Watched;
        let found = Found { identity: &identity, contents: &contents, snapshot: &snapshot, continuity };
        let needed = self.judge(found, None)?;
        let (record, fleet) = (self.fence.record(), self.trust.fleet_acceptance.clone());
        self.accept(
            Accepting { interpreter, contents, key, identity, snapshot, record, must_fence: false, fleet },
            needed,
        )
    }

    /// Publishes an update. Without a new snapshot only the time of the last proof changes, which wakes no receiver.
    fn publish(&self, snapshot: Option<Arc<Snapshot>>, head: i64, read_to: i64) {
        let revision = self.shown;
        let etcd = self.trust.identity.as_ref().map_or(0, |known| known.etcd);
        self.updates.send_if_modified(|u| {
            u.etcd = etcd;
            let recovered = u.status.error.take().is_some() | u.status.block.take().is_some();
            u.status.stale_since = None;
            u.trusted = true;
            u.status.revision = revision;
            u.head = u.head.max(head);
            u.read_to = u.read_to.max(read_to);
            u.status.synced = Some(Timestamp::now());
            u.proven = Some(Instant::now());
            let has_news = snapshot.is_some();
            if let Some(snapshot) = snapshot {
                u.snapshot = Some(snapshot);
                u.seen = Some(Instant::now());
            }
            has_news || recovered
        });
    }

    /// Keeps how far the store was read, if others have written since.
    fn write_head(&mut self) {
        let Some(identity) = self.trust.identity.as_ref().filter(|known| known.revision != self.head_written) else {
            return;
        };
        self.head_written = identity.revision;
        let head = Head { etcd: identity.etcd, revision: identity.revision, proven: Timestamp::now() };
        self.disk.write_head(&json(&head).into_bytes());
    }
}

/// What a comparison of the cache with the store shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProofResult {
    /// Nothing is missing.
    Same,
    /// The contents differ. The watch may have lost a change, or not brought it yet.
    Differs,
    /// It may not be the accepted store in its latest state, or the last read is not trusted.
    OtherStore,
}

/// Contents that are trusted, and what follows from them.
struct Accepting {
    interpreter: Interpreter,
    contents: Contents,
    key: ReleaseKey,
    identity: Identity,
    snapshot: Snapshot,
    record: FenceRecord,
    /// True if the store is to get a new nonce even if nothing changes on this host.
    must_fence: bool,
    /// The id of the last acceptance for the fleet that this host has taken.
    fleet: Option<String>,
}

/// Records that the store holds the nonces of its fence.
fn acknowledge(record: &mut FenceRecord, found: Option<&Fence>) {
    for nonce in found.iter().flat_map(|fence| &fence.nonces) {
        record.acknowledge(nonce);
    }
}
