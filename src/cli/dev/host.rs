//! A host of `dev`: the files of its agent, its nginx, and what it leaves behind.
#![expect(clippy::disallowed_methods, reason = "keeps the files of its programs in one directory")]

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use super::{
    ProfileArg,
    process::{end, free_address, running, spawn, wait_for},
};
use crate::{
    cli::Failed,
    config::{Config, Flags},
    host::{docker::Docker, probe},
    model::name::HostName,
};

/// The loopback ports of the first host, and how many each has: hosts share an engine.
const FIRST_PORT: u16 = 21_000;
const PORTS: u16 = 500;
/// Longest wait for an agent.
const READY_TIMEOUT: Duration = Duration::from_secs(20);

/// What stays the same if `dev` is started again in its directory.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct DevHost {
    /// Its name.
    pub(super) host: String,
    /// Where its nginx listens.
    pub(super) ingress: SocketAddr,
    /// Where its agent listens.
    pub(super) metrics: SocketAddr,
}

/// A host and its directory.
pub(super) struct Place<'a> {
    pub(super) host: &'a DevHost,
    /// Which one it is, from 0.
    pub(super) number: u16,
    pub(super) dir: PathBuf,
}

impl DevHost {
    pub(super) fn new(host: String) -> Result<Self, Failed> {
        Ok(Self { host, ingress: free_address()?, metrics: free_address()? })
    }
}

impl Place<'_> {
    /// The agent's configuration file.
    pub(super) fn file(&self) -> PathBuf {
        self.dir.join("agent.toml")
    }

    /// Writes the agent's configuration file, which other verbs read too: `dev.env` names it.
    pub(super) fn config(&self, etcd: SocketAddr, nginx: &Path, profile: ProfileArg) -> Result<Config, Failed> {
        let profile = match profile {
            ProfileArg::Default => "default",
            ProfileArg::Strict => "strict",
        };
        let d = self.dir.display();
        let first = FIRST_PORT + self.number * PORTS;
        // Nothing outside of the directory is changed, and the addresses may be those of this machine's own agent.
        let text = format!(
            "host = \"{}\"\nstate_dir = \"{d}/state\"\nrun_dir = \"{d}/run\"\nlisten = \"{}\"\n\
             [etcd]\nendpoints = [\"{etcd}\"]\n[nginx]\nbinary = \"{}\"\nconf = \"{d}/nginx.conf\"\npid = \"{d}/nginx.pid\"\n\
             address = \"{}\"\nlisten = [\"{}\"]\nprofile = \"{profile}\"\ntemplates = \"{d}/templates\"\n\
             [ports]\nrange = \"{first}-{}\"\n[tcp_routes]\nenabled = false\n[rollouts]\nenabled = true\n",
            self.host.host,
            self.host.metrics,
            nginx.display(),
            self.host.ingress,
            self.host.ingress,
            first + PORTS - 1,
        );
        fs::create_dir_all(&self.dir)?;
        fs::write(self.file(), text)?;
        // Keep the environment of the machine's own agent out.
        let mut flags = Flags { config: Some(self.file()), ..Flags::default() };
        flags.etcd.endpoints = vec![etcd.to_string()];
        Ok(Config::load(&flags)?)
    }

    pub(super) fn start_nginx(&self, nginx: &Path, config: &Config) -> Result<(), Failed> {
        let dir = &self.dir;
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
            self.host.ingress
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

    pub(super) async fn nginx_is_up(&self) -> Result<(), Failed> {
        wait_for(self.host.ingress, "nginx", &self.dir.join("nginx-error.log")).await
    }

    /// Waits until the agent has read everything, and the store knows it; not for ever, as its log says what is wrong.
    pub(super) async fn agent_is_ready(&self) {
        let address = self.host.metrics.to_string();
        let is_ready = async {
            while !probe::get_tcp(&address, "localhost", "/readyz", READY_TIMEOUT).await.is_ok_and(|a| a.status == 200)
            {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let _ = tokio::time::timeout(READY_TIMEOUT, is_ready).await;
    }

    /// Removes its containers, and ends its nginx.
    pub(super) async fn clean_up(&self, config: &Config) {
        if let Ok(host) = HostName::try_from(self.host.host.as_str()) {
            remove_containers(&Docker::behind(&config.docker_socket, host)).await;
        }
        end(&config.nginx.pid, &self.dir, Signal::TERM).await;
    }

    /// Removes the files that `dev` made, and no others.
    pub(super) fn remove_files(&self) {
        for name in ["state", "run", "tmp"] {
            let _ = fs::remove_dir_all(self.dir.join(name));
        }
        for name in ["agent.toml", "nginx.conf", "nginx.pid", "nginx-error.log"] {
            let _ = fs::remove_file(self.dir.join(name));
        }
        if self.number > 0 {
            let _ = fs::remove_dir(&self.dir);
        }
    }
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
    for id in docker.commands().await.unwrap_or_default() {
        if let Err(e) = docker.stop(&id, Duration::from_secs(1)).await.and(docker.remove(&id).await) {
            tracing::warn!("{e}");
        }
    }
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
