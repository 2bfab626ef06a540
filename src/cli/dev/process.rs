//! Programs that `dev` starts and ends, and addresses for them.
#![expect(clippy::disallowed_methods, reason = "starts and ends programs of its own")]

use std::{
    fs,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use crate::cli::Failed;

/// Timeout for a program to start or stop.
pub(super) const START_STOP_TIMEOUT: Duration = Duration::from_secs(20);

/// Finds a program in `PATH`; Debian keeps servers out of a user's.
pub(super) fn program(name: &str, package: &str) -> Result<PathBuf, Failed> {
    let path = std::env::var("PATH").unwrap_or_default();
    let dirs = path.split(':').map(str::to_owned).chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(String::from));
    let found = dirs.map(|d| Path::new(&d).join(name)).find(|p| p.is_file());
    found.ok_or_else(|| Failed::because(format!("`{name}` is not installed; on Debian: apt-get install {package}")))
}

pub(super) fn random() -> Result<String, Failed> {
    let mut bytes = [0u8; 3];
    std::io::Read::read_exact(&mut fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(crate::model::text::hex(&bytes))
}

pub(super) fn free_address() -> Result<SocketAddr, Failed> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

/// Starts a program in its own process group: `dev` passes Ctrl-C on, in order.
pub(super) fn spawn(mut command: tokio::process::Command, log: &Path) -> Result<u32, Failed> {
    let log = fs::File::options().create(true).append(true).open(log)?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
    for (name, _) in std::env::vars().filter(|(n, _)| n.starts_with("ETCD_")) {
        command.env_remove(name);
    }
    let child = command
        .spawn()
        .map_err(|e| Failed::because(format!("cannot start `{:?}`: {e}", command.as_std().get_program())))?;
    child.id().ok_or_else(|| Failed::because("the program ended at once"))
}

/// The process of a pid file, if it belongs to this directory.
pub(super) fn running(pid_file: &Path, dir: &Path) -> Option<Pid> {
    let pid: i32 = fs::read_to_string(pid_file).ok()?.trim().parse().ok()?;
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    String::from_utf8_lossy(&line).contains(&*dir.to_string_lossy()).then_some(())?;
    Pid::from_raw(pid)
}

pub(super) async fn end(pid_file: &Path, dir: &Path, signal: Signal) {
    let Some(pid) = running(pid_file, dir) else { return };
    // It may have exited already.
    let _ = kill_process(pid, signal);
    let until = Instant::now() + START_STOP_TIMEOUT;
    while test_kill_process(pid).is_ok() && running(pid_file, dir).is_some() && Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub(super) async fn wait_for(address: SocketAddr, what: &str, log: &Path) -> Result<(), Failed> {
    let until = Instant::now() + START_STOP_TIMEOUT;
    while tokio::net::TcpStream::connect(address).await.is_err() {
        if Instant::now() >= until {
            let tail = fs::read_to_string(log).unwrap_or_default();
            let tail = tail.lines().last().unwrap_or("its log is empty").to_owned();
            return Err(Failed::because(format!("{what} does not come up at {address}: {tail}")));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}
