//! What the loop keeps of nginx, and what it does to it.

use std::collections::BTreeMap;

use tokio::time::Instant;

use super::{
    Agent, FIRST_LOOK,
    app::AppState,
    done::{Done, ProxyEnd},
    standstill,
};
use crate::{
    failpoint,
    machine::Machine,
    model::{name::AppName, proxy::ObservedProxy, time::Timestamp},
    plan::{
        Cooled, VhostWish,
        proxy::{ProxyInput, ProxyStep, plan_proxy},
    },
};

/// What is known of nginx, and what is under way.
#[derive(Default)]
pub(super) struct ProxyState {
    pub(super) observed: ObservedProxy,
    pub(super) seen: bool,
    pub(super) observing: bool,
    /// Whether what was seen may not hold any more.
    pub(super) stale: bool,
    /// Whether the look under way was begun before that.
    pub(super) outdated: bool,
    pub(super) dirty: bool,
    pub(super) counting: bool,
    pub(super) busy: bool,
    pub(super) cooled: Option<Cooled>,
    pub(super) trouble: Option<String>,
    pub(super) wake: Option<Timestamp>,
    /// Since when a step is held back, since it is not known who is well.
    pub(super) held: Option<Timestamp>,
}

impl<M: Machine> Agent<M> {
    /// Takes a step for nginx, if one is due.
    pub(super) fn act_on_proxy(&mut self, now: Timestamp) {
        let unseen = self.apps.values().any(|s| !s.is_planned());
        if !self.proxy.seen || self.proxy.stale || self.proxy.observing || (unseen && self.began.elapsed() < FIRST_LOOK)
        {
            return;
        }
        let wishes: BTreeMap<AppName, VhostWish> = self.apps.iter().map(|(a, s)| (a.clone(), s.wish())).collect();
        let input = ProxyInput {
            wishes: &wishes,
            observed: &self.proxy.observed,
            cooling: self.proxy.cooled.as_ref(),
            held: self.proxy.held,
            unasked: self.apps.values().filter_map(AppState::unasked).max(),
            busy: self.proxy.busy,
            now,
        };
        let plan = plan_proxy(&input);
        (self.proxy.wake, self.proxy.held) = (plan.wake, plan.held);
        if self.proxy.trouble != plan.trouble {
            self.proxy.trouble = plan.trouble;
            self.replan_all();
        }
        let Some((step, reason)) = plan.step else {
            // It came late, and it came: what failed is over. What is held back may fail again.
            let held_back = self.apps.values().any(AppState::is_held_back);
            if !held_back && self.proxy.trouble.is_none() && self.proxy.cooled.take().is_some() {
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
            if standstill::is_late(now, machine.now()) {
                tracing::info!("decided anew, as it comes late: {step}");
                return Done::ProxyLate;
            }
            let began = Instant::now();
            let result = match step {
                ProxyStep::Publish(vhosts) => machine.publish(&vhosts).await.map(Some),
                ProxyStep::Reload => machine.reload().await.map(|()| None),
            };
            failpoint::boundary("nginx");
            Done::ProxyStepped(ProxyEnd { result, reason, changes, took: began.elapsed() })
        });
    }
}
