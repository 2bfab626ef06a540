//! One history: an operator, an agent that is killed now and then, and everything that goes wrong around them.

use std::{
    collections::BTreeMap,
    hash::Hasher as _,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use demae::{
    agent::{Agent, Options, Outlets, Planner},
    events::Events,
    metrics::{Metrics, View, Vitals},
    model::{
        desired::HostMode,
        name::{AppName, ContainerId, HostName},
        observed::{Instance, Phase},
        status::{AppStatus, HostStatus, State as Shown, StoreStatus, VERSION},
        time::Timestamp,
    },
    store::{Belief, Brake, Update, Viewer, keys::Prefix},
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{
    machine::Hands,
    scene::{Behaviour, Engine, Meant, Scene, State, VERSIONS, serving, version},
    store::{Data, Disk, RESYNC, Store},
};

/// What came of a history.
pub struct Outcome {
    pub violations: Vec<String>,
    pub log: Vec<String>,
    pub tally: BTreeMap<String, u64>,
    pub app_states: std::collections::BTreeSet<u64>,
    pub host_states: std::collections::BTreeSet<u64>,
    /// Stands for all that happened, in order.
    pub trace: u64,
}

/// How an app takes requests.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Socket,
    Port,
    Worker,
}

#[derive(Debug, Clone)]
struct App {
    name: AppName,
    kind: Kind,
    host: String,
    stop_first: bool,
    bad_template: bool,
}

struct Running {
    agent: JoinHandle<()>,
    watcher: JoinHandle<()>,
    token: CancellationToken,
    status: watch::Receiver<HostStatus>,
}

pub struct History {
    scene: Arc<Scene>,
    store: Arc<Store>,
    disk: Arc<Disk>,
    apps: Vec<App>,
    mode: &'static str,
    /// Whether the store is another one than people mean.
    disaster: bool,
    planner: Planner,
    running: Option<Running>,
    /// When the clock was last set ahead.
    set_ahead: Option<Instant>,
}

/// Plays a history of so many events.
pub fn play(seed: u64, events: usize, planner: Planner) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    runtime.expect("a runtime").block_on(async {
        let mut history = History::new(seed, planner);
        history.begin().await;
        for _ in 0..events {
            history.pause().await;
            history.something_happens().await;
            history.look().await;
            if !history.scene.state().violations.is_empty() {
                break;
            }
        }
        if history.scene.state().violations.is_empty() {
            history.ends_well().await;
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

/// What an agent tells after a minute in which nothing goes wrong.
pub fn first_minute(seed: u64, planner: Planner) -> Vec<AppStatus> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    runtime.expect("a runtime").block_on(async {
        let mut history = History::new(seed, planner);
        history.begin().await;
        tokio::time::sleep(Duration::from_secs(60)).await;
        let apps = history.running.as_ref().map(|r| r.status.borrow().apps.clone()).unwrap_or_default();
        history.crash().await;
        apps
    })
}

impl History {
    fn new(seed: u64, planner: Planner) -> Self {
        let scene = Scene::new(seed);
        let store = Arc::new(Store::new(scene.clone()));
        let chance = &scene.chance;
        let shared = chance.one_in(8);
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
            disaster: false,
            planner,
            running: None,
            set_ahead: None,
            store,
            scene,
        }
    }

    fn host() -> HostName {
        HostName::try_from("host1").expect("a name")
    }

    async fn begin(&mut self) {
        self.store.put("cluster", "c1");
        for app in self.apps.clone() {
            self.place(&app);
        }
        self.start();
        tokio::time::sleep(Duration::from_secs(30)).await;
        self.scene.note_belief();
    }

    async fn pause(&self) {
        let chance = &self.scene.chance;
        let most = *chance.pick(&[50, 2_000, 2_000, 20_000, 180_000]).expect("some");
        tokio::time::sleep(chance.millis(1, most)).await;
    }

    // ---- the agent ----

    fn start(&mut self) {
        let host = Self::host();
        let (news_out, news) = mpsc::unbounded_channel();
        let (updates, updates_in) = watch::channel(Update::default());
        let traces = {
            let mut state = self.scene.state();
            state.news = Some(news_out);
            state.updates = Some(updates_in.clone());
            state.believed = None;
            state.listeners.clear();
            state.apps.iter().filter(|(_, o)| has_traces(o)).map(|(a, _)| a.clone()).collect()
        };
        let viewer =
            Viewer { host: host.clone(), labels: BTreeMap::new(), resync: RESYNC, brake: Brake::default(), traces };
        let prefix = Prefix::new("/demae").expect("a prefix");
        let belief = Belief::new(prefix.clone(), viewer, self.disk.clone(), updates);
        let watcher = tokio::spawn(self.store.clone().watch(belief));
        let metrics = Arc::new(Metrics::new().expect("metrics"));
        let empty = HostStatus {
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
            vitals: watch::channel(Vitals::default()).0,
            status,
            publish: watch::channel((empty, BTreeMap::new())).0,
            pulse: watch::channel(Timestamp::default()).0,
            ready: watch::channel(false).0,
        };
        let hands = Arc::new(Hands::new(host, self.scene.clone()));
        let options = Options { resync: RESYNC, parallel: 8, once: false, planner: self.planner };
        let token = CancellationToken::new();
        let agent = Agent::new(hands, options, outlets, updates_in);
        let running = agent.run(news, token.clone());
        let agent = tokio::spawn(async move {
            running.await;
        });
        self.running = Some(Running { agent, watcher, token, status: shown });
    }

    /// As by `kill -9`: whatever was under way is cut where it was.
    async fn crash(&mut self) {
        let Some(running) = self.running.take() else { return };
        for task in [running.agent, running.watcher] {
            task.abort();
            let ended = task.await;
            if let Err(e) = ended
                && e.is_panic()
            {
                self.scene.state().violate(format!("a part of the agent panicked: {e}"));
            }
        }
    }

    async fn stop(&mut self) {
        if let Some(running) = &mut self.running {
            running.token.cancel();
            let ended = tokio::time::timeout(Duration::from_secs(10), &mut running.agent).await;
            if ended.is_err() {
                self.scene.state().violate("the agent does not end within 10 s of being told".into());
            }
        }
        if let Some(running) = self.running.take() {
            running.watcher.abort();
        }
    }

    /// What the agent tells must always say why something is not as it should be.
    async fn look(&mut self) {
        self.scene.note_belief();
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

    // ---- the operator ----

    fn meant(&self, app: &AppName) -> Option<Meant> {
        self.scene.state().meant.get(app).cloned()
    }

    fn mean(&self, app: &AppName, change: impl FnOnce(&mut Meant)) {
        let mut state = self.scene.state();
        let meant = state.meant.entry(app.clone()).or_insert(Meant {
            present: false,
            drained: false,
            absent_until: 0,
            version: 0,
            replicas: 1,
            special: false,
        });
        change(meant);
    }

    fn spec(app: &App, meant: &Meant) -> String {
        let way = match app.kind {
            Kind::Socket => "socket: /run/app/app.sock",
            Kind::Port => "port: 8080",
            Kind::Worker => "",
        };
        let template = if app.bad_template { ", template: broken" } else { "" };
        let ingress = match app.kind {
            Kind::Worker => String::new(),
            _ => format!("ingress: {{hosts: [{}], {way}, drain: 10s{template}}}\n", app.host),
        };
        let order = if app.stop_first { "stop-first" } else { "start-first" };
        format!(
            "image: app:v0\n{ingress}deploy: {{replicas_per_host: {}, update_config: {{order: {order}}}}}\n",
            meant.replicas
        )
    }

    /// Puts all keys of an app that is meant to be here.
    fn place(&self, app: &App) {
        // Both keys are written before the watch can tell of either.
        let revision = self.store.etcd().data.revision + 2;
        self.mean(&app.name, |m| {
            if !m.present {
                m.absent_until = revision;
            }
            m.present = true;
        });
        let meant = self.meant(&app.name).expect("it is meant");
        self.store.put(&format!("apps/{}/spec", app.name), &Self::spec(app, &meant));
        self.store.put(&format!("apps/{}/image", app.name), &format!("app:v{}", meant.version));
    }

    fn operator_acts(&mut self) {
        if !self.store.etcd().up {
            return;
        }
        let chance = &self.scene.chance;
        let at = chance.below(self.apps.len());
        let name = self.apps[at].name.clone();
        let present = self.meant(&name).is_some_and(|m| m.present);
        let act = chance.below(20);
        let what = match act {
            0..=8 if present => {
                let version = chance.below(VERSIONS);
                self.mean(&name, |m| m.version = version);
                self.store.put(&format!("apps/{name}/image"), &format!("app:v{version}"));
                format!("deploys v{version} ({:?})", self.scene.state().behaviours[version])
            }
            9 | 10 if present => {
                let replicas = 1 + chance.below(3);
                self.mean(&name, |m| m.replicas = replicas);
                self.place(&self.apps[at].clone());
                format!("wants {replicas} replicas")
            }
            11 if present => {
                self.store.delete(&format!("apps/{name}/spec"));
                if chance.one_in(2) {
                    self.store.delete(&format!("apps/{name}/image"));
                }
                self.mean(&name, |m| m.present = false);
                "removes it".into()
            }
            12 if present => {
                self.apps[at].stop_first ^= true;
                self.place(&self.apps[at].clone());
                "changes its order".into()
            }
            13 if present => {
                self.store.put(&format!("apps/{name}/spec"), "image: [");
                self.mean(&name, |m| m.special = true);
                "breaks its spec".into()
            }
            14 if present => {
                self.store.put(&format!("apps/{name}/paused"), "by hand");
                self.mean(&name, |m| m.special = true);
                "pauses it".into()
            }
            15 if present && self.apps[at].kind != Kind::Worker => {
                self.apps[at].bad_template ^= true;
                let bad = self.apps[at].bad_template;
                self.mean(&name, |m| m.special |= bad);
                self.place(&self.apps[at].clone());
                "changes its template".into()
            }
            16 if present => {
                self.store.put(&format!("apps/{name}/restart"), &format!("{}", chance.below(1_000)));
                "restarts it".into()
            }
            17 => {
                self.mode = *chance.pick(&["active", "active", "cordoned", "drained"]).expect("some");
                let drained = self.mode == "drained";
                for app in self.apps.clone() {
                    let revision = self.store.etcd().data.revision + 1;
                    self.mean(&app.name, |m| m.drain(drained, revision));
                }
                self.store.put("hosts/host1/mode", self.mode);
                format!("sets the mode {}", self.mode)
            }
            _ => {
                self.store.delete(&format!("apps/{name}/paused"));
                self.apps[at].bad_template = false;
                self.mean(&name, |m| m.special = false);
                self.place(&self.apps[at].clone());
                "puts it right".into()
            }
        };
        self.scene.happens("operator", || format!("{name}: {what}"));
    }

    // ---- what goes wrong ----

    async fn something_happens(&mut self) {
        let chance = self.scene.clone();
        match chance.chance.below(30) {
            0..=11 => self.operator_acts(),
            12..=14 => {
                self.let_clock_settle().await;
                self.scene.happens("crash", String::new);
                self.crash().await;
                if chance.chance.one_in(4) {
                    self.pause().await;
                }
                self.start();
            }
            15 => {
                self.let_clock_settle().await;
                self.scene.happens("told to end", String::new);
                self.stop().await;
                self.start();
            }
            16 => {
                let up = self.store.etcd().up;
                self.store.set_up(!up);
                self.scene.happens("etcd", || format!("up: {}", !up));
            }
            17 => self.disaster(),
            18 | 19 => self.engine_trouble(),
            20 | 21 => self.nginx_trouble(),
            22..=26 => self.mishap(),
            27 => {
                let full = !self.scene.state().disk_full;
                self.scene.state().disk_full = full;
                self.disk.full.store(full, Ordering::Relaxed);
                self.scene.happens("disk", || format!("full: {full}"));
            }
            28 => {
                let hours = i64::try_from(chance.chance.below(5)).expect("small") - 2;
                self.scene.set_clock(hours * 3_600_000);
                if hours > 0 {
                    self.set_ahead = Some(Instant::now());
                }
                self.scene.happens("clock", || format!("set by {hours} h"));
            }
            _ => self.reboot().await,
        }
    }

    /// An agent that is started anew right after the clock was set ahead takes what is under way for older than it is: a
    /// limit that is documented. Two minutes later nothing of it is left.
    async fn let_clock_settle(&mut self) {
        if let Some(at) = self.set_ahead.take() {
            tokio::time::sleep_until(at + Duration::from_secs(120)).await;
        }
    }

    fn disaster(&mut self) {
        let chance = &self.scene.chance;
        if self.disaster || !self.store.etcd().up {
            return;
        }
        let data = self.store.etcd().data.clone();
        let what = match chance.below(6) {
            0 | 1 => {
                self.store.etcd().backup = Some(data);
                "a backup is made"
            }
            2 => {
                self.store.replace(Data::new(data.etcd));
                "the store is wiped"
            }
            3 => {
                self.store.replace(Data::new(data.etcd + 1));
                "another etcd answers"
            }
            4 => {
                self.store.delete_all();
                "all keys are deleted"
            }
            _ => {
                let backup = self.store.etcd().backup.clone();
                let Some(backup) = backup.filter(|b| b.revision < data.revision) else { return };
                self.store.replace(backup);
                "a backup is restored"
            }
        };
        self.disaster |= what != "a backup is made";
        self.scene.happens("disaster", || what.into());
    }

    fn engine_trouble(&self) {
        let chance = &self.scene.chance;
        let engine = self.scene.state().engine;
        let what = match engine {
            Engine::Up if chance.one_in(3) => {
                let unreliable = *chance.pick(&[0, 3, 10]).expect("some");
                self.scene.state().unreliable = unreliable;
                format!("one call in {unreliable} fails")
            }
            Engine::Up => {
                self.scene.cut_events();
                let next = *chance.pick(&[Engine::Down, Engine::Hangs]).expect("some");
                self.scene.state().engine = next;
                // Without live-restore the containers go with it.
                if next == Engine::Down && chance.one_in(2) {
                    self.kill_containers();
                }
                format!("{next:?}")
            }
            _ => {
                self.scene.state().engine = Engine::Up;
                self.revive_settled();
                "Up".into()
            }
        };
        self.scene.happens("engine", || what);
    }

    fn nginx_trouble(&self) {
        let what = {
            let mut state = self.scene.state();
            let proxy = &mut state.proxy;
            match self.scene.chance.below(5) {
                0 => {
                    (proxy.runs, proxy.served) = (false, None);
                    proxy.old.clear();
                    "nginx is stopped"
                }
                1 => {
                    proxy.broken ^= true;
                    "somebody edits nginx's own files"
                }
                2 => {
                    proxy.deaf ^= true;
                    "reloads change nothing, or do again"
                }
                3 => {
                    proxy.drifted = proxy.live.is_some();
                    "somebody edits demae's files"
                }
                _ => {
                    proxy.runs = true;
                    "nginx is started"
                }
            }
        };
        if what == "nginx is started" && !self.scene.state().proxy.broken {
            self.scene.serve_live(false);
        }
        self.scene.happens("nginx", || what.into());
    }

    /// A person, or chance, does something to a container or a file.
    fn mishap(&self) {
        let chance = &self.scene.chance;
        let all: Vec<(AppName, ContainerId)> = {
            let state = self.scene.state();
            let of_app = |(app, o): (&AppName, &demae::model::observed::ObservedApp)| {
                o.instances.iter().map(|i| (app.clone(), i.id.clone())).collect::<Vec<_>>()
            };
            state.apps.iter().flat_map(of_app).collect()
        };
        let Some((app, id)) = chance.pick(&all).cloned() else { return };
        let settled =
            self.scene.state().apps.get(&app).is_some_and(|o| o.instances.iter().any(|i| i.id == id && i.settled));
        let kind = match chance.below(9) {
            // That a candidate ends or hangs is a verdict on its release, and rightly so.
            1 | 8 if !settled => 0,
            kind => kind,
        };
        let what = match kind {
            0 => {
                self.scene.die(&app, &id, None, 137);
                return;
            }
            1 => {
                self.scene.die(&app, &id, None, 1);
                return;
            }
            2 => {
                self.touch(&app, &id, |i| i.phase = Phase::Exited(137));
                "stopped by hand"
            }
            3 => {
                self.touch(&app, &id, |i| {
                    if i.is_running() {
                        i.phase = Phase::Paused;
                    }
                });
                "paused by hand"
            }
            4 => {
                let mut state = self.scene.state();
                if let Some(observed) = state.apps.get_mut(&app) {
                    observed.instances.retain(|i| i.id != id);
                }
                state.meddled.insert(app.clone(), Instant::now());
                state.programs.remove(&id);
                "removed by hand"
            }
            5 => {
                let mut state = self.scene.state();
                // No engine gives up an image that a living container has.
                let used = |image: &String| {
                    let mut all = state.apps.values().flat_map(|o| &o.instances);
                    all.any(|i| i.is_alive() && i.ordered.as_ref().is_some_and(|o| o.to_string() == *image))
                };
                let kept = state.images.iter().filter(|i| used(i)).cloned().collect();
                state.images = kept;
                "the images are pruned"
            }
            6 => {
                let mut state = self.scene.state();
                state.made += 1;
                let foreign = ContainerId::try_from(format!("{:064x}", state.made)).expect("an id");
                state.foreign.insert(foreign);
                "somebody runs a container of their own"
            }
            7 => {
                let mut state = self.scene.state();
                if let Some(observed) = state.apps.get_mut(&app) {
                    observed.env_files.clear();
                }
                "its env-files are deleted"
            }
            _ => {
                self.touch(&app, &id, |_| {});
                if let Some(program) = self.scene.state().programs.get_mut(&id) {
                    program.answers = false;
                }
                self.scene.health_tells(&app);
                "it hangs"
            }
        };
        self.scene.happens("mishap", || format!("{app}: {id} {what}"));
        self.scene.docker_tells(&app);
    }

    fn touch(&self, app: &AppName, id: &ContainerId, change: impl FnOnce(&mut Instance)) {
        let mut state = self.scene.state();
        let State { apps, programs, .. } = &mut *state;
        if let Some(instance) = apps.get_mut(app).and_then(|o| o.instances.iter_mut().find(|i| i.id == *id)) {
            change(instance);
            if let Some(program) = programs.get_mut(id) {
                program.changed = Instant::now();
                if !instance.is_running() {
                    program.answers = false;
                    program.life += 1;
                }
            }
        }
    }

    fn kill_containers(&self) {
        let mut state = self.scene.state();
        let State { apps, programs, .. } = &mut *state;
        for instance in apps.values_mut().flat_map(|o| &mut o.instances).filter(|i| i.is_alive()) {
            instance.stale_socket = instance.address.is_some();
            instance.phase = Phase::Exited(137);
            if let Some(program) = programs.get_mut(&instance.id) {
                (program.answers, program.changed) = (false, Instant::now());
                program.life += 1;
            }
        }
    }

    /// An engine that comes up starts what it is to keep running.
    fn revive_settled(&self) {
        let now = self.scene.now();
        let mut revived = Vec::new();
        {
            let mut state = self.scene.state();
            for (app, observed) in &mut state.apps {
                for i in observed.instances.iter_mut().filter(|i| i.settled && matches!(i.phase, Phase::Exited(137))) {
                    (i.phase, i.started, i.stale_socket) = (Phase::Running, now, false);
                    revived.push((app.clone(), i.id.clone()));
                }
            }
        }
        for (app, id) in revived {
            self.scene.begin_life(&app, &id);
        }
    }

    async fn reboot(&mut self) {
        self.let_clock_settle().await;
        self.scene.happens("reboot", String::new);
        self.crash().await;
        self.kill_containers();
        {
            let mut state = self.scene.state();
            for observed in state.apps.values_mut() {
                observed.env_files.clear();
            }
            state.engine = Engine::Up;
            state.proxy.old.clear();
            state.proxy.runs = !state.proxy.broken;
            state.proxy.served = None;
        }
        if self.scene.state().proxy.runs {
            self.scene.serve_live(false);
        }
        self.revive_settled();
        self.start();
    }

    // ---- the end ----

    /// Everything is put right. Then it must come to what was meant, and stay there.
    async fn ends_well(&mut self) {
        self.scene.happens("the faults end", String::new);
        {
            let mut state = self.scene.state();
            (state.engine, state.unreliable, state.disk_full) = (Engine::Up, 0, false);
            (state.proxy.broken, state.proxy.deaf) = (false, false);
        }
        self.disk.full.store(false, Ordering::Relaxed);
        self.revive_settled();
        if !self.scene.state().proxy.runs {
            self.scene.state().proxy.runs = true;
            self.scene.serve_live(false);
        }
        self.store.set_up(true);
        if self.running.as_ref().is_none_or(|r| r.agent.is_finished()) {
            self.start();
        }
        if self.disaster {
            self.store.put("cluster", "c1");
        }
        for app in self.apps.clone() {
            let meant = self.meant(&app.name).expect("all are meant");
            self.store.delete(&format!("apps/{}/paused", app.name));
            if meant.present && !meant.special {
                self.place(&app);
            } else if !meant.present {
                self.store.delete(&format!("apps/{}/spec", app.name));
            } else {
                // Nobody says how it ends with these; they go.
                self.store.delete(&format!("apps/{}/spec", app.name));
                self.mean(&app.name, |m| m.present = false);
            }
        }
        self.store.put("hosts/host1/mode", "active");
        for app in self.apps.clone() {
            let revision = self.store.etcd().data.revision;
            self.mean(&app.name, |m| m.drain(false, revision));
        }
        self.scene.accepted.store(true, Ordering::Relaxed);
        let gone = self.apps.iter().filter(|a| self.meant(&a.name).is_none_or(|m| !m.present)).count();
        // What nobody doubts needs nobody's word.
        if self.disaster || gone > Brake::default().apps {
            let accept = self.store.accept(self.apps.iter().map(|a| a.name.clone()));
            *self.disk.accepted.lock().expect("one thread") = Some(accept);
        }
        let mut wrong = Vec::new();
        for _ in 0..90 {
            tokio::time::sleep(Duration::from_secs(60)).await;
            self.look().await;
            if !self.scene.state().violations.is_empty() {
                return;
            }
            wrong = self.not_as_meant();
            if wrong.is_empty() {
                break;
            }
        }
        if !wrong.is_empty() {
            let status = self.running.as_ref().map(|r| r.status.borrow().clone());
            let mut state = self.scene.state();
            state.violate(format!("90 minutes after the last fault: {wrong:?}"));
            for status in status.iter() {
                let told = format!("status: store {:?} nginx {:?}", status.store, status.proxy);
                state.log.push(told);
                let apps = status.apps.iter().map(|a| format!("status: {} {:?}: {}", a.app, a.state, a.reason));
                state.log.extend(apps);
            }
            return;
        }
        // At rest means at rest.
        let at_rest: Vec<AppName> = self.apps.iter().filter(|a| self.rests(&a.name)).map(|a| a.name.clone()).collect();
        let effects = |history: &Self| history.scene.state().effects.clone();
        let before = effects(self);
        tokio::time::sleep(Duration::from_secs(600)).await;
        let after = effects(self);
        for app in at_rest.iter().filter(|a| before.get(*a) != after.get(*a)) {
            self.scene.state().violate(format!("{app} was as meant, and something was done to it all the same"));
        }
    }

    /// Whether a version that works is wanted, or nothing.
    fn rests(&self, app: &AppName) -> bool {
        let Some(meant) = self.meant(app) else { return true };
        let works = matches!(self.scene.state().behaviours[meant.version], Behaviour::Works | Behaviour::Slow);
        let shared = self.apps.iter().any(|a| a.name == *app && a.host == "shared.test");
        !meant.present || works && !shared
    }

    /// Of an app whose last version fails, the one before must serve.
    fn not_served(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        for app in self.apps.iter().filter(|a| !self.rests(&a.name) && a.host != "shared.test") {
            let state = self.scene.state();
            let Some(observed) = state.apps.get(&app.name) else { continue };
            let settled =
                observed.instances.iter().filter(|i| i.settled && observed.proven.as_ref() == Some(&i.key.release));
            let fine = |i: &&Instance| {
                // One that hangs, of a release that is not wanted any more, cannot be made anew.
                let answers = app.kind == Kind::Worker || state.programs.get(&i.id).is_some_and(|p| p.answers);
                answers && matches!(state.behaviours[version(i)], Behaviour::Works | Behaviour::Slow)
            };
            let good = settled.filter(fine).count();
            let serves = match app.kind {
                Kind::Worker => observed.instances.iter().filter(|i| i.settled && i.is_running()).count(),
                _ => serving(&state, &app.name),
            };
            if good > 0 && serves == 0 {
                wrong
                    .push(format!("{}: {good} instances of a version that works are there, and none serves", app.name));
            }
        }
        wrong
    }

    fn not_as_meant(&self) -> Vec<String> {
        let mut wrong = self.not_served();
        for app in self.apps.iter().filter(|a| self.rests(&a.name)) {
            let meant = self.meant(&app.name).expect("all are meant");
            let state = self.scene.state();
            let observed = state.apps.get(&app.name).cloned().unwrap_or_default();
            let name = &app.name;
            let mut say = |what: String| wrong.push(format!("{name}: {what}"));
            if !meant.present {
                if has_traces(&observed) || !observed.instances.is_empty() {
                    say(format!("it was removed, and has left {observed:?}"));
                }
                let live = state.proxy.served.as_ref().is_some_and(|m| m.vhosts.contains_key(name));
                if live {
                    say("it was removed, and nginx serves it".into());
                }
                continue;
            }
            let image = format!("app:v{}", meant.version);
            let right = |i: &Instance| {
                i.is_running() && i.settled && i.ordered.as_ref().is_some_and(|o| o.to_string() == image)
            };
            if observed.instances.len() != meant.replicas || !observed.instances.iter().all(right) {
                let found: Vec<_> =
                    observed.instances.iter().map(|i| (i.ordered.clone(), i.phase.clone(), i.settled)).collect();
                say(format!("{} instances of {image} are meant, and there are {found:?}", meant.replicas));
            } else if app.kind != Kind::Worker && serving(&state, name) != meant.replicas {
                say(format!("{} instances serve, of {}", serving(&state, name), meant.replicas));
            }
            let sockets = if app.kind == Kind::Socket { meant.replicas } else { 0 };
            if observed.env_files.len() != 1
                || observed.socket_dirs.len() != sockets
                || !observed.verdicts.is_empty()
                || observed.proven.is_none()
            {
                let left = (&observed.env_files, &observed.socket_dirs, observed.verdicts.len(), &observed.proven);
                say(format!("its files are not what it needs: {left:?}"));
            }
        }
        wrong
    }
}

fn has_traces(o: &demae::model::observed::ObservedApp) -> bool {
    !o.slots.is_empty()
        || !o.env_files.is_empty()
        || !o.socket_dirs.is_empty()
        || o.proven.is_some()
        || !o.verdicts.is_empty()
        || !o.instances.is_empty()
}
