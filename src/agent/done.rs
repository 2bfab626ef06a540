//! What tasks of the loop end with, and what is made of it.

use std::{collections::BTreeMap, time::Duration};

use tokio::{sync::OwnedSemaphorePermit, time::Instant};
use tracing::Span;

use super::{Agent, account::millis, app::AppState, unknown};
use crate::{
    execute::StepError,
    host::nginx::{NginxError, Published},
    machine::{Inventory, Machine},
    metrics::Drift,
    model::{
        event::{Outcome, What},
        name::AppName,
        observed::ObservedApp,
        problem::chain,
        proxy::ObservedProxy,
    },
    plan::{
        Cooled,
        proxy::{CHANGED_BY_HAND, NOT_LIVE},
        step::Step,
    },
    retry::pause_after,
    world::ObserveError,
};

/// What a task of the loop ended with.
pub(super) enum Done {
    /// A look at an app.
    Observed(AppName, Result<ObservedApp, ObserveError>),
    /// A step for an app.
    Stepped(AppName, Box<Step>, Result<(), StepError>, Duration, Span),
    /// A step for an app that was not begun, since it was decided too long ago, with its turn; or since the agent ends.
    Late(AppName, Option<(Box<Step>, OwnedSemaphorePermit)>),
    /// A list of everything.
    Listed(Result<Inventory, ObserveError>),
    /// A look at nginx.
    ProxyObserved(Box<ObservedProxy>),
    /// A count of nginx's old workers.
    OldWorkers(Option<usize>),
    /// A step for nginx.
    ProxyStepped(ProxyEnd),
    /// A step for nginx that was not begun, since it was decided too long ago.
    ProxyLate,
}

/// How a step for nginx ended.
pub(super) struct ProxyEnd {
    pub(super) result: Result<Option<Published>, NginxError>,
    /// Why it was taken.
    pub(super) reason: &'static str,
    /// How many apps it changes.
    pub(super) changes: usize,
    pub(super) took: Duration,
}

impl<M: Machine> Agent<M> {
    /// Takes what a task ended with.
    pub(super) fn take(&mut self, done: Done) {
        let now = self.machine.now();
        match done {
            Done::Observed(app, result) => {
                let Some(state) = self.apps.get_mut(&app) else { return };
                state.observing = false;
                match result {
                    Ok(observed) => {
                        state.take_observed(observed, now);
                        self.docker_error = None;
                        self.docker_answers();
                    }
                    Err(e) => {
                        self.docker_away |= e.is_docker_away();
                        tracing::warn!(app = %app, "cannot look at the app: {e}");
                        state.fail_look(&e.to_string(), now);
                    }
                }
            }
            Done::Stepped(app, step, result, took, span) => {
                span.in_scope(|| self.take_step(&app, &step, result, took));
            }
            Done::Late(app, late) => {
                if let (Some(state), Some((step, turn))) = (self.apps.get_mut(&app), late) {
                    state.drop_step(&step, turn);
                }
            }
            Done::Listed(result) => self.take_list(result),
            Done::ProxyObserved(observed) => {
                self.proxy.observing = false;
                self.proxy.seen = true;
                self.proxy.stale = std::mem::take(&mut self.proxy.outdated);
                // An nginx that was away has other workers, and sockets may have to be opened to their group.
                if observed.serving.is_some() && self.proxy.observed.serving.is_none() {
                    self.apps.values_mut().for_each(|state| state.dirty = true);
                }
                self.proxy.observed = *observed;
                // Of an app that never got as far as a container nothing else is left.
                let unknown = unknown(self.snapshot.as_deref());
                for app in self.proxy.observed.live.iter().flat_map(|live| live.vhosts.keys()) {
                    let new = || AppState::new(app.clone(), unknown.clone(), now);
                    self.apps.entry(app.clone()).or_insert_with(new);
                }
                self.proxy.observed.changing = self.proxy.busy;
                self.replan_all();
            }
            Done::OldWorkers(count) => {
                self.proxy.counting = false;
                if std::mem::replace(&mut self.proxy.observed.old_workers, count) != count {
                    self.replan_all();
                }
            }
            Done::ProxyStepped(end) => self.take_proxy_step(end),
            // Nothing holds up a step for nginx but that the agent stood still. The loop need not have noticed yet.
            Done::ProxyLate => {
                self.proxy.busy = false;
                self.look_anew();
            }
        }
    }

    fn take_step(&mut self, app: &AppName, step: &Step, result: Result<(), StepError>, took: Duration) {
        let kind = step.kind();
        let (metrics, events) = (&self.outlets.metrics, &self.outlets.events);
        metrics.stepped(kind, result.as_ref().err().map(StepError::kind), took);
        let (now, took_ms) = (self.machine.now(), millis(took));
        let tell = |outcome: Outcome, message: String| {
            events.tell(Some(app), What::Step { step: kind.as_str().to_owned(), outcome, took_ms }, message);
        };
        let Some(state) = self.apps.get_mut(app) else { return };
        state.end_step(step);
        match result {
            Ok(()) => {
                tracing::info!(app = %app, step = kind.as_str(), took_ms, "{step}");
                tell(Outcome::Done, step.to_string());
                state.took_step(step, now, metrics, events);
            }
            Err(e) => {
                tell(Outcome::Failed, format!("{step} failed: {}", chain(&e)));
                tracing::warn!(app = %app, step = kind.as_str(), error = e.kind(), "{step} failed: {}", chain(&e));
                if e.is_image_gone() {
                    state.lost_image();
                }
                state.failed_step(kind, chain(&e), e.is_temporary(), now);
            }
        }
    }

    /// What is behind a port is reached through Docker, and was not while that was away. Nobody is to be replaced for it.
    fn docker_answers(&mut self) {
        if std::mem::take(&mut self.docker_away) {
            self.machine.forget_health();
            self.apps.values_mut().for_each(AppState::look_anew);
        }
    }

    fn take_list(&mut self, result: Result<Inventory, ObserveError>) {
        self.listing = false;
        match result {
            Err(e) => {
                self.docker_away |= e.is_docker_away();
                let error = e.to_string();
                // It is asked each second, maybe for hours.
                if self.docker_error.as_ref() != Some(&error) {
                    tracing::warn!("cannot look at this host: {error}");
                }
                self.docker_error = Some(error);
                self.relist_at = Instant::now() + Duration::from_secs(1);
            }
            Ok(Inventory { containers: listed, foreign, traces: on_disk }) => {
                if self.foreign != foreign && !foreign.is_empty() {
                    let names: Vec<&str> = foreign.iter().take(5).map(|f| f.name.as_str()).collect();
                    tracing::warn!(
                        count = foreign.len(),
                        "containers of another agent are left alone: {}",
                        names.join(", ")
                    );
                }
                self.foreign = foreign;
                self.outlets.metrics.listed();
                if self.docker_error.take().is_some() {
                    tracing::info!("this host can be looked at again");
                }
                self.docker_answers();
                let now = self.machine.now();
                let mut by_app: BTreeMap<AppName, Vec<(String, String)>> = BTreeMap::new();
                for app in on_disk.keys() {
                    by_app.entry(app.clone()).or_default();
                }
                for container in listed {
                    by_app.entry(container.app).or_default().push((container.id, container.state));
                }
                let unknown = unknown(self.snapshot.as_deref());
                for app in by_app.keys() {
                    let new = || AppState::new(app.clone(), unknown.clone(), now);
                    self.apps.entry(app.clone()).or_insert_with(new);
                }
                let first = !self.listed;
                let nothing = ObservedApp::default();
                for (app, state) in &mut self.apps {
                    let found = by_app.remove(app).unwrap_or_default();
                    let differs = match on_disk.get(app) {
                        Some(None) => true,
                        Some(Some(traces)) => state.differs(&found, traces),
                        None => state.differs(&found, &nothing),
                    };
                    state.dirty |= first || differs;
                }
                self.listed = true;
                self.relist_at = Instant::now() + self.machine.jittered(self.options.resync);
                self.proxy.dirty = true;
            }
        }
    }

    fn take_proxy_step(&mut self, end: ProxyEnd) {
        let (metrics, events) = (&self.outlets.metrics, &self.outlets.events);
        let took_ms = millis(end.took);
        self.proxy.busy = false;
        self.proxy.dirty = true;
        // A look that was begun before may have seen the set from before, and the workers of this one.
        self.proxy.outdated = self.proxy.observing;
        match end.result {
            Ok(published) => {
                let failed_before = self.proxy.cooled.take().is_some();
                if published.as_ref().is_none_or(|p| p.reloaded) {
                    metrics.reloaded(end.changes, end.took);
                    let message = format!("nginx serves a new configuration: {}", end.reason);
                    tracing::info!(step = "nginx", took_ms, "{message}");
                    events.tell(None, What::Reload { outcome: Outcome::Done, took_ms }, message);
                } else {
                    metrics.reload_unneeded();
                }
                match end.reason {
                    CHANGED_BY_HAND => metrics.repaired(Drift::File),
                    // After a failure of demae's own it is no drift.
                    NOT_LIVE if !failed_before => metrics.repaired(Drift::Nginx),
                    _ => {}
                }
                for (app, error) in published.iter().flat_map(|p| &p.rejected) {
                    tracing::warn!(app = %app, "nginx refuses the app: {error}");
                }
            }
            Err(e) => {
                metrics.reload_failed();
                let error = chain(&e);
                tracing::warn!("nginx cannot be changed: {error}");
                let message = format!("nginx cannot be changed: {error}");
                events.tell(None, What::Reload { outcome: Outcome::Failed, took_ms }, message);
                let attempts = self.proxy.cooled.as_ref().map_or(0, |c| c.attempts) + 1;
                let until = self.machine.now().plus(pause_after(attempts).min(Duration::from_secs(30)));
                self.proxy.cooled = Some(Cooled { until, attempts, error, temporary: true });
            }
        }
    }
}
