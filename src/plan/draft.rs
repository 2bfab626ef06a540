//! A plan under construction, which every part of the planner adds to.

use super::{
    AppInput, AppPlan, Backoff, VhostWish,
    step::{Planned, Step, StepKind},
    wait::{Block, Wait},
};
use crate::model::observed::ObservedApp;

/// A plan under construction.
pub(super) struct Draft<'a> {
    pub(super) input: &'a AppInput<'a>,
    pub(super) plan: AppPlan,
}

impl<'a> Draft<'a> {
    pub(super) fn new(input: &'a AppInput<'a>) -> Self {
        Self { input, plan: AppPlan::default() }
    }

    pub(super) fn observed(&self) -> &'a ObservedApp {
        self.input.observed
    }

    /// Sets the step, unless there is one already, or its kind is in backoff: then the plan waits for that.
    pub(super) fn step(&mut self, step: Step, reason: &'static str) {
        if self.plan.step.is_some() {
            return;
        }
        // Leave an instance alone while it is being stopped.
        if let Some(handle) = step.handle()
            && let Some(until) = self.input.stopping.get(&handle.id)
        {
            self.wait(Wait::Stopping { key: handle.key.clone(), until: *until });
            return;
        }
        let kind = step.kind();
        match self.input.backoffs.get(&kind).filter(|c| c.until > self.input.now) {
            None => self.plan.step = Some(Planned::new(step, reason)),
            Some(backoff) if kind == StepKind::Pull && !backoff.temporary => {
                self.plan.blocks.push(Block::ImageMissing(backoff.error.clone()));
                self.wait_for_backoff(kind);
            }
            Some(_) => self.wait_for_backoff(kind),
        }
    }

    /// Whether steps of a kind are in backoff; if so, the plan waits for that.
    pub(super) fn is_backing_off(&mut self, kind: StepKind) -> bool {
        let backing_off = self.input.backoffs.get(&kind).is_some_and(|c| c.until > self.input.now);
        if backing_off {
            self.wait_for_backoff(kind);
        }
        backing_off
    }

    fn wait_for_backoff(&mut self, step: StepKind) {
        if let Some(backoff) = self.input.backoffs.get(&step) {
            let Backoff { until, attempts, error, kind: error_kind, .. } = backoff.clone();
            self.wait(Wait::Backoff { step, until, attempts, error, error_kind });
        }
    }

    pub(super) fn wait(&mut self, wait: Wait) {
        if !self.plan.waits.contains(&wait) {
            self.plan.waits.push(wait);
        }
    }

    pub(super) fn finish(mut self) -> AppPlan {
        if let Some(kind) = self.input.busy {
            self.plan.step = None;
            self.wait(Wait::Busy(kind));
        }
        self.plan
    }

    /// Returns true if nginx serves the wished vhost; else the plan gets the reason as a wait or block.
    pub(super) fn wait_for_vhost(&mut self) -> bool {
        let refused = match (&self.plan.vhost, self.input.proxy.rejected) {
            (VhostWish::Set(wish) | VhostWish::Announce(wish), Some(rejected)) if *wish == rejected.vhost => {
                Some(rejected.error.clone())
            }
            _ => None,
        };
        let is_refused = refused.is_some();
        self.plan.blocks.extend(refused.map(Block::RoutesRejected));
        // It may be served by its last good text.
        if self.plan.vhost.is_met(self.input) {
            return true;
        }
        if is_refused {
            return false;
        }
        let why = match self.input.proxy.trouble {
            Some(trouble) => format!("nginx cannot be changed now: {trouble}"),
            None => "waiting for nginx to serve the new configuration".to_owned(),
        };
        self.wait(Wait::Proxy(why));
        false
    }
}

impl VhostWish {
    /// Whether nginx serves the wished vhost.
    fn is_met(&self, input: &AppInput<'_>) -> bool {
        match self {
            VhostWish::Keep => true,
            VhostWish::Set(vhost) | VhostWish::Announce(vhost) => {
                input.proxy.serving && input.proxy.live == Some(vhost)
            }
            VhostWish::Remove => input.proxy.serving && input.proxy.live.is_none(),
        }
    }
}
