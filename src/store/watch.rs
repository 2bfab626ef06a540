//! List, then watch from the next revision. After any gap: list again.

use std::{collections::BTreeMap, time::Duration};

use futures_util::FutureExt as _;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    belief::{Belief, News},
    client::StoreError,
    source::{Session, Source, Watch},
};
use crate::{model::release::ReleaseKey, retry::Retry};

/// How often the watch is asked for a sign of life, and how long it may take to give one.
const PROGRESS: Duration = Duration::from_secs(10);
/// Most changes that are taken at once.
const GATHERED: usize = 10_000;
/// The watch must have worked for this long before failures count from one again.
const STEADY: Duration = Duration::from_secs(60);
/// How often it is looked whether a store that is not believed is to be read again: a person may be about to accept it, or
/// to put it back.
const DOUBTFUL: Duration = Duration::from_secs(3);
/// How soon members are asked again that did not answer, while others are not believed.
const SILENT: Duration = Duration::from_secs(10);

/// Keeps what is believed as the store is, until cancelled. While the store cannot be read, it is as it was last.
pub async fn watch<S: Source>(source: S, mut belief: Belief, token: CancellationToken) {
    belief.recall();
    let mut watcher = Watcher {
        source,
        belief,
        turn: 0,
        read_to: 0,
        read_key: None,
        exchanged: false,
        asked: BTreeMap::new(),
        told: String::new(),
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
                watcher.told.clear();
            }
            let pause = watcher.source.jittered(retry.step());
            let pause = if matches!(error, StoreError::Doubt(_)) { pause.min(DOUBTFUL) } else { pause };
            tokio::select! {
                biased;
                () = token.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
        // What a person accepted is at this member.
        if !std::mem::take(&mut watcher.exchanged) {
            watcher.turn += 1;
        }
    }
}

struct Watcher<S> {
    source: S,
    belief: Belief,
    /// Whose turn it is among the members.
    turn: usize,
    /// The revision of the last read, whether it was believed or not, and the release key there.
    read_to: i64,
    read_key: Option<ReleaseKey>,
    /// Whether a read was believed only since a person accepted it.
    exchanged: bool,
    /// Which members were asked since what was read is not believed, and whether they answered.
    asked: BTreeMap<usize, bool>,
    /// The last trouble, in words.
    told: String,
}

impl<S: Source> Watcher<S> {
    /// One connection, from its first read to whatever ends it. It ends well if nothing is wrong with it, and another one may
    /// lead to a store that is believed.
    async fn session(&mut self) -> Result<(), StoreError> {
        let (resync, doubted) = (self.belief.resync(), self.source.doubted());
        let session = self.source.open(self.turn).await?;
        self.read_all(&session).await?;
        let from = self.read_to + 1;
        let mut watch = session.watch(from).await?;
        let mut resync_at = Instant::now() + self.source.jittered(resync);
        let others_at = Instant::now() + self.source.jittered(SILENT);
        let mut asked = false;
        let mut sign_by = Instant::now() + PROGRESS;
        let mut look_at = Instant::now() + self.source.jittered(DOUBTFUL);
        self.exchanged = false;
        // What was read since may be of another store, or of an earlier day. Then this watch would tell nothing of what comes
        // next there, and may still tell of what was.
        while !self.exchanged && self.read_to + 1 >= from {
            // In this order: a history that is played goes the same way twice, no flood of news puts off what is rare, and
            // what has come is a sign of life, however late it is taken.
            tokio::select! {
                biased;
                () = doubted.notified() => self.read_all(&session).await?,
                () = tokio::time::sleep_until(look_at), if self.belief.is_doubtful() => {
                    let key = session.release_key().await?;
                    if self.belief.is_to_be_read() || key != self.read_key {
                        self.read_all(&session).await?;
                    }
                    look_at = Instant::now() + self.source.jittered(DOUBTFUL);
                }
                // A name may lead elsewhere by now, and another member may be the right one.
                () = tokio::time::sleep_until(resync_at), if self.belief.is_doubtful() => return Ok(()),
                () = tokio::time::sleep_until(others_at), if self.belief.is_elsewhere() && self.is_one_silent() => {
                    return Ok(());
                }
                () = tokio::time::sleep_until(resync_at) => {
                    self.read_all(&session).await?;
                    resync_at = Instant::now() + self.source.jittered(resync);
                }
                news = watch.next() => {
                    self.take(&session, news?, &mut watch).await?;
                    asked = false;
                    sign_by = Instant::now() + PROGRESS;
                }
                () = tokio::time::sleep_until(sign_by) => {
                    if asked {
                        return Err(StoreError::silent(watch.endpoint(), PROGRESS * 2));
                    }
                    watch.ask().await?;
                    asked = true;
                    sign_by = Instant::now() + PROGRESS;
                }
            }
        }
        Ok(())
    }

    async fn read_all(&mut self, session: &S::Session) -> Result<(), StoreError> {
        let was_doubtful = self.belief.is_doubtful();
        let ended = self.read(session).await;
        self.survive(ended)?;
        if !self.belief.is_doubtful() {
            self.asked.clear();
            if was_doubtful {
                tracing::info!("the store is believed again");
                self.told.clear();
            }
        }
        Ok(())
    }

    /// Once every member was asked, what is not believed ends no session: the watch tells whether there is a reason to read
    /// it again, and a fleet that does not believe its store does not read all of it all the time.
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
        // One that does not answer cannot tell better.
        if self.belief.is_doubtful() || error.is_about_contents() {
            self.note_asked(error.is_about_contents());
        }
        // The same trouble is news once.
        let text = error.to_string();
        let next = match error.is_about_contents() {
            true if self.has_asked_all() => "reading everything again once it changes, or a person accepts it",
            true => "asking the next member",
            false => "reading everything again soon",
        };
        if self.told == text {
            tracing::debug!(kind = error.kind(), "{text}; {next}");
        } else {
            tracing::warn!(kind = error.kind(), "{text}; {next}");
        }
        self.told = text;
        self.belief.fail(error);
    }

    async fn read(&mut self, session: &S::Session) -> Result<(), StoreError> {
        // Asked first: if it is somebody else's, there is no need to read anything.
        let has_name = session.has_name().await?;
        let landmark = self.belief.begin_read();
        let reading = session.read(landmark).await?;
        self.read_to = reading.contents.revision;
        self.read_key.clone_from(&reading.key);
        if !has_name {
            // Nothing is written to a store that is not believed.
            self.belief.check(&reading)?;
            session.take_name().await?;
        }
        let key = match &reading.key {
            Some(key) => key.clone(),
            None => {
                // Nothing is written to a store that is not believed.
                self.belief.check(&reading)?;
                session.make_release_key(self.belief.key()).await?
            }
        };
        self.exchanged |= self.belief.take_read(reading, key)?;
        Ok(())
    }

    /// Takes a message of the watch, with all that has come meanwhile: each time something is believed, all of it is kept
    /// on disk.
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
            let taken = self.belief.take_news(news);
            self.survive(taken)?;
        }
        ended
    }
}
