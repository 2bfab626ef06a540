//! What is safe to do next for one app.
//!
//! The order is the safety. What serves is kept serving first; then the wanted release is brought up beside it; only
//! what is neither wanted nor routed leaves. Nothing here remembers anything: every answer follows from the input.

use std::time::Duration;

use super::{
    AppInput, AppPlan,
    draft::Draft,
    group::{
        Group, ending, handle, is_established, is_left, of_release, patience, still_holds, verdict,
        verdict_through_nginx,
    },
    retire, routes,
    step::{Planned, Step, StepKind},
    wait::{Block, Wait},
};
use crate::model::{
    desired::{DesiredApp, Target},
    name::{ReleaseId, VirtualHost},
    observed::{Health, Instance, InstanceKey, Phase, Verdict},
    spec::{Ingress, Order, Probe, PullPolicy, SETTLE},
    time::Timestamp,
};

/// Proofs through nginx that may fail before the release is given up.
const PROOFS: u32 = 3;
/// Candidates of a release that may be killed from outside before the release is given up: programs can end as if.
const KILLS: u32 = 5;
/// How often a candidate whose time is over is looked at until somebody has asked it.
const ASKED_SOON: Duration = Duration::from_secs(1);
/// The first pause before a release is tried again of which none was ever proven; each is twice the one before.
const RETRY_FIRST: Duration = Duration::from_secs(5);
/// The longest.
const RETRY_LONGEST: Duration = Duration::from_secs(300);
/// Why an instance is made beside one in service that is not well.
pub const REPLACES_UNHEALTHY: &str = "an unhealthy instance is replaced";
/// How soon it is looked again whether what failed is gone.
const SOON: Duration = Duration::from_millis(500);
/// How often an image that nobody pulls is looked for.
const LOOK_FOR_IMAGE: Duration = Duration::from_secs(5);

/// Decides about one app.
pub fn plan_app(input: &AppInput<'_>) -> AppPlan {
    let mut draft = Draft::new(input);
    if let Some(foreign) = input.observed.foreign.first() {
        let (name, owner) = (foreign.name.clone(), foreign.owner.clone());
        draft.plan.blocks.push(Block::Foreign { name, owner });
        draft.only_supervise();
        return draft.finish();
    }
    if !matches!(input.desired, DesiredApp::Paused(_)) {
        routes::leave_wrong_sockets(&mut draft);
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
                draft.only_supervise();
            }
            _ => retire::leave(&mut draft),
        },
        DesiredApp::Invalid { problems, last_good } => {
            draft.plan.blocks.push(Block::Invalid(problems.clone()));
            match last_good {
                Some(target) => draft.run(target),
                None => draft.only_supervise(),
            }
        }
        DesiredApp::Kept(why) => draft.only_keep(why),
        DesiredApp::Run(target) => draft.run(target),
    }
    draft.finish()
}

impl<'a> Draft<'a> {
    /// The release that serves now: the proven one if it has instances, else the one of settled instances.
    fn serving(&self) -> Option<ReleaseId> {
        let instances = &self.observed().instances;
        let proven = self.observed().proven.clone().filter(|r| instances.iter().any(|i| i.key.release == *r));
        proven.or_else(|| instances.iter().filter(|i| i.settled).map(|i| i.key.release.clone()).next_back())
    }

    /// Converges, unless somebody else's claim or a cordon is in the way.
    fn run(&mut self, target: &Target) {
        if let Some(conflict) = &self.input.conflict {
            let (host, path, owner) = (conflict.host.clone(), conflict.path.clone(), conflict.owner.clone());
            self.plan.blocks.push(Block::HostTaken { host, path, owner });
            self.only_supervise();
        } else if target.cordoned && self.observed().instances.is_empty() {
            self.plan.blocks.push(Block::Cordoned);
        } else {
            self.converge(target);
        }
    }

    /// Keeps requests going to what runs, and starts nothing: it may have been on its way out.
    fn only_keep(&mut self, why: &str) {
        let observed = self.observed();
        if observed.instances.is_empty() && observed.slots.is_empty() {
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
    fn only_supervise(&mut self) {
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
        let changing_over = target.order == Order::StopFirst
            && !proven
            && verdict.is_none()
            && observed.instances.iter().any(|i| i.key.release == *wanted);
        let group = Group::of(self.input, target, proven);
        match &serving {
            Some(release) if release == wanted => self.supervise(group.good.iter().copied()),
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
                retire::strays(self, target, serving.as_ref());
                self.roll_out(target, &group, proven)
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

    /// The verdict that holds for the wanted release, and when it is tried again in spite of it. A verdict ends when what it
    /// depended on changed. Where no release was ever proven nothing is lost by another try, and what the app waits for may
    /// be there by then.
    fn verdict(&self, target: &Target) -> Option<(&'a Verdict, Option<Timestamp>)> {
        let observed = self.observed();
        let verdict = observed.verdicts.get(&target.release.id)?;
        if !still_holds(self.input, target, verdict) {
            return None;
        }
        if observed.proven.is_some() {
            return Some((verdict, None));
        }
        let pause = RETRY_FIRST.saturating_mul(1 << verdict.attempts.saturating_sub(1).min(10)).min(RETRY_LONGEST);
        let until = verdict.at.plus(pause);
        // Whatever it failed with is gone first.
        let failed = |i: &Instance| i.key.release == target.release.id && i.started <= verdict.at;
        if self.input.now >= until && !observed.instances.iter().any(failed) {
            return None;
        }
        Some((verdict, Some(until.max(self.input.now.plus(SOON)))))
    }

    /// Starts again what was in service and has ended.
    fn supervise(&mut self, instances: impl Iterator<Item = &'a Instance>) {
        let stays = |i: &&Instance| is_established(self.input, i) && !is_left(i) && !i.port_taken;
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

    /// Brings the wanted release up. True when all its instances are healthy (or, once proven, one is).
    fn roll_out(&mut self, target: &Target, group: &Group<'_>, proven: bool) -> bool {
        let release = &target.release;
        if !proven && let Some(failed) = group.failure(self.input, target) {
            self.plan.step.get_or_insert(Planned::new(failed, "the release failed"));
            return false;
        }
        let discarded = self.input.cooling.get(&StepKind::Discard).map_or(0, |c| c.attempts);
        if let Some(instance) = group.spent.iter().find(|i| !i.leaving).filter(|_| !proven && discarded >= KILLS) {
            let cause = format!("{} {KILLS} times before it was healthy", ending(instance));
            let verdict = verdict(self.input, target, instance, cause, None);
            self.step(verdict, "the release failed");
            return false;
        }
        if let Some(instance) = group.spent.iter().find(|i| i.port_taken) {
            self.step(Step::Remove(handle(instance)), "another program has its port");
        } else if let Some(instance) = group.spent.iter().find(|i| i.leaving) {
            self.step(Step::Remove(handle(instance)), "it was ended when another release was wanted");
        } else if let Some(instance) = group.spent.first() {
            let why = ending(instance);
            self.step(Step::Discard { handle: handle(instance), why }, "a replacement did not get healthy");
        }
        let missing = usize::from(target.replicas).saturating_sub(group.good.len());
        let known = group.image().filter(|_| !self.observed().image_lost);
        let image = known.or_else(|| self.observed().image.clone());
        let env_written = self.observed().env_files.contains(&release.id);
        if missing > 0
            && let Some(nested) = self.input.nested
        {
            self.plan.blocks.push(Block::MountUnsafe(nested.clone()));
            return proven && self.is_served(group);
        }
        if missing > 0 {
            let fresh = target.pull_policy == PullPolicy::Always && group.all.is_empty() && !self.observed().pulled;
            if image.is_none() || fresh {
                if target.pull_policy == PullPolicy::Never {
                    let error = format!("image `{}` is not on this host and `pull_policy` is `never`", release.image);
                    self.plan.blocks.push(Block::ImageMissing(error));
                    // Loading an image is no event that wakes anybody.
                    self.wait(Wait::Image(self.input.now.plus(LOOK_FOR_IMAGE)));
                } else {
                    self.step(Step::Pull(release.image.clone()), "the image is not on this host");
                }
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
            // A candidate that was given up is a reason to pause, though creating it did not fail.
            if !self.is_cooling(StepKind::Discard) {
                let reason = match (group.all.is_empty(), group.condemned) {
                    (true, _) => "the release has no instance",
                    (false, true) => REPLACES_UNHEALTHY,
                    (false, false) => "an instance is missing",
                };
                self.step(step, reason);
            }
        }
        if !proven && target.order == Order::StopFirst {
            // Only once the new instance could start at once: the gap is as short as it can be.
            if missing > 0 {
                return false;
            }
            let mut others = self.observed().instances.iter().filter(|i| i.key.release != release.id);
            if let Some(old) = others.find(|i| i.is_alive()) {
                let step = Step::Stop { handle: handle(old), grace: old.grace };
                self.step(step, "the old instance goes first");
                return false;
            }
        }
        for instance in &group.good {
            match (&instance.phase, &instance.health) {
                (Phase::Created, _) => self.step(Step::Start(handle(instance)), "it was created and not started"),
                (Phase::Paused, _) => self.step(Step::Start(handle(instance)), "somebody paused it"),
                (Phase::Exited(_), _) => self.step(Step::Start(handle(instance)), "it should run and does not"),
                (Phase::Running, Health::Healthy) | (Phase::Removing, _) => {}
                (Phase::Running | Phase::Restarting, Health::Unhealthy { since, answer })
                    if proven && is_established(self.input, instance) =>
                {
                    let until = since.plus(patience(instance));
                    self.wait(Wait::Recovery { key: instance.key.clone(), until, answer: answer.clone() });
                }
                (Phase::Running | Phase::Restarting, health) => {
                    let answer = match health {
                        Health::Starting(answer) | Health::Unhealthy { answer, .. } => answer.clone(),
                        _ => String::new(),
                    };
                    let until = instance.deadline();
                    // That a container has run long enough is no event.
                    let settles = instance.started.plus(SETTLE);
                    let by_time = instance.check.probe == Probe::Running && self.input.now < settles;
                    let again = match self.input.now {
                        now if by_time => settles.max(now),
                        now if now < until => until,
                        // Whoever asks it is about to tell.
                        now => now.plus(ASKED_SOON),
                    };
                    self.wait(Wait::Health { key: instance.key.clone(), until, answer, again });
                }
            }
        }
        let healthy = group.good.iter().filter(|i| i.is_running() && i.health.is_healthy()).count();
        healthy >= usize::from(target.replicas) || (proven && healthy > 0)
    }

    fn is_served(&self, group: &Group<'_>) -> bool {
        group.good.iter().any(|i| i.is_running() && i.health.is_healthy())
    }

    fn prove(&mut self, target: &Target, group: &Group<'_>, proven: bool) {
        let check = &target.release.health;
        let proofs = PROOFS.max(check.retries);
        if !proven {
            if let Some(cooled) =
                self.input.cooling.get(&StepKind::Prove).filter(|c| c.attempts >= proofs && !c.temporary)
                && let Some(first) = group.good.first()
            {
                let cause = format!("it is healthy, and does not answer through nginx: {}", cooled.error);
                self.step(verdict_through_nginx(self.input, target, first, cause), "the release failed");
                return;
            }
            let release = target.release.id.clone();
            let step = Step::Prove { release, ingress: target.ingress.clone(), check: check.clone() };
            self.step(step, "the release is routed and not proven");
        }
        for instance in group.good.iter().filter(|i| proven && !i.settled && i.health.is_healthy()) {
            self.step(Step::Settle(handle(instance)), "it is proven");
        }
    }

    /// What status tells: the serving release and its healthy instances.
    fn count(&mut self, serving: Option<&ReleaseId>) {
        let Some(serving) = serving else { return };
        let instances = self.observed().instances.iter();
        let healthy =
            instances.filter(|i| i.key.release == *serving && i.is_running() && i.health.is_healthy()).count();
        self.plan.healthy = u16::try_from(healthy).unwrap_or(u16::MAX);
        self.plan.serving = Some(serving.clone());
    }
}
