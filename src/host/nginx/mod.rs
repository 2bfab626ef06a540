//! nginx: rendered, tested as part of the tree it will load, made live by one rename, and proven by a worker's answer.
//!
//! Whenever this agent ends, what lies at the live path is a set that nginx has taken.

mod render;
mod server;
mod set;
mod stage;

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicI32, AtomicI64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::Mutex;

pub use render::{Profile, Renderer, Settings};
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
        problem::chain,
        proxy::{Manifest, ObservedProxy, Rejected, Vhost},
        time::Timestamp,
    },
};
use render::PROBE_HOST;
use set::{Saved, Set, digest_of};

/// Longest wait for a worker that answers with a new generation.
const PROOF: Duration = Duration::from_secs(10);
/// Between two questions to nginx while waiting for it.
const ASK_AGAIN: Duration = Duration::from_millis(2);
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
    #[error("`nginx -t` fails even without any app: {0}{hint}", hint = hint(.0))]
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
    /// An app does not answer through nginx.
    #[error("{0}")]
    NoAnswer(String),
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
            Ok(Some((manifest, at, drifted))) => (Some(self.timed(manifest)), self.clock.steady(at), drifted),
            Ok(None) => (None, Timestamp::default(), false),
            Err(e) => {
                return ObservedProxy { error: Some(chain(&e)), unreadable: true, ..ObservedProxy::default() };
            }
        };
        let templates = match self.with_renderer(|r| r.fingerprint().to_owned()).await {
            Ok(fingerprint) => fingerprint,
            Err(e) => {
                // nginx cannot tell its version: it does not run, and what is live stays.
                let templates = live.as_ref().map(|m| m.templates.clone()).unwrap_or_default();
                return ObservedProxy {
                    live,
                    published,
                    drifted,
                    templates,
                    error: Some(e.to_string()),
                    ..Default::default()
                };
            }
        };
        let serving = self.serving().await;
        ObservedProxy {
            live,
            published,
            serving: serving.as_ref().ok().copied(),
            error: serving.err(),
            drifted,
            unreadable: false,
            templates,
            old_workers: self.old_workers().await.ok(),
            workers_since: self.workers_since(),
            changing: false,
        }
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
        let text = files::read(&self.layout.nginx_live().join(MANIFEST))?.unwrap_or_default();
        let published = serde_json::from_slice::<Saved>(&text).map(|s| s.published).unwrap_or_default();
        let age = self.clock.now().since(self.clock.steady(published));
        Ok(server::old_workers(self.master().await?, age))
    }

    /// nginx's master process.
    ///
    /// # Errors
    /// If it does not run.
    pub async fn master(&self) -> Result<i32, NginxError> {
        let root = self.server.root().await?;
        let (_, tree) = stage::survey(&root, &self.config.conf, &self.layout.nginx_live())?;
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
        let old = self.manifest()?.map(|(m, ..)| m).unwrap_or_default();
        let served = self.serving().await.ok();
        // Never a number that was used: workers of another set would answer with it.
        let used = self.sets()?.into_iter().chain(served).max().unwrap_or(0);
        let generation = old.generation.max(used) + 1;
        let old_served_since = (served == Some(old.generation)).then(|| self.clock.wall(self.workers_since()));
        let set = Set { nginx: self, renderer, generation, old: &old, old_served_since };
        let root = self.server.root().await?;
        let chosen = set.make(wanted, &root).await?;
        let rejected = chosen.rejected.iter().map(|(app, r)| (app.clone(), r.error.clone())).collect();
        if chosen.vhosts == old.vhosts && chosen.templates == old.templates && self.is_unchanged()? {
            // Only refusals are new: nothing for nginx to load.
            files::remove_dir(&self.layout.nginx_generation(generation))?;
            self.note_refusals(chosen.rejected)?;
            return Ok(Published { generation: old.generation, reloaded: false, rejected });
        }
        files::symlink(&PathBuf::from(format!("{generation}.set")), &self.layout.nginx_live())?;
        self.sweep(generation);
        self.reload_to(generation).await?;
        Ok(Published { generation, reloaded: true, rejected })
    }

    /// Tells nginx to load the live set, and proves that it did.
    ///
    /// # Errors
    /// If nginx does not run, or no worker answers with the live set.
    pub async fn reload(&self) -> Result<u64, NginxError> {
        let Some((manifest, ..)) = self.manifest()? else {
            return Err(NginxError::NotRunning("there is no live configuration".into()));
        };
        let root = self.server.root().await?;
        self.test(&root, &self.layout.nginx_generation(manifest.generation)).await?.map_err(NginxError::Broken)?;
        self.reload_to(manifest.generation).await?;
        Ok(manifest.generation)
    }

    async fn reload_to(&self, generation: u64) -> Result<(), NginxError> {
        let master = self.master().await?;
        let before = server::workers(master);
        self.server.reload(master).await?;
        failpoint::boundary("reloaded");
        self.prove(generation).await?;
        // The master lets old workers take connections for another 100 ms. Whoever asks nginx after this asks new ones.
        let until = Instant::now() + PROOF;
        while Instant::now() < until && server::workers(master).iter().any(|pid| before.contains(pid)) {
            tokio::time::sleep(ASK_AGAIN).await;
        }
        Ok(())
    }

    /// Asks an app through nginx, as a client would, until it answers or the time is over.
    ///
    /// # Errors
    /// The last answer that was none of its own.
    pub async fn ask_app(
        &self,
        host: &str,
        path: &str,
        only_success: bool,
        within: Duration,
    ) -> Result<(), NginxError> {
        let until = Instant::now() + within;
        loop {
            let last = match probe::get_tcp(&self.config.address, host, path, Duration::from_secs(2)).await {
                Ok(answer) if answer.unknown_host => format!("nginx does not know host `{host}`"),
                Ok(answer)
                    if answer.status == 502
                        || answer.status == 504
                        || (only_success && !(200..400).contains(&answer.status)) =>
                {
                    format!("`GET {path}` for host `{host}` is answered with status {}", answer.status)
                }
                Ok(_) => return Ok(()),
                Err(e) => format!("nginx at {}: {e}", self.config.address),
            };
            if Instant::now() >= until {
                // An nginx that answers nobody says nothing about the app.
                return Err(match self.serving().await {
                    Ok(_) => NginxError::NoAnswer(last),
                    Err(e) => NginxError::NotRunning(e),
                });
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
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

    fn is_unchanged(&self) -> Result<bool, FileError> {
        Ok(self.manifest()?.is_some_and(|(_, _, drifted)| !drifted))
    }

    /// Writes into the live set what was refused, and when.
    fn note_refusals(&self, rejected: BTreeMap<AppName, Rejected>) -> Result<(), NginxError> {
        let path = self.layout.nginx_live().join(MANIFEST);
        let Some(text) = files::read(&path)? else { return Ok(()) };
        let mut saved: Saved = serde_json::from_slice(&text).map_err(|e| NginxError::Template(e.to_string()))?;
        saved.manifest.rejected = rejected;
        let json = serde_json::to_vec_pretty(&saved).map_err(|e| NginxError::Template(e.to_string()))?;
        Ok(files::write(&path, &json, 0o644)?)
    }

    /// The live manifest, when it was written, and whether its files are as they were.
    fn manifest(&self) -> Result<Option<(Manifest, Timestamp, bool)>, FileError> {
        let live = self.layout.nginx_live();
        let path = live.join(MANIFEST);
        let Some(text) = files::read(&path)? else { return Ok(None) };
        let saved: Saved = serde_json::from_slice(&text).map_err(|e| FileError::not_ours(&path, e.into()))?;
        let at = saved.published;
        let mut drifted = false;
        for (file, digest) in &saved.files {
            drifted |= files::read(&live.join(file))?.map(|t| digest_of(&t)).as_ref() != Some(digest);
        }
        let expected = saved.files.keys().cloned().chain([MANIFEST.to_owned()]).count();
        drifted |= files::list(&live)?.len() != expected;
        Ok(Some((saved.manifest, at, drifted)))
    }

    /// Runs `nginx -t` on nginx's own tree with a set in the place of the live one.
    async fn test(&self, root: &Path, set: &Path) -> Result<Result<(), String>, NginxError> {
        let test = self.layout.nginx_test();
        let (main, _) = stage::stage(root, &self.config.conf, &self.layout.nginx_live(), set, &test)?;
        let (fine, text) =
            self.server.run(vec!["-t".into(), "-q".into(), "-c".into(), main.display().to_string()]).await?;
        files::remove_dir(&test)?;
        Ok(if fine { Ok(()) } else { Err(emergency(&text)) })
    }

    async fn with_renderer<T>(&self, read: impl FnOnce(&Renderer) -> T) -> Result<T, NginxError> {
        let mut slot = self.renderer.lock().await;
        self.fill(&mut slot).await?;
        slot.as_ref().map(|(_, r)| read(r)).ok_or_else(|| NginxError::Template("no templates".into()))
    }

    /// Reads templates and version again if either may have changed: nginx was started anew, or a file was.
    async fn fill(&self, slot: &mut Option<(String, Renderer)>) -> Result<(), NginxError> {
        let state = format!("{:?} {:?}", self.known_master(), self.config.settings.templates.as_deref().map(changes));
        if slot.as_ref().is_none_or(|(known, _)| *known != state) {
            let (_, text) = self.server.run(vec!["-v".into()]).await?;
            *slot = Some((state, Renderer::new(self.config.settings.clone(), version(&text))));
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

/// The files of a directory, and when each was written.
fn changes(dir: &Path) -> Vec<(String, Timestamp)> {
    let names = files::list(dir).unwrap_or_default();
    let written =
        |name: &String| std::fs::metadata(dir.join(name)).and_then(|m| m.modified()).map(Timestamp::from_system);
    names.into_iter().map(|name| (name.clone(), written(&name).unwrap_or_default())).collect()
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
            format!("[emerg] {}", numbered.map_or(rest, |(_, text)| text))
        }
        None => line.strip_prefix("nginx: ").unwrap_or(line).to_owned(),
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
