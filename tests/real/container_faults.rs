//! Containers that conflict, do not stop, find no port, run out of memory, or are changed manually.
#![expect(clippy::disallowed_methods, reason = "a test runs programs and reads files of its own")]

use std::{
    fs, net::TcpListener, ops::RangeInclusive, os::unix::fs::PermissionsExt as _, path::PathBuf, process::Command,
    time::Duration,
};

use crate::support::{
    containers::{Foreign, ids, inspect, is_done, kill_and_wait, only},
    lab::{Lab, Setup},
    load::{Client, Load, mixed},
    process::docker,
    relay::{Relay, is},
    wait::until,
};
use demae::model::status::State;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

fn lab() -> Lab {
    Lab::with(&Setup { top: "resync = \"1s\"", ..Setup::default() })
}

/// An app without network, which starts quickly.
fn quick(lab: &Lab, more: &str) -> String {
    lab.socket_spec(&lab.image("v1"), "web.test", &format!("network_mode: none\n{more}"))
}

/// Waits for two full lists of containers.
fn wait_two_lists(lab: &Lab) {
    let lists = lab.metric("demae_docker_lists_total", "");
    until("two full lists of containers", || lab.metric("demae_docker_lists_total", "") >= lists + 2.0);
}

#[test]
fn container_name_in_use_is_left_to_its_owner() {
    let lab = lab();
    let spec = quick(&lab, "");
    let remove = || {
        lab.del("apps/web/");
        until("it is removed", || lab.containers().is_empty() && lab.lists_no("web"));
    };
    // The same spec is the same release, and so its container would have the same name.
    lab.deploy("web", "apps/web/spec", &spec);
    let name = lab.containers()[0].clone();
    remove();
    let mut foreign = Foreign::default();
    foreign.create(&["--name", &name], &lab.image("v1"));
    lab.put("apps/web/spec", &spec);
    lab.wait_app("web", "converged under another name", |s| s.state == State::Converged && s.healthy == 1);
    assert_eq!(lab.containers(), [format!("{name}.1")]);
    assert!(foreign.are_untouched());
    assert!(lab.agent_log().contains(&format!("container name `{name}` belongs to another container")));
    remove();

    // All names that it would try.
    let taken: Vec<String> =
        (1..10).map(|n| foreign.create(&["--name", &format!("{name}.{n}")], &lab.image("v1"))).collect();
    lab.put("apps/web/spec", &spec);
    let status = lab.wait_app("web", "waiting for a free name", |s| s.reason.contains("belong to other containers"));
    assert!(status.reason.contains(&name), "{}", status.reason);
    assert!(lab.containers().is_empty() && foreign.are_untouched());
    foreign.remove(&taken[4]);
    lab.wait_app("web", "converged once one is free", |s| s.state == State::Converged && s.healthy == 1);
    assert_eq!(lab.containers(), [format!("{name}.5")]);
    assert!(foreign.are_untouched());
}

#[test]
fn container_with_invalid_labels_is_reported_and_not_touched() {
    let lab = lab();
    lab.deploy("web", "apps/web/spec", &quick(&lab, ""));
    lab.deploy("other", "apps/other/spec", &quick(&lab, "").replace("web.test", "other.test"));
    let (before, v2) = (only(&lab, "web"), lab.image("v2"));
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    let mut foreign = Foreign::default();
    let labels = [format!("demae.host={}", lab.host), "demae.app=web".to_owned()];
    let name = format!("demae.{}.web.of-another-demae", lab.host);
    let id = foreign.create(&["--name", &name, "--label", &labels[0], "--label", &labels[1]], &lab.image("v1"));
    let status =
        lab.wait_app("web", "reporting the container", |s| s.reason.contains("labels that demae does not write"));
    assert!(status.reason.contains(&id[..12]), "{}", status.reason);
    // The other apps are not affected.
    lab.put("apps/web/image", &v2);
    lab.deploy("other", "apps/other/image", &v2);
    assert!(foreign.are_untouched() && ids(&lab, "web").contains(&before));
    foreign.remove(&id);
    lab.wait_app("web", "converged once it is gone", is_done(&v2));
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
}

/// `docker commit` takes the labels into the image, and `docker create` from there into the container.
#[test]
fn copy_of_a_container_is_not_mistaken_for_it() {
    let lab = lab();
    lab.deploy("web", "apps/web/spec", &quick(&lab, ""));
    let (serving, v2) = (only(&lab, "web"), lab.image("v2"));
    let name = format!("{}-copy", lab.host);
    // By image id, as demae creates its own, and without a tag.
    let image = docker(&["commit", "--pause=false", &serving]);
    lab.remove_on_drop(image.clone());
    let mut foreign = Foreign::default();
    let copy = foreign.create(&["--name", &name], &image);
    assert_eq!(inspect(&copy, "{{index .Config.Labels \"demae.app\"}}"), "web", "it has the labels");
    wait_two_lists(&lab);
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    assert!(lab.app("web").is_some_and(|s| is_done(&lab.image("v1"))(&s)), "{:?}", lab.app("web"));
    assert_eq!(lab.metric("demae_drift_repaired_total", ""), 0.0, "nothing is repaired");
    let output = String::from_utf8_lossy(&lab.demae(&["doctor"]).stdout).into_owned();
    assert!(output.contains(&format!("not created by demae: {name}")), "{output}");
    // Its release is removed, and the copy stays.
    lab.deploy("web", "apps/web/image", &v2);
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    lab.del("apps/web/");
    until("the app is removed", || ids(&lab, "web") == [copy.clone()] && lab.lists_no("web"));
    assert!(foreign.are_untouched());
}

#[test]
fn program_that_ignores_term_is_killed_after_its_grace_period() {
    let lab = lab();
    // Without an init process the app is PID 1, for which the kernel ignores signals without a handler.
    lab.deploy("web", "apps/web/spec", &quick(&lab, "init: false\n"));
    let (before, image) = (only(&lab, "web"), lab.image("v2"));
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    until("requests are served", || load.requests() > 50);
    lab.take_over("web", "apps/web/image", &image);
    let left = ids(&lab, "web");
    assert!(left.len() == 2 && left.contains(&before), "the old one is still there: {left:?}");
    lab.wait_app("web", "converged", is_done(&image));
    let took = lab.metric("demae_step_seconds_sum", "kind=\"stop\"");
    assert!(took >= 2.0, "the grace is 2 s, and it took {took} s");
    assert!(!ids(&lab, "web").contains(&before));
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
}

#[test]
fn slow_stop_delays_no_other_app() {
    let lab = Lab::with(&Setup { top: "resync = \"1s\"\nparallel = 1", ..Setup::default() });
    let deaf = format!(
        "image: \"{}\"\ninit: false\nnetwork_mode: none\nstop_grace_period: 20s\nenvironment: {{MOOD: deaf}}\n",
        lab.image("v1")
    );
    lab.deploy("deaf", "apps/deaf/spec", &deaf);
    lab.deploy("web", "apps/web/spec", &quick(&lab, ""));
    let old = only(&lab, "deaf");
    lab.put("env/deaf/GREETING", "hello");
    lab.wait_app("deaf", "stopping the old one", |s| s.is("stopping"));
    kill_and_wait(&lab, "web", "web.test");
    assert_eq!(inspect(&old, "{{.State.Running}}"), "true", "the old one is still running");
}

/// The ports that the lab's agent may use.
fn ports(lab: &Lab) -> RangeInclusive<u16> {
    let text = fs::read_to_string(lab.path("agent.toml")).expect("a file");
    let range = text.lines().find_map(|l| l.strip_prefix("range = \"")?.strip_suffix('"')?.split_once('-'));
    let (from, to) = range.expect("a range");
    from.parse().expect("a port")..=to.parse().expect("a port")
}

fn port_of(container: &str) -> u16 {
    inspect(container, "{{index .Config.Labels \"demae.port\"}}").parse().expect("a port")
}

#[test]
fn host_without_free_ports_keeps_serving_until_one_is_free() {
    let lab = Lab::with(&Setup { top: "resync = \"1s\"", nginx: "profile = \"strict\"", ..Setup::default() });
    lab.deploy("web", "apps/web/spec", &lab.port_spec(&lab.image("v1"), "web.test", ""));
    let (first, image) = (only(&lab, "web"), lab.image("v2"));
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    let mut taken: Vec<TcpListener> =
        ports(&lab).filter_map(|port| TcpListener::bind(("127.0.0.1", port)).ok()).collect();
    lab.put("apps/web/image", &image);
    let status = lab.wait_app("web", "waiting for a free port", |s| s.is("port"));
    assert!(status.state == State::Converging && status.healthy == 1, "{status:?}");
    assert!(lab.metric("demae_step_failures_total", "error=\"port\"") >= 1.0);
    assert_eq!(ids(&lab, "web"), [first], "nothing was created that could not be started");
    let free = taken.pop().expect("one of many").local_addr().expect("an address").port();
    lab.wait_app("web", "converged on the one that is free", is_done(&image));
    assert_eq!(port_of(&only(&lab, "web")), free);
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
}

#[test]
fn port_taken_before_the_start_is_replaced_by_another() {
    let mut lab = Lab::with(&Setup { no_agent: true, top: "resync = \"1s\"", ..Setup::default() });
    let relay = Relay::start(&lab.path("docker.sock"));
    lab.start_agent(&[("DOCKER_HOST", &relay.host())]);
    relay.hold_next(is("POST", "/start"));
    lab.put("apps/web/spec", &lab.port_spec(&lab.image("v1"), "web.test", ""));
    until("the start call is held", || relay.held() == 1);
    let first = only(&lab, "web");
    let port = port_of(&first);
    let taken = TcpListener::bind(("127.0.0.1", port)).expect("the port is free");
    relay.pass();
    lab.wait_app("web", "converged on another port", |s| s.state == State::Converged && s.healthy == 1);
    let second = only(&lab, "web");
    assert!(second != first && port_of(&second) != port);
    assert!(lab.app("web").is_some_and(|a| a.verdict.is_none()), "that is no fault of the release");
    drop(taken);
}

#[test]
fn container_over_its_memory_limit_is_reported_as_oom_killed() {
    let lab = lab();
    let limit = "deploy: {resources: {limits: {memory: 16M}}}\n";
    lab.deploy("web", "apps/web/spec", &quick(&lab, limit));
    let before = only(&lab, "web");
    let load = Load::start(lab.ingress, "web.test", vec![Client::get(true), Client::post(false)]);
    // A release that exceeds its limit before it is healthy fails at once, with the OOM kill as its cause.
    lab.put("env/web/MOOD", "greedy");
    let status = lab.wait_app("web", "blocked", |s| s.state == State::Blocked);
    assert!(status.reason.contains("it was OOM-killed (exit code 137)"), "{}", status.reason);
    assert_eq!(status.verdict.and_then(|v| v.exit_code), Some(137));
    assert_eq!(status.healthy, 1, "the old release serves");
    lab.del("env/web/MOOD");
    lab.wait_app("web", "converged as before", |s| s.state == State::Converged && s.verdict.is_none());
    assert_eq!(only(&lab, "web"), before);
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);

    // In service it is restarted, which counts as a restart.
    let restarts = lab.metric("demae_container_restarts_total", "app=\"web\"");
    let started = inspect(&before, "{{.State.StartedAt}}");
    // It is killed while it answers.
    let _ = lab.get("web.test", "/eat?64");
    until("it runs again", || {
        inspect(&before, "{{.State.StartedAt}}") != started
            && lab.get("web.test", "/").is_ok_and(|(code, _)| code == 200)
    });
    lab.wait_app("web", "converged", |s| s.state == State::Converged && s.healthy == 1);
    until("it is counted", || lab.metric("demae_container_restarts_total", "app=\"web\"") > restarts);
    assert_eq!(only(&lab, "web"), before, "the same container");
}

#[test]
fn manual_changes_to_a_container_are_reverted() {
    let lab = lab();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let (id, image) = (only(&lab, "web"), lab.image("v2"));
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    for policy in ["no", "always", "on-failure:3"] {
        docker(&["update", "--restart", policy, &id]);
        let template = "{{.HostConfig.RestartPolicy.Name}}";
        until(&format!("`{policy}` is set back"), || inspect(&id, template) == "unless-stopped");
        // Else the agent treats the next change as its own.
        wait_two_lists(&lab);
    }
    // Labels identify a container, not its name. An app behind a socket needs no network either.
    docker(&["rename", &id, &format!("demae-lab-{}-renamed", lab.tag)]);
    docker(&["network", "disconnect", "bridge", &id]);
    wait_two_lists(&lab);
    lab.wait_app("web", "converged as before", |s| s.state == State::Converged && s.healthy == 1);
    assert_eq!(only(&lab, "web"), id);
    lab.deploy("web", "apps/web/image", &image);
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    assert_ne!(only(&lab, "web"), id, "the renamed one was removed");

    // Its process, killed without Docker.
    let id = only(&lab, "web");
    let (pid, started) = (inspect(&id, "{{.State.Pid}}"), inspect(&id, "{{.State.StartedAt}}"));
    let status = Command::new("kill").args(["-9", &pid]).status().expect("kill runs");
    assert!(status.success(), "this test must be allowed to end what a container runs");
    until("it runs again", || {
        inspect(&id, "{{.State.StartedAt}}") != started && lab.get("web.test", "/").is_ok_and(|(code, _)| code == 200)
    });
    lab.wait_app("web", "converged", |s| s.state == State::Converged && s.healthy == 1);
    assert_eq!(only(&lab, "web"), id);
}

/// While paused it accepts no connection, and its backlog fills up: not even the agent can connect.
#[test]
fn paused_container_with_a_full_backlog_is_resumed() {
    let lab = lab();
    lab.deploy("web", "apps/web/spec", &quick(&lab, ""));
    let id = only(&lab, "web");
    lab.put("apps/web/paused", "a memory dump");
    lab.wait_app("web", "paused", |s| s.state == State::Paused);
    docker(&["pause", &id]);
    let socket = SocketAddrUnix::new(instance_dir(&lab).join("app.sock")).expect("a path");
    let came = (0..100_000).take_while(|_| {
        let asking = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK, None);
        connect(asking.expect("a socket"), &socket).is_ok()
    });
    assert!(came.count() < 100_000, "its backlog is full");
    lab.del("apps/web/paused");
    lab.wait_app("web", "converged", |s| s.state == State::Converged && s.healthy == 1);
    assert_eq!(lab.get("web.test", "/").map(|(code, _)| code), Ok(200));
    assert_eq!(only(&lab, "web"), id);
}

/// The directory of the only instance of `web`.
fn instance_dir(lab: &Lab) -> PathBuf {
    let mut instances = lab.path("state/sockets/web").read_dir().expect("a directory");
    let only = instances.next().expect("an instance").expect("a directory").path();
    assert!(instances.next().is_none());
    only
}

#[test]
fn socket_path_permissions_are_restored() {
    assert!(rustix::process::geteuid().is_root(), "this needs a test that is root");
    let lab = lab();
    lab.deploy("web", "apps/web/spec", &quick(&lab, ""));
    let dir = instance_dir(&lab);
    for place in [dir.join("app.sock"), dir, lab.path("state/sockets/web"), lab.path("state/sockets")] {
        fs::set_permissions(&place, fs::Permissions::from_mode(0o700)).expect("a mode");
        until(&format!("`{}` is open again", place.display()), || {
            lab.get("web.test", "/").is_ok_and(|(code, _)| code == 200)
        });
    }
}

/// Its new socket is opened to nginx at once, not at the next probe.
#[test]
fn restarted_container_is_routable_before_its_next_probe() {
    let lab = lab();
    let spec = quick(&lab, "").replace("interval: 1s", "interval: 10m");
    assert!(spec.contains("10m"));
    lab.deploy("web", "apps/web/spec", &spec);
    wait_two_lists(&lab);
    let id = only(&lab, "web");
    let started = inspect(&id, "{{.State.StartedAt}}");
    let status = Command::new("kill").args(["-9", &inspect(&id, "{{.State.Pid}}")]).status().expect("kill runs");
    assert!(status.success());
    until("it runs again, and is reached", || {
        inspect(&id, "{{.State.StartedAt}}") != started && lab.get("web.test", "/").is_ok_and(|(code, _)| code == 200)
    });
    assert_eq!(only(&lab, "web"), id, "it is the same container");
}

#[test]
fn instance_disconnected_from_its_network_is_replaced() {
    let lab = lab();
    lab.deploy("web", "apps/web/spec", &lab.port_spec(&lab.image("v1"), "web.test", ""));
    let id = only(&lab, "web");
    docker(&["network", "disconnect", "bridge", &id]);
    until("another one serves", || {
        let found = ids(&lab, "web");
        found.len() == 1 && found[0] != id && lab.get("web.test", "/").is_ok_and(|(code, _)| code == 200)
    });
    lab.wait_app("web", "converged", |s| s.state == State::Converged && s.healthy == 1);
    // A paused container keeps its connections and resumes them.
    let id = only(&lab, "web");
    docker(&["pause", &id]);
    until("it is resumed", || inspect(&id, "{{.State.Status}}") == "running");
    lab.wait_app("web", "converged", |s| s.state == State::Converged && s.healthy == 1);
    assert_eq!(lab.get("web.test", "/").map(|(code, _)| code), Ok(200));
}
