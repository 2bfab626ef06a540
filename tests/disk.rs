//! The disk is full, or has no inodes left, before a change and in the middle of one. What serves goes on serving, the
//! status names the file, and no file is torn.
#![expect(clippy::disallowed_methods, reason = "a test runs programs and reads files of its own")]

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use demae::model::status::State;
use support::{
    containers::{ids, is_done, kill_and_wait, only},
    disk::Disk,
    engine::Engine,
    lab::{Lab, Setup},
    load::{Client, Load, mixed},
    relay::{Relay, is},
    wait::until,
};

/// A host whose state, and what it has in memory, lie on small disks, and whose Docker is reached by a relay. Disks go
/// before the lab does, since it removes the directories that they are mounted on.
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

/// What was begun beside its place and never put there.
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

/// Nothing on the disks is half a file, and the next agent goes on from it.
fn is_whole(lab: &mut Lab, relay: &Relay) {
    let mut found = Vec::new();
    torn(&lab.path("state"), &mut found);
    torn(&lab.path("run"), &mut found);
    assert!(found.is_empty(), "{found:?}");
    let mut test = Command::new("nginx");
    test.args(["-t", "-q", "-c"]).arg(lab.path("nginx.conf")).arg("-e").arg(lab.path("nginx-error.log"));
    assert!(test.status().expect("nginx runs").success(), "what lies there for nginx is whole");
    lab.kill_agent();
    let known = lab.agent_log().len();
    lab.start_agent(&[("DOCKER_HOST", &relay.host())]);
    until("the next agent answers for all apps", || {
        lab.status().is_some_and(|s| {
            !s.apps.is_empty() && s.apps.iter().all(|a| a.state == State::Converged) && s.store.error.is_none()
        })
    });
    let log = lab.agent_log();
    assert!(!log[known..].contains("damaged"), "{}", &log[known..]);
    // The disks go next, and nobody is to see that.
    lab.kill_agent();
}

#[test]
fn on_a_full_disk_nothing_new_begins_and_what_serves_is_kept_up() {
    let (mut lab, relay, state, run) = site();
    let (before, image) = (only(&lab, "web"), lab.image("v2"));
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    until("requests flow", || load.requests() > 50);
    state.fill();
    run.fill();
    lab.put("apps/web/image", &image);
    let told = |lab: &Lab| {
        let error = lab.status().and_then(|s| s.store.error).unwrap_or_default();
        error.contains("cannot be kept on disk") && error.contains("ledger") && error.contains("No space left")
    };
    until("it is told that the wish cannot be kept", || told(&lab));
    // Also to an agent that starts now.
    lab.kill_agent();
    lab.start_agent(&[("DOCKER_HOST", &relay.host())]);
    until("the next one tells the same", || told(&lab));
    lab.wait_app("web", "as it was kept", |s| s.state == State::Converged && s.healthy == 1);
    assert_eq!(only(&lab, "web"), before, "nothing new was begun");
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    // What dies is started again all the same.
    kill_and_wait(&lab, "web", "web.test");
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    state.clear();
    run.clear();
    lab.wait_app("web", "converged with the wish", is_done(&image));
    until("nothing is told any more", || lab.status().is_some_and(|s| s.store.error.is_none()));
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    is_whole(&mut lab, &relay);
}

#[test]
fn a_disk_that_fills_up_before_the_proof_leaves_the_old_one_there() {
    let (mut lab, relay, state, _run) = site();
    let (before, image) = (only(&lab, "web"), lab.image("v2"));
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    relay.hold_next(is("POST", "/start"));
    lab.put("apps/web/image", &image);
    until("the new one is about to be started", || relay.held() == 1);
    state.fill();
    relay.pass();
    let status = lab.wait_app("web", "told what cannot be written", |s| s.reason.contains("No space left"));
    assert!(status.reason.contains("proven/web"), "{}", status.reason);
    until("it was tried three times", || lab.metric("demae_step_failures_total", "error=\"disk_full\"") >= 3.0);
    let status = lab.app("web").expect("a status");
    assert!(
        status.verdict.is_none() && status.state == State::Converging,
        "a full disk says nothing of a release: {status:?}"
    );
    assert!(ids(&lab, "web").contains(&before), "as long as it is not on disk that the new one serves");
    state.clear();
    lab.wait_app("web", "converged", is_done(&image));
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    is_whole(&mut lab, &relay);
}

#[test]
fn a_set_for_nginx_that_finds_no_space_changes_nothing() {
    let (mut lab, relay, state, _run) = site();
    lab.deploy("port", "apps/port/spec", &lab.port_spec(&lab.image("v1"), "port.test", ""));
    let (before, image) = (only(&lab, "port"), lab.image("v2"));
    let loads = [("web.test", mixed(Duration::from_millis(10))), ("port.test", mixed(Duration::from_millis(10)))];
    let loads = loads.map(|(host, clients)| Load::start(lab.ingress, host, clients));
    relay.hold_next(is("POST", "/start"));
    lab.put("apps/port/image", &image);
    until("the new one is about to be started", || relay.held() == 1);
    state.fill();
    relay.pass();
    let status = lab.wait_app("port", "told that nginx cannot be changed", |s| s.reason.contains("No space left"));
    assert!(status.reason.contains("nginx cannot be changed now"), "{}", status.reason);
    assert!(lab.status().is_some_and(|s| s.proxy.is_some()), "it is told for the host too");
    assert!(ids(&lab, "port").contains(&before));
    assert!(lab.get("port.test", "/").expect("an answer").1.contains("version=v1"));
    state.clear();
    lab.wait_app("port", "converged", is_done(&image));
    for load in loads {
        let tally = load.stop();
        assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    }
    is_whole(&mut lab, &relay);
}

#[test]
fn memory_that_is_full_is_told_with_the_env_file_that_it_has_no_room_for() {
    let (mut lab, relay, _state, run) = site();
    let image = lab.image("v2");
    let load = Load::start(lab.ingress, "web.test", vec![Client::get(true), Client::post(false)]);
    run.fill();
    lab.put("apps/web/image", &image);
    let status = lab.wait_app("web", "told what cannot be written", |s| s.reason.contains("No space left"));
    assert!(status.reason.contains("run/env/web"), "{}", status.reason);
    assert!(lab.metric("demae_step_failures_total", "kind=\"write_env_file\"") >= 1.0);
    run.clear();
    lab.wait_app("web", "converged", is_done(&image));
    let traces = lab.traces();
    assert!(traces.iter().any(|t| t.ends_with("/env")), "{traces:?}");
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    is_whole(&mut lab, &relay);
}

#[test]
fn a_disk_without_inodes_is_told_with_the_directory_that_it_cannot_make() {
    let (mut lab, relay, state, _run) = site();
    let image = lab.image("v2");
    // The wish itself is kept before that.
    relay.hold_next(is("GET", "/images/"));
    lab.put("apps/web/image", &image);
    until("it is about to begin", || relay.held() == 1);
    state.fill_inodes();
    relay.pass();
    let status = lab.wait_app("web", "told what cannot be made", |s| s.reason.contains("No space left"));
    assert!(status.reason.contains("state/sockets/web"), "{}", status.reason);
    // The socket of a dead program is taken away before the next one makes its own: that is one for one.
    kill_and_wait(&lab, "web", "web.test");
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    state.clear();
    lab.wait_app("web", "converged", is_done(&image));
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    is_whole(&mut lab, &relay);
}

/// Where images and containers lie is Docker's, and most of what fills a host's disks.
#[test]
fn where_docker_finds_no_space_for_a_new_one_the_old_one_serves() {
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
    until("requests flow", || load.requests() > 50);
    let free = |lab: &Lab| lab.metric("demae_disk_free_bytes", "dir=\"docker\"");
    until("it is measured", || free(&lab) > 0.0);
    disk.fill();
    let near_end = |text: &str| text.lines().any(|l| l.starts_with("warn  disk") && l.contains("/data"));
    let doctor = lab.demae_with(&[("DOCKER_HOST", &docker)], &["doctor"]);
    assert!(near_end(&String::from_utf8_lossy(&doctor.stdout)), "{doctor:?}");
    until("that is measured too", || free(&lab) < 1.0);
    lab.put("apps/web/image", &image);
    let status = lab.wait_app("web", "told what is full", |s| s.reason.to_lowercase().contains("no space left"));
    assert!(status.verdict.is_none() && status.state == State::Converging, "it says nothing of a release: {status:?}");
    until("it was tried twice", || lab.metric("demae_step_failures_total", "error=\"disk_full\"") >= 2.0);
    assert!(before.iter().all(|id| engine.containers(&lab.host).contains(id)));
    disk.clear();
    lab.wait_app("web", "converged", is_done(&image));
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    lab.kill_agent();
}
