//! The disk is full, or has no inodes left, before a change or during one. Serving apps keep serving, the status names
//! the file, and no file is torn.
#![expect(clippy::disallowed_methods, reason = "a test runs programs and reads files of its own")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use crate::support::{
    containers::{ids, is_done, kill_and_wait, only},
    disk::Disk,
    engine::Engine,
    lab::{Lab, Setup},
    load::{Client, Load, mixed},
    relay::{Relay, is},
    wait::until,
};
use demae::model::status::State;

/// A host with its state and run directories on small disks and its Docker behind a proxy. The disks are dropped
/// before the lab, which removes the directories that they are mounted on.
fn site() -> (Lab, Relay, Disk, Disk) {
    let setup = Setup { no_agent: true, top: "resync = \"1s\"", nginx: "profile = \"strict\"", ..Setup::default() };
    let mut lab = Lab::with(&setup);
    let (state, run) = (Disk::mount(lab.path("state")), Disk::mount(lab.path("run")));
    let relay = Relay::start(&lab.path("docker.sock"));
    lab.start_agent(&[("DOCKER_HOST", &relay.host())]);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", "network_mode: none\n"));
    lab.image("v2");
    (lab, relay, state, run)
}

/// Temporary files that were never renamed.
fn torn(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        if name.starts_with('.') && name.ends_with(".new") {
            found.push(path.clone());
        }
        if path.is_dir() && !path.is_symlink() {
            torn(&path, found);
        }
    }
}

/// Asserts that no file is torn and that the next agent continues from these files.
fn assert_consistent(lab: &mut Lab, relay: &Relay) {
    let mut found = Vec::new();
    torn(&lab.path("state"), &mut found);
    torn(&lab.path("run"), &mut found);
    assert!(found.is_empty(), "{found:?}");
    let mut test = Command::new("nginx");
    test.args(["-t", "-q", "-c"]).arg(lab.path("nginx.conf")).arg("-e").arg(lab.path("nginx-error.log"));
    assert!(test.status().expect("nginx runs").success(), "nginx's files are complete");
    lab.kill_agent();
    let known = lab.agent_log().len();
    lab.start_agent(&[("DOCKER_HOST", &relay.host())]);
    until("the next agent reports all apps as converged", || {
        lab.status().is_some_and(|s| {
            !s.apps.is_empty() && s.apps.iter().all(|a| a.state == State::Converged) && s.store.error.is_none()
        })
    });
    let log = lab.agent_log();
    assert!(!log[known..].contains("damaged"), "{}", &log[known..]);
    // The disks are unmounted next, and the agent must not see that.
    lab.kill_agent();
}

#[test]
fn full_disk_stops_new_deploys_and_serving_apps_are_repaired() {
    let (mut lab, relay, state, run) = site();
    let (before, image) = (only(&lab, "web"), lab.image("v2"));
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    until("requests are served", || load.requests() > 50);
    state.fill();
    run.fill();
    lab.put("apps/web/image", &image);
    let is_reported = |lab: &Lab| {
        let error = lab.status().and_then(|s| s.store.error).unwrap_or_default();
        error.contains("cannot be kept on disk") && error.contains("ledger") && error.contains("No space left")
    };
    until("the status says that the ledger cannot be written", || is_reported(&lab));
    // An agent that starts now reports it too.
    lab.kill_agent();
    lab.start_agent(&[("DOCKER_HOST", &relay.host())]);
    until("the next one reports the same", || is_reported(&lab));
    lab.wait_app("web", "converged from the ledger", |s| s.state == State::Converged && s.healthy == 1);
    assert_eq!(only(&lab, "web"), before, "no new container was created");
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    // Dead containers are restarted all the same.
    kill_and_wait(&lab, "web", "web.test");
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    state.clear();
    run.clear();
    lab.wait_app("web", "converged on the new image", is_done(&image));
    until("the store error is gone", || lab.status().is_some_and(|s| s.store.error.is_none()));
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    assert_consistent(&mut lab, &relay);
}

#[test]
fn disk_full_before_the_proof_keeps_the_old_instance() {
    let (mut lab, relay, state, _run) = site();
    let (before, image) = (only(&lab, "web"), lab.image("v2"));
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    relay.hold_next(is("POST", "/start"));
    lab.put("apps/web/image", &image);
    until("the start call is held", || relay.held() == 1);
    state.fill();
    relay.pass();
    lab.wait_app("web", "reporting the file that cannot be written", |s| {
        s.is("disk_full") && s.reason.contains("proven/web")
    });
    until("it was tried three times", || lab.metric("demae_step_failures_total", "error=\"disk_full\"") >= 3.0);
    let status = lab.app("web").expect("a status");
    assert!(
        status.verdict.is_none() && status.state == State::Converging,
        "a full disk is no fault of the release: {status:?}"
    );
    assert!(ids(&lab, "web").contains(&before), "until the proof of the new one is on disk");
    state.clear();
    lab.wait_app("web", "converged", is_done(&image));
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    assert_consistent(&mut lab, &relay);
}

#[test]
fn disk_full_while_writing_nginx_files_changes_nothing() {
    let (mut lab, relay, state, _run) = site();
    lab.deploy("port", "apps/port/spec", &lab.port_spec(&lab.image("v1"), "port.test", ""));
    let (before, image) = (only(&lab, "port"), lab.image("v2"));
    let loads = [("web.test", mixed(Duration::from_millis(10))), ("port.test", mixed(Duration::from_millis(10)))];
    let loads = loads.map(|(host, clients)| Load::start(lab.ingress, host, clients));
    relay.hold_next(is("POST", "/start"));
    lab.put("apps/port/image", &image);
    until("the start call is held", || relay.held() == 1);
    state.fill();
    relay.pass();
    let status = lab.wait_app("port", "reporting that nginx cannot be changed", |s| s.reason.contains("No space left"));
    assert!(status.reason.contains("nginx cannot be changed now"), "{}", status.reason);
    assert!(lab.status().is_some_and(|s| s.proxy.is_some()), "it is reported for the host too");
    assert!(ids(&lab, "port").contains(&before));
    assert!(lab.get("port.test", "/").expect("an answer").1.contains("version=v1"));
    state.clear();
    lab.wait_app("port", "converged", is_done(&image));
    for load in loads {
        let tally = load.stop();
        assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    }
    assert_consistent(&mut lab, &relay);
}

#[test]
fn full_run_dir_is_reported_with_the_env_file() {
    let (mut lab, relay, _state, run) = site();
    let image = lab.image("v2");
    let load = Load::start(lab.ingress, "web.test", vec![Client::get(true), Client::post(false)]);
    run.fill();
    lab.put("apps/web/image", &image);
    lab.wait_app("web", "reporting the file that cannot be written", |s| {
        s.is("disk_full") && s.reason.contains("run/env/web")
    });
    assert!(lab.metric("demae_step_failures_total", "kind=\"write_env_file\"") >= 1.0);
    run.clear();
    lab.wait_app("web", "converged", is_done(&image));
    let traces = lab.traces();
    assert!(traces.iter().any(|t| t.ends_with("/env")), "{traces:?}");
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    assert_consistent(&mut lab, &relay);
}

#[test]
fn disk_without_inodes_is_reported_with_the_directory() {
    let (mut lab, relay, state, _run) = site();
    let image = lab.image("v2");
    // The ledger is written before that.
    relay.hold_next(is("GET", "/images/"));
    lab.put("apps/web/image", &image);
    until("the inspect call is held", || relay.held() == 1);
    state.fill_inodes();
    relay.pass();
    lab.wait_app("web", "reporting the directory that cannot be created", |s| {
        s.is("disk_full") && s.reason.contains("state/sockets/web")
    });
    // The socket of a dead program is removed before the next one creates its own: one inode for one.
    kill_and_wait(&lab, "web", "web.test");
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    state.clear();
    lab.wait_app("web", "converged", is_done(&image));
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    assert_consistent(&mut lab, &relay);
}

/// Docker's data directory holds most of what fills a host's disks.
#[test]
fn full_docker_disk_keeps_the_old_instance_serving() {
    let (engine, disk) = Engine::on_a_small_disk();
    let mut lab = Lab::with(&Setup { no_agent: true, top: "resync = \"1s\"", ..Setup::default() });
    let image = lab.image("v2");
    for version in ["v1", "v2"] {
        engine.load(&lab.image(version));
    }
    let docker = engine.host();
    lab.start_agent(&[("DOCKER_HOST", &docker)]);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", "network_mode: none\n"));
    let before = engine.containers(&lab.host);
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    until("requests are served", || load.requests() > 50);
    let free = |lab: &Lab| lab.metric("demae_disk_free_bytes", "dir=\"docker\"");
    until("it is measured", || free(&lab) > 0.0);
    disk.fill();
    let near_end = |text: &str| text.lines().any(|l| l.starts_with("warn  disk") && l.contains("/data"));
    let doctor = lab.demae_with(&[("DOCKER_HOST", &docker)], &["doctor"]);
    assert!(near_end(&String::from_utf8_lossy(&doctor.stdout)), "{doctor:?}");
    until("the full disk is measured too", || free(&lab) < 1.0);
    lab.put("apps/web/image", &image);
    let status = lab.wait_app("web", "reporting the full disk", |s| s.is("disk_full"));
    assert!(
        status.verdict.is_none() && status.state == State::Converging,
        "a full disk is no fault of the release: {status:?}"
    );
    until("it was tried twice", || lab.metric("demae_step_failures_total", "error=\"disk_full\"") >= 2.0);
    assert!(before.iter().all(|id| engine.containers(&lab.host).contains(id)));
    disk.clear();
    lab.wait_app("web", "converged", is_done(&image));
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    lab.kill_agent();
}
