//! Does one step. One match, no decisions: a step carries all it needs, may be done twice, and leaves a trace.

use std::{collections::HashSet, path::Path, time::Duration};

use crate::{
    failpoint,
    host::{
        docker::{CreateRequest, DockerError, facts},
        files::{self, FileError},
        health::{Question, Reach, host_asked_for, more_questions},
        nginx::{NginxError, Proof},
        ports::NoPort,
    },
    model::{
        env,
        name::{AppName, ContainerId},
        observed::{Address, Instance, InstanceKey, ObservedApp, Verdict},
        problem::bounded,
        release::Release,
        spec::{ContainerSpec, Endpoint, MOUNTABLE, VolumeSource},
        time::Timestamp,
    },
    plan::step::{Handle, Leftovers, Step},
    world::World,
};

/// How long an instance may take to end of which nothing more is known.
const GRACE: Duration = Duration::from_secs(5);
/// Most bytes of the cause of a verdict: health checks quote what they are answered.
const MOST_CAUSE: usize = 1_000;
/// Most of a log that is kept as evidence.
const LOG_TAIL: usize = 2_000;
/// Shortest value of a variable that is searched for in evidence: shorter ones are found in any text.
const SHORTEST_SECRET: usize = 4;

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// Docker.
    #[error(transparent)]
    Docker(#[from] DockerError),
    /// Files.
    #[error(transparent)]
    File(#[from] FileError),
    /// nginx.
    #[error(transparent)]
    Nginx(#[from] NginxError),
    /// Ports.
    #[error(transparent)]
    Port(#[from] NoPort),
    /// A volume is not where its path says.
    #[error(
        "volume `{path}` is really `{real}` of the host, which no app may mount: remove the symlink, or name a directory that lies where apps may have them"
    )]
    Mount {
        /// As the spec names it.
        path: String,
        /// Where it leads.
        real: String,
    },
    /// The instance is not as it was when the step was planned.
    #[error("{0} has no address any more")]
    Gone(InstanceKey),
}

impl StepError {
    /// Whether trying again can help without a person.
    pub fn is_temporary(&self) -> bool {
        match self {
            Self::Docker(e) => e.is_temporary(),
            Self::Nginx(NginxError::NoAnswer(_)) => false,
            _ => true,
        }
    }

    /// Whether a container could not be made since its image is gone.
    pub fn is_image_gone(&self) -> bool {
        matches!(self, Self::Docker(e) if e.is_image_gone())
    }

    /// Every kind.
    pub const KINDS: [&'static str; 8] =
        ["docker_unreachable", "docker", "image", "disk_full", "file", "nginx", "port", "gone"];

    /// The kind: a bounded set, for metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Docker(DockerError::Unreachable { .. }) => "docker_unreachable",
            Self::Docker(e) if e.is_full() => "disk_full",
            Self::Docker(DockerError::Image { .. }) => "image",
            Self::Docker(_) => "docker",
            Self::File(e) if e.is_full() => "disk_full",
            Self::File(_) | Self::Mount { .. } => "file",
            Self::Nginx(_) => "nginx",
            Self::Port(_) => "port",
            Self::Gone(_) => "gone",
        }
    }
}

impl World {
    /// Does a step for an app, on what was observed of it.
    ///
    /// # Errors
    /// If it could not be done; it may be tried again.
    pub async fn perform(&self, app: &AppName, step: &Step, observed: &ObservedApp) -> Result<(), StepError> {
        match step {
            Step::Pull(image) => Ok(self.docker.pull(image).await?),
            Step::WriteEnvFile(release) => self.write_env_file(app, release),
            Step::Create { key, release, image, drain, host } => {
                self.create(app, key, release, image, (*drain, host.as_deref())).await
            }
            Step::Start(handle) => self.start(app, handle, observed).await,
            Step::ClearSocket(handle) => {
                for path in sockets(observed, &handle.key)? {
                    files::remove_file(Path::new(&path))?;
                }
                Ok(())
            }
            Step::Switch(slots) => self.switch(app, slots, observed),
            Step::Prove { release, ingress, check } => {
                let instance = observed.instances.iter().find(|i| i.key.release == *release && i.health.is_healthy());
                for proof in ingress.iter().flat_map(|ingress| Proof::all(ingress, check)) {
                    let several = instance.filter(|i| !i.more.is_empty()).map(|_| &proof.endpoint);
                    let address = instance.and_then(|i| i.address_of(several));
                    self.nginx.ask_app(&proof, address).await?;
                }
                self.private_dir(&self.layout.state().join("proven"))?;
                Ok(files::write(&self.layout.proven(app), release.as_str().as_bytes(), 0o644)?)
            }
            Step::Settle(handle) => Ok(self.docker.settle(&handle.id).await?),
            Step::Stop { handle, grace } => self.stop(handle, *grace, observed).await,
            Step::Remove(handle) => self.remove(app, handle, observed).await,
            Step::Discard { handle, .. } => {
                let grace = observed.instances.iter().find(|i| i.id == handle.id).map_or(GRACE, |i| i.grace);
                self.stop(handle, grace, observed).await?;
                failpoint::boundary("stopped");
                self.remove(app, handle, observed).await
            }
            Step::RecordVerdict { handle, release, cause, exit_code, attempts, conditions } => {
                let verdict = Verdict {
                    release: handle.key.release.clone(),
                    cause: bounded(cause.as_str(), MOST_CAUSE),
                    exit_code: *exit_code,
                    log_tail: tail(&redact(self.docker.log_tail(&handle.id).await, release)).to_owned(),
                    at: Timestamp::now(),
                    attempts: *attempts,
                    conditions: conditions.clone(),
                };
                self.private_dir(&self.layout.verdicts(app))?;
                let text = serde_json::to_vec_pretty(&verdict).unwrap_or_default();
                Ok(files::write(&self.layout.verdict(app, &handle.key.release), &text, 0o600)?)
            }
            Step::CleanUp(left) => Ok(self.clean_up(app, left)?),
        }
    }

    fn private_dir(&self, path: &Path) -> Result<(), FileError> {
        files::make_dir(path, 0o700)
    }

    fn write_env_file(&self, app: &AppName, release: &Release) -> Result<(), StepError> {
        let path = self.layout.env_file(app, &release.id);
        let key = InstanceKey { release: release.id.clone(), number: 1 };
        let given = release.env.iter().map(|(k, v)| (k.as_str().to_owned(), v.expose().to_owned()));
        // The number of a replica is not the release's.
        let added = facts(app, &key, self.host.as_str()).filter(|(k, _)| *k != "DEMAE_REPLICA");
        let all: Vec<(String, String)> = given.chain(added.map(|(k, v)| (k.to_owned(), v))).collect();
        let text = env::env_file(all.iter().map(|(k, v)| (k.as_str(), v.as_str())));
        for dir in [self.layout.run().join("env"), self.layout.app_env(app)] {
            self.private_dir(&dir)?;
        }
        if let Some(dir) = path.parent() {
            self.private_dir(dir)?;
        }
        Ok(files::write(&path, text.as_bytes(), 0o600)?)
    }

    async fn create(
        &self,
        app: &AppName,
        key: &InstanceKey,
        release: &Release,
        image: &str,
        (drain, check_host): (Duration, Option<&str>),
    ) -> Result<(), StepError> {
        let (mut socket_dir, mut port, mut more_ports) = (None, None, Vec::new());
        match &release.endpoint {
            Some(Endpoint::Socket(_)) => {
                let dir = self.layout.socket_dir(app, key);
                self.make_socket_dir(app, &dir)?;
                socket_dir = Some(dir.to_string_lossy().into_owned());
            }
            Some(Endpoint::Port(_)) => {
                let taken: HashSet<u16> = self.docker.list(None).await?.into_iter().flat_map(|l| l.ports).collect();
                let take = |number: usize| self.ports.take(&format!("{}.{app}.{key}.{number}", self.host), &taken);
                port = Some(take(0)?);
                for number in 1..=release.more_endpoints.len() {
                    more_ports.push(take(number)?);
                }
            }
            None => {}
        }
        check_mounts(&release.container)?;
        failpoint::boundary("prepared");
        let socket_dir = socket_dir.as_deref();
        let more_ports = more_ports.as_slice();
        let request = CreateRequest { app, key, release, image, socket_dir, port, more_ports, drain, check_host };
        self.docker.create(&request).await?;
        Ok(())
    }

    async fn start(&self, app: &AppName, handle: &Handle, observed: &ObservedApp) -> Result<(), StepError> {
        let address = observed.instances.iter().find(|i| i.id == handle.id).and_then(|i| i.address.clone());
        if matches!(address, Some(Address::Socket(_))) {
            self.expect(app, &handle.id, observed).await;
            self.open_socket_dir(app, handle).await?;
            // A dead socket would keep the app from binding its own. One that is listened on belongs to a paused app, and
            // its queue may be full: whoever waits for room there waits for the very start that comes next.
            for path in sockets(observed, &handle.key)? {
                if is_dead(Path::new(&path)) {
                    files::remove_file(Path::new(&path))?;
                }
            }
        }
        match self.docker.start(&handle.id).await {
            Err(e) if e.is_port_taken() => {
                // The port is in its body, so the container must be made anew, with another one. The next plan removes it.
                let instance = observed.instances.iter().find(|i| i.id == handle.id);
                for address in instance.into_iter().flat_map(Instance::addresses) {
                    if let Address::Port(port) = address {
                        self.ports.rest(*port);
                    }
                }
                Err(e.into())
            }
            other => Ok(other?),
        }
    }

    /// The directory of a socket, closed, in directories that a group may be let into. What is there already is left as it
    /// is: requests to other instances pass through it, to be closed for a moment is enough to lose one.
    fn make_socket_dir(&self, app: &AppName, dir: &Path) -> Result<(), FileError> {
        for dir in [&*self.layout.sockets(), &*self.layout.app_sockets(app), dir] {
            if !dir.is_dir() {
                files::make_dir(dir, 0o700)?;
            }
        }
        Ok(())
    }

    /// The directory of a socket: the container's user may write in it, nginx's group may pass, nobody else may.
    async fn open_socket_dir(&self, app: &AppName, handle: &Handle) -> Result<(), StepError> {
        let dir = self.layout.socket_dir(app, &handle.key);
        let group = if rustix::process::geteuid().is_root() { self.nginx.group().await } else { None };
        self.make_socket_dir(app, &dir)?;
        // While nginx is away, what is open to it stays open.
        if group.is_some() {
            for above in [self.layout.sockets(), self.layout.app_sockets(app)] {
                files::hand_over(&above, None, group, 0o750)?;
            }
        }
        match (self.docker.user_of(&handle.id).await?, group) {
            (Some(user), Some(group)) => files::hand_over(&dir, Some(user), Some(group), 0o2750)?,
            // A user known only by name inside the image, or an nginx that is nobody else than the agent: whoever else is on
            // this host does not get through the directories above.
            (None, Some(group)) => files::hand_over(&dir, None, Some(group), 0o2777)?,
            (_, None) => files::make_dir(&dir, 0o777)?,
        }
        Ok(())
    }

    fn switch(
        &self,
        app: &AppName,
        slots: &std::collections::BTreeMap<u16, InstanceKey>,
        observed: &ObservedApp,
    ) -> Result<(), StepError> {
        let dir = self.layout.app_routes(app);
        files::make_dir(&self.layout.routes(), 0o755)?;
        files::make_dir(&dir, 0o755)?;
        let mut kept = HashSet::new();
        for (slot, key) in slots {
            let sockets = sockets(observed, key)?;
            let alone = self.layout.route(app, *slot);
            // nginx knows the release before this one: a way that led to a socket leads to the one of that name.
            let before = files::read_link(&alone)?;
            let same = |socket: &&String| before.as_ref().and_then(|b| b.file_name()) == Path::new(socket).file_name();
            let first = sockets.iter().find(same).or(sockets.first()).cloned();
            let named = sockets.iter().map(|socket| (self.layout.route_named(app, *slot, Path::new(socket)), socket));
            let named = named.filter(|(link, _)| sockets.len() > 1 || link.is_symlink());
            for (link, target) in first.iter().map(|socket| (alone.clone(), socket)).chain(named) {
                // Renaming what is right already would move the beginning of the drain.
                if files::read_link(&link)?.as_deref() != Some(Path::new(target)) {
                    files::symlink(Path::new(target), &link)?;
                }
                kept.insert(link);
            }
        }
        for name in files::list(&dir)? {
            let link = dir.join(&name);
            // A socket that only the release before has is asked until nginx knows of this one.
            let slot = name.split_once('@').and_then(|(slot, _)| slot.parse().ok());
            let is_of_before = slot.is_some_and(|slot| slots.contains_key(&slot)) && link.exists();
            if !kept.contains(&link) && !is_of_before {
                files::remove_file(&link)?;
            }
        }
        Ok(())
    }

    async fn stop(&self, handle: &Handle, grace: Duration, observed: &ObservedApp) -> Result<(), StepError> {
        // A candidate may be wanted again before it is removed. Its end must not be taken for its own failure then.
        let is_candidate = observed.proven.as_ref() != Some(&handle.key.release)
            && observed.instances.iter().any(|i| i.id == handle.id && !i.settled && !i.leaving);
        if is_candidate {
            self.docker.mark_leaving(&handle.id).await?;
            failpoint::boundary("marked");
        }
        Ok(self.docker.stop(&handle.id, grace).await?)
    }

    async fn remove(&self, app: &AppName, handle: &Handle, observed: &ObservedApp) -> Result<(), StepError> {
        self.docker.remove(&handle.id).await?;
        failpoint::boundary("removed");
        let instance = observed.instances.iter().find(|i| i.id == handle.id);
        for address in instance.into_iter().flat_map(Instance::addresses) {
            match address {
                Address::Port(port) => self.ports.rest(*port),
                Address::Socket(_) => files::remove_dir(&self.layout.socket_dir(app, &handle.key))?,
            }
        }
        Ok(())
    }

    fn clean_up(&self, app: &AppName, left: &Leftovers) -> Result<(), FileError> {
        for release in &left.env_files {
            files::remove_dir(&self.layout.app_env(app).join(release.as_str()))?;
        }
        for key in &left.socket_dirs {
            files::remove_dir(&self.layout.socket_dir(app, key))?;
        }
        for release in &left.verdicts {
            files::remove_file(&self.layout.verdict(app, release))?;
        }
        files::remove_dir_if_empty(&self.layout.verdicts(app));
        if left.everything {
            files::remove_file(&self.layout.proven(app))?;
            for dir in [
                self.layout.app_routes(app),
                self.layout.app_sockets(app),
                self.layout.verdicts(app),
                self.layout.app_env(app),
            ] {
                files::remove_dir(&dir)?;
            }
        }
        Ok(())
    }

    /// Begins to ask an instance that is about to start: a socket can be asked before Docker's call returns. A port cannot:
    /// it has no address of its own before, and a connection that is begun too early costs a second.
    async fn expect(&self, app: &AppName, id: &ContainerId, observed: &ObservedApp) {
        let Some(instance) = observed.instances.iter().find(|i| i.id == *id) else { return };
        if let (Some(prober), Some(address)) = (&self.prober, &instance.address) {
            let group = if rustix::process::geteuid().is_root() { self.nginx.group().await } else { None };
            let question = Question {
                address: address.clone(),
                check: instance.check.clone(),
                started: self.clock.now(),
                restarts: instance.restarts,
                reach: Reach { group, own: None },
                more: more_questions(&instance.more, None, &[]),
                host: host_asked_for(&instance.check, instance.check_host.as_deref()),
            };
            prober.ask(app, id, question);
        }
    }
}

/// Whether nobody listens on a socket that is there. Does not wait.
fn is_dead(socket: &Path) -> bool {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
    let ask = || {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let asking = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&asking, &SocketAddrUnix::new(socket)?)
    };
    ask() == Err(rustix::io::Errno::CONNREFUSED)
}

/// Docker follows symlinks, and an app that may write below a mounted directory can make one there.
fn check_mounts(container: &ContainerSpec) -> Result<(), StepError> {
    for volume in &container.volumes {
        let VolumeSource::Host(path) = &volume.source else { continue };
        // One that is not there is refused by Docker.
        let Ok(real) = std::fs::canonicalize(path) else { continue };
        // Some systems keep these places elsewhere, behind symlinks of their own.
        let mut places = MOUNTABLE.iter().filter_map(|place| std::fs::canonicalize(place).ok());
        let is_socket = real.extension().is_some_and(|e| e == "sock");
        let below = |place: &Path| place.parent().is_some() && real != place && real.starts_with(place);
        if is_socket || !places.any(|place| below(&place)) {
            let real = real.to_string_lossy().into_owned();
            return Err(StepError::Mount { path: path.clone(), real });
        }
    }
    Ok(())
}

/// The sockets of an instance, in the order of the places where it listens.
fn sockets(observed: &ObservedApp, key: &InstanceKey) -> Result<Vec<String>, StepError> {
    let instance = observed.instances.iter().find(|i| i.key == *key);
    let sockets = instance.into_iter().flat_map(Instance::addresses).filter_map(|address| match address {
        Address::Socket(path) => Some(path.clone()),
        Address::Port(_) => None,
    });
    let sockets: Vec<String> = sockets.collect();
    if sockets.is_empty() { Err(StepError::Gone(key.clone())) } else { Ok(sockets) }
}

/// The end of a text, for people.
fn tail(text: &str) -> &str {
    let from = text.len().saturating_sub(LOG_TAIL);
    let from = (from..text.len()).find(|i| text.is_char_boundary(*i)).unwrap_or(text.len());
    text[from..].trim_end()
}

/// Takes the values of the environment out of a text: a program that fails likes to print them.
fn redact(mut text: String, release: &Release) -> String {
    let mut secrets: Vec<&str> =
        release.env.values().flat_map(|v| std::iter::once(v.expose()).chain(v.expose().lines())).collect();
    // Longest first, so that no secret is left in pieces.
    secrets.sort_by_key(|s| std::cmp::Reverse(s.len()));
    for secret in secrets.into_iter().filter(|s| s.len() >= SHORTEST_SECRET) {
        text = text.replace(secret, "***");
    }
    text
}
