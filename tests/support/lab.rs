//! A host of its own: real etcd, real nginx, the real agent, on this machine's Docker engine.
//!
//! Every name is random, so labs run in parallel; dropping the lab remove_on_drop everything.
#![allow(
    clippy::disallowed_methods,
    clippy::print_stderr,
    reason = "a test starts programs and writes files of its own"
)]

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Instant,
};

use demae::model::status::{AppStatus, HostStatus, State};

use super::{
    addresses::TcpRoutes,
    containers::remove_all,
    etcd::Etcd,
    images, load,
    names::{free_address, random},
    process::{docker, kill, quiet, run, signal},
    wait::{PATIENCE, pause, until},
};

pub struct Lab {
    pub dir: tempfile::TempDir,
    pub host: String,
    pub etcd: SocketAddr,
    pub ingress: SocketAddr,
    pub metrics: SocketAddr,
    pub tag: String,
    etcd_process: Option<Etcd>,
    nginx_process: Option<Child>,
    pub(super) agent_process: Option<Child>,
    images: std::sync::Mutex<Vec<String>>,
    shared_images: std::sync::Mutex<Vec<images::Shared>>,
    pub tcp_routes: Option<TcpRoutes>,
}

/// Settings that differ between labs.
#[derive(Default)]
pub struct Setup<'a> {
    /// Lines for the file's `[nginx]`.
    pub nginx: &'a str,
    /// Lines before all sections.
    pub top: &'a str,
    /// Sections after all others.
    pub sections: &'a str,
    /// Do not start the agent yet.
    pub no_agent: bool,
    /// Route TCP apps by the kernel's table, by addresses and a network of the lab's own.
    pub tcp_routes: bool,
    /// Use the etcd of another lab, in place of one of its own.
    pub etcd: Option<SocketAddr>,
}

impl Lab {
    pub fn new() -> Self {
        Self::with(&Setup::default())
    }

    pub fn with(setup: &Setup<'_>) -> Self {
        assert!(
            Command::new("docker")
                .arg("version")
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .is_ok_and(|s| s.success()),
            "these tests need a Docker engine; to leave them out on purpose: DEMAE_DOCKER=absent make test"
        );
        let dir = tempfile::Builder::new().prefix("demae-lab-").tempdir().expect("a directory");
        let tag = random();
        let lab = Self {
            host: format!("lab-{tag}"),
            etcd: setup.etcd.unwrap_or_else(free_address),
            ingress: free_address(),
            metrics: free_address(),
            etcd_process: None,
            nginx_process: None,
            agent_process: None,
            images: Vec::new().into(),
            shared_images: Vec::new().into(),
            tcp_routes: setup.tcp_routes.then(|| TcpRoutes::new(&tag)),
            tag,
            dir,
        };
        let mut lab = lab;
        lab.write_config(setup);
        if setup.etcd.is_none() {
            lab.start_etcd();
        }
        lab.start_nginx();
        if !setup.no_agent {
            lab.start_agent(&[]);
            lab.wait_ready();
        }
        lab
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write_config(&self, setup: &Setup<'_>) {
        let dir = self.dir.path().display();
        let base = 20_000 + u16::from_str_radix(&self.tag[..3], 16).expect("a number") % 190 * 50;
        let tcp_routes = match &self.tcp_routes {
            Some(own) => own.section(),
            None => "[tcp_routes]\nenabled = false\n".to_owned(),
        };
        let text = format!(
            "host = \"{}\"\nstate_dir = \"{dir}/state\"\nrun_dir = \"{dir}/run\"\nlisten = \"{}\"\npolicy = \"{dir}/policy.toml\"\n{}\n\
             [etcd]\nendpoints = [\"{}\"]\n[nginx]\nconf = \"{dir}/nginx.conf\"\naddress = \"{}\"\nlisten = [\"{}\"]\n\
             templates = \"{dir}/templates\"\n{}\n[ports]\nrange = \"{base}-{}\"\n{tcp_routes}{}",
            self.host,
            self.metrics,
            setup.top,
            self.etcd,
            self.ingress,
            self.ingress,
            setup.nginx,
            base + 49,
            setup.sections
        );
        fs::write(self.path("agent.toml"), text).expect("a file");
        // Workers run as `nobody`, as on most hosts: root could open sockets that no other user may.
        let user = if rustix::process::geteuid().is_root() { "user nobody nogroup;" } else { "" };
        fs::set_permissions(self.dir.path(), fs::Permissions::from_mode(0o755)).expect("a directory");
        let nginx = format!(
            "{user}\nworker_processes 2;\nworker_rlimit_nofile 8192;\npid {dir}/nginx.pid;\nerror_log {dir}/nginx-error.log;\n\
             events {{ worker_connections 2048; }}\nhttp {{ access_log off; keepalive_requests 1000000;\n\
             client_body_temp_path {dir}/tmp/a; proxy_temp_path {dir}/tmp/b; fastcgi_temp_path {dir}/tmp/c; uwsgi_temp_path {dir}/tmp/d; scgi_temp_path {dir}/tmp/e;\n\
             include {dir}/state/nginx/live/*.conf;\nserver {{ listen {}; server_name starting.invalid; return 503; }} }}\n",
            self.ingress
        );
        fs::write(self.path("nginx.conf"), nginx).expect("a file");
        fs::create_dir_all(self.path("tmp")).expect("a directory");
    }

    pub fn start_etcd(&mut self) {
        let began = Instant::now();
        loop {
            if self.etcd_process.as_mut().is_none_or(Etcd::has_ended) {
                // Not started yet, or exited: another process may have bound the port meanwhile.
                let own = [("etcd", free_address())];
                self.etcd_process = Some(Etcd::start(self.dir.path(), "etcd", self.etcd, &own, &[]));
            }
            if std::net::TcpStream::connect(self.etcd).is_ok() {
                return;
            }
            let log = || fs::read_to_string(self.path("etcd.log")).unwrap_or_default();
            assert!(began.elapsed() < PATIENCE, "etcd does not start: {}", log());
            pause();
        }
    }

    /// Sends `-STOP`, `-CONT` and the like to etcd.
    pub fn signal_etcd(&self, name: &str) {
        self.etcd_process.as_ref().expect("etcd runs").signal(name);
    }

    /// Revokes all leases, as etcd does when an agent sends no keep-alive for long.
    pub fn revoke_leases(&self) {
        let output = self.etcdctl().args(["lease", "list"]).output().expect("etcdctl runs");
        // The first line is their number.
        for lease in String::from_utf8_lossy(&output.stdout).lines().skip(1) {
            run(self.etcdctl().args(["lease", "revoke", lease]).stdout(Stdio::null()));
        }
    }

    pub fn stop_etcd(&mut self) {
        self.etcd_process = None;
    }

    pub fn start_nginx(&mut self) {
        let mut command = Command::new("nginx");
        command
            .arg("-c")
            .arg(self.path("nginx.conf"))
            .arg("-e")
            .arg(self.path("nginx-error.log"))
            .args(["-g", "daemon off;"]);
        self.nginx_process = Some(quiet(&mut command, &self.path("nginx.log")));
        let ingress = self.ingress;
        until("nginx takes connections", || std::net::TcpStream::connect(ingress).is_ok());
    }

    /// Stops nginx as its supervisor would.
    pub fn stop_nginx(&mut self) {
        if let Some(child) = &mut self.nginx_process {
            signal(child.id(), "-TERM");
            child.wait().expect("nginx ends");
        }
        self.nginx_process = None;
    }

    fn etcdctl(&self) -> Command {
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").arg("--endpoints").arg(self.etcd.to_string());
        command
    }

    /// Puts a key below `/demae/`.
    pub fn put(&self, key: &str, value: &str) {
        self.put_bytes(key, value.as_bytes());
    }

    pub fn put_bytes(&self, key: &str, value: &[u8]) {
        use std::io::Write as _;
        let mut command = self.etcdctl();
        command.arg("put").arg(format!("/demae/{key}")).stdin(Stdio::piped()).stdout(Stdio::null());
        let mut child = command.spawn().expect("etcdctl runs");
        child.stdin.take().expect("a pipe").write_all(value).expect("it is written");
        assert!(child.wait().expect("etcdctl ends").success(), "put {key}");
    }

    /// Puts many keys in one transaction.
    pub fn put_all(&self, pairs: &[(String, String)]) {
        use std::io::Write as _;
        let mut command = self.etcdctl();
        command.arg("txn").stdin(Stdio::piped()).stdout(Stdio::null());
        let mut child = command.spawn().expect("etcdctl runs");
        let puts: String = pairs.iter().map(|(k, v)| format!("put /demae/{k} {v:?}\n")).collect();
        // No conditions; the puts; nothing in the else branch.
        child.stdin.take().expect("a pipe").write_all(format!("\n{puts}\n\n").as_bytes()).expect("it is written");
        assert!(child.wait().expect("etcdctl ends").success(), "txn");
    }

    pub fn del(&self, key: &str) {
        run(self.etcdctl().arg("del").arg("--prefix").arg(format!("/demae/{key}")).stdout(Stdio::null()));
    }

    /// The value of a key below `/demae/`.
    pub fn get_key(&self, key: &str) -> String {
        let key = format!("/demae/{key}");
        let output = self.etcdctl().args(["get", "--print-value-only", &key]).output().expect("etcdctl runs");
        String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
    }

    /// The keys that begin so, as of one revision.
    pub fn list(&self, start: &str) -> Vec<String> {
        let start = format!("/demae/{start}");
        let output = self.etcdctl().args(["get", "--prefix", "--keys-only", &start]).output().expect("etcdctl runs");
        String::from_utf8_lossy(&output.stdout).lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
    }

    /// The current revision of the store.
    pub fn revision(&self) -> i64 {
        let output = self.etcdctl().args(["get", "/nothing", "-w", "json"]).output().expect("etcdctl runs");
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("json");
        json["header"]["revision"].as_i64().expect("a revision")
    }

    /// Compacts etcd's history up to now.
    pub fn compact(&self) {
        run(self.etcdctl().arg("compact").arg(self.revision().to_string()).stdout(Stdio::null()));
    }

    /// An image of the example app with this version. Removed with the lab.
    pub fn image(&self, version: &str) -> String {
        let name = format!("demae-lab-{}:{version}", self.tag);
        let mut images = self.images.lock().expect("no test panicked with it");
        if !images.contains(&name) {
            let shared = images::Shared::take(version, &self.path(&format!("image-{version}")));
            docker(&["tag", &shared.name, &name]);
            self.shared_images.lock().expect("no test panicked with it").push(shared);
            images.push(name.clone());
        }
        name
    }

    /// The same, shared with no other lab: for tests that remove it.
    pub fn own_image(&self, version: &str) -> String {
        let name = format!("demae-lab-{}-own:{version}", self.tag);
        let mut images = self.images.lock().expect("no test panicked with it");
        if !images.contains(&name) {
            images::build(&name, version, &self.path(&format!("own-{version}")));
            images.push(name.clone());
        }
        name
    }

    /// Removes an image with the lab.
    pub fn remove_on_drop(&self, image: String) {
        self.images.lock().expect("no test panicked with it").push(image);
    }

    /// A spec in socket mode, with more lines.
    pub fn socket_spec(&self, image: &str, host: &str, more: &str) -> String {
        let user = user_line();
        format!(
            "image: \"{image}\"\n{user}environment: {{SOCKET: /run/app/app.sock}}\nhealthcheck: {{http: /healthz, interval: 1s, start_period: 10s}}\n\
             ingress: {{hosts: [{host}], socket: /run/app/app.sock, drain: 10s}}\nstop_grace_period: 2s\n{more}"
        )
    }

    /// A spec in port mode, with more lines.
    pub fn port_spec(&self, image: &str, host: &str, more: &str) -> String {
        format!(
            "image: \"{image}\"\nhealthcheck: {{http: /healthz, interval: 1s, start_period: 10s}}\n\
             ingress: {{hosts: [{host}], port: 8080, drain: 10s}}\nstop_grace_period: 2s\n{more}"
        )
    }

    pub fn status(&self) -> Option<HostStatus> {
        let (code, body) = load::get(self.metrics, "localhost", "/status").ok()?;
        (code == 200).then(|| serde_json::from_str(&body).expect("a status"))
    }

    pub fn app(&self, app: &str) -> Option<AppStatus> {
        self.status()?.apps.into_iter().find(|a| a.app == app)
    }

    /// Whether the agent answers, and its answer has no such app.
    pub fn lists_no(&self, app: &str) -> bool {
        self.status().is_some_and(|status| status.apps.iter().all(|a| a.app != app))
    }

    /// Waits until an app's status matches.
    pub fn wait_app(&self, app: &str, what: &str, fits: impl Fn(&AppStatus) -> bool) -> AppStatus {
        let began = Instant::now();
        loop {
            let status = self.app(app);
            if let Some(status) = status.as_ref().filter(|s| fits(s)) {
                return status.clone();
            }
            assert!(
                began.elapsed() < PATIENCE,
                "`{app}` is not {what} after {PATIENCE:?}: {status:#?}\n{}\n{}",
                self.agent_log(),
                fs::read_to_string(self.path("nginx-error.log")).unwrap_or_default()
            );
            std::thread::yield_now();
            pause();
        }
    }

    /// Waits until the agent has seen this revision and every app has converged.
    pub fn wait_converged(&self, revision: i64) -> HostStatus {
        let began = Instant::now();
        loop {
            let status = self.status();
            let fits =
                |s: &HostStatus| s.store.revision >= revision && s.apps.iter().all(|a| a.state == State::Converged);
            if let Some(status) = status.as_ref().filter(|s| fits(s)) {
                return status.clone();
            }
            assert!(began.elapsed() < PATIENCE * 2, "not converged: {status:#?}\n{}", self.agent_log());
            pause();
        }
    }

    /// Puts a key and waits until the new release serves; the old one may still be draining.
    pub fn take_over(&self, app: &str, key: &str, value: &str) -> AppStatus {
        let before = self.app(app).and_then(|a| a.release);
        self.put(key, value);
        self.wait_app(app, "serving another release", |s| s.release != before && s.serving.is_none() && s.healthy > 0)
    }

    /// Puts a key and waits until the app has converged on it.
    pub fn deploy(&self, app: &str, key: &str, value: &str) -> AppStatus {
        let before = self.app(app).and_then(|a| a.release);
        self.put(key, value);
        self.wait_app(app, "converged on another release", |s| s.state == State::Converged && s.release != before)
    }

    /// The value of a series in `/metrics`, summed over its labels that contain a text.
    pub fn metric(&self, name: &str, labels: &str) -> f64 {
        let (_, text) = load::get(self.metrics, "localhost", "/metrics").expect("metrics");
        let lines = text.lines().filter(|l| l.starts_with(name) && l.contains(labels));
        lines
            .filter(|l| matches!(l.as_bytes().get(name.len()), Some(b' ' | b'{')))
            .filter_map(|l| l.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    }

    /// Names of the containers of this lab.
    pub fn containers(&self) -> Vec<String> {
        let output =
            docker(&["ps", "-a", "--filter", &format!("label=demae.host={}", self.host), "--format", "{{.Names}}"]);
        output.lines().map(str::to_owned).collect()
    }

    /// Every file below the state and run directories that does not exist on an empty host.
    pub fn traces(&self) -> Vec<String> {
        let mut found = Vec::new();
        for dir in ["state/routes", "state/tcp-routes", "state/sockets", "state/proven", "state/verdicts", "run/env"] {
            walk(&self.path(dir), &mut found);
        }
        found.retain(|p| !p.ends_with("/"));
        found
    }

    /// Everything below the agent's two directories.
    pub fn files(&self) -> Vec<String> {
        let mut found = Vec::new();
        for dir in ["state", "run"] {
            walk(&self.path(dir), &mut found);
        }
        found.sort();
        found
    }

    /// One request through nginx, on a connection of its own.
    pub fn get(&self, host: &str, path: &str) -> Result<(u16, String), String> {
        load::get(self.ingress, host, path)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        kill(&mut self.agent_process);
        // Read before the containers go: a load that still runs fills the log with refused connections then.
        let nginx_log = fs::read_to_string(self.path("nginx-error.log")).unwrap_or_default();
        remove_all(&self.host);
        for image in self.images.lock().unwrap_or_else(std::sync::PoisonError::into_inner).iter() {
            docker(&["rmi", "-f", image]);
        }
        if let Some(own) = &self.tcp_routes {
            own.remove();
        }
        self.stop_nginx();
        self.etcd_process = None;
        let contradictions: Vec<String> =
            self.agent_log().lines().filter(|l| l.contains("model and host differ")).map(str::to_owned).collect();
        if std::thread::panicking() || !contradictions.is_empty() {
            for (name, log) in [("agent", self.agent_log()), ("nginx", nginx_log)] {
                eprintln!("the end of the {name}'s log:");
                let lines: Vec<&str> = log.lines().collect();
                for line in &lines[lines.len().saturating_sub(40)..] {
                    eprintln!("  {line}");
                }
            }
        }
        assert!(
            std::thread::panicking() || contradictions.is_empty(),
            "the model of a step is wrong: {contradictions:#?}"
        );
    }
}

fn walk(dir: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        found.push(path.display().to_string());
        if path.is_dir() && !path.is_symlink() {
            walk(&path, found);
        }
    }
}

/// A line for specs: apps run as the user of the test, so that a test that is not root can reach their sockets.
pub fn user_line() -> String {
    use std::os::unix::fs::MetadataExt as _;
    match fs::metadata("/proc/self") {
        Ok(meta) if meta.uid() != 0 => format!("user: \"{}:{}\"\n", meta.uid(), meta.gid()),
        _ => String::new(),
    }
}
