//! What a host may do about an app, and what it writes about its turn.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::records::Stored;
use crate::model::{
    fleet::{
        CommandEnd, CommandRun, CommandState, Condition, EndedCommand, FleetKey, HostVerdict, Lost, Permit,
        PermitPhase, Proof, ResolvedImage, Rollout, RolloutPhase, Transaction, TransactionKind, Turn, VERSION, Write,
    },
    name::{AppName, HostName, ImageDigest, ReleaseId},
    spec::Update,
    time::Timestamp,
};

/// What the store says about an app on this host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostRecords {
    /// The rollout of the app.
    pub rollout: Option<Stored<Rollout>>,
    /// The permit of this host.
    pub permit: Option<Stored<Permit>>,
    /// Whether this host is counted as lost.
    pub lost: Option<Stored<Lost>>,
    /// What this host has proven, as the store knows it.
    pub proof: Option<Stored<Proof>>,
    /// Runs of the commands of its releases.
    pub commands: BTreeMap<ReleaseId, Stored<CommandRun>>,
    /// Which images its releases are.
    pub digests: BTreeMap<ReleaseId, Stored<ResolvedImage>>,
    /// The verdicts of this host that are in the store; `None` if one cannot be read.
    pub verdicts: BTreeMap<ReleaseId, Option<HostVerdict>>,
}

/// What is the case on this host.
#[derive(Debug, Clone)]
pub struct HostFacts<'a> {
    /// The app.
    pub app: &'a AppName,
    /// The host.
    pub host: &'a HostName,
    /// The release that people want; `None` if the app does not run here.
    pub wanted: Option<&'a ReleaseId>,
    /// The revision at which a person last asked for another try; 0 if never.
    pub retried: i64,
    /// Whether the wanted release has a command, which must have run before it starts.
    pub has_command: bool,
    /// How the command of a release ended that was run here, if its end is not in the store yet.
    pub command_end: Option<&'a EndedCommand>,
    /// Why a command whose start is written cannot be run now.
    pub command_trouble: Option<&'a str>,
    /// A release whose image is here, with its digest, and that waits for it to be written.
    pub pulled: Option<(&'a ReleaseId, &'a ImageDigest)>,
    /// This run of the agent.
    pub run: &'a str,
    /// How it goes over the hosts.
    pub update: &'a Update,
    /// How long its health checks take to notice a failure.
    pub detection: Duration,
    /// The release that is proven here.
    pub proven: Option<&'a ReleaseId>,
    /// The releases that requests may go to: of routes, and of containers that run, for an app without.
    pub routed: &'a BTreeSet<ReleaseId>,
    /// The release that healthy instances serve.
    pub serving: Option<&'a ReleaseId>,
    /// Verdicts of this host, by release.
    pub verdicts: &'a [(ReleaseId, HostVerdict)],
    /// Whether the permit was confirmed a moment ago. It counts only for requests that have not moved yet.
    pub confirmed: bool,
}

/// What a host is to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Directive {
    /// The wanted release, as far as the turn goes.
    Wanted(Turn),
    /// Another release that the fleet has proven, for this reason.
    Kept(ReleaseId, String),
    /// The release that a person has pinned.
    Pinned(ReleaseId),
}

impl Directive {
    fn held(why: impl Into<String>) -> Self {
        Self::Wanted(Turn::Held(why.into()))
    }
}

/// What a host is to run of an app.
pub fn directive(facts: &HostFacts<'_>, records: &HostRecords) -> Directive {
    let Some(stored) = &records.rollout else {
        return Directive::held("no rollout of it was opened yet");
    };
    let Some(rollout) = &stored.value else {
        return Directive::held("the record of its rollout cannot be read by this version");
    };
    let Some(wanted) = facts.wanted else { return Directive::Wanted(Turn::Free) };
    if rollout.release != *wanted {
        if rollout.pinned {
            return Directive::Pinned(rollout.release.clone());
        }
        return hold(facts, rollout, wanted, "the leader has not opened a rollout of this release yet");
    }
    let monitor = match rollout.phase {
        // It was monitored on each host of the fleet that was up.
        RolloutPhase::Done => Duration::ZERO,
        _ => facts.update.monitor(usize::try_from(rollout.hosts).unwrap_or(usize::MAX), facts.detection),
    };
    let is_switched = facts.routed.contains(wanted);
    match rollout.phase {
        RolloutPhase::Restored => Directive::Wanted(Turn::Free),
        // A host on which nothing serves takes what is proven at once.
        RolloutPhase::Done if facts.routed.is_empty() || !facts.update.is_paced() => Directive::Wanted(Turn::Free),
        RolloutPhase::Reverting | RolloutPhase::Reverted => match &rollout.from {
            Some(from) => Directive::Kept(from.clone(), rollout.reason.clone()),
            None => Directive::held(rollout.reason.clone()),
        },
        RolloutPhase::Halted if !is_switched => hold(facts, rollout, wanted, &rollout.reason),
        _ if !facts.update.is_paced() => Directive::Wanted(Turn::Free),
        _ => match records.permit.as_ref().and_then(|p| Some((p, p.value.as_ref()?))) {
            Some((_, permit)) if permit.release == *wanted && permit.phase == PermitPhase::Switch => {
                Directive::Wanted(Turn::Switch { monitor, confirmed: facts.confirmed || is_switched })
            }
            Some((stored_permit, permit))
                if permit.release == *wanted && epoch(stored_permit, permit) == stored.modified =>
            {
                match command_reason(facts, records, wanted) {
                    Some(why) => hold(facts, rollout, wanted, &why),
                    None => Directive::Wanted(Turn::Try),
                }
            }
            // The permit of a turn that goes on was deleted: requests are on the release already.
            None if is_switched => Directive::Wanted(Turn::Switch { monitor, confirmed: true }),
            _ => hold(facts, rollout, wanted, waiting_reason(rollout)),
        },
    }
}

/// Why a release may not start yet although it is the turn of this host: its command has not run.
fn command_reason(facts: &HostFacts<'_>, records: &HostRecords, wanted: &ReleaseId) -> Option<String> {
    if !facts.has_command {
        return None;
    }
    let Some(stored) = records.commands.get(wanted) else {
        return Some("its release command is about to be started".to_owned());
    };
    let Some(run) = &stored.value else {
        return Some("the record of its release command cannot be read by this version".to_owned());
    };
    match run.state {
        CommandState::Done => None,
        CommandState::Started if run.host == *facts.host => Some(match facts.command_trouble {
            Some(trouble) => format!("its release command cannot be run now: {trouble}"),
            None => "its release command runs".to_owned(),
        }),
        CommandState::Started => Some(format!("its release command runs on {}", run.host)),
        CommandState::Failed => Some(format!("its release command failed on {}: {}", run.host, run.cause)),
        CommandState::Unknown => Some(format!(
            "whether its release command has run on {} is not known ({}): see to it, then `demae retry {}` runs it again",
            run.host, run.cause, facts.app
        )),
    }
}

fn waiting_reason(rollout: &Rollout) -> &'static str {
    match rollout.phase {
        RolloutPhase::Waiting => "the canaries have proven the release, and it waits to be promoted",
        RolloutPhase::Done => "it takes the release after other hosts, unless it fails on one of them",
        _ => "it is the turn of other hosts",
    }
}

/// Waits. Meanwhile the host runs what the fleet has proven: so it heals if it has that release, and serves if it has none.
fn hold(facts: &HostFacts<'_>, rollout: &Rollout, wanted: &ReleaseId, why: &str) -> Directive {
    let runs_it = |proven: &ReleaseId| {
        facts.proven.is_none_or(|own| own == proven) && facts.routed.iter().all(|release| facts.proven == Some(release))
    };
    match rollout.proven() {
        Some(proven) if proven != wanted && runs_it(proven) => Directive::Kept(proven.clone(), why.to_owned()),
        _ => Directive::held(why),
    }
}

/// The mod revision of the rollout for which a permit was granted.
fn epoch(stored: &Stored<Permit>, permit: &Permit) -> i64 {
    if permit.epoch == 0 { stored.created } else { permit.epoch }
}

/// The next write of a host about its turn, if there is one. `is_ready` says that it has done all that it can before
/// requests move, or before something of the old release stops.
pub fn next_write(facts: &HostFacts<'_>, records: &HostRecords, is_ready: bool, now: Timestamp) -> Option<Transaction> {
    let (host, app) = (facts.host, facts.app);
    let permit_key = FleetKey::Permit(host.clone(), app.clone());
    let proof_key = FleetKey::Proof(host.clone(), app.clone());
    let verdict_key = |release: &ReleaseId| FleetKey::Verdict(app.clone(), release.clone(), host.clone());
    let transaction = |kind, conditions: Vec<Condition>, writes| {
        let conditions = [Condition::HoldsName(host.clone())].into_iter().chain(conditions).collect();
        Some(Transaction { kind, conditions, writes })
    };
    let stored_permit = records.permit.as_ref();
    let permit = stored_permit.and_then(|stored| Some((stored, stored.value.as_ref()?)));
    let unchanged = |stored: &Stored<Permit>| Condition::Modified(permit_key.clone(), stored.modified);
    let rollout = records.rollout.as_ref().and_then(|stored| Some((stored, stored.value.as_ref()?)));
    let is_routed = |release: &ReleaseId| facts.routed.contains(release);
    // What served before serves again, or nothing ever did.
    let is_back = || facts.proven.is_none() || facts.serving == facts.proven;

    if let Some(ended) = end_of_command(facts, records) {
        return transaction(TransactionKind::EndCommand, ended.0, ended.1);
    }
    if let Some((release, digest)) = facts.pulled
        && !records.digests.contains_key(release)
    {
        // Whichever host is first: what it writes is true of the tag, in its turn or not.
        let (condition, write) = resolved(facts, release, digest);
        return Some(Transaction {
            kind: TransactionKind::WriteDigest,
            conditions: vec![condition],
            writes: vec![write],
        });
    }

    // Before anything is proven in the fleet, a failure ends nothing, and a host that has lost its turn says nothing.
    let tries_again = |release: &ReleaseId| {
        facts.proven.is_none()
            && rollout.is_some_and(|(_, r)| r.release == *release && r.from.is_none() && r.phase.is_under_way())
            && permit.is_none_or(|(_, p)| p.release != *release || p.first)
    };
    // Otherwise it is a fact, whether or not the turn still counts.
    let judged = permit.map(|(_, p)| &p.release).into_iter().chain(rollout.map(|(_, r)| &r.release));
    for release in judged
        .filter(|release| !tries_again(release))
        .filter(|release| facts.proven != Some(*release) && !records.verdicts.contains_key(*release))
    {
        if let Some((_, verdict)) = facts.verdicts.iter().find(|(of, _)| of == release) {
            let put = Write::record(verdict_key(release), verdict);
            // A verdict that a person has just taken away is not written again.
            let asked = Condition::Modified(FleetKey::Retry(app.clone()), facts.retried);
            let conditions = vec![Condition::Created(verdict_key(release), 0), asked];
            return transaction(TransactionKind::Judge, conditions, vec![put]);
        }
    }
    let proof = Proof { version: VERSION, release: facts.proven.cloned() };
    let put_proof = Write::record(proof_key.clone(), &proof);
    let same_proof = Condition::Modified(proof_key.clone(), records.proof.as_ref().map_or(0, |p| p.modified));
    // A lost host is found once requests go to nothing but what it has proven.
    let lost = records.lost.as_ref().filter(|_| facts.routed.iter().all(|release| facts.proven == Some(release)));
    let lost_key = FleetKey::Lost(app.clone(), host.clone());
    if let Some((stored, permit)) = permit {
        if facts.proven == Some(&permit.release) {
            let mut writes = vec![Write::Delete(permit_key.clone()), put_proof];
            writes.extend(lost.map(|_| Write::Delete(lost_key)));
            return transaction(TransactionKind::Prove, vec![unchanged(stored), same_proof], writes);
        }
        let is_failed = facts.verdicts.iter().any(|(of, _)| *of == permit.release) && !tries_again(&permit.release);
        let is_void = match rollout {
            Some((r, rollout)) => {
                rollout.release != permit.release
                    || facts.wanted != Some(&permit.release)
                    || matches!(rollout.phase, RolloutPhase::Reverting | RolloutPhase::Reverted)
                    || rollout.phase == RolloutPhase::Halted && !is_routed(&permit.release)
                    || permit.phase == PermitPhase::Try && epoch(stored, permit) != r.modified
            }
            None => false,
        };
        // A host on which nothing was ever proven has nothing to go back to.
        let is_off = !is_routed(&permit.release) || facts.proven.is_none();
        if (is_failed || is_void) && is_off && is_back() {
            let writes = vec![Write::Delete(permit_key.clone())];
            return transaction(TransactionKind::GiveBack, vec![unchanged(stored)], writes);
        }
        let command_key = FleetKey::Command(app.clone(), permit.release.clone());
        let must_run = facts.has_command && permit.phase == PermitPhase::Try;
        if let Some((r, _)) = rollout
            && must_run
            && !is_failed
            && !is_void
            && !records.commands.contains_key(&permit.release)
        {
            let started = CommandRun {
                version: VERSION,
                host: host.clone(),
                run: facts.run.to_owned(),
                state: CommandState::Started,
                started: now,
                cause: String::new(),
            };
            let conditions = vec![
                unchanged(stored),
                Condition::Modified(FleetKey::Rollout(app.clone()), r.modified),
                Condition::Created(FleetKey::Freeze, 0),
                Condition::Created(command_key.clone(), 0),
            ];
            return transaction(TransactionKind::StartCommand, conditions, vec![Write::record(command_key, &started)]);
        }
        if must_run && command_reason(facts, records, &permit.release).is_some() {
            return None;
        }
        let is_fresh = permit.phase == PermitPhase::Switch && (facts.confirmed || is_routed(&permit.release));
        if let Some((r, _)) = rollout
            && is_ready
            && !is_failed
            && !is_void
            && !is_fresh
        {
            let mut conditions =
                vec![unchanged(stored), Condition::Modified(FleetKey::Rollout(app.clone()), r.modified)];
            if permit.strict {
                conditions.push(Condition::NoVerdictSince(app.clone(), permit.release.clone(), permit.seen));
            }
            conditions.push(Condition::Created(FleetKey::Freeze, 0));
            let committed = Permit { phase: PermitPhase::Switch, ..permit.clone() };
            let writes = vec![Write::record(permit_key.clone(), &committed)];
            return transaction(TransactionKind::Commit, conditions, writes);
        }
        return None;
    }
    if stored_permit.is_some() {
        return None;
    }
    let is_published = records.proof.as_ref().is_some_and(|stored| stored.value.as_ref() == Some(&proof));
    let is_in_turn = |release: &&ReleaseId| {
        let is_failed = facts.verdicts.iter().any(|(of, _)| of == *release);
        facts.proven.is_some_and(|proven| proven != *release) && !is_failed
    };
    if let Some(release) = facts.routed.iter().find(is_in_turn)
        && records.lost.is_none()
        && rollout
            .is_none_or(|(_, r)| r.release == *release && (r.phase.is_under_way() || r.phase == RolloutPhase::Halted))
        && facts.update.is_paced()
    {
        let restored = Permit {
            version: VERSION,
            release: release.clone(),
            epoch: rollout.map_or(1, |(stored, _)| stored.modified),
            phase: PermitPhase::Switch,
            granted: now,
            seen: 0,
            strict: true,
            first: false,
        };
        // The proof says that all of this host's turn is in the store again, so both are written at once.
        let writes = vec![Write::record(permit_key.clone(), &restored), put_proof];
        return transaction(TransactionKind::Restore, vec![Condition::Created(permit_key, 0)], writes);
    }
    // An app that never was to run here has nothing to say.
    let is_foreign = facts.wanted.is_none() && records.proof.is_none();
    if !is_foreign && (!is_published || lost.is_some()) {
        let conditions = vec![same_proof, Condition::Created(permit_key, 0)];
        let mut writes = vec![put_proof];
        writes.extend(lost.map(|_| Write::Delete(lost_key)));
        return transaction(TransactionKind::Prove, conditions, writes);
    }
    None
}

/// Writes which image a release is, unless a host has written it before.
fn resolved(facts: &HostFacts<'_>, release: &ReleaseId, digest: &ImageDigest) -> (Condition, Write) {
    let key = FleetKey::Digest(facts.app.clone(), release.clone());
    let record = ResolvedImage { version: VERSION, digest: digest.clone(), host: facts.host.clone() };
    (Condition::Created(key.clone(), 0), Write::record(key, &record))
}

/// The end of a command that this host has run, and its verdict if it failed, as conditions and writes.
fn end_of_command(facts: &HostFacts<'_>, records: &HostRecords) -> Option<(Vec<Condition>, Vec<Write>)> {
    let EndedCommand { release, started, end, digest } = facts.command_end?;
    let stored = records.commands.get(release)?;
    let run = stored.value.as_ref()?;
    if run.state != CommandState::Started || run.host != *facts.host || run.started != *started {
        return None;
    }
    let (state, cause) = match end {
        CommandEnd::Done => (CommandState::Done, String::new()),
        CommandEnd::Failed(verdict) => (CommandState::Failed, verdict.cause.clone()),
        CommandEnd::Unknown(why) => (CommandState::Unknown, why.clone()),
    };
    let key = FleetKey::Command(facts.app.clone(), release.clone());
    let mut conditions = vec![Condition::Modified(key.clone(), stored.modified)];
    let mut writes = vec![Write::record(key, &CommandRun { state, cause, ..run.clone() })];
    if let CommandEnd::Failed(verdict) = end
        && !records.verdicts.contains_key(release)
    {
        let key = FleetKey::Verdict(facts.app.clone(), release.clone(), facts.host.clone());
        conditions.push(Condition::Created(key.clone(), 0));
        writes.push(Write::record(key, verdict));
    }
    // Its instances are to run from the image that their command has run from.
    if let (CommandEnd::Done, Some(digest)) = (end, digest)
        && !records.digests.contains_key(release)
    {
        let (condition, write) = resolved(facts, release, digest);
        conditions.push(condition);
        writes.push(write);
    }
    Some((conditions, writes))
}
