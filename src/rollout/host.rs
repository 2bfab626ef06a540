//! The records of rollouts that concern this host, and the writes of its turns.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use tokio::sync::{
    mpsc::{UnboundedReceiver, UnboundedSender},
    watch::{Receiver, Sender},
};
use tokio_util::sync::CancellationToken;

use super::{is_trusted, trusted};
use crate::{
    fleet::{
        records::{RawRecord, Records},
        turn::HostRecords,
    },
    metrics::Metrics,
    model::{
        desired::Target,
        fleet::{FleetKey, KeptEnv, KeptRelease, RolloutPhase, Transaction, TransactionKind, Write},
        name::{AppName, HostName, ReleaseId},
        release::ReleaseKey,
    },
    retry::Retry,
    store::{Audit, Change, FleetSession, Lease, MadeFrom, StoreError, Update, client::EtcdConfig, parse_fleet},
};

/// Between two looks at the rights of this agent, if they do not suffice.
const DENIED: Duration = Duration::from_secs(15);

/// What the store says about the turns of this host.
#[derive(Debug, Clone, Default)]
pub struct HostRollouts {
    /// By app; an app without an entry has no records.
    pub records: BTreeMap<AppName, HostRecords>,
    /// Kept releases that this host may have to go back to.
    pub kept: BTreeMap<(AppName, ReleaseId), Target>,
}

/// A write about the turn of an app.
#[derive(Debug)]
pub struct Request {
    /// The app.
    pub app: AppName,
    /// What is to be written.
    pub transaction: Transaction,
}

/// What became of a write.
#[derive(Debug)]
pub struct Answer {
    /// The app.
    pub app: AppName,
    /// What was to be written.
    pub kind: TransactionKind,
    /// Whether it was; `None` if that is unknown, or the store could not be reached.
    pub made: Option<bool>,
}

/// What connects the loop of an agent with the records of its turns.
#[derive(Debug)]
pub struct Link {
    /// This run of the agent.
    pub run: String,
    /// False if the etcd role of this agent does not allow it to take turns.
    pub takes_turns: Receiver<bool>,
    /// Whether it then waits, rather than converge by itself.
    required: bool,
    /// The records; `None` before they were read for the first time.
    pub rollouts: Receiver<Option<Arc<HostRollouts>>>,
    /// Writes.
    pub requests: UnboundedSender<Request>,
    /// What became of them, in their order.
    pub answers: UnboundedReceiver<Answer>,
}

/// The other end of a [`Link`].
pub struct Ends {
    takes_turns: Sender<bool>,
    rollouts: Sender<Option<Arc<HostRollouts>>>,
    requests: UnboundedReceiver<Request>,
    answers: UnboundedSender<Answer>,
}

impl Link {
    /// Both ends, for this run of an agent. With `required` it waits if it lacks the rights to take turns.
    pub fn new(run: String, required: bool) -> (Self, Ends) {
        let (rollouts_out, rollouts) = tokio::sync::watch::channel(None);
        let (takes_turns_out, takes_turns) = tokio::sync::watch::channel(true);
        let (requests, requests_in) = tokio::sync::mpsc::unbounded_channel();
        let (answers_out, answers) = tokio::sync::mpsc::unbounded_channel();
        let ends =
            Ends { takes_turns: takes_turns_out, rollouts: rollouts_out, requests: requests_in, answers: answers_out };
        (Self { run, takes_turns, required, rollouts, requests, answers }, ends)
    }

    /// Whether this host converges by itself: it may not take turns, never has in this run, and its file does not ask for
    /// them. Where turns were taken, what is held stays held.
    pub fn is_alone(&self) -> bool {
        !*self.takes_turns.borrow() && !self.required && self.rollouts.borrow().is_none()
    }
}

/// Keeps the records of this host, and makes its writes, until cancelled. While the store cannot be read, the records are
/// as they were last: every write compares what it was decided from.
pub async fn follow(
    config: EtcdConfig,
    host: HostName,
    mut updates: Receiver<Update>,
    leases: Receiver<Option<Lease>>,
    mut ends: Ends,
    metrics: Arc<Metrics>,
    token: CancellationToken,
) {
    let mut retry = Retry::new(Duration::from_millis(100), Duration::from_secs(5));
    let (mut turn, mut was_denied) = (0, false);
    let mut kept = BTreeMap::new();
    loop {
        let ended = {
            let Ends { takes_turns, rollouts, requests, answers, .. } = &mut ends;
            let opening = async {
                let etcd = trusted(&mut updates).await?;
                Some(Follower::open(&config, turn, &host, etcd).await)
            };
            let Some(opened) = refusing(requests, answers, opening, &token).await else { return };
            match opened {
                Ok(follower) => {
                    let mut follower = Follower { kept: std::mem::take(&mut kept), ..follower };
                    set(takes_turns, true);
                    was_denied = false;
                    let io =
                        Io { rollouts, requests, answers, updates: &mut updates, leases: &leases, metrics: &metrics };
                    let ended = follower.run(io, &token).await;
                    kept = follower.kept;
                    if follower.has_published {
                        retry.reset();
                    }
                    ended
                }
                Err(e) => Err(e),
            }
        };
        let mut pause = retry.pause();
        match ended {
            Ok(()) if token.is_cancelled() => return,
            Ok(()) => {}
            Err(e) if e.is_of_rights() => {
                if !std::mem::replace(&mut was_denied, true) {
                    tracing::warn!("this host cannot take turns in rollouts: {e}; docs/rollouts.md has the rights");
                }
                // The leader is not to count on this host.
                set(&ends.takes_turns, false);
                pause = DENIED;
            }
            Err(e) => tracing::debug!("the records of rollouts cannot be followed now: {e}"),
        }
        turn += 1;
        let pause = async {
            tokio::time::sleep(pause).await;
            Some(())
        };
        if refusing(&mut ends.requests, &mut ends.answers, pause, &token).await.is_none() {
            return;
        }
    }
}

/// Tells whether this host takes turns, if that is new.
fn set(takes_turns: &Sender<bool>, value: bool) {
    takes_turns.send_if_modified(|known| std::mem::replace(known, value) != value);
}

/// Waits for a result; writes are refused meanwhile, so that no app waits for the store. `None` if cancelled.
async fn refusing<T>(
    requests: &mut UnboundedReceiver<Request>,
    answers: &mut UnboundedSender<Answer>,
    result: impl Future<Output = Option<T>>,
    token: &CancellationToken,
) -> Option<T> {
    tokio::pin!(result);
    loop {
        tokio::select! {
            biased;
            () = token.cancelled() => return None,
            result = &mut result => return result,
            Some(Request { app, transaction }) = requests.recv() => {
                // The loop may be gone.
                let _ = answers.send(Answer { app, kind: transaction.kind, made: None });
            }
        }
    }
}

struct Io<'a> {
    rollouts: &'a Sender<Option<Arc<HostRollouts>>>,
    requests: &'a mut UnboundedReceiver<Request>,
    answers: &'a UnboundedSender<Answer>,
    updates: &'a mut Receiver<Update>,
    leases: &'a Receiver<Option<Lease>>,
    metrics: &'a Metrics,
}

/// One connection.
struct Follower {
    session: FleetSession,
    host: HostName,
    etcd: u64,
    key: Option<ReleaseKey>,
    records: Records,
    revision: i64,
    audit: Audit,
    kept: BTreeMap<(AppName, ReleaseId), Target>,
    has_published: bool,
}

impl Follower {
    async fn open(config: &EtcdConfig, turn: usize, host: &HostName, etcd: u64) -> Result<Self, StoreError> {
        let session = FleetSession::open(config, turn).await?;
        session.try_rights().await?;
        let ranges = session.host_ranges(host);
        let reading = session.read(&ranges).await?;
        let mut follower = Self {
            audit: Audit::new(&ranges, reading.revision, reading.entries.len(), config.resync),
            key: session.release_key().await?,
            session,
            host: host.clone(),
            // Of another etcd nothing is taken: the loop of `run` ends at once.
            etcd: if reading.etcd == etcd { etcd } else { 0 },
            records: Records::default(),
            revision: reading.revision,
            kept: BTreeMap::new(),
            has_published: false,
        };
        for (key, entry) in &reading.entries {
            follower.take(key, Some((entry.value(), entry.created(), entry.modified())));
        }
        Ok(follower)
    }

    fn take(&mut self, key: &[u8], raw: Option<(&[u8], i64, i64)>) {
        let Some(key) = parse_fleet(key) else { return };
        let raw = raw.map(|(value, created, modified)| RawRecord { value, created, modified });
        let name = format!("{key:?}");
        if !self.records.take(key, raw) {
            tracing::warn!("the record {name} cannot be read by this version; nothing is done by it");
        }
    }

    async fn run(&mut self, io: Io<'_>, token: &CancellationToken) -> Result<(), StoreError> {
        if !is_trusted(io.updates, self.etcd) {
            return Ok(());
        }
        let [rollouts, permits, proofs, lost, verdicts, commands_and_digests] = self.session.host_ranges(&self.host);
        let mut rollouts = self.session.watch(rollouts, self.revision + 1).await?;
        let mut permits = self.session.watch(permits, self.revision + 1).await?;
        // Few and rare; a person may delete them, and this host then writes again what it knows.
        let mut proofs = self.session.watch(proofs, self.revision + 1).await?;
        let mut lost = self.session.watch(lost, self.revision + 1).await?;
        let mut verdicts = self.session.watch(verdicts, self.revision + 1).await?;
        let mut commands_and_digests = self.session.watch(commands_and_digests, self.revision + 1).await?;
        self.publish(io.rollouts).await?;
        loop {
            tokio::select! {
                biased;
                () = token.cancelled() => return Ok(()),
                changed = io.updates.changed() => {
                    if changed.is_err() || !is_trusted(io.updates, self.etcd) {
                        return Ok(());
                    }
                }
                news = rollouts.next() => self.take_changes(&news?.0),
                news = permits.next() => self.take_changes(&news?.0),
                news = proofs.next() => self.take_changes(&news?.0),
                news = lost.next() => self.take_changes(&news?.0),
                news = verdicts.next() => self.take_changes(&news?.0),
                news = commands_and_digests.next() => self.take_changes(&news?.0),
                () = tokio::time::sleep_until(self.audit.due) => {
                    if !self.session.audit(&mut self.audit).await? {
                        tracing::warn!("a watch of rollouts has lost what was written; everything is read again");
                        return Ok(());
                    }
                    continue;
                }
                Some(request) = io.requests.recv() => {
                    let kind = request.transaction.kind;
                    let lease = *io.leases.borrow();
                    let written = match lease {
                        Some(lease) => self.session.commit(&request.transaction, lease.id).await,
                        None => Ok(None),
                    };
                    if let Ok(Some(revision)) = written {
                        self.apply(&request.transaction, revision);
                        self.publish(io.rollouts).await?;
                    }
                    tracing::debug!(app = %request.app, kind = kind.as_str(), made = ?written.as_ref().ok(), "turn");
                    let made = written.as_ref().ok().map(Option::is_some).filter(|_| lease.is_some());
                    io.metrics.rollout_written(kind, made);
                    let _ = io.answers.send(Answer { app: request.app, kind, made });
                    written?;
                    continue;
                }
            }
            self.publish(io.rollouts).await?;
        }
    }

    fn take_changes(&mut self, changes: &[Change]) {
        self.audit.take(changes);
        for change in changes {
            let Some(key) = &change.key else { continue };
            let value = change.value.as_ref();
            self.take(key, value.map(|entry| (entry.value(), entry.created(), entry.modified())));
        }
    }

    /// Takes what this host wrote itself, before the watches bring it.
    fn apply(&mut self, transaction: &Transaction, revision: i64) {
        for write in &transaction.writes {
            match write {
                Write::Put(key, value) => {
                    let created = self.created(key).unwrap_or(revision);
                    let raw = RawRecord { value: value.as_bytes(), created, modified: revision };
                    self.records.take(key.clone(), Some(raw));
                }
                Write::Delete(key) => drop(self.records.take(key.clone(), None)),
            }
        }
    }

    fn created(&self, key: &FleetKey) -> Option<i64> {
        match key {
            FleetKey::Permit(host, app) => Some(self.records.permits.get(&(app.clone(), host.clone()))?.created),
            FleetKey::Proof(host, app) => Some(self.records.proofs.get(&(app.clone(), host.clone()))?.created),
            FleetKey::Command(app, release) => {
                Some(self.records.commands.get(&(app.clone(), release.clone()))?.created)
            }
            _ => None,
        }
    }

    /// Hands the records to the loop at once, and again with what hosts may have to go back to, if that has to be read.
    async fn publish(&mut self, out: &Sender<Option<Arc<HostRollouts>>>) -> Result<(), StoreError> {
        self.send(out);
        if self.fetch_kept().await? {
            self.send(out);
        }
        Ok(())
    }

    fn send(&mut self, out: &Sender<Option<Arc<HostRollouts>>>) {
        let records = &self.records;
        let own = |(_, host): &&(AppName, HostName)| *host == self.host;
        let apps: BTreeSet<&AppName> = records
            .rollouts
            .keys()
            .chain(records.permits.keys().filter(own).map(|(app, _)| app))
            .chain(records.proofs.keys().filter(own).map(|(app, _)| app))
            .chain(records.lost.keys().filter(own).map(|(app, _)| app))
            .collect();
        let of = |app: &AppName| {
            let key = (app.clone(), self.host.clone());
            let verdicts = records.verdicts.iter().filter(|((a, _, host), _)| a == app && *host == self.host);
            let commands = records.commands.iter().filter(|((a, _), _)| a == app);
            let digests = records.digests.iter().filter(|((a, _), _)| a == app);
            HostRecords {
                rollout: records.rollouts.get(app).cloned(),
                permit: records.permits.get(&key).cloned(),
                lost: records.lost.get(&key).cloned(),
                proof: records.proofs.get(&key).cloned(),
                verdicts: verdicts.map(|((_, release, _), v)| (release.clone(), v.value.clone())).collect(),
                commands: commands.map(|((_, release), run)| (release.clone(), run.clone())).collect(),
                digests: digests.map(|((_, release), image)| (release.clone(), image.clone())).collect(),
            }
        };
        let records = apps.into_iter().map(|app| (app.clone(), of(app))).collect();
        self.has_published = true;
        out.send_replace(Some(Arc::new(HostRollouts { records, kept: self.kept.clone() })));
    }

    /// Reads the releases that hosts may have to go back to. One that is not kept, or was made in another way, is left out.
    /// Returns whether any was read.
    async fn fetch_kept(&mut self) -> Result<bool, StoreError> {
        let Some(key) = &self.key else { return Ok(false) };
        let needed: BTreeSet<(AppName, ReleaseId)> = self
            .records
            .rollouts
            .iter()
            .filter_map(|(app, stored)| {
                let rollout = stored.value.as_ref()?;
                let release = match rollout.phase {
                    RolloutPhase::Done => None,
                    RolloutPhase::Restored => Some(&rollout.release).filter(|_| rollout.pinned),
                    _ => rollout.from.as_ref(),
                };
                Some((app.clone(), release?.clone()))
            })
            .collect();
        self.kept.retain(|key, _| needed.contains(key));
        let mut is_new = false;
        for (app, release) in needed.into_iter().filter(|key| !self.kept.contains_key(key)).collect::<Vec<_>>() {
            let text = self.session.get(&FleetKey::Kept(app.clone(), release.clone())).await?;
            let env = self.session.get(&FleetKey::KeptEnv(app.clone(), release.clone())).await?;
            let parsed = text.zip(env).and_then(|(text, env)| {
                let kept: KeptRelease = serde_json::from_slice(&text).ok()?;
                let env: KeptEnv = serde_json::from_slice(&env).ok()?;
                Some(MadeFrom { spec: kept.spec, image: kept.image, restart: kept.restart, env: env.sets })
            });
            let target = parsed.and_then(|made_from| made_from.target(&app, key).ok());
            if let Some(target) = target.filter(|target| target.release.id == release) {
                self.kept.insert((app, release), target);
                is_new = true;
            }
        }
        Ok(is_new)
    }
}
