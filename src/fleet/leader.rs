//! What the leader does next about each app.
//!
//! At most one transaction for an app at a time. It is decided from what people wrote and what hosts report, both as of
//! one revision; every transaction compares the term of the leader, and what it depends on.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::{
    order::{CANARY, place},
    records::{Records, Stored},
};
use crate::model::{
    fleet::{
        CommandState, Condition, FleetKey, KeptEnv, KeptRelease, Lost, Permit, PermitPhase, Proof, Rollout,
        RolloutPhase, SCHEME, Transaction, TransactionKind, VERSION, Write,
    },
    name::{AppName, HostName, ReleaseId},
    spec::{FailureAction, Update},
    time::Timestamp,
};

/// How long a host that went away in its turn has to come back. Until then no failure is counted.
pub const LOST_AFTER: Duration = Duration::from_secs(300);
/// Releases that are kept of each app, to go back to.
pub const KEPT_RELEASES: usize = 10;
/// Most permits in one transaction, each of which has two conditions: etcd takes 128 operations.
const MOST_GRANTS: usize = 50;
/// Most bytes of a release that is kept: etcd takes requests of 1.5 MiB.
const MOST_KEPT: usize = 1024 * 1024;

/// What people want of one app, as of the same revision as the records.
#[derive(Debug, Clone, PartialEq)]
pub struct Intent {
    /// The wanted release.
    pub release: ReleaseId,
    /// How it goes over the hosts.
    pub update: Update,
    /// The hosts that want it and are up, and whether each is a canary.
    pub hosts: BTreeMap<HostName, bool>,
    /// A kept release that a person has pinned.
    pub pin: Option<ReleaseId>,
    /// The release that a person has promoted.
    pub promoted: Option<ReleaseId>,
    /// What the wanted release is made from.
    pub made_from: Option<(KeptRelease, KeptEnv)>,
}

/// Whether a host with these labels goes first.
pub fn is_canary(labels: &BTreeMap<String, String>) -> bool {
    labels.get(CANARY).is_some_and(|value| value == "true")
}

/// What the leader decides from.
#[derive(Debug, Clone, Copy)]
pub struct FleetView<'a> {
    /// The create revision of the leader's key.
    pub term: i64,
    /// What people want, by app. An app that is missing is left as it is.
    pub intents: &'a BTreeMap<AppName, Intent>,
    /// What machines wrote.
    pub records: &'a Records,
    /// Since when this leader has known that a host is gone.
    pub gone: &'a BTreeMap<HostName, Timestamp>,
    /// Now.
    pub now: Timestamp,
}

/// What the leader does next: at most one transaction for each app.
pub fn decide(view: &FleetView<'_>) -> Vec<Transaction> {
    let apps: BTreeSet<&AppName> = view.intents.keys().chain(view.records.permits.keys().map(|(app, _)| app)).collect();
    apps.into_iter().filter_map(|app| Decision { view, app }.next()).collect()
}

struct Decision<'a> {
    view: &'a FleetView<'a>,
    app: &'a AppName,
}

impl<'a> Decision<'a> {
    fn next(&self) -> Option<Transaction> {
        if let Some(ended) = self.end_turn_of_gone_host() {
            return Some(ended);
        }
        let intent = self.view.intents.get(self.app)?;
        if let Some(ended) = self.end_turn_of_other_host(intent) {
            return Some(ended);
        }
        let wanted = intent.pin.as_ref().unwrap_or(&intent.release);
        match self.view.records.rollouts.get(self.app) {
            None => self.open(intent, wanted, None),
            Some(rollout) => {
                // One that cannot be read is left to a person: it may be of a later version.
                let value = rollout.value.as_ref().filter(|value| value.scheme == SCHEME)?;
                if value.release == *wanted && value.pinned == intent.pin.is_some() {
                    self.go_on(intent, rollout, value)
                } else {
                    self.open(intent, wanted, Some((rollout, value)))
                }
            }
        }
    }

    fn records(&self) -> &'a Records {
        self.view.records
    }

    /// How many hosts have the app, also those that are down now.
    fn count(&self, intent: &Intent) -> u32 {
        let proven = |proof: &&Stored<Proof>| proof.value.as_ref().is_some_and(|proof| proof.release.is_some());
        let proofs = self.records().proofs.iter().filter(|((app, _), proof)| app == self.app && proven(proof));
        let hosts: BTreeSet<&HostName> = proofs.map(|((_, host), _)| host).chain(intent.hosts.keys()).collect();
        u32::try_from(hosts.len()).unwrap_or(u32::MAX)
    }

    fn key(&self) -> FleetKey {
        FleetKey::Rollout(self.app.clone())
    }

    fn is_up(&self, host: &HostName) -> bool {
        self.records().hosts.contains_key(host)
    }

    fn transaction(&self, kind: TransactionKind, conditions: Vec<Condition>, writes: Vec<Write>) -> Transaction {
        let led = Condition::Created(FleetKey::Leader, self.view.term);
        Transaction { kind, conditions: [led].into_iter().chain(conditions).collect(), writes }
    }

    /// Takes the permit of a host that is gone. Before it has switched, nothing has happened; afterwards it counts as lost
    /// until it is found again, since requests may be on the new release there.
    fn end_turn_of_gone_host(&self) -> Option<Transaction> {
        let gone = |(host, _): &(&HostName, &Stored<Permit>)| !self.is_up(host);
        for (host, permit) in self.records().permits_of(self.app).filter(gone) {
            let key = FleetKey::Permit(host.clone(), self.app.clone());
            let conditions = vec![
                Condition::Modified(key.clone(), permit.modified),
                Condition::Created(FleetKey::Host(host.clone()), 0),
            ];
            // A permit that cannot be read may be in any phase.
            let Some(value) = &permit.value else { continue };
            if value.phase == PermitPhase::Try {
                return Some(self.transaction(TransactionKind::Withdraw, conditions, vec![Write::Delete(key)]));
            }
            if self.view.gone.get(host).is_some_and(|since| since.plus(LOST_AFTER) <= self.view.now) {
                let lost = Lost { version: VERSION, release: value.release.clone(), at: self.view.now };
                let lost = Write::record(FleetKey::Lost(self.app.clone(), host.clone()), &lost);
                return Some(self.transaction(
                    TransactionKind::DeclareLost,
                    conditions,
                    vec![lost, Write::Delete(key)],
                ));
            }
        }
        None
    }

    /// Takes the permit of a host that is up and does not run the app any more, or takes no turns any more, and has switched
    /// nothing.
    fn end_turn_of_other_host(&self, intent: &Intent) -> Option<Transaction> {
        let records = self.records();
        records.permits_of(self.app).find_map(|(host, permit)| {
            let up = *records.hosts.get(host)?;
            let is_tried = permit.value.as_ref().is_some_and(|permit| permit.phase == PermitPhase::Try);
            if intent.hosts.contains_key(host) || !is_tried {
                return None;
            }
            let key = FleetKey::Permit(host.clone(), self.app.clone());
            let conditions = vec![
                Condition::Modified(key.clone(), permit.modified),
                Condition::Created(FleetKey::Host(host.clone()), up),
            ];
            Some(self.transaction(TransactionKind::Withdraw, conditions, vec![Write::Delete(key)]))
        })
    }

    /// Opens a rollout, or puts it in the place of another one: whatever phase that is in, its permits are void then.
    fn open(
        &self,
        intent: &Intent,
        release: &ReleaseId,
        before: Option<(&Stored<Rollout>, &Rollout)>,
    ) -> Option<Transaction> {
        let (records, now) = (self.records(), self.view.now);
        let proofs = || intent.hosts.keys().map(|host| records.proofs.get(&(self.app.clone(), host.clone())));
        let from = match before {
            Some((_, before)) => before.proven().cloned(),
            None => {
                // All records of the fleet may have been deleted: each host must have said first what it runs, and which
                // turn it is in.
                if intent.hosts.is_empty() || proofs().any(|proof| proof.is_none_or(|p| p.value.is_none())) {
                    return None;
                }
                most_common(proofs().flatten().filter_map(|proof| proof.value.as_ref()?.release.as_ref()))
            }
        };
        let is_kept = records.kept.get(&(self.app.clone(), release.clone()));
        let was_proven = from.as_ref() == Some(release)
            || is_kept.is_some_and(|kept| kept.value.as_ref().is_some_and(|kept| kept.proven.is_some()));
        let failed = records.verdicts_of(self.app, release).next();
        let pinned = intent.pin.is_some();
        let (phase, reason) = match failed {
            // A release that failed is nothing to go back to.
            _ if pinned && !was_proven => return None,
            _ if from.as_ref() == Some(release) || pinned => (RolloutPhase::Restored, String::new()),
            Some((host, verdict)) => (RolloutPhase::Halted, because(host, verdict.value.as_ref().map(|v| &*v.cause))),
            None if intent.update.canary > 0 && intent.hosts.len() > usize::from(intent.update.canary) => {
                (RolloutPhase::Canary, String::new())
            }
            None => (RolloutPhase::Rolling, String::new()),
        };
        let rollout = Rollout {
            version: VERSION,
            release: release.clone(),
            from,
            phase,
            scheme: SCHEME,
            hosts: self.count(intent),
            pinned,
            opened: now,
            changed: now,
            reason,
        };
        let revision = before.map_or(0, |(stored, _)| stored.modified);
        let image = self.records().images.get(self.app).copied().unwrap_or(0);
        let mut conditions = vec![
            Condition::Modified(self.key(), revision),
            self.spec_unchanged(),
            Condition::Modified(FleetKey::Image(self.app.clone()), image),
        ];
        let mut writes = vec![Write::record(self.key(), &rollout)];
        if is_kept.is_none() && !pinned {
            let proven = (phase == RolloutPhase::Restored).then_some(now);
            writes.extend(self.keep(intent, proven));
        }
        if before.is_some() && phase.is_under_way() {
            let (granted, permits) = self.grants(intent, &rollout, 0);
            conditions.extend(granted);
            writes.extend(permits);
        }
        Some(self.transaction(TransactionKind::Open, conditions, writes))
    }

    /// Keeps what a release is made from, and forgets the oldest ones.
    fn keep(&self, intent: &Intent, proven: Option<Timestamp>) -> Vec<Write> {
        let Some((kept, env)) = &intent.made_from else { return Vec::new() };
        let kept = KeptRelease { proven, ..kept.clone() };
        let writes = [
            Write::record(FleetKey::Kept(self.app.clone(), intent.release.clone()), &kept),
            Write::record(FleetKey::KeptEnv(self.app.clone(), intent.release.clone()), env),
        ];
        let size = |write: &Write| match write {
            Write::Put(_, value) => value.len(),
            Write::Delete(_) => 0,
        };
        if writes.iter().map(size).sum::<usize>() > MOST_KEPT {
            return Vec::new();
        }
        let rollout = self.records().rollouts.get(self.app).and_then(|r| r.value.as_ref());
        let is_needed = |release: &ReleaseId| {
            rollout.is_some_and(|r| r.release == *release || r.from.as_ref() == Some(release))
                || intent.pin.as_ref() == Some(release)
        };
        let mut old: Vec<_> =
            self.records().kept.iter().filter(|((app, release), _)| app == self.app && !is_needed(release)).collect();
        old.sort_by_key(|(_, kept)| kept.created);
        let surplus = (old.len() + 1).saturating_sub(KEPT_RELEASES);
        let forgotten = old.into_iter().take(surplus).flat_map(|((app, release), _)| {
            [
                FleetKey::Kept(app.clone(), release.clone()),
                FleetKey::KeptEnv(app.clone(), release.clone()),
                FleetKey::Command(app.clone(), release.clone()),
                FleetKey::Digest(app.clone(), release.clone()),
            ]
            .map(Write::Delete)
        });
        writes.into_iter().chain(forgotten).collect()
    }

    fn go_on(&self, intent: &Intent, stored: &Stored<Rollout>, rollout: &Rollout) -> Option<Transaction> {
        let records = self.records();
        let allowed = intent.update.allowed_failures(intent.hosts.len());
        let verdicts: Vec<_> = records.verdicts_of(self.app, &rollout.release).collect();
        let lost = records.lost.keys().filter(|(app, _)| app == self.app).count();
        let proven =
            intent.hosts.keys().filter(|host| records.proven(self.app, host) == Some(&rollout.release)).count();
        let is_behind = |host: &HostName| {
            intent.hosts.contains_key(host) && records.proven(self.app, host) != Some(&rollout.release)
        };
        let behind = verdicts.iter().filter(|(host, _)| is_behind(host)).count();
        let failed = verdicts
            .first()
            .filter(|_| verdicts.len() > allowed)
            .map(|(host, verdict)| because(host, verdict.value.as_ref().map(|v| &*v.cause)));
        // Where a command has failed says nothing about that host: no other one may start the release either.
        let failed = self.failed_command(&rollout.release).or(failed);
        let has_permits = records.permits_of(self.app).next().is_some();
        let next = match rollout.phase {
            RolloutPhase::Reverting => (!has_permits).then(|| (RolloutPhase::Reverted, rollout.reason.clone())),
            // The verdicts were taken away, or the lost hosts were found.
            RolloutPhase::Halted | RolloutPhase::Reverted if failed.is_none() && lost <= allowed => {
                Some((RolloutPhase::Rolling, String::new()))
            }
            RolloutPhase::Canary | RolloutPhase::Waiting | RolloutPhase::Rolling if let Some(reason) = failed => {
                let goes_back = intent.update.on_failure == FailureAction::Rollback && rollout.from.is_some();
                let phase = if goes_back { RolloutPhase::Reverting } else { RolloutPhase::Halted };
                Some((phase, reason))
            }
            RolloutPhase::Canary | RolloutPhase::Waiting | RolloutPhase::Rolling if lost > allowed => {
                let reason = "a host went away in its turn, and requests may be on the new release there".to_owned();
                Some((RolloutPhase::Halted, reason))
            }
            RolloutPhase::Canary if proven >= usize::from(intent.update.canary).min(intent.hosts.len()) => {
                Some((RolloutPhase::Waiting, String::new()))
            }
            RolloutPhase::Waiting => {
                let by_time =
                    intent.update.auto_promote_after.is_some_and(|after| rollout.changed.plus(after) <= self.view.now);
                let promoted = by_time || intent.promoted.as_ref() == Some(&rollout.release);
                promoted.then(|| (RolloutPhase::Rolling, String::new()))
            }
            // Hosts that were allowed to fail stay behind.
            RolloutPhase::Rolling if proven > 0 && proven + behind == intent.hosts.len() => {
                Some((RolloutPhase::Done, String::new()))
            }
            RolloutPhase::Canary
            | RolloutPhase::Rolling
            | RolloutPhase::Done
            | RolloutPhase::Restored
            | RolloutPhase::Halted
            | RolloutPhase::Reverted => None,
        };
        if let Some((phase, reason)) = next {
            return Some(self.change_phase(
                stored,
                &Rollout { phase, reason, changed: self.view.now, hosts: self.count(intent), ..rollout.clone() },
            ));
        }
        let (conditions, writes) = self.grants(intent, rollout, stored.modified);
        if writes.is_empty() {
            return None;
        }
        let same = [Condition::Modified(self.key(), stored.modified), self.spec_unchanged()];
        Some(self.transaction(TransactionKind::Grant, same.into_iter().chain(conditions).collect(), writes))
    }

    /// Why the command of a release failed, if it did.
    fn failed_command(&self, release: &ReleaseId) -> Option<String> {
        let run = self.records().commands.get(&(self.app.clone(), release.clone()))?.value.as_ref()?;
        (run.state == CommandState::Failed).then(|| because(&run.host, Some(&run.cause)))
    }

    fn change_phase(&self, stored: &Stored<Rollout>, rollout: &Rollout) -> Transaction {
        let conditions = vec![Condition::Modified(self.key(), stored.modified)];
        let mut writes = vec![Write::record(self.key(), rollout)];
        // From here on hosts may go back to it.
        let key = (self.app.clone(), rollout.release.clone());
        if rollout.phase == RolloutPhase::Done
            && let Some(kept) = self.records().kept.get(&key)
            && let Some(value) = &kept.value
        {
            let key = FleetKey::Kept(key.0, key.1);
            writes.push(Write::record(key, &KeptRelease { proven: Some(self.view.now), ..value.clone() }));
        }
        self.transaction(TransactionKind::ChangePhase, conditions, writes)
    }

    fn spec_unchanged(&self) -> Condition {
        let revision = self.records().specs.get(self.app).copied().unwrap_or(0);
        Condition::Modified(FleetKey::Spec(self.app.clone()), revision)
    }

    /// The permits that can be granted now, and what must hold for them. `epoch` is the mod revision of the rollout, or 0
    /// if it is written by the same transaction.
    fn grants(&self, intent: &Intent, rollout: &Rollout, epoch: i64) -> (Vec<Condition>, Vec<Write>) {
        let hosts = self.next_hosts(intent, rollout);
        if hosts.is_empty() {
            return (Vec::new(), Vec::new());
        }
        let records = self.records();
        let seen = records.verdicts_of(self.app, &rollout.release).map(|(_, v)| v.modified).max().unwrap_or(0);
        let permit = Permit {
            version: VERSION,
            release: rollout.release.clone(),
            epoch,
            phase: PermitPhase::Try,
            granted: self.view.now,
            seen,
            strict: intent.update.allowed_failures(intent.hosts.len()) == 0,
            first: rollout.from.is_none()
                && !records.proofs.keys().any(|(app, host)| app == self.app && records.proven(app, host).is_some()),
        };
        let mut conditions = vec![
            Condition::NoVerdictSince(self.app.clone(), rollout.release.clone(), seen),
            Condition::Created(FleetKey::Freeze, 0),
        ];
        let mut writes = Vec::new();
        for host in hosts {
            let key = FleetKey::Permit(host.clone(), self.app.clone());
            conditions.push(Condition::Created(key.clone(), 0));
            let up = records.hosts.get(host).copied().unwrap_or(0);
            conditions.push(Condition::Created(FleetKey::Host(host.clone()), up));
            writes.push(Write::record(key, &permit));
        }
        (conditions, writes)
    }

    /// The hosts that can have a turn now.
    fn next_hosts(&self, intent: &'a Intent, rollout: &Rollout) -> Vec<&'a HostName> {
        let records = self.records();
        let may_grant = rollout.phase == RolloutPhase::Done
            || matches!(rollout.phase, RolloutPhase::Canary | RolloutPhase::Rolling);
        if !may_grant || records.freeze.is_some() || !intent.update.is_paced() {
            return Vec::new();
        }
        let has_proven = |host: &HostName| records.proven(self.app, host) == Some(&rollout.release);
        let total = intent.hosts.len();
        let allowed = intent.update.allowed_failures(total);
        let failed: BTreeSet<&HostName> =
            records.verdicts_of(self.app, &rollout.release).map(|(host, _)| host).collect();
        // A rollout that is done is not halted by a host that comes late and fails, but nothing more begins.
        if failed.len() > allowed || self.failed_command(&rollout.release).is_some() {
            return Vec::new();
        }
        // The first turn is of one host alone, whatever the size of the fleet.
        let is_proven = rollout.phase == RolloutPhase::Done
            || records.proofs.iter().any(|((app, host), _)| app == self.app && has_proven(host));
        let parallelism = intent.update.parallelism.of(total);
        let limit = if is_proven { parallelism } else { parallelism.min(1) };
        let open: BTreeSet<&HostName> = records.permits_of(self.app).map(|(host, _)| host).collect();
        let lost = records.lost.keys().filter(|(app, _)| app == self.app).count();
        let mut room = limit
            .min(open.len() + MOST_GRANTS)
            .saturating_sub(open.len())
            .min((limit + allowed).saturating_sub(open.len() + lost));
        if rollout.phase == RolloutPhase::Canary {
            let proven = intent.hosts.keys().filter(|host| has_proven(host)).count();
            room = room.min(usize::from(intent.update.canary).saturating_sub(proven + open.len()));
        }
        let is_candidate = |host: &&HostName| !has_proven(host) && !open.contains(host) && !failed.contains(host);
        let mut candidates: Vec<&HostName> = intent.hosts.keys().filter(is_candidate).collect();
        candidates.sort_by_key(|host| {
            let is_canary = intent.hosts.get(*host).copied().unwrap_or(false);
            place(records, (self.app, host), is_canary, &rollout.release, rollout.from.as_ref())
        });
        // The last host that serves is not touched.
        let serves = |host: &HostName| {
            let served = records.served.get(&(self.app.clone(), host.clone()));
            served.is_some_and(|s| s.value.as_ref().is_some_and(|s| s.release().is_some()))
        };
        let mut chosen: Vec<&HostName> = Vec::new();
        for host in candidates {
            if chosen.len() >= room {
                break;
            }
            let in_turn = |other: &HostName| other == host || open.contains(other) || chosen.contains(&other);
            let others_serve = intent.hosts.keys().any(|other| !in_turn(other) && serves(other));
            if total == 1 || others_serve || !serves(host) {
                chosen.push(host);
            }
        }
        chosen
    }
}

fn because(host: &HostName, cause: Option<&str>) -> String {
    match cause {
        Some(cause) => format!("it failed on {host}: {cause}"),
        None => format!("it failed on {host}"),
    }
}

/// The release that most hosts have proven; the first by its id among equals.
fn most_common<'a>(releases: impl Iterator<Item = &'a ReleaseId>) -> Option<ReleaseId> {
    let mut counts: BTreeMap<&ReleaseId, usize> = BTreeMap::new();
    for release in releases {
        *counts.entry(release).or_default() += 1;
    }
    let most = counts.values().copied().max()?;
    counts.into_iter().find(|(_, count)| *count == most).map(|(release, _)| release.clone())
}
