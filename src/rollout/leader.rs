//! The leader: one agent of the fleet at a time, on a lease of its own.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::watch::{Receiver, Sender},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    contents::{FleetContents, takes_turns},
    is_trusted, trusted,
};
use crate::{
    fleet::{
        leader::{FleetView, Intent, decide, is_canary},
        records::Stored,
    },
    metrics::{LeaderGauges, Metrics},
    model::{
        fleet::{
            Condition, FleetKey, KeptEnv, KeptRelease, Leader, PermitPhase, Rollout, Transaction, TransactionKind,
            VERSION, Write,
        },
        name::{AppName, HostName},
        problem::Problems,
        release::ReleaseKey,
        time::Timestamp,
    },
    retry::{Retry, jittered},
    store::{Audit, Change, Everywhere, FleetReading, FleetSession, StoreError, Term, Update, client::EtcdConfig},
};

/// How long a leader that is gone is still taken for one.
const TTL: Duration = Duration::from_secs(15);
/// Between two renewals. Decisions that follow from time alone, such as a promotion, are made this late at most.
const RENEWAL: Duration = Duration::from_secs(5);
/// A leader that was not answered for so long decides nothing more: its lease may end at any moment.
const UNANSWERED: Duration = Duration::from_secs(10);
/// After the end of another leader, agents wait for about this long, so that not all of them ask at once.
const SPREAD: Duration = Duration::from_millis(200);
/// Pause after a transaction that was refused, if the watch brings no reason for it.
const REFUSED: Duration = Duration::from_secs(1);

/// Between two looks at the rights of this agent, if they do not suffice.
const DENIED: Duration = Duration::from_secs(15);

/// Where a leader says what it does.
#[derive(Debug)]
pub struct LeaderOutlets {
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// What it knows while it leads.
    pub gauges: Sender<Option<LeaderGauges>>,
}

/// Leads whenever there is no leader, until cancelled.
pub async fn lead(
    config: EtcdConfig,
    host: HostName,
    run: String,
    mut updates: Receiver<Update>,
    outlets: LeaderOutlets,
    token: CancellationToken,
) {
    let mut retry = Retry::new(Duration::from_millis(200), Duration::from_secs(5));
    let (mut turn, mut was_denied) = (0, false);
    loop {
        let began = Instant::now();
        let ended = tokio::select! {
            biased;
            () = token.cancelled() => return,
            ended = session(&config, turn, (&host, &run), &mut updates, &outlets, &token) => ended,
        };
        if token.is_cancelled() {
            return;
        }
        let mut pause = retry.pause();
        match ended {
            Err(e) if e.is_of_rights() => {
                if !std::mem::replace(&mut was_denied, true) {
                    tracing::warn!("this agent cannot lead the fleet: {e}; docs/rollouts.md has the rights");
                }
                pause = DENIED;
            }
            Err(e) => tracing::debug!("this agent cannot lead now: {e}"),
            Ok(()) => was_denied = false,
        }
        if began.elapsed() > TTL {
            retry.reset();
        }
        turn += 1;
        tokio::select! {
            () = token.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// One connection: waits until there is no leader, then leads.
async fn session(
    config: &EtcdConfig,
    turn: usize,
    (host, run): (&HostName, &str),
    updates: &mut Receiver<Update>,
    outlets: &LeaderOutlets,
    token: &CancellationToken,
) -> Result<(), StoreError> {
    let Some(etcd) = trusted(updates).await else { return Ok(()) };
    let session = FleetSession::open(config, turn).await?;
    // A leader that cannot read the fleet would keep other agents from leading.
    session.try_rights_to_lead().await?;
    loop {
        let key = config.prefix.fleet(&FleetKey::Leader).into_bytes();
        let range = (key.clone(), [&key[..], &[0]].concat());
        let reading = session.read(std::slice::from_ref(&range)).await?;
        if reading.etcd != etcd || !is_trusted(updates, etcd) {
            return Ok(());
        }
        if reading.entries.is_empty() {
            let leader = Leader { version: VERSION, host: host.clone(), run: run.to_owned(), since: Timestamp::now() };
            let asked = Instant::now();
            if let Some(term) = session.lead(&leader, TTL).await? {
                tracing::info!(term = term.revision, "this agent leads the fleet");
                let ended = Leading::begin(session.clone(), host, term, etcd, (asked, config.resync)).await;
                let ended = match ended {
                    Ok(mut leading) => leading.run(updates, outlets, token).await,
                    Err(e) => Err(e),
                };
                outlets.gauges.send_replace(None);
                session.resign(term).await;
                tracing::info!(term = term.revision, "this agent leads no more");
                return ended;
            }
            continue;
        }
        if let Some(left) = left_behind(&reading, (host, run)) {
            // Its term has ended with it: what it may still write is refused without this key.
            session.commit(&left, 0).await?;
            continue;
        }
        let mut watch = session.watch(range, reading.revision + 1).await?;
        let is_gone = |changes: &[Change]| changes.iter().any(|change| change.value.is_none());
        loop {
            tokio::select! {
                changed = updates.changed() => if changed.is_err() || !is_trusted(updates, etcd) { return Ok(()) },
                news = watch.next() => if is_gone(&news?.0) { break },
            }
        }
        tokio::time::sleep(jittered(SPREAD)).await;
    }
}

/// Deletes the key of an earlier run of this agent, which was killed: only one run has the name of this host.
fn left_behind(reading: &FleetReading, (host, run): (&HostName, &str)) -> Option<Transaction> {
    let (_, entry) = reading.entries.first()?;
    let leader: Leader = serde_json::from_slice(entry.value()).ok()?;
    let conditions = vec![Condition::Modified(FleetKey::Leader, entry.modified())];
    let writes = vec![Write::Delete(FleetKey::Leader)];
    (leader.host == *host && leader.run != run).then_some(Transaction {
        kind: TransactionKind::Withdraw,
        conditions,
        writes,
    })
}

/// A term of this agent.
struct Leading {
    session: FleetSession,
    term: Term,
    etcd: u64,
    key: Option<ReleaseKey>,
    fleet: FleetContents,
    audit: Audit,
    revision: i64,
    /// The revision of the last write: nothing is decided before the view shows it.
    written: i64,
    gone: BTreeMap<HostName, Timestamp>,
    /// When the last renewal that was answered had been sent.
    renewed: Instant,
}

impl Leading {
    async fn begin(
        session: FleetSession,
        host: &HostName,
        term: Term,
        etcd: u64,
        (renewed, resync): (Instant, Duration),
    ) -> Result<Self, StoreError> {
        // What earlier leaders wrote is older than this term, and their writes are refused from now on.
        let ranges = [session.leader_range()];
        let reading = session.read(&ranges).await?;
        let mut leading = Self {
            audit: Audit::new(&ranges, reading.revision, reading.entries.len(), resync),
            key: session.release_key().await?,
            fleet: FleetContents::new(host.clone()),
            term,
            etcd: if reading.etcd == etcd { etcd } else { 0 },
            revision: reading.revision,
            written: 0,
            gone: BTreeMap::new(),
            renewed,
            session,
        };
        for (key, entry) in reading.entries {
            leading.fleet.take(key, Some(entry));
        }
        Ok(leading)
    }

    async fn run(
        &mut self,
        updates: &mut Receiver<Update>,
        outlets: &LeaderOutlets,
        token: &CancellationToken,
    ) -> Result<(), StoreError> {
        let mut watch = self.session.watch(self.session.leader_range(), self.revision + 1).await?;
        let mut renew_at = Instant::now() + RENEWAL;
        let mut refused_at = None;
        loop {
            if !is_trusted(updates, self.etcd) || self.renewed.elapsed() > UNANSWERED {
                return Ok(());
            }
            outlets.gauges.send_replace(Some(self.gauges()));
            let is_waiting = refused_at.is_some_and(|at: Instant| at.elapsed() < REFUSED);
            if self.revision >= self.written && !is_waiting {
                refused_at = if self.decide(&outlets.metrics).await? { None } else { Some(Instant::now()) };
            }
            tokio::select! {
                biased;
                () = token.cancelled() => return Ok(()),
                changed = updates.changed() => if changed.is_err() { return Ok(()) },
                () = tokio::time::sleep_until(renew_at) => {
                    let asked = Instant::now();
                    if !self.session.renew(self.term).await? {
                        return Ok(());
                    }
                    self.renewed = asked;
                    renew_at = asked + RENEWAL;
                }
                news = watch.next() => {
                    let (changes, revision) = news?;
                    refused_at = None;
                    self.audit.take(&changes);
                    for change in changes {
                        if let Some(key) = change.key {
                            self.fleet.take(key, change.value);
                        }
                    }
                    self.revision = self.revision.max(revision);
                }
                () = tokio::time::sleep(REFUSED), if refused_at.is_some() => {}
                () = tokio::time::sleep_until(self.audit.due) => {
                    if !self.session.audit(&mut self.audit).await? {
                        tracing::warn!("the leader's watch has lost what was written; its term ends");
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Decides, and writes. Returns false if a write was refused.
    async fn decide(&mut self, metrics: &Metrics) -> Result<bool, StoreError> {
        let Some(key) = self.key.clone() else { return Ok(true) };
        let now = Timestamp::now();
        self.fleet.resolve(&key);
        let (records, hosts) = (&self.fleet.records, &self.fleet.hosts);
        let away: BTreeSet<&HostName> =
            records.permits.keys().map(|(_, host)| host).filter(|host| !hosts.contains_key(*host)).collect();
        self.gone.retain(|host, _| away.contains(host));
        for host in away {
            self.gone.entry(host.clone()).or_insert(now);
        }
        let intents = self.intents(now);
        let term = self.term.revision;
        let transactions =
            decide(&FleetView { term, intents: &intents, records: &self.fleet.records, gone: &self.gone, now });
        let mut all_made = true;
        for transaction in transactions {
            let made = self.session.commit(&transaction, 0).await.inspect_err(|e| {
                tracing::warn!(kind = transaction.kind.as_str(), "a decision for the fleet cannot be written: {e}");
            });
            metrics.rollout_written(transaction.kind, made.as_ref().ok().map(Option::is_some));
            match made? {
                Some(revision) => self.written = self.written.max(revision),
                None => all_made = false,
            }
            tracing::debug!(kind = transaction.kind.as_str(), "the leader writes: {:?}", transaction.writes.first());
        }
        Ok(all_made)
    }

    fn gauges(&self) -> LeaderGauges {
        let records = &self.fleet.records;
        let phase = |(app, stored): (&AppName, &Stored<Rollout>)| {
            // The record of a deleted app calls for no action.
            let rollout = stored.value.as_ref().filter(|_| records.specs.contains_key(app))?;
            Some((app.clone(), (rollout.phase, rollout.changed)))
        };
        let in_phase = |phase: PermitPhase| {
            records.permits.values().filter(|permit| permit.value.as_ref().is_some_and(|p| p.phase == phase)).count()
        };
        LeaderGauges {
            rollouts: records.rollouts.iter().filter_map(phase).collect(),
            tries: in_phase(PermitPhase::Try),
            switches: in_phase(PermitPhase::Switch),
            lost: records.lost.len(),
        }
    }

    fn intents(&self, now: Timestamp) -> BTreeMap<AppName, Intent> {
        let fleet = &self.fleet;
        let one = |(app, everywhere): (&AppName, &Result<Everywhere, Problems>)| {
            let everywhere = everywhere.as_ref().ok().filter(|everywhere| everywhere.paused.is_none())?;
            // A pin that names no release is not the same as none: the app is left as it is.
            let pin = fleet.pin(app).ok()?;
            let hosts = fleet.hosts.iter();
            let hosts = hosts.filter(|(host, info)| takes_turns(info) && fleet.is_placed(app, everywhere, host, info));
            let made_from = &everywhere.made_from;
            let written = fleet.records.rollouts.get(app).map_or(0, |rollout| rollout.modified);
            let kept = KeptRelease {
                version: VERSION,
                spec: made_from.spec.clone(),
                image: made_from.image.clone(),
                restart: made_from.restart.clone(),
                opened: now,
                proven: None,
                // One from before the rollout was last written is about another change.
                by: everywhere.by.as_ref().filter(|by| by.revision > written).map(|by| by.text.clone()),
            };
            let intent = Intent {
                release: everywhere.target.release.id.clone(),
                update: everywhere.target.update.clone(),
                hosts: hosts.map(|(host, info)| (host.clone(), is_canary(&info.labels))).collect(),
                pin,
                promoted: fleet.promoted(app).ok().flatten(),
                made_from: Some((kept, KeptEnv { version: VERSION, sets: made_from.env.clone() })),
            };
            Some((app.clone(), intent))
        };
        fleet.apps().iter().filter_map(one).collect()
    }
}
