//! Performs one step. One match, no decisions: a step carries all it needs, is idempotent, and leaves a trace.

mod create;

use std::{
    collections::{BTreeMap, HashSet},
    net::SocketAddr,
    path::Path,
    time::Duration,
};

use crate::{
    failpoint,
    host::{
        docker::{DockerError, ImageFault, injected_env},
        files::{self, FileError},
        health::{ProbeTarget, Reach, extra_endpoints, host_header},
        nginx::{NginxError, Proof},
        ports::NoPort,
        tcp_routes::{Lead, TcpRouteError},
    },
    model::{
        env,
        name::{AppName, ContainerId},
        observed::{Address, Instance, InstanceKey, ObservedApp, Verdict, Via},
        problem::bounded,
        release::Release,
        spec::Endpoint,
        time::Timestamp,
    },
    plan::{
        simulate::NewContainer,
        step::{Handle, IMAGE_ABSENT, Leftovers, Step},
    },
    world::World,
};

/// Grace period of an instance that is not known.
const DEFAULT_GRACE: Duration = Duration::from_secs(5);
/// Longest cause of a verdict, in bytes: health checks quote responses.
const MAX_CAUSE: usize = 1_000;
/// Longest log tail that is kept as evidence, in bytes.
const LOG_TAIL: usize = 2_000;
/// Shortest value that is redacted from evidence: shorter ones occur in any text.
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
    /// Routes by the kernel's table.
    #[error(transparent)]
    TcpRoute(#[from] TcpRouteError),
    /// A volume's path leads to a place that apps may not mount.
    #[error(
        "volume `{path}` is really `{real}` of the host, which the app may not mount: remove the symlink, or use a directory that it may mount"
    )]
    Mount {
        /// The path in the spec.
        path: String,
        /// The path that it resolves to.
        real: String,
    },
    /// The instance changed since the step was planned.
    #[error("{0} has no address any more")]
    Gone(InstanceKey),
}

impl StepError {
    /// Whether a retry can help without a person.
    pub fn is_temporary(&self) -> bool {
        match self {
            Self::Docker(e) => e.is_temporary(),
            Self::Nginx(NginxError::NoAnswer(_)) => false,
            _ => true,
        }
    }

    /// Whether a container could not be created because its image is missing.
    pub fn is_image_gone(&self) -> bool {
        matches!(self, Self::Docker(e) if e.is_image_gone())
    }

    /// Every kind.
    pub const KINDS: [&'static str; 11] = [
        "docker_unreachable",
        "docker",
        "image",
        IMAGE_ABSENT,
        "disk_full",
        "not_allowed",
        "file",
        "nginx",
        "port",
        "tcp_route",
        "gone",
    ];

    /// The kind: a bounded set, for metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Docker(DockerError::Unreachable { .. }) => "docker_unreachable",
            Self::Docker(e) if e.is_full() => "disk_full",
            Self::Docker(DockerError::Image { fault: ImageFault::Absent, .. }) => IMAGE_ABSENT,
            Self::Docker(DockerError::Image { .. }) => "image",
            Self::Docker(DockerError::NotAllowed(_)) | Self::Mount { .. } => "not_allowed",
            Self::Docker(_) => "docker",
            Self::File(e) if e.is_full() => "disk_full",
            Self::File(_) => "file",
            Self::Nginx(_) => "nginx",
            Self::Port(_) => "port",
            Self::TcpRoute(_) => "tcp_route",
            Self::Gone(_) => "gone",
        }
    }
}

impl World {
    /// Performs a step for an app, on its last observation. Returns the container that it created.
    ///
    /// # Errors
    /// If it failed; it may be retried.
    pub async fn perform(
        &self,
        app: &AppName,
        step: &Step,
        observed: &ObservedApp,
    ) -> Result<Option<NewContainer>, StepError> {
        let done = match step {
            Step::Pull { image, digest } => Ok(self.images.pull(app, image, digest.as_ref()).await?),
            Step::WriteEnvFile(release) => self.write_env_file(app, release),
            Step::Create { key, release, image, drain, host } => {
                return self.create(app, key, release, image, (*drain, host.as_deref()), observed).await;
            }
            Step::Start(handle) => self.start(app, handle, observed).await,
            Step::ClearSocket(handle) => {
                for path in sockets(observed, &handle.key)? {
                    files::remove_file(Path::new(&path))?;
                }
                Ok(())
            }
            Step::Switch(Via::Symlinks, slots) => self.switch(app, slots, observed),
            Step::Switch(Via::Table, slots) => self.switch_table(app, slots, observed).await,
            Step::Prove { release, ingress, check } => {
                let instance = observed.instances.iter().find(|i| i.key.release == *release && i.health.is_healthy());
                for proof in ingress.iter().flat_map(|ingress| Proof::all(ingress, check)) {
                    let several = instance.filter(|i| !i.more.is_empty()).map(|_| &proof.endpoint);
                    let address = instance.and_then(|i| i.address_of(several));
                    self.nginx.probe_app(&proof, address).await?;
                }
                self.private_dir(&self.layout.state().join("proven"))?;
                Ok(files::write(&self.layout.proven(app), release.as_str().as_bytes(), 0o644)?)
            }
            Step::Settle(handle) => Ok(self.docker.settle(&handle.id).await?),
            Step::Stop { handle, grace } => self.stop(handle, *grace, observed).await,
            Step::Remove(handle) => self.remove(app, handle, observed).await,
            Step::Discard { handle, .. } => {
                let grace = observed.instances.iter().find(|i| i.id == handle.id).map_or(DEFAULT_GRACE, |i| i.grace);
                self.stop(handle, grace, observed).await?;
                failpoint::boundary("stopped");
                self.remove(app, handle, observed).await
            }
            Step::RecordVerdict { handle, release, cause, exit_code, attempts, conditions } => {
                let log_tail = match handle {
                    Some(handle) => evidence(self.docker.log_tail(&handle.id).await, release),
                    None => String::new(),
                };
                let verdict = Verdict {
                    release: release.id.clone(),
                    cause: bounded(cause.as_str(), MAX_CAUSE),
                    exit_code: *exit_code,
                    log_tail,
                    at: Timestamp::now(),
                    attempts: *attempts,
                    conditions: conditions.clone(),
                };
                self.private_dir(&self.layout.verdicts(app))?;
                let text = serde_json::to_vec_pretty(&verdict)
                    .map_err(std::io::Error::other)
                    .map_err(|e| FileError::cannot_write(&self.layout.verdict(app, &release.id), e))?;
                Ok(files::write(&self.layout.verdict(app, &release.id), &text, 0o600)?)
            }
            Step::CleanUp(leftovers) => {
                if leftovers.everything {
                    self.tcp_routes.forget(app).await?;
                }
                Ok(self.clean_up(app, leftovers)?)
            }
        };
        done.map(|()| None)
    }

    fn private_dir(&self, path: &Path) -> Result<(), FileError> {
        files::make_dir(path, 0o700)
    }

    fn write_env_file(&self, app: &AppName, release: &Release) -> Result<(), StepError> {
        let path = self.layout.env_file(app, &release.id);
        let key = InstanceKey { release: release.id.clone(), number: 1 };
        let own = release.env.iter().map(|(k, v)| (k.as_str().to_owned(), v.expose().to_owned()));
        // The replica number is not part of the release.
        let added = injected_env(app, &key, self.host.as_str()).filter(|(k, _)| *k != "DEMAE_REPLICA");
        let all: Vec<(String, String)> = own.chain(added.map(|(k, v)| (k.to_owned(), v))).collect();
        let text = env::env_file(all.iter().map(|(k, v)| (k.as_str(), v.as_str())));
        let own = path.parent().map(Path::to_owned);
        // The run directory does not outlive the machine, so nothing in it is synced.
        for dir in [Some(self.layout.run().join("env")), Some(self.layout.app_env(app)), own].into_iter().flatten() {
            files::make_dir_unsynced(&dir, 0o700)?;
        }
        Ok(files::replace(&path, text.as_bytes(), 0o600)?)
    }

    async fn start(&self, app: &AppName, handle: &Handle, observed: &ObservedApp) -> Result<(), StepError> {
        let instance = observed.instances.iter().find(|i| i.id == handle.id);
        self.check_binds(app, instance.map_or(&[], |i| &i.binds))?;
        let address = instance.and_then(|i| i.address.clone());
        if matches!(address, Some(Address::Socket(_))) {
            self.start_probes(app, &handle.id, observed).await;
            self.open_socket_dir(app, handle).await?;
            // A dead socket would keep the app from binding its own. A socket with a listener belongs to a paused app,
            // whose queue may be full: waiting for room there would wait for the start that comes next.
            for path in sockets(observed, &handle.key)? {
                if is_dead(Path::new(&path)) {
                    files::remove_file(Path::new(&path))?;
                }
            }
        }
        let started = self.docker.start(&handle.id).await;
        if started.is_ok() && matches!(address, Some(Address::Port(_) | Address::Own(_))) {
            self.start_probes(app, &handle.id, observed).await;
        }
        match started {
            Err(e) if e.is_port_taken() => {
                // The port is part of the container, so it must be recreated with another one. The next plan removes
                // it.
                let instance = observed.instances.iter().find(|i| i.id == handle.id);
                for address in instance.into_iter().flat_map(Instance::addresses) {
                    if let Address::Port(port) = address {
                        self.ports.quarantine(*port);
                    }
                }
                Err(e.into())
            }
            other => Ok(other?),
        }
    }

    /// Opens the directory of a socket: the container's user may write to it, nginx's group may pass, no other user
    /// may.
    async fn open_socket_dir(&self, app: &AppName, handle: &Handle) -> Result<(), StepError> {
        let dir = self.layout.socket_dir(app, &handle.key);
        let group = if rustix::process::geteuid().is_root() { self.nginx.group().await } else { None };
        self.make_socket_dir(app, &dir)?;
        // While nginx is down, what is open to it stays open.
        if group.is_some() {
            for above in [self.layout.sockets(), self.layout.app_sockets(app)] {
                files::set_owner(&above, None, group, 0o750)?;
            }
        }
        match (self.docker.user_of(&handle.id).await?, group) {
            (Some(user), Some(group)) => files::set_owner(&dir, Some(user), Some(group), 0o2750)?,
            // The user is known only by name inside the image, or nginx runs as the agent's user: other users of this
            // host do not get through the directories above.
            (None, Some(group)) => files::set_owner(&dir, None, Some(group), 0o2777)?,
            (_, None) => files::make_dir(&dir, 0o777)?,
        }
        Ok(())
    }

    fn switch(
        &self,
        app: &AppName,
        slots: &BTreeMap<u16, InstanceKey>,
        observed: &ObservedApp,
    ) -> Result<(), StepError> {
        let dir = self.layout.app_routes(app);
        files::make_dir(&self.layout.routes(), 0o755)?;
        files::make_dir(&dir, 0o755)?;
        let mut kept = HashSet::new();
        for (slot, key) in slots {
            let sockets = sockets(observed, key)?;
            let slot_link = self.layout.route(app, *slot);
            // nginx still serves the previous release: an upstream with a socket of some name leads to the new socket
            // of that name.
            let previous = files::read_link(&slot_link)?;
            let same =
                |socket: &&String| previous.as_ref().and_then(|p| p.file_name()) == Path::new(socket).file_name();
            let first = sockets.iter().find(same).or(sockets.first()).cloned();
            let named = sockets.iter().map(|socket| (self.layout.route_named(app, *slot, Path::new(socket)), socket));
            let named = named.filter(|(link, _)| sockets.len() > 1 || link.is_symlink());
            for (link, target) in first.iter().map(|socket| (slot_link.clone(), socket)).chain(named) {
                // Replacing a correct link would restart the drain.
                if files::read_link(&link)?.as_deref() != Some(Path::new(target)) {
                    files::symlink(Path::new(target), &link)?;
                }
                kept.insert(link);
            }
        }
        for name in files::list(&dir)? {
            let link = dir.join(&name);
            // A socket that only the previous release has is requested until nginx has loaded the new one.
            let slot = name.split_once('@').and_then(|(slot, _)| slot.parse().ok());
            let is_still_used = slot.is_some_and(|slot| slots.contains_key(&slot)) && link.exists();
            if !kept.contains(&link) && !is_still_used {
                files::remove_file(&link)?;
            }
        }
        Ok(())
    }

    async fn switch_table(
        &self,
        app: &AppName,
        slots: &BTreeMap<u16, InstanceKey>,
        observed: &ObservedApp,
    ) -> Result<(), StepError> {
        let lead = |key: &InstanceKey| {
            let address = observed.instances.iter().find(|i| i.key == *key).and_then(|i| i.address.as_ref());
            match address {
                Some(Address::Own(at)) => Ok(Lead { instance: key.clone(), at: *at }),
                _ => Err(StepError::Gone(key.clone())),
            }
        };
        let leads: BTreeMap<u16, Lead> =
            slots.iter().map(|(slot, key)| Ok((*slot, lead(key)?))).collect::<Result<_, StepError>>()?;
        Ok(self.tcp_routes.switch(app, &leads, &observed.slot_addresses).await?)
    }

    async fn stop(&self, handle: &Handle, grace: Duration, observed: &ObservedApp) -> Result<(), StepError> {
        // A candidate may be wanted again before it is removed. Its exit must not count as its own failure then.
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
                Address::Port(port) => self.ports.quarantine(*port),
                Address::Own(own) => self.tcp_routes.release(*own.ip()).await,
                Address::Socket(_) => files::remove_dir(&self.layout.socket_dir(app, &handle.key))?,
            }
        }
        Ok(())
    }

    fn clean_up(&self, app: &AppName, leftovers: &Leftovers) -> Result<(), FileError> {
        for release in &leftovers.env_files {
            files::remove_dir(&self.layout.app_env(app).join(release.as_str()))?;
        }
        for key in &leftovers.socket_dirs {
            files::remove_dir(&self.layout.socket_dir(app, key))?;
        }
        for release in &leftovers.verdicts {
            files::remove_file(&self.layout.verdict(app, release))?;
        }
        // Else an app that leaves later would leave them behind: there would be nothing to clean up any more.
        for dir in [self.layout.app_env(app), self.layout.app_sockets(app), self.layout.verdicts(app)] {
            files::remove_dir_if_empty(&dir);
        }
        if leftovers.everything {
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

    /// Starts probes of an instance: behind a socket before it is started, since it may answer before Docker's call returns;
    /// behind a port after that, since a connection that is attempted too early costs a second.
    async fn start_probes(&self, app: &AppName, id: &ContainerId, observed: &ObservedApp) {
        let Some(instance) = observed.instances.iter().find(|i| i.id == *id) else { return };
        if let (Some(prober), Some(address)) = (&self.prober, &instance.address) {
            let group = if rustix::process::geteuid().is_root() { self.nginx.group().await } else { None };
            let container_addr = match (address, instance.listens.first()) {
                // A port is probed at the container's own address, which it has once it is started.
                (Address::Port(_), Some(Endpoint::Port(inside))) => match self.docker.address_of(id).await {
                    Ok(Some(ip)) => Some(SocketAddr::new(ip, *inside)),
                    // The next observation will tell.
                    _ => return,
                },
                _ => None,
            };
            let target = ProbeTarget {
                address: address.clone(),
                check: instance.check.clone(),
                started: self.clock.now(),
                restarts: instance.restarts,
                reach: Reach { group, container_addr },
                more: extra_endpoints(&instance.more, None, &[]),
                host: host_header(&instance.check, instance.check_host.as_deref()),
            };
            prober.probe(app, id, target);
        }
    }
}

/// Whether a socket exists without a listener. Does not block.
fn is_dead(socket: &Path) -> bool {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
    let connected = || {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let client = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&client, &SocketAddrUnix::new(socket)?)
    };
    connected() == Err(rustix::io::Errno::CONNREFUSED)
}

/// The sockets of an instance, in the order of its endpoints.
fn sockets(observed: &ObservedApp, key: &InstanceKey) -> Result<Vec<String>, StepError> {
    let instance = observed.instances.iter().find(|i| i.key == *key);
    let sockets = instance.into_iter().flat_map(Instance::addresses).filter_map(|address| match address {
        Address::Socket(path) => Some(path.clone()),
        Address::Port(_) | Address::Own(_) => None,
    });
    let sockets: Vec<String> = sockets.collect();
    if sockets.is_empty() { Err(StepError::Gone(key.clone())) } else { Ok(sockets) }
}

/// The end of a log, without values of the environment.
pub(crate) fn evidence(log: String, release: &Release) -> String {
    tail(&redact(log, release)).to_owned()
}

/// The end of a text.
fn tail(text: &str) -> &str {
    let from = text.len().saturating_sub(LOG_TAIL);
    let from = (from..text.len()).find(|i| text.is_char_boundary(*i)).unwrap_or(text.len());
    text[from..].trim_end()
}

/// Redacts the values of the environment: a failing program likes to print them.
fn redact(mut text: String, release: &Release) -> String {
    let mut secrets: Vec<&str> =
        release.env.values().flat_map(|v| std::iter::once(v.expose()).chain(v.expose().lines())).collect();
    // Longest first, so that no part of a secret is left.
    secrets.sort_by_key(|s| std::cmp::Reverse(s.len()));
    for secret in secrets.into_iter().filter(|s| s.len() >= SHORTEST_SECRET) {
        text = text.replace(secret, "***");
    }
    text
}
