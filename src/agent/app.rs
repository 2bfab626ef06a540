//! What the loop keeps of one app: the last look, the last plan, the step under way, and what failed lately.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::Duration,
};

use tokio::{sync::OwnedSemaphorePermit, time::Instant};
use tracing::Span;

use super::{
    Planner,
    account::{Account, Ears},
    incidents::Incidents,
    prediction::Prediction,
};
use crate::{
    events::Events,
    machine::Machine,
    metrics::{AppView, Metrics, ReleaseView},
    model::{
        desired::DesiredApp,
        mounts::NestedMount,
        name::{AppName, ReleaseId},
        observed::{Address, Health, Instance, ObservedApp, Verdict, Wanted},
        problem::bounded,
        proxy::ObservedProxy,
        status::{AppStatus, State},
        time::Timestamp,
    },
    plan::{
        AppInput, AppPlan, Cooled, Cooling, ProxyView, Stopping, VhostWish,
        app::REPLACES_UNHEALTHY,
        check,
        proxy::Conflict,
        step::{Step, StepKind},
        wait::{Block, Wait},
    },
    retry::pause_after,
};

/// What a decision about an app is made from beside the app.
pub(super) struct Around<'a> {
    pub(super) proxy: &'a ObservedProxy,
    /// Why nginx as a whole cannot be changed.
    pub(super) trouble: Option<&'a str>,
    pub(super) conflict: Option<Conflict>,
    pub(super) nested: Option<&'a NestedMount>,
}

/// Most bytes of a reason: it is published, with all others of its host.
const MOST_REASON: usize = 4096;
/// Failures are forgotten when none has come for this long: the time after which kubelet forgives a crash loop.
const FORGIVEN: Duration = Duration::from_secs(600);

pub(super) struct AppState {
    app: AppName,
    desired: DesiredApp,
    observed: Option<ObservedApp>,
    planned: Option<AppPlan>,
    /// Whether the last plan was made for what is wanted now.
    current: bool,
    pub(super) busy: Option<StepKind>,
    /// Instances that were asked to end, and when they are killed; other steps go on meanwhile.
    stopping: Stopping,
    /// Whether anything else was done since the last of them was asked: then the model of that step says nothing.
    mixed: bool,
    /// Whether the step under way replaces an instance that is not well.
    replacing: bool,
    pub(super) dirty: bool,
    pub(super) replan: bool,
    /// Whether it was seen since the last step ended. What was seen before that says nothing any more, least of all if
    /// nobody knows whether the step was done.
    pub(super) seen: bool,
    /// Whether the last plan is too old to tell nginx of it.
    stale: bool,
    /// Whether the look under way was begun for another wish.
    outdated: bool,
    /// Whether that has not been planned on yet.
    fresh: bool,
    /// Since when the health of a running instance is not known.
    unasked: Option<Timestamp>,
    pub(super) observing: bool,
    pub(super) wake: Option<Timestamp>,
    pub(super) look_after: Timestamp,
    /// The turn of a step that came so late that it was not begun: it is kept for the one that is decided on instead.
    pub(super) turn: Option<OwnedSemaphorePermit>,
    cooling: Cooling,
    look_error: Option<(String, u32)>,
    pulled: Option<ReleaseId>,
    image_lost: bool,
    account: Account,
    /// Until when it stays as it is though it is not wanted any more.
    stays_until: Option<Timestamp>,
    /// When its instances ended or fell ill by themselves.
    incidents: Incidents,
    prediction: Prediction,
    since: Timestamp,
    told: Option<(State, Option<String>)>,
}

impl AppState {
    pub(super) fn new(app: AppName, desired: DesiredApp, now: Timestamp) -> Self {
        Self {
            account: Account::new(app.clone()),
            app,
            desired,
            observed: None,
            planned: None,
            current: false,
            busy: None,
            stopping: Stopping::new(),
            mixed: false,
            replacing: false,
            dirty: true,
            replan: false,
            seen: false,
            stale: false,
            outdated: false,
            fresh: false,
            unasked: None,
            observing: false,
            wake: None,
            look_after: now,
            turn: None,
            cooling: Cooling::new(),
            look_error: None,
            pulled: None,
            image_lost: false,
            stays_until: None,
            incidents: Incidents::default(),
            prediction: Prediction::default(),
            since: now,
            told: None,
        }
    }

    pub(super) fn observed(&self) -> Option<&ObservedApp> {
        self.observed.as_ref()
    }

    /// Takes what is wanted now. Failures of another release say nothing about this one.
    ///
    /// One that is not wanted any more stays as it is for `grace`: a put undoes a deletion that was a mistake, or half of a
    /// replacement.
    pub(super) fn want(&mut self, desired: DesiredApp, seen: Option<Instant>, now: Timestamp, grace: Duration) {
        if self.desired == desired {
            return;
        }
        match (&self.desired, &desired) {
            (DesiredApp::Absent(_), DesiredApp::Absent(_)) => {}
            (_, DesiredApp::Absent(_)) => self.stays_until = Some(now.plus(grace)),
            _ => self.stays_until = None,
        }
        if release(&self.desired) != release(&desired) {
            self.cooling.clear();
            self.image_lost = false;
        }
        self.account.changed(&self.desired, &desired, release(&desired), seen, now);
        self.desired = desired;
        self.current = false;
        self.dirty = true;
        // It was, or is being, looked at for another wish: with another image in mind, for one.
        self.seen = false;
        self.outdated = self.observing;
        self.look_after = now;
    }

    pub(super) fn wanted(&self) -> Option<Wanted> {
        let release = &self.desired.target()?.release;
        Some(Wanted { release: release.id.clone(), image: release.image.clone(), image_lost: self.image_lost })
    }

    pub(super) fn take_observed(&mut self, observed: ObservedApp, now: Timestamp) {
        // A look that was begun before a step ended says nothing of what that left.
        if !self.outdated {
            self.prediction.compare(&observed);
        }
        let found = self.account.observed(self.observed.as_ref(), &observed, self.desired.target());
        (0..found).for_each(|_| self.incidents.push(now));
        let pulled = self.pulled.is_some() && self.pulled.as_ref() == release(&self.desired);
        self.observed = Some(ObservedApp { pulled, image_lost: self.image_lost, ..observed });
        self.look_error = None;
        self.replan = true;
        let outdated = std::mem::take(&mut self.outdated);
        (self.seen, self.fresh) = (!outdated, !outdated);
    }

    /// Whether what was seen is good enough to decide on: not what was seen before a step, before another wish, or before
    /// a hint that something happened.
    pub(super) fn is_plannable(&self) -> bool {
        self.replan && self.seen && !self.observing && (self.fresh || !self.dirty)
    }

    /// Nothing is known of the app now; the last plan stands, and the look is tried again.
    pub(super) fn fail_look(&mut self, error: &str, now: Timestamp) {
        let attempts = self.look_error.as_ref().map_or(0, |(_, n)| *n) + 1;
        self.prediction.drop();
        self.seen = false;
        self.outdated = false;
        self.turn = None;
        self.look_error = Some((error.to_owned(), attempts));
        self.look_after = now.plus(pause_after(attempts).min(Duration::from_secs(10)));
        self.dirty = true;
        self.account.unseen(now);
    }

    /// What was seen, or is being looked at, may not hold any more, nor what was decided on it.
    pub(super) fn look_anew(&mut self) {
        self.prediction.drop();
        self.stale = true;
        self.seen = false;
        self.outdated = self.observing;
        self.dirty = true;
    }

    /// A step ended, well or not. What was seen before says nothing any more.
    pub(super) fn end_step(&mut self, step: &Step) {
        match step.handle().filter(|_| step.is_ending()) {
            Some(handle) => drop(self.stopping.remove(&handle.id)),
            None => self.busy = None,
        }
        self.dirty = true;
        self.seen = false;
        self.outdated = self.observing;
    }

    /// The step that was decided on was not begun.
    pub(super) fn drop_step(&mut self, step: &Step, turn: OwnedSemaphorePermit) {
        self.end_step(step);
        self.turn = Some(turn);
        self.account.dropped();
        self.look_anew();
    }

    /// Whether a list of containers, or what lies on disk, shows anything that the last look did not.
    pub(super) fn differs(&self, listed: &[(String, String)], traces: &ObservedApp) -> bool {
        let Some(observed) = &self.observed else { return true };
        let on_disk = |o: &ObservedApp| {
            let verdicts: Vec<ReleaseId> = o.verdicts.keys().cloned().collect();
            (o.slots.clone(), o.env_files.clone(), o.socket_dirs.clone(), o.proven.clone(), verdicts)
        };
        if on_disk(observed) != on_disk(traces) {
            return true;
        }
        let mut known: Vec<(&str, &str)> =
            observed.instances.iter().map(|i| (i.id.as_str(), i.phase.as_str())).collect();
        known.sort_unstable();
        let mut found: Vec<(&str, &str)> = listed.iter().map(|(id, state)| (id.as_str(), state.as_str())).collect();
        found.sort_unstable();
        known != found
    }

    /// Plans, has the plan checked, and answers with the step to take.
    pub(super) fn plan(
        &mut self,
        planner: Planner,
        Around { proxy, trouble, conflict, nested }: Around<'_>,
        now: Timestamp,
        (metrics, events): (&Metrics, &Events),
    ) -> Option<Step> {
        self.replan = false;
        self.fresh = false;
        let app = &self.app;
        let observed = self.observed.as_ref()?;
        self.cooling.retain(|_, c| now < c.until.plus(FORGIVEN));
        self.incidents.age(now);
        let is_unasked = observed.instances.iter().any(|i| i.is_running() && i.health == Health::Unknown);
        self.unasked = is_unasked.then(|| self.unasked.unwrap_or(now));
        let view = ProxyView {
            live: proxy.vhost(app),
            serving: proxy.is_serving_live(),
            rejected: proxy.rejected(app),
            old_workers: proxy.old_workers != Some(0),
            changed: proxy.changed(app),
            left: proxy.left(app),
            trouble,
            templates: &proxy.templates,
        };
        let input = AppInput {
            app,
            desired: &self.desired,
            observed,
            proxy: view,
            conflict,
            cooling: &self.cooling,
            nested,
            stays_until: self.stays_until,
            busy: self.busy,
            stopping: &self.stopping,
            now,
        };
        // A mistake of demae's that one app brings to light is no reason to leave all others alone.
        let decide = || {
            let plan = planner(&input);
            let found = check::violations(&input, &plan);
            (plan, found)
        };
        let (mut plan, found) = catch_unwind(AssertUnwindSafe(decide)).unwrap_or_else(|_| {
            (AppPlan::default(), vec!["deciding about it ended in a panic; the log of the agent has it".to_owned()])
        });
        if let Some(violation) = found.into_iter().next() {
            tracing::error!(app = %app, "the plan was refused: {violation}");
            // Nothing of it is done, in nginx neither.
            plan.step = None;
            plan.vhost = VhostWish::Keep;
            plan.blocks.push(Block::Refused(violation));
        }
        // A step that is waited for says nothing new about when to look again.
        self.wake = if self.busy.is_some() { None } else { plan.wake_at(now) };
        let step = plan.step.clone();
        if let Some(planned) = &step {
            tracing::debug!(app = %app, step = planned.step.kind().as_str(), "{planned}");
            self.mixed = !self.stopping.is_empty();
            match &planned.step {
                Step::Stop { handle, grace } => {
                    self.stopping.insert(handle.id.clone(), now.plus(*grace));
                }
                Step::Discard { handle, .. } => {
                    let grace =
                        observed.instances.iter().find(|i| i.id == handle.id).map_or(Duration::ZERO, |i| i.grace);
                    self.stopping.insert(handle.id.clone(), now.plus(grace));
                }
                other => self.busy = Some(other.kind()),
            }
            // What else there is to do does not wait for a program that takes its time to end.
            self.replan = planned.step.is_ending();
            self.fresh = self.replan;
            self.replacing = planned.reason == REPLACES_UNHEALTHY;
        }
        let ears = Ears { metrics, events, release: release(&self.desired) };
        self.account.planned(&plan, observed, &ears, now);
        self.planned = Some(plan);
        (self.current, self.stale) = (true, false);
        if step.is_none() {
            self.turn = None;
        }
        step.map(|p| p.step)
    }

    pub(super) fn took_step(&mut self, step: &Step, now: Timestamp, metrics: &Metrics, events: &Events) {
        if self.mixed {
            self.prediction.drop();
        } else {
            self.prediction.make(step, self.observed.as_ref(), now);
        }
        let kind = step.kind();
        if kind != StepKind::Discard {
            self.cooling.remove(&kind);
        }
        match step {
            Step::Pull(_) => self.pulled = release(&self.desired).cloned(),
            Step::Create { .. } => {
                self.image_lost = false;
                // One that falls ill after each start would be replaced for ever, as fast as it can.
                if std::mem::take(&mut self.replacing) {
                    self.incidents.push(now);
                    let error = "an instance in service became unhealthy and was replaced".to_owned();
                    self.failed_step(StepKind::Discard, error, true, now);
                }
            }
            // A replacement that failed is not the failure of a step, and is not tried again at once all the same.
            Step::Discard { why, .. } => self.failed_step(StepKind::Discard, why.clone(), true, now),
            _ => {}
        }
        self.account.stepped(step, &Ears { metrics, events, release: release(&self.desired) });
    }

    /// The span that a step belongs to.
    pub(super) fn span(&self, kind: StepKind) -> Span {
        self.account.span(kind)
    }

    /// The engine has not the image any more that a container was to be made from.
    pub(super) fn lost_image(&mut self) {
        self.image_lost = true;
    }

    pub(super) fn failed_step(&mut self, kind: StepKind, error: String, temporary: bool, now: Timestamp) {
        // Failures of one sort say nothing about those of another.
        let attempts = self.cooling.get(&kind).filter(|c| c.temporary == temporary).map_or(0, |c| c.attempts) + 1;
        let until = now.plus(pause_after(attempts));
        self.cooling.insert(kind, Cooled { until, attempts, error, temporary });
    }

    /// What nginx is asked to serve of it. What was planned for another wish of a person says nothing: an app that was to
    /// leave a moment ago, and is to stay now, must not lose its virtual host meanwhile.
    pub(super) fn wish(&self) -> VhostWish {
        self.planned.as_ref().filter(|_| !self.is_held_back()).map(|p| p.vhost.clone()).unwrap_or_default()
    }

    /// Whether nginx is told nothing new of it until it was planned again.
    pub(super) fn is_held_back(&self) -> bool {
        !self.current || self.stale
    }

    /// Since when it has running instances that nobody has asked for their health yet.
    pub(super) fn unasked(&self) -> Option<Timestamp> {
        self.unasked
    }

    /// Whether it was looked at, or that was tried.
    pub(super) fn is_looked_at(&self) -> bool {
        self.planned.is_some() || self.look_error.is_some()
    }

    pub(super) fn is_planned(&self) -> bool {
        self.planned.is_some()
    }

    /// Whether the last plan leaves nothing to do here, and nothing to wait for but a person.
    pub(super) fn is_at_rest(&self) -> bool {
        let is_idle = self.busy.is_none() && self.stopping.is_empty() && self.current;
        let Some(plan) = self.planned.as_ref().filter(|_| is_idle) else { return false };
        // What is tried again for the sake of a block is still a block.
        let only_tries =
            plan.waits.iter().all(|w| matches!(w, Wait::CoolingDown { .. } | Wait::Image(_) | Wait::Retry { .. }));
        plan.step.is_none() && (plan.waits.is_empty() || !plan.blocks.is_empty() && only_tries)
    }

    pub(super) fn is_blocked(&self) -> bool {
        self.planned.as_ref().is_some_and(|p| !p.is_converged())
    }

    /// Whether nothing is left of an app that is not wanted.
    pub(super) fn is_gone(&self) -> bool {
        matches!(self.desired, DesiredApp::Absent(_))
            && !self.observing
            && !self.dirty
            && self.busy.is_none()
            && self.stopping.is_empty()
            && self.current
            && self.planned.as_ref().is_some_and(AppPlan::is_converged)
    }

    /// What metrics tell of it, beside what status tells.
    pub(super) fn view(&self, status: &AppStatus, machine: &impl Machine) -> AppView {
        let plan = self.planned.as_ref();
        let observed = self.observed.as_ref();
        let instances = || observed.into_iter().flat_map(|o| &o.instances);
        let wants = self
            .desired
            .target()
            .map(|t| ReleaseView { release: t.release.id.to_string(), version: t.release.image.version().to_owned() });
        let serves = plan.and_then(|p| p.serving.as_ref()).map(|serving| {
            let ordered = instances().find(|i| i.key.release == *serving).and_then(|i| i.ordered.as_ref());
            let version = match (ordered, &wants) {
                (Some(image), _) => image.version().to_owned(),
                (None, Some(wants)) if wants.release == serving.as_str() => wants.version.clone(),
                _ => "unknown".to_owned(),
            };
            ReleaseView { release: serving.to_string(), version }
        });
        let draining = plan.into_iter().flat_map(|p| &p.waits).filter_map(|w| match w {
            Wait::Drain { connections, .. } => *connections,
            _ => None,
        });
        AppView {
            app: self.app.clone(),
            state: status.state,
            wanted: usize::from(status.wanted),
            running: instances().filter(|i| i.is_running()).count(),
            healthy: usize::from(status.healthy),
            unconverged: self.account.unconverged().map(|at| machine.wall(at)),
            proven: observed.and_then(|o| o.proven_at),
            wants,
            serves,
            blocks: plan.filter(|_| self.current).into_iter().flat_map(|p| &p.blocks).map(Block::kind).collect(),
            waits: plan.into_iter().flat_map(|p| &p.waits).map(Wait::kind).collect(),
            draining: draining.sum(),
            series: self.account.series.clone(),
        }
    }

    /// Ports of the loopback address that its containers have.
    pub(super) fn ports(&self) -> impl Iterator<Item = u16> {
        let instances = self.observed.iter().flat_map(|o| &o.instances);
        instances.flat_map(Instance::addresses).filter_map(|address| match address {
            Address::Port(port) => Some(*port),
            Address::Socket(_) => None,
        })
    }

    /// What status tells; nothing of an app that is not here and not wanted here.
    pub(super) fn status<M: Machine>(&mut self, machine: &M) -> Option<AppStatus> {
        let target = self.desired.target().cloned();
        // A plan made for what was wanted before says nothing of what is wanted now, but who serves.
        let mut plan = self.planned.clone().unwrap_or_default();
        if !self.current {
            plan.blocks.clear();
        }
        let absent = matches!(self.desired, DesiredApp::Absent(_) | DesiredApp::Kept(_));
        if absent
            && (plan.is_converged()
                || self.observed.as_ref().is_none_or(|o| o.instances.is_empty() && o.slots.is_empty()))
        {
            return None;
        }
        let state = match plan.blocks.first() {
            Some(Block::Invalid(_)) => State::Invalid,
            Some(Block::Paused(_)) => State::Paused,
            Some(_) => State::Blocked,
            None if matches!(self.desired, DesiredApp::Absent(_)) => State::Leaving,
            None if self.current && plan.is_converged() && self.look_error.is_none() => State::Converged,
            None => State::Converging,
        };
        let release = target.as_ref().map(|t| t.release.id.to_string());
        let told = (state, release.clone());
        if self.told.as_ref() != Some(&told) {
            self.since = machine.wall(machine.now());
            self.told = Some(told);
        }
        let observed = self.observed.as_ref();
        let verdict = target.as_ref().and_then(|t| observed?.verdicts.get(&t.release.id)).cloned();
        Some(AppStatus {
            app: self.app.to_string(),
            host: machine.host().clone(),
            state,
            serving: plan.serving.as_ref().map(ToString::to_string).filter(|s| Some(s) != release.as_ref()),
            release,
            image: target.as_ref().map(|t| t.release.image.to_string()),
            wanted: target.as_ref().map_or(0, |t| t.replicas),
            healthy: plan.healthy,
            since: self.since,
            reason: bounded(self.reason(&plan, &|at| machine.wall(at)), MOST_REASON),
            verdict: verdict.map(|v| Verdict { at: machine.wall(v.at), ..v }),
            timeline: self.account.timeline().to_vec(),
        })
    }

    fn reason(&self, plan: &AppPlan, tell: &impl Fn(Timestamp) -> Timestamp) -> String {
        if let Some((error, _)) = &self.look_error {
            return format!("the app cannot be seen now: {error}");
        }
        if !self.current {
            return "it is about to be looked at".to_owned();
        }
        if let Some(block) = plan.blocks.first() {
            let retry = plan.waits.iter().find(|w| matches!(w, Wait::Retry { .. }));
            let retry = retry.map(|w| format!("{}; ", w.clone().timed(tell))).unwrap_or_default();
            // As many as fit, and the number of all others.
            let shown = match block {
                Block::Invalid(problems) => Block::Invalid(problems.clone().within(MOST_REASON / 2)),
                other => other.clone(),
            };
            return format!("{shown} ({retry}{})", block.remedy(&self.app));
        }
        if let Some(planned) = &plan.step {
            return planned.to_string();
        }
        // What a step waits for is told by the step; what failed is told before what merely takes time.
        let waits = || plan.waits.iter();
        let first = waits().find(|w| matches!(w, Wait::CoolingDown { .. })).or_else(|| waits().next());
        match (first, &self.desired) {
            (Some(wait), _) => wait.clone().timed(tell).to_string(),
            (None, DesiredApp::Absent(why)) => why.clone(),
            (None, _) => self.incidents.told().unwrap_or_default(),
        }
    }
}

fn release(desired: &DesiredApp) -> Option<&ReleaseId> {
    desired.target().map(|t| &t.release.id)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        model::{name::ContainerId, observed::InstanceKey},
        plan::step::{Handle, Planned},
    };

    /// Would take the virtual host away, and stop a container that is not there.
    fn wrong(_: &AppInput<'_>) -> AppPlan {
        let release = ReleaseId::try_from("0123456789ab").expect("a release");
        let id = ContainerId::try_from("ab").expect("an id");
        let handle = Handle { key: InstanceKey { release, number: 1 }, id };
        let step = Step::Stop { handle, grace: Duration::ZERO };
        let step = Some(Planned { step, reason: "a mutation" });
        AppPlan { step, vhost: VhostWish::Remove, ..AppPlan::default() }
    }

    #[test]
    fn a_refused_plan_changes_nothing_in_nginx_either() {
        let app = AppName::try_from("web").expect("a name");
        let now = Timestamp::from_millis(1_000_000);
        let metrics = Arc::new(Metrics::new().expect("metrics"));
        let events = Events::new("host".try_into().expect("a name"), metrics.clone());
        let mut state = AppState::new(app, DesiredApp::Absent("it was deleted".into()), now);
        state.take_observed(ObservedApp::default(), now);
        let proxy = ObservedProxy::default();
        let around = Around { proxy: &proxy, trouble: None, conflict: None, nested: None };
        assert_eq!(state.plan(wrong, around, now, (&metrics, &events)), None);
        assert_eq!(state.wish(), VhostWish::Keep);
        assert!(state.is_blocked() && state.busy.is_none() && state.stopping.is_empty());
    }
}
