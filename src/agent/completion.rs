//! Results of the loop's tasks, and how the loop handles them.

use std::{collections::BTreeMap, time::Duration};

use tokio::{sync::OwnedSemaphorePermit, time::Instant};
use tracing::Span;

use super::{Agent, amend::refresh_health, app::AppState, desired_if_unlisted, telemetry::millis};
use crate::{
    execute::StepError,
    host::nginx::{NginxError, Published},
    machine::{Inventory, Machine},
    metrics::Drift,
    model::{
        event::{Outcome, What},
        fleet::EndedCommand,
        name::{AppName, ContainerId},
        observed::ObservedApp,
        problem::chain,
        proxy::{ObservedProxy, Vhost},
    },
    plan::{
        Backoff,
        proxy::{CHANGED_BY_HAND, NOT_LIVE},
        simulate::NewContainer,
        step::Step,
    },
    retry::pause_after,
    world::ObserveError,
};

/// The result of a task.
pub(super) enum Completion {
    /// An observation of an app.
    Observed(AppName, Result<ObservedApp, ObserveError>),
    /// A step for an app ended; the container that it created.
    Stepped(AppName, Box<Step>, Result<Option<NewContainer>, StepError>, Duration, Span),
    /// A step that did not start: its decision expired while it waited for a permit (passed along), or the agent shuts
    /// down.
    NotStarted(AppName, Option<(Box<Step>, OwnedSemaphorePermit)>),
    /// A list of everything.
    Listed(Result<Inventory, ObserveError>),
    /// An observation of nginx.
    ProxyObserved(Box<ObservedProxy>),
    /// A count of connections of draining instances.
    Counted(AppName, Vec<(ContainerId, Option<usize>)>),
    /// A count of nginx's old workers, and the generation of the set that they are older than.
    OldWorkers(Option<u64>, Option<usize>),
    /// The command of a release ended, or nothing can be said about it now.
    CommandEnded(AppName, Result<EndedCommand, StepError>),
    /// What a command had left is removed, or not.
    CommandRemoved,
    /// A step for nginx ended.
    ProxyStepped(ProxyStepResult),
    /// A step for nginx that did not start: its decision expired.
    ProxyNotStarted,
}

/// The result of a step for nginx.
pub(super) struct ProxyStepResult {
    pub(super) result: Result<Option<Published>, NginxError>,
    /// The set that was to be published, if the step was that.
    pub(super) wanted: Option<BTreeMap<AppName, Vhost>>,
    /// The reason for the step.
    pub(super) reason: &'static str,
    /// Number of apps that it changes.
    pub(super) changes: usize,
    pub(super) took: Duration,
}

impl<M: Machine> Agent<M> {
    /// Handles the result of a task.
    pub(super) fn on_completion(&mut self, completion: Completion) {
        let now = self.machine.now();
        match completion {
            Completion::CommandEnded(app, result) => self.on_command_ended(&app, result),
            Completion::CommandRemoved => {}
            Completion::Observed(app, result) => {
                let Some(state) = self.apps.get_mut(&app) else { return };
                match result {
                    Ok(mut observed) => {
                        // They may have reported while it was observed.
                        let news = refresh_health(&mut observed, |id| self.machine.probed(&app, id));
                        let before = state.binds();
                        state.on_observed(observed, now);
                        if news.other {
                            state.fresh.hint();
                        }
                        if before != state.binds() {
                            self.compare_mounts();
                        }
                        self.docker_error = None;
                        self.on_docker_reachable();
                    }
                    Err(e) => {
                        self.docker_away |= e.is_docker_away();
                        tracing::warn!(app = %app, "cannot inspect the app: {e}");
                        state.on_observe_failed(&e.to_string(), now);
                    }
                }
            }
            Completion::Stepped(app, step, result, took, span) => {
                span.in_scope(|| self.on_step_ended(&app, &step, result, took));
            }
            Completion::NotStarted(app, unstarted) => {
                if let (Some(state), Some((step, permit))) = (self.apps.get_mut(&app), unstarted) {
                    state.on_step_not_started(&step, permit);
                }
            }
            Completion::Listed(result) => self.on_listed(result),
            Completion::ProxyObserved(observed) => {
                if self.proxy.fresh.succeed() {
                    self.proxy.prediction.compare(&observed);
                }
                // A restarted nginx has other workers, and sockets may have to be opened to their group.
                if observed.serving.is_some() && self.proxy.observed.serving.is_none() {
                    let observed = self.apps.values_mut().filter(|state| state.fresh.has_observed());
                    observed.for_each(|state| state.fresh.hint());
                }
                self.proxy.observed = *observed;
                // An app that never had a container may exist in the live set alone.
                let unlisted = desired_if_unlisted(self.snapshot.as_deref());
                for app in self.proxy.observed.live.iter().flat_map(|live| live.vhosts.keys()) {
                    let new = || AppState::new(app.clone(), unlisted.clone(), now);
                    self.apps.entry(app.clone()).or_insert_with(new);
                }
                self.proxy.observed.changing = self.proxy.busy;
                self.replan_all();
            }
            Completion::Counted(app, counts) => {
                if let Some(state) = self.apps.get_mut(&app)
                    && !state.on_counted(&counts, now)
                {
                    state.fresh.hint();
                }
            }
            Completion::OldWorkers(generation, count) => {
                self.proxy.counting_workers = false;
                // Of another set, other workers are old.
                if self.proxy.observed.generation() == generation
                    && std::mem::replace(&mut self.proxy.observed.old_workers, count) != count
                {
                    self.replan_all();
                }
            }
            Completion::ProxyStepped(end) => self.on_proxy_step_ended(end),
            // A step for nginx only expires in a standstill, which the loop need not have noticed yet.
            Completion::ProxyNotStarted => {
                self.proxy.busy = false;
                self.invalidate_all();
            }
        }
    }

    fn on_step_ended(
        &mut self,
        app: &AppName,
        step: &Step,
        result: Result<Option<NewContainer>, StepError>,
        took: Duration,
    ) {
        let kind = step.kind();
        let (metrics, events) = (&self.outlets.metrics, &self.outlets.events);
        metrics.stepped(kind, result.as_ref().err().map(StepError::kind), took);
        let (now, took_ms) = (self.machine.now(), millis(took));
        let emit = |outcome: Outcome, message: String| {
            events.emit(Some(app), What::Step { step: kind.as_str().to_owned(), outcome, took_ms }, message);
        };
        let Some(state) = self.apps.get_mut(app) else { return };
        let is_enough = |created: &Option<NewContainer>| state.is_result_enough(step, created.as_ref());
        let is_result_enough = result.as_ref().is_ok_and(is_enough);
        state.end_step(step);
        match result {
            Ok(created) => {
                tracing::info!(app = %app, step = kind.as_str(), took_ms, "{step}");
                emit(Outcome::Done, step.to_string());
                state.on_step_succeeded(step, created.as_ref(), now, (metrics, events));
                if is_result_enough {
                    state.amend(step, created, |id| self.machine.probed(app, id), now);
                }
            }
            Err(e) => {
                emit(Outcome::Failed, format!("{step} failed: {}", chain(&e)));
                tracing::warn!(app = %app, step = kind.as_str(), error = e.kind(), "{step} failed: {}", chain(&e));
                if e.is_image_gone() {
                    state.on_image_lost();
                }
                state.discard_prediction();
                state.on_step_failed(kind, (chain(&e), e.kind()), e.is_temporary(), now);
            }
        }
    }

    /// Docker itself carries traffic to published ports, so health results from an outage of Docker are stale and no
    /// reason to replace an instance.
    fn on_docker_reachable(&mut self) {
        if std::mem::take(&mut self.docker_away) {
            self.machine.reset_health();
            self.apps.values_mut().for_each(AppState::invalidate);
        }
    }

    fn on_listed(&mut self, result: Result<Inventory, ObserveError>) {
        self.listing = false;
        match result {
            Err(e) => {
                self.docker_away |= e.is_docker_away();
                let error = e.to_string();
                // Retried each second, possibly for hours.
                if self.docker_error.as_ref() != Some(&error) {
                    tracing::warn!("cannot list the containers of this host: {error}");
                }
                self.docker_error = Some(error);
                self.relist_at = Instant::now() + Duration::from_secs(1);
            }
            Ok(Inventory { containers: listed, foreign, is_complete, traces: on_disk }) => {
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
                    tracing::info!("the containers of this host can be listed again");
                }
                self.on_docker_reachable();
                let now = self.machine.now();
                let mut by_app: BTreeMap<AppName, Vec<(String, String)>> = BTreeMap::new();
                for app in on_disk.keys() {
                    by_app.entry(app.clone()).or_default();
                }
                for container in listed {
                    by_app.entry(container.app).or_default().push((container.id, container.state));
                }
                let unlisted = desired_if_unlisted(self.snapshot.as_deref());
                for app in by_app.keys() {
                    let new = || AppState::new(app.clone(), unlisted.clone(), now);
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
                    if first || differs {
                        // Later lists may be older than what happened since they began.
                        let is_whole = first && is_complete && self.foreign.is_empty();
                        state.on_listed(is_whole.then_some(found));
                    }
                }
                self.listed = true;
                self.relist_at = Instant::now() + self.machine.jittered(self.options.resync);
                self.proxy.fresh.hint();
            }
        }
    }

    fn on_proxy_step_ended(&mut self, end: ProxyStepResult) {
        let (metrics, events) = (&self.outlets.metrics, &self.outlets.events);
        let took_ms = millis(end.took);
        self.proxy.busy = false;
        // An observation in flight may have seen the previous set and the workers of this one.
        self.proxy.fresh.invalidate();
        match end.result {
            Ok(published) => {
                self.proxy.prediction.predict(end.wanted.as_ref(), published.as_ref());
                let failed_before = self.proxy.backoff.take().is_some();
                if published.as_ref().is_none_or(|p| p.reloaded) {
                    metrics.reloaded(end.changes, end.took);
                    let message = format!("nginx serves a new configuration: {}", end.reason);
                    tracing::info!(step = "nginx", took_ms, "{message}");
                    events.emit(None, What::Reload { outcome: Outcome::Done, took_ms }, message);
                } else {
                    metrics.reload_unneeded();
                }
                match end.reason {
                    CHANGED_BY_HAND => metrics.repaired(Drift::File),
                    // After a failure of demae's own this is no drift.
                    NOT_LIVE if !failed_before => metrics.repaired(Drift::Nginx),
                    _ => {}
                }
                for (app, error) in published.iter().flat_map(|p| &p.rejected) {
                    tracing::warn!(app = %app, "nginx refuses the app: {error}");
                }
            }
            Err(e) => {
                self.proxy.prediction.discard();
                metrics.reload_failed();
                let error = chain(&e);
                tracing::warn!("nginx cannot be changed: {error}");
                let message = format!("nginx cannot be changed: {error}");
                events.emit(None, What::Reload { outcome: Outcome::Failed, took_ms }, message);
                let attempts = self.proxy.backoff.as_ref().map_or(0, |c| c.attempts) + 1;
                let until = self.machine.now().plus(pause_after(attempts).min(Duration::from_secs(30)));
                self.proxy.backoff = Some(Backoff { until, attempts, error, kind: "nginx", temporary: true });
            }
        }
    }
}
