//! The reconcile loop: observe, plan, perform one step, observe again.
//!
//! Every trigger (a change in the store, a Docker event, a timer) only says *observe this app again*. Decisions follow
//! from what is then observed, so a lost event costs time, never safety. Within a deploy, the known result of a step and
//! a probe that finds an instance healthy stand in for that (`amend.rs`).

mod allowed;
mod amend;
mod app;
mod completion;
mod describe;
mod drain;
mod freshness;
mod incidents;
mod listen;
mod listing;
mod prediction;
mod proxy;
mod report;
mod rollouts;
mod standstill;
mod telemetry;
mod turn;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::{
    sync::{Notify, Semaphore, mpsc, watch},
    task::JoinSet,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use tracing::Instrument as _;

use crate::{
    events::Events,
    failpoint,
    host::docker::Foreign,
    machine::Machine,
    metrics::{HostGauges, Metrics, View},
    model::{
        desired::{DesiredApp, Snapshot},
        mounts::NestedMount,
        name::AppName,
        policy::Policy,
        status::{HostStatus, StoreBlock},
        time::Timestamp,
    },
    plan::{
        AppInput, AppPlan,
        proxy::{Conflict, ProxyInput, ProxyPlan, conflicts},
        step::Step,
    },
    rollout::{Answer, Link},
    store::{Publishing, Update},
};
use app::{AppState, PlanContext};
use completion::Completion;
use listen::{Hint, listen_to_docker, on_sighup};
use proxy::ProxyState;
use turn::without_turns;

/// Steps in flight at a time. Measured on two cores: four at a time start 50 containers in 4.8 s, eight in 4.4 s,
/// sixteen in 4.2 s; one at a time takes 10.2 s.
pub const PARALLEL_STEPS: usize = 8;
/// Pulls in flight at a time; a single one saturates the network link.
const PARALLEL_PULLS: usize = 3;
/// Stops in flight at a time. They mostly wait for a program to exit, and must not block other steps.
const PARALLEL_STOPS: usize = 64;
/// Longest wait for steps in flight at shutdown. The next start finds and finishes what was cut off.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(8);
/// Apps that have not been observed yet hold back changes of nginx for this long at most.
const FIRST_OBSERVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Where the agent publishes its state.
#[derive(Debug)]
pub struct Outlets {
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// What metrics show of the loop.
    pub view: watch::Sender<Arc<View>>,
    /// Gauges of this machine, for metrics.
    pub host_gauges: watch::Sender<HostGauges>,
    /// The event stream.
    pub events: Events,
    /// For `/status`.
    pub status: watch::Sender<HostStatus>,
    /// For the store.
    pub publish: watch::Sender<(HostStatus, BTreeMap<String, String>)>,
    /// When the loop last completed a round.
    pub pulse: watch::Sender<Instant>,
    /// Whether etcd and Docker have been read.
    pub ready: watch::Sender<bool>,
    /// Asks the store watcher for a full read at once.
    pub resync_requested: Arc<Notify>,
    /// State of publishing to the store.
    pub publishing: Arc<Publishing>,
}

/// How the agent runs.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Interval between two full observations.
    pub resync: Duration,
    /// Steps at a time.
    pub parallel: usize,
    /// How long a deleted app stays as it is: a put within this time undoes the deletion.
    pub delete_grace: Duration,
    /// Exit once everything is converged, or only an operator can help.
    pub once: bool,
    /// The planner: [`plan_app`](crate::plan::app::plan_app), except in tests that check that wrong plans are refused.
    pub planner: Planner,
    /// The planner of nginx: [`plan_proxy`](crate::plan::proxy::plan_proxy), with the same exception.
    pub proxy_planner: ProxyPlanner,
}

/// Plans one app.
pub type Planner = fn(&AppInput<'_>) -> AppPlan;

/// Plans nginx.
pub type ProxyPlanner = fn(&ProxyInput<'_>) -> ProxyPlan;

/// How the loop ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Everything was converged.
    Converged,
    /// An operator must act.
    Blocked,
    /// It was asked to shut down.
    Shutdown,
    /// A bug in demae: one of its tasks panicked.
    TaskPanicked,
}

/// The agent of one host.
pub struct Agent<M> {
    machine: Arc<M>,
    options: Options,
    outlets: Outlets,
    updates: watch::Receiver<Update>,
    snapshot: Option<Arc<Snapshot>>,
    conflicts: BTreeMap<AppName, Conflict>,
    /// Apps with a volume that another mount can replace.
    nested: BTreeMap<AppName, NestedMount>,
    /// What this host allows.
    policy: Arc<Policy>,
    apps: BTreeMap<AppName, AppState>,
    proxy: ProxyState,
    docker_error: Option<String>,
    /// Containers with this host's name that another agent created.
    foreign: Vec<Foreign>,
    /// Whether Docker was unreachable or unresponsive at the last call.
    docker_away: bool,
    listed: bool,
    listing: bool,
    relist: bool,
    relist_at: Instant,
    began: Instant,
    /// When this round of the loop began, by the clock that keeps running while the machine is suspended.
    round: Timestamp,
    /// Deadline for a requested re-read of the store, and the number of read attempts when it was requested.
    rereading: Option<(Instant, u64)>,
    jobs: JoinSet<Completion>,
    steps: Arc<Semaphore>,
    pulls: Arc<Semaphore>,
    stops: Arc<Semaphore>,
    store_reachable: bool,
    store_block: Option<StoreBlock>,
    /// The records of rollouts, if this host takes turns.
    rollouts: Option<Link>,
    /// Whether this host took turns when the desired state was last applied.
    took_turns: bool,
}

/// Desired state of an app that a snapshot does not list.
fn desired_if_unlisted(snapshot: Option<&Snapshot>) -> DesiredApp {
    let why = "the store has no such app".to_owned();
    if snapshot.is_some_and(|s| s.proven) { DesiredApp::Absent(why) } else { DesiredApp::Unknown(why) }
}

/// News of rollouts: the answer to a write, or `None` if the records have changed, or whether this host takes turns. Never
/// ends without rollouts.
async fn rollout_news(link: &mut Option<Link>) -> Option<Answer> {
    let Some(Link { takes_turns, rollouts, answers, .. }) = link else { return std::future::pending().await };
    tokio::select! {
        biased;
        Some(answer) = answers.recv() => Some(answer),
        Ok(()) = takes_turns.changed() => None,
        Ok(()) = rollouts.changed() => None,
        // The task at the other end is gone: the agent is ending.
        else => std::future::pending().await,
    }
}

impl<M: Machine> Agent<M> {
    /// A new agent; it does nothing until it runs.
    pub fn new(machine: Arc<M>, options: Options, outlets: Outlets, updates: watch::Receiver<Update>) -> Self {
        let now = Instant::now();
        let round = machine.now();
        let policy = machine.policy();
        Self {
            machine,
            options,
            outlets,
            updates,
            snapshot: None,
            conflicts: BTreeMap::new(),
            nested: BTreeMap::new(),
            policy,
            apps: BTreeMap::new(),
            proxy: ProxyState::default(),
            docker_error: None,
            foreign: Vec::new(),
            docker_away: false,
            listed: false,
            listing: false,
            relist: true,
            relist_at: now,
            began: now,
            round,
            rereading: None,
            jobs: JoinSet::new(),
            steps: Arc::new(Semaphore::new(options.parallel)),
            pulls: Arc::new(Semaphore::new(PARALLEL_PULLS)),
            stops: Arc::new(Semaphore::new(PARALLEL_STOPS)),
            store_reachable: true,
            store_block: None,
            rollouts: None,
            took_turns: false,
        }
    }

    /// The same agent, which takes turns in rollouts.
    #[must_use]
    pub fn with_rollouts(self, link: Link) -> Self {
        Self { rollouts: Some(link), took_turns: true, ..self }
    }

    /// Runs until cancelled; with `once`, until nothing is left to do.
    ///
    /// `news` yields apps whose health changed.
    pub async fn run(mut self, mut news: mpsc::UnboundedReceiver<AppName>, token: CancellationToken) -> Ended {
        let (hints, mut hinted) = mpsc::unbounded_channel();
        let mut listeners = JoinSet::new();
        listeners.spawn(listen_to_docker(self.machine.clone(), hints.clone()));
        listeners.spawn(on_sighup(hints));
        let mut watchdog = tokio::time::interval(Duration::from_secs(5));
        let mut updates = self.updates.clone();
        self.apply_update();
        loop {
            self.begin_round();
            self.act();
            self.report();
            if self.options.once
                && let Some(ended) = self.once_result()
            {
                self.finish().await;
                return ended;
            }
            let wake = self.wake_at();
            // Biased: the same history is handled in the same order, and a flood of hints blocks nothing.
            tokio::select! {
                biased;
                () = token.cancelled() => {
                    self.finish().await;
                    return Ended::Shutdown;
                }
                _ = watchdog.tick() => {
                    self.outlets.pulse.send_replace(Instant::now());
                    // Fails outside of systemd.
                    let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
                    // Notices a stopped or restarted nginx soon, not only at the next full observation.
                    let away = self.proxy.observed.serving.is_none() || !self.machine.has_nginx();
                    if self.proxy.fresh.is_valid() && away {
                        self.proxy.fresh.hint();
                    }
                }
                changed = updates.changed() => {
                    if changed.is_err() {
                        tracing::error!("the store watch ended unexpectedly; the agent ends");
                        self.finish().await;
                        return Ended::TaskPanicked;
                    }
                    updates.mark_unchanged();
                    self.apply_update();
                }
                Some(done) = self.jobs.join_next() => match done {
                    Ok(done) => self.on_completion(done),
                    Err(e) => {
                        // The app that the task worked for is lost with it; a restart recovers everything.
                        tracing::error!("a task of the agent panicked; the agent ends: {e}");
                        self.finish().await;
                        return Ended::TaskPanicked;
                    }
                },
                news = rollout_news(&mut self.rollouts) => match news {
                    Some(answer) => self.on_turn_written(&answer),
                    None => self.on_rollouts_changed(),
                },
                Some(app) = news.recv() => self.on_probed(&app),
                Some(hint) = hinted.recv() => match hint {
                    Hint::App(app) => self.request_observe(&app),
                    Hint::Ended(app) => {
                        self.request_observe(&app);
                        if let Some(state) = self.apps.get_mut(&app) {
                            state.fresh.invalidate();
                        }
                    }
                    Hint::All => self.relist = true,
                },
                () = tokio::time::sleep_until(wake) => {}
            }
            self.outlets.pulse.send_replace(Instant::now());
        }
    }

    /// Lets steps in flight finish. The next start finds and finishes what is cut off.
    async fn finish(&mut self) {
        // Steps that wait for a permit no longer get one.
        for permits in [&self.steps, &self.pulls, &self.stops] {
            permits.close();
        }
        let waiting = async { while self.jobs.join_next().await.is_some() {} };
        if tokio::time::timeout(SHUTDOWN_TIMEOUT, waiting).await.is_err() {
            tracing::warn!("{} steps are left unfinished; the next start finishes them", self.jobs.len());
        }
        self.jobs.abort_all();
    }

    fn apply_update(&mut self) {
        let (snapshot, seen) = {
            let update = self.updates.borrow_and_update();
            (update.snapshot.clone(), update.seen)
        };
        let Some(snapshot) = snapshot else { return };
        if self.snapshot.as_ref().is_some_and(|s| Arc::ptr_eq(s, &snapshot)) {
            return;
        }
        let now = self.machine.now();
        // State found at startup is not a change with a latency to measure.
        let seen = seen.filter(|_| self.snapshot.as_ref().is_some_and(|s| s.proven));
        let unlisted = desired_if_unlisted(Some(&snapshot));
        let takes_turns = self.takes_turns();
        for (app, desired) in &snapshot.apps {
            let state =
                self.apps.entry(app.clone()).or_insert_with(|| AppState::new(app.clone(), unlisted.clone(), now));
            let refused = if takes_turns { None } else { without_turns(desired, &state.turn.intended) };
            let desired = refused.as_ref().unwrap_or(desired);
            let is_same = state.turn.intended.means_the_same(desired);
            state.turn.intended.clone_from(desired);
            // What runs in the place of the wanted release is decided by the rollout.
            if state.turn.kept.is_none() || !is_same {
                state.turn.kept = None;
                state.set_desired(desired.clone(), seen, now, self.options.delete_grace);
            }
        }
        for (_, state) in self.apps.iter_mut().filter(|(app, _)| !snapshot.apps.contains_key(*app)) {
            (state.turn.intended, state.turn.kept) = (unlisted.clone(), None);
            state.set_desired(unlisted.clone(), seen, now, self.options.delete_grace);
        }
        self.snapshot = Some(snapshot);
        self.compare_mounts();
    }

    /// The health of an instance changed.
    fn on_probed(&mut self, app: &AppName) {
        let (machine, now) = (&self.machine, self.machine.now());
        let is_amended = |state: &mut AppState| state.amend_health(|id| machine.probed(app, id), now);
        if !self.apps.get_mut(app).is_some_and(is_amended) {
            self.request_observe(app);
        }
    }

    fn request_observe(&mut self, app: &AppName) {
        if let Some(state) = self.apps.get_mut(app) {
            state.fresh.hint();
        } else {
            // A container of an unknown app: this needs a full list.
            self.relist = true;
        }
    }

    /// nginx changed, so what apps wait for may hold now; their observations are still valid.
    fn replan_all(&mut self) {
        for state in self.apps.values_mut() {
            state.fresh.request_plan();
        }
    }

    /// Starts everything that can be started now.
    fn act(&mut self) {
        let now = self.round;
        if (self.relist || Instant::now() >= self.relist_at) && !self.listing {
            self.relist = false;
            self.listing = true;
            let machine = self.machine.clone();
            self.jobs.spawn(async move { Completion::Listed(machine.list().await) });
        }
        // A change of nginx that began before a standstill may take long, and apps must not wait for it.
        let fresh = &mut self.proxy.fresh;
        if fresh.is_observe_due() && !fresh.is_observing() && (!self.proxy.busy || !fresh.is_valid()) {
            fresh.begin();
            let machine = self.machine.clone();
            self.jobs.spawn(async move { Completion::ProxyObserved(Box::new(machine.observe_proxy().await)) });
        }
        let Some(snapshot) = self.snapshot.clone() else { return };
        if !self.listed {
            return;
        }
        self.conflicts = conflicts(&snapshot, &self.proxy.observed);
        let apps: Vec<AppName> = self.apps.keys().cloned().collect();
        for app in &apps {
            self.act_on(app, now);
        }
        self.apps.retain(|app, state| snapshot.apps.contains_key(app) || !state.is_gone());
        self.act_on_proxy(now);
    }

    fn act_on(&mut self, app: &AppName, now: Timestamp) {
        let Some(state) = self.apps.get_mut(app) else { return };
        if state.wake.is_some_and(|at| at <= now) {
            state.wake = None;
            if let Some(ids) = state.drains(now) {
                let (machine, app) = (self.machine.clone(), app.clone());
                self.jobs.spawn(async move {
                    let counts = machine.recount(&app, &ids).await;
                    Completion::Counted(app, counts)
                });
            } else {
                state.fresh.hint();
            }
            if self.proxy.observed.old_workers != Some(0) && !self.proxy.counting_workers {
                self.proxy.counting_workers = true;
                let machine = self.machine.clone();
                let generation = self.proxy.observed.generation();
                self.jobs.spawn(async move { Completion::OldWorkers(generation, machine.old_workers().await) });
            }
        }
        self.follow_rollout(app, now);
        self.run_command(app, now);
        // Plan on a fresh observation before the next one: else a flood of hints would starve the app.
        let is_writing = self.is_plannable(app) && self.write_turn(app, false, now);
        let Some(step) = (!is_writing).then(|| self.plan(app, now)).flatten() else {
            let state = self.apps.get(app);
            let is_ready = state.is_some_and(AppState::is_ready_to_commit);
            if !is_writing && (is_ready || state.is_some_and(|state| state.pulled().is_some())) {
                self.write_turn(app, is_ready, now);
            }
            self.observe_if_due(app, now);
            return;
        };
        let Some(state) = self.apps.get_mut(app) else { return };
        let (machine, app, observed) =
            (self.machine.clone(), app.clone(), state.observed().cloned().unwrap_or_default());
        let span = state.span(step.kind());
        let permits = match step {
            Step::Pull { .. } => &self.pulls,
            Step::Stop { .. } | Step::Discard { .. } => &self.stops,
            _ => &self.steps,
        };
        let permits = permits.clone();
        let permit = state.permit.take().filter(|permit| Arc::ptr_eq(permit.semaphore(), &permits));
        let performing = async move {
            let permit = match permit {
                Some(permit) => permit,
                None => match permits.acquire_owned().await {
                    Ok(permit) => permit,
                    // The agent is shutting down.
                    Err(_) => return Completion::NotStarted(app, None),
                },
            };
            failpoint::boundary(step.kind().as_str());
            if standstill::is_expired(now, machine.now()) {
                tracing::info!(
                    app = %app,
                    step = step.kind().as_str(),
                    "decision expired before the step started, planning again: {step}"
                );
                return Completion::NotStarted(app, Some((Box::new(step), permit)));
            }
            let began = Instant::now();
            let result = machine.perform(&app, &step, &observed).await;
            failpoint::boundary(step.kind().as_str());
            Completion::Stepped(app, Box::new(step), result, began.elapsed(), tracing::Span::current())
        };
        self.jobs.spawn(performing.instrument(span));
    }

    /// Whether the observations from which an app is planned are valid, and it is to be planned.
    fn is_plannable(&self, app: &AppName) -> bool {
        let is_due = self.apps.get(app).is_some_and(|state| state.fresh.is_plannable());
        is_due && self.proxy.fresh.is_valid() && self.rereading.is_none()
    }

    /// The next step for an app, if its observation is valid.
    fn plan(&mut self, app: &AppName, now: Timestamp) -> Option<Step> {
        if !self.is_plannable(app) {
            return None;
        }
        let state = self.apps.get_mut(app)?;
        let context = PlanContext {
            proxy: &self.proxy.observed,
            trouble: self.proxy.trouble.as_deref(),
            conflict: self.conflicts.get(app).cloned(),
            nested: self.nested.get(app),
            policy: &self.policy,
        };
        let outputs = (self.outlets.metrics.as_ref(), &self.outlets.events);
        state.plan(self.options.planner, context, now, outputs)
    }

    /// Observes an app, if that is due.
    fn observe_if_due(&mut self, app: &AppName, now: Timestamp) {
        let Some(state) = self.apps.get_mut(app) else { return };
        let fresh = &mut state.fresh;
        if fresh.is_observe_due() && !fresh.is_observing() && state.busy.is_none() && state.observe_after <= now {
            let listed = state.listed();
            state.fresh.begin();
            let wanted = state.wanted();
            let (machine, app) = (self.machine.clone(), app.clone());
            self.jobs.spawn(async move {
                let observed = machine.observe_app(&app, wanted.as_ref(), listed).await;
                Completion::Observed(app, observed)
            });
        }
    }

    fn wake_at(&self) -> Instant {
        let now = self.machine.now();
        let soon = |at: Timestamp| Instant::now() + at.since(now).max(Duration::from_millis(5));
        // No app is acted on before the first list of containers and the first snapshot.
        let is_ready = self.listed && self.snapshot.is_some();
        let apps = self.apps.values().filter(|s| is_ready && !s.fresh.is_observing() && s.busy.is_none());
        let apps =
            apps.filter_map(|s| if s.fresh.is_observe_due() { Some(s.observe_after) } else { s.wake }).min().map(soon);
        let relist = if self.listing { None } else { Some(self.relist_at) };
        let proxy = self.proxy.wake.filter(|_| is_ready && !self.proxy.fresh.is_observing()).map(soon);
        let can_plan = is_ready && self.proxy.fresh.is_valid() && self.rereading.is_none();
        let replan = (can_plan && self.apps.values().any(|s| s.fresh.is_plannable() && s.turn.writing.is_none()))
            .then(Instant::now);
        let reread = self.rereading.map(|_| Instant::now() + standstill::REREAD_POLL);
        [apps, relist, proxy, reread, replan]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or_else(|| Instant::now() + Duration::from_secs(60))
    }

    /// With `once`: the result, if nothing is left to do.
    fn once_result(&self) -> Option<Ended> {
        // While the store is quarantined nothing changes, and only an operator can resolve that.
        let is_resting =
            |s: &AppState| s.is_planned() && !s.fresh.is_observe_due() && !s.fresh.is_plan_due() && s.is_at_rest();
        let resting = self.apps.values().all(is_resting);
        if self.jobs.is_empty() && self.listed && self.store_block.is_some() && (self.snapshot.is_none() || resting) {
            return Some(Ended::Blocked);
        }
        let idle = self.jobs.is_empty() && self.listed && self.snapshot.is_some() && self.proxy.fresh.is_valid();
        let proxy = self.proxy.observed.is_serving_live() && self.snapshot.as_ref().is_some_and(|s| s.proven);
        if !idle || !resting || !proxy {
            return None;
        }
        let blocked =
            self.apps.values().any(AppState::is_blocked) || self.snapshot.iter().any(|s| !s.unreadable.is_empty());
        Some(if blocked { Ended::Blocked } else { Ended::Converged })
    }
}
