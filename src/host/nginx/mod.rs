//! nginx: rendered, tested as part of the tree it will load, made live by one rename, and proven by a worker's answer.
//!
//! Whenever the agent is killed, the live path leads to a set that passed `nginx -t`.

mod render;
mod server;
mod set;
mod stage;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicI32, AtomicI64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::Mutex;

pub use render::{Neighbours, Profile, Renderer, Settings};
pub use server::{Contained, Local, Server};

use super::{
    clock::Clock,
    files::{self, FileError},
    layout::Layout,
    probe,
    takeover::Takeovers,
};
use crate::{
    failpoint,
    model::{
        name::AppName,
        observed::Address,
        problem::{bounded, chain},
        proxy::{Manifest, ObservedProxy, Vhost},
        spec::{Endpoint, HealthCheck, Ingress, Probe},
        time::Timestamp,
    },
};
use render::PROBE_HOST;
use set::{Parts, Saved, Set, digest_of};
use stage::Tree;

/// Timeout for a worker that answers with a new generation.
const PROOF_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a request to an app through nginx is retried.
const RETRY_PERIOD: Duration = Duration::from_secs(5);
/// After this time nginx has connected to an app, or has answered with an error: `proxy_connect_timeout` of the
/// template is 5 s.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(6);
/// Poll interval while waiting for nginx.
const POLL_INTERVAL: Duration = Duration::from_millis(2);
/// Longest error of nginx that is shown, in bytes.
const MAX_ERROR: usize = 1000;
/// File name of the manifest of a set.
const MANIFEST: &str = "manifest.json";

/// Why nginx does not serve what it should.
#[derive(Debug, thiserror::Error)]
pub enum NginxError {
    /// nginx does not run, or cannot be reached.
    #[error("{0}")]
    NotRunning(String),
    /// nginx's configuration cannot be read, or does not include demae's.
    #[error(transparent)]
    Stage(#[from] stage::StageError),
    /// nginx refuses its configuration even without anything new of demae's.
    #[error("`nginx -t` fails even without anything new of demae's: {0}{hint}", hint = hint(.0))]
    Broken(String),
    /// A built-in template is broken.
    #[error("the configuration of the host cannot be made: {0}")]
    Template(String),
    /// nginx was reloaded, and no worker answers with the new set.
    #[error("nginx was reloaded and no worker answers with generation {generation} after {} s: {last}", PROOF_TIMEOUT.as_secs())]
    NotProven {
        /// The set.
        generation: u64,
        /// The last response.
        last: String,
    },
    /// A file could not be written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The host's templates cannot be read.
    #[error("cannot read the templates of this host, and nothing changes in nginx until that works: {}", chain(.0))]
    Templates(FileError),
    /// nginx gets no response from an app.
    #[error("{0}")]
    NoAnswer(String),
    /// Whether an app answers through nginx is unknown, for a reason that is not the app's.
    #[error("{0}")]
    Inconclusive(String),
}

/// A request to an app through nginx that proves its route.
#[derive(Debug)]
pub struct Proof {
    /// The `Host` header.
    pub host: String,
    /// `GET` of this path.
    pub path: String,
    /// The path that the app receives.
    pub app_path: String,
    /// The endpoint of the app.
    pub endpoint: Endpoint,
    /// Timeout of one request. Longer than nginx takes to find out that it cannot connect.
    pub limit: Duration,
    /// Whether a timeout counts as success: no limit is known for this path.
    pub may_be_slow: bool,
}

impl Proof {
    /// A proof for each ingress of an app.
    pub fn all(ingress: &Ingress, check: &HealthCheck) -> Vec<Self> {
        // The path of the health check is only known to exist at its own endpoint.
        let other = HealthCheck { probe: Probe::Tcp, ..check.clone() };
        let check_of = |way: &Ingress| if way.endpoint == ingress.endpoint { check } else { &other };
        ingress.all().filter_map(|way| Self::of(way, check_of(way))).collect()
    }

    /// Never stricter than the health check: uses its path and limit if it has them, else any path and no limit. `None`
    /// for an app without ingress.
    fn of(ingress: &Ingress, check: &HealthCheck) -> Option<Self> {
        let host = ingress.example_host()?;
        let (asked, may_be_slow) = match &check.probe {
            Probe::Http(path) => (path.as_str(), false),
            _ => ("/", true),
        };
        let (path, app_path, may_be_slow) = match &ingress.path {
            None => (asked.to_owned(), asked, may_be_slow),
            Some(below) if ingress.strip_path => (format!("{below}{asked}"), asked, may_be_slow),
            Some(below) if asked == below.as_str() || asked.starts_with(&format!("{below}/")) => {
                (asked.to_owned(), asked, may_be_slow)
            }
            // The path of the health check is outside of the ingress path.
            Some(below) => (below.to_string(), below.as_str(), true),
        };
        let limit =
            if may_be_slow { CONNECT_TIMEOUT } else { (check.timeout + Duration::from_secs(1)).max(CONNECT_TIMEOUT) };
        let (app_path, endpoint) = (app_path.to_owned(), ingress.endpoint.clone());
        Some(Self { host, path, app_path, endpoint, limit, may_be_slow })
    }
}

/// The status of a request sent straight to the app.
async fn direct_status(proof: &Proof, address: Option<&Address>) -> Option<u16> {
    let (host, path, limit) = (&proof.host, &proof.app_path, proof.limit);
    let answer = match address? {
        Address::Socket(socket) => probe::get_unix(Path::new(socket), host, path, limit).await,
        Address::Port(port) => probe::get_tcp(&format!("127.0.0.1:{port}"), host, path, limit).await,
        Address::Own(own) => probe::get_tcp(&own.to_string(), host, path, limit).await,
    };
    Some(answer.ok()?.status)
}

/// What to do about a common error of nginx.
fn hint(error: &str) -> &'static str {
    if error.contains("duplicate default server") {
        " (another site is the default server: remove it, on Debian `/etc/nginx/sites-enabled/default`, or set `nginx.default_server` to false)"
    } else {
        ""
    }
}

impl From<io::Error> for NginxError {
    fn from(error: io::Error) -> Self {
        Self::NotRunning(error.to_string())
    }
}

/// Where nginx is.
#[derive(Debug, Clone)]
pub struct NginxConfig {
    /// Its main file.
    pub conf: PathBuf,
    /// Its pid file, unless the main file names one.
    pub pid: PathBuf,
    /// Where the agent reaches it, `address:port`.
    pub address: String,
    /// The group of its workers, if it cannot be detected.
    pub group: Option<u32>,
    /// What its configuration contains.
    pub settings: Settings,
}

/// One nginx, and the sets rendered for it.
pub struct Nginx {
    server: Box<dyn Server>,
    config: NginxConfig,
    layout: Layout,
    clock: Arc<Clock>,
    renderer: Mutex<Option<(String, Renderer)>>,
    master: AtomicI32,
    /// The last known group of the workers; negative before the first.
    group: AtomicI64,
}

/// What a publication did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// The new set.
    pub generation: u64,
    /// Whether nginx had to load it.
    pub reloaded: bool,
    /// What nginx refused.
    pub rejected: BTreeMap<AppName, String>,
}

impl Nginx {
    /// Does no I/O.
    pub fn new(server: Box<dyn Server>, config: NginxConfig, layout: Layout, clock: Arc<Clock>) -> Self {
        Self {
            server,
            config,
            layout,
            clock,
            renderer: Mutex::new(None),
            master: AtomicI32::new(0),
            group: AtomicI64::new(-1),
        }
    }

    /// What nginx serves, and what is live on disk.
    pub async fn observe(&self) -> ObservedProxy {
        let (live, published, drifted) = match self.live_set() {
            Ok(Some((saved, drifted))) => {
                (Some(self.with_monotonic_times(saved.manifest)), self.clock.to_monotonic(saved.published), drifted)
            }
            Ok(None) => (None, Timestamp::default(), false),
            Err(e) => {
                return ObservedProxy { error: Some(chain(&e)), unreadable: true, ..ObservedProxy::default() };
            }
        };
        let serving = self.serving().await;
        let (templates, trouble) = match self.read_basis().await {
            Ok(basis) => (basis, None),
            // The basis of the texts is unknown now, so the live set stays.
            Err(e) => (live.as_ref().map(|m| m.templates.clone()).unwrap_or_default(), Some(e.to_string())),
        };
        ObservedProxy {
            live,
            published,
            serving: serving.as_ref().ok().copied(),
            error: trouble.or(serving.err()),
            drifted,
            unreadable: false,
            templates,
            old_workers: self.old_workers().await.ok(),
            workers_since: self.workers_since(published),
            changing: false,
        }
    }

    /// The current basis of all texts, apart from the apps.
    async fn read_basis(&self) -> Result<String, NginxError> {
        let root = self.server.root().await?;
        let tree = set::survey(self, &root)?;
        let takeovers = Takeovers::read(&self.layout)?;
        self.with_renderer(|renderer| self.basis(renderer, &tree, &takeovers)).await
    }

    /// A fingerprint of everything that texts depend on apart from the apps: templates, settings, directives of the
    /// host's own files, and what apps may take over from them.
    fn basis(&self, renderer: &Renderer, tree: &Tree, takeovers: &Takeovers) -> String {
        let settings = tree.settings.keys().map(|name| format!("+{name}"));
        format!("{}{}{}", renderer.fingerprint(), settings.collect::<String>(), takeovers.fingerprint())
    }

    /// A manifest with its times on the monotonic clock.
    fn with_monotonic_times(&self, mut manifest: Manifest) -> Manifest {
        let changed = manifest.changed.values_mut();
        let refused = manifest.rejected.values_mut().map(|r| &mut r.at);
        changed.chain(refused).for_each(|at| *at = self.clock.to_monotonic(*at));
        manifest
    }

    /// Counts workers that serve, or may serve, an older set than the live one.
    ///
    /// # Errors
    /// If nginx does not run.
    pub async fn old_workers(&self) -> Result<usize, NginxError> {
        let published = self.read_manifest()?.map(|saved| saved.published).unwrap_or_default();
        let age = self.clock.now().since(self.clock.to_monotonic(published));
        Ok(server::old_workers(self.master().await?, age)?)
    }

    /// nginx's master process.
    ///
    /// # Errors
    /// If it does not run.
    pub async fn master(&self) -> Result<i32, NginxError> {
        let root = self.server.root().await?;
        let tree = set::survey(self, &root)?;
        let master = self.server.master(tree.pid.as_deref().unwrap_or(&self.config.pid)).await?;
        self.master.store(master, Ordering::Relaxed);
        Ok(master)
    }

    /// Checks that nginx's configuration includes demae's. A running nginx may have been started before that.
    ///
    /// # Errors
    /// If they do not, or cannot be read.
    pub async fn check_include(&self) -> Result<(), NginxError> {
        let root = self.server.root().await?;
        Ok(stage::check_include(&root, &self.config.conf, &self.layout.nginx_live())?)
    }

    /// Since when workers serve the set published at that time, if they do: the start of the oldest such worker, or of
    /// the oldest of all; now if there is none.
    fn workers_since(&self, published: Timestamp) -> Timestamp {
        let now = self.clock.now();
        let oldest = |master| server::oldest_worker(master, now.since(published));
        let age = self.known_master().and_then(oldest).unwrap_or_default();
        Timestamp::from_millis(now.as_millis() - i64::try_from(age.as_millis()).unwrap_or(0))
    }

    /// The version of the binary.
    ///
    /// # Errors
    /// If it cannot be run.
    pub async fn version(&self) -> Result<(u32, u32, u32), NginxError> {
        let (_, text) = self.server.run(vec!["-v".into()]).await?;
        Ok(version(&text))
    }

    /// The last known master process, if it still runs.
    pub fn known_master(&self) -> Option<i32> {
        let pid = self.master.load(Ordering::Relaxed);
        (pid > 0 && server::is_running(pid)).then_some(pid)
    }

    /// The group that may connect to sockets: that of nginx's workers.
    pub async fn group(&self) -> Option<u32> {
        if self.config.group.is_some() {
            return self.config.group;
        }
        let master = match self.known_master() {
            Some(master) => Some(master),
            None => self.master().await.ok(),
        };
        match master.and_then(server::worker_group) {
            Some(group) => {
                self.group.store(i64::from(group), Ordering::Relaxed);
                Some(group)
            }
            // While nginx is down, its next workers are assumed to have the same group.
            None => u32::try_from(self.group.load(Ordering::Relaxed)).ok(),
        }
    }

    /// Publishes a set of vhosts, as far as nginx accepts it, and proves it. A refused vhost is left out, or keeps its
    /// last good text; all others go on.
    ///
    /// # Errors
    /// If nothing could be published, or no worker answers with it.
    pub async fn publish(&self, wanted: &BTreeMap<AppName, Vhost>) -> Result<Published, NginxError> {
        let mut cached = self.renderer.lock().await;
        self.load_renderer(&mut cached).await?;
        let Some((_, renderer)) = cached.as_ref() else { return Err(NginxError::Template("no templates".into())) };
        let live = self.live_set()?;
        let unchanged = live.as_ref().is_some_and(|(_, drifted)| !drifted);
        let saved = live.map(|(saved, _)| saved);
        let old = saved.as_ref().map(|saved| saved.manifest.clone()).unwrap_or_default();
        let last_good = match &saved {
            Some(saved) => set::parts_of(&self.layout.nginx_live(), saved)?,
            None => Parts::new(),
        };
        let served = self.serving().await.ok();
        // Never reuse a number: workers of another set would answer with it.
        let used = self.generations()?.into_iter().chain(served).max().unwrap_or(0);
        let generation = old.generation.max(used) + 1;
        let published = saved.as_ref().map(|saved| self.clock.to_monotonic(saved.published)).unwrap_or_default();
        let is_served = served == Some(old.generation);
        let old_served_since = is_served.then(|| self.clock.wall(self.workers_since(published)));
        let root = self.server.root().await?;
        let tree = set::survey(self, &root)?;
        let takeovers = Takeovers::read(&self.layout)?;
        let lost: BTreeSet<String> = old.own_templates.difference(renderer.present()).cloned().collect();
        let set = Set {
            nginx: self,
            renderer,
            generation,
            old: &old,
            last_good: &last_good,
            root: &root,
            tree: &tree,
            takeovers: &takeovers,
            lost_templates: &lost,
        };
        let selected = set.select(wanted).await?;
        let refusals: BTreeMap<AppName, String> =
            selected.rejected.iter().map(|(app, r)| (app.clone(), r.error.clone())).collect();
        let vhosts = selected.vhosts();
        // A lost template is recorded for as long as an app is served with it.
        let in_use = |name: &String| vhosts.values().flat_map(Vhost::all).any(|v| Renderer::template_of(v) == name);
        let lost = lost.iter().filter(|name| in_use(name)).cloned();
        let manifest = Manifest {
            generation,
            rejected: selected.rejected.clone(),
            templates: self.basis(renderer, &tree, &takeovers),
            own_templates: renderer.own().iter().cloned().chain(lost).collect(),
            vhosts,
            ..Manifest::default()
        };
        if let Some(saved) = saved
            && unchanged
            && selected.matches_digests(&saved.files)
            && manifest.vhosts == old.vhosts
        {
            // Only the refusals or the basis changed: nothing for nginx to load.
            let Manifest { rejected, templates, own_templates, .. } = manifest;
            let manifest = Manifest { rejected, templates, own_templates, ..saved.manifest.clone() };
            self.rewrite_manifest(&Saved { manifest, ..saved })?;
            return Ok(Published { generation: old.generation, reloaded: false, rejected: refusals });
        }
        set.write(&selected, manifest, old_served_since)?;
        files::symlink(&PathBuf::from(format!("{generation}.set")), &self.layout.nginx_live())?;
        self.sweep(generation);
        self.reload_and_prove(generation).await?;
        Ok(Published { generation, reloaded: true, rejected: refusals })
    }

    /// Reloads nginx with the live set, and proves it.
    ///
    /// # Errors
    /// If nginx does not run, or no worker answers with the live set.
    pub async fn reload(&self) -> Result<u64, NginxError> {
        let Some(saved) = self.read_manifest()? else {
            return Err(NginxError::NotRunning("there is no live configuration".into()));
        };
        let generation = saved.manifest.generation;
        let root = self.server.root().await?;
        self.test(&root, &self.layout.nginx_generation(generation)).await?.map_err(NginxError::Broken)?;
        self.reload_and_prove(generation).await?;
        Ok(generation)
    }

    async fn reload_and_prove(&self, generation: u64) -> Result<(), NginxError> {
        let master = self.master().await?;
        let before = server::workers(master)?;
        self.server.reload(master).await?;
        failpoint::boundary("reloaded");
        self.prove(generation).await?;
        // Old workers accept connections for another 100 ms. After this wait every request reaches new ones.
        let until = Instant::now() + PROOF_TIMEOUT;
        while Instant::now() < until && server::workers(master)?.iter().any(|pid| before.contains(pid)) {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        Ok(())
    }

    /// Requests an app through nginx, as a client would, until it answers or the time is over. Any status from the app
    /// will do: its health is probed directly, and a template may have rules in front of it. A 502 or a 504 may come
    /// from nginx or from the app; a direct request to `address` tells which.
    ///
    /// # Errors
    /// [`NginxError::NoAnswer`] if nginx gets no response from the app; any other error is inconclusive.
    pub async fn probe_app(&self, proof: &Proof, address: Option<&Address>) -> Result<(), NginxError> {
        let Proof { host, path, limit, .. } = proof;
        let until = Instant::now() + RETRY_PERIOD;
        // A template may limit the rate of requests.
        let mut pause = Duration::from_millis(10);
        loop {
            let began = Instant::now();
            let error = match probe::get_tcp(&self.config.address, host, path, *limit).await {
                Ok(answer) if answer.unknown_host => {
                    NginxError::Inconclusive(format!("nginx at {} does not know host `{host}`", self.config.address))
                }
                Ok(probe::Answer { status: 502, .. }) if direct_status(proof, address).await == Some(502) => {
                    return Ok(());
                }
                // nginx has connected; its read timeout is shorter than the health check's, or no limit is known.
                Ok(probe::Answer { status: 504, .. })
                    if proof.may_be_slow || direct_status(proof, address).await.is_some() =>
                {
                    return Ok(());
                }
                Ok(answer) if answer.status == 504 => NginxError::Inconclusive(format!(
                    "`GET {path}` for host `{host}` takes longer than nginx waits (status 504)"
                )),
                Ok(answer) if answer.status == 502 => {
                    NginxError::NoAnswer(format!("`GET {path}` for host `{host}` is answered with status 502"))
                }
                Ok(_) => return Ok(()),
                // nginx answers 502 or 504 itself when it cannot connect. So the app has the request and is slow.
                Err(_) if began.elapsed() >= *limit && proof.may_be_slow => return Ok(()),
                Err(e) => NginxError::Inconclusive(format!(
                    "`GET {path}` for host `{host}` through nginx at {}: {e}",
                    self.config.address
                )),
            };
            if Instant::now() >= until {
                // If nginx answers no request at all, nothing is known about the app.
                return Err(match self.serving().await {
                    Ok(_) => error,
                    Err(e) => NginxError::NotRunning(e),
                });
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(500));
        }
    }

    /// The generation that a worker answers with.
    async fn serving(&self) -> Result<u64, String> {
        let answer = probe::get_tcp(&self.config.address, PROBE_HOST, "/", Duration::from_secs(2)).await;
        let answer = answer.map_err(|e| format!("nginx at {}: {e}", self.config.address))?;
        let number = answer.body.strip_prefix("generation ").and_then(|n| n.trim().parse().ok());
        number.ok_or_else(|| format!("nginx at {} does not serve demae's files", self.config.address))
    }

    /// Old workers accept connections for a moment after a reload: a response of an old one proves nothing, one of a
    /// new one is proof.
    async fn prove(&self, generation: u64) -> Result<(), NginxError> {
        let until = Instant::now() + PROOF_TIMEOUT;
        loop {
            let last = match self.serving().await {
                Ok(found) if found == generation => return Ok(()),
                Ok(found) => format!("it answers with generation {found}"),
                Err(e) => e,
            };
            if Instant::now() >= until {
                return Err(NginxError::NotProven { generation, last });
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// Rewrites the manifest of the live set. Its other files stay as they are.
    fn rewrite_manifest(&self, saved: &Saved) -> Result<(), NginxError> {
        let json = serde_json::to_vec_pretty(saved).map_err(|e| NginxError::Template(e.to_string()))?;
        Ok(files::write(&self.layout.nginx_live().join(MANIFEST), &json, 0o644)?)
    }

    /// The manifest of the live set.
    fn read_manifest(&self) -> Result<Option<Saved>, FileError> {
        let path = self.layout.nginx_live().join(MANIFEST);
        let Some(text) = files::read(&path)? else { return Ok(None) };
        serde_json::from_slice(&text).map(Some).map_err(|e| FileError::not_ours(&path, e.into()))
    }

    /// The manifest of the live set, and whether its files drifted.
    fn live_set(&self) -> Result<Option<(Saved, bool)>, FileError> {
        let live = self.layout.nginx_live();
        let Some(saved) = self.read_manifest()? else { return Ok(None) };
        let mut drifted = false;
        for (file, digest) in &saved.files {
            drifted |= files::read(&live.join(file))?.map(|t| digest_of(&t)).as_ref() != Some(digest);
        }
        let expected = saved.files.keys().cloned().chain([MANIFEST.to_owned()]).count();
        drifted |= files::list(&live)?.len() != expected;
        Ok(Some((saved, drifted)))
    }

    /// Runs `nginx -t` on nginx's own tree with a set in place of the live one: its warnings, or its error.
    async fn test(&self, root: &Path, set: &Path) -> Result<Result<Vec<String>, String>, NginxError> {
        let test = self.layout.nginx_test();
        let (main, _) = stage::stage(root, &self.config.conf, &self.layout.nginx_live(), set, &test)?;
        let (ok, text) =
            self.server.run(vec!["-t".into(), "-q".into(), "-c".into(), main.display().to_string()]).await?;
        files::remove_dir(&test)?;
        let warnings = || text.lines().filter(|line| line.contains("[warn]")).map(str::to_owned).collect();
        Ok(if ok { Ok(warnings()) } else { Err(error_line(&text)) })
    }

    async fn with_renderer<T>(&self, read: impl FnOnce(&Renderer) -> T) -> Result<T, NginxError> {
        let mut cached = self.renderer.lock().await;
        self.load_renderer(&mut cached).await?;
        cached.as_ref().map(|(_, r)| read(r)).ok_or_else(|| NginxError::Template("no templates".into()))
    }

    /// Reloads templates and version if either may have changed: nginx was restarted, or a file was written.
    async fn load_renderer(&self, cached: &mut Option<(String, Renderer)>) -> Result<(), NginxError> {
        let templates = self.config.settings.templates.as_deref();
        let mtimes = templates.map(mtimes).transpose().map_err(NginxError::Templates)?;
        let state = format!("{:?} {mtimes:?}", self.known_master());
        if cached.as_ref().is_none_or(|(known, _)| *known != state) {
            let (_, text) = self.server.run(vec!["-v".into()]).await?;
            let renderer = Renderer::new(self.config.settings.clone(), version(&text));
            *cached = Some((state, renderer.map_err(NginxError::Templates)?));
        }
        Ok(())
    }

    /// The generations of all sets on disk.
    fn generations(&self) -> Result<Vec<u64>, FileError> {
        let names = files::list(&self.layout.nginx())?;
        Ok(names.iter().filter_map(|name| name.strip_suffix(".set")?.parse().ok()).collect())
    }

    /// Removes all sets except the live and the previous one.
    fn sweep(&self, generation: u64) {
        // What is left behind is swept the next time.
        for name in files::list(&self.layout.nginx()).into_iter().flatten() {
            let number = name.strip_suffix(".set").and_then(|n| n.parse::<u64>().ok());
            if number.is_some_and(|n| n + 1 < generation || n > generation)
                && let Err(e) = files::remove_dir(&self.layout.nginx().join(&name))
            {
                tracing::warn!("{e}");
            }
        }
    }
}

/// The files of a directory with their mtimes; `None` if one cannot be read, which is reported when it is read.
fn mtimes(dir: &Path) -> Result<Vec<(String, Option<Timestamp>)>, FileError> {
    let written =
        |name: &String| std::fs::metadata(dir.join(name)).and_then(|m| m.modified()).map(Timestamp::from_system);
    Ok(files::list(dir)?.into_iter().map(|name| (name.clone(), written(&name).ok())).collect())
}

/// The error line in the output of `nginx -t`.
fn error_line(text: &str) -> String {
    let line = text.lines().find(|l| l.contains("[emerg]")).or_else(|| text.lines().find(|l| !l.trim().is_empty()));
    let line = line.unwrap_or("no output").trim();
    // Some lines carry the time and the process: `2026/01/31 12:00:00 [emerg] 1#1: what it is about`.
    match line.split_once("[emerg]") {
        Some((_, rest)) => {
            let rest = rest.trim();
            let numbered = rest.split_once(": ").filter(|(n, _)| n.bytes().all(|b| b.is_ascii_digit() || b == b'#'));
            bounded(format!("[emerg] {}", numbered.map_or(rest, |(_, text)| text)), MAX_ERROR)
        }
        None => bounded(line.strip_prefix("nginx: ").unwrap_or(line), MAX_ERROR),
    }
}

/// Parses `nginx version: nginx/1.22.1`; zeros if it cannot be parsed.
fn version(text: &str) -> (u32, u32, u32) {
    let numbers = text.split("nginx/").nth(1).unwrap_or_default();
    let mut parts = numbers.split(|c: char| !c.is_ascii_digit()).map(|p| p.parse().unwrap_or(0));
    let mut next = || parts.next().unwrap_or(0);
    (next(), next(), next())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_errors_are_read() {
        assert_eq!(version("nginx version: nginx/1.22.1\n"), (1, 22, 1));
        assert_eq!(version("nginx version: nginx/1.27.4 (Ubuntu)"), (1, 27, 4));
        let text = "nginx: [warn] x\nnginx: [emerg] unknown directive \"y\" in /a:1\nnginx: test failed\n";
        let timed = "2026/11/21 20:01:11 [emerg] 29921#29921: open() failed in /a:1";
        assert_eq!(error_line(timed), "[emerg] open() failed in /a:1");
        assert_eq!(error_line(text), "[emerg] unknown directive \"y\" in /a:1");
    }
}
