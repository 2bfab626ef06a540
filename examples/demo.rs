//! The tour: a complete demae on this machine, deploys under load, every request counted.
//!
//! Starts `demae dev`, puts v1, then v2 while clients send requests without pause, then a v3 that never gets healthy,
//! then v2 with another variable; in socket mode, and again in port mode. Exits non-zero if a request failed.
#![expect(
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a program for people, which starts programs and keeps files of its own"
)]

#[path = "../tests/support/load.rs"]
#[expect(dead_code, reason = "the tests use all of it")]
mod load;

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use demae::model::status::{AppStatus, HostStatus, State};
use load::{Client, Load, Tally};

const TIMEOUT: Duration = Duration::from_secs(90);

fn main() -> ExitCode {
    let mut demo = Demo::open();
    demo.build_images();
    demo.start();
    let mut total = Tally::default();

    say("\n== socket mode: nginx finds the app through a symlink, and a switch is one rename ==");
    let pause = Duration::from_millis(2);
    let socket = "environment: {SOCKET: /run/app/app.sock}\ningress: {hosts: [shop.localhost], socket: /run/app/app.sock, drain: 30s}\n";
    let clients = [(true, false), (false, false), (true, true), (false, true)];
    let mut clients: Vec<Client> =
        clients.map(|(keep_alive, post)| Client { post, ..Client::get(keep_alive) }.pausing(pause)).to_vec();
    clients.extend([Client::slow(true, 2000), Client::slow(false, 2000)]);
    demo.run_sequence("shop", socket, clients, &mut total);

    say("\n== port mode: a loopback port, and a reload that is proven before the old instance drains ==");
    say("(clients open a connection for each request: before nginx 1.27.4 a reload may cost requests on connections");
    say(" that are reused, unless `nginx.profile` is `strict`; docs/failure-modes.md has the figures)");
    let port = "ingress: {hosts: [api.localhost], port: 8080, drain: 30s}\n";
    let clients =
        vec![Client::get(false).pausing(pause), Client::post(false).pausing(pause), Client::slow(false, 2000)];
    demo.run_sequence("api", port, clients, &mut total);

    let failed = total.failed + total.stale;
    for reason in &total.reasons {
        say(&format!("  {reason}"));
    }
    drop(demo);
    say(&format!("\nslowest request (except the deliberately slow ones): {:?}", total.slowest));
    say(&format!("requests: {}  failed: {failed}", total.requests));
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn say(text: &str) {
    println!("{text}");
}

struct Demo {
    root: PathBuf,
    dir: PathBuf,
    tag: String,
    env: BTreeMap<String, String>,
    dev: Option<Child>,
}

impl Demo {
    fn open() -> Self {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/demo");
        let tag = format!("{:x}", std::process::id());
        // Sockets are below it, and the kernel limits their paths to 107 bytes.
        let dir = std::env::temp_dir().join(format!("demae-demo-{tag}"));
        fs::create_dir_all(&root).expect("a directory");
        Self { root, dir, tag, env: BTreeMap::new(), dev: None }
    }

    fn image(&self, version: &str) -> String {
        format!("demae-demo-{}:{version}", self.tag)
    }

    /// Builds three tiny images FROM scratch with the static example app.
    fn build_images(&self) {
        say("building the example app, static, and three images around it");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/app.rs");
        let mut rustc = Command::new("rustc");
        rustc.args(["--edition", "2024", "-O", "-C", "target-feature=+crt-static", "-C", "strip=symbols", "-o"]);
        run(rustc.arg(self.root.join("app")).arg(source));
        for (version, mood) in [("v1", ""), ("v2", ""), ("v3", "sick")] {
            let text =
                format!("FROM scratch\nCOPY app /app\nENV VERSION={version} MOOD={mood}\nENTRYPOINT [\"/app\"]\n");
            fs::write(self.root.join("Dockerfile"), text).expect("a file");
            let mut docker = Command::new("docker");
            docker.args(["build", "-q", "--no-cache", "--force-rm", "-t", &self.image(version)]).arg(&self.root);
            run(docker.stdout(Stdio::null()).stderr(Stdio::null()));
        }
    }

    fn start(&mut self) {
        let demae = std::env::current_exe()
            .expect("a path")
            .parent()
            .and_then(Path::parent)
            .expect("a directory")
            .join("demae");
        let log = fs::File::create(self.root.join("demae.log")).expect("a log");
        let mut command = Command::new(demae);
        command.arg("dev").arg("--dir").arg(&self.dir).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.dev = Some(command.spawn().expect("demae starts"));
        let file = self.dir.join("dev.env");
        wait("demae is up", || file.exists() || self.has_ended(), || self.log());
        for line in fs::read_to_string(&file).unwrap_or_default().lines() {
            if let Some((name, value)) = line.trim_start_matches("export ").split_once('=') {
                self.env.insert(name.to_owned(), value.to_owned());
            }
        }
        assert!(self.env.contains_key("DEMAE_INGRESS"), "demae does not start: {}", self.log());
        say(&format!(
            "a private etcd at {}, a private nginx at {}",
            self.env["ETCDCTL_ENDPOINTS"], self.env["DEMAE_INGRESS"]
        ));
    }

    fn has_ended(&self) -> bool {
        let Some(dev) = &self.dev else { return true };
        !Path::new(&format!("/proc/{}", dev.id())).exists()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.root.join("demae.log")).unwrap_or_default()
    }

    fn address(&self, name: &str) -> SocketAddr {
        let url = self.env[name].trim_start_matches("http://");
        url.split('/').next().and_then(|a| a.parse().ok()).expect("an address")
    }

    fn put(&self, key: &str, value: &str) {
        let shown = if value.contains('\n') { "'...'".to_owned() } else { value.to_owned() };
        say(&format!("\n$ etcdctl put /demae/{key} {shown}"));
        let mut etcdctl = Command::new("etcdctl");
        etcdctl.envs(&self.env).args(["put", &format!("/demae/{key}"), value]).stdout(Stdio::null());
        run(&mut etcdctl);
    }

    fn status(&self, app: &str) -> Option<AppStatus> {
        let (_, body) = load::get(self.address("DEMAE_METRICS"), "localhost", "/status").ok()?;
        let status: HostStatus = serde_json::from_str(&body).ok()?;
        status.apps.into_iter().find(|a| a.app == app)
    }

    fn wait(&self, app: &str, what: &str, matches: impl Fn(&AppStatus) -> bool) -> AppStatus {
        let mut found = None;
        wait(
            &format!("`{app}` is {what}"),
            || {
                found = self.status(app).filter(|s| matches(s));
                found.is_some()
            },
            || self.log(),
        );
        found.expect("a status")
    }

    /// Puts a key, waits for convergence, and prints the timeline.
    fn deploy(&self, app: &str, key: &str, value: &str) -> AppStatus {
        let before = self.status(app).and_then(|s| s.release);
        self.put(key, value);
        let status = self.wait(app, "converged", |s| s.state == State::Converged && s.release != before);
        show(&status);
        status
    }

    /// The whole sequence for one app.
    fn run_sequence(&self, app: &str, ingress: &str, clients: Vec<Client>, total: &mut Tally) {
        let check = "healthcheck: {http: /healthz, start_period: 2s, interval: 500ms}\nstop_grace_period: 2s\n";
        let spec = format!("image: {}\n{}{check}{ingress}", self.image("v1"), user());
        for line in spec.lines() {
            say(&format!("    {line}"));
        }
        self.deploy(app, &format!("apps/{app}/spec"), &spec);
        let host = format!("{app}.localhost");
        say("\nclients start, and do not pause");
        let load = Load::start(self.address("DEMAE_INGRESS"), &host, clients);
        wait("requests flow", || load.requests() > 200, || self.log());

        self.deploy(app, &format!("apps/{app}/image"), &self.image("v2"));

        self.put(&format!("apps/{app}/image"), &self.image("v3"));
        let broken = self.wait(app, "blocked", |s| s.state == State::Blocked);
        show(&broken);
        say(&format!("    v3 gets no traffic; the verdict: {}", broken.reason));
        if let Some(verdict) = &broken.verdict {
            say(&format!("    the last line of its log: {}", verdict.log_tail.lines().last().unwrap_or("none")));
        }
        self.wait(app, "rid of the candidate", |s| !s.reason.contains("under way"));

        self.put(&format!("apps/{app}/image"), &self.image("v2"));
        self.wait(app, "back on v2, which never stopped", |s| s.state == State::Converged);
        self.deploy(app, &format!("env/{app}/GREETING"), "hello");

        let tally = load.stop();
        say(&format!(
            "\n{app}: requests: {}  failed: {}  answers by version: {:?}",
            tally.requests,
            tally.failed + tally.stale,
            tally.versions
        ));
        let (_, body) = load::get(self.address("DEMAE_INGRESS"), &host, "/").unwrap_or_default();
        say(&format!("now: {}", body.trim()));
        total.requests += tally.requests;
        total.failed += tally.failed;
        total.stale += tally.stale;
        total.reasons.extend(tally.reasons);
        total.slowest = total.slowest.max(tally.slowest);
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        if let Some(mut dev) = self.dev.take() {
            say("\ncleaning up");
            // It may have exited, and cleaned up, by itself.
            let _ = Command::new("kill").args(["-INT", &dev.id().to_string()]).status();
            let _ = dev.wait();
        }
        for version in ["v1", "v2", "v3"] {
            let _ = Command::new("docker")
                .args(["rmi", "-f", &self.image(version)])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
        }
        let _ = fs::remove_dir(&self.dir);
    }
}

/// Prints the timeline of a change, in milliseconds since it was read from the store.
fn show(status: &AppStatus) {
    let moments: Vec<String> = status.timeline.iter().map(|m| format!("{} {}", m.what, m.ms)).collect();
    say(&format!("    ms: put 0, {}", moments.join(", ")));
}

/// Without root the apps run as the current user, so that nginx may reach their sockets.
fn user() -> String {
    use std::os::unix::fs::MetadataExt as _;
    match fs::metadata("/proc/self") {
        Ok(meta) if meta.uid() != 0 => format!("user: \"{}:{}\"\n", meta.uid(), meta.gid()),
        _ => String::new(),
    }
}

fn run(command: &mut Command) {
    let status = command.status();
    assert!(status.as_ref().is_ok_and(std::process::ExitStatus::success), "{command:?}: {status:?}");
}

fn wait(what: &str, mut condition: impl FnMut() -> bool, log: impl Fn() -> String) {
    let began = Instant::now();
    while !condition() {
        if began.elapsed() > TIMEOUT {
            let log = log();
            let lines: Vec<&str> = log.lines().collect();
            panic!("not within {TIMEOUT:?}: {what}\n{}", lines[lines.len().saturating_sub(20)..].join("\n"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
