//! The turns of this host in rollouts: what an app may do by the records of the fleet, and what is written about it.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use tokio::task::JoinSet;

use super::{Agent, app::AppState, completion::Completion, turn::Kept};
use crate::{
    execute::StepError,
    fleet::{
        records::image_of,
        turn::{Directive, HostFacts, HostRecords, directive, next_write},
    },
    machine::Machine,
    model::{
        desired::{DesiredApp, Target},
        fleet::{
            CommandRun, CommandState, EndedCommand, FleetImage, HostVerdict, PermitPhase, Transaction, TransactionKind,
            Turn, UNREADABLE_IMAGE, VERSION,
        },
        name::{AppName, ReleaseId},
        observed::{Address, Instance, Verdict},
        problem::chain,
        proxy::{ObservedProxy, Upstreams},
        time::Timestamp,
    },
    rollout::{Answer, HostRollouts, Request},
};

/// How long a record of a switch counts for requests that have not moved yet. A step that waited longer is decided anew.
const CONFIRMED: Duration = Duration::from_secs(5);
/// Pause after a command that could not be run, for a reason of this host.
const COMMAND_RETRY: Duration = Duration::from_secs(5);
/// Pause after a write that was refused: the reason for it is about to arrive.
const REFUSED: Duration = Duration::from_millis(200);
/// Pause after a write that could not be made.
const FAILED: Duration = Duration::from_secs(1);

impl AppState {
    /// The releases that requests may go to. A worker has no routes: what counts is what is proven, and what its permit
    /// says.
    fn routed(&self, proxy: &ObservedProxy, records: &HostRecords) -> BTreeSet<ReleaseId> {
        let Some(observed) = self.observed() else { return BTreeSet::new() };
        let slots = observed.slots.values().chain(observed.mapped.values()).flatten();
        let mut routed: BTreeSet<ReleaseId> = slots.map(|key| key.release.clone()).collect();
        let mut ports: Vec<u16> = Vec::new();
        for way in proxy.vhost(&self.app).into_iter().flat_map(crate::model::proxy::Vhost::all) {
            if let Upstreams::Ports(more) = &way.upstreams {
                ports.extend(more);
            }
        }
        let is_routed = |i: &&Instance| i.addresses().any(|a| matches!(a, Address::Port(p) if ports.contains(p)));
        routed.extend(observed.instances.iter().filter(is_routed).map(|i| i.key.release.clone()));
        if self.turn.intended.target().is_some_and(|target| target.ingress.is_none()) {
            let runs =
                |release: &&ReleaseId| observed.instances.iter().any(|i| i.key.release == **release && i.is_running());
            let switched = records.permit.iter().filter_map(|permit| permit.value.as_ref());
            let switched = switched.filter(|permit| permit.phase == PermitPhase::Switch).map(|permit| &permit.release);
            routed.extend(observed.proven.iter().chain(switched).filter(runs).cloned());
        }
        routed
    }

    /// Verdicts of this host that still count: one against the wanted release lapses when a person asks for another try.
    fn verdicts(&self, wall: impl Fn(Timestamp) -> Timestamp) -> Vec<(ReleaseId, HostVerdict)> {
        let wanted = self.turn.intended.target();
        let has_lapsed = |release: &ReleaseId, verdict: &Verdict| {
            let target = wanted.filter(|target| target.release.id == *release);
            target.is_some_and(|target| !verdict.is_under(&target.conditions()))
        };
        let verdicts = self.observed().into_iter().flat_map(|observed| &observed.verdicts);
        let verdicts = verdicts.filter(|(release, verdict)| !has_lapsed(release, verdict));
        let one = |(release, verdict): (&ReleaseId, &Verdict)| {
            let verdict = HostVerdict {
                version: VERSION,
                cause: verdict.cause.clone(),
                exit_code: verdict.exit_code,
                log_tail: verdict.log_tail.clone(),
                at: wall(verdict.at),
            };
            (release.clone(), verdict)
        };
        verdicts.map(one).collect()
    }
}

/// The desired state with another target in the place of its own.
fn in_place(intended: &DesiredApp, of: impl Fn(&Target) -> Target) -> DesiredApp {
    match intended {
        DesiredApp::Run(wanted) => DesiredApp::Run(of(wanted)),
        DesiredApp::Invalid { problems, last_good: Some(wanted) } => {
            DesiredApp::Invalid { problems: problems.clone(), last_good: Some(of(wanted)) }
        }
        other => other.clone(),
    }
}

/// A kept release, with all that it was made from.
fn pinned(wanted: &Target, kept: &Target) -> Target {
    let Target { created, modified, cordoned, retried, .. } = *wanted;
    Target { created, modified, cordoned, retried, ..kept.clone() }
}

/// A kept release in the place of the wanted one. What makes no release, such as replicas and virtual hosts, is as it is
/// wanted now: the record may be older than the last change of it. Only where the app listens goes with its release.
fn meanwhile(wanted: &Target, kept: &Target) -> Target {
    let endpoints = |target: &Target| (target.release.endpoint.clone(), target.release.more_endpoints.clone());
    let ingress = if endpoints(wanted) == endpoints(kept) { &wanted.ingress } else { &kept.ingress };
    Target { release: kept.release.clone(), ingress: ingress.clone(), ..wanted.clone() }
}

/// Which image a release is in the fleet.
fn image(target: &Target, records: &HostRecords) -> FleetImage {
    image_of(target, records.digests.get(&target.release.id))
}

/// The verdict of this host against a release, as the store has it.
fn failed(records: &HostRecords, release: &ReleaseId) -> Option<Verdict> {
    let verdict = records.verdicts.get(release)?.clone()?;
    let HostVerdict { cause, exit_code, log_tail, at, .. } = verdict;
    let (release, conditions) = (release.clone(), String::new());
    Some(Verdict { release, cause, exit_code, log_tail, at, attempts: 1, conditions })
}

/// Removes the container of a command whose end is known.
fn remove_command<M: Machine>(jobs: &mut JoinSet<Completion>, machine: &Arc<M>, app: &AppName, release: ReleaseId) {
    let (machine, app) = (machine.clone(), app.clone());
    jobs.spawn(async move {
        if let Err(e) = machine.remove_command(&app, &release).await {
            tracing::warn!(%app, %release, "the container of the release command stays: {e}");
        }
        Completion::CommandRemoved
    });
}

impl<M: Machine> Agent<M> {
    fn rollouts(&self) -> Option<std::sync::Arc<HostRollouts>> {
        self.rollouts.as_ref().and_then(|link| link.rollouts.borrow().clone())
    }

    /// Whether this host takes turns. One that does not converges by itself.
    pub(super) fn takes_turns(&self) -> bool {
        self.rollouts.as_ref().is_some_and(|link| !link.is_alone())
    }

    /// Calls a function with the facts about an app, and its records.
    fn with_facts<T>(
        &self,
        app: &AppName,
        rollouts: &HostRollouts,
        now: Timestamp,
        call: impl FnOnce(&HostFacts<'_>, &HostRecords) -> T,
    ) -> Option<T> {
        let state = self.apps.get(app)?;
        let observed = state.observed()?;
        let nothing = HostRecords::default();
        let records = rollouts.records.get(app).unwrap_or(&nothing);
        let routed = state.routed(&self.proxy.observed, records);
        let verdicts = state.verdicts(|at| self.machine.wall(at));
        // Of an invalid app, what was wanted last.
        let wanted = state.turn.intended.target();
        let update = wanted.map(|target| target.update.clone()).unwrap_or_default();
        let plan = state.planned.as_ref().filter(|plan| plan.healthy > 0);
        let facts = HostFacts {
            app,
            host: self.machine.host(),
            wanted: wanted.map(|target| &target.release.id),
            has_command: wanted.is_some_and(|target| target.release_command.is_some()),
            command_end: state.turn.command_end.as_ref(),
            command_trouble: state.turn.command_trouble.as_deref(),
            pulled: state.pulled(),
            run: self.rollouts.as_ref().map_or("", |link| &link.run),
            retried: wanted.map_or(0, |target| target.retried),
            update: &update,
            detection: wanted.map_or(Duration::ZERO, |target| {
                let check = &target.release.health;
                check.interval.saturating_mul(check.retries)
            }),
            proven: observed.proven.as_ref(),
            routed: &routed,
            serving: plan.and_then(|plan| plan.serving.as_ref()),
            verdicts: &verdicts,
            confirmed: state.turn.confirmed.is_some_and(|at| now.since(at) < CONFIRMED),
        };
        Some(call(&facts, records))
    }

    /// Brings what an app is to run, and how far it may go, up to date with the records of the fleet.
    pub(super) fn follow_rollout(&mut self, app: &AppName, now: Timestamp) {
        if self.rollouts.is_none() {
            return;
        }
        let (rollouts, takes_turns) = (self.rollouts(), self.takes_turns());
        let Some(state) = self.apps.get(app) else { return };
        let decided = match (state.turn.intended.target(), &rollouts) {
            (None, _) => Directive::Wanted(Turn::Free),
            (Some(_), None) if !takes_turns => Directive::Wanted(Turn::Free),
            (Some(_), None) => Directive::Wanted(Turn::Held("the records of its rollout were not read yet".into())),
            (Some(_), Some(rollouts)) => match self.with_facts(app, rollouts, now, directive) {
                Some(directive) => directive,
                // It is not observed yet, and nothing is done before.
                None => return,
            },
        };
        let kept = |release: &ReleaseId| rollouts.as_ref()?.kept.get(&(app.clone(), release.clone())).cloned();
        let grace = self.options.delete_grace;
        let records = rollouts.as_ref().and_then(|rollouts| rollouts.records.get(app));
        let Some(state) = self.apps.get_mut(app) else { return };
        let intended = state.turn.intended.clone();
        let failed = intended.target().and_then(|target| failed(records?, &target.release.id));
        let (desired, turn, why) = match decided {
            Directive::Wanted(turn) => (intended, turn, None),
            Directive::Kept(release, why) => match kept(&release) {
                Some(kept) => {
                    let desired = in_place(&intended, |wanted| meanwhile(wanted, &kept));
                    (desired, Turn::Free, Some(Kept::Meanwhile(why)))
                }
                // What was proven here before serves on, if it does.
                None => (intended, Turn::Held(why), None),
            },
            Directive::Pinned(release) => match kept(&release) {
                Some(kept) => (in_place(&intended, |wanted| pinned(wanted, &kept)), Turn::Free, Some(Kept::Pinned)),
                None => (intended, Turn::Held("the pinned release is not kept in the store".to_owned()), None),
            },
        };
        if state.turn.turn.may_switch() && !turn.may_switch() {
            // What the last plan wishes of nginx must not be published any more.
            state.fresh.change_desired();
        } else if state.turn.turn != turn || state.turn.kept != why || state.turn.failed != failed {
            state.fresh.request_plan();
        }
        (state.turn.turn, state.turn.kept, state.turn.failed) = (turn, why, failed);
        let image = match (desired.target(), records) {
            (Some(target), Some(records)) => image(target, records),
            (Some(target), None) if rollouts.is_none() && takes_turns => match FleetImage::of(target, None) {
                FleetImage::Unwritten => FleetImage::Unread,
                other => other,
            },
            // An app without records is in no rollout.
            _ => FleetImage::AsNamed,
        };
        state.set_image(image);
        state.set_desired(desired, None, now, grace);
    }

    /// Writes what is to be written about the turn of an app, if nothing is under way for it. Returns true while the app
    /// waits for the answer.
    pub(super) fn write_turn(&mut self, app: &AppName, is_ready: bool, now: Timestamp) -> bool {
        let Some(state) = self.apps.get(app) else { return false };
        if state.turn.writing.is_some() {
            return true;
        }
        // What is under way may move requests, and is in no observation yet.
        if state.busy.is_some() || self.proxy.busy || !state.fresh.has_observed() {
            return false;
        }
        let Some(rollouts) = self.rollouts() else { return false };
        let write: Option<Option<Transaction>> = self.with_facts(app, &rollouts, now, |facts, records| {
            next_write(facts, records, is_ready, self.machine.wall(now))
        });
        let (Some(Some(transaction)), Some(link)) = (write, &self.rollouts) else { return false };
        let Some(state) = self.apps.get_mut(app) else { return false };
        if now < state.turn.write_after {
            let at = state.turn.write_after;
            state.wake = Some(state.wake.map_or(at, |wake| wake.min(at)));
            return false;
        }
        if transaction.kind == TransactionKind::GiveBack {
            // It may be made late, without an answer: before requests move in this turn, its record is written again.
            state.turn.confirmed = None;
        }
        // The task at the other end outlives the loop.
        let sent = link.requests.send(Request { app: app.clone(), transaction }).is_ok();
        state.turn.writing = sent.then_some(now);
        sent
    }

    /// Runs the command of a release whose start this host has written, or waits for its end.
    pub(super) fn run_command(&mut self, app: &AppName, now: Timestamp) {
        let Some(rollouts) = self.rollouts() else { return };
        let (Some(records), Some(link)) = (rollouts.records.get(app), &self.rollouts) else { return };
        let Some(state) = self.apps.get_mut(app) else { return };
        // Nothing is started while something of the app may not be created.
        let refused = |t: &Target| !self.policy.refusals(app, &t.release, t.ingress.as_ref()).is_empty();
        let is_refused = self.nested.contains_key(app) || state.turn.intended.target().is_some_and(refused);
        if state.turn.running_command || now < state.turn.write_after || is_refused {
            return;
        }
        let own = |run: &&CommandRun| run.state == CommandState::Started && run.host == *self.machine.host();
        let mut started: Vec<(&ReleaseId, &CommandRun)> = records
            .commands
            .iter()
            .filter_map(|(release, run)| Some((release, run.value.as_ref().filter(own)?)))
            .collect();
        // What was known of a run that its record is not of any more is of no use.
        let is_ended = |ended: &EndedCommand| {
            started.iter().any(|(release, run)| **release == ended.release && run.started == ended.started)
        };
        let stale = state.turn.command_end.take_if(|ended| !is_ended(ended));
        // The next run of the same command removes what this one left by itself, and must not lose its own container.
        if let Some(stale) = stale.filter(|stale| !started.iter().any(|(release, _)| **release == stale.release)) {
            remove_command(&mut self.jobs, &self.machine, app, stale.release);
        }
        started.retain(|(release, run)| {
            let known = state.turn.command_end.as_ref();
            known.is_none_or(|ended| ended.release != **release || ended.started != run.started)
        });
        // That of the wanted release first: another one may wait for good.
        let wanted = state.turn.intended.target().map(|target| &target.release.id);
        started.sort_by_key(|(release, _)| Some(*release) != wanted);
        let Some((release, run)) = started.first() else { return };
        state.turn.running_command = true;
        let (app, release, is_own) = (app.clone(), (*release).clone(), run.run == link.run);
        let target = state.turn.intended.target().cloned();
        let own = target.as_ref().filter(|target| target.release.id == release);
        let image = own.map_or(FleetImage::AsNamed, |target| image(target, records));
        if image == FleetImage::Unreadable {
            (state.turn.command_trouble, state.turn.running_command) = (Some(UNREADABLE_IMAGE.to_owned()), false);
            return;
        }
        let (machine, run) = (self.machine.clone(), (*run).clone());
        tracing::debug!(%app, %release, "the release command is run, or waited for");
        self.jobs.spawn(async move {
            let ended = machine.run_command(&app, &release, target.as_ref(), &image, (&run, is_own)).await;
            Completion::CommandEnded(app, ended)
        });
    }

    /// The command of a release ended, or nothing can be said about it now.
    pub(super) fn on_command_ended(&mut self, app: &AppName, ended: Result<EndedCommand, StepError>) {
        let now = self.machine.now();
        let Some(state) = self.apps.get_mut(app) else { return };
        state.turn.running_command = false;
        match ended {
            Ok(ended) => {
                tracing::info!(%app, release = %ended.release, "the release command has ended: {}", ended.end);
                (state.turn.command_end, state.turn.command_trouble) = (Some(ended), None);
            }
            Err(e) => {
                let trouble = chain(&e);
                if state.turn.command_trouble.as_ref() != Some(&trouble) {
                    tracing::warn!(%app, "the release command cannot be run now: {trouble}");
                }
                state.turn.command_trouble = Some(trouble);
                state.turn.write_after = now.plus(COMMAND_RETRY);
                state.wake = Some(state.wake.map_or(state.turn.write_after, |at| at.min(state.turn.write_after)));
            }
        }
        state.fresh.request_plan();
    }

    /// A write was made, or not.
    pub(super) fn on_turn_written(&mut self, answer: &Answer) {
        let now = self.machine.now();
        let Some(state) = self.apps.get_mut(&answer.app) else { return };
        let sent = state.turn.writing.take();
        match answer.made {
            Some(true) if answer.kind == TransactionKind::Commit => state.turn.confirmed = sent,
            Some(true) if answer.kind == TransactionKind::EndCommand => {
                if let Some(ended) = state.turn.command_end.take() {
                    remove_command(&mut self.jobs, &self.machine, &answer.app, ended.release);
                }
            }
            Some(true) => {}
            Some(false) => state.turn.write_after = now.plus(REFUSED),
            None => state.turn.write_after = now.plus(FAILED),
        }
        state.fresh.request_plan();
    }

    /// The records of the fleet changed, or whether this host takes turns.
    pub(super) fn on_rollouts_changed(&mut self) {
        let takes_turns = self.takes_turns();
        if std::mem::replace(&mut self.took_turns, takes_turns) != takes_turns {
            // Whether an app can run here depends on it.
            self.snapshot = None;
            self.apply_update();
        }
        let (now, apps): (_, Vec<AppName>) = (self.machine.now(), self.apps.keys().cloned().collect());
        for app in apps {
            self.follow_rollout(&app, now);
            if let Some(state) = self.apps.get_mut(&app) {
                state.fresh.request_plan();
            }
        }
    }
}
