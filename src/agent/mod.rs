//! The loop: look, decide, do one step, look again.
//!
//! News of any kind (a change in the store, an event of Docker, a health check, a step that ended, a timer) only says
//! *look again at this app*. What is decided follows from what is then seen, so a lost event costs time, never safety.

mod account;
mod app;
mod done;
mod incidents;
mod listen;
mod prediction;
mod proxy;
mod report;
mod standstill;

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
    metrics::{Metrics, View, Vitals},
    model::{
        desired::{DesiredApp, Snapshot},
        mounts::{self, NestedMount},
        name::AppName,
        status::{HostStatus, StoreBlock},
        time::Timestamp,
    },
    plan::{
        AppInput, AppPlan,
        proxy::{Conflict, conflicts},
        step::Step,
    },
    store::{Publishing, Update},
};
use app::{AppState, Around};
use done::Done;
use listen::{Hint, hang_up, listen};
use proxy::ProxyState;

/// Steps at a time. Measured on two cores: four at a time start 50 containers in 4.8 s, eight in 4.4 s, sixteen in
/// 4.2 s; one at a time takes 10.2 s.
pub const PARALLEL_STEPS: usize = 8;
/// Pulls at a time; each uses the whole line anyway.
const PARALLEL_PULLS: usize = 3;
/// Stops at a time. Most of their time they only wait for a program to end, and that must hold up nobody.
const PARALLEL_STOPS: usize = 64;
/// Longest wait for steps under way when the agent ends. Whatever is cut is found and finished by the next start.
const LAST_STEPS: Duration = Duration::from_secs(8);
/// Apps that have not been looked at yet hold back changes of nginx for this long at most.
const FIRST_LOOK: Duration = Duration::from_secs(5);

/// Where the agent tells what it knows.
#[derive(Debug)]
pub struct Outlets {
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// What metrics show of the loop.
    pub view: watch::Sender<Arc<View>>,
    /// What metrics show of this machine.
    pub vitals: watch::Sender<Vitals>,
    /// What happens, one thing at a time.
    pub events: Events,
    /// For `/status`.
    pub status: watch::Sender<HostStatus>,
    /// For the store.
    pub publish: watch::Sender<(HostStatus, BTreeMap<String, String>)>,
    /// When the loop last went round.
    pub pulse: watch::Sender<Instant>,
    /// Whether etcd and Docker have been read.
    pub ready: watch::Sender<bool>,
    /// For whoever reads the store: that it is to be read in full, at once.
    pub doubted: Arc<Notify>,
    /// How publishing goes.
    pub publishing: Arc<Publishing>,
}

/// How the agent runs.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Between two looks at everything.
    pub resync: Duration,
    /// Steps at a time.
    pub parallel: usize,
    /// How long an app stays as it is after it was deleted from the store: within this time a put undoes that.
    pub delete_grace: Duration,
    /// End once everything is converged, or nothing but a person can help.
    pub once: bool,
    /// Who decides. Always [`plan_app`](crate::plan::app::plan_app), except where it is to be seen that a wrong decision is noticed.
    pub planner: Planner,
}

/// Decides about one app.
pub type Planner = fn(&AppInput<'_>) -> AppPlan;

/// How the loop ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Everything was converged.
    Converged,
    /// A person must act.
    Blocked,
    /// It was told to end.
    Told,
    /// A mistake in demae: a part of it panicked.
    Broken,
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
    apps: BTreeMap<AppName, AppState>,
    proxy: ProxyState,
    docker_error: Option<String>,
    /// Containers with this host's name that another agent made.
    foreign: Vec<Foreign>,
    /// Whether Docker was not there, or did not answer, when it was asked last.
    docker_away: bool,
    listed: bool,
    listing: bool,
    relist: bool,
    relist_at: Instant,
    began: Instant,
    /// When this round of the loop began, by the clock that runs on while the machine is suspended.
    round: Timestamp,
    /// Until when the store is waited for, and how often it had been read by then, or that been tried.
    rereading: Option<(Instant, u64)>,
    jobs: JoinSet<Done>,
    steps: Arc<Semaphore>,
    pulls: Arc<Semaphore>,
    stops: Arc<Semaphore>,
    store_reachable: bool,
    store_block: Option<StoreBlock>,
}

/// What is wanted of an app that a snapshot does not know.
fn unknown(snapshot: Option<&Snapshot>) -> DesiredApp {
    let why = "the store has no such app".to_owned();
    if snapshot.is_some_and(|s| s.proven) { DesiredApp::Absent(why) } else { DesiredApp::Kept(why) }
}

impl<M: Machine> Agent<M> {
    /// Nothing is done yet.
    pub fn new(machine: Arc<M>, options: Options, outlets: Outlets, updates: watch::Receiver<Update>) -> Self {
        let now = Instant::now();
        let round = machine.now();
        Self {
            machine,
            options,
            outlets,
            updates,
            snapshot: None,
            conflicts: BTreeMap::new(),
            nested: BTreeMap::new(),
            apps: BTreeMap::new(),
            proxy: ProxyState { dirty: true, ..ProxyState::default() },
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
        }
    }

    /// Runs until told to end; with `once`, until nothing is left to do.
    ///
    /// `news` brings apps whose health changed.
    pub async fn run(mut self, mut news: mpsc::UnboundedReceiver<AppName>, token: CancellationToken) -> Ended {
        let (hints, mut hinted) = mpsc::unbounded_channel();
        let mut listeners = JoinSet::new();
        listeners.spawn(listen(self.machine.clone(), hints.clone()));
        listeners.spawn(hang_up(hints));
        let mut watchdog = tokio::time::interval(Duration::from_secs(5));
        let mut updates = self.updates.clone();
        self.take_update();
        loop {
            self.begin_round();
            self.act();
            self.tell();
            if self.options.once
                && let Some(ended) = self.is_over()
            {
                self.finish().await;
                return ended;
            }
            let wake = self.wake_at();
            // In this order, so that the same history is always told the same way, and a flood of hints holds up nothing.
            tokio::select! {
                biased;
                () = token.cancelled() => {
                    self.finish().await;
                    return Ended::Told;
                }
                _ = watchdog.tick() => {
                    self.outlets.pulse.send_replace(Instant::now());
                    // Outside of systemd nobody listens.
                    let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
                    // nginx that was stopped or started anew is looked at soon, not only with everything else.
                    let away = self.proxy.observed.serving.is_none() || !self.machine.has_nginx();
                    self.proxy.dirty |= self.proxy.seen && away;
                }
                changed = updates.changed() => {
                    if changed.is_err() {
                        tracing::error!("the watch of the store ended badly, and the agent with it");
                        self.finish().await;
                        return Ended::Broken;
                    }
                    updates.mark_unchanged();
                    self.take_update();
                }
                Some(done) = self.jobs.join_next() => match done {
                    Ok(done) => self.take(done),
                    Err(e) => {
                        // Which app it worked for is lost with it. Starting again finds everything.
                        tracing::error!("a task of the agent ended badly, and the agent with it: {e}");
                        self.finish().await;
                        return Ended::Broken;
                    }
                },
                Some(app) = news.recv() => self.look_at(&app),
                Some(hint) = hinted.recv() => match hint {
                    Hint::App(app) => self.look_at(&app),
                    Hint::All => self.relist = true,
                },
                () = tokio::time::sleep_until(wake) => {}
            }
            self.outlets.pulse.send_replace(Instant::now());
        }
    }

    /// Lets the steps under way end. What is cut is found and finished by the next start.
    async fn finish(&mut self) {
        // Whoever waits for a turn gets none any more.
        for permits in [&self.steps, &self.pulls, &self.stops] {
            permits.close();
        }
        let waiting = async { while self.jobs.join_next().await.is_some() {} };
        if tokio::time::timeout(LAST_STEPS, waiting).await.is_err() {
            tracing::warn!("leaving {} steps unfinished; the next start finishes them", self.jobs.len());
        }
        self.jobs.abort_all();
    }

    fn take_update(&mut self) {
        let (snapshot, seen) = {
            let update = self.updates.borrow_and_update();
            (update.snapshot.clone(), update.seen)
        };
        let Some(snapshot) = snapshot else { return };
        if self.snapshot.as_ref().is_some_and(|s| Arc::ptr_eq(s, &snapshot)) {
            return;
        }
        let now = self.machine.now();
        // What an agent finds when it starts is no change that anybody waits for.
        let seen = seen.filter(|_| self.snapshot.as_ref().is_some_and(|s| s.proven));
        let unknown = unknown(Some(&snapshot));
        for (app, desired) in &snapshot.apps {
            let state =
                self.apps.entry(app.clone()).or_insert_with(|| AppState::new(app.clone(), unknown.clone(), now));
            state.want(desired.clone(), seen, now, self.options.delete_grace);
        }
        for (_, state) in self.apps.iter_mut().filter(|(app, _)| !snapshot.apps.contains_key(*app)) {
            state.want(unknown.clone(), seen, now, self.options.delete_grace);
        }
        let nested = mounts::nested(&snapshot);
        for (app, state) in &mut self.apps {
            state.dirty |= nested.get(app) != self.nested.get(app);
        }
        self.nested = nested;
        self.snapshot = Some(snapshot);
    }

    fn look_at(&mut self, app: &AppName) {
        if let Some(state) = self.apps.get_mut(app) {
            state.dirty = true;
        } else {
            // A container of an app that is not known: only a full look tells what it is.
            self.relist = true;
        }
    }

    /// nginx changed, so that what apps wait for may be there; what was seen of them still holds.
    fn replan_all(&mut self) {
        for state in self.apps.values_mut() {
            state.replan = true;
        }
    }

    /// Everything that can be started now.
    fn act(&mut self) {
        let now = self.round;
        if (self.relist || Instant::now() >= self.relist_at) && !self.listing {
            self.relist = false;
            self.listing = true;
            let machine = self.machine.clone();
            self.jobs.spawn(async move { Done::Listed(machine.list().await) });
        }
        // A change that was begun before a standstill may take long, and apps are not kept waiting for its end.
        if self.proxy.dirty && !self.proxy.observing && (!self.proxy.busy || self.proxy.stale) {
            self.proxy.dirty = false;
            self.proxy.observing = true;
            let machine = self.machine.clone();
            self.jobs.spawn(async move { Done::ProxyObserved(Box::new(machine.observe_proxy().await)) });
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
            state.dirty = true;
            if self.proxy.observed.old_workers != Some(0) && !self.proxy.counting {
                self.proxy.counting = true;
                let machine = self.machine.clone();
                self.jobs.spawn(async move { Done::OldWorkers(machine.old_workers().await) });
            }
        }
        // What was just seen is planned on before the next look: else hints without a pause would keep an app from it.
        let Some(step) = self.plan(app, now) else {
            self.look(app, now);
            return;
        };
        let Some(state) = self.apps.get_mut(app) else { return };
        let (machine, app, observed) =
            (self.machine.clone(), app.clone(), state.observed().cloned().unwrap_or_default());
        let span = state.span(step.kind());
        let permits = match step {
            Step::Pull(_) => &self.pulls,
            Step::Stop { .. } | Step::Discard { .. } => &self.stops,
            _ => &self.steps,
        };
        let permits = permits.clone();
        let turn = state.turn.take().filter(|turn| Arc::ptr_eq(turn.semaphore(), &permits));
        let performing = async move {
            let turn = match turn {
                Some(turn) => turn,
                None => match permits.acquire_owned().await {
                    Ok(turn) => turn,
                    // The agent ends.
                    Err(_) => return Done::Late(app, None),
                },
            };
            failpoint::boundary(step.kind().as_str());
            if standstill::is_late(now, machine.now()) {
                tracing::info!(app = %app, step = step.kind().as_str(), "decided anew, as it comes late: {step}");
                return Done::Late(app, Some((Box::new(step), turn)));
            }
            let began = Instant::now();
            let result = machine.perform(&app, &step, &observed).await;
            failpoint::boundary(step.kind().as_str());
            Done::Stepped(app, Box::new(step), result, began.elapsed(), tracing::Span::current())
        };
        self.jobs.spawn(performing.instrument(span));
    }

    /// The next step for an app, if what was seen of it is good enough to decide.
    fn plan(&mut self, app: &AppName, now: Timestamp) -> Option<Step> {
        let state = self.apps.get_mut(app)?;
        if !state.is_plannable() || !self.proxy.seen || self.proxy.stale || self.rereading.is_some() {
            return None;
        }
        let around = Around {
            proxy: &self.proxy.observed,
            trouble: self.proxy.trouble.as_deref(),
            conflict: self.conflicts.get(app).cloned(),
            nested: self.nested.get(app),
        };
        let told = (self.outlets.metrics.as_ref(), &self.outlets.events);
        state.plan(self.options.planner, around, now, told)
    }

    /// Looks at an app, if that is due.
    fn look(&mut self, app: &AppName, now: Timestamp) {
        let Some(state) = self.apps.get_mut(app) else { return };
        if state.dirty && !state.observing && state.busy.is_none() && state.look_after <= now {
            state.dirty = false;
            state.observing = true;
            let wanted = state.wanted();
            let (machine, app) = (self.machine.clone(), app.clone());
            self.jobs.spawn(async move {
                let observed = machine.observe_app(&app, wanted.as_ref()).await;
                Done::Observed(app, observed)
            });
        }
    }

    fn wake_at(&self) -> Instant {
        let now = self.machine.now();
        let soon = |at: Timestamp| Instant::now() + at.since(now).max(Duration::from_millis(5));
        // Nothing is done for any app before everything was listed, and the store read.
        let able = self.listed && self.snapshot.is_some();
        let apps = self.apps.values().filter(|s| able && !s.observing && s.busy.is_none());
        let apps = apps.filter_map(|s| if s.dirty { Some(s.look_after) } else { s.wake }).min().map(soon);
        let relist = if self.listing { None } else { Some(self.relist_at) };
        let proxy = self.proxy.wake.filter(|_| able && !self.proxy.observing).map(soon);
        let can_plan = able && self.proxy.seen && !self.proxy.stale && self.rereading.is_none();
        let replan = (can_plan && self.apps.values().any(AppState::is_plannable)).then(Instant::now);
        let reread = self.rereading.map(|_| Instant::now() + standstill::REREAD_LOOK);
        [apps, relist, proxy, reread, replan]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or_else(|| Instant::now() + Duration::from_secs(60))
    }

    /// With `once`: whether nothing is left to do.
    fn is_over(&self) -> Option<Ended> {
        // Nothing is changed over a store that is not believed, so nothing is left to wait for but a person.
        let resting = self.apps.values().all(|s| s.is_planned() && !s.dirty && !s.replan && s.is_at_rest());
        if self.jobs.is_empty() && self.listed && self.store_block.is_some() && (self.snapshot.is_none() || resting) {
            return Some(Ended::Blocked);
        }
        let idle = self.jobs.is_empty() && self.listed && self.snapshot.is_some() && self.proxy.seen;
        let proxy = self.proxy.observed.is_serving_live() && self.snapshot.as_ref().is_some_and(|s| s.proven);
        if !idle || !resting || !proxy {
            return None;
        }
        let blocked =
            self.apps.values().any(AppState::is_blocked) || self.snapshot.iter().any(|s| !s.unreadable.is_empty());
        Some(if blocked { Ended::Blocked } else { Ended::Converged })
    }
}
