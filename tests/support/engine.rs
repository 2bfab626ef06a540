//! A Docker engine of the test's own: it can be killed, stopped and restarted.
//!
//! It has its own network namespace, since an engine without a bridge removes the `docker0` that it finds, which
//! belongs to the engine of this machine. Its containers have no network and are reached by sockets, or use a bridge of
//! its own and are reached by ports. Its containerd is its own too: a second engine would treat containers of the first
//! one as lost ones of its own. Images are stored as plain directories (`vfs`), which works on any file system.
#![allow(clippy::disallowed_methods, reason = "a test starts programs and writes files of its own")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use super::{disk::Disk, names::random, process::run, wait::pause};

/// Longest wait for an engine to start or stop.
const PATIENCE: Duration = Duration::from_secs(60);

/// Declare it before the lab: drop order is reversed, and the agent must not see its engine go.
pub struct Engine {
    dir: tempfile::TempDir,
    live_restore: bool,
    /// The bridge of its containers, if they have a network.
    bridge: Option<String>,
    /// True if it publishes ports by netfilter rules alone, without the userland proxy.
    without_proxy: bool,
    containerd: Child,
    dockerd: Option<Child>,
}

impl Engine {
    /// Starts one. With `live_restore` its containers outlive it.
    pub fn new(live_restore: bool) -> Self {
        let mut engine = Self::prepare(live_restore);
        engine.start();
        engine
    }

    /// Starts one with published ports and live-restore.
    pub fn with_ports() -> Self {
        let mut engine = Self::prepare(true);
        engine.make_bridge();
        engine.start();
        engine
    }

    /// Starts one in this machine's network, whose images and containers are on a disk of this size.
    pub fn with_network_on_a_small_disk(size: &str) -> (Self, Disk) {
        let mut engine = Self::prepare(false);
        engine.make_bridge();
        let disk = Disk::of(engine.path("data"), size);
        engine.start();
        (engine, disk)
    }

    fn make_bridge(&mut self) {
        let number = random();
        let (a, b) = (&number[..2], &number[2..4]);
        let byte = |hex: &str| u8::from_str_radix(hex, 16).expect("a byte");
        let bridge = format!("demae{number}");
        self.bridge = Some(bridge.clone());
        run(Command::new("ip").args(["link", "add", &bridge, "type", "bridge"]));
        // 198.18.0.0/15 is for tests (RFC 2544).
        let address = format!("198.{}.{}.1/24", 18 + byte(a) % 2, byte(b));
        run(Command::new("ip").args(["addr", "add", &address, "dev", &bridge]));
        run(Command::new("ip").args(["link", "set", &bridge, "up"]));
    }

    /// Starts one that publishes ports by netfilter rules alone. Only for a test in its own network namespace, whose
    /// rules it changes.
    pub fn without_userland_proxy() -> Self {
        let mut engine = Self::prepare(false);
        engine.without_proxy = true;
        engine.start();
        engine
    }

    /// Starts one whose images and containers are on a small disk.
    pub fn on_a_small_disk() -> (Self, Disk) {
        let mut engine = Self::prepare(false);
        let disk = Disk::of(engine.path("data"), "128m");
        engine.start();
        (engine, disk)
    }

    fn prepare(live_restore: bool) -> Self {
        let is_root = fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0);
        assert!(is_root, "an engine of its own needs a test that is root");
        let dir = tempfile::Builder::new().prefix("demae-engine-").tempdir().expect("a directory");
        let at = |name: &str| dir.path().join(name).display().to_string();
        let text = format!(
            "version = 2\nroot = \"{}\"\nstate = \"{}\"\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = \"{}\"\n",
            at("containerd"),
            at("run"),
            at("containerd.sock")
        );
        fs::write(at("containerd.toml"), text).expect("a file");
        // This machine's own file would contradict the flags.
        fs::write(at("daemon.json"), "{}\n").expect("a file");
        let mut command = Command::new("containerd");
        command.args(["--log-level", "warn", "--config", &at("containerd.toml")]);
        let containerd = quiet(&mut command, &dir.path().join("containerd.log"));
        let engine = Self { dir, live_restore, bridge: None, without_proxy: false, containerd, dockerd: None };
        let socket = engine.path("containerd.sock");
        assert!(within(PATIENCE, || socket.exists()), "containerd does not start: {}", engine.log("containerd.log"));
        engine
    }

    /// For `DOCKER_HOST`.
    pub fn host(&self) -> String {
        format!("unix://{}", self.path("docker.sock").display())
    }

    /// Starts it and waits until it answers.
    pub fn start(&mut self) {
        self.spawn();
        assert!(within(PATIENCE, || self.answers()), "the engine does not start: {}", self.log("dockerd.log"));
    }

    /// `kill -9`, of the engine alone.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.dockerd.take() {
            child.kill().expect("it runs");
            child.wait().expect("it ends");
        }
    }

    /// SIGTERM, and waits for its exit.
    pub fn stop(&mut self) {
        if let Some(mut child) = self.dockerd.take() {
            terminate(&child);
            child.wait().expect("it ends");
        }
    }

    /// Copies an image from this machine's engine, under the same name.
    pub fn load(&self, image: &str) {
        let mut save = Command::new("docker");
        let mut save = save.args(["save", image]).stdout(Stdio::piped()).spawn().expect("docker runs");
        let mut load = Command::new("docker");
        load.args(["-H", &self.host(), "load", "-q"]).stdin(save.stdout.take().expect("a pipe")).stdout(Stdio::null());
        let loaded = load.status().expect("docker runs").success();
        assert!(save.wait().expect("docker ends").success() && loaded, "{image} cannot be loaded");
    }

    pub fn docker(&self, args: &[&str]) -> String {
        let output = Command::new("docker").args(["-H", &self.host()]).args(args).output().expect("docker runs");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// The ids of a demae host's containers.
    pub fn containers(&self, host: &str) -> Vec<String> {
        let listed = self.docker(&["ps", "-aq", "--no-trunc", "--filter", &format!("label=demae.host={host}")]);
        listed.lines().map(str::to_owned).collect()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn log(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    fn spawn(&mut self) {
        // A killed engine leaves its pid file, and that pid may belong to another process by now.
        let _ = fs::remove_file(self.path("dockerd.pid"));
        let at = |name: &str| self.path(name).display().to_string();
        let mut command = match &self.bridge {
            Some(bridge) => {
                let mut command = Command::new("dockerd");
                command.arg(format!("--bridge={bridge}"));
                command
            }
            None if self.without_proxy => {
                let mut command = Command::new("dockerd");
                command.arg("--userland-proxy=false");
                command
            }
            None => {
                // `unshare` execs the engine, so a signal reaches it.
                let mut command = Command::new("unshare");
                command.args(["--net", "--", "dockerd", "--bridge=none"]);
                command
            }
        };
        command.args(["--host", &self.host(), "--containerd", &at("containerd.sock")]);
        command.args(["--config-file", &at("daemon.json"), "--pidfile", &at("dockerd.pid")]);
        command.args(["--data-root", &at("data"), "--exec-root", &at("exec"), "--storage-driver", "vfs"]);
        if !self.without_proxy {
            command.args(["--iptables=false", "--ip6tables=false", "--ip-forward=false"]);
        }
        if self.live_restore {
            command.arg("--live-restore");
        }
        self.dockerd = Some(quiet(&mut command, &self.path("dockerd.log")));
    }

    fn answers(&self) -> bool {
        let mut command = Command::new("docker");
        command.args(["-H", &self.host(), "version"]).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|s| s.success())
    }

    /// Kills the shims and containers of an engine that did not come up again.
    fn end_leftovers(&self) {
        let dir = self.dir.path().display().to_string();
        for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let line = fs::read(process.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).into_owned();
            if !line.contains("containerd-shim") || !line.contains(&dir) {
                continue;
            }
            let pid = process.file_name().to_string_lossy().into_owned();
            let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
            // The container before its shim.
            for number in children.split_whitespace().chain([pid.as_str()]) {
                let _ = Command::new("kill").args(["-9", number]).status();
            }
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // Must not panic: a failed test is panicking already.
        if !self.answers() {
            if let Some(mut child) = self.dockerd.take() {
                let _ = child.kill();
                let _ = child.wait();
            }
            self.spawn();
            within(PATIENCE, || self.answers());
        }
        let listed = self.docker(&["ps", "-aq"]);
        let ids: Vec<&str> = listed.lines().collect();
        if !ids.is_empty() {
            self.docker(&[&["rm", "-fv"][..], &ids].concat());
        }
        if let Some(mut child) = self.dockerd.take() {
            terminate(&child);
            if !within(PATIENCE, || matches!(child.try_wait(), Ok(Some(_)))) {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
        self.end_leftovers();
        let _ = self.containerd.kill();
        let _ = self.containerd.wait();
        if let Some(bridge) = &self.bridge {
            let _ = Command::new("ip").args(["link", "del", bridge]).status();
        }
        // The engine bind-mounts its own directory and leaves the mount behind.
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let below =
            mounts.lines().filter_map(|l| l.split(' ').nth(1)).filter(|m| Path::new(m).starts_with(self.dir.path()));
        let mut below: Vec<&str> = below.collect();
        below.sort_unstable();
        for mount in below.iter().rev() {
            let _ = Command::new("umount").args(["-l", mount]).status();
        }
    }
}

fn terminate(child: &Child) {
    let _ = Command::new("kill").args(["-TERM", &child.id().to_string()]).status();
}

fn within(limit: Duration, mut holds: impl FnMut() -> bool) -> bool {
    let began = Instant::now();
    while !holds() {
        if began.elapsed() > limit {
            return false;
        }
        pause();
    }
    true
}

fn quiet(command: &mut Command, log: &Path) -> Child {
    let log = fs::File::options().create(true).append(true).open(log).expect("a log");
    command.stdin(Stdio::null()).stdout(log.try_clone().expect("a log")).stderr(log).spawn().expect("it starts")
}
