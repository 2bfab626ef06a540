//! Brings the observation of an app up to date by what a step did, or a probe found: between the steps of a deploy
//! nothing is asked of Docker that is known.

use std::time::Duration;

use super::app::AppState;
use crate::{
    model::{
        name::ContainerId,
        observed::{Health, Instance, ObservedApp, Phase},
        spec::Probe,
        time::Timestamp,
    },
    plan::{
        simulate::{NewContainer, apply_step},
        step::{Handle, Step},
    },
};

/// How long an observation after a start waits: one in flight would hold up the first result of the probes.
const PROBES_FIRST: Duration = Duration::from_millis(50);

/// Whether demae itself probes an instance.
fn is_probed(instance: &Instance) -> bool {
    matches!(instance.check.probe, Probe::Http(_) | Probe::Tcp)
}

/// What the probes have found since the health of instances was taken.
#[derive(Default)]
pub(super) struct HealthNews {
    /// An instance is healthy now.
    pub(super) good: bool,
    /// Something else: it is newer than the rest of the observation, so the app is to be observed again.
    pub(super) other: bool,
}

/// Takes good news of the probes into an observation.
pub(super) fn refresh_health(
    observed: &mut ObservedApp,
    probed: impl Fn(&ContainerId) -> Option<Health>,
) -> HealthNews {
    let mut news = HealthNews::default();
    for instance in observed.instances.iter_mut().filter(|i| i.is_running() && is_probed(i)) {
        match probed(&instance.id) {
            Some(Health::Healthy) if !instance.health.is_healthy() => {
                (instance.health, news.good) = (Health::Healthy, true);
            }
            Some(health) => news.other |= health != instance.health,
            None => {}
        }
    }
    news
}

impl AppState {
    /// Whether the result of a step that succeeded tells the state after it, so that the next step may follow without an
    /// observation: the step is of such a kind, and nothing has made the last observation stale.
    pub(super) fn is_result_enough(&self, step: &Step, created: Option<&NewContainer>) -> bool {
        let is_new = |handle: &Handle| {
            let found = self.observed.iter().flat_map(|o| &o.instances).find(|i| i.id == handle.id);
            found.is_some_and(|i| i.phase == Phase::Created)
        };
        let is_known = match step {
            Step::WriteEnvFile(_) | Step::Switch(..) | Step::Prove { .. } | Step::Stop { .. } => true,
            // A container that was there already may have other ports.
            Step::Create { release, .. } => created.is_some() && release.more_endpoints.is_empty(),
            // Of one that ran before, the probes may not have noticed that it ended.
            Step::Start(handle) => is_new(handle),
            _ => false,
        };
        // A stop in flight changes another instance, and is followed by an observation if other steps ran meanwhile.
        let is_alone = !step.is_ending() || !self.steps_overlapped;
        is_known && is_alone && self.fresh.is_valid() && !self.fresh.is_observing()
    }

    /// Brings the observation up to date with a step that succeeded.
    pub(super) fn amend(
        &mut self,
        step: &Step,
        created: Option<NewContainer>,
        probed: impl Fn(&ContainerId) -> Option<Health>,
        now: Timestamp,
    ) {
        let Some(observed) = &mut self.observed else { return };
        apply_step(observed, step, created, now);
        // What was counted before says nothing of the time after a switch: it is counted anew before a stop.
        observed.instances.iter_mut().for_each(|i| i.connections = None);
        if let Step::Start(handle) = step
            && let Some(instance) = observed.instances.iter_mut().find(|i| i.id == handle.id)
            && is_probed(instance)
            && let Some(health) = probed(&handle.id)
        {
            instance.health = health;
        }
        // After a start the probes are about to report.
        let pause = if matches!(step, Step::Start(_)) { PROBES_FIRST } else { Duration::ZERO };
        self.observe_after = now.plus(pause);
        self.telemetry.note_health(observed, self.desired.target());
        self.fresh.amend();
    }

    /// Takes the health of instances from the probes. Returns false if the app is to be observed: there is other news than
    /// that an instance is healthy, or the last observation is of another state.
    pub(super) fn amend_health(&mut self, probed: impl Fn(&ContainerId) -> Option<Health>, now: Timestamp) -> bool {
        // The observation in flight takes it in when it arrives.
        if self.fresh.is_observing() {
            return true;
        }
        if self.busy.is_some() || !self.fresh.is_valid() {
            return false;
        }
        let Some(observed) = &mut self.observed else { return false };
        let news = refresh_health(observed, probed);
        if !news.good || news.other {
            return false;
        }
        self.observe_after = now;
        self.telemetry.note_health(observed, self.desired.target());
        self.fresh.amend();
        true
    }
}
