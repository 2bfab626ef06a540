//! The host of a history: the true state of its containers, files and nginx.

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
    host::docker::{ContainerEvent, DockerError},
    model::{
        desired::{DesiredApp, Snapshot},
        name::{AppName, ContainerId, ReleaseId},
        observed::{Address, Instance, InstanceKey, ObservedApp, Phase},
        policy::{BUILT_IN, Policy},
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

/// Behaviour of a version's program once started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behaviour {
    Works,
    Slow,
    NeverHealthy,
    Exits,
    /// Healthy for a while, then exits.
    Crashes,
    /// Healthy, and does not answer through nginx.
    Lies,
    /// Its image does not exist.
    Missing,
}

/// The program in a container.
#[derive(Debug, Clone)]
pub struct Program {
    pub answers: bool,
    /// When that last changed, or its container did.
    pub changed: Instant,
    /// Counts the starts, so that an earlier run does not end a later one.
    pub life: u64,
    /// When it lost its routes.
    pub left: Option<Instant>,
    /// Duration of its last requests.
    pub lingers: Duration,
    pub settled_by: Option<Instant>,
}

/// The intended state of an app.
#[derive(Debug, Clone)]
pub struct Meant {
    /// True if it belongs on this host.
    pub present: bool,
    /// True if the whole host is drained.
    pub drained: bool,
    /// The store revision up to which it did not belong here; the highest one of all stores.
    pub absent_until: i64,
    pub version: usize,
    pub replicas: usize,
    /// True if a person has to act before it converges: it is paused, invalid, or shares a virtual host.
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

/// nginx, and its sets on disk.
#[derive(Debug, Default)]
pub struct Proxy {
    /// The set on disk.
    pub live: Option<Manifest>,
    /// When an app's part of it last changed.
    pub written: BTreeMap<AppName, Instant>,
    pub published: Timestamp,
    pub runs: bool,
    /// A file outside demae makes `nginx -t` fail.
    pub broken: bool,
    /// Reloads are accepted and have no effect.
    pub ignores_reloads: bool,
    pub drifted: bool,
    /// The set that workers serve.
    pub served: Option<Manifest>,
    /// Since when, by the wall clock.
    pub since: Timestamp,
    /// Sets of older workers, and until when they run.
    pub old: Vec<(Manifest, Instant)>,
}

/// State of the Docker engine.
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
    /// One in so many calls fails, or loses its response; 0 for none.
    pub unreliable: usize,
    pub disk_full: bool,
    /// What the host allows.
    pub policy: Arc<Policy>,
    /// Until when the agent is stalled. Calls in flight continue.
    pub stalled_until: Option<Instant>,
    /// When it last resumed from a stall that it must detect.
    pub resumed: Instant,
    /// When the last step for an app started.
    pub begun: BTreeMap<AppName, Instant>,
    /// When the agent last observed an app.
    pub observed_at: BTreeMap<AppName, Instant>,
    /// The same, when the last change of nginx began.
    pub observed_at_change: BTreeMap<AppName, Instant>,
    pub proxy_observed_at: Instant,
    /// When building the live set started: it was right then, and may be served much later.
    pub changing_since: Instant,
    /// Apps that were leaving at that time, or had been left out before. A later agent may load the set, whatever its own
    /// state.
    pub leaving: BTreeSet<AppName>,
    pub snapshot: Option<Arc<Snapshot>>,
    /// When the desired state of an app last changed in the snapshot.
    pub snapshot_changed: BTreeMap<AppName, Instant>,
    pub news: Option<UnboundedSender<AppName>>,
    pub listeners: Vec<UnboundedSender<Result<ContainerEvent, DockerError>>>,
    pub made: u64,
    pub updates: Option<watch::Receiver<Update>>,
    /// The intended state, independent of the store.
    pub meant: BTreeMap<AppName, Meant>,
    /// When a container of an app was last removed manually.
    pub meddled: BTreeMap<AppName, Instant>,
    /// When an instance of an app last died. It may have been removed since.
    pub died: BTreeMap<AppName, Instant>,
    /// Apps whose removal a person accepted, until an agent has used that.
    pub accepted_removals: BTreeSet<AppName>,
    /// Releases of which an instance was made to hang.
    pub hung: BTreeSet<(AppName, ReleaseId)>,
    /// Apps that an agent has removed by that acceptance.
    pub removed_by_acceptance: BTreeSet<AppName>,
    /// The newest_revision revision of a trusted snapshot, of any agent.
    pub newest_revision: i64,
    /// Foreign containers.
    pub foreign: BTreeSet<ContainerId>,
    pub tally: BTreeMap<String, u64>,
    pub app_states: BTreeSet<u64>,
    pub host_states: BTreeSet<u64>,
    pub log: Vec<String>,
    pub trace: DefaultHasher,
    pub violations: Vec<String>,
    /// Number of effects on each app, to check that the agent comes to rest.
    pub effects: BTreeMap<AppName, u64>,
}

pub const VERSIONS: usize = 5;

impl State {
    /// Records a violated invariant.
    pub fn violate(&mut self, what: String) {
        self.log.push(format!("          !!! {what}"));
        self.violations.push(what);
    }
}

pub struct Scene {
    pub chance: Chance,
    /// Of its own, so that histories stay as they are where it decides nothing.
    pub policies: Chance,
    pub began: Instant,
    skew: AtomicI64,
    /// True if a person accepted the store as it is.
    pub accepted: AtomicBool,
    /// Locked by the publisher of nginx sets.
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
        // The first version works, so there is something to lose.
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
            policy: BUILT_IN.clone(),
            stalled_until: None,
            resumed: now,
            begun: BTreeMap::new(),
            observed_at: BTreeMap::new(),
            observed_at_change: BTreeMap::new(),
            proxy_observed_at: now,
            changing_since: now,
            leaving: BTreeSet::new(),
            snapshot: None,
            snapshot_changed: BTreeMap::new(),
            news: None,
            listeners: Vec::new(),
            made: 0,
            updates: None,
            meant: BTreeMap::new(),
            meddled: BTreeMap::new(),
            died: BTreeMap::new(),
            accepted_removals: BTreeSet::new(),
            hung: BTreeSet::new(),
            removed_by_acceptance: BTreeSet::new(),
            newest_revision: 0,
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
            policies: Chance::new(!seed),
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

    /// The wall clock of this host.
    pub fn now(&self) -> Timestamp {
        let passed = i64::try_from(self.began.elapsed().as_millis()).expect("not that long");
        Timestamp::from_millis(1_800_000_000_000 + passed + self.skew.load(Ordering::Relaxed))
    }

    /// Steps the clock.
    pub fn set_clock(&self, by: i64) {
        self.skew.fetch_add(by, Ordering::Relaxed);
    }

    /// Records an event: counted, and printed if the history fails.
    pub fn record(&self, kind: &str, what: impl FnOnce() -> String) {
        let at = self.began.elapsed();
        let mut state = self.state();
        *state.tally.entry(kind.to_owned()).or_default() += 1;
        // Container ids are long here, with many zeros.
        let line = format!("{:>9.3} {kind}: {}", at.as_secs_f64(), what()).replace(&"0".repeat(56), "");
        line.hash(&mut state.trace);
        state.log.push(line);
        if state.log.len() > 4_000 {
            state.log.drain(..2_000);
        }
        self.note_state(&mut state);
    }

    /// Hashes the state of the host, for the count of distinct states.
    fn note_state(&self, state: &mut State) {
        let mut whole = DefaultHasher::new();
        let mut seen = Vec::new();
        for (app, observed) in &state.apps {
            let mut one = DefaultHasher::new();
            let desired = state.snapshot.as_ref().and_then(|s| s.apps.get(app));
            let wanted = desired.and_then(DesiredApp::target).map(|t| t.release.id.clone());
            desired.map(std::mem::discriminant).hash(&mut one);
            for i in &observed.instances {
                let program = state.programs.get(&i.id);
                (wanted.as_ref() == Some(&i.key.release), observed.proven.as_ref() == Some(&i.key.release))
                    .hash(&mut one);
                (i.key.number, i.settled, i.stale_socket, is_routed(&state.proxy, app, observed, i)).hash(&mut one);
                (std::mem::discriminant(&i.phase), program.is_some_and(|p| p.answers)).hash(&mut one);
            }
            (observed.slots.len(), observed.mapped.len(), observed.env_files.len(), observed.socket_dirs.len())
                .hash(&mut one);
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
        (proxy.runs, proxy.broken, proxy.ignores_reloads, proxy.drifted, proxy.old.len()).hash(&mut whole);
        (state.engine == Engine::Up, state.engine == Engine::Down, state.disk_full).hash(&mut whole);
        state.app_states.extend(seen);
        state.host_states.insert(whole.finish());
    }

    /// Emits a Docker event, which is lost now and then.
    pub fn emit_docker_event(&self, app: &AppName, is_end: bool) {
        let mut state = self.state();
        if state.engine != Engine::Up || state.unreliable > 0 && self.chance.one_in(4) {
            return;
        }
        state.listeners.retain(|l| l.send(Ok(ContainerEvent { app: app.clone(), is_end })).is_ok());
    }

    /// The agent's probe of an instance has a new result.
    pub fn notify_health(&self, app: &AppName) {
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

/// The version of an instance.
pub fn version(instance: &Instance) -> usize {
    let image = instance.requested_image.as_ref().map(ToString::to_string).unwrap_or_default();
    image.rsplit('v').next().and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// True if a virtual host or a route symlink leads to an instance.
pub fn is_routed(proxy: &Proxy, app: &AppName, observed: &ObservedApp, instance: &Instance) -> bool {
    match &instance.address {
        Some(Address::Socket(_)) => observed.slots.values().flatten().any(|k| *k == instance.key),
        Some(Address::Own(_)) => observed.mapped.values().flatten().any(|k| *k == instance.key),
        Some(Address::Port(port)) => {
            let knows = |m: &Manifest| matches!(m.vhosts.get(app).map(|v| &v.upstreams), Some(Upstreams::Ports(p)) if p.contains(port));
            proxy.served.as_ref().is_some_and(knows) || proxy.live.as_ref().is_some_and(knows)
        }
        None => false,
    }
}

/// True if an instance answers requests now.
fn answers(state: &State, instance: &Instance) -> bool {
    instance.phase == Phase::Running && state.programs.get(&instance.id).is_some_and(|p| p.answers)
}

/// Healthy instances with routes.
pub fn serving(state: &State, app: &AppName) -> usize {
    let Some(observed) = state.apps.get(app) else { return 0 };
    let fine = |i: &&Instance| answers(state, i) && is_routed(&state.proxy, app, observed, i);
    observed.instances.iter().filter(fine).count()
}

/// True if a worker without a check has run long enough, or an instance answers its probes.
pub fn is_well(state: &State, instance: &Instance, now: Timestamp) -> bool {
    if instance.check.probe == Probe::Running {
        return now.since(instance.started) >= SETTLE;
    }
    answers(state, instance)
}

/// Upstreams of nginx workers.
pub struct Upstreamed {
    /// Of workers that accept new requests.
    pub all: usize,
    /// The dead ones of these.
    pub dead: usize,
    /// The dead ones of workers that finish their last requests.
    pub old_dead: usize,
    /// The instances of the dead ones.
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
            // An old worker accepts no new requests; those in flight are connected already.
            Upstreams::Slots(_) | Upstreams::Addresses(_) if is_old => {}
            Upstreams::Addresses(addresses) => {
                for slot in (1u16..).take(addresses.len()) {
                    upstream(false, observed.mapped.get(&slot).and_then(|k| k.as_ref()).and_then(at_key));
                }
            }
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

/// The desired state of an app in the agent's snapshot.
pub fn desired_of<'a>(state: &'a State, app: &AppName) -> Option<&'a DesiredApp> {
    state.snapshot.as_ref()?.apps.get(app)
}

/// True if the agent has reason to remove an app.
pub fn is_leaving(state: &State, app: &AppName) -> bool {
    state.snapshot.as_ref().is_some_and(|s| match s.apps.get(app) {
        None => s.proven,
        Some(desired) => matches!(desired, DesiredApp::Absent(_)),
    })
}

/// True if the app's order allows a gap: until a new release is proven.
pub fn allows_gap(state: &State, app: &AppName) -> bool {
    let proven = state.apps.get(app).and_then(|o| o.proven.as_ref());
    let target = desired_of(state, app).and_then(DesiredApp::target);
    target.is_some_and(|t| t.order == Order::StopFirst && proven != Some(&t.release.id))
}
