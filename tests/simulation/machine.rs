//! The agent's host, played: every call takes its time, may fail before its effect, and may lose its answer after it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use demae::{
    execute::StepError,
    host::{
        clock::Clock,
        docker::{DockerError, Listed, Operation},
        files::FileError,
        nginx::{NginxError, Published},
    },
    machine::{Inventory, Machine},
    model::{
        name::{AppName, ContainerId, HostName},
        observed::{Address, Health, Instance, ObservedApp, Phase, Wanted},
        proxy::{ObservedProxy, Vhost},
        spec::Probe,
        time::Timestamp,
    },
    plan::{
        simulate::{Made, address, leave_behind},
        step::{Handle, Step},
    },
    world::ObserveError,
};
use futures_util::{Stream, StreamExt as _, stream};
use tokio::{sync::mpsc, time::Instant};

use crate::scene::{Behaviour, Engine, Program, Scene, is_routed, is_well, unreachable, version};

/// Longest that the agent waits for Docker.
const CALL: Duration = Duration::from_secs(60);

/// One agent's hands. What it has asked of its instances ends with it.
pub struct Hands {
    host: HostName,
    pub scene: Arc<Scene>,
    clock: Clock,
    asked: Mutex<BTreeMap<ContainerId, Asked>>,
}

#[derive(Default)]
struct Asked {
    answered: bool,
    was_healthy: bool,
    unhealthy_since: Option<Timestamp>,
}

impl Hands {
    pub fn new(host: HostName, scene: Arc<Scene>) -> Self {
        let wall = scene.clone();
        let clock = Clock::new(move || (wall.began.elapsed(), wall.now()));
        Self { host, scene, clock, asked: Mutex::default() }
    }

    /// A call of Docker's: how long it takes, and whether the engine takes it.
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

    /// The way back of an answer, on which it may be lost.
    async fn answer(&self) -> Result<(), DockerError> {
        tokio::time::sleep(self.scene.chance.millis(0, 10)).await;
        let unreliable = self.scene.state().unreliable;
        if unreliable > 0 && self.scene.chance.one_in(unreliable) {
            self.scene.happens("answer lost", String::new);
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

    /// What the agent's own questions to an instance have shown.
    fn health(&self, app: &AppName, instance: &Instance) -> Health {
        let well = is_well(&self.scene.state(), instance, self.clock.now());
        if instance.check.probe == Probe::Running {
            return match (&instance.phase, well) {
                (Phase::Running, true) => Health::Healthy,
                _ => Health::Starting(String::new()),
            };
        }
        let mut all = self.asked.lock().expect("one thread");
        let asked = all.entry(instance.id.clone()).or_insert_with(|| {
            let (scene, app, pause) = (self.scene.clone(), app.clone(), self.scene.chance.check());
            tokio::spawn(async move {
                tokio::time::sleep(pause).await;
                scene.health_tells(&app);
            });
            Asked::default()
        });
        if !std::mem::replace(&mut asked.answered, true) {
            return Health::Unknown;
        }
        if well {
            (asked.was_healthy, asked.unhealthy_since) = (true, None);
            return Health::Healthy;
        }
        let now = self.clock.now();
        if asked.was_healthy || now >= instance.deadline() {
            let since = *asked.unhealthy_since.get_or_insert(now);
            return Health::Unhealthy { since, answer: "connection refused".into() };
        }
        Health::Starting("connection refused".into())
    }

    fn look(&self, app: &AppName, wanted: Option<&Wanted>) -> ObservedApp {
        let mut observed = {
            let mut state = self.scene.state();
            state.looked.insert(app.clone(), Instant::now());
            state.apps.get(app).cloned().unwrap_or_default()
        };
        let several = observed.instances.len() > 1;
        observed.image = wanted
            .filter(|w| w.image_lost || !observed.instances.iter().any(|i| i.key.release == w.release && i.is_alive()))
            .filter(|w| self.scene.state().images.contains(&w.image.to_string()))
            .map(|w| format!("sha256:{}", w.image));
        observed.pulled = false;
        observed.slots_changed = self.clock.steady(observed.slots_changed);
        for instance in &mut observed.instances {
            instance.started = self.clock.steady(instance.started);
        }
        let routes: Vec<_> = observed.slots.values().flatten().cloned().collect();
        for instance in &mut observed.instances {
            let alive = instance.is_alive();
            instance.health = if alive { self.health(app, instance) } else { Health::Unknown };
            let leaving = wanted.is_none_or(|w| instance.key.release != w.release) || several;
            let count = leaving && instance.is_running() && !routes.contains(&instance.key);
            instance.connections = match count.then(|| self.connections(app, instance)) {
                // Now and then it cannot be counted.
                Some(_) if self.scene.chance.one_in(20) => None,
                counted => counted,
            };
        }
        let kept: Vec<ContainerId> = observed.instances.iter().filter(|i| i.is_alive()).map(|i| i.id.clone()).collect();
        let all: BTreeSet<ContainerId> = observed.instances.iter().map(|i| i.id.clone()).collect();
        self.asked.lock().expect("one thread").retain(|id, _| !all.contains(id) || kept.contains(id));
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

    fn apply(&self, app: &AppName, step: &Step, seen: &ObservedApp, made: Option<Made>) {
        let now = self.scene.now();
        self.scene.effect(app, &step.to_string(), Some(seen), |state| {
            let observed = state.apps.entry(app.clone()).or_default();
            let pulled = observed.pulled;
            leave_behind(observed, step, made, now);
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

    async fn create(&self, app: &AppName, step: &Step, seen: &ObservedApp) -> Result<(), StepError> {
        let Step::Create { key, release, image, .. } = step else { return Ok(()) };
        self.docker().await?;
        let made = {
            let mut state = self.scene.state();
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
            Made { id, address: address(key, release, port) }
        };
        self.apply(app, step, seen, Some(made));
        self.scene.docker_tells(app);
        Ok(self.answer().await?)
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
        // It is asked from before its start on.
        let asked = Asked { answered: true, ..Asked::default() };
        self.asked.lock().expect("one thread").insert(handle.id.clone(), asked);
        self.apply(app, step, seen, None);
        self.scene.begin_life(app, &handle.id);
        self.scene.docker_tells(app);
        Ok(self.answer().await?)
    }

    async fn stop(&self, app: &AppName, handle: &Handle, seen: &ObservedApp) -> Result<(), StepError> {
        self.docker().await?;
        let grace = seen.instances.iter().find(|i| i.id == handle.id).map_or(Duration::ZERO, |i| i.grace);
        let step = Step::Stop { handle: handle.clone(), grace };
        self.scene.judge_step(app, &step);
        if self.exists(app, handle) {
            self.apply(app, &step, seen, None);
            self.scene.end_life(&handle.id);
            self.scene.docker_tells(app);
        }
        Ok(self.answer().await?)
    }

    async fn remove(&self, app: &AppName, handle: &Handle, seen: &ObservedApp) -> Result<(), StepError> {
        self.docker().await?;
        self.scene.judge_step(app, &Step::Remove(handle.clone()));
        if self.exists(app, handle) {
            self.apply(app, &Step::Remove(handle.clone()), seen, None);
            self.scene.state().programs.remove(&handle.id);
            self.scene.docker_tells(app);
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

impl Machine for Hands {
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

    fn forget_health(&self) {
        let mut all = self.asked.lock().expect("one thread");
        all.values_mut().for_each(|asked| asked.answered = false);
        let apps: Vec<AppName> = self.scene.state().apps.keys().cloned().collect();
        for app in apps {
            let (scene, pause) = (self.scene.clone(), self.scene.chance.millis(3, 60));
            tokio::spawn(async move {
                tokio::time::sleep(pause).await;
                scene.health_tells(&app);
            });
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
                let ports = port.into_iter().collect();
                listed.push(Listed { app: app.clone(), id: instance.id.to_string(), state, ports });
            }
            let on_disk = ObservedApp { instances: Vec::new(), image: None, ..observed.clone() };
            let nothing = on_disk.slots.is_empty()
                && on_disk.env_files.is_empty()
                && on_disk.socket_dirs.is_empty()
                && on_disk.proven.is_none()
                && on_disk.verdicts.is_empty();
            if !nothing {
                traces.insert(app.clone(), Some(on_disk));
            }
        }
        self.answer().await?;
        Ok(Inventory { containers: listed, foreign: Vec::new(), traces })
    }

    async fn observe_app(&self, app: &AppName, wanted: Option<&Wanted>) -> Result<ObservedApp, ObserveError> {
        self.docker().await?;
        let observed = self.look(app, wanted);
        self.answer().await?;
        Ok(observed)
    }

    async fn observe_proxy(&self) -> ObservedProxy {
        tokio::time::sleep(self.scene.chance.millis(1, 5)).await;
        let mut observed = self.scene.proxy().await;
        if self.scene.chance.one_in(20) {
            observed.old_workers = None;
        }
        tokio::time::sleep(self.scene.chance.millis(0, 5)).await;
        observed.published = self.clock.steady(observed.published);
        observed.workers_since = self.clock.steady(observed.workers_since);
        if let Some(live) = &mut observed.live {
            let changed = live.changed.values_mut().chain(live.rejected.values_mut().map(|r| &mut r.at));
            changed.for_each(|at| *at = self.clock.steady(*at));
        }
        observed
    }

    async fn old_workers(&self) -> Option<usize> {
        tokio::time::sleep(self.scene.chance.millis(0, 3)).await;
        let counted = self.scene.old_workers();
        // Whoever wants to count them asks more than one place, and each may not answer.
        counted.filter(|_| !self.scene.chance.one_in(20))
    }

    fn has_nginx(&self) -> bool {
        self.scene.state().proxy.runs
    }

    fn events(&self) -> impl Stream<Item = Result<AppName, DockerError>> + Send {
        let (out, events) = mpsc::unbounded_channel();
        let mut state = self.scene.state();
        if state.engine == Engine::Up {
            state.listeners.push(out);
        } else {
            let _ = out.send(Err(unreachable()));
        }
        stream::unfold(events, |mut events| async { events.recv().await.map(|event| (event, events)) }).boxed()
    }

    async fn perform(&self, app: &AppName, step: &Step, seen: &ObservedApp) -> Result<(), StepError> {
        self.scene.note_belief();
        self.scene.state().begun.insert(app.clone(), Instant::now());
        match step {
            Step::Pull(image) => {
                tokio::time::sleep(self.scene.chance.millis(100, 5_000)).await;
                self.docker().await?;
                let version = image.to_string().rsplit('v').next().and_then(|n| n.parse().ok()).unwrap_or(0usize);
                if self.scene.state().behaviours[version] == Behaviour::Missing {
                    let (image, message) = (image.to_string(), "manifest unknown".to_owned());
                    return Err(DockerError::Image { image, message, temporary: false }.into());
                }
                self.scene.effect(app, &step.to_string(), None, |state| state.images.insert(image.to_string()));
            }
            Step::Create { .. } => self.create(app, step, seen).await?,
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
            Step::WriteEnvFile(_) | Step::RecordVerdict { .. } | Step::Switch(_) => {
                self.disk().await?;
                self.apply(app, step, seen, None);
            }
            Step::ClearSocket(_) | Step::CleanUp(_) => {
                tokio::time::sleep(self.scene.chance.millis(0, 2)).await;
                self.apply(app, step, seen, None);
            }
        }
        // The agent may end here: done, and nobody told.
        tokio::time::sleep(self.scene.chance.millis(0, 3)).await;
        Ok(())
    }

    async fn publish(&self, vhosts: &BTreeMap<AppName, Vhost>) -> Result<Published, NginxError> {
        self.scene.publish(vhosts).await
    }

    async fn reload(&self) -> Result<(), NginxError> {
        self.scene.reload().await
    }

    fn ports(&self, used: &BTreeSet<u16>) -> (usize, usize) {
        (used.len(), 10_000)
    }
}

fn refused(status: u16, message: &str) -> StepError {
    DockerError::Refused { operation: Operation::Create, status, message: message.into() }.into()
}
