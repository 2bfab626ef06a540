//! A running nginx: a process of this machine, or in a container. All differences between the two are here.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use futures_util::future::BoxFuture;
use rustix::process::{Pid, Signal, kill_process};

use crate::host::docker::Docker;

/// Timeout of `nginx -t`: 5,000 virtual hosts take a second.
const TEST_TIMEOUT: Duration = Duration::from_secs(30);

/// Operations on an nginx.
pub trait Server: Send + Sync {
    /// Runs nginx with arguments: whether it succeeded, and what it printed.
    fn run<'a>(&'a self, arguments: Vec<String>) -> BoxFuture<'a, io::Result<(bool, String)>>;
    /// The pid of the master process on this machine.
    fn master<'a>(&'a self, pid_file: &'a Path) -> BoxFuture<'a, io::Result<i32>>;
    /// Signals the master to reload.
    fn reload<'a>(&'a self, master: i32) -> BoxFuture<'a, io::Result<()>>;
    /// The root of its paths on this machine.
    fn root<'a>(&'a self) -> BoxFuture<'a, io::Result<PathBuf>>;
}

/// An nginx that runs as a process of this machine.
#[derive(Debug)]
pub struct Local {
    /// The binary.
    pub binary: String,
}

impl Server for Local {
    #[expect(clippy::disallowed_methods, reason = "the home of nginx")]
    fn run<'a>(&'a self, arguments: Vec<String>) -> BoxFuture<'a, io::Result<(bool, String)>> {
        Box::pin(async move {
            let mut command = tokio::process::Command::new(&self.binary);
            command.args(arguments).stdin(std::process::Stdio::null()).kill_on_drop(true);
            let output =
                tokio::time::timeout(TEST_TIMEOUT, command.output()).await.map_err(|_| io::ErrorKind::TimedOut)??;
            let text = [output.stdout, output.stderr].concat();
            Ok((output.status.success(), String::from_utf8_lossy(&text).into_owned()))
        })
    }

    fn master<'a>(&'a self, pid_file: &'a Path) -> BoxFuture<'a, io::Result<i32>> {
        Box::pin(async move {
            let text = fs::read_to_string(pid_file).map_err(|e| match e.kind() {
                io::ErrorKind::NotFound => {
                    io::Error::other(format!("nginx does not run: there is no `{}`", pid_file.display()))
                }
                _ => e,
            })?;
            let pid: i32 = text
                .trim()
                .parse()
                .map_err(|_| io::Error::other(format!("`{}` holds no number", pid_file.display())))?;
            // A stale file may hold the pid of another program.
            if is_nginx(pid) && is_running(pid) {
                return Ok(pid);
            }
            Err(io::Error::other(format!("nginx does not run: process {pid} of `{}` is not nginx", pid_file.display())))
        })
    }

    fn reload<'a>(&'a self, master: i32) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move {
            let pid = Pid::from_raw(master).ok_or(io::ErrorKind::InvalidInput)?;
            Ok(kill_process(pid, Signal::HUP)?)
        })
    }

    fn root<'a>(&'a self) -> BoxFuture<'a, io::Result<PathBuf>> {
        Box::pin(async { Ok(PathBuf::from("/")) })
    }
}

/// An nginx in a container, whose first process is the master. The state directory must be mounted into it at the same
/// path.
#[derive(Debug)]
pub struct Contained {
    /// The engine.
    pub docker: Docker,
    /// The container, by name.
    pub container: String,
    /// The binary inside.
    pub binary: String,
}

impl Server for Contained {
    fn run<'a>(&'a self, arguments: Vec<String>) -> BoxFuture<'a, io::Result<(bool, String)>> {
        Box::pin(async move {
            let command = std::iter::once(self.binary.clone()).chain(arguments).collect();
            let (code, text) = self.docker.exec(&self.container, command).await.map_err(io::Error::other)?;
            Ok((code == 0, text))
        })
    }

    fn master<'a>(&'a self, _pid_file: &'a Path) -> BoxFuture<'a, io::Result<i32>> {
        Box::pin(async move {
            let pid = self.docker.pid_of(&self.container).await.map_err(io::Error::other)?;
            let pid = pid.ok_or_else(|| io::Error::other(format!("container `{}` does not run", self.container)))?;
            // With an init process nginx is its child.
            if is_nginx(pid) {
                return Ok(pid);
            }
            children(pid)?.into_iter().find(|c| is_nginx(*c)).ok_or_else(|| {
                io::Error::other(format!(
                    "no nginx runs in container `{}`, as far as this process can see",
                    self.container
                ))
            })
        })
    }

    fn reload<'a>(&'a self, _master: i32) -> BoxFuture<'a, io::Result<()>> {
        Box::pin(async move { self.docker.signal(&self.container, "SIGHUP").await.map_err(io::Error::other) })
    }

    fn root<'a>(&'a self) -> BoxFuture<'a, io::Result<PathBuf>> {
        Box::pin(async move {
            let pid = self.docker.pid_of(&self.container).await.map_err(io::Error::other)?;
            let pid = pid.ok_or_else(|| io::Error::other(format!("container `{}` does not run", self.container)))?;
            Ok(PathBuf::from(format!("/proc/{pid}/root")))
        })
    }
}

/// Whether a process runs. A zombie does not.
pub fn is_running(pid: i32) -> bool {
    stat(pid, 3).is_some_and(|state| !matches!(state.as_str(), "Z" | "X"))
}

/// A field of `/proc/<pid>/stat`, numbered from the third on as in proc(5). Counted from the end of the name, which may
/// hold blanks.
fn stat(pid: i32, field: usize) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    text.rsplit_once(')')?.1.split_whitespace().nth(field - 3).map(str::to_owned)
}

/// Most readings of a list that changes all the time.
const MOST_READINGS: usize = 20;

/// The children of a process. While one of them exits, the kernel may skip another (proc(5)): a list counts once it has
/// been read twice.
fn children(pid: i32) -> io::Result<Vec<i32>> {
    let read = || fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let mut text = read()?;
    for _ in 0..MOST_READINGS {
        let again = read()?;
        if again == text {
            break;
        }
        text = again;
    }
    Ok(text.split_whitespace().filter_map(|p| p.parse().ok()).collect())
}

/// Counts workers that serve a configuration older than the one published `published` ago: those that shut down, and
/// those started before it that may still accept connections. A reload does not end them at once, and an agent that was
/// killed during one knows of no reload.
///
/// # Errors
/// If they cannot be listed, which is not zero.
pub fn old_workers(master: i32, published: Duration) -> io::Result<usize> {
    let is_old = |pid: &i32| is_leaving(*pid) || age(*pid).is_some_and(|age| age > published);
    // After a binary upgrade (SIGUSR2) the old master lives on as the parent of the new one, with its own workers.
    let old_master = stat(master, 4).and_then(|parent| parent.parse().ok()).filter(|pid| is_nginx(*pid));
    let of_old_master = match old_master {
        Some(old_master) => children(old_master)?.iter().filter(|pid| **pid != master).count(),
        None => 0,
    };
    Ok(of_old_master + children(master)?.iter().filter(|pid| is_old(pid)).count())
}

fn is_nginx(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "nginx")
}

/// The age of a process, by the kernel's clock tick of 10 ms; rounded down, so that no worker counts as older than it
/// is. Independent of the wall clock.
fn age(pid: i32) -> Option<Duration> {
    let ticks: u64 = stat(pid, 22)?.parse().ok()?;
    let uptime = fs::read_to_string("/proc/uptime").ok()?;
    let uptime = Duration::try_from_secs_f64(uptime.split_whitespace().next()?.parse().ok()?).ok()?;
    Some(uptime.saturating_sub(Duration::from_millis(ticks * 10 + 20)))
}

/// The age of the oldest worker that accepts connections, of those started in the last `published` if there are any: for
/// a moment after a reload the workers from before it accept connections, too.
pub fn oldest_worker(master: i32, published: Duration) -> Option<Duration> {
    let ages: Vec<Duration> = workers(master).ok()?.into_iter().filter_map(age).collect();
    ages.iter().filter(|age| **age <= published).max().or_else(|| ages.iter().max()).copied()
}

/// Workers of a master that accept connections.
///
/// # Errors
/// If they cannot be listed.
pub fn workers(master: i32) -> io::Result<Vec<i32>> {
    Ok(children(master)?.into_iter().filter(|pid| !is_leaving(*pid)).collect())
}

fn is_leaving(pid: i32) -> bool {
    has_title(pid, "nginx: worker process is shutting down")
}

/// Whether the command line of a process begins with this title.
fn has_title(pid: i32, title: &str) -> bool {
    fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.starts_with(title.as_bytes()))
}

/// The group of the workers, if one runs. A worker that was just started still has its master's: it sets its title
/// after it drops privileges (`ngx_worker_process_cycle`, src/os/unix/ngx_process_cycle.c).
pub fn worker_group(master: i32) -> Option<u32> {
    let is_worker = |pid: &i32| has_title(*pid, "nginx: worker process");
    let worker = children(master).ok()?.into_iter().find(is_worker)?;
    let status = fs::read_to_string(format!("/proc/{worker}/status")).ok()?;
    let line = status.lines().find(|l| l.starts_with("Gid:"))?;
    line.split_whitespace().nth(2)?.parse().ok()
}
