//! State of one app in the loop: last observation, last plan, the step in flight, recent failures.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::Duration,
};

use tokio::{sync::OwnedSemaphorePermit, time::Instant};
use tracing::Span;

use super::{
    Planner,
    freshness::Freshness,
    incidents::Incidents,
    prediction::Prediction,
    telemetry::{AppTelemetry, Sinks},
    turn::TurnState,
};
use crate::{
    events::Events,
    machine::Machine,
    metrics::{AppView, Metrics, ReleaseView},
    model::{
        desired::DesiredApp,
        fleet::FleetImage,
        mounts::NestedMount,
        name::{AppName, ImageDigest, ReleaseId},
        observed::{Address, Bind, Health, Instance, ObservedApp, Wanted},
        policy::Policy,
        proxy::ObservedProxy,
        status::{AppStatus, State},
        time::Timestamp,
    },
    plan::{
        AppInput, AppPlan, Backoff, Backoffs, ProxyView, Stopping, VhostWish,
        app::REPLACES_UNHEALTHY,
        check,
        proxy::Conflict,
        simulate::NewContainer,
        step::{IMAGE_ABSENT, Step, StepKind},
        wait::{Block, Wait},
    },
    retry::pause_after,
};

/// Inputs of a plan besides the app itself.
pub(super) struct PlanContext<'a> {
    pub(super) proxy: &'a ObservedProxy,
    /// Why nginx as a whole cannot be changed, if it cannot.
    pub(super) trouble: Option<&'a str>,
    pub(super) conflict: Option<Conflict>,
    pub(super) nested: Option<&'a NestedMount>,
    pub(super) policy: &'a Policy,
}

/// Backoff resets after this long without a failure: the time after which kubelet resets a crash loop.
const FORGIVEN: Duration = Duration::from_secs(600);

/// The kind of a failure for which an instance was discarded.
const UNHEALTHY: &str = "unhealthy";
/// The kind of an app that cannot be inspected.
pub(super) const UNOBSERVED: &str = "unobserved";

pub(super) struct AppState {
    pub(super) app: AppName,
    /// Its turn in a rollout.
    pub(super) turn: TurnState,
    pub(super) desired: DesiredApp,
    pub(super) observed: Option<ObservedApp>,
    pub(super) planned: Option<AppPlan>,
    pub(super) fresh: Freshness,
    pub(super) busy: Option<StepKind>,
    /// Instances that are being stopped, and when they are killed; other steps go on meanwhile.
    stopping: Stopping,
    /// Whether another step ran during the last stop: then the prediction for that stop is void.
    pub(super) steps_overlapped: bool,
    /// Whether the step in flight replaces an unhealthy instance.
    replaces_unhealthy: bool,
    /// Since when some running instance has unknown health.
    health_unknown_since: Option<Timestamp>,
    pub(super) wake: Option<Timestamp>,
    /// Since when only connections are counted, as long as nothing else can change the plan.
    pub(super) counting_since: Option<Timestamp>,
    pub(super) observe_after: Timestamp,
    /// The ids and states of its containers by the last full list that was a cause to observe, and that cause.
    pub(super) listed: Option<(u64, Vec<(String, String)>)>,
    /// The permit of a step that expired before it started, kept for the step that replaces it.
    pub(super) permit: Option<OwnedSemaphorePermit>,
    backoffs: Backoffs,
    pub(super) observe_error: Option<(String, u32)>,
    pulled: Option<ReleaseId>,
    image_lost: bool,
    pub(super) telemetry: AppTelemetry,
    /// Until when a deleted app stays as it is.
    stays_until: Option<Timestamp>,
    /// Recent crashes and health failures of its instances.
    pub(super) incidents: Incidents,
    prediction: Prediction,
    pub(super) since: Timestamp,
    pub(super) reported: Option<(State, Option<String>)>,
}

impl AppState {
    pub(super) fn new(app: AppName, desired: DesiredApp, now: Timestamp) -> Self {
        Self {
            telemetry: AppTelemetry::new(app.clone()),
            app,
            turn: TurnState::new(desired.clone()),
            desired,
            observed: None,
            planned: None,
            fresh: Freshness::default(),
            listed: None,
            busy: None,
            stopping: Stopping::new(),
            steps_overlapped: false,
            replaces_unhealthy: false,
            health_unknown_since: None,
            wake: None,
            counting_since: None,
            observe_after: now,
            permit: None,
            backoffs: Backoffs::new(),
            observe_error: None,
            pulled: None,
            image_lost: false,
            stays_until: None,
            incidents: Incidents::default(),
            prediction: Prediction::default(),
            since: now,
            reported: None,
        }
    }

    pub(super) fn observed(&self) -> Option<&ObservedApp> {
        self.observed.as_ref()
    }

    /// Sets the desired state. Failures of another release say nothing about the new one.
    ///
    /// A deleted app stays as it is for `grace`: a put undoes an accidental deletion, or half of a replacement.
    pub(super) fn set_desired(&mut self, desired: DesiredApp, seen: Option<Instant>, now: Timestamp, grace: Duration) {
        if self.desired.means_the_same(&desired) {
            // The status names the revision.
            self.desired = desired;
            return;
        }
        match (&self.desired, &desired) {
            (DesiredApp::Absent(_), DesiredApp::Absent(_)) => {}
            (_, DesiredApp::Absent(_)) => self.stays_until = Some(now.plus(grace)),
            _ => self.stays_until = None,
        }
        if release(&self.desired) != release(&desired) {
            self.image_lost = false;
            self.backoffs.clear();
        } else if retried(&self.desired) != retried(&desired) {
            // A person asks for another try.
            self.backoffs.remove(&StepKind::Pull);
        }
        self.telemetry.desired_changed(&self.desired, &desired, release(&desired), seen, now);
        self.desired = desired;
        // Its observation was, or is being, made for another desired state: with another image in mind, for one.
        self.fresh.change_desired();
        self.observe_after = now;
    }

    /// Sets which image its release is in the fleet.
    pub(super) fn set_image(&mut self, image: FleetImage) {
        if self.turn.image == image {
            return;
        }
        let found = self.observed.as_ref().and_then(|observed| observed.image_digest.as_ref());
        let is_found = matches!(&image, FleetImage::Written(digest) if found == Some(digest));
        self.turn.image = image;
        // What was found by its tag is the same image.
        if is_found { self.fresh.request_plan() } else { self.fresh.change_desired() }
    }

    pub(super) fn wanted(&self) -> Option<Wanted> {
        let target = self.desired.target()?;
        let release = &target.release;
        Some(Wanted {
            release: release.id.clone(),
            image: release.image.clone(),
            digest: self.turn.image.digest().cloned(),
            image_lost: self.image_lost,
            slots: target.table_slots(),
        })
    }

    pub(super) fn on_observed(&mut self, observed: ObservedApp, now: Timestamp) {
        // An observation that began before a step ended cannot be compared with the prediction for that step.
        if self.fresh.succeed() {
            self.prediction.compare(&observed);
        }
        let found = self.telemetry.observed(self.observed.as_ref(), &observed, self.desired.target());
        (0..found).for_each(|_| self.incidents.push(now));
        let pulled = self.pulled.is_some() && self.pulled.as_ref() == release(&self.desired);
        let mut observed = ObservedApp { pulled, image_lost: self.image_lost, ..observed };
        let before = self.observed.take().unwrap_or_default();
        for instance in &mut observed.instances {
            let was = before.instances.iter().find(|i| i.id == instance.id);
            // What is counted for the first time may have come just now.
            let may_be_new = instance.connections == Some(0) || was.is_some_and(|i| i.connections == Some(0));
            instance.idle_at = if may_be_new { Some(now) } else { was.and_then(|i| i.idle_at) };
        }
        self.observed = Some(observed);
        self.observe_error = None;
    }

    /// What its containers have mounted; `None` if it was not observed yet.
    pub(super) fn binds(&self) -> Option<Vec<Bind>> {
        let instances = self.observed.iter().flat_map(|observed| &observed.instances);
        self.observed.as_ref().map(|_| instances.flat_map(|i| i.binds.clone()).collect())
    }

    /// The observation failed; the last plan stands, and the observation is retried with backoff.
    pub(super) fn on_observe_failed(&mut self, error: &str, now: Timestamp) {
        let attempts = self.observe_error.as_ref().map_or(0, |(_, n)| *n) + 1;
        self.prediction.discard();
        self.fresh.fail();
        self.permit = None;
        self.observe_error = Some((error.to_owned(), attempts));
        self.observe_after = now.plus(pause_after(attempts).min(Duration::from_secs(10)));
        self.telemetry.observe_failed(now);
    }

    /// Invalidates the observation, any observation in flight, and the plan.
    pub(super) fn invalidate(&mut self) {
        self.prediction.discard();
        self.fresh.stand_still();
    }

    /// A step ended, in success or failure. Earlier observations are stale.
    pub(super) fn end_step(&mut self, step: &Step) {
        match step.handle().filter(|_| step.is_ending()) {
            Some(handle) => drop(self.stopping.remove(&handle.id)),
            None => self.busy = None,
        }
        self.fresh.invalidate();
    }

    /// The planned step expired before it started.
    pub(super) fn on_step_not_started(&mut self, step: &Step, permit: OwnedSemaphorePermit) {
        self.end_step(step);
        self.permit = Some(permit);
        self.telemetry.step_not_started();
        self.invalidate();
    }

    /// Plans, checks the plan, and returns the step to perform.
    pub(super) fn plan(
        &mut self,
        planner: Planner,
        PlanContext { proxy, trouble, conflict, nested, policy }: PlanContext<'_>,
        now: Timestamp,
        (metrics, events): (&Metrics, &Events),
    ) -> Option<Step> {
        let app = &self.app;
        let observed = self.observed.as_ref()?;
        self.backoffs.retain(|_, c| now < c.until.plus(FORGIVEN));
        self.incidents.age(now);
        let is_unknown = observed.instances.iter().any(|i| i.is_running() && i.health == Health::Unknown);
        self.health_unknown_since = is_unknown.then(|| self.health_unknown_since.unwrap_or(now));
        let view = ProxyView {
            live: proxy.vhost(app),
            serving: proxy.is_serving_live(),
            rejected: proxy.rejected(app),
            old_workers: proxy.old_workers != Some(0),
            changed: proxy.changed(app),
            previous_ports: proxy.previous_ports(app),
            trouble,
            templates: &proxy.templates,
        };
        let input = AppInput {
            app,
            desired: &self.desired,
            turn: &self.turn.turn,
            image: &self.turn.image,
            observed,
            proxy: view,
            conflict,
            backoffs: &self.backoffs,
            nested,
            policy,
            stays_until: self.stays_until,
            busy: self.busy,
            stopping: &self.stopping,
            now,
        };
        // A bug that one app triggers must not stop the others.
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
            // Discard all of it, the change of nginx included.
            plan.step = None;
            plan.vhost = VhostWish::Keep;
            plan.blocks.push(Block::Refused(violation));
        }
        self.turn.tell_kept(&mut plan);
        self.counting_since = None;
        // The end of the step in flight wakes the loop.
        // A write about its turn that was refused, or got no answer, is tried again by itself.
        let write_at = Some(self.turn.write_after).filter(|at| *at > now);
        self.wake = if self.busy.is_some() { None } else { plan.wake_at(now).into_iter().chain(write_at).min() };
        let step = plan.step.clone();
        if let Some(planned) = &step {
            tracing::debug!(app = %app, step = planned.step.kind().as_str(), "{planned}");
            self.steps_overlapped = !self.stopping.is_empty();
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
            self.replaces_unhealthy = planned.reason == REPLACES_UNHEALTHY;
        }
        let sinks = Sinks { metrics, events, release: release(&self.desired) };
        // A plan without a step is reported only once the app has been observed.
        if step.is_some() || !self.fresh.is_amended() {
            self.telemetry.planned(&plan, observed, &sinks, now);
        }
        self.planned = Some(plan);
        // Other steps do not wait for a program that is slow to exit.
        self.fresh.plan(step.as_ref().is_some_and(|planned| planned.step.is_ending()));
        if step.is_none() {
            self.permit = None;
        }
        step.map(|p| p.step)
    }

    pub(super) fn on_step_succeeded(
        &mut self,
        step: &Step,
        created: Option<&NewContainer>,
        now: Timestamp,
        (metrics, events): (&Metrics, &Events),
    ) {
        let is_found = created.is_none() && matches!(step, Step::Create { .. });
        if self.steps_overlapped || is_found {
            self.prediction.discard();
        } else {
            self.prediction.predict(step, created, self.observed.as_ref(), now);
        }
        let kind = step.kind();
        if kind != StepKind::Discard {
            self.backoffs.remove(&kind);
        }
        match step {
            Step::Pull { .. } => self.pulled = release(&self.desired).cloned(),
            Step::Create { .. } => {
                self.image_lost = false;
                // Back off: an instance that fails after each start would be replaced for ever, without a pause.
                if std::mem::take(&mut self.replaces_unhealthy) {
                    self.incidents.push(now);
                    let error = "an instance in service became unhealthy and was replaced".to_owned();
                    self.on_step_failed(StepKind::Discard, (error, UNHEALTHY), true, now);
                }
            }
            // Discard succeeded, but the replacement failed: back off before the next one.
            Step::Discard { why, .. } => self.on_step_failed(StepKind::Discard, (why.clone(), UNHEALTHY), true, now),
            _ => {}
        }
        self.telemetry.step_succeeded(step, &Sinks { metrics, events, release: release(&self.desired) });
    }

    /// The span of a step.
    pub(super) fn span(&self, kind: StepKind) -> Span {
        self.telemetry.span(kind)
    }

    /// A step failed, and a part of it may have been done.
    pub(super) fn discard_prediction(&mut self) {
        self.prediction.discard();
    }

    /// The engine no longer has the image that a container was to be created from.
    pub(super) fn on_image_lost(&mut self) {
        self.image_lost = true;
    }

    pub(super) fn on_step_failed(
        &mut self,
        step: StepKind,
        (error, kind): (String, &'static str),
        temporary: bool,
        now: Timestamp,
    ) {
        // Temporary and permanent failures are counted separately, and so is what a registry does not have.
        let is_alike = |c: &&Backoff| c.temporary == temporary && (c.kind == IMAGE_ABSENT) == (kind == IMAGE_ABSENT);
        let attempts = self.backoffs.get(&step).filter(is_alike).map_or(0, |c| c.attempts) + 1;
        let until = now.plus(pause_after(attempts));
        self.backoffs.insert(step, Backoff { until, attempts, error, kind, temporary });
    }

    /// What nginx should serve of it. A plan for an earlier desired state does not count: an app that was to leave a
    /// moment ago, and is to stay now, must not lose its virtual host meanwhile.
    pub(super) fn wish(&self) -> VhostWish {
        self.planned.as_ref().filter(|_| !self.is_held_back()).map(|p| p.vhost.clone()).unwrap_or_default()
    }

    /// Whether its part of nginx is frozen until it is planned again.
    pub(super) fn is_held_back(&self) -> bool {
        !self.fresh.is_plan_applicable()
    }

    /// The image that was found, if only the record of its digest is missing, by a plan that is current.
    pub(super) fn pulled(&self) -> Option<(&ReleaseId, &ImageDigest)> {
        let plan = self.planned.as_ref().filter(|_| self.busy.is_none() && self.fresh.is_plan_current())?;
        let digest = self.observed.as_ref().filter(|_| plan.waits.contains(&Wait::Digest))?.image_digest.as_ref()?;
        Some((release(&self.desired)?, digest))
    }

    /// Whether only the record that requests move is missing, by a plan that is current.
    pub(super) fn is_ready_to_commit(&self) -> bool {
        self.busy.is_none()
            && self.fresh.is_plan_current()
            && self.planned.as_ref().is_some_and(|plan| plan.commits && plan.step.is_none())
    }

    /// Since when some running instance has unknown health.
    pub(super) fn health_unknown_since(&self) -> Option<Timestamp> {
        self.health_unknown_since
    }

    /// Whether it was observed, or an attempt failed.
    pub(super) fn was_observe_attempted(&self) -> bool {
        self.planned.is_some() || self.observe_error.is_some()
    }

    pub(super) fn is_planned(&self) -> bool {
        self.planned.is_some()
    }

    /// Whether the last plan leaves nothing to do, and nothing to wait for but an operator.
    pub(super) fn is_at_rest(&self) -> bool {
        let is_idle = self.busy.is_none() && self.stopping.is_empty() && self.fresh.is_plan_current();
        let Some(plan) = self.planned.as_ref().filter(|_| is_idle) else { return false };
        // A retry that is due to a block is still a block.
        let only_tries =
            plan.waits.iter().all(|w| matches!(w, Wait::Backoff { .. } | Wait::Image(_) | Wait::Retry { .. }));
        plan.step.is_none() && (plan.waits.is_empty() || !plan.blocks.is_empty() && only_tries)
    }

    pub(super) fn is_blocked(&self) -> bool {
        self.planned.as_ref().is_some_and(|p| !p.is_converged())
    }

    /// Whether nothing is left of an app that is absent.
    pub(super) fn is_gone(&self) -> bool {
        matches!(self.desired, DesiredApp::Absent(_))
            && !self.fresh.is_observing()
            && !self.fresh.is_observe_due()
            && self.busy.is_none()
            && self.stopping.is_empty()
            && self.fresh.is_plan_current()
            && self.planned.as_ref().is_some_and(AppPlan::is_converged)
    }

    /// Its view for metrics, beside its status.
    pub(super) fn view(&self, status: &AppStatus, machine: &impl Machine) -> AppView {
        let plan = self.planned.as_ref();
        let observed = self.observed.as_ref();
        let instances = || observed.into_iter().flat_map(|o| &o.instances);
        let wants = self
            .desired
            .target()
            .map(|t| ReleaseView { release: t.release.id.to_string(), version: t.release.image.version().to_owned() });
        let serves = plan.and_then(|p| p.serving.as_ref()).map(|serving| {
            let requested_image =
                instances().find(|i| i.key.release == *serving).and_then(|i| i.requested_image.as_ref());
            let version = match (requested_image, &wants) {
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
            unconverged: self.telemetry.unconverged().map(|at| machine.wall(at)),
            proven: observed.and_then(|o| o.proven_at),
            wants,
            serves,
            blocks: plan
                .filter(|_| self.fresh.is_plan_current())
                .into_iter()
                .flat_map(|p| &p.blocks)
                .map(Block::kind)
                .collect(),
            waits: plan.into_iter().flat_map(|p| &p.waits).map(Wait::kind).collect(),
            draining: draining.sum(),
            series: self.telemetry.series.clone(),
        }
    }

    /// Loopback ports of its containers.
    pub(super) fn ports(&self) -> impl Iterator<Item = u16> {
        let instances = self.observed.iter().flat_map(|o| &o.instances);
        instances.flat_map(Instance::addresses).filter_map(|address| match address {
            Address::Port(port) => Some(*port),
            Address::Socket(_) | Address::Own(_) => None,
        })
    }
}

fn release(desired: &DesiredApp) -> Option<&ReleaseId> {
    desired.target().map(|t| &t.release.id)
}

fn retried(desired: &DesiredApp) -> Option<i64> {
    desired.target().map(|target| target.retried)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        model::{name::ContainerId, observed::InstanceKey},
        plan::step::{Handle, Planned},
    };

    /// A wrong planner: removes the virtual host, and stops a container that does not exist.
    fn wrong(_: &AppInput<'_>) -> AppPlan {
        let release = ReleaseId::try_from("0123456789ab").expect("a release");
        let id = ContainerId::try_from("ab").expect("an id");
        let handle = Handle { key: InstanceKey { release, number: 1 }, id };
        let step = Step::Stop { handle, grace: Duration::ZERO };
        let step = Some(Planned { step, reason: "a mutation" });
        AppPlan { step, vhost: VhostWish::Remove, ..AppPlan::default() }
    }

    #[test]
    fn refused_plan_leaves_nginx_unchanged() {
        let app = AppName::try_from("web").expect("a name");
        let now = Timestamp::from_millis(1_000_000);
        let metrics = Arc::new(Metrics::new().expect("metrics"));
        let events = Events::new("host".try_into().expect("a name"), metrics.clone());
        let mut state = AppState::new(app, DesiredApp::Absent("it was deleted".into()), now);
        state.fresh.begin();
        state.on_observed(ObservedApp::default(), now);
        let proxy = ObservedProxy::default();
        let context = PlanContext {
            proxy: &proxy,
            trouble: None,
            conflict: None,
            nested: None,
            policy: &crate::model::policy::BUILT_IN,
        };
        assert_eq!(state.plan(wrong, context, now, (&metrics, &events)), None);
        assert_eq!(state.wish(), VhostWish::Keep);
        assert!(state.is_blocked() && state.busy.is_none() && state.stopping.is_empty());
    }
}
