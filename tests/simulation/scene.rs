//! The host of a history: what its containers, files and nginx really are, whatever the agent believes.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use demae::{
    host::docker::DockerError,
    model::{
        desired::{DesiredApp, Snapshot},
        name::{AppName, ContainerId},
        observed::{Address, Instance, InstanceKey, ObservedApp, Phase},
        proxy::{Manifest, Upstreams, Vhost},
        spec::{Order, Probe, SETTLE},
        time::Timestamp,
    },
    store::Update,
};
use tokio::{
    sync::{mpsc::UnboundedSender, watch},
    time::Instant,
};

use crate::chance::Chance;

/// How the program of a version behaves once started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behaviour {
    Works,
    Slow,
    NeverHealthy,
    Exits,
    /// It is healthy for a while, and then ends.
    Crashes,
    /// It is healthy, and does not answer through nginx.
    Lies,
    /// Its image is nowhere.
    Missing,
}

/// The program in a container.
#[derive(Debug, Clone)]
pub struct Program {
    pub answers: bool,
    /// When that last changed, or its container did.
    pub changed: Instant,
    /// Counts the starts, so that an old life does not end a new one.
    pub life: u64,
    /// When requests stopped being sent to it.
    pub left: Option<Instant>,
    /// How long its last requests take.
    pub lingers: Duration,
    pub settled_by: Option<Instant>,
}

/// What people mean with an app.
#[derive(Debug, Clone)]
pub struct Meant {
    /// Whether it belongs here.
    pub present: bool,
    /// Whether the whole host is to be empty.
    pub drained: bool,
    /// The revision of the store up to which it did not; the highest one of all stores.
    pub absent_until: i64,
    pub version: usize,
    pub replicas: usize,
    /// Whether a person has to act before it converges: it is paused, broken, or shares a virtual host.
    pub special: bool,
}

impl Meant {
    pub fn drain(&mut self, drained: bool, revision: i64) {
        if self.drained && !drained {
            self.absent_until = self.absent_until.max(revision);
        }
        self.drained = drained;
    }
}

/// nginx, and the sets on its disk.
#[derive(Debug, Default)]
pub struct Proxy {
    /// The set on disk.
    pub live: Option<Manifest>,
    /// When an app's part of it last changed.
    pub written: BTreeMap<AppName, Instant>,
    pub published: Timestamp,
    pub runs: bool,
    /// Somebody else's file makes `nginx -t` fail.
    pub broken: bool,
    /// Reloads are accepted and change nothing.
    pub deaf: bool,
    pub drifted: bool,
    /// The set that workers answer with.
    pub served: Option<Manifest>,
    /// Since when, by the wall clock.
    pub since: Timestamp,
    /// Sets that older workers still know, and until when.
    pub old: Vec<(Manifest, Instant)>,
}

/// Whether Docker answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    Up,
    Down,
    Hangs,
}

pub struct State {
    pub apps: BTreeMap<AppName, ObservedApp>,
    pub programs: BTreeMap<ContainerId, Program>,
    pub behaviours: [Behaviour; VERSIONS],
    pub images: BTreeSet<String>,
    pub proxy: Proxy,
    pub engine: Engine,
    /// One in so many calls fails, or its answer is lost; 0 for none.
    pub unreliable: usize,
    pub disk_full: bool,
    /// Until when the agent gets no time to run. What it asked for before goes on.
    pub still_until: Option<Instant>,
    /// When it last got time to run again, after so long that it must notice.
    pub woke: Instant,
    /// When the last step for an app was begun.
    pub begun: BTreeMap<AppName, Instant>,
    /// When the agent last looked at an app.
    pub looked: BTreeMap<AppName, Instant>,
    pub looked_at_proxy: Instant,
    /// When the making of the set that is live was begun: it was right then, and may be served much later.
    pub changing_since: Instant,
    /// Apps that were to leave when that was begun. A later agent may finish it, whatever it knows itself.
    pub leaving: BTreeSet<AppName>,
    pub believed: Option<Arc<Snapshot>>,
    /// When what is believed of an app last changed.
    pub believed_changed: BTreeMap<AppName, Instant>,
    pub news: Option<UnboundedSender<AppName>>,
    pub listeners: Vec<UnboundedSender<Result<AppName, DockerError>>>,
    pub made: u64,
    pub updates: Option<watch::Receiver<Update>>,
    /// What people mean, whatever becomes of the store.
    pub meant: BTreeMap<AppName, Meant>,
    /// When somebody last removed a container of an app.
    pub meddled: BTreeMap<AppName, Instant>,
    /// When an instance of an app last died. It may have been removed since.
    pub died: BTreeMap<AppName, Instant>,
    /// Apps that a person let leave, until an agent has made use of that.
    pub consented: BTreeSet<AppName>,
    /// Those that an agent has let go by that.
    pub let_go: BTreeSet<AppName>,
    /// The newest revision that was believed, by any agent.
    pub newest: i64,
    /// Containers of others.
    pub foreign: BTreeSet<ContainerId>,
    pub tally: BTreeMap<String, u64>,
    pub app_states: BTreeSet<u64>,
    pub host_states: BTreeSet<u64>,
    pub log: Vec<String>,
    pub trace: DefaultHasher,
    pub violations: Vec<String>,
    /// Effects on each app, to see that the agent comes to rest.
    pub effects: BTreeMap<AppName, u64>,
}

pub const VERSIONS: usize = 5;

impl State {
    /// Something that must never be.
    pub fn violate(&mut self, what: String) {
        self.log.push(format!("          !!! {what}"));
        self.violations.push(what);
    }
}

pub struct Scene {
    pub chance: Chance,
    pub began: Instant,
    skew: AtomicI64,
    /// Whether a person took the store as it is.
    pub accepted: AtomicBool,
    /// Held by whoever publishes to nginx.
    pub templates: tokio::sync::Mutex<()>,
    state: Mutex<State>,
}

impl Scene {
    pub fn new(seed: u64) -> Arc<Self> {
        let chance = Chance::new(seed);
        let some = [
            Behaviour::Works,
            Behaviour::Works,
            Behaviour::Slow,
            Behaviour::NeverHealthy,
            Behaviour::Exits,
            Behaviour::Crashes,
            Behaviour::Lies,
            Behaviour::Missing,
        ];
        let mut behaviours = [Behaviour::Works; VERSIONS];
        // The first version works, so that there is something to lose.
        for behaviour in behaviours.iter_mut().skip(1) {
            *behaviour = *chance.pick(&some).expect("some");
        }
        let now = Instant::now();
        let state = State {
            apps: BTreeMap::new(),
            programs: BTreeMap::new(),
            behaviours,
            images: BTreeSet::new(),
            proxy: Proxy { runs: true, ..Proxy::default() },
            engine: Engine::Up,
            unreliable: 0,
            disk_full: false,
            still_until: None,
            woke: now,
            begun: BTreeMap::new(),
            looked: BTreeMap::new(),
            looked_at_proxy: now,
            changing_since: now,
            leaving: BTreeSet::new(),
            believed: None,
            believed_changed: BTreeMap::new(),
            news: None,
            listeners: Vec::new(),
            made: 0,
            updates: None,
            meant: BTreeMap::new(),
            meddled: BTreeMap::new(),
            died: BTreeMap::new(),
            consented: BTreeSet::new(),
            let_go: BTreeSet::new(),
            newest: 0,
            foreign: BTreeSet::new(),
            tally: BTreeMap::new(),
            app_states: BTreeSet::new(),
            host_states: BTreeSet::new(),
            log: Vec::new(),
            trace: DefaultHasher::new(),
            violations: Vec::new(),
            effects: BTreeMap::new(),
        };
        Arc::new(Self {
            chance,
            began: now,
            skew: AtomicI64::new(0),
            accepted: AtomicBool::new(false),
            templates: tokio::sync::Mutex::default(),
            state: Mutex::new(state),
        })
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("one thread")
    }

    /// What the wall clock of this host says.
    pub fn now(&self) -> Timestamp {
        let passed = i64::try_from(self.began.elapsed().as_millis()).expect("not that long");
        Timestamp::from_millis(1_800_000_000_000 + passed + self.skew.load(Ordering::Relaxed))
    }

    /// Somebody sets the clock.
    pub fn set_clock(&self, by: i64) {
        self.skew.fetch_add(by, Ordering::Relaxed);
    }

    /// Something happens: counted, and told if the history goes wrong.
    pub fn happens(&self, kind: &str, what: impl FnOnce() -> String) {
        let at = self.began.elapsed();
        let mut state = self.state();
        *state.tally.entry(kind.to_owned()).or_default() += 1;
        // Ids of containers are long, and count up here.
        let line = format!("{:>9.3} {kind}: {}", at.as_secs_f64(), what()).replace(&"0".repeat(56), "");
        line.hash(&mut state.trace);
        state.log.push(line);
        if state.log.len() > 4_000 {
            state.log.drain(..2_000);
        }
        self.note_state(&mut state);
    }

    /// Keeps what the host looks like now, for the count of distinct states.
    fn note_state(&self, state: &mut State) {
        let mut whole = DefaultHasher::new();
        let mut seen = Vec::new();
        for (app, observed) in &state.apps {
            let mut one = DefaultHasher::new();
            let believed = state.believed.as_ref().and_then(|s| s.apps.get(app));
            let wanted = believed.and_then(DesiredApp::target).map(|t| t.release.id.clone());
            believed.map(std::mem::discriminant).hash(&mut one);
            for i in &observed.instances {
                let program = state.programs.get(&i.id);
                (wanted.as_ref() == Some(&i.key.release), observed.proven.as_ref() == Some(&i.key.release))
                    .hash(&mut one);
                (i.key.number, i.settled, i.stale_socket, is_routed(&state.proxy, app, observed, i)).hash(&mut one);
                (std::mem::discriminant(&i.phase), program.is_some_and(|p| p.answers)).hash(&mut one);
            }
            (observed.slots.len(), observed.env_files.len(), observed.socket_dirs.len()).hash(&mut one);
            (observed.proven.is_some(), observed.verdicts.len()).hash(&mut one);
            let vhost = |m: &Option<Manifest>| m.as_ref().and_then(|m| m.vhosts.get(app)).map(|v| v.upstreams.clone());
            format!(
                "{:?}",
                (vhost(&state.proxy.live).is_some(), vhost(&state.proxy.live) == vhost(&state.proxy.served))
            )
            .hash(&mut one);
            let hash = one.finish();
            hash.hash(&mut whole);
            seen.push(hash);
        }
        let proxy = &state.proxy;
        (proxy.runs, proxy.broken, proxy.deaf, proxy.drifted, proxy.old.len()).hash(&mut whole);
        (state.engine == Engine::Up, state.engine == Engine::Down, state.disk_full).hash(&mut whole);
        state.app_states.extend(seen);
        state.host_states.insert(whole.finish());
    }

    /// Docker tells that something happened to a container, now and then to nobody.
    pub fn docker_tells(&self, app: &AppName) {
        let mut state = self.state();
        if state.engine != Engine::Up || state.unreliable > 0 && self.chance.one_in(4) {
            return;
        }
        state.listeners.retain(|l| l.send(Ok(app.clone())).is_ok());
    }

    /// The agent's own questions to an instance have another answer.
    pub fn health_tells(&self, app: &AppName) {
        if let Some(news) = &self.state().news {
            let _ = news.send(app.clone());
        }
    }

    pub fn cut_events(&self) {
        for listener in self.state().listeners.drain(..) {
            let _ = listener.send(Err(unreachable()));
        }
    }
}

pub fn unreachable() -> DockerError {
    DockerError::Unreachable { operation: demae::host::docker::Operation::List, reason: "connection refused".into() }
}

/// The version that an instance is of.
pub fn version(instance: &Instance) -> usize {
    let image = instance.ordered.as_ref().map(ToString::to_string).unwrap_or_default();
    image.rsplit('v').next().and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// Whether a set of virtual hosts, or a symlink, leads to an instance.
pub fn is_routed(proxy: &Proxy, app: &AppName, observed: &ObservedApp, instance: &Instance) -> bool {
    match &instance.address {
        Some(Address::Socket(_)) => observed.slots.values().flatten().any(|k| *k == instance.key),
        Some(Address::Port(port)) => {
            let knows = |m: &Manifest| matches!(m.vhosts.get(app).map(|v| &v.upstreams), Some(Upstreams::Ports(p)) if p.contains(port));
            proxy.served.as_ref().is_some_and(knows) || proxy.live.as_ref().is_some_and(knows)
        }
        None => false,
    }
}

/// Whether an instance answers requests now.
fn answers(state: &State, instance: &Instance) -> bool {
    instance.phase == Phase::Running && state.programs.get(&instance.id).is_some_and(|p| p.answers)
}

/// Healthy instances that requests reach.
pub fn serving(state: &State, app: &AppName) -> usize {
    let Some(observed) = state.apps.get(app) else { return 0 };
    let fine = |i: &&Instance| answers(state, i) && is_routed(&state.proxy, app, observed, i);
    observed.instances.iter().filter(fine).count()
}

/// Whether a program of a check-less worker has run long enough, or has answered its checks.
pub fn is_well(state: &State, instance: &Instance, now: Timestamp) -> bool {
    if instance.check.probe == Probe::Running {
        return now.since(instance.started) >= SETTLE;
    }
    answers(state, instance)
}

/// Upstreams that workers of nginx may send a request to.
pub struct Upstreamed {
    /// Of workers that take new requests.
    pub all: usize,
    /// Those of these that answer nobody.
    pub dead: usize,
    /// Those that answer nobody, of workers that finish their last requests.
    pub old_dead: usize,
    /// The instances behind these.
    pub behind: Vec<ContainerId>,
}

pub fn upstreamed(state: &State, app: &AppName) -> Upstreamed {
    let nothing = ObservedApp::default();
    let observed = state.apps.get(app).unwrap_or(&nothing);
    let now = Instant::now();
    let mut instances = Vec::new();
    let (mut all, mut dead, mut old_dead) = (0, 0, 0);
    let at_key = |key: &InstanceKey| observed.instances.iter().find(|i| i.key == *key);
    let at_port = |port: u16| observed.instances.iter().find(|i| i.address == Some(Address::Port(port)));
    let mut upstream = |is_old: bool, instance: Option<&Instance>| {
        all += usize::from(!is_old);
        if !instance.is_some_and(|i| answers(state, i)) {
            dead += usize::from(!is_old);
            old_dead += usize::from(is_old);
            instances.extend(instance.map(|i| i.id.clone()));
        }
    };
    let served = state.proxy.served.as_ref().and_then(|m| m.vhosts.get(app));
    let old = state.proxy.old.iter().filter(|(_, until)| *until > now).filter_map(|(m, _)| m.vhosts.get(app));
    let vhosts: Vec<(bool, &Vhost)> = served.map(|v| (false, v)).into_iter().chain(old.map(|v| (true, v))).collect();
    for (is_old, vhost) in vhosts {
        match &vhost.upstreams {
            // An old worker takes no new requests; those that it has are connected already.
            Upstreams::Slots(_) if is_old => {}
            Upstreams::Slots(n) => {
                for slot in 1..=*n {
                    upstream(false, observed.slots.get(&slot).and_then(|k| k.as_ref()).and_then(at_key));
                }
            }
            Upstreams::Ports(ports) => ports.iter().for_each(|port| upstream(is_old, at_port(*port))),
        }
    }
    Upstreamed { all, dead, old_dead, behind: instances }
}

/// What the agent believes of an app.
pub fn believed<'a>(state: &'a State, app: &AppName) -> Option<&'a DesiredApp> {
    state.believed.as_ref()?.apps.get(app)
}

/// Whether the agent has reason to take an app away.
pub fn leaves(state: &State, app: &AppName) -> bool {
    state.believed.as_ref().is_some_and(|s| match s.apps.get(app) {
        None => s.proven,
        Some(desired) => matches!(desired, DesiredApp::Absent(_)),
    })
}

/// Whether a gap is what the app's order asks for: until a new release is proven.
pub fn changes_over(state: &State, app: &AppName) -> bool {
    let proven = state.apps.get(app).and_then(|o| o.proven.as_ref());
    let target = believed(state, app).and_then(DesiredApp::target);
    target.is_some_and(|t| t.order == Order::StopFirst && proven != Some(&t.release.id))
}
