//! nginx: rendered, tested as part of the tree it will load, made live by one rename, and proven by a worker's answer.
//!
//! Whenever this agent ends, what lies at the live path is a set that nginx has taken.

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

/// Longest wait for a worker that answers with a new generation.
const PROOF: Duration = Duration::from_secs(10);
/// How long a question to an app through nginx is repeated.
const REPEATED: Duration = Duration::from_secs(5);
/// After this time nginx has connected to an app, or has said that it cannot: `proxy_connect_timeout` of the template is 5 s.
const CONNECTED: Duration = Duration::from_secs(6);
/// Between two questions to nginx while waiting for it.
const ASK_AGAIN: Duration = Duration::from_millis(2);
/// Most bytes of an error of nginx's that are shown.
const MOST_ERROR: usize = 1000;
/// What the manifest of a set is called.
const MANIFEST: &str = "manifest.json";

/// Why nginx does not serve what it should.
#[derive(Debug, thiserror::Error)]
pub enum NginxError {
    /// nginx does not run, or cannot be reached.
    #[error("{0}")]
    NotRunning(String),
    /// Its own tree cannot be read, or does not include ours.
    #[error(transparent)]
    Stage(#[from] stage::StageError),
    /// It refuses its tree even without anything new of ours.
    #[error("`nginx -t` fails even without anything new of demae's: {0}{hint}", hint = hint(.0))]
    Broken(String),
    /// A template of demae's own is broken.
    #[error("the configuration of the host cannot be made: {0}")]
    Template(String),
    /// It was told to reload, and no worker answers with the new set.
    #[error("nginx was reloaded and no worker answers with generation {generation} after {} s: {last}", PROOF.as_secs())]
    NotProven {
        /// The set.
        generation: u64,
        /// The last answer.
        last: String,
    },
    /// A file could not be written.
    #[error(transparent)]
    File(#[from] FileError),
    /// Whether something is there cannot be told.
    #[error("cannot read the templates of this host, and nothing changes in nginx until that works: {}", chain(.0))]
    Templates(FileError),
    /// nginx gets no answer of an app.
    #[error("{0}")]
    NoAnswer(String),
    /// Whether an app answers through nginx cannot be told, for a reason that is not the app's.
    #[error("{0}")]
    Inconclusive(String),
}

/// A question to an app through nginx.
#[derive(Debug)]
pub struct Proof {
    /// For this host.
    pub host: String,
    /// `GET` of this path.
    pub path: String,
    /// Which path the app is asked for then.
    pub inside: String,
    /// Where it listens for that.
    pub endpoint: Endpoint,
    /// Longest time for one answer. Longer than nginx takes to find out that it cannot connect.
    pub limit: Duration,
    /// Whether an answer that does not come within the limit is as good: nobody said how long this path may take.
    pub may_be_slow: bool,
}

impl Proof {
    /// A question for each way into an app.
    pub fn all(ingress: &Ingress, check: &HealthCheck) -> Vec<Self> {
        // Only where the health check asks, its path is known to be one.
        let other = HealthCheck { probe: Probe::Tcp, ..check.clone() };
        let check_of = |way: &Ingress| if way.endpoint == ingress.endpoint { check } else { &other };
        ingress.all().filter_map(|way| Self::of(way, check_of(way))).collect()
    }

    /// Never stricter than the health check: its path and its limit where it has them, else any path and no limit. Nothing
    /// for an app that takes no requests.
    fn of(ingress: &Ingress, check: &HealthCheck) -> Option<Self> {
        let host = ingress.example_host()?;
        let (asked, may_be_slow) = match &check.probe {
            Probe::Http(path) => (path.as_str(), false),
            _ => ("/", true),
        };
        let (path, inside, may_be_slow) = match &ingress.path {
            None => (asked.to_owned(), asked, may_be_slow),
            Some(below) if ingress.strip_path => (format!("{below}{asked}"), asked, may_be_slow),
            Some(below) if asked == below.as_str() || asked.starts_with(&format!("{below}/")) => {
                (asked.to_owned(), asked, may_be_slow)
            }
            // What is asked of the app itself lies beside what it serves here.
            Some(below) => (below.to_string(), below.as_str(), true),
        };
        let limit = if may_be_slow { CONNECTED } else { (check.timeout + Duration::from_secs(1)).max(CONNECTED) };
        let (inside, endpoint) = (inside.to_owned(), ingress.endpoint.clone());
        Some(Self { host, path, inside, endpoint, limit, may_be_slow })
    }
}

/// What an app answers where it listens.
async fn direct(proof: &Proof, address: Option<&Address>) -> Option<u16> {
    let (host, path, limit) = (&proof.host, &proof.inside, proof.limit);
    let answer = match address? {
        Address::Socket(socket) => probe::get_unix(Path::new(socket), host, path, limit).await,
        Address::Port(port) => probe::get_tcp(&format!("127.0.0.1:{port}"), host, path, limit).await,
    };
    Some(answer.ok()?.status)
}

/// What to do about an error of nginx that many will meet.
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

/// How nginx is found.
#[derive(Debug, Clone)]
pub struct NginxConfig {
    /// Its main file.
    pub conf: PathBuf,
    /// Where its pid file is, unless its main file says.
    pub pid: PathBuf,
    /// Where the agent reaches it, `address:port`.
    pub address: String,
    /// The group its workers run as, if that cannot be seen.
    pub group: Option<u32>,
    /// What is in its text.
    pub settings: Settings,
}

/// One nginx, and the sets that were made for it.
pub struct Nginx {
    server: Box<dyn Server>,
    config: NginxConfig,
    layout: Layout,
    clock: Arc<Clock>,
    renderer: Mutex<Option<(String, Renderer)>>,
    master: AtomicI32,
    /// The group that workers last had; negative before the first.
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
    /// Nothing is done yet.
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

    /// What nginx serves, and what it is meant to.
    pub async fn observe(&self) -> ObservedProxy {
        let (live, published, drifted) = match self.manifest() {
            Ok(Some((saved, drifted))) => {
                (Some(self.timed(saved.manifest)), self.clock.steady(saved.published), drifted)
            }
            Ok(None) => (None, Timestamp::default(), false),
            Err(e) => {
                return ObservedProxy { error: Some(chain(&e)), unreadable: true, ..ObservedProxy::default() };
            }
        };
        let serving = self.serving().await;
        let (templates, trouble) = match self.current_basis().await {
            Ok(basis) => (basis, None),
            // What the texts depend on is not known now, so what is live stays as it is.
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
            workers_since: self.workers_since(),
            changing: false,
        }
    }

    /// What texts would be made with now, beside the apps.
    async fn current_basis(&self) -> Result<String, NginxError> {
        let root = self.server.root().await?;
        let tree = set::survey(self, &root)?;
        self.with_renderer(|renderer| self.basis(renderer, &tree)).await
    }

    /// Stands for everything that texts are made with, beside the apps: templates, settings, and what the host's own files
    /// set already.
    fn basis(&self, renderer: &Renderer, tree: &Tree) -> String {
        let settings = tree.settings.keys().map(|name| format!("+{name}"));
        format!("{}{}", renderer.fingerprint(), settings.collect::<String>())
    }

    /// A manifest with its times by the clock that nobody sets.
    fn timed(&self, mut manifest: Manifest) -> Manifest {
        let changed = manifest.changed.values_mut();
        let refused = manifest.rejected.values_mut().map(|r| &mut r.at);
        changed.chain(refused).for_each(|at| *at = self.clock.steady(*at));
        manifest
    }

    /// Workers that serve, or may serve, an older set than the live one.
    ///
    /// # Errors
    /// If nginx does not run.
    pub async fn old_workers(&self) -> Result<usize, NginxError> {
        let published = self.saved()?.map(|saved| saved.published).unwrap_or_default();
        let age = self.clock.now().since(self.clock.steady(published));
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

    /// Whether nginx's files lead to demae's. One that runs may have been started before that.
    ///
    /// # Errors
    /// If they do not, or cannot be read.
    pub async fn check_include(&self) -> Result<(), NginxError> {
        let root = self.server.root().await?;
        Ok(stage::check_include(&root, &self.config.conf, &self.layout.nginx_live())?)
    }

    /// Since when there are workers that take new requests; now if there are none.
    fn workers_since(&self) -> Timestamp {
        let now = self.clock.now();
        let age = self.known_master().and_then(server::oldest_worker).unwrap_or_default();
        Timestamp::from_millis(now.as_millis() - i64::try_from(age.as_millis()).unwrap_or(0))
    }

    /// The version of the program.
    ///
    /// # Errors
    /// If it cannot be run.
    pub async fn version(&self) -> Result<(u32, u32, u32), NginxError> {
        let (_, text) = self.server.run(vec!["-v".into()]).await?;
        Ok(version(&text))
    }

    /// The master process that was last seen, without looking again.
    pub fn known_master(&self) -> Option<i32> {
        let pid = self.master.load(Ordering::Relaxed);
        (pid > 0 && server::runs(pid)).then_some(pid)
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
            // While it is away, the workers of the next one are taken to have the group of the last one.
            None => u32::try_from(self.group.load(Ordering::Relaxed)).ok(),
        }
    }

    /// Makes a set of vhosts live, as far as nginx takes it, and proves it. A vhost that nginx refuses is left out, or
    /// stays as it was; all others go on.
    ///
    /// # Errors
    /// If nothing could be made live, or no worker answers with it.
    pub async fn publish(&self, wanted: &BTreeMap<AppName, Vhost>) -> Result<Published, NginxError> {
        let mut slot = self.renderer.lock().await;
        self.fill(&mut slot).await?;
        let Some((_, renderer)) = slot.as_ref() else { return Err(NginxError::Template("no templates".into())) };
        let live = self.manifest()?;
        let unchanged = live.as_ref().is_some_and(|(_, drifted)| !drifted);
        let saved = live.map(|(saved, _)| saved);
        let old = saved.as_ref().map(|saved| saved.manifest.clone()).unwrap_or_default();
        let last_good = match &saved {
            Some(saved) => set::parts_of(&self.layout.nginx_live(), saved)?,
            None => Parts::new(),
        };
        let served = self.serving().await.ok();
        // Never a number that was used: workers of another set would answer with it.
        let used = self.sets()?.into_iter().chain(served).max().unwrap_or(0);
        let generation = old.generation.max(used) + 1;
        let old_served_since = (served == Some(old.generation)).then(|| self.clock.wall(self.workers_since()));
        let root = self.server.root().await?;
        let tree = set::survey(self, &root)?;
        let lost: BTreeSet<String> = old.own_templates.difference(renderer.present()).cloned().collect();
        let set = Set {
            nginx: self,
            renderer,
            generation,
            old: &old,
            last_good: &last_good,
            root: &root,
            tree: &tree,
            lost: &lost,
        };
        let chosen = set.choose(wanted).await?;
        let told: BTreeMap<AppName, String> =
            chosen.rejected.iter().map(|(app, r)| (app.clone(), r.error.clone())).collect();
        let vhosts = chosen.vhosts();
        // One that is gone is remembered for as long as anything is served by it.
        let in_use = |name: &String| vhosts.values().flat_map(Vhost::all).any(|v| Renderer::template_of(v) == name);
        let lost = lost.iter().filter(|name| in_use(name)).cloned();
        let manifest = Manifest {
            generation,
            rejected: chosen.rejected.clone(),
            templates: self.basis(renderer, &tree),
            own_templates: renderer.own().iter().cloned().chain(lost).collect(),
            vhosts,
            ..Manifest::default()
        };
        if let Some(saved) = saved
            && unchanged
            && chosen.is_as_in(&saved.files)
            && manifest.vhosts == old.vhosts
        {
            // Only what was refused is new, or how the same text is made: nothing for nginx to load.
            let Manifest { rejected, templates, own_templates, .. } = manifest;
            let manifest = Manifest { rejected, templates, own_templates, ..saved.manifest.clone() };
            self.keep_manifest(&Saved { manifest, ..saved })?;
            return Ok(Published { generation: old.generation, reloaded: false, rejected: told });
        }
        set.write(&chosen, manifest, old_served_since)?;
        files::symlink(&PathBuf::from(format!("{generation}.set")), &self.layout.nginx_live())?;
        self.sweep(generation);
        self.reload_to(generation).await?;
        Ok(Published { generation, reloaded: true, rejected: told })
    }

    /// Tells nginx to load the live set, and proves that it did.
    ///
    /// # Errors
    /// If nginx does not run, or no worker answers with the live set.
    pub async fn reload(&self) -> Result<u64, NginxError> {
        let Some(saved) = self.saved()? else {
            return Err(NginxError::NotRunning("there is no live configuration".into()));
        };
        let generation = saved.manifest.generation;
        let root = self.server.root().await?;
        self.test(&root, &self.layout.nginx_generation(generation)).await?.map_err(NginxError::Broken)?;
        self.reload_to(generation).await?;
        Ok(generation)
    }

    async fn reload_to(&self, generation: u64) -> Result<(), NginxError> {
        let master = self.master().await?;
        let before = server::workers(master)?;
        self.server.reload(master).await?;
        failpoint::boundary("reloaded");
        self.prove(generation).await?;
        // The master lets old workers take connections for another 100 ms. Whoever asks nginx after this asks new ones.
        let until = Instant::now() + PROOF;
        while Instant::now() < until && server::workers(master)?.iter().any(|pid| before.contains(pid)) {
            tokio::time::sleep(ASK_AGAIN).await;
        }
        Ok(())
    }

    /// Asks an app through nginx, as a client would, until it answers or the time is over. Whatever the app says is an
    /// answer: whether it is well is asked of itself, and rules of a template may stand before it here. A 502 or a 504 may
    /// be nginx's or its own; the app, asked at `address`, tells which.
    ///
    /// # Errors
    /// [`NginxError::NoAnswer`] if nginx gets no answer of the app; another one if nothing can be said about the app.
    pub async fn ask_app(&self, proof: &Proof, address: Option<&Address>) -> Result<(), NginxError> {
        let Proof { host, path, limit, .. } = proof;
        let until = Instant::now() + REPEATED;
        // A template may limit the rate of requests.
        let mut pause = Duration::from_millis(10);
        loop {
            let began = Instant::now();
            let error = match probe::get_tcp(&self.config.address, host, path, *limit).await {
                Ok(answer) if answer.unknown_host => {
                    NginxError::Inconclusive(format!("nginx at {} does not know host `{host}`", self.config.address))
                }
                Ok(probe::Answer { status: 502, .. }) if direct(proof, address).await == Some(502) => return Ok(()),
                // nginx has connected, and waits for less long than the health check does, or than anybody said.
                Ok(probe::Answer { status: 504, .. })
                    if proof.may_be_slow || direct(proof, address).await.is_some() =>
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
                // nginx answers 502 or 504 itself when it cannot connect. So the app has the request, and takes its time.
                Err(_) if began.elapsed() >= *limit && proof.may_be_slow => return Ok(()),
                Err(e) => NginxError::Inconclusive(format!(
                    "`GET {path}` for host `{host}` through nginx at {}: {e}",
                    self.config.address
                )),
            };
            if Instant::now() >= until {
                // An nginx that answers nobody says nothing about the app.
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

    /// After the reload old workers keep taking connections for a moment, so one answer of an old one proves nothing,
    /// and one of a new one everything.
    async fn prove(&self, generation: u64) -> Result<(), NginxError> {
        let until = Instant::now() + PROOF;
        loop {
            let last = match self.serving().await {
                Ok(found) if found == generation => return Ok(()),
                Ok(found) => format!("it answers with generation {found}"),
                Err(e) => e,
            };
            if Instant::now() >= until {
                return Err(NginxError::NotProven { generation, last });
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }

    /// Writes what the live set says of itself anew. Its files stay as they are.
    fn keep_manifest(&self, saved: &Saved) -> Result<(), NginxError> {
        let json = serde_json::to_vec_pretty(saved).map_err(|e| NginxError::Template(e.to_string()))?;
        Ok(files::write(&self.layout.nginx_live().join(MANIFEST), &json, 0o644)?)
    }

    /// What the live set says of itself.
    fn saved(&self) -> Result<Option<Saved>, FileError> {
        let path = self.layout.nginx_live().join(MANIFEST);
        let Some(text) = files::read(&path)? else { return Ok(None) };
        serde_json::from_slice(&text).map(Some).map_err(|e| FileError::not_ours(&path, e.into()))
    }

    /// The live set, and whether its files are not as they were written.
    fn manifest(&self) -> Result<Option<(Saved, bool)>, FileError> {
        let live = self.layout.nginx_live();
        let Some(saved) = self.saved()? else { return Ok(None) };
        let mut drifted = false;
        for (file, digest) in &saved.files {
            drifted |= files::read(&live.join(file))?.map(|t| digest_of(&t)).as_ref() != Some(digest);
        }
        let expected = saved.files.keys().cloned().chain([MANIFEST.to_owned()]).count();
        drifted |= files::list(&live)?.len() != expected;
        Ok(Some((saved, drifted)))
    }

    /// Runs `nginx -t` on nginx's own tree with a set in the place of the live one: what it warns of, or why it refuses it.
    async fn test(&self, root: &Path, set: &Path) -> Result<Result<Vec<String>, String>, NginxError> {
        let test = self.layout.nginx_test();
        let (main, _) = stage::stage(root, &self.config.conf, &self.layout.nginx_live(), set, &test)?;
        let (fine, text) =
            self.server.run(vec!["-t".into(), "-q".into(), "-c".into(), main.display().to_string()]).await?;
        files::remove_dir(&test)?;
        let warnings = || text.lines().filter(|line| line.contains("[warn]")).map(str::to_owned).collect();
        Ok(if fine { Ok(warnings()) } else { Err(emergency(&text)) })
    }

    async fn with_renderer<T>(&self, read: impl FnOnce(&Renderer) -> T) -> Result<T, NginxError> {
        let mut slot = self.renderer.lock().await;
        self.fill(&mut slot).await?;
        slot.as_ref().map(|(_, r)| read(r)).ok_or_else(|| NginxError::Template("no templates".into()))
    }

    /// Reads templates and version again if either may have changed: nginx was started anew, or a file was.
    async fn fill(&self, slot: &mut Option<(String, Renderer)>) -> Result<(), NginxError> {
        let templates = self.config.settings.templates.as_deref();
        let changes = templates.map(changes).transpose().map_err(NginxError::Templates)?;
        let state = format!("{:?} {changes:?}", self.known_master());
        if slot.as_ref().is_none_or(|(known, _)| *known != state) {
            let (_, text) = self.server.run(vec!["-v".into()]).await?;
            let renderer = Renderer::new(self.config.settings.clone(), version(&text));
            *slot = Some((state, renderer.map_err(NginxError::Templates)?));
        }
        Ok(())
    }

    /// The numbers of all sets on disk.
    fn sets(&self) -> Result<Vec<u64>, FileError> {
        let names = files::list(&self.layout.nginx())?;
        Ok(names.iter().filter_map(|name| name.strip_suffix(".set")?.parse().ok()).collect())
    }

    /// Removes sets that are neither live nor the one before.
    fn sweep(&self, generation: u64) {
        for name in files::list(&self.layout.nginx()).unwrap_or_default() {
            let number = name.strip_suffix(".set").and_then(|n| n.parse::<u64>().ok());
            if number.is_some_and(|n| n + 1 < generation || n > generation)
                && let Err(e) = files::remove_dir(&self.layout.nginx().join(&name))
            {
                tracing::warn!("{e}");
            }
        }
    }
}

/// The files of a directory, and when each was written; nothing where one cannot be looked at, which is told when it is
/// read.
fn changes(dir: &Path) -> Result<Vec<(String, Option<Timestamp>)>, FileError> {
    let written =
        |name: &String| std::fs::metadata(dir.join(name)).and_then(|m| m.modified()).map(Timestamp::from_system);
    Ok(files::list(dir)?.into_iter().map(|name| (name.clone(), written(&name).ok())).collect())
}

/// The line that says why, of what `nginx -t` prints.
fn emergency(text: &str) -> String {
    let line = text.lines().find(|l| l.contains("[emerg]")).or_else(|| text.lines().find(|l| !l.trim().is_empty()));
    let line = line.unwrap_or("it says nothing").trim();
    // Some lines carry the time and the process: `2026/01/31 12:00:00 [emerg] 1#1: what it is about`.
    match line.split_once("[emerg]") {
        Some((_, rest)) => {
            let rest = rest.trim();
            let numbered = rest.split_once(": ").filter(|(n, _)| n.bytes().all(|b| b.is_ascii_digit() || b == b'#'));
            bounded(format!("[emerg] {}", numbered.map_or(rest, |(_, text)| text)), MOST_ERROR)
        }
        None => bounded(line.strip_prefix("nginx: ").unwrap_or(line), MOST_ERROR),
    }
}

/// `nginx version: nginx/1.22.1`; the oldest there is if it cannot be read.
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
        assert_eq!(emergency(timed), "[emerg] open() failed in /a:1");
        assert_eq!(emergency(text), "[emerg] unknown directive \"y\" in /a:1");
    }
}
