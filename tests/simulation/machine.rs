//! The simulated host of the agent: every call takes time, may fail before its effect, or lose its response after it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::{Arc, Mutex},
    time::Duration,
};

use demae::{
    execute::StepError,
    host::{
        clock::Clock,
        docker::{ContainerEvent, DockerError, ImageFault, Listed, Operation},
        files::FileError,
        nginx::{NginxError, Published},
    },
    machine::{Inventory, Machine},
    model::{
        desired::Target,
        fleet::{CommandRun, EndedCommand, FleetImage},
        name::{AppName, ContainerId, HostName, ReleaseId},
        observed::{Address, Health, Instance, ObservedApp, Phase, Via, Wanted},
        policy::Policy,
        proxy::{ObservedProxy, Vhost},
        spec::Probe,
        time::Timestamp,
    },
    plan::{
        simulate::{NewContainer, address, apply_step, own_address},
        step::{Handle, Step},
    },
    world::ObserveError,
};
use futures_util::{Stream, StreamExt as _, stream};
use tokio::{sync::mpsc, time::Instant};

use crate::scene::{Behaviour, Engine, Program, Scene, is_routed, is_well, unreachable, version};

/// The agent's timeout for Docker calls.
const CALL: Duration = Duration::from_secs(60);

/// The host as one agent uses it. Probe results are lost with the agent.
pub struct SimMachine {
    host: HostName,
    pub scene: Arc<Scene>,
    clock: Clock,
    probed: Arc<Mutex<BTreeMap<ContainerId, Probed>>>,
}

struct Probed {
    app: AppName,
    answered: bool,
    was_healthy: bool,
    unhealthy_since: Option<Timestamp>,
}

impl Probed {
    fn of(app: &AppName) -> Self {
        Self { app: app.clone(), answered: false, was_healthy: false, unhealthy_since: None }
    }
}

impl SimMachine {
    pub fn new(host: HostName, scene: Arc<Scene>) -> Self {
        let wall = scene.clone();
        let clock = Clock::new(move || (wall.began.elapsed(), wall.now()));
        Self { host, scene, clock, probed: Arc::default() }
    }

    /// A Docker call: its duration, and whether the engine executes it.
    async fn docker(&self) -> Result<(), DockerError> {
        tokio::time::sleep(self.scene.chance.millis(1, 40)).await;
        let until = Instant::now() + CALL;
        loop {
            let (engine, unreliable) = {
                let state = self.scene.state();
                (state.engine, state.unreliable)
            };
            match engine {
                Engine::Up if unreliable > 0 && self.scene.chance.one_in(unreliable) => return Err(unreachable()),
                Engine::Up => return Ok(()),
                Engine::Hangs if Instant::now() < until => tokio::time::sleep(Duration::from_millis(500)).await,
                _ => return Err(unreachable()),
            }
        }
    }

    /// The way back of a response, which may be lost.
    async fn answer(&self) -> Result<(), DockerError> {
        tokio::time::sleep(self.scene.chance.millis(0, 10)).await;
        let unreliable = self.scene.state().unreliable;
        if unreliable > 0 && self.scene.chance.one_in(unreliable) {
            self.scene.record("answer lost", String::new);
            return Err(unreachable());
        }
        Ok(())
    }

    async fn disk(&self) -> Result<(), FileError> {
        tokio::time::sleep(self.scene.chance.millis(0, 2)).await;
        if self.scene.state().disk_full {
            let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
            return Err(FileError::cannot_write("/state".as_ref(), full));
        }
        Ok(())
    }

    /// The result of the agent's own probes of an instance.
    fn health(&self, app: &AppName, instance: &Instance) -> Health {
        let well = is_well(&self.scene.state(), instance, self.clock.now());
        if instance.check.probe == Probe::Running {
            return match (&instance.phase, well) {
                (Phase::Running, true) => Health::Healthy,
                _ => Health::Starting(String::new()),
            };
        }
        let mut all = self.probed.lock().expect("one thread");
        let probed = all.entry(instance.id.clone()).or_insert_with(|| {
            self.answer_after(app, instance.id.clone(), self.scene.chance.probe());
            Probed::of(app)
        });
        if !probed.answered {
            return Health::Unknown;
        }
        if well {
            (probed.was_healthy, probed.unhealthy_since) = (true, None);
            return Health::Healthy;
        }
        let now = self.clock.now();
        if probed.was_healthy || now >= instance.deadline() {
            let since = *probed.unhealthy_since.get_or_insert(now);
            return Health::Unhealthy { since, answer: "connection refused".into() };
        }
        Health::Starting("connection refused".into())
    }

    /// A probe that takes this long, then has its result.
    fn answer_after(&self, app: &AppName, id: ContainerId, pause: Duration) {
        let (scene, probed, app) = (self.scene.clone(), self.probed.clone(), app.clone());
        tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            if let Some(probed) = probed.lock().expect("one thread").get_mut(&id) {
                probed.answered = true;
            }
            scene.notify_health(&app);
        });
    }

    fn observe(&self, app: &AppName, wanted: Option<&Wanted>) -> ObservedApp {
        let mut observed = self.scene.state().apps.get(app).cloned().unwrap_or_default();
        let several = observed.instances.len() > 1;
        observed.image = wanted
            .filter(|w| w.image_lost || !observed.instances.iter().any(|i| i.key.release == w.release && i.is_alive()))
            .filter(|w| self.scene.state().images.contains(&w.image.to_string()))
            .map(|w| format!("sha256:{}", w.image));
        observed.pulled = false;
        observed.slots_changed = self.clock.to_monotonic(observed.slots_changed);
        for instance in &mut observed.instances {
            instance.started = self.clock.to_monotonic(instance.started);
        }
        if let Some(wanted) = wanted {
            let stable = (1..=wanted.slots).map(|slot| (slot, Ipv4Addr::new(198, 18, 0, slot.to_le_bytes()[0])));
            observed.slot_addresses.extend(stable);
        }
        let routes: Vec<_> = observed.slots.values().chain(observed.mapped.values()).flatten().cloned().collect();
        for instance in &mut observed.instances {
            let alive = instance.is_alive();
            instance.health = if alive { self.health(app, instance) } else { Health::Unknown };
            let leaving = wanted.is_none_or(|w| instance.key.release != w.release) || several;
            let count = leaving && instance.is_running() && !routes.contains(&instance.key);
            instance.connections = match count.then(|| self.connections(app, instance)) {
                // The count fails now and then.
                Some(_) if self.scene.chance.one_in(20) => None,
                counted => counted,
            };
        }
        let kept: Vec<ContainerId> = observed.instances.iter().filter(|i| i.is_alive()).map(|i| i.id.clone()).collect();
        let all: BTreeSet<ContainerId> = observed.instances.iter().map(|i| i.id.clone()).collect();
        self.probed.lock().expect("one thread").retain(|id, _| !all.contains(id) || kept.contains(id));
        observed
    }

    fn connections(&self, app: &AppName, instance: &Instance) -> usize {
        let state = self.scene.state();
        let observed = state.apps.get(app).cloned().unwrap_or_default();
        if is_routed(&state.proxy, app, &observed, instance) {
            return 2;
        }
        let Some(program) = state.programs.get(&instance.id) else { return 0 };
        usize::from(program.left.is_some_and(|left| Instant::now() < left + program.lingers))
    }

    fn apply(&self, app: &AppName, step: &Step, seen: &ObservedApp, made: Option<NewContainer>) {
        let now = self.scene.now();
        self.scene.effect(app, &step.to_string(), Some(seen), |state| {
            let observed = state.apps.entry(app.clone()).or_default();
            if matches!(step, Step::Switch(Via::Table, _)) {
                observed.slot_addresses.extend(seen.slot_addresses.clone());
            }
            let pulled = observed.pulled;
            apply_step(observed, step, made, now);
            observed.pulled = pulled;
            observed.image = None;
            if matches!(step, Step::Prove { .. }) {
                observed.proven_at = Some(now);
            }
        });
    }

    fn exists(&self, app: &AppName, handle: &Handle) -> bool {
        self.scene.state().apps.get(app).is_some_and(|o| o.instances.iter().any(|i| i.id == handle.id))
    }

    async fn create(&self, app: &AppName, step: &Step, seen: &ObservedApp) -> Result<Option<NewContainer>, StepError> {
        let Step::Create { key, release, image, .. } = step else { return Ok(None) };
        self.docker().await?;
        let made = {
            let mut state = self.scene.state();
            // The second reading, by the rules of now: they may be others than when it was planned.
            if let Some(refusal) = state.policy.refusals(app, release, None).into_iter().next() {
                return Err(DockerError::NotAllowed(refusal.to_string()).into());
            }
            let taken = state.apps.get(app).is_some_and(|o| o.instances.iter().any(|i| i.key == *key));
            if taken {
                return Err(refused(409, "the name is already in use"));
            }
            if *image != format!("sha256:{}", release.image) {
                state.violate(format!("{app}: a container of {} is made from {image}", release.image));
            }
            if !state.images.contains(&release.image.to_string()) {
                return Err(refused(404, "No such image: it"));
            }
            state.made += 1;
            let id = ContainerId::try_from(format!("{:064x}", state.made)).expect("an id");
            let port = 20_000 + u16::try_from(state.made % 9_000).expect("small");
            let program = Program {
                answers: false,
                changed: self.scene.began,
                life: 0,
                left: None,
                lingers: Duration::ZERO,
                settled_by: None,
            };
            state.programs.insert(id.clone(), program);
            // All instances of a release are reached in the same way; what the host can do changes.
            let sibling = state.apps.get(app).and_then(|o| o.instances.iter().find(|i| i.key.release == key.release));
            let by_port = match sibling.map(|i| &i.address) {
                Some(address) => matches!(address, Some(Address::Port(_))),
                None => self.scene.chance.one_in(3),
            };
            let own = (!by_port).then(|| own_address(release, state.made)).flatten();
            NewContainer { id, address: own.or_else(|| address(key, release, port)) }
        };
        self.apply(app, step, seen, Some(made.clone()));
        self.scene.emit_docker_event(app, false);
        self.answer().await?;
        Ok(Some(made))
    }

    async fn start(&self, app: &AppName, step: &Step, handle: &Handle, seen: &ObservedApp) -> Result<(), StepError> {
        self.docker().await?;
        if !self.exists(app, handle) {
            return Err(refused(404, "no such container"));
        }
        let by_port = seen.instances.iter().any(|i| i.id == handle.id && matches!(i.address, Some(Address::Port(_))));
        let is_new = seen.instances.iter().any(|i| i.id == handle.id && i.phase == Phase::Created);
        if by_port && is_new && self.scene.chance.one_in(15) {
            self.apply(app, &Step::Remove(handle.clone()), seen, None);
            return Err(refused(500, "port is already allocated"));
        }
        // Probing starts before the container does.
        let probed = Probed { answered: true, ..Probed::of(app) };
        self.probed.lock().expect("one thread").insert(handle.id.clone(), probed);
        self.apply(app, step, seen, None);
        self.scene.start_program(app, &handle.id);
        self.scene.emit_docker_event(app, false);
        Ok(self.answer().await?)
    }

    async fn stop(&self, app: &AppName, handle: &Handle, seen: &ObservedApp) -> Result<(), StepError> {
        self.docker().await?;
        let grace = seen.instances.iter().find(|i| i.id == handle.id).map_or(Duration::ZERO, |i| i.grace);
        let step = Step::Stop { handle: handle.clone(), grace };
        self.scene.judge_step(app, &step);
        if self.exists(app, handle) {
            self.apply(app, &step, seen, None);
            self.scene.stop_program(&handle.id);
            self.scene.emit_docker_event(app, true);
        }
        Ok(self.answer().await?)
    }

    async fn remove(&self, app: &AppName, handle: &Handle, seen: &ObservedApp) -> Result<(), StepError> {
        self.docker().await?;
        self.scene.judge_step(app, &Step::Remove(handle.clone()));
        if self.exists(app, handle) {
            self.apply(app, &Step::Remove(handle.clone()), seen, None);
            self.scene.state().programs.remove(&handle.id);
            self.scene.emit_docker_event(app, true);
        }
        Ok(self.answer().await?)
    }

    fn prove(&self, app: &AppName, step: &Step) -> Result<(), StepError> {
        let Step::Prove { release, ingress: Some(_), .. } = step else { return Ok(()) };
        let state = self.scene.state();
        if !state.proxy.runs {
            return Err(NginxError::NotRunning("connection refused".into()).into());
        }
        let answers = |i: &Instance| {
            let lies = state.behaviours[version(i)] == Behaviour::Lies;
            i.phase == Phase::Running && state.programs.get(&i.id).is_some_and(|p| p.answers) && !lies
        };
        let observed = state.apps.get(app).cloned().unwrap_or_default();
        let served = state.proxy.served.as_ref().is_some_and(|m| m.vhosts.contains_key(app));
        let routed = |i: &&Instance| is_routed(&state.proxy, app, &observed, i) && i.key.release == *release;
        if served && observed.instances.iter().any(|i| routed(&i) && answers(i)) {
            return Ok(());
        }
        Err(NginxError::NoAnswer("it is answered with status 502".into()).into())
    }
}

impl Machine for SimMachine {
    fn host(&self) -> &HostName {
        &self.host
    }

    fn now(&self) -> Timestamp {
        self.clock.now()
    }

    fn wall(&self, at: Timestamp) -> Timestamp {
        self.clock.wall(at)
    }

    fn jittered(&self, duration: Duration) -> Duration {
        let millis = u64::try_from(duration.as_millis()).expect("short");
        self.scene.chance.millis(millis * 4 / 5, millis * 6 / 5)
    }

    fn reset_health(&self) {
        for (id, probed) in self.probed.lock().expect("one thread").iter_mut() {
            probed.answered = false;
            self.answer_after(&probed.app, id.clone(), self.scene.chance.millis(3, 60));
        }
    }

    async fn list(&self) -> Result<Inventory, ObserveError> {
        self.docker().await?;
        let mut listed = Vec::new();
        let mut traces = BTreeMap::new();
        for (app, observed) in &self.scene.state().apps {
            for instance in &observed.instances {
                let port = match instance.address {
                    Some(Address::Port(port)) => Some(port),
                    _ => None,
                };
                let state = instance.phase.as_str().to_owned();
                let (ports, address) = (port.into_iter().collect(), None);
                listed.push(Listed { app: app.clone(), id: instance.id.to_string(), state, ports, address });
            }
            let on_disk = ObservedApp { instances: Vec::new(), image: None, ..observed.clone() };
            let nothing = on_disk.slots.is_empty()
                && on_disk.slot_addresses.is_empty()
                && on_disk.env_files.is_empty()
                && on_disk.socket_dirs.is_empty()
                && on_disk.proven.is_none()
                && on_disk.verdicts.is_empty();
            if !nothing {
                traces.insert(app.clone(), Some(on_disk));
            }
        }
        self.answer().await?;
        Ok(Inventory { containers: listed, foreign: Vec::new(), is_complete: true, traces })
    }

    async fn observe_app(
        &self,
        app: &AppName,
        wanted: Option<&Wanted>,
        listed: Option<Vec<String>>,
    ) -> Result<ObservedApp, ObserveError> {
        self.docker().await?;
        let began = Instant::now();
        let mut observed = self.observe(app, wanted);
        if let Some(listed) = listed {
            observed.instances.retain(|i| listed.iter().any(|id| id == i.id.as_str()));
        }
        self.answer().await?;
        // Before it arrives, the agent knows nothing of it.
        self.scene.state().observed_at.insert(app.clone(), began);
        Ok(observed)
    }

    async fn run_command(
        &self,
        _: &AppName,
        _: &ReleaseId,
        _: Option<&Target>,
        _: &FleetImage,
        _: (&CommandRun, bool),
    ) -> Result<EndedCommand, StepError> {
        panic!("no app of these histories has a release command")
    }

    async fn remove_command(&self, _: &AppName, _: &ReleaseId) -> Result<(), StepError> {
        panic!("no app of these histories has a release command")
    }

    async fn observe_proxy(&self) -> ObservedProxy {
        tokio::time::sleep(self.scene.chance.millis(1, 5)).await;
        let mut observed = self.scene.proxy().await;
        if self.scene.chance.one_in(20) {
            observed.old_workers = None;
        }
        tokio::time::sleep(self.scene.chance.millis(0, 5)).await;
        observed.published = self.clock.to_monotonic(observed.published);
        observed.workers_since = self.clock.to_monotonic(observed.workers_since);
        if let Some(live) = &mut observed.live {
            let changed = live.changed.values_mut().chain(live.rejected.values_mut().map(|r| &mut r.at));
            changed.for_each(|at| *at = self.clock.to_monotonic(*at));
        }
        observed
    }

    async fn old_workers(&self) -> Option<usize> {
        tokio::time::sleep(self.scene.chance.millis(0, 3)).await;
        let counted = self.scene.old_workers();
        // Counting needs several sources, and each may fail.
        counted.filter(|_| !self.scene.chance.one_in(20))
    }

    async fn recount(&self, _app: &AppName, ids: &[ContainerId]) -> Vec<(ContainerId, Option<usize>)> {
        tokio::time::sleep(self.scene.chance.millis(0, 3)).await;
        let apps = self.scene.state().apps.clone();
        let count = |id: &ContainerId| {
            let (app, instance) =
                apps.iter().find_map(|(app, o)| Some((app, o.instances.iter().find(|i| i.id == *id)?)))?;
            (instance.is_running() && !self.scene.chance.one_in(20)).then(|| self.connections(app, instance))
        };
        ids.iter().map(|id| (id.clone(), count(id))).collect()
    }

    fn has_nginx(&self) -> bool {
        self.scene.state().proxy.runs
    }

    fn events(&self) -> impl Stream<Item = Result<ContainerEvent, DockerError>> + Send {
        let (out, events) = mpsc::unbounded_channel();
        let mut state = self.scene.state();
        if state.engine == Engine::Up {
            state.listeners.push(out);
        } else {
            let _ = out.send(Err(unreachable()));
        }
        stream::unfold(events, |mut events| async { events.recv().await.map(|event| (event, events)) }).boxed()
    }

    fn probed(&self, app: &AppName, id: &ContainerId) -> Option<Health> {
        let mut instance = self.scene.state().apps.get(app)?.instances.iter().find(|i| i.id == *id)?.clone();
        instance.started = self.clock.to_monotonic(instance.started);
        let is_probed = self.probed.lock().expect("one thread").contains_key(id);
        (is_probed && instance.is_alive()).then(|| self.health(app, &instance))
    }

    async fn perform(&self, app: &AppName, step: &Step, seen: &ObservedApp) -> Result<Option<NewContainer>, StepError> {
        let mut made = None;
        self.scene.note_snapshot();
        self.scene.state().begun.insert(app.clone(), Instant::now());
        match step {
            Step::Pull { image, .. } => {
                tokio::time::sleep(self.scene.chance.millis(100, 5_000)).await;
                self.docker().await?;
                let version = image.to_string().rsplit('v').next().and_then(|n| n.parse().ok()).unwrap_or(0usize);
                if self.scene.state().behaviours[version] == Behaviour::Missing {
                    let (image, message) = (image.to_string(), "manifest unknown".to_owned());
                    return Err(DockerError::Image { image, message, fault: ImageFault::Person }.into());
                }
                self.scene.effect(app, &step.to_string(), None, |state| state.images.insert(image.to_string()));
            }
            Step::Create { .. } => made = self.create(app, step, seen).await?,
            Step::Start(handle) => {
                self.scene.judge_step(app, step);
                self.start(app, step, handle, seen).await?;
            }
            Step::Stop { handle, .. } => self.stop(app, handle, seen).await?,
            Step::Remove(handle) => self.remove(app, handle, seen).await?,
            Step::Discard { handle, .. } => {
                self.stop(app, handle, seen).await?;
                self.remove(app, handle, seen).await?;
            }
            Step::Settle(handle) => {
                self.docker().await?;
                if !self.exists(app, handle) {
                    return Err(refused(404, "no such container"));
                }
                self.apply(app, step, seen, None);
                self.answer().await?;
            }
            Step::Prove { .. } => {
                tokio::time::sleep(self.scene.chance.millis(1, 200)).await;
                self.prove(app, step)?;
                self.disk().await?;
                self.apply(app, step, seen, None);
            }
            Step::WriteEnvFile(_) | Step::RecordVerdict { .. } | Step::Switch(..) => {
                self.disk().await?;
                self.apply(app, step, seen, None);
            }
            Step::ClearSocket(_) | Step::CleanUp(_) => {
                tokio::time::sleep(self.scene.chance.millis(0, 2)).await;
                self.apply(app, step, seen, None);
            }
        }
        // The agent may be killed here: the step is done, and its result is lost.
        tokio::time::sleep(self.scene.chance.millis(0, 3)).await;
        Ok(made)
    }

    async fn publish(&self, vhosts: &BTreeMap<AppName, Vhost>) -> Result<Published, NginxError> {
        self.scene.publish(vhosts).await
    }

    async fn reload(&self) -> Result<(), NginxError> {
        self.scene.reload().await
    }

    fn policy(&self) -> Arc<Policy> {
        self.scene.state().policy.clone()
    }

    fn ports(&self, used: &BTreeSet<u16>) -> (usize, usize) {
        (used.len(), 10_000)
    }
}

fn refused(status: u16, message: &str) -> StepError {
    DockerError::Refused { operation: Operation::Create, status, message: message.into() }.into()
}
