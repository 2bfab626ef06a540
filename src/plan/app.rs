//! The next safe step for one app.
//!
//! Safety comes from the order: first keep what serves serving, then bring the wanted release up beside it; retire only
//! what is neither wanted nor routed. The planner keeps no state: every answer follows from the input.
//!
//! # Precedence
//!
//! The first step wins: once `Draft::step` has set one, later ones are ignored. A step whose kind is in backoff, or
//! whose container is being stopped, becomes a wait, and a later step may win. Waits and blocks accumulate.
//!
//! 1. Containers of the app belong to another agent: block `foreign`, supervise only.
//! 2. A routed socket path is not a socket, or the kernel's table leads to an address where nobody answers: `Switch`
//!    away from it. Not for a paused app.
//! 3. By desired state:
//!    - `Paused`: block, no step.
//!    - `Absent`, within the grace period of a deletion: wait `deletion`, supervise only. After that, leave the host:
//!      remove the vhost, `Switch` to no routes, drain, `Stop`, `Remove`, `CleanUp` of everything.
//!    - `Unknown`, since the store was not read: only a `Switch` from an unhealthy instance to a healthy sibling.
//!    - `Invalid`: block; go on with the last valid target, or supervise only if there is none.
//!    - `Run`: go on.
//! 4. Another app holds one of its virtual hosts: block `host_taken`, supervise only. The policy of the host refuses one
//!    of them that is not served yet: block `not_allowed`, supervise only. The host is cordoned, and the app
//!    has no instance on it: block `cordoned`, no step.
//! 5. Supervise the serving release: `Start` an established instance that does not run, or `ClearSocket` if Docker
//!    cannot restart it. Not while a stop-first change stops that release.
//! 6. A verdict applies to the wanted release: block `halted`, and skip 7 and 8.
//! 7. Candidates of superseded releases, once they are as many as the replicas: drain, `Stop`, `Remove`.
//! 8. Roll out the wanted release. It is not this host's turn, and the release is not proven: wait `turn` instead.
//!    1. it is not proven, and a candidate failed: `RecordVerdict`;
//!    2. a candidate failed without a verdict: `Remove` (its port is taken, or it was leaving), else `Discard`;
//!    3. an instance is missing, and another mount can replace a volume: block `mount_unsafe`; or the policy of the host
//!       refuses the release: block `not_allowed`;
//!    4. an instance is missing, and the image too: `Pull`, or block `image_missing`, or `RecordVerdict` if the registry
//!       does not have it; the digest of the first image is to be written: wait `digest`;
//!    5. the release has no env-file: `WriteEnvFile`;
//!    6. an instance is missing: `Create`, unless discarded candidates are in backoff;
//!    7. stop-first, not proven, and no instance is missing: `Stop` the instances of other releases; wait `commit` if the
//!       turn does not go so far yet;
//!    8. a selected instance does not run: `Start`; it is not healthy: wait `health`, or `recovery` if in service.
//!    9. all are healthy, not proven, and the turn does not go so far yet: wait `commit`.
//! 9. Route to the wanted release if it is ready or proven, else to the serving one: `Switch`, or a new vhost and the
//!    wait `proxy`.
//! 10. Ready and routed: wait `monitor` if the turn asks for it, then `Prove`, or `RecordVerdict` after too many failed proofs. Once proven: `Settle` each instance.
//! 11. Retire instances that are neither selected, nor of the serving release, nor routed: drain, `Stop`, `Remove`.
//! 12. `CleanUp` of files that nothing needs.
//!
//! While a step is in flight, `Draft::finish` drops the planned one and waits `busy`. *Supervise only* means 5, then
//! the `Switch` of `Unknown`.

use std::time::Duration;

use super::{
    AppInput, AppPlan,
    draft::Draft,
    group::{
        Group, failure_reason, handle, is_established, of_release, recovery_time, stopped_for_good, verdict,
        verdict_applies, verdict_through_nginx, verdict_without_instance,
    },
    retire, routes,
    step::{IMAGE_ABSENT, Planned, Step, StepKind},
    wait::{Block, Wait},
};
use crate::model::{
    desired::{DesiredApp, Target},
    fleet::{FleetImage, Turn, UNREADABLE_IMAGE},
    images::ASKED,
    name::{ReleaseId, VirtualHost},
    observed::{Health, Instance, InstanceKey, Phase, Verdict},
    policy::Refusal,
    spec::{Ingress, Order, Probe, PullPolicy, SETTLE},
    time::Timestamp,
};

/// Failed proofs through nginx after which the release has failed.
const MAX_FAILED_PROOFS: u32 = 3;
/// Candidates killed from outside after which the release has failed: a program can also exit with such a code.
const MAX_KILLS: u32 = 5;
/// Recheck interval of a candidate that is past its deadline and waits for its next probe.
const OVERDUE_RECHECK: Duration = Duration::from_secs(1);
/// First pause before a failed release is retried while none was ever proven; it doubles each time.
const RETRY_FIRST: Duration = Duration::from_secs(5);
/// Longest such pause.
const RETRY_MAX: Duration = Duration::from_secs(300);
/// Reason for an instance created beside an unhealthy one in service.
pub const REPLACES_UNHEALTHY: &str = "an unhealthy instance is replaced";
/// Recheck interval until the failed candidate is gone.
const RETRY_RECHECK: Duration = Duration::from_millis(500);
/// Recheck interval for an image with `pull_policy: never`.
const IMAGE_RECHECK: Duration = Duration::from_secs(5);

/// Plans one app.
pub fn plan_app(input: &AppInput<'_>) -> AppPlan {
    let mut draft = Draft::new(input);
    if let Some(foreign) = input.observed.foreign.first() {
        let (name, owner) = (foreign.name.clone(), foreign.owner.clone());
        draft.plan.blocks.push(Block::Foreign { name, owner });
        draft.supervise_only();
        return draft.finish();
    }
    if !matches!(input.desired, DesiredApp::Paused(_)) {
        routes::unroute_wrong_addresses(&mut draft);
    }
    match input.desired {
        DesiredApp::Paused(reason) => {
            draft.plan.blocks.push(Block::Paused(reason.clone()));
            let serving = draft.serving();
            draft.count(serving.as_ref());
        }
        DesiredApp::Absent(_) => match input.stays_until.filter(|until| input.now < *until) {
            Some(until) if !input.observed.instances.is_empty() => {
                draft.wait(Wait::Deletion(until));
                draft.supervise_only();
            }
            _ => retire::leave_host(&mut draft),
        },
        DesiredApp::Invalid { problems, last_good } => {
            draft.plan.blocks.push(Block::Invalid(problems.clone()));
            match last_good {
                Some(target) => draft.run(target),
                None => draft.supervise_only(),
            }
        }
        DesiredApp::Unknown(why) => draft.keep_routes_only(why),
        DesiredApp::Run(target) => draft.run(target),
    }
    draft.finish()
}

impl<'a> Draft<'a> {
    /// The release that serves: the proven one if it has instances, else that of the last settled instance.
    fn serving(&self) -> Option<ReleaseId> {
        let instances = &self.observed().instances;
        let proven = self.observed().proven.clone().filter(|r| instances.iter().any(|i| i.key.release == *r));
        proven.or_else(|| instances.iter().filter(|i| i.settled).map(|i| i.key.release.clone()).next_back())
    }

    /// Converges, unless another app's claim or a cordon is in the way.
    fn run(&mut self, target: &Target) {
        if let Some(conflict) = &self.input.conflict {
            let (host, path, owner) = (conflict.host.clone(), conflict.path.clone(), conflict.owner.clone());
            self.plan.blocks.push(Block::HostTaken { host, path, owner });
            self.supervise_only();
        } else if let Some(refused) = self.new_hosts_refused(target) {
            self.plan.blocks.push(Block::NotAllowed(refused));
            self.supervise_only();
        } else if target.cordoned && self.observed().instances.is_empty() {
            self.plan.blocks.push(Block::Cordoned);
        } else {
            self.converge(target);
        }
    }

    /// The virtual hosts that the policy does not let the app have, if it has not all of them already.
    fn new_hosts_refused(&self, target: &Target) -> Option<Vec<Refusal>> {
        let refused = self.input.policy.refused_hosts(self.input.app, target.ingress.as_ref());
        let served = |host: &VirtualHost| self.input.proxy.live.is_some_and(|live| live.hosts().any(|h| h == host));
        let is_new = refused.iter().any(|(host, _)| !served(host));
        is_new.then(|| refused.into_iter().map(|(_, refusal)| refusal).collect())
    }

    /// Keeps routes on running instances, and starts nothing: the app may have been leaving.
    fn keep_routes_only(&mut self, why: &str) {
        let observed = self.observed();
        if observed.instances.is_empty() && !observed.has_routes() {
            return;
        }
        self.wait(Wait::Store(why.to_owned()));
        let serving = self.serving();
        if let Some(release) = &serving {
            routes::keep_serving(self, release);
        }
        self.count(serving.as_ref());
    }

    /// Keeps what serves serving, and changes nothing else.
    fn supervise_only(&mut self) {
        let serving = self.serving();
        if let Some(release) = &serving {
            self.supervise(of_release(self.observed(), release));
            routes::keep_serving(self, release);
        }
        self.count(serving.as_ref());
    }

    fn converge(&mut self, target: &Target) {
        let observed = self.observed();
        let wanted = &target.release.id;
        let proven = observed.proven.as_ref() == Some(wanted);
        let verdict = self.verdict(target).filter(|_| !proven);
        let serving = if proven { Some(wanted.clone()) } else { self.serving() };

        // A stop-first change stops what serves on purpose; starting it again would undo that.
        // The same while the turn has to be confirmed again, or is not known yet after a restart: if the new one runs, the old
        // one was stopped for it.
        let of_wanted = |i: &&Instance| i.key.release == *wanted;
        let has_begun = matches!(self.input.turn, Turn::Free | Turn::Switch { .. })
            || observed.instances.iter().filter(of_wanted).any(Instance::is_alive);
        let changing_over = target.order == Order::StopFirst
            && !proven
            && has_begun
            && verdict.is_none()
            && observed.instances.iter().any(|i| i.key.release == *wanted);
        let group = Group::of(self.input, target, proven);
        match &serving {
            Some(release) if release == wanted => self.supervise(group.selected.iter().copied()),
            Some(release) if !changing_over => self.supervise(of_release(observed, release)),
            _ => {}
        }
        let ready = match verdict {
            Some((verdict, retry)) => {
                self.plan.blocks.push(Block::Halted(verdict.clone()));
                if let Some(until) = retry {
                    self.wait(Wait::Retry { until, attempts: verdict.attempts });
                }
                false
            }
            None => {
                retire::end_abandoned_candidates(self, target, serving.as_ref());
                match self.input.turn {
                    Turn::Held(why) if !proven => {
                        self.wait(Wait::Turn(why.clone()));
                        false
                    }
                    _ => self.roll_out(target, &group, proven) && self.may_switch(proven),
                }
            }
        };
        let active = if ready || proven { Some(wanted) } else { serving.as_ref().filter(|s| *s != wanted) };
        let routed = routes::route(self, target, active, &group);
        if ready && routed {
            self.prove(target, &group, proven);
        }
        let kept = if verdict.is_some() { None } else { Some(&group) };
        retire::retire(self, target, kept, serving.as_ref().filter(|_| !proven), proven);
        retire::clean_up(self, Some(wanted));
        self.count(if proven { Some(wanted) } else { serving.as_ref() });
    }

    /// Whether requests may move to the wanted release, and its predecessor may be stopped for it. If not, the plan says
    /// that all is ready for it.
    fn may_switch(&mut self, proven: bool) -> bool {
        let may = proven || self.input.turn.may_switch();
        if !may {
            self.plan.commits = true;
            self.wait(Wait::Commit);
        }
        may
    }

    /// The verdict that applies to the wanted release, and when the release is retried in spite of it. A verdict lapses
    /// when its conditions change. While no release was ever proven a retry costs nothing, and a dependency may be
    /// available by then.
    fn verdict(&self, target: &Target) -> Option<(&'a Verdict, Option<Timestamp>)> {
        let observed = self.observed();
        let verdict = observed.verdicts.get(&target.release.id)?;
        if !verdict_applies(self.input, target, verdict) {
            return None;
        }
        if observed.proven.is_some() {
            return Some((verdict, None));
        }
        let pause = RETRY_FIRST.saturating_mul(1 << verdict.attempts.saturating_sub(1).min(10)).min(RETRY_MAX);
        let until = verdict.at.plus(pause);
        // The failed candidates must be gone first.
        let failed = |i: &Instance| i.key.release == target.release.id && i.started <= verdict.at;
        if self.input.now >= until && !observed.instances.iter().any(failed) {
            return None;
        }
        Some((verdict, Some(until.max(self.input.now.plus(RETRY_RECHECK)))))
    }

    /// Restarts instances in service that have exited.
    fn supervise(&mut self, instances: impl Iterator<Item = &'a Instance>) {
        let stays = |i: &&Instance| is_established(self.input, i) && !stopped_for_good(i) && !i.port_taken;
        for instance in instances.filter(stays).collect::<Vec<_>>() {
            match instance.phase {
                Phase::Exited(_) | Phase::Created | Phase::Paused => {
                    self.step(Step::Start(handle(instance)), "it should run and does not");
                }
                Phase::Restarting if instance.stale_socket => {
                    self.step(Step::ClearSocket(handle(instance)), "a dead socket is in the way of its next start");
                }
                _ => {}
            }
        }
    }

    /// Brings the wanted release up. Returns true when all its instances are healthy (once proven: one of them).
    fn roll_out(&mut self, target: &Target, group: &Group<'_>, proven: bool) -> bool {
        let release = &target.release;
        if !proven && let Some(failed) = group.failure(self.input, target) {
            self.plan.step.get_or_insert(Planned::new(failed, "the release failed"));
            return false;
        }
        let discarded = self.input.backoffs.get(&StepKind::Discard).map_or(0, |c| c.attempts);
        if let Some(instance) =
            group.failed_candidates.iter().find(|i| !i.leaving).filter(|_| !proven && discarded >= MAX_KILLS)
        {
            let cause = format!("{} {MAX_KILLS} times before it was healthy", failure_reason(instance));
            let exit_code = match instance.phase {
                Phase::Exited(code) => Some(code),
                _ => None,
            };
            let verdict = verdict(self.input, target, instance, cause, exit_code);
            self.step(verdict, "the release failed");
            return false;
        }
        if let Some(instance) = group.failed_candidates.iter().find(|i| i.port_taken) {
            self.step(Step::Remove(handle(instance)), "another program has its port");
        } else if let Some(instance) = group.failed_candidates.iter().find(|i| i.leaving) {
            self.step(Step::Remove(handle(instance)), "it was ended when another release was wanted");
        } else if let Some(instance) = group.failed_candidates.first() {
            let why = failure_reason(instance);
            self.step(Step::Discard { handle: handle(instance), why }, "a replacement did not become healthy");
        }
        let missing = usize::from(target.replicas).saturating_sub(group.selected.len());
        let known = group.image().filter(|_| !self.observed().image_lost);
        let image = known.or_else(|| self.observed().image.clone());
        let is_first = group.all.is_empty() && !proven;
        let env_written = self.observed().env_files.contains(&release.id);
        if missing > 0
            && let Some(nested) = self.input.nested
        {
            self.plan.blocks.push(Block::MountUnsafe(nested.clone()));
            return proven && self.is_served(group);
        }
        if missing > 0 {
            let refused = self.input.policy.refusals(self.input.app, release, target.ingress.as_ref());
            if !refused.is_empty() {
                self.plan.blocks.push(Block::NotAllowed(refused));
                return proven && self.is_served(group);
            }
        }
        if missing > 0 {
            // What a digest names is never another image.
            let is_read = *self.input.image != FleetImage::Unread;
            let may_be_old = target.pull_policy == PullPolicy::Always && self.input.image.digest().is_none() && is_read;
            let fresh = may_be_old && group.all.is_empty() && !self.observed().pulled;
            if image.is_none() || fresh {
                if target.pull_policy == PullPolicy::Never {
                    let error = format!("image `{}` is not on this host and `pull_policy` is `never`", release.image);
                    self.plan.blocks.push(Block::ImageMissing(error));
                    // Docker emits no event that wakes the loop when an image is loaded.
                    self.wait(Wait::Image(self.input.now.plus(IMAGE_RECHECK)));
                } else if !is_read {
                    // By its tag another image could take the place of the proven one.
                    self.wait(Wait::Store("which image its release is has not been read yet".to_owned()));
                } else if let Some(absent) = self.absent_image(group).filter(|_| !proven) {
                    let verdict = verdict_without_instance(self.input, target, absent);
                    self.step(verdict, "the release failed");
                } else {
                    let (image, digest) = (release.image.clone(), self.input.image.digest().cloned());
                    self.step(Step::Pull { image, digest }, "the image is not on this host");
                }
                return false;
            }
            if is_first && *self.input.image == FleetImage::Unreadable {
                self.wait(Wait::Turn(UNREADABLE_IMAGE.to_owned()));
                return false;
            }
            // One that was not pulled by an agent is on this host alone.
            if is_first && *self.input.image == FleetImage::Unwritten && self.observed().image_digest.is_some() {
                self.wait(Wait::Digest);
                return false;
            }
        }
        if !env_written {
            self.step(Step::WriteEnvFile(release.clone()), "the release has no env-file");
        }
        if missing > 0
            && let Some(image) = image
        {
            let key = InstanceKey { release: release.id.clone(), number: group.free_number() };
            let drain = target.ingress.as_ref().map_or(Duration::ZERO, Ingress::longest_drain);
            let named = |i: &&VirtualHost| !i.is_catch_all();
            let host = target.ingress.as_ref().and_then(|i| i.hosts.iter().find(named)).map(VirtualHost::example);
            let step = Step::Create { key, release: release.clone(), image, drain, host };
            // A discarded candidate is a reason to back off, though creating it succeeded.
            if !self.is_backing_off(StepKind::Discard) {
                let reason = match (group.all.is_empty(), group.replaces_unhealthy) {
                    (true, _) => "the release has no instance",
                    (false, true) => REPLACES_UNHEALTHY,
                    (false, false) => "an instance is missing",
                };
                self.step(step, reason);
            }
        }
        if !proven && target.order == Order::StopFirst {
            // Only once the new instance is ready to start: this keeps the gap short.
            if missing > 0 {
                return false;
            }
            let mut others = self.observed().instances.iter().filter(|i| i.key.release != release.id);
            if let Some(old) = others.find(|i| i.is_alive()) {
                if !self.may_switch(proven) {
                    return false;
                }
                let step = Step::Stop { handle: handle(old), grace: old.grace };
                self.step(step, "stop-first: the old instance stops first");
                return false;
            }
        }
        for instance in &group.selected {
            match (&instance.phase, &instance.health) {
                (Phase::Created, _) => self.step(Step::Start(handle(instance)), "it was created and not started"),
                (Phase::Paused, _) => self.step(Step::Start(handle(instance)), "it is paused"),
                (Phase::Exited(_), _) => self.step(Step::Start(handle(instance)), "it should run and does not"),
                (Phase::Running, Health::Healthy) | (Phase::Removing, _) => {}
                (Phase::Running | Phase::Restarting, Health::Unhealthy { since, answer })
                    if proven && is_established(self.input, instance) =>
                {
                    let until = since.plus(recovery_time(instance));
                    self.wait(Wait::Recovery { key: instance.key.clone(), until, answer: answer.clone() });
                }
                (Phase::Running | Phase::Restarting, health) => {
                    let answer = match health {
                        Health::Starting(answer) | Health::Unhealthy { answer, .. } => answer.clone(),
                        _ => String::new(),
                    };
                    let until = instance.deadline();
                    // No event says that a container has run long enough.
                    let settles = instance.started.plus(SETTLE);
                    let by_time = instance.check.probe == Probe::Running && self.input.now < settles;
                    let again = match self.input.now {
                        now if by_time => settles.max(now),
                        now if now < until => until,
                        // The next probe is about to answer.
                        now => now.plus(OVERDUE_RECHECK),
                    };
                    self.wait(Wait::Health { key: instance.key.clone(), until, answer, again });
                }
            }
        }
        let healthy = group.selected.iter().filter(|i| i.is_running() && i.health.is_healthy()).count();
        healthy >= usize::from(target.replicas) || (proven && healthy > 0)
    }

    /// Why the release has failed without an instance: its image is not in the registry, which was asked more than once.
    /// Before anything is proven it is tried for ever: nothing is lost by that.
    fn absent_image(&self, group: &Group<'_>) -> Option<String> {
        let is_another_proven = self.observed().proven.is_some() && group.all.is_empty();
        let asked = self.input.backoffs.get(&StepKind::Pull).filter(|_| is_another_proven)?;
        let is_absent = asked.kind == IMAGE_ABSENT && asked.attempts >= ASKED && asked.until > self.input.now;
        is_absent.then(|| asked.error.clone())
    }

    fn is_served(&self, group: &Group<'_>) -> bool {
        group.selected.iter().any(|i| i.is_running() && i.health.is_healthy())
    }

    fn prove(&mut self, target: &Target, group: &Group<'_>, proven: bool) {
        let check = &target.release.health;
        let proofs = MAX_FAILED_PROOFS.max(check.retries);
        if !proven {
            let monitored = self.moved(group).plus(self.input.turn.monitor());
            if self.input.now < monitored {
                self.wait(Wait::Monitor(monitored));
                return;
            }
            if let Some(backoff) =
                self.input.backoffs.get(&StepKind::Prove).filter(|c| c.attempts >= proofs && !c.temporary)
                && let Some(first) = group.selected.first()
            {
                let cause = format!("it is healthy, and does not answer through nginx: {}", backoff.error);
                self.step(verdict_through_nginx(self.input, target, first, cause), "the release failed");
                return;
            }
            let release = target.release.id.clone();
            let step = Step::Prove { release, ingress: target.ingress.clone(), check: check.clone() };
            self.step(step, "the release is routed and not proven");
        }
        for instance in group.selected.iter().filter(|i| proven && !i.settled && i.health.is_healthy()) {
            self.step(Step::Settle(handle(instance)), "it is proven");
        }
    }

    /// Since when the wanted release serves: requests were moved to it, and its instances have started.
    fn moved(&self, group: &Group<'_>) -> Timestamp {
        let started = group.selected.iter().map(|i| i.started);
        let routed = [self.observed().slots_changed, self.input.proxy.changed];
        started.chain(routed).max().unwrap_or(self.input.now)
    }

    /// Sets the serving release and its healthy instances, for the status.
    fn count(&mut self, serving: Option<&ReleaseId>) {
        let Some(serving) = serving else { return };
        let instances = self.observed().instances.iter();
        let healthy =
            instances.filter(|i| i.key.release == *serving && i.is_running() && i.health.is_healthy()).count();
        self.plan.healthy = u16::try_from(healthy).unwrap_or(u16::MAX);
        self.plan.serving = Some(serving.clone());
    }
}
