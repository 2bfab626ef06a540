//! nginx restarts between two steps of a deploy, loses its master, or rejects changes.
#![expect(clippy::disallowed_methods, reason = "a test runs programs and writes files of its own")]

use std::{
    fs,
    net::{SocketAddr, TcpListener},
    os::fd::OwnedFd,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use crate::support::{
    containers::{ids, inspect, is_done, only},
    lab::{Lab, Setup},
    load::{self, Client, Load},
    names::free_address,
    process::{docker, run},
    wait::until,
};
use demae::model::status::{AppStatus, State};
use rustix::fs::inotify;

/// An nginx whose supervisor holds its listening socket, as systemd would: while nginx is down, connections wait in the
/// backlog and none is refused. So every failure is a failure of nginx.
///
/// nginx inherits sockets by the numbers in `NGINX`, which it normally sets for its successor; here the socket is its
/// standard input.
struct Supervised {
    listener: TcpListener,
    address: SocketAddr,
    conf: PathBuf,
    log: PathBuf,
    child: Option<Child>,
}

impl Supervised {
    /// Replaces the lab's own nginx.
    fn start(lab: &mut Lab) -> Self {
        lab.stop_nginx();
        let listener = TcpListener::bind(lab.ingress).expect("the address is free");
        // nginx treats it as a listening socket of its own, and those are non-blocking.
        listener.set_nonblocking(true).expect("a socket");
        let (conf, log) = (lab.path("nginx.conf"), lab.path("nginx-error.log"));
        let mut supervised = Self { listener, address: lab.ingress, conf, log, child: None };
        supervised.run();
        supervised
    }

    fn run(&mut self) {
        let socket = OwnedFd::from(self.listener.try_clone().expect("a socket"));
        let mut command = Command::new("nginx");
        command.arg("-c").arg(&self.conf).arg("-e").arg(&self.log).args(["-g", "daemon off;"]).env("NGINX", "0;");
        command.stdin(Stdio::from(socket)).stdout(Stdio::null()).stderr(Stdio::null());
        self.child = Some(command.spawn().expect("nginx runs"));
        // Connecting proves nothing here: the supervisor's socket always accepts.
        let address = self.address;
        until("nginx answers", || load::get(address, "starting.invalid", "/").is_ok());
    }

    /// Sends this signal and waits for its exit.
    fn end(&mut self, signal: &str) {
        let Some(mut child) = self.child.take() else { return };
        let mut all = vec![child.id()];
        if signal == "KILL" {
            // With SIGKILL a master cannot stop its workers.
            all.extend(children(child.id()));
        }
        for pid in all {
            send(signal, pid);
        }
        child.wait().expect("it ends");
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        self.end("TERM");
    }
}

/// Workers without a master. They are killed with the test.
struct Orphans(Vec<u32>);

impl Orphans {
    /// Kills the master of the lab's nginx and keeps its workers.
    fn make(lab: &Lab) -> Self {
        let master = master(lab);
        let orphans = Self(children(master));
        send("KILL", master);
        until("the master has ended", || children(master).is_empty());
        orphans
    }

    fn end(&mut self) {
        for pid in self.0.drain(..) {
            send("KILL", pid);
            until("a worker has ended", || !is_nginx(pid));
        }
    }
}

impl Drop for Orphans {
    fn drop(&mut self) {
        for pid in self.0.drain(..) {
            send("KILL", pid);
        }
    }
}

fn send(signal: &str, pid: u32) {
    // It may have exited by itself.
    let _ = Command::new("kill").args([&format!("-{signal}"), &pid.to_string()]).stderr(Stdio::null()).status();
}

fn children(pid: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().filter_map(|p| p.parse().ok()).collect()
}

/// True if this process runs nginx. A zombie does not.
fn is_nginx(pid: u32) -> bool {
    fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.starts_with(b"nginx"))
}

fn master(lab: &Lab) -> u32 {
    let text = fs::read_to_string(lab.path("nginx.pid")).expect("nginx runs");
    text.trim().parse().expect("a number")
}

/// Two apps, one behind a socket and one behind a port.
fn two_apps(lab: &Lab) {
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    lab.deploy("port", "apps/port/spec", &lab.port_spec(&lab.image("v1"), "port.test", ""));
    lab.image("v2");
}

/// Deploys back and forth; during each deploy, one step later each time, nginx is stopped and started again.
fn restart_in_deploys(lab: &Lab, nginx: &mut Supervised, app: &str, moments: &[&str], signals: &[&str]) {
    for (round, moment) in moments.iter().enumerate() {
        let image = lab.image(if round % 2 == 0 { "v2" } else { "v1" });
        let step = format!("\"step\":\"{moment}\"");
        let known = lab.agent_log().matches(&step).count();
        lab.put(&format!("apps/{app}/image"), &image);
        until("a step of the deploy", || lab.agent_log().matches(&step).count() > known);
        nginx.end(signals[round % signals.len()]);
        nginx.run();
        lab.wait_app(app, "converged", is_done(&image));
        assert_eq!(ids(lab, app).len(), 1, "after `{moment}`");
    }
}

/// Steps of a socket-mode and of a port-mode deploy. The last one of each comes after the switch is done.
const MOMENTS: [(&str, [&str; 5]); 2] =
    [("web", ["create", "start", "switch", "prove", "stop"]), ("port", ["create", "start", "nginx", "prove", "stop"])];

#[test]
fn graceful_nginx_restart_between_any_two_steps_loses_nothing() {
    let mut lab = Lab::with(&Setup { no_agent: true, nginx: "profile = \"strict\"", ..Setup::default() });
    let mut nginx = Supervised::start(&mut lab);
    lab.start_agent(&[]);
    two_apps(&lab);
    for (app, moments) in MOMENTS {
        let quick = Duration::from_millis(5);
        let mut clients: Vec<Client> =
            [Client::get(true), Client::get(false), Client::post(false)].map(|c| c.pausing(quick)).into();
        // A graceful stop waits for this one.
        clients.push(Client::slow(false, 500));
        let load = Load::start(lab.ingress, &format!("{app}.test"), clients);
        until("requests are served", || load.requests() > 50);
        restart_in_deploys(&lab, &mut nginx, app, &moments, &["QUIT"]);
        let tally = load.stop();
        assert_eq!((tally.failed, tally.stale), (0, 0), "{app}: {:#?}", tally.reasons);
        assert!(tally.versions.len() >= 2, "both versions answered: {:?}", tally.versions);
    }
}

/// Killing nginx loses the requests in flight in it, and only those: at most one per client and kill. No request that
/// reached nginx fails because it finds no upstream.
#[test]
fn nginx_killed_between_any_two_steps_loses_only_requests_in_flight() {
    let mut lab = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    let mut nginx = Supervised::start(&mut lab);
    lab.start_agent(&[]);
    two_apps(&lab);
    for (app, moments) in MOMENTS {
        let clients = vec![Client::get(false), Client::post(false), Client::slow(false, 1000)];
        let most = (clients.len() * moments.len()) as u64;
        let load = Load::start(lab.ingress, &format!("{app}.test"), clients);
        until("requests are served", || load.requests() > 50);
        restart_in_deploys(&lab, &mut nginx, app, &moments, &["KILL", "TERM"]);
        let tally = load.stop();
        assert_eq!(tally.wrong, 0, "{app}: error responses by nginx: {:#?}", tally.reasons);
        assert!(tally.failed <= most, "{app}: {} of at most {most}: {:#?}", tally.failed, tally.reasons);
    }
}

#[test]
fn nginx_without_its_master_keeps_serving_and_reloads_wait() {
    let mut lab = Lab::new();
    two_apps(&lab);
    let image = lab.image("v2");
    let start = |host: &str| Load::start(lab.ingress, host, vec![Client::get(false), Client::slow(false, 1000)]);
    let loads = [start("web.test"), start("port.test")];
    let mut orphans = Orphans::make(&lab);
    // In socket mode nothing needs the master.
    lab.deploy("web", "apps/web/image", &image);
    let before = only(&lab, "port");
    lab.put("apps/port/image", &image);
    let status = lab.wait_app("port", "waiting for nginx", |s| s.reason.contains("nginx does not run"));
    assert_eq!(status.state, State::Converging);
    // No nginx set ever routed to a candidate that was never healthy, so it is removed once it is superseded.
    let known = ids(&lab, "port");
    lab.put("env/port/MOOD", "sick");
    let sick =
        || ids(&lab, "port").into_iter().find(|id| !known.contains(id) && inspect(id, "{{.State.Running}}") == "true");
    until("there is another candidate", || sick().is_some());
    let sick = sick().expect("a candidate");
    let failed = || lab.metric("demae_nginx_reloads_total", "failed");
    let known = failed();
    until("nginx was inspected since", || failed() > known);
    lab.del("env/port/MOOD");
    until("it is removed", || !ids(&lab, "port").contains(&sick));
    // The drain of the old instance is 10 s. Orphaned workers route to it as long as they live.
    until("it was tried for longer than a drain takes", || failed() >= 5.0);
    assert!(ids(&lab, "port").contains(&before), "it is not stopped while requests are routed to it");
    for load in loads {
        let tally = load.stop();
        assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    }
    // Only now can another master listen.
    orphans.end();
    lab.stop_nginx();
    lab.start_nginx();
    lab.wait_app("port", "converged", is_done(&image));
    for host in ["web.test", "port.test"] {
        assert!(lab.get(host, "/").expect("an answer").1.contains("version=v2"), "{host}");
    }
}

/// A closed path for a moment is enough to lose a request, and too short for a test to hit: nothing is touched at all.
#[test]
fn deploys_do_not_touch_the_socket_path_of_other_instances() {
    assert!(rustix::process::geteuid().is_root(), "this needs a test that is root");
    let lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let before = lab.path("state/sockets/web").read_dir().expect("a directory").next().expect("an instance");
    let instance = before.expect("a directory").path();
    let way = [lab.path("state/sockets"), lab.path("state/sockets/web"), instance.join("app.sock"), instance];
    let changes = inotify::init(inotify::CreateFlags::NONBLOCK).expect("inotify");
    for place in &way {
        inotify::add_watch(&changes, place, inotify::WatchFlags::ATTRIB).expect("a watch");
    }
    lab.deploy("other", "apps/other/spec", &lab.socket_spec(&lab.image("v1"), "other.test", ""));
    let two = "deploy: {replicas_per_host: 2}";
    lab.put("apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", two));
    lab.wait_app("web", "two instances", |s| s.state == State::Converged && s.healthy == 2);
    let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
    let mut events = inotify::Reader::new(&changes, &mut buffer);
    // A directory also reports changes of its entries, with a name.
    let touched = std::iter::from_fn(|| events.next().ok().map(|e| (e.wd(), e.file_name().is_none())));
    let touched: Vec<i32> = touched.filter_map(|(number, itself)| itself.then_some(number)).collect();
    assert!(touched.is_empty(), "{touched:?}, by number from 1: {way:?}");
}

/// The users to open a socket for are only known while nginx runs, so it is opened then at the latest.
#[test]
fn app_started_while_nginx_is_down_is_reachable_once_it_is_back() {
    let mut lab = Lab::new();
    two_apps(&lab);
    let image = lab.image("v2");
    let switch = "\"step\":\"switch\"";
    let known = lab.agent_log().matches(switch).count();
    lab.stop_nginx();
    lab.put("apps/web/image", &image);
    until("all routes lead to the new one", || lab.agent_log().matches(switch).count() > known);
    let status = lab.app("web").expect("a status");
    assert!(status.state == State::Converging && ids(&lab, "web").len() == 2, "it is not proven: {status:?}");
    lab.start_nginx();
    let load = Load::start(lab.ingress, "web.test", vec![Client::get(false), Client::post(false)]);
    lab.wait_app("web", "converged", is_done(&image));
    assert!(lab.get("web.test", "/").expect("an answer").1.contains("version=v2"));
    let tally = load.stop();
    assert_eq!(tally.wrong, 0, "it is reachable from the first request on: {:#?}", tally.reasons);
}

#[test]
fn every_app_is_reachable_after_a_boot_in_which_nginx_started_last() {
    let mut lab = Lab::new();
    two_apps(&lab);
    lab.kill_agent();
    lab.stop_nginx();
    for name in lab.containers() {
        docker(&["stop", "-t", "0", &name]);
    }
    lab.start_agent(&[]);
    for app in ["web", "port"] {
        lab.wait_app(app, "healthy", |s| s.healthy == 1);
    }
    lab.start_nginx();
    for host in ["web.test", "port.test"] {
        until(&format!("`{host}` is reachable"), || lab.get(host, "/").is_ok_and(|(code, _)| code == 200));
    }
}

/// Debian's package does this at each upgrade: a new master takes over from the old one, and both serve for a while.
#[test]
fn nginx_upgrade_during_a_deploy_loses_nothing() {
    let mut lab = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    // USR2 needs a daemonised nginx and an absolute path of its binary.
    lab.stop_nginx();
    let conf = [lab.path("nginx.conf"), lab.path("nginx-error.log")];
    run(Command::new("/usr/sbin/nginx").arg("-c").arg(&conf[0]).arg("-e").arg(&conf[1]));
    until("nginx runs", || fs::read_to_string(lab.path("nginx.pid")).is_ok_and(|text| text.ends_with('\n')));
    let first = Daemon(master(&lab));
    lab.start_agent(&[]);
    lab.deploy("port", "apps/port/spec", &lab.port_spec(&lab.image("v1"), "port.test", ""));
    let image = lab.image("v2");
    let load = Load::start(lab.ingress, "port.test", vec![Client::get(false), Client::post(false)]);
    send("USR2", first.0);
    until("there is another master", || {
        let text = fs::read_to_string(lab.path("nginx.pid")).unwrap_or_default();
        text.ends_with('\n') && text.trim() != first.0.to_string()
    });
    let second = Daemon(master(&lab));
    until("it has workers", || !children(second.0).is_empty());
    lab.put("apps/port/image", &image);
    until("the draining workers are counted", || lab.metric("demae_nginx_draining_workers", "") >= 2.0);
    send("QUIT", first.0);
    lab.wait_app("port", "converged", is_done(&image));
    until("no draining worker is left", || lab.metric("demae_nginx_draining_workers", "") < 1.0);
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
}

/// A daemonised nginx master.
struct Daemon(u32);

impl Drop for Daemon {
    fn drop(&mut self) {
        send("TERM", self.0);
    }
}

/// The operator's file loses demae's include. nginx keeps serving; no set becomes live that it would not load.
#[test]
fn missing_include_keeps_the_live_nginx_files() {
    let lab = Lab::with(&Setup { top: "resync = \"1s\"", ..Setup::default() });
    two_apps(&lab);
    let text = fs::read_to_string(lab.path("nginx.conf")).expect("a file");
    let include = format!("include {}/*.conf;", lab.path("state/nginx/live").display());
    assert!(text.contains(&include), "{text}");
    fs::write(lab.path("nginx.conf"), text.replace(&include, "")).expect("a file");
    let before = (fs::read_link(lab.path("state/nginx/live")).expect("a live set"), only(&lab, "port"));
    let load = Load::start(lab.ingress, "port.test", vec![Client::get(false), Client::post(false)]);
    lab.put("apps/port/image", &lab.image("v2"));
    let is_reported = |s: &AppStatus| s.reason.contains("does not include demae's files; add");
    lab.wait_app("port", "reporting the missing include", is_reported);
    // In socket mode nothing needs nginx's files.
    lab.deploy("web", "apps/web/image", &lab.image("v2"));
    assert_eq!(fs::read_link(lab.path("state/nginx/live")).expect("a live set"), before.0);
    assert!(ids(&lab, "port").contains(&before.1), "requests are routed to it");
    fs::write(lab.path("nginx.conf"), text).expect("a file");
    lab.wait_app("port", "converged", is_done(&lab.image("v2")));
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
}

/// A replacement is not a new release and needs no proof. Even so, an instance with routes is not stopped.
#[test]
fn instance_that_nginx_still_routes_to_outlives_its_replacement() {
    let mut lab = Lab::new();
    lab.deploy("port", "apps/port/spec", &lab.port_spec(&lab.image("v1"), "port.test", ""));
    let before = only(&lab, "port");
    let load = Load::start(lab.ingress, "port.test", vec![Client::get(false), Client::post(false)]);
    let mut orphans = Orphans::make(&lab);
    lab.get("port.test", "/sicken").expect("an answer");
    until("there is a replacement", || ids(&lab, "port").len() == 2);
    until("it was tried for longer than a drain takes", || lab.metric("demae_nginx_reloads_total", "failed") >= 5.0);
    assert!(ids(&lab, "port").contains(&before));
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    orphans.end();
    lab.stop_nginx();
    lab.start_nginx();
    lab.wait_app("port", "converged", |s| s.state == State::Converged && s.healthy == 1);
    assert!(!ids(&lab, "port").contains(&before));
}

#[test]
fn manual_reload_changes_nothing_and_disturbs_no_deploy() {
    let lab = Lab::with(&Setup { top: "resync = \"1s\"", ..Setup::default() });
    two_apps(&lab);
    let image = lab.image("v2");
    let start = |host: &str| Load::start(lab.ingress, host, vec![Client::get(false), Client::slow(false, 1000)]);
    let loads = [start("web.test"), start("port.test")];
    let master = master(&lab);
    let reload = || {
        let before = children(master);
        send("HUP", master);
        until("nginx has new workers", || children(master).iter().any(|pid| !before.contains(pid)));
    };
    let state = || (lab.metric("demae_nginx_reloads_total", ""), only(&lab, "web"), only(&lab, "port"));
    let before = state();
    for _ in 0..5 {
        reload();
    }
    let lists = lab.metric("demae_docker_lists_total", "");
    until("two full lists of containers", || lab.metric("demae_docker_lists_total", "") >= lists + 2.0);
    assert_eq!(state(), before, "nothing changed");
    let status = lab.status().expect("a status");
    assert!(status.proxy.is_none() && status.apps.iter().all(|a| a.state == State::Converged), "{status:?}");
    // During a deploy that needs a reload of its own.
    let count = |moment: &str| lab.agent_log().matches(&format!("\"step\":\"{moment}\"")).count();
    let moments = ["create", "start", "nginx", "prove"].map(|moment| (moment, count(moment)));
    lab.put("apps/port/image", &image);
    for (moment, known) in moments {
        until("a step of the deploy", || count(moment) > known);
        reload();
    }
    lab.wait_app("port", "converged", is_done(&image));
    assert_eq!(lab.metric("demae_nginx_reloads_total", ""), before.0 + 1.0, "the agent reloaded once");
    for load in loads {
        let tally = load.stop();
        assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    }
}

#[test]
fn reload_that_nginx_accepts_and_does_not_apply_stops_nothing() {
    let lab = Lab::new();
    lab.deploy("port", "apps/port/spec", &lab.port_spec(&lab.image("v1"), "port.test", ""));
    let (before, image) = (only(&lab, "port"), lab.image("v2"));
    let load = Load::start(lab.ingress, "port.test", vec![Client::get(false), Client::slow(false, 1000)]);
    // A port in use by another process: `nginx -t` accepts it, a reload fails on it.
    let taken = TcpListener::bind(free_address()).expect("a port");
    let address = taken.local_addr().expect("an address");
    let text = fs::read_to_string(lab.path("nginx.conf")).expect("a file");
    let more = text.replacen("server {", &format!("server {{ listen {address}; return 404; }}\nserver {{"), 1);
    assert_ne!(more, text);
    fs::write(lab.path("nginx.conf"), more).expect("a file");
    lab.put("apps/port/image", &image);
    let status = lab.wait_app("port", "reporting the failed reload", |s| s.reason.contains("no worker answers with"));
    assert_eq!((status.state, status.healthy), (State::Converging, 1));
    // Each attempt takes 10 s, as long as the drain.
    until("it was tried twice", || lab.metric("demae_nginx_reloads_total", "failed") >= 2.0);
    assert!(ids(&lab, "port").contains(&before), "it is not stopped while requests are routed to it");
    assert!(lab.get("port.test", "/").expect("an answer").1.contains("version=v1"));
    drop(taken);
    lab.wait_app("port", "converged", is_done(&image));
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
}
