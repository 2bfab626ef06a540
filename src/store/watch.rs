//! List, then watch from the next revision. After any gap: list again.

use std::{sync::Arc, time::Duration};

use etcd_client::{Event, EventType, WatchOptions, WatchResponse, WatchStream};
use futures_util::FutureExt as _;
use tokio::{sync::watch::Sender, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    belief::{Belief, Change, News, Update, Viewer},
    claim::Claim,
    client::{Connection, EtcdConfig, StoreError},
    ledger::Shelf,
    read::{Entry, make_release_key, read, release_key},
};
use crate::{
    model::release::ReleaseKey,
    retry::{Retry, jittered},
};

/// How often the watch is asked for a sign of life, and how long it may take to give one.
const PROGRESS: Duration = Duration::from_secs(10);
/// Most changes that are taken at once.
const GATHERED: usize = 10_000;
/// The watch must have worked for this long before failures count from one again.
const STEADY: Duration = Duration::from_secs(60);
/// How often it is looked whether a store that is not believed is to be read again: a person may be about to accept it, or
/// to put it back.
const DOUBTFUL: Duration = Duration::from_secs(3);

/// Keeps `updates` as the store is, until cancelled. While the store cannot be read, it is as it was last.
pub async fn watch(
    config: EtcdConfig,
    viewer: Viewer,
    shelf: Arc<dyn Shelf>,
    claim: Arc<Claim>,
    updates: Sender<Update>,
    token: CancellationToken,
) {
    let resync = viewer.resync;
    let mut belief = Belief::new(config.prefix.clone(), viewer, shelf, updates);
    belief.recall();
    let mut watcher =
        Watcher { config, resync, claim, belief, read_to: 0, read_key: None, doubted: 0, told: String::new() };
    let mut retry = Retry::new(Duration::from_millis(100), Duration::from_secs(10));
    let mut turn = 0;
    loop {
        let began = Instant::now();
        let ended = tokio::select! {
            () = token.cancelled() => return,
            ended = watcher.session(turn) => ended,
        };
        turn += 1;
        let Err(error) = ended else { continue };
        watcher.fail(&error);
        if began.elapsed() > STEADY {
            retry.reset();
            watcher.told.clear();
        }
        let pause = if matches!(error, StoreError::Doubt(_)) { retry.pause().min(DOUBTFUL) } else { retry.pause() };
        tokio::select! {
            () = token.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// What the watch gives.
type Message = Result<Option<WatchResponse>, etcd_client::Error>;

struct Watcher {
    config: EtcdConfig,
    resync: Duration,
    claim: Arc<Claim>,
    belief: Belief,
    /// The revision of the last read, whether it was believed or not, and the release key there.
    read_to: i64,
    read_key: Option<ReleaseKey>,
    /// How many members in a row were not believed.
    doubted: usize,
    /// The last trouble, in words.
    told: String,
}

impl Watcher {
    /// One connection, from its first read to whatever ends it. It ends well if nothing is wrong with it, and another one may
    /// lead to a store that is believed.
    async fn session(&mut self, turn: usize) -> Result<(), StoreError> {
        let connection = Connection::open(&self.config, turn).await?;
        self.read_all(&connection).await?;
        let (from, to) = self.config.prefix.intent();
        let mut client = connection.client.watch_client().max_decoding_message_size(256 << 20);
        let options = WatchOptions::new().with_range(to).with_start_revision(self.read_to + 1).with_fragment();
        // Opening waits for the first answer, which a member without a leader may never give.
        let opened = tokio::time::timeout(self.config.command_timeout, client.watch(from, Some(options))).await;
        let mut stream = match opened {
            Ok(opened) => opened.map_err(connection.failed("opening the watch"))?,
            Err(_) => return Err(silent(&connection, self.config.command_timeout)),
        };
        let mut resync_at = Instant::now() + jittered(self.resync);
        let mut asked = false;
        let mut sign_by = Instant::now() + PROGRESS;
        let mut look_at = Instant::now() + jittered(DOUBTFUL);
        loop {
            tokio::select! {
                message = stream.message() => {
                    self.take(&connection, message, &mut stream).await?;
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
                () = self.claim.doubted.notified() => self.read_all(&connection).await?,
                () = tokio::time::sleep_until(look_at), if self.belief.is_doubtful() => {
                    // The watch does not see the release key.
                    let key = release_key(&connection, &self.config.prefix).await?;
                    if self.belief.is_to_be_read() || key != self.read_key {
                        self.read_all(&connection).await?;
                    }
                    look_at = Instant::now() + jittered(DOUBTFUL);
                }
                // A name may lead elsewhere by now, and another member may be the right one.
                () = tokio::time::sleep_until(resync_at), if self.belief.is_doubtful() => return Ok(()),
                () = tokio::time::sleep_until(resync_at) => {
                    self.read_all(&connection).await?;
                    resync_at = Instant::now() + jittered(self.resync);
                }
            }
        }
    }

    async fn read_all(&mut self, connection: &Connection) -> Result<(), StoreError> {
        let was_doubtful = self.belief.is_doubtful();
        let ended = self.read(connection).await;
        self.survive(ended)?;
        if !self.belief.is_doubtful() {
            self.doubted = 0;
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
                self.doubted += 1;
                if self.doubted < self.config.endpoints.len() {
                    return Err(error);
                }
                self.fail(&error);
                Ok(())
            }
            other => other,
        }
    }

    fn fail(&mut self, error: &StoreError) {
        // The same trouble is news once.
        let text = error.to_string();
        let when = if error.is_about_contents() { "once it changes, or a person accepts it" } else { "soon" };
        if self.told == text {
            tracing::debug!(kind = error.kind(), "{text}; reading everything again {when}");
        } else {
            tracing::warn!(kind = error.kind(), "{text}; reading everything again {when}");
        }
        self.told = text;
        self.belief.fail(error);
    }

    async fn read(&mut self, connection: &Connection) -> Result<(), StoreError> {
        let landmark = self.belief.begin_read();
        let reading = read(connection, &self.config.prefix, landmark).await?;
        self.read_to = reading.contents.revision;
        self.read_key.clone_from(&reading.key);
        if self.claim.look(connection, &self.config.prefix).await? == 0 {
            // Nothing is written to a store that is not believed.
            self.belief.check(&reading)?;
            self.claim.take(connection, &self.config.prefix).await?;
        }
        let key = match &reading.key {
            Some(key) => key.clone(),
            None => {
                // Nothing is written to a store that is not believed.
                self.belief.check(&reading)?;
                make_release_key(connection, &self.config.prefix, self.belief.key()).await?
            }
        };
        self.belief.take_read(reading, key)
    }

    /// Takes a message of the watch, with all that has come meanwhile: each time something is believed, all of it is kept
    /// on disk.
    async fn take(
        &mut self,
        connection: &Connection,
        first: Message,
        stream: &mut WatchStream,
    ) -> Result<(), StoreError> {
        let mut news = self.news(connection, first)?;
        let mut ended = Ok(());
        while news.changes.len() < GATHERED
            && let Some(next) = stream.message().now_or_never()
        {
            match self.news(connection, next) {
                Ok(next) => news.add(next),
                Err(e) => {
                    ended = Err(e);
                    break;
                }
            }
        }
        // The watch does not see the release key. If it went too, this is no ordinary deletion.
        if news.deletes() && release_key(connection, &self.config.prefix).await?.is_none() {
            self.read_all(connection).await?;
        } else {
            let taken = self.belief.take_news(news);
            self.survive(taken)?;
        }
        ended
    }

    /// What a message of the watch says. Any that is neither news nor a sign of life ends the session: a cancelled watch
    /// stays open and says nothing for ever.
    fn news(&self, connection: &Connection, message: Message) -> Result<News, StoreError> {
        let ended = |reason: String| StoreError::Watch { endpoint: connection.endpoint.clone(), reason };
        let message = message.map_err(connection.failed("watching"))?.ok_or_else(|| ended("was closed".into()))?;
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
            let key = self.config.prefix.strip(kv.key()).map(<[u8]>::to_vec);
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

async fn ask(connection: &Connection, stream: &mut WatchStream) -> Result<(), StoreError> {
    stream.request_progress().await.map_err(connection.failed("asking the watch for progress"))
}

fn silent(connection: &Connection, after: Duration) -> StoreError {
    let reason = format!("gave no sign of life for {} s", after.as_secs());
    StoreError::Watch { endpoint: connection.endpoint.clone(), reason }
}
