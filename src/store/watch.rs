//! List, then watch from the next revision. After any gap: list again.

use std::{collections::BTreeMap, time::Duration};

use futures_util::FutureExt as _;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    cache::{DesiredCache, ProofResult},
    client::StoreError,
    source::{Session, Source, Watch},
    trust::FleetAcceptance,
    update::News,
};
use crate::{model::release::ReleaseKey, retry::Retry};

/// How often a progress message of the watch is requested, and how long it may take.
const PROGRESS: Duration = Duration::from_secs(10);
/// Most changes that are taken at once.
const GATHERED: usize = 10_000;
/// A watch must have worked for this long before failures count from one again.
const STEADY: Duration = Duration::from_secs(60);
/// Between two looks whether a store that is not trusted is to be read again: it may be being restored or accepted.
const UNTRUSTED_POLL: Duration = Duration::from_secs(3);
/// How soon members that did not answer are tried again while those that answered are not trusted.
const SILENT: Duration = Duration::from_secs(10);
/// A comparison that finds a difference is repeated after this pause, since the watch may be about to bring it; the last
/// one of so many leads to a full read.
const REPEAT_PROOF: Duration = Duration::from_millis(300);
const PROOFS: u32 = 4;
/// Between two full reads while the watch works and each resync finds nothing missing. What the comparison of a resync
/// cannot see is a deletion and a creation that a watch lost together.
const FULL_READ: Duration = Duration::from_secs(3600);

/// Keeps the cache as the store is, until cancelled. While the store cannot be read, the cache is as it was last.
pub async fn watch<S: Source>(source: S, mut cache: DesiredCache, token: CancellationToken) {
    cache.recall();
    let mut watcher = Watcher {
        source,
        cache,
        turn: 0,
        read_to: 0,
        read_key: None,
        read_acceptance: None,
        store_replaced: false,
        asked: BTreeMap::new(),
        last_error: String::new(),
    };
    let mut retry = Retry::new(Duration::from_millis(100), Duration::from_secs(10));
    loop {
        let began = Instant::now();
        let ended = tokio::select! {
            biased;
            () = token.cancelled() => return,
            ended = watcher.session() => ended,
        };
        if let Err(error) = ended {
            watcher.fail(&error);
            if began.elapsed() > STEADY {
                retry.reset();
                watcher.last_error.clear();
            }
            let pause = watcher.source.jittered(retry.step());
            let pause = if matches!(error, StoreError::Untrusted(_)) { pause.min(UNTRUSTED_POLL) } else { pause };
            tokio::select! {
                biased;
                () = token.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
        // The store that a person accepted is at this member.
        if !std::mem::take(&mut watcher.store_replaced) {
            watcher.turn += 1;
        }
    }
}

struct Watcher<S> {
    source: S,
    cache: DesiredCache,
    /// Counts connections; modulo the number of members, the member of this one.
    turn: usize,
    /// The revision of the last read, trusted or not, and the release key and acceptance that it found.
    read_to: i64,
    read_key: Option<ReleaseKey>,
    read_acceptance: Option<FleetAcceptance>,
    /// True if the last read was trusted only because a person accepted it: the watch is of another store.
    store_replaced: bool,
    /// Members that were asked since the store became untrusted, and whether they answered.
    asked: BTreeMap<usize, bool>,
    /// The text of the last error.
    last_error: String,
}

impl<S: Source> Watcher<S> {
    /// One connection, from its first read to its end. Returns `Ok` if nothing is wrong with it, and another member may
    /// have a store that is trusted.
    async fn session(&mut self) -> Result<(), StoreError> {
        let (resync, resync_requested) = (self.cache.resync(), self.source.resync_requested());
        let session = self.source.open(self.turn).await?;
        self.read_all(&session).await?;
        let from = self.read_to + 1;
        let mut watch = session.watch(from).await?;
        let (mut resync_at, mut differing) = (Instant::now() + self.source.jittered(resync), 0);
        let full_read_at = Instant::now() + self.source.jittered(FULL_READ);
        let others_at = Instant::now() + self.source.jittered(SILENT);
        let mut asked = false;
        let mut progress_by = Instant::now() + PROGRESS;
        let mut look_at = Instant::now() + self.source.jittered(UNTRUSTED_POLL);
        self.store_replaced = false;
        // A later read may be of another store, or of an older state of it. This watch does not tell what comes next there.
        while !self.store_replaced && self.read_to + 1 >= from {
            // Biased, so that a simulated history replays identically, a flood of news does not starve the rare arms, and
            // news that arrived in time counts as progress however late it is processed.
            tokio::select! {
                biased;
                () = resync_requested.notified() => self.read_all(&session).await?,
                () = tokio::time::sleep_until(look_at), if self.cache.is_untrusted() => {
                    if self.is_to_be_read(&session).await? {
                        self.read_all(&session).await?;
                    }
                    look_at = Instant::now() + self.source.jittered(UNTRUSTED_POLL);
                }
                // The endpoint's name may resolve elsewhere by now, and another member may have the right store.
                () = tokio::time::sleep_until(resync_at), if self.cache.is_untrusted() => return Ok(()),
                () = tokio::time::sleep_until(others_at), if self.cache.is_other_cluster() && self.is_one_silent() => {
                    return Ok(());
                }
                () = tokio::time::sleep_until(full_read_at), if !self.cache.is_untrusted() => return Ok(()),
                () = tokio::time::sleep_until(resync_at) => {
                    differing = if self.resync(&session, differing + 1 == PROOFS).await? { 0 } else { differing + 1 };
                    let pause = if differing == 0 { resync } else { REPEAT_PROOF.min(resync) };
                    resync_at = Instant::now() + self.source.jittered(pause);
                }
                news = watch.next() => {
                    self.take(&session, news?, &mut watch).await?;
                    asked = false;
                    progress_by = Instant::now() + PROGRESS;
                }
                () = tokio::time::sleep_until(progress_by) => {
                    if asked {
                        return Err(StoreError::silent(watch.endpoint(), PROGRESS * 2));
                    }
                    watch.ask().await?;
                    asked = true;
                    progress_by = Instant::now() + PROGRESS;
                }
            }
        }
        Ok(())
    }

    /// Compares the cache with what the store says was written. Returns false if that is to be repeated, since the watch
    /// may not have brought all of it yet; the `last` comparison reads everything instead.
    async fn resync(&mut self, session: &S::Session, last: bool) -> Result<bool, StoreError> {
        // Another agent may have taken the name since.
        let has_name = session.has_name().await?;
        let proof = session.prove(self.cache.begin_proof()).await?;
        let result = if has_name { self.cache.take_proof(&proof) } else { ProofResult::OtherStore };
        match result {
            ProofResult::Same => {}
            ProofResult::Differs if !last => return Ok(false),
            _ => self.read_all(session).await?,
        }
        Ok(true)
    }

    /// True if a store that is not trusted may have changed, or a person may have accepted it.
    async fn is_to_be_read(&self, session: &S::Session) -> Result<bool, StoreError> {
        let key = session.release_key().await?;
        let acceptance = session.fleet_acceptance().await?;
        Ok(self.cache.is_to_be_read() || key != self.read_key || acceptance != self.read_acceptance)
    }

    async fn read_all(&mut self, session: &S::Session) -> Result<(), StoreError> {
        let was_untrusted = self.cache.is_untrusted();
        let ended = self.read(session).await;
        self.survive(ended)?;
        if !self.cache.is_untrusted() {
            self.asked.clear();
            if was_untrusted {
                tracing::info!("the store is trusted again");
                self.last_error.clear();
            }
        }
        Ok(())
    }

    /// Once every member was asked, an untrusted read ends no session: the watch tells when there is a reason to read
    /// again, and a fleet that does not trust its store does not read all of it all the time.
    fn survive(&mut self, ended: Result<(), StoreError>) -> Result<(), StoreError> {
        match ended {
            Err(error) if error.is_about_contents() => {
                self.note_asked(true);
                if !self.has_asked_all() {
                    return Err(error);
                }
                self.fail(&error);
                Ok(())
            }
            other => other,
        }
    }

    fn note_asked(&mut self, answered: bool) {
        self.asked.insert(self.turn % self.source.members(), answered);
    }

    fn is_one_silent(&self) -> bool {
        self.asked.values().any(|answered| !answered)
    }

    fn has_asked_all(&self) -> bool {
        self.asked.len() >= self.source.members()
    }

    fn fail(&mut self, error: &StoreError) {
        // A member that does not answer cannot have the right store either.
        if self.cache.is_untrusted() || error.is_about_contents() {
            self.note_asked(error.is_about_contents());
        }
        // The same error is logged once as a warning.
        let text = error.to_string();
        let next = match error.is_about_contents() {
            true if self.has_asked_all() => "reading everything again once it changes, or a person accepts it",
            true => "asking the next member",
            false => "reading everything again soon",
        };
        if self.last_error == text {
            tracing::debug!(kind = error.kind(), "{text}; {next}");
        } else {
            tracing::warn!(kind = error.kind(), "{text}; {next}");
        }
        self.last_error = text;
        self.cache.fail(error);
    }

    async fn read(&mut self, session: &S::Session) -> Result<(), StoreError> {
        // Asked first: if another agent holds the name, there is no need to read anything.
        let has_name = session.has_name().await?;
        let newest = self.cache.begin_read();
        let reading = session.read(newest).await?;
        self.read_to = reading.contents.revision;
        self.read_key.clone_from(&reading.key);
        self.read_acceptance.clone_from(&reading.fleet_acceptance);
        // Nothing is written to a store that is not trusted.
        if !has_name {
            self.cache.check(&reading)?;
            session.take_name().await?;
        }
        let key = match &reading.key {
            Some(key) => key.clone(),
            None => {
                self.cache.check(&reading)?;
                session.make_release_key(self.cache.key()).await?
            }
        };
        self.store_replaced |= self.cache.take_read(reading, key)?;
        Ok(())
    }

    /// Takes a message of the watch and those that have arrived since, so that the ledger is written once for all of them.
    async fn take(
        &mut self,
        session: &S::Session,
        mut news: News,
        watch: &mut <S::Session as Session>::Watch,
    ) -> Result<(), StoreError> {
        let mut ended = Ok(());
        while news.changes.len() < GATHERED
            && let Some(next) = watch.next().now_or_never()
        {
            match next {
                Ok(next) => news.add(next),
                Err(e) => {
                    ended = Err(e);
                    break;
                }
            }
        }
        // The watch does not see the release key. If it went too, this is no ordinary deletion.
        if news.deletes() && session.release_key().await?.is_none() {
            self.read_all(session).await?;
        } else {
            let taken = self.cache.take_news(news);
            self.survive(taken)?;
        }
        ended
    }
}
