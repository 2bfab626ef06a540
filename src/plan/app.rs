//! What is safe to do next for one app.
//!
//! The order is the safety. What serves is kept serving first; then the wanted release is brought up beside it; only
//! what is neither wanted nor routed leaves. Nothing here remembers anything: every answer follows from the input.

use std::time::Duration;

use super::{
    AppInput, AppPlan, VhostWish, retire, routes,
    step::{Handle, Planned, Step, StepKind},
    wait::{Block, Wait, within},
};
use crate::model::{
    desired::{DesiredApp, Target},
    name::ReleaseId,
    observed::{Health, Instance, InstanceKey, ObservedApp, Phase},
    spec::{Order, Probe, PullPolicy},
};

/// Proofs through nginx that may fail before the release is given up.
const PROOFS: u32 = 3;
/// How often an image that nobody pulls is looked for.
const LOOK_FOR_IMAGE: Duration = Duration::from_secs(5);
/// Shortest time that an unhealthy instance in service is watched before it is replaced.
const PATIENCE: Duration = Duration::from_secs(5);

/// Decides about one app.
pub fn plan_app(input: &AppInput<'_>) -> AppPlan {
    let mut draft = Draft::new(input);
    match input.desired {
        DesiredApp::Paused(reason) => {
            draft.plan.blocks.push(Block::Paused(reason.clone()));
            let serving = draft.serving();
            draft.count(serving.as_ref());
        }
        DesiredApp::Absent(_) => retire::leave(&mut draft),
        DesiredApp::Invalid { problems, last_good } => {
            draft.plan.blocks.push(Block::Invalid(problems.clone()));
            match last_good {
                Some(target) => draft.converge(target),
                None => draft.only_supervise(),
            }
        }
        DesiredApp::Run(target) => {
            if let Some(conflict) = &input.conflict {
                let (host, owner) = (conflict.host.clone(), conflict.owner.clone());
                draft.plan.blocks.push(Block::HostTaken { host, owner });
                draft.only_supervise();
            } else if target.cordoned && input.observed.instances.is_empty() {
                draft.plan.blocks.push(Block::Cordoned);
            } else {
                draft.converge(target);
            }
        }
    }
    draft.finish()
}

/// A plan in the making.
pub(super) struct Draft<'a> {
    pub(super) input: &'a AppInput<'a>,
    pub(super) plan: AppPlan,
}

impl<'a> Draft<'a> {
    fn new(input: &'a AppInput<'a>) -> Self {
        Self { input, plan: AppPlan::default() }
    }

    pub(super) fn observed(&self) -> &'a ObservedApp {
        self.input.observed
    }

    /// Takes a step, unless one is already taken, or its kind has failed and is not due: then that is waited for.
    pub(super) fn step(&mut self, step: Step, reason: &'static str) {
        if self.plan.step.is_some() {
            return;
        }
        let kind = step.kind();
        match self.input.cooling.get(&kind).filter(|c| c.until > self.input.now) {
            None => self.plan.step = Some(Planned::new(step, reason)),
            Some(cooled) if kind == StepKind::Pull && !cooled.temporary => {
                self.plan.blocks.push(Block::ImageMissing(cooled.error.clone()));
                self.cooling(kind);
            }
            Some(_) => self.cooling(kind),
        }
    }

    fn cooling(&mut self, step: StepKind) {
        if let Some(cooled) = self.input.cooling.get(&step) {
            let (until, attempts, error) = (cooled.until, cooled.attempts, cooled.error.clone());
            self.wait(Wait::CoolingDown { step, until, attempts, error });
        }
    }

    pub(super) fn wait(&mut self, wait: Wait) {
        if !self.plan.waits.contains(&wait) {
            self.plan.waits.push(wait);
        }
    }

    fn finish(mut self) -> AppPlan {
        if let Some(kind) = self.input.busy {
            self.plan.step = None;
            self.wait(Wait::Busy(kind));
        }
        self.plan
    }

    /// The release that serves now: the proven one if it has instances, else the one of settled instances.
    fn serving(&self) -> Option<ReleaseId> {
        let instances = &self.observed().instances;
        let proven = self.observed().proven.clone().filter(|r| instances.iter().any(|i| i.key.release == *r));
        proven.or_else(|| instances.iter().filter(|i| i.settled).map(|i| i.key.release.clone()).next_back())
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
        let verdict = observed.verdicts.get(wanted).filter(|_| !proven);
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
            Some(verdict) => {
                self.plan.blocks.push(Block::Halted(verdict.clone()));
                false
            }
            None => self.roll_out(target, &group, proven),
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

    /// Starts again what was in service and has ended.
    fn supervise(&mut self, instances: impl Iterator<Item = &'a Instance>) {
        for instance in instances.filter(|i| is_established(self.input, i)).collect::<Vec<_>>() {
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
        if let Some(instance) = group.spent.first() {
            let why = ending(instance);
            self.step(Step::Discard { handle: handle(instance), why }, "a replacement did not get healthy");
        }
        let missing = usize::from(target.replicas).saturating_sub(group.good.len());
        let image = group.image().or_else(|| self.observed().image.clone());
        let env_written = self.observed().env_files.contains(&release.id);
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
            let drain = target.ingress.as_ref().map_or(Duration::ZERO, |i| i.drain);
            let step = Step::Create { key, release: release.clone(), image, drain };
            self.step(
                step,
                if group.all.is_empty() { "the release has no instance" } else { "an instance is missing" },
            );
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
                    self.wait(Wait::Health { key: instance.key.clone(), until, answer });
                }
            }
        }
        let healthy = group.good.iter().filter(|i| i.is_running() && i.health.is_healthy()).count();
        healthy >= usize::from(target.replicas) || (proven && healthy > 0)
    }

    fn prove(&mut self, target: &Target, group: &Group<'_>, proven: bool) {
        if !proven {
            if let Some(cooled) = self.input.cooling.get(&StepKind::Prove).filter(|c| c.attempts >= PROOFS)
                && let Some(first) = group.good.first()
            {
                let cause = format!("it is healthy, and does not answer through nginx: {}", cooled.error);
                let release = target.release.clone();
                let step = Step::RecordVerdict { handle: handle(first), release, cause, exit_code: None };
                self.step(step, "the release failed");
                return;
            }
            let path = match &target.release.health.probe {
                Probe::Http(path) => path.clone(),
                _ => "/".to_owned(),
            };
            let release = target.release.id.clone();
            let step = Step::Prove { release, ingress: target.ingress.clone(), path };
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

/// The instances of the wanted release, told apart by what they are good for.
pub(super) struct Group<'a> {
    /// All of them.
    pub(super) all: Vec<&'a Instance>,
    /// At most as many as are wanted, the best first by state, then in order of number.
    pub(super) good: Vec<&'a Instance>,
    /// Candidates that failed though the release is proven.
    pub(super) spent: Vec<&'a Instance>,
}

impl<'a> Group<'a> {
    fn of(input: &AppInput<'a>, target: &Target, proven: bool) -> Self {
        let all: Vec<&Instance> =
            input.observed.instances.iter().filter(|i| i.key.release == target.release.id).collect();
        let spent: Vec<&Instance> = all
            .iter()
            .copied()
            .filter(|i| !is_established(input, i))
            .filter(|i| {
                was_killed(i)
                    || proven && (is_late(i, input) && !i.health.is_healthy() || matches!(i.phase, Phase::Exited(_)))
            })
            .collect();
        let condemned = |i: &Instance| match &i.health {
            Health::Unhealthy { since, .. } => {
                proven && is_established(input, i) && input.now >= since.plus(patience(i))
            }
            _ => false,
        };
        let mut good: Vec<&Instance> = all
            .iter()
            .copied()
            .filter(|i| i.phase != Phase::Removing && !spent.iter().any(|s| s.id == i.id) && !condemned(i))
            .collect();
        let rank = |i: &Instance| match &i.health {
            Health::Healthy if i.is_running() => 0,
            Health::Unhealthy { .. } => 3,
            _ if i.is_running() => 1,
            _ => 2,
        };
        good.sort_by_key(|i| (rank(i), !i.settled, i.key.number));
        good.truncate(usize::from(target.replicas));
        good.sort_by_key(|i| i.key.number);
        Self { all, good, spent }
    }

    /// The image that the release was resolved to, if it has an instance.
    fn image(&self) -> Option<String> {
        self.all.first().map(|i| i.image.clone())
    }

    /// The lowest number that no instance has.
    fn free_number(&self) -> u16 {
        (1..=u16::MAX).find(|n| !self.all.iter().any(|i| i.key.number == *n)).unwrap_or(u16::MAX)
    }

    /// The verdict that a candidate earned, if one did.
    fn failure(&self, input: &AppInput<'_>, target: &Target) -> Option<Step> {
        self.all.iter().find_map(|i| {
            let release = || target.release.clone();
            let verdict =
                |cause, exit_code| Step::RecordVerdict { handle: handle(i), release: release(), cause, exit_code };
            match &i.phase {
                Phase::Exited(_) if was_killed(i) => None,
                Phase::Exited(code) if !i.settled => {
                    let memory = if i.out_of_memory { ", for want of memory," } else { "" };
                    Some(verdict(format!("it ended with exit code {code}{memory} before it was healthy"), Some(*code)))
                }
                Phase::Restarting => Some(verdict("it ends again and again".to_owned(), None)),
                Phase::Running if is_late(i, input) && !i.health.is_healthy() => {
                    let took = within(i.check.deadline());
                    let cause = match &i.health {
                        Health::Starting(answer) | Health::Unhealthy { answer, .. } if !answer.is_empty() => {
                            format!("it was not healthy {took}: {answer}")
                        }
                        _ => format!("it was not healthy {took}"),
                    };
                    Some(verdict(cause, None))
                }
                _ => None,
            }
        })
    }
}

fn of_release<'a>(observed: &'a ObservedApp, release: &ReleaseId) -> impl Iterator<Item = &'a Instance> + use<'a> {
    let release = release.clone();
    observed.instances.iter().filter(move |i| i.key.release == release)
}

fn is_late(instance: &Instance, input: &AppInput<'_>) -> bool {
    // An instance this agent has not asked yet is asked first: a restarted agent knows of no answer.
    instance.is_alive() && instance.health != Health::Unknown && input.now >= instance.deadline()
}

/// Whether an instance has been put in service: it is routed, or Docker keeps it running.
pub(super) fn is_established(input: &AppInput<'_>, instance: &Instance) -> bool {
    instance.settled || routes::is_routed(input, instance)
}

/// Whether somebody ended an instance from outside: a person, or an engine or a host that went down. That says nothing
/// about its release. 128 + SIGKILL and 128 + SIGTERM, as a shell would tell them.
fn was_killed(instance: &Instance) -> bool {
    matches!(instance.phase, Phase::Exited(137 | 143)) && !instance.out_of_memory
}

fn patience(instance: &Instance) -> Duration {
    (instance.check.interval * instance.check.retries).max(PATIENCE)
}

fn ending(instance: &Instance) -> String {
    match (&instance.phase, &instance.health) {
        (Phase::Exited(code), _) => format!("it ended with exit code {code}"),
        (_, Health::Starting(answer) | Health::Unhealthy { answer, .. }) => format!("it was not healthy: {answer}"),
        _ => "it was not healthy".to_owned(),
    }
}

pub(super) fn handle(instance: &Instance) -> Handle {
    Handle { key: instance.key.clone(), id: instance.id.clone() }
}

impl VhostWish {
    /// Whether nginx serves what is wished.
    pub(super) fn is_met(&self, input: &AppInput<'_>) -> bool {
        match self {
            VhostWish::Keep => true,
            VhostWish::Set(vhost) => input.proxy.serving && input.proxy.live == Some(vhost),
            VhostWish::Remove => input.proxy.serving && input.proxy.live.is_none(),
        }
    }
}
