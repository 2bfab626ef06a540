//! What an app's status says: its state, and why it is in it.

use std::collections::BTreeSet;

use super::{
    app::{AppState, UNOBSERVED},
    turn::Kept,
};
use crate::{
    machine::Machine,
    model::{
        desired::{DesiredApp, Target},
        fleet::FleetImage,
        name::ImageDigest,
        observed::Verdict,
        problem::bounded,
        status::{AppStatus, State},
        time::Timestamp,
    },
    plan::{
        AppPlan,
        wait::{Block, Wait},
    },
};

/// Largest reason in bytes: it is published with all others of its host.
const MOST_REASON: usize = 4096;

impl AppState {
    /// Its status; `None` if it is neither here nor wanted here.
    pub(super) fn status<M: Machine>(&mut self, machine: &M) -> Option<AppStatus> {
        let target = self.turn.kept_from().or(self.desired.target()).cloned();
        // Of a plan for an earlier desired state only what serves still counts.
        let mut plan = self.planned.clone().unwrap_or_default();
        if !self.fresh.is_plan_current() {
            plan.blocks.clear();
        }
        let absent = matches!(self.desired, DesiredApp::Absent(_) | DesiredApp::Unknown(_));
        let is_gone = self.fresh.is_plan_current() && plan.is_converged();
        let has_nothing = self.observed.as_ref().is_none_or(|o| o.instances.is_empty() && !o.has_routes());
        if absent && (is_gone || has_nothing) {
            return None;
        }
        let state = match plan.blocks.first() {
            Some(Block::Invalid(_)) => State::Invalid,
            Some(Block::Paused(_)) => State::Paused,
            Some(_) => State::Blocked,
            None if matches!(self.desired, DesiredApp::Absent(_)) => State::Leaving,
            None if self.fresh.is_plan_current()
                && plan.is_converged()
                && self.observe_error.is_none()
                && !self.fresh.is_amended() =>
            {
                State::Converged
            }
            None => State::Converging,
        };
        let release = target.as_ref().map(|t| t.release.id.to_string());
        let reported = (state, release.clone());
        if self.reported.as_ref() != Some(&reported) {
            self.since = machine.wall(machine.now());
            self.reported = Some(reported);
        }
        let observed = self.observed.as_ref();
        let counts = |target: &Target| {
            let verdict = observed?.verdicts.get(&target.release.id)?;
            verdict.is_under(&target.conditions()).then(|| verdict.clone())
        };
        let verdict = target.as_ref().and_then(counts);
        Some(AppStatus {
            app: self.app.to_string(),
            host: machine.host().clone(),
            state,
            serving: plan.serving.as_ref().map(ToString::to_string).filter(|s| Some(s) != release.as_ref()),
            release,
            spec_revision: target.as_ref().map_or(0, |t| t.modified),
            image: target.as_ref().map(|t| t.release.image.to_string()),
            digest: target.as_ref().and_then(|t| self.digest(t)),
            wanted: target.as_ref().map_or(0, |t| t.replicas),
            healthy: plan.healthy,
            since: self.since,
            kinds: self.kinds(&plan).into_iter().map(str::to_owned).collect(),
            reason: bounded(self.reason(&plan, &|at| machine.wall(at)), MOST_REASON),
            verdict: match self.turn.kept_from() {
                Some(_) => self.turn.failed.clone(),
                None => verdict.map(|v| Verdict { at: machine.wall(v.at), ..v }),
            },
            timeline: self.telemetry.timeline().to_vec(),
        })
    }

    /// By its record, or by its reference.
    fn digest(&self, target: &Target) -> Option<ImageDigest> {
        match &self.turn.image {
            FleetImage::Written(digest) if self.turn.kept_from().is_none() => Some(digest.clone()),
            _ => target.release.image.digest(),
        }
    }

    fn kinds(&self, plan: &AppPlan) -> BTreeSet<&'static str> {
        let waits = plan.waits.iter().flat_map(|wait| [Some(wait.kind()), wait.error_kind()]).flatten();
        let unobserved = self.observe_error.iter().map(|_| UNOBSERVED);
        plan.blocks.iter().map(Block::kind).chain(waits).chain(unobserved).collect()
    }

    fn reason(&self, plan: &AppPlan, to_wall: &impl Fn(Timestamp) -> Timestamp) -> String {
        if let Some((error, _)) = &self.observe_error {
            return format!("the app cannot be inspected now: {error}");
        }
        if !self.fresh.is_plan_current() {
            return "change received, not evaluated yet".to_owned();
        }
        if let Some(block) = plan.blocks.first() {
            let retry = plan.waits.iter().find(|w| matches!(w, Wait::Retry { .. }));
            let retry = retry.map(|w| format!("{}; ", w.clone().with_times(to_wall))).unwrap_or_default();
            // As many problems as fit, and how many were left out.
            let shown = match block {
                Block::Invalid(problems) => Block::Invalid(problems.clone().within(MOST_REASON / 2)),
                other => other.clone(),
            };
            return format!("{shown} ({retry}{})", block.remedy(&self.app));
        }
        if let Some(planned) = &plan.step {
            return planned.to_string();
        }
        // Failures come before waits that merely take time.
        let waits = || plan.waits.iter();
        let first = waits().find(|w| matches!(w, Wait::Backoff { .. })).or_else(|| waits().next());
        match (first, &self.desired) {
            (Some(wait), _) => wait.clone().with_times(to_wall).to_string(),
            (None, DesiredApp::Absent(why)) => why.clone(),
            (None, _) if self.fresh.is_amended() => {
                "the last step is done, and its result is being observed".to_owned()
            }
            (None, _) => match self.incidents.summary() {
                Some(summary) => summary,
                None if self.turn.kept == Some(Kept::Pinned) => "a person pinned this release".to_owned(),
                None => String::new(),
            },
        }
    }
}
