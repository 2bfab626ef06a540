//! A plan in the making: what every part of the planner adds to.

use super::{
    AppInput, AppPlan, VhostWish,
    step::{Planned, Step, StepKind},
    wait::{Block, Wait},
};
use crate::model::observed::ObservedApp;

/// A plan in the making.
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

    /// Takes a step, unless one is already taken, or its kind has failed and is not due: then that is waited for.
    pub(super) fn step(&mut self, step: Step, reason: &'static str) {
        if self.plan.step.is_some() {
            return;
        }
        // What was asked to end is left to it.
        if let Some(handle) = step.handle()
            && let Some(until) = self.input.stopping.get(&handle.id)
        {
            self.wait(Wait::Stopping { key: handle.key.clone(), until: *until });
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

    /// Whether steps of a kind have failed and are not due; then that is waited for.
    pub(super) fn is_cooling(&mut self, kind: StepKind) -> bool {
        let cooling = self.input.cooling.get(&kind).is_some_and(|c| c.until > self.input.now);
        if cooling {
            self.cooling(kind);
        }
        cooling
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

    pub(super) fn finish(mut self) -> AppPlan {
        if let Some(kind) = self.input.busy {
            self.plan.step = None;
            self.wait(Wait::Busy(kind));
        }
        self.plan
    }

    /// Tells why nginx does not serve what is wished. True when it does.
    pub(super) fn report(&mut self) -> bool {
        let refused = match (&self.plan.vhost, self.input.proxy.rejected) {
            (VhostWish::Set(wish) | VhostWish::Announce(wish), Some(rejected)) if *wish == rejected.vhost => {
                Some(rejected.error.clone())
            }
            _ => None,
        };
        let is_refused = refused.is_some();
        self.plan.blocks.extend(refused.map(Block::RoutesRejected));
        // Served by its last good text, it is served all the same.
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
    /// Whether nginx serves what is wished.
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
