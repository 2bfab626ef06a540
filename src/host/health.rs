//! Asks running instances whether they are well, each by its own check, for as long as they run.

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

/// After a success of an instance that is not healthy yet, the next question comes this soon: the second success in a
/// row is meant to catch a program that dies at its first request, not to make a deploy wait.
const CONFIRM: Duration = Duration::from_millis(5);
/// How often it is looked whether a socket is there yet: a look costs a microsecond, and asks nobody.
const LOOK: Duration = Duration::from_millis(2);
/// How often it is looked whether another one took its place.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// Starts that differ by more than this are two, also if Docker does not count them, as it does not count those by hand.
/// It tells them by the wall clock, which is set a little all the time.
const ANOTHER: Duration = Duration::from_secs(1);
/// Longest pause after a failure of an instance in service.
const SUSPECT: Duration = Duration::from_secs(1);

/// Whom to ask, and how.
#[derive(Debug, Clone, PartialEq)]
pub struct Question {
    /// Where.
    pub address: Address,
    /// What.
    pub check: HealthCheck,
    /// When it last started.
    pub started: Timestamp,
    /// How often the engine has started it again.
    pub restarts: u32,
    /// What may change while it is asked.
    pub reach: Reach,
    /// For which host.
    pub host: String,
    /// Where else it must take connections.
    pub more: Vec<More>,
}

/// Another place where an instance listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum More {
    /// A unix socket at this path.
    Socket(String),
    /// An address of its own; nothing while it has none.
    Own(Option<SocketAddr>),
}

/// What is asked of the other places where an instance listens: at its own address, by the ports inside.
pub fn more_questions(addresses: &[Address], ip: Option<IpAddr>, inside: &[u16]) -> Vec<More> {
    let question = |(at, address): (usize, &Address)| match address {
        Address::Socket(path) => More::Socket(path.clone()),
        Address::Port(_) => More::Own(ip.zip(inside.get(at).copied()).map(SocketAddr::from)),
    };
    addresses.iter().enumerate().map(question).collect()
}

/// The host that a check asks for: its own, or that of its app, or as a person at the machine would.
pub fn host_asked_for(check: &HealthCheck, of_app: Option<&str>) -> String {
    check.host.as_deref().or(of_app).unwrap_or("localhost").to_owned()
}

/// How an instance is reached: nginx may come later, or with other workers, and another start may have another address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reach {
    /// The group that must be able to connect to its socket.
    pub group: Option<u32>,
    /// Its own address and port, in its network.
    pub own: Option<SocketAddr>,
}

/// All instances that are being asked.
#[derive(Debug)]
pub struct Prober {
    asked: Mutex<BTreeMap<AppName, HashMap<ContainerId, Asked>>>,
    news: UnboundedSender<AppName>,
    clock: Arc<Clock>,
    tasks: TaskTracker,
}

#[derive(Debug)]
struct Asked {
    health: Arc<Mutex<Health>>,
    question: Question,
    reach: Arc<Mutex<Reach>>,
    more: Arc<Mutex<Vec<More>>>,
    /// Asks before its time.
    hurry: Arc<Notify>,
    task: AbortHandle,
}

impl Drop for Asked {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Prober {
    /// Tells `news` of each app whose health changed.
    pub fn new(news: UnboundedSender<AppName>, clock: Arc<Clock>) -> Self {
        Self { asked: Mutex::default(), news, clock, tasks: TaskTracker::new() }
    }

    /// Asks this instance from now on, and answers with what is known of it.
    pub fn ask(&self, app: &AppName, id: &ContainerId, question: Question) -> Health {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let of_app = asked.entry(app.clone()).or_default();
        if let Some(known) = of_app.get_mut(id)
            && known.question.address == question.address
            && known.question.check == question.check
            && known.question.host == question.host
        {
            // Docker started it anew: its socket is another one, and was not opened to anybody yet.
            let (before, now) = (known.question.started, question.started);
            let apart = now.since(before).max(before.since(now));
            if apart > ANOTHER || known.question.restarts != question.restarts {
                (known.question.started, known.question.restarts) = (question.started, question.restarts);
                known.hurry.notify_one();
            }
            let mut reach = known.reach.lock().unwrap_or_else(PoisonError::into_inner);
            if reach.own != question.reach.own {
                reach.own = question.reach.own;
                known.hurry.notify_one();
            }
            known.more.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&question.more);
            if question.reach.group.is_some() && reach.group != question.reach.group {
                reach.group = question.reach.group;
                if let Address::Socket(path) = &question.address
                    && let Err(e) = open_to_group(Path::new(path), reach.group)
                {
                    tracing::warn!(app = %app, "nginx may not be able to connect: {e}");
                }
            }
            drop(reach);
            return known.health.lock().unwrap_or_else(PoisonError::into_inner).clone();
        }
        let asked = self.begin(app, question, false);
        of_app.insert(id.clone(), asked);
        Health::Unknown
    }

    fn begin(&self, app: &AppName, question: Question, was_healthy: bool) -> Asked {
        let health = Arc::new(Mutex::new(Health::Unknown));
        let reach = Arc::new(Mutex::new(question.reach));
        let more = Arc::new(Mutex::new(question.more.clone()));
        let hurry = Arc::new(Notify::new());
        let asking = Asking {
            app: app.clone(),
            question: question.clone(),
            was_healthy,
            health: health.clone(),
            news: self.news.clone(),
            clock: self.clock.clone(),
            reach: reach.clone(),
            more: more.clone(),
            hurry: hurry.clone(),
        };
        let task = self.tasks.spawn(asking.run()).abort_handle();
        Asked { health, question, reach, more, hurry, task }
    }

    /// Forgets all answers, and asks everybody again at once: the agent stood still, and whoever was healthy then may hang
    /// now; or Docker was away, and nobody could be reached. Who was not healthy yet is given all of its time again: it may have stood still as well.
    pub fn forget(&self) {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        for (app, of_app) in asked.iter_mut() {
            for known in of_app.values_mut() {
                let health = known.health.lock().unwrap_or_else(PoisonError::into_inner).clone();
                let reach = *known.reach.lock().unwrap_or_else(PoisonError::into_inner);
                let was_healthy = matches!(health, Health::Healthy | Health::Unhealthy { .. });
                let started = if was_healthy { known.question.started } else { self.clock.now() };
                *known = self.begin(app, Question { started, reach, ..known.question.clone() }, was_healthy);
            }
        }
    }

    /// Stops asking all instances of an app but these.
    pub fn keep(&self, app: &AppName, ids: &[&ContainerId]) {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(of_app) = asked.get_mut(app) {
            of_app.retain(|id, _| ids.contains(&id));
            if of_app.is_empty() {
                asked.remove(app);
            }
        }
    }
}

/// One instance being asked.
struct Asking {
    app: AppName,
    question: Question,
    /// Whether it was before it was asked.
    was_healthy: bool,
    health: Arc<Mutex<Health>>,
    news: UnboundedSender<AppName>,
    clock: Arc<Clock>,
    reach: Arc<Mutex<Reach>>,
    more: Arc<Mutex<Vec<More>>>,
    hurry: Arc<Notify>,
}

impl Asking {
    async fn run(self) {
        if !matches!(self.question.check.probe, Probe::Http(_) | Probe::Tcp) {
            return self.keep_open().await;
        }
        let check = &self.question.check;
        let (mut successes, mut failures, mut was_healthy) = (0u32, 0u32, self.was_healthy);
        loop {
            let answer = self.ask().await;
            let now = self.clock.now();
            let pause = match answer {
                Ok(()) => {
                    (successes, failures) = (successes + 1, 0);
                    if successes >= check.successes {
                        was_healthy = true;
                        self.tell(Health::Healthy);
                        check.interval
                    } else {
                        CONFIRM.min(check.start_interval)
                    }
                }
                Err(answer) => {
                    (successes, failures) = (0, failures + 1);
                    let late = now >= self.question.started.plus(check.deadline());
                    if failures >= check.retries && (was_healthy || late) {
                        self.tell(Health::Unhealthy { since: now, answer });
                    } else if !was_healthy {
                        self.tell(Health::Starting(answer));
                    }
                    let starting = now < self.question.started.plus(check.start_period);
                    match (was_healthy, starting) {
                        (true, _) => check.interval.min(SUSPECT),
                        (false, true) => check.start_interval,
                        (false, false) => check.interval,
                    }
                }
            };
            self.rest(pause).await;
        }
    }

    /// For an app that Docker asks: only its socket is opened to nginx, whenever it binds one.
    async fn keep_open(&self) {
        let Address::Socket(path) = &self.question.address else { return };
        loop {
            let more = self.more.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let more = more.iter().filter_map(|more| match more {
                More::Socket(path) => Some(path),
                More::Own(_) => None,
            });
            for path in std::iter::once(path).chain(more) {
                if let Err(e) = open_to_group(Path::new(path), self.reach().group) {
                    tracing::warn!(app = %self.app, "nginx may not be able to connect: {e}");
                }
            }
            self.rest(SUSPECT).await;
        }
    }

    /// Pauses; or less, if it was started anew. During a short pause a socket that appears, or takes the place of another
    /// one, ends it too.
    async fn rest(&self, pause: Duration) {
        let end = tokio::time::sleep(pause);
        tokio::pin!(end);
        // The number alone may be that of the one before; opening a socket to a group changes neither.
        let bound = |path: &String| std::fs::symlink_metadata(path).ok().map(|m| (m.ino(), m.mtime(), m.mtime_nsec()));
        let mut watched = match &self.question.address {
            Address::Socket(path) if pause <= SUSPECT => Some((path, bound(path))),
            _ => None,
        };
        let look = if matches!(watched, Some((_, None))) { LOOK } else { LOOK_AGAIN };
        loop {
            tokio::select! {
                () = &mut end => return,
                () = self.hurry.notified() => return,
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

    /// Asks by the check of the app, then whether all other places take connections.
    async fn ask(&self) -> Result<(), String> {
        self.ask_first().await?;
        let (timeout, group) = (self.question.check.timeout, self.reach().group);
        let more = self.more.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for more in more {
            match more {
                More::Socket(path) => {
                    let path = Path::new(&path);
                    files::expect_socket(path).map_err(|e| chain(&e))?;
                    open_to_group(path, group)?;
                    probe::connect_unix(path, timeout).await?;
                }
                More::Own(Some(own)) => probe::connect_tcp(own, timeout).await?,
                More::Own(None) => return Err("it has no address in its network yet".to_owned()),
            }
        }
        Ok(())
    }

    async fn ask_first(&self) -> Result<(), String> {
        let (timeout, host) = (self.question.check.timeout, self.question.host.as_str());
        match (&self.question.address, &self.question.check.probe) {
            (Address::Socket(path), probe) => {
                let path = Path::new(path);
                files::expect_socket(path).map_err(|e| chain(&e))?;
                open_to_group(path, self.reach().group)?;
                match probe {
                    Probe::Http(uri) => self.expect_success(uri, &probe::get_unix(path, host, uri, timeout).await?),
                    _ => probe::connect_unix(path, timeout).await,
                }
            }
            (Address::Port(port), probe) => {
                let address = format!("127.0.0.1:{port}");
                match probe {
                    Probe::Http(uri) => self.expect_success(uri, &probe::get_tcp(&address, host, uri, timeout).await?),
                    _ => match self.reach().own {
                        Some(own) => probe::connect_tcp(own, timeout).await,
                        None => Err("it has no address in its network yet".to_owned()),
                    },
                }
            }
        }
    }

    fn expect_success(&self, uri: &str, answer: &probe::Answer) -> Result<(), String> {
        if (200..400).contains(&answer.status) {
            return Ok(());
        }
        Err(format!("`GET {uri}` for host `{}` is answered with status {}", self.question.host, answer.status))
    }

    fn tell(&self, health: Health) {
        let mut known = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        let same = std::mem::discriminant(&*known) == std::mem::discriminant(&health);
        match (&mut *known, health) {
            // Since when stays; only the last answer is new.
            (Health::Unhealthy { answer, .. }, Health::Unhealthy { answer: new, .. }) => *answer = new,
            (known, health) => *known = health,
        }
        if !same {
            // Nobody listens only when the agent is ending.
            let _ = self.news.send(self.app.clone());
        }
    }
}

/// An app binds its socket with the rights of its own user; nginx's group must be able to connect to it.
fn open_to_group(path: &Path, group: Option<u32>) -> Result<(), String> {
    let Some(group) = group else { return Ok(()) };
    files::open_way_to(path, group).and_then(|()| files::open_socket_to(path, group)).map_err(|e| e.to_string())
}
