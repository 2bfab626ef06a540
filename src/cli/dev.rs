//! `demae dev`: a complete demae on one machine, to try it. etcd and nginx are the real ones.
#![expect(
    clippy::disallowed_methods,
    reason = "starts and ends programs of its own, and keeps their files in one directory"
)]

use std::{
    fs,
    net::{SocketAddr, TcpListener},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde::{Deserialize, Serialize};
use tokio_util::task::TaskTracker;

use super::{Ended, Exit, Failed, agent, print::Printer, runtime};
use crate::{
    config::{Config, Flags},
    host::{docker::Docker, files},
    model::name::HostName,
    shutdown, telemetry,
};

/// Timeout for etcd and nginx to start or stop.
const START_STOP_TIMEOUT: Duration = Duration::from_secs(20);

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Keep all files in this directory, with `dev.env` to source; a temporary one unless given
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Keep-alive of clients in nginx
    #[arg(long, value_enum, default_value = "default")]
    profile: ProfileArg,
    /// What is logged
    #[arg(long, env = "DEMAE_LOG", default_value = "info", value_name = "FILTER")]
    log: String,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum ProfileArg {
    /// As nginx ships
    Default,
    /// No keep-alive: no request is lost to a reload
    Strict,
}

/// The saved state of a directory, so that a second `dev` in it continues after an interrupted one.
#[derive(Debug, Serialize, Deserialize)]
struct DevState {
    host: String,
    etcd: SocketAddr,
    peer: SocketAddr,
    ingress: SocketAddr,
    metrics: SocketAddr,
}

pub(super) fn run(args: &Args, printer: &mut Printer) -> Ended {
    let _telemetry = telemetry::start(&args.log).map_err(Failed::because)?;
    let etcd = program("etcd", "etcd-server")?;
    let nginx = program("nginx", "nginx")?;
    let dir = match &args.dir {
        Some(dir) => {
            fs::create_dir_all(dir).map_err(|e| Failed::because(format!("cannot make `{}`: {e}", dir.display())))?;
            fs::canonicalize(dir)?
        }
        None => temporary()?,
    };
    let is_dev_dir = dir.join("dev.json").exists() || fs::read_dir(&dir)?.next().is_none();
    if !is_dev_dir {
        return Err(Failed::because(format!(
            "`{}` is not empty, and everything in it would be removed in the end; give a directory that is empty or not there",
            dir.display()
        )));
    }
    // Before anything is started or cleaned up: another `dev` may be running here.
    let lock = files::lock(&dir.join("dev.lock"))?;
    let first = !dir.join("dev.json").exists();
    let state = DevState::open(&dir)?;
    let config = state.config(&dir, &nginx, args.profile)?;
    let runtime = runtime(2)?;
    if let Err(e) = runtime.block_on(docker_answers(&config)) {
        // Nothing was started, so only two files need to be removed.
        if first {
            let _ = (fs::remove_file(dir.join("dev.json")), fs::remove_file(dir.join("agent.toml")));
        }
        drop(lock);
        let _ = fs::remove_file(dir.join("dev.lock"));
        if args.dir.is_none() {
            let _ = fs::remove_dir(&dir);
        }
        return Err(e);
    }
    let ended = runtime.block_on(async {
        let tasks = TaskTracker::new();
        let (graceful, forced) = shutdown::on_signals(&tasks)?;
        let up = async {
            state.start_etcd(&dir, &etcd)?;
            state.start_nginx(&dir, &nginx, &config)?;
            wait_for(state.etcd, "etcd", &dir.join("etcd.log")).await?;
            wait_for(state.ingress, "nginx", &dir.join("nginx-error.log")).await
        };
        let ended = match up.await {
            Err(e) => Err(e),
            Ok(()) => {
                state.write_env(&dir)?;
                state.print_usage(&dir, printer);
                tokio::select! {
                    ended = agent::serve(&config, false, graceful) => ended.map(|_| Exit::Success),
                    () = forced.cancelled() => Err(Failed::because("ended at once by a second signal; containers may be left")),
                }
            }
        };
        printer.error("cleaning up: containers, processes, files");
        state.clean_up(&dir, &config).await;
        ended
    });
    runtime.shutdown_background();
    // Only what `dev` created: the directory may hold other files.
    for name in ["state", "run", "etcd", "tmp"] {
        let _ = fs::remove_dir_all(dir.join(name));
    }
    for name in [
        "dev.env",
        "dev.json",
        "dev.lock",
        "agent.toml",
        "nginx.conf",
        "nginx.pid",
        "nginx-error.log",
        "etcd.log",
        "etcd.pid",
    ] {
        let _ = fs::remove_file(dir.join(name));
    }
    drop(lock);
    if args.dir.is_none() {
        let _ = fs::remove_dir(&dir);
    }
    ended
}

impl DevState {
    /// Loads the state of an interrupted `dev` in this directory, or creates one.
    fn open(dir: &Path) -> Result<Self, Failed> {
        let path = dir.join("dev.json");
        if let Ok(text) = fs::read(&path)
            && let Ok(state) = serde_json::from_slice::<DevState>(&text)
        {
            return Ok(state);
        }
        let state = DevState {
            host: format!("dev-{}", random()?),
            etcd: free_address()?,
            peer: free_address()?,
            ingress: free_address()?,
            metrics: free_address()?,
        };
        fs::write(&path, serde_json::to_vec_pretty(&state)?)?;
        Ok(state)
    }

    /// Writes the agent's configuration file, which other verbs read too: `dev.env` names it.
    fn config(&self, dir: &Path, nginx: &Path, profile: ProfileArg) -> Result<Config, Failed> {
        let profile = match profile {
            ProfileArg::Default => "default",
            ProfileArg::Strict => "strict",
        };
        let d = dir.display();
        // Nothing outside of the directory is changed, and the addresses may be those of this machine's own agent.
        let text = format!(
            "host = \"{}\"\nstate_dir = \"{d}/state\"\nrun_dir = \"{d}/run\"\nlisten = \"{}\"\n\
             [etcd]\nendpoints = [\"{}\"]\n[nginx]\nbinary = \"{}\"\nconf = \"{d}/nginx.conf\"\npid = \"{d}/nginx.pid\"\n\
             address = \"{}\"\nlisten = [\"{}\"]\nprofile = \"{profile}\"\ntemplates = \"{d}/templates\"\n\
             [tcp_routes]\nenabled = false\n",
            self.host,
            self.metrics,
            self.etcd,
            nginx.display(),
            self.ingress,
            self.ingress
        );
        let path = dir.join("agent.toml");
        fs::write(&path, text)?;
        // Keep the environment of the machine's own agent out.
        let mut flags = Flags { config: Some(path), ..Flags::default() };
        flags.etcd.endpoints = vec![self.etcd.to_string()];
        Ok(Config::load(&flags)?)
    }

    fn start_etcd(&self, dir: &Path, etcd: &Path) -> Result<(), Failed> {
        let pid_file = dir.join("etcd.pid");
        if running(&pid_file, dir).is_some() {
            return Ok(());
        }
        let url = |address: SocketAddr| format!("http://{address}");
        let mut command = tokio::process::Command::new(etcd);
        command
            .args(["--name", "dev", "--logger", "zap", "--log-level", "error", "--initial-cluster"])
            .arg(format!("dev={}", url(self.peer)))
            .arg("--data-dir")
            .arg(dir.join("etcd"))
            .arg("--listen-client-urls")
            .arg(url(self.etcd))
            .arg("--advertise-client-urls")
            .arg(url(self.etcd))
            .arg("--listen-peer-urls")
            .arg(url(self.peer))
            .arg("--initial-advertise-peer-urls")
            .arg(url(self.peer));
        let pid = spawn(command, &dir.join("etcd.log"))?;
        fs::write(pid_file, pid.to_string())?;
        Ok(())
    }

    fn start_nginx(&self, dir: &Path, nginx: &Path, config: &Config) -> Result<(), Failed> {
        if running(&config.nginx.pid, dir).is_some() {
            return Ok(());
        }
        let tmp = dir.join("tmp");
        fs::create_dir_all(&tmp)?;
        let d = dir.display();
        // Never root: an app may replace its socket by a symlink, and root's workers would follow it anywhere.
        let user = if rustix::process::geteuid().is_root() {
            check_traversable(dir)?;
            let groups = fs::read_to_string("/etc/group").unwrap_or_default();
            let group = if groups.lines().any(|l| l.starts_with("nogroup:")) { "nogroup" } else { "nobody" };
            format!("user nobody {group};\n")
        } else {
            String::new()
        };
        let text = format!(
            "{user}worker_processes 2;\nworker_rlimit_nofile 8192;\npid {d}/nginx.pid;\nerror_log {d}/nginx-error.log;\n\
             events {{ worker_connections 4096; }}\n\
             http {{\n    access_log off;\n    keepalive_requests 1000000;\n    client_body_temp_path {d}/tmp/body;\n    proxy_temp_path {d}/tmp/proxy;\n    \
             fastcgi_temp_path {d}/tmp/fastcgi;\n    uwsgi_temp_path {d}/tmp/uwsgi;\n    scgi_temp_path {d}/tmp/scgi;\n    \
             include {}/nginx/live/*.conf;\n    # Answers until the agent has written its first files.\n    server {{ listen {}; server_name starting.demae.invalid; return 503; }}\n}}\n",
            config.state_dir.display(),
            self.ingress
        );
        fs::write(dir.join("nginx.conf"), text)?;
        let mut command = tokio::process::Command::new(nginx);
        command
            .arg("-c")
            .arg(dir.join("nginx.conf"))
            .arg("-e")
            .arg(dir.join("nginx-error.log"))
            .args(["-g", "daemon off;"]);
        spawn(command, &dir.join("nginx-error.log"))?;
        Ok(())
    }

    fn write_env(&self, dir: &Path) -> Result<(), Failed> {
        let text = format!(
            "export ETCDCTL_API=3\nexport ETCDCTL_ENDPOINTS={}\nexport DEMAE_INGRESS=http://{}\nexport DEMAE_METRICS=http://{}/metrics\nexport DEMAE_CONFIG={}/agent.toml\n",
            self.etcd,
            self.ingress,
            self.metrics,
            dir.display()
        );
        let beside = dir.join(".dev.env.new");
        fs::write(&beside, text)?;
        fs::rename(beside, dir.join("dev.env"))?;
        Ok(())
    }

    fn print_usage(&self, dir: &Path, printer: &mut Printer) {
        printer.line(&format!("demae runs as host `{}`, in {}\n", self.host, dir.display()));
        printer.line(&format!("  export ETCDCTL_API=3 ETCDCTL_ENDPOINTS={}", self.etcd));
        printer.line(&format!(
            "  export DEMAE_INGRESS=http://{} DEMAE_METRICS=http://{}/metrics DEMAE_CONFIG={}/agent.toml\n",
            self.ingress,
            self.metrics,
            dir.display()
        ));
        printer.line("Try, in another terminal:\n");
        printer.line(
            "  etcdctl put /demae/apps/hello/spec '{image: IMAGE, ingress: {hosts: [hello.localhost], port: 8080}}'",
        );
        printer.line("  demae status");
        printer.line("  curl -H 'Host: hello.localhost' $DEMAE_INGRESS\n");
        printer.line("Ctrl-C stops it and removes its containers, processes and files.");
    }

    async fn clean_up(&self, dir: &Path, config: &Config) {
        if let Ok(host) = HostName::try_from(self.host.as_str()) {
            remove_containers(&Docker::behind(&config.docker_socket, host)).await;
        }
        for (pid_file, signal) in [(config.nginx.pid.clone(), Signal::TERM), (dir.join("etcd.pid"), Signal::TERM)] {
            end(&pid_file, dir, signal).await;
        }
    }
}

/// Checks that this user can reach Docker.
async fn docker_answers(config: &Config) -> Result<(), Failed> {
    let docker = Docker::behind(&config.docker_socket, config.host.clone()).with_timeout(START_STOP_TIMEOUT);
    docker.version().await.map(drop).map_err(|e| {
        Failed::try_later(format!(
            "{e}; start Docker, and let this user use `{}`: as root, or in the group docker",
            config.docker_socket
        ))
    })
}

/// Checks that nginx's workers, without rights of their own, can traverse a directory and its parents.
fn check_traversable(dir: &Path) -> Result<(), Failed> {
    for above in dir.ancestors() {
        if fs::metadata(above)?.permissions().mode() & 0o001 == 0 {
            return Err(Failed::because(format!(
                "nginx's workers cannot pass through `{}`: `chmod o+x` it, or give another `--dir`",
                above.display()
            )));
        }
    }
    Ok(())
}

async fn remove_containers(docker: &Docker) {
    let Ok(listed) = docker.list(None).await else { return };
    let apps: std::collections::BTreeSet<_> = listed.into_iter().map(|l| l.app).collect();
    for app in apps {
        let Ok(found) = docker.instances(&app, None, &crate::host::clock::Clock::default()).await else { continue };
        for container in found.own {
            // No grace period: their store is removed too.
            let stopped = docker.stop(&container.id, Duration::from_secs(1)).await;
            if let Err(e) = stopped.and(docker.remove(&container.id).await) {
                tracing::warn!("{e}");
            }
        }
    }
}

/// Finds a program in `PATH`; Debian keeps servers out of a user's.
fn program(name: &str, package: &str) -> Result<PathBuf, Failed> {
    let path = std::env::var("PATH").unwrap_or_default();
    let dirs = path.split(':').map(str::to_owned).chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(String::from));
    let found = dirs.map(|d| Path::new(&d).join(name)).find(|p| p.is_file());
    found.ok_or_else(|| Failed::because(format!("`{name}` is not installed; on Debian: apt-get install {package}")))
}

fn temporary() -> Result<PathBuf, Failed> {
    let dir = std::env::temp_dir().join(format!("demae-dev-{}", random()?));
    fs::create_dir(&dir)?;
    Ok(dir)
}

fn random() -> Result<String, Failed> {
    let mut bytes = [0u8; 3];
    std::io::Read::read_exact(&mut fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(crate::model::text::hex(&bytes))
}

fn free_address() -> Result<SocketAddr, Failed> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

/// Starts a program in its own process group: `dev` passes Ctrl-C on, in order.
fn spawn(mut command: tokio::process::Command, log: &Path) -> Result<u32, Failed> {
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
fn running(pid_file: &Path, dir: &Path) -> Option<Pid> {
    let pid: i32 = fs::read_to_string(pid_file).ok()?.trim().parse().ok()?;
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    String::from_utf8_lossy(&line).contains(&*dir.to_string_lossy()).then_some(())?;
    Pid::from_raw(pid)
}

async fn end(pid_file: &Path, dir: &Path, signal: Signal) {
    let Some(pid) = running(pid_file, dir) else { return };
    // It may have exited already.
    let _ = kill_process(pid, signal);
    let until = Instant::now() + START_STOP_TIMEOUT;
    while test_kill_process(pid).is_ok() && running(pid_file, dir).is_some() && Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn wait_for(address: SocketAddr, what: &str, log: &Path) -> Result<(), Failed> {
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
