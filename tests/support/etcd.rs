//! An etcd process of a test's own.
#![allow(clippy::disallowed_methods, reason = "a test starts programs and writes files of its own")]

use std::{
    net::SocketAddr,
    path::Path,
    process::{Child, Command},
};

use super::process::{quiet, signal};

/// Killed with the test, as by `kill -9`.
pub struct Etcd(Child);

impl Etcd {
    /// Starts a member in a directory; its data and its log carry its name. `peers` has the peer addresses of all
    /// members, this one included.
    pub fn start(dir: &Path, name: &str, at: SocketAddr, peers: &[(&str, SocketAddr)], more: &[&str]) -> Self {
        Self::spawn("http", dir, name, at, peers, more)
    }

    /// Starts a member that uses TLS for clients.
    pub fn start_secured(dir: &Path, name: &str, at: SocketAddr, peers: &[(&str, SocketAddr)], more: &[&str]) -> Self {
        Self::spawn("https", dir, name, at, peers, more)
    }

    fn spawn(
        scheme: &str,
        dir: &Path,
        name: &str,
        at: SocketAddr,
        peers: &[(&str, SocketAddr)],
        more: &[&str],
    ) -> Self {
        let url = |a: SocketAddr| format!("http://{a}");
        let own = peers.iter().find(|(n, _)| *n == name).expect("it is one of them").1;
        let all: Vec<String> = peers.iter().map(|(n, a)| format!("{n}={}", url(*a))).collect();
        let client = format!("{scheme}://{at}");
        let mut command = Command::new("etcd");
        command.current_dir(dir).args(["--name", name, "--logger", "zap", "--log-level", "error"]);
        command.args(["--data-dir", name, "--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &url(own), "--initial-advertise-peer-urls", &url(own)]);
        command.args(["--initial-cluster", &all.join(",")]).args(more);
        Self(quiet(&mut command, &dir.join(format!("{name}.log"))))
    }

    /// True if it exited by itself.
    pub fn has_ended(&mut self) -> bool {
        self.0.try_wait().expect("a child").is_some()
    }

    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    pub fn signal(&self, name: &str) {
        signal(self.0.id(), name);
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        // It may have exited by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
