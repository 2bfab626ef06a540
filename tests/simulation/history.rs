//! One history: an operator, an agent that is killed now and then, and faults around them.

use std::{
    collections::BTreeMap,
    future::poll_fn,
    hash::Hasher as _,
    pin::pin,
    sync::{Arc, atomic::Ordering},
    task::ready,
    time::Duration,
};

use demae::{
    agent::{Agent, Options, Outlets, Planner, ProxyPlanner},
    events::Events,
    metrics::{HostGauges, Metrics, View},
    model::{
        desired::HostMode,
        name::{AppName, HostName},
        status::{AppStatus, HostStatus, State as Shown, StoreStatus, VERSION},
    },
    plan::{app::plan_app, proxy::plan_proxy},
    store::{self, Brake, DesiredCache, SharedFence, StateStore as _, Update, Viewer, keys::Prefix},
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{
    ending::has_traces,
    machine::SimMachine,
    scene::Scene,
    store::{Disk, Members, RESYNC, Store},
};

/// The result of a history.
pub struct Outcome {
    pub violations: Vec<String>,
    pub log: Vec<String>,
    pub tally: BTreeMap<String, u64>,
    pub app_states: std::collections::BTreeSet<u64>,
    pub host_states: std::collections::BTreeSet<u64>,
    /// A hash of all events, in order.
    pub trace: u64,
}

/// How an app receives requests.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    Socket,
    Port,
    Worker,
}

#[derive(Debug, Clone)]
pub struct App {
    pub(super) name: AppName,
    pub(super) kind: Kind,
    pub(super) host: String,
    pub(super) stop_first: bool,
    pub(super) bad_template: bool,
}

pub struct Running {
    pub(super) agent: JoinHandle<()>,
    pub(super) watcher: JoinHandle<()>,
    pub(super) publisher: JoinHandle<()>,
    pub(super) token: CancellationToken,
    pub(super) status: watch::Receiver<HostStatus>,
}

/// The planners of an agent: demae's own, or mutants.
#[derive(Clone, Copy)]
pub struct Planners {
    pub app: Planner,
    pub proxy: ProxyPlanner,
}

impl Planners {
    pub const REAL: Self = Self { app: plan_app, proxy: plan_proxy };
}

pub struct History {
    pub(super) scene: Arc<Scene>,
    pub(super) store: Arc<Store>,
    pub(super) disk: Arc<Disk>,
    pub(super) apps: Vec<App>,
    pub(super) mode: &'static str,
    /// True if `demae init` was run.
    pub(super) initialised: bool,
    /// True while the store is not the intended one.
    pub(super) wrecked: bool,
    /// True if it ever was.
    pub(super) disaster: bool,
    pub(super) planners: Planners,
    pub(super) running: Option<Running>,
    /// When the clock was last set forward.
    pub(super) set_ahead: Option<Instant>,
}

/// Plays a history of so many events.
pub fn play(seed: u64, events: usize, planners: Planners) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    runtime.expect("a runtime").block_on(async {
        let mut history = History::new(seed, planners);
        history.begin().await;
        for _ in 0..events {
            history.pause().await;
            history.random_event().await;
            history.check_status().await;
            if !history.scene.state().violations.is_empty() {
                break;
            }
        }
        if history.scene.state().violations.is_empty() {
            history.assert_ends_well().await;
        }
        history.crash().await;
        let mut state = history.scene.state();
        Outcome {
            violations: std::mem::take(&mut state.violations),
            log: std::mem::take(&mut state.log),
            tally: std::mem::take(&mut state.tally),
            app_states: std::mem::take(&mut state.app_states),
            host_states: std::mem::take(&mut state.host_states),
            trace: state.trace.finish(),
        }
    })
}

/// The statuses of an agent after a minute without faults.
pub fn first_minute(seed: u64, planners: Planners) -> Vec<AppStatus> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    runtime.expect("a runtime").block_on(async {
        let mut history = History::new(seed, planners);
        history.begin().await;
        tokio::time::sleep(Duration::from_secs(60)).await;
        let apps = history.running.as_ref().map(|r| r.status.borrow().apps.clone()).unwrap_or_default();
        history.crash().await;
        apps
    })
}

/// Polls a part of the agent, except while the agent is stalled.
async fn run_unless_stalled<T>(scene: Arc<Scene>, part: impl Future<Output = T>) -> T {
    let mut part = pin!(part);
    let mut nap = None;
    poll_fn(move |context| {
        while let Some(until) = scene.state().stalled_until.filter(|until| *until > Instant::now()) {
            let nap = nap.insert(Box::pin(tokio::time::sleep_until(until)));
            ready!(nap.as_mut().poll(context));
        }
        let polled = part.as_mut().poll(context);
        scene.note_snapshot();
        polled
    })
    .await
}

impl History {
    fn new(seed: u64, planners: Planners) -> Self {
        let scene = Scene::new(seed);
        let store = Arc::new(Store::new(scene.clone()));
        let chance = &scene.chance;
        let shared = chance.one_in(8);
        let initialised = !chance.one_in(4);
        let apps = (0..1 + chance.below(6))
            .map(|n| App {
                name: AppName::try_from(format!("app{n}")).expect("a name"),
                kind: *chance.pick(&[Kind::Socket, Kind::Socket, Kind::Port, Kind::Worker]).expect("some"),
                host: if shared && n < 2 { "shared.test".into() } else { format!("app{n}.test") },
                stop_first: chance.one_in(8),
                bad_template: false,
            })
            .collect();
        Self {
            disk: Arc::default(),
            apps,
            mode: "active",
            initialised,
            wrecked: false,
            disaster: false,
            planners,
            running: None,
            set_ahead: None,
            store,
            scene,
        }
    }

    pub(super) fn host() -> HostName {
        HostName::try_from("host1").expect("a name")
    }

    pub(super) fn give_identity(&self) {
        if self.initialised {
            self.store.put("cluster", "c1");
        }
    }

    async fn begin(&mut self) {
        self.give_identity();
        for app in self.apps.clone() {
            self.place(&app);
        }
        self.start();
        tokio::time::sleep(Duration::from_secs(30)).await;
        self.scene.note_snapshot();
    }

    pub(super) async fn pause(&self) {
        let chance = &self.scene.chance;
        let most = *chance.pick(&[50, 2_000, 2_000, 20_000, 180_000]).expect("some");
        tokio::time::sleep(chance.millis(1, most)).await;
    }

    pub(super) fn start(&mut self) {
        let host = Self::host();
        let (news_out, news) = mpsc::unbounded_channel();
        let (updates, updates_in) = watch::channel(Update::default());
        let traces = {
            let mut state = self.scene.state();
            state.news = Some(news_out);
            state.stalled_until = None;
            state.updates = Some(updates_in.clone());
            state.snapshot = None;
            state.listeners.clear();
            state.apps.iter().filter(|(_, o)| has_traces(o)).map(|(a, _)| a.clone()).collect()
        };
        let viewer =
            Viewer { host: host.clone(), labels: BTreeMap::new(), resync: RESYNC, brake: Brake::default(), traces };
        let prefix = Prefix::new("/demae").expect("a prefix");
        let fence = Arc::new(SharedFence::default());
        let cache = DesiredCache::new(prefix.clone(), viewer, self.disk.clone(), fence.clone(), updates);
        let token = CancellationToken::new();
        let watcher = store::watch(Members(self.store.clone()), cache, token.clone());
        let publisher = self.store.clone().write_fences(fence, updates_in.clone());
        let publisher = tokio::spawn(run_unless_stalled(self.scene.clone(), publisher));
        let watcher = tokio::spawn(run_unless_stalled(self.scene.clone(), watcher));
        let metrics = Arc::new(Metrics::new().expect("metrics"));
        let empty = HostStatus {
            tcp_routes: None,
            version: VERSION,
            host: host.clone(),
            mode: HostMode::Active,
            agent: String::new(),
            store: StoreStatus::default(),
            proxy: None,
            apps: Vec::new(),
            unreadable: Vec::new(),
        };
        let (status, shown) = watch::channel(empty.clone());
        let outlets = Outlets {
            events: Events::new(host.clone(), metrics.clone()),
            metrics,
            view: watch::channel(Arc::new(View::new(host.clone(), prefix.as_str().to_owned()))).0,
            host_gauges: watch::channel(HostGauges::default()).0,
            status,
            publish: watch::channel((empty, BTreeMap::new())).0,
            pulse: watch::channel(tokio::time::Instant::now()).0,
            ready: watch::channel(false).0,
            resync_requested: self.store.resync_requested.clone(),
            publishing: Arc::default(),
        };
        let machine = Arc::new(SimMachine::new(host, self.scene.clone()));
        let (delete_grace, planners) = (Duration::from_secs(3), self.planners);
        let options = Options {
            resync: RESYNC,
            parallel: 8,
            delete_grace,
            once: false,
            planner: planners.app,
            proxy_planner: planners.proxy,
        };
        let agent = Agent::new(machine, options, outlets, updates_in);
        let running = agent.run(news, token.clone());
        let agent = tokio::spawn(run_unless_stalled(self.scene.clone(), async move {
            running.await;
        }));
        self.running = Some(Running { agent, watcher, publisher, token, status: shown });
    }

    /// As by `kill -9`: work in flight is cut off.
    pub(super) async fn crash(&mut self) {
        let Some(running) = self.running.take() else { return };
        for task in [running.agent, running.watcher, running.publisher] {
            task.abort();
            let ended = task.await;
            if let Err(e) = ended
                && e.is_panic()
            {
                self.scene.state().violate(format!("a part of the agent panicked: {e}"));
            }
        }
    }

    pub(super) async fn stop(&mut self) {
        // A stalled agent could not receive the signal.
        self.wait_out_stall().await;
        if let Some(running) = &mut self.running {
            running.token.cancel();
            let ended = tokio::time::timeout(Duration::from_secs(10), &mut running.agent).await;
            if ended.is_err() {
                self.scene.state().violate("the agent does not end within 10 s of SIGTERM".into());
            }
        }
        if let Some(running) = self.running.take() {
            running.watcher.abort();
            running.publisher.abort();
        }
    }

    /// The status must always give a reason while an app has not converged.
    pub(super) async fn check_status(&mut self) {
        self.scene.note_snapshot();
        if self.disk.acceptance().is_none() {
            self.scene.state().accepted_removals.clear();
        }
        let Some(running) = &self.running else { return };
        let ended = running.agent.is_finished();
        let status = running.status.borrow().clone();
        let mut state = self.scene.state();
        if ended {
            state.violate("the agent ended by itself".into());
        }
        for app in &status.apps {
            let silent = app.state != Shown::Converged && app.reason.is_empty();
            if silent || app.reason.contains("the plan was refused") {
                state.violate(format!("{} is {:?}: `{}`", app.app, app.state, app.reason));
            }
        }
    }

    async fn random_event(&mut self) {
        if self.scene.policies.one_in(30) {
            self.other_policy();
        }
        let chance = self.scene.clone();
        match chance.chance.below(31) {
            0..=11 => self.operator_acts(),
            12..=14 => {
                self.let_clock_settle().await;
                self.scene.record("crash", String::new);
                self.crash().await;
                if chance.chance.one_in(4) {
                    self.pause().await;
                }
                self.start();
            }
            15 => {
                self.let_clock_settle().await;
                self.scene.record("terminated", String::new);
                self.stop().await;
                self.start();
            }
            16 => {
                let up = self.store.etcd().up;
                self.store.set_up(!up);
                self.scene.record("etcd", || format!("up: {}", !up));
            }
            17 if self.wrecked => self.repair_store(),
            17 => self.disaster(),
            18 | 19 => self.engine_trouble(),
            20 | 21 => self.nginx_trouble(),
            22..=26 => self.mishap(),
            27 => {
                let full = !self.scene.state().disk_full;
                self.scene.state().disk_full = full;
                self.disk.full.store(full, Ordering::Relaxed);
                self.scene.record("disk", || format!("full: {full}"));
            }
            28 => {
                let hours = i64::try_from(chance.chance.below(5)).expect("small") - 2;
                self.scene.set_clock(hours * 3_600_000);
                if hours > 0 {
                    self.set_ahead = Some(Instant::now());
                }
                self.scene.record("clock", || format!("set by {hours} h"));
            }
            29 => {
                let still = chance.chance.millis(1_000, 300_000);
                let until = Instant::now() + still;
                self.scene.state().stalled_until = Some(until);
                if still > Duration::from_secs(16) {
                    self.scene.state().resumed = until;
                }
                self.scene.record("standstill", || format!("the agent is stalled for {still:?}"));
            }
            _ => self.reboot().await,
        }
    }

    /// Waits until the agent is not stalled.
    pub(super) async fn wait_out_stall(&self) {
        let still = self.scene.state().stalled_until;
        if let Some(until) = still {
            tokio::time::sleep_until(until).await;
        }
    }

    /// An agent that is restarted right after the clock was set forward treats work in flight as older than itself: a
    /// documented limit. Two minutes later nothing of it is left.
    pub(super) async fn let_clock_settle(&mut self) {
        if let Some(at) = self.set_ahead.take() {
            tokio::time::sleep_until(at + Duration::from_secs(120)).await;
        }
    }
}
