//! nginx: rendered, tested as part of the tree it will load, made live by one rename, and proven by a worker's answer.
//!
//! Whenever the agent is killed, the live path leads to a set that passed `nginx -t`.

mod observe;
mod proof;
mod publish;
mod render;
mod server;
mod set;
mod stage;

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicI32, AtomicI64, Ordering},
    },
    time::Duration,
};

use tokio::sync::Mutex;

pub use proof::Proof;
pub use publish::Published;
pub use render::{Neighbours, Profile, Renderer, Settings};
pub use server::{Contained, Local, Server};

use super::{
    clock::Clock,
    files::{self, FileError},
    layout::Layout,
    takeover::Takeovers,
};
use crate::model::{
    problem::{bounded, chain},
    time::Timestamp,
};
use stage::Tree;

/// Timeout for a worker that answers with a new generation.
const PROOF_TIMEOUT: Duration = Duration::from_secs(10);
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

    /// A fingerprint of everything that texts depend on apart from the apps: templates, settings, directives of the
    /// host's own files, and what apps may take over from them.
    fn basis(&self, renderer: &Renderer, tree: &Tree, takeovers: &Takeovers) -> String {
        let settings = tree.settings.keys().map(|name| format!("+{name}"));
        format!("{}{}{}", renderer.fingerprint(), settings.collect::<String>(), takeovers.fingerprint())
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
