//! State of nginx in the loop, and the steps that change it.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    Agent, FIRST_OBSERVE_TIMEOUT,
    app::AppState,
    completion::{Completion, ProxyStepResult},
    freshness::Freshness,
    prediction::ProxyPrediction,
    standstill,
};
use crate::{
    failpoint,
    machine::Machine,
    model::{name::AppName, proxy::ObservedProxy, time::Timestamp},
    plan::{
        Backoff, VhostWish,
        check::proxy_violations,
        proxy::{ProxyInput, ProxyPlan, ProxyStep},
    },
};

/// State of nginx: last observation, last plan, the step in flight.
#[derive(Default)]
pub(super) struct ProxyState {
    pub(super) observed: ObservedProxy,
    pub(super) fresh: Freshness,
    pub(super) counting_workers: bool,
    pub(super) busy: bool,
    pub(super) backoff: Option<Backoff>,
    pub(super) trouble: Option<String>,
    pub(super) wake: Option<Timestamp>,
    pub(super) prediction: ProxyPrediction,
    /// Since when a step is held back until the health of instances is known.
    pub(super) held_since: Option<Timestamp>,
}

impl<M: Machine> Agent<M> {
    /// Starts a step for nginx, if one is due.
    pub(super) fn act_on_proxy(&mut self, now: Timestamp) {
        let unseen = self.apps.values().any(|s| !s.is_planned());
        if !self.proxy.fresh.is_valid()
            || self.proxy.fresh.is_observing()
            || (unseen && self.began.elapsed() < FIRST_OBSERVE_TIMEOUT)
        {
            return;
        }
        let wishes: BTreeMap<AppName, VhostWish> = self.apps.iter().map(|(a, s)| (a.clone(), s.wish())).collect();
        let input = ProxyInput {
            wishes: &wishes,
            observed: &self.proxy.observed,
            backoff: self.proxy.backoff.as_ref(),
            held_since: self.proxy.held_since,
            health_unknown_since: self.apps.values().filter_map(AppState::health_unknown_since).max(),
            busy: self.proxy.busy,
            now,
        };
        let planner = self.options.proxy_planner;
        // A bug must not stop the agent, and a refused plan changes nothing.
        let decide = || {
            let plan = planner(&input);
            let found = proxy_violations(&input, &plan);
            (plan, found)
        };
        let (mut plan, found) = catch_unwind(AssertUnwindSafe(decide)).unwrap_or_else(|_| {
            (ProxyPlan::default(), vec!["it ended in a panic; the log of the agent has it".to_owned()])
        });
        if let Some(violation) = found.into_iter().next() {
            let refused = format!("the plan for nginx was refused: {violation}");
            if self.proxy.trouble.as_ref() != Some(&refused) {
                tracing::error!("{refused}");
            }
            let wake = Some(now.plus(Duration::from_secs(1)));
            plan = ProxyPlan { trouble: Some(refused), wake, ..ProxyPlan::default() };
        }
        (self.proxy.wake, self.proxy.held_since) = (plan.wake, plan.held_since);
        if self.proxy.trouble != plan.trouble {
            self.proxy.trouble = plan.trouble;
            self.replan_all();
        }
        let Some((step, reason)) = plan.step else {
            // The set went live after all: clear the failure. A change that is held back may still fail again.
            let held_back = self.apps.values().any(AppState::is_held_back);
            if !held_back && self.proxy.trouble.is_none() && self.proxy.backoff.take().is_some() {
                self.outlets.metrics.reload_recovered();
            }
            return;
        };
        tracing::info!("{step}: {reason}");
        self.proxy.busy = true;
        self.proxy.observed.changing = true;
        let changes = match &step {
            ProxyStep::Publish(wanted) => self.proxy.observed.changes_to(wanted),
            ProxyStep::Reload => 0,
        };
        let machine = self.machine.clone();
        self.jobs.spawn(async move {
            failpoint::boundary("nginx");
            if standstill::is_expired(now, machine.now()) {
                tracing::info!("decision expired before the step started, planning again: {step}");
                return Completion::ProxyNotStarted;
            }
            let began = Instant::now();
            let wanted = match &step {
                ProxyStep::Publish(vhosts) => Some(vhosts.clone()),
                ProxyStep::Reload => None,
            };
            let result = match step {
                ProxyStep::Publish(vhosts) => machine.publish(&vhosts).await.map(Some),
                ProxyStep::Reload => machine.reload().await.map(|()| None),
            };
            failpoint::boundary("nginx");
            Completion::ProxyStepped(ProxyStepResult { result, wanted, reason, changes, took: began.elapsed() })
        });
    }
}
