//! Health checks: probes each running instance by its own check for as long as it runs.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
    os::unix::fs::MetadataExt as _,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Notify, mpsc::UnboundedSender},
    task::AbortHandle,
};
use tokio_util::task::TaskTracker;

use super::{clock::Clock, files, probe};
use crate::model::{
    name::{AppName, ContainerId},
    observed::{Address, Health},
    problem::chain,
    spec::{HealthCheck, Probe},
    time::Timestamp,
};

/// Delay before the next probe after a success of an instance that is not healthy yet. The second success in a row is
/// meant to catch a program that dies at its first request, not to delay a deploy.
const CONFIRM_INTERVAL: Duration = Duration::from_millis(2);
/// Poll interval for a socket that does not exist yet: one `lstat`, about a microsecond, and no connection.
const APPEAR_POLL: Duration = Duration::from_millis(2);
/// Poll interval for a socket that was replaced.
const REPLACED_POLL: Duration = Duration::from_millis(50);
/// Start times that differ by more than this are different starts, even with an equal restart count: Docker does not
/// count manual restarts. Start times come from the wall clock, which is slewed all the time.
const RESTART_TOLERANCE: Duration = Duration::from_secs(1);
/// Longest probe interval after a failure of an instance in service.
const FAILING_INTERVAL: Duration = Duration::from_secs(1);

/// What to probe, and how.
#[derive(Debug, Clone, PartialEq)]
pub struct ProbeTarget {
    /// The address to probe.
    pub address: Address,
    /// The health check.
    pub check: HealthCheck,
    /// When the instance last started.
    pub started: Timestamp,
    /// Restart count of the engine.
    pub restarts: u32,
    /// What may change while the instance is probed.
    pub reach: Reach,
    /// The `Host` header.
    pub host: String,
    /// Further endpoints that must accept connections.
    pub more: Vec<ExtraEndpoint>,
}

/// A further endpoint of an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExtraEndpoint {
    /// A unix socket at this path.
    Socket(String),
    /// The container's own address; `None` while it has none.
    Tcp(Option<SocketAddr>),
}

/// The further endpoints to probe; ports are probed at the container's own address, by the container port.
pub fn extra_endpoints(addresses: &[Address], ip: Option<IpAddr>, inside: &[u16]) -> Vec<ExtraEndpoint> {
    let endpoint = |(at, address): (usize, &Address)| match address {
        Address::Socket(path) => ExtraEndpoint::Socket(path.clone()),
        Address::Port(_) | Address::Own(_) => ExtraEndpoint::Tcp(ip.zip(inside.get(at).copied()).map(SocketAddr::from)),
    };
    addresses.iter().enumerate().map(endpoint).collect()
}

/// The `Host` header of a check: that of the check, else of the app, else `localhost`.
pub fn host_header(check: &HealthCheck, of_app: Option<&str>) -> String {
    check.host.as_deref().or(of_app).unwrap_or("localhost").to_owned()
}

/// How an instance is reached. nginx may start later, or with other workers, and a restart may change the address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reach {
    /// The group that must be able to connect to its socket.
    pub group: Option<u32>,
    /// The container's own address and port in its network.
    pub container_addr: Option<SocketAddr>,
}

/// All instances under health checks.
#[derive(Debug)]
pub struct Prober {
    handles: Mutex<BTreeMap<AppName, HashMap<ContainerId, ProbeHandle>>>,
    changes: UnboundedSender<AppName>,
    clock: Arc<Clock>,
    tasks: TaskTracker,
}

#[derive(Debug)]
struct ProbeHandle {
    health: Arc<Mutex<Health>>,
    target: ProbeTarget,
    reach: Arc<Mutex<Reach>>,
    more: Arc<Mutex<Vec<ExtraEndpoint>>>,
    /// Triggers the next probe early.
    probe_now: Arc<Notify>,
    task: AbortHandle,
}

impl Drop for ProbeHandle {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Prober {
    /// Sends each app whose health changed to `changes`.
    pub fn new(changes: UnboundedSender<AppName>, clock: Arc<Clock>) -> Self {
        Self { handles: Mutex::default(), changes, clock, tasks: TaskTracker::new() }
    }

    /// Probes this instance from now on; returns its last known health.
    pub fn probe(&self, app: &AppName, id: &ContainerId, target: ProbeTarget) -> Health {
        let mut handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
        let of_app = handles.entry(app.clone()).or_default();
        if let Some(known) = of_app.get_mut(id)
            && known.target.address == target.address
            && known.target.check == target.check
            && known.target.host == target.host
        {
            // Docker restarted it: the socket is a new one, not yet open to nginx's group.
            let (before, now) = (known.target.started, target.started);
            let apart = now.since(before).max(before.since(now));
            if apart > RESTART_TOLERANCE || known.target.restarts != target.restarts {
                (known.target.started, known.target.restarts) = (target.started, target.restarts);
                known.probe_now.notify_one();
            }
            let mut reach = known.reach.lock().unwrap_or_else(PoisonError::into_inner);
            if reach.container_addr != target.reach.container_addr {
                reach.container_addr = target.reach.container_addr;
                known.probe_now.notify_one();
            }
            known.more.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&target.more);
            if target.reach.group.is_some() && reach.group != target.reach.group {
                reach.group = target.reach.group;
                if let Address::Socket(path) = &target.address
                    && let Err(e) = open_to_group(Path::new(path), reach.group)
                {
                    tracing::warn!(app = %app, "nginx may not be able to connect: {e}");
                }
            }
            drop(reach);
            return known.health.lock().unwrap_or_else(PoisonError::into_inner).clone();
        }
        let handle = self.begin(app, target, false);
        of_app.insert(id.clone(), handle);
        Health::Unknown
    }

    /// The last known health of an instance; `None` if it is not probed.
    pub fn health(&self, app: &AppName, id: &ContainerId) -> Option<Health> {
        let handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
        let known = handles.get(app)?.get(id)?;
        Some(known.health.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    fn begin(&self, app: &AppName, target: ProbeTarget, was_healthy: bool) -> ProbeHandle {
        let health = Arc::new(Mutex::new(Health::Unknown));
        let reach = Arc::new(Mutex::new(target.reach));
        let more = Arc::new(Mutex::new(target.more.clone()));
        let probe_now = Arc::new(Notify::new());
        let probe_task = ProbeTask {
            app: app.clone(),
            target: target.clone(),
            was_healthy,
            health: health.clone(),
            changes: self.changes.clone(),
            clock: self.clock.clone(),
            reach: reach.clone(),
            more: more.clone(),
            probe_now: probe_now.clone(),
        };
        let task = self.tasks.spawn(probe_task.run()).abort_handle();
        ProbeHandle { health, target, reach, more, probe_now, task }
    }

    /// Discards all results and probes every instance again at once: after a standstill of the agent a healthy instance
    /// may hang by now, and while Docker was away none could be reached. An instance that was not healthy yet gets its
    /// full deadline again: it may have stood still as well.
    pub fn reset(&self) {
        let mut handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
        for (app, of_app) in handles.iter_mut() {
            for known in of_app.values_mut() {
                let health = known.health.lock().unwrap_or_else(PoisonError::into_inner).clone();
                let reach = *known.reach.lock().unwrap_or_else(PoisonError::into_inner);
                let was_healthy = matches!(health, Health::Healthy | Health::Unhealthy { .. });
                let started = if was_healthy { known.target.started } else { self.clock.now() };
                *known = self.begin(app, ProbeTarget { started, reach, ..known.target.clone() }, was_healthy);
            }
        }
    }

    /// Stops the probes of all instances of an app except these.
    pub fn retain(&self, app: &AppName, ids: &[&ContainerId]) {
        let mut handles = self.handles.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(of_app) = handles.get_mut(app) {
            of_app.retain(|id, _| ids.contains(&id));
            if of_app.is_empty() {
                handles.remove(app);
            }
        }
    }
}

/// The probe loop of one instance.
struct ProbeTask {
    app: AppName,
    target: ProbeTarget,
    /// Whether it was healthy before this loop began.
    was_healthy: bool,
    health: Arc<Mutex<Health>>,
    changes: UnboundedSender<AppName>,
    clock: Arc<Clock>,
    reach: Arc<Mutex<Reach>>,
    more: Arc<Mutex<Vec<ExtraEndpoint>>>,
    probe_now: Arc<Notify>,
}

impl ProbeTask {
    async fn run(self) {
        if !matches!(self.target.check.probe, Probe::Http(_) | Probe::Tcp) {
            return self.keep_sockets_open().await;
        }
        let check = &self.target.check;
        let (mut successes, mut failures, mut was_healthy) = (0u32, 0u32, self.was_healthy);
        loop {
            let answer = self.probe().await;
            let now = self.clock.now();
            let pause = match answer {
                Ok(()) => {
                    (successes, failures) = (successes + 1, 0);
                    if successes >= check.successes {
                        was_healthy = true;
                        self.report(Health::Healthy);
                        check.interval
                    } else {
                        CONFIRM_INTERVAL.min(check.start_interval)
                    }
                }
                Err(answer) => {
                    (successes, failures) = (0, failures + 1);
                    let late = now >= self.target.started.plus(check.deadline());
                    if failures >= check.retries && (was_healthy || late) {
                        self.report(Health::Unhealthy { since: now, answer });
                    } else if !was_healthy {
                        self.report(Health::Starting(answer));
                    }
                    let starting = now < self.target.started.plus(check.start_period);
                    match (was_healthy, starting) {
                        (true, _) => check.interval.min(FAILING_INTERVAL),
                        (false, true) => check.start_interval,
                        (false, false) => check.interval,
                    }
                }
            };
            self.pause(pause).await;
        }
    }

    /// For an app with a check by Docker: only opens its sockets to nginx's group whenever they are bound.
    async fn keep_sockets_open(&self) {
        let Address::Socket(path) = &self.target.address else { return };
        loop {
            let more = self.more.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let more = more.iter().filter_map(|more| match more {
                ExtraEndpoint::Socket(path) => Some(path),
                ExtraEndpoint::Tcp(_) => None,
            });
            for path in std::iter::once(path).chain(more) {
                if let Err(e) = open_to_group(Path::new(path), self.reach().group) {
                    tracing::warn!(app = %self.app, "nginx may not be able to connect: {e}");
                }
            }
            self.pause(FAILING_INTERVAL).await;
        }
    }

    /// Pauses, but returns early after a restart. A short pause also ends when a socket appears or is replaced.
    async fn pause(&self, pause: Duration) {
        let end = tokio::time::sleep(pause);
        tokio::pin!(end);
        // A new socket may reuse the inode number; opening a socket to a group changes neither inode nor mtime.
        let bound = |path: &String| std::fs::symlink_metadata(path).ok().map(|m| (m.ino(), m.mtime(), m.mtime_nsec()));
        let mut watched = match &self.target.address {
            Address::Socket(path) if pause <= FAILING_INTERVAL => Some((path, bound(path))),
            _ => None,
        };
        let look = if matches!(watched, Some((_, None))) { APPEAR_POLL } else { REPLACED_POLL };
        loop {
            tokio::select! {
                () = &mut end => return,
                () = self.probe_now.notified() => return,
                () = tokio::time::sleep(look), if watched.is_some() => {
                    if let Some((path, before)) = &mut watched {
                        let now = bound(path);
                        if now.is_some() && now != *before {
                            return;
                        }
                        *before = now;
                    }
                }
            }
        }
    }

    fn reach(&self) -> Reach {
        *self.reach.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs the app's check, then checks that all further endpoints accept connections.
    async fn probe(&self) -> Result<(), String> {
        self.probe_first().await?;
        let (timeout, group) = (self.target.check.timeout, self.reach().group);
        let more = self.more.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for more in more {
            match more {
                ExtraEndpoint::Socket(path) => {
                    let path = Path::new(&path);
                    files::expect_socket(path).map_err(|e| chain(&e))?;
                    open_to_group(path, group)?;
                    probe::connect_unix(path, timeout).await?;
                }
                ExtraEndpoint::Tcp(Some(own)) => probe::connect_tcp(own, timeout).await?,
                ExtraEndpoint::Tcp(None) => return Err("the container has no address in its network yet".to_owned()),
            }
        }
        Ok(())
    }

    async fn probe_first(&self) -> Result<(), String> {
        let (timeout, host) = (self.target.check.timeout, self.target.host.as_str());
        match (&self.target.address, &self.target.check.probe) {
            (Address::Socket(path), probe) => {
                let path = Path::new(path);
                files::expect_socket(path).map_err(|e| chain(&e))?;
                open_to_group(path, self.reach().group)?;
                match probe {
                    Probe::Http(uri) => self.expect_success(uri, &probe::get_unix(path, host, uri, timeout).await?),
                    _ => probe::connect_unix(path, timeout).await,
                }
            }
            (Address::Own(own), Probe::Http(uri)) => {
                self.expect_success(uri, &probe::get_tcp(&own.to_string(), host, uri, timeout).await?)
            }
            (Address::Own(own), _) => probe::connect_tcp((*own).into(), timeout).await,
            (Address::Port(port), probe) => {
                let address = format!("127.0.0.1:{port}");
                match probe {
                    Probe::Http(uri) => self.expect_success(uri, &probe::get_tcp(&address, host, uri, timeout).await?),
                    _ => match self.reach().container_addr {
                        Some(own) => probe::connect_tcp(own, timeout).await,
                        None => Err("the container has no address in its network yet".to_owned()),
                    },
                }
            }
        }
    }

    fn expect_success(&self, uri: &str, answer: &probe::Answer) -> Result<(), String> {
        if (200..400).contains(&answer.status) {
            return Ok(());
        }
        Err(format!("`GET {uri}` for host `{}` is answered with status {}", self.target.host, answer.status))
    }

    fn report(&self, health: Health) {
        let mut known = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        let same = std::mem::discriminant(&*known) == std::mem::discriminant(&health);
        match (&mut *known, health) {
            // Keep `since`; update only the last answer.
            (Health::Unhealthy { answer, .. }, Health::Unhealthy { answer: new, .. }) => *answer = new,
            (known, health) => *known = health,
        }
        if !same {
            // The receiver is gone only when the agent is ending.
            let _ = self.changes.send(self.app.clone());
        }
    }
}

/// Opens a socket to nginx's group: the app binds it with its own user's umask.
fn open_to_group(path: &Path, group: Option<u32>) -> Result<(), String> {
    let Some(group) = group else { return Ok(()) };
    files::open_path_to(path, group).and_then(|()| files::open_socket_to(path, group)).map_err(|e| e.to_string())
}
