//! The engine is killed, stopped and started anew, while apps serve and in the middle of a deploy.
//!
//! This is done to an engine of the test's own; the one of this machine is left alone.

mod support;

use std::time::Duration;

use support::{
    containers::is_done,
    engine::Engine,
    lab::{Lab, Setup},
    load::{Client, Load, mixed},
    wait::until,
};

/// How an engine ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Killed,
    Told,
}

fn end(engine: &mut Engine, how: End) {
    match how {
        End::Killed => engine.kill(),
        End::Told => engine.stop(),
    }
}

/// A host with an engine of its own, and one app on it. The lab goes before its engine does.
fn site(live_restore: bool) -> (Engine, Lab) {
    let engine = Engine::new(live_restore);
    let mut lab = Lab::with(&Setup { no_agent: true, top: "resync = \"1s\"", ..Setup::default() });
    for version in ["v1", "v2"] {
        engine.load(&lab.image(version));
    }
    lab.start_agent(&[("DOCKER_HOST", &engine.host())]);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", "network_mode: none\n"));
    (engine, lab)
}

/// Waits until the agent has noticed that nobody answers it.
fn noticed(lab: &Lab) {
    until("it is told that Docker is away", || {
        lab.status().is_some_and(|s| s.proxy.is_some_and(|note| note.contains("Docker does not answer")))
    });
}

/// Waits until Docker is seen again, and the app is as it should be, with this image.
fn settled(lab: &Lab, image: &str) {
    until(&format!("all is well again with {image}"), || {
        // And it answers: what the agent last saw of the app may be older than this engine.
        lab.status().is_some_and(|s| s.proxy.is_none() && s.apps.len() == 1 && s.apps.iter().all(is_done(image)))
            && lab.get("web.test", "/").is_ok_and(|(code, _)| code == 200)
    });
    assert!(lab.app("web").is_some_and(|a| a.verdict.is_none()), "an engine that went away is no fault of a release");
}

/// What is there of the app, and since when it runs.
fn running(engine: &Engine, lab: &Lab) -> Vec<String> {
    let ids = engine.containers(&lab.host);
    ids.iter().map(|id| engine.docker(&["inspect", "--format", "{{.Id}} {{.State.StartedAt}}", id])).collect()
}

fn restart_in_service(engine: &mut Engine, lab: &Lab, how: End) {
    let before = engine.containers(&lab.host);
    end(engine, how);
    noticed(lab);
    engine.start();
    settled(lab, &lab.image("v1"));
    assert_eq!(engine.containers(&lab.host), before, "the same container, and no other");
}

/// Deploys to and fro. In the middle of each deploy, a step later each time, the engine ends and comes back.
fn restart_in_deploys(engine: &mut Engine, lab: &Lab, how: End) {
    for (round, moment) in ["create", "start", "switch", "stop"].into_iter().enumerate() {
        let image = lab.image(if round % 2 == 0 { "v2" } else { "v1" });
        let step = format!("\"step\":\"{moment}\"");
        let known = lab.agent_log().matches(&step).count();
        lab.put("apps/web/image", &image);
        until("a step of the deploy", || lab.agent_log().matches(&step).count() > known);
        end(engine, how);
        engine.start();
        settled(lab, &image);
        assert_eq!(engine.containers(&lab.host).len(), 1, "nothing is there twice after `{moment}`");
    }
}

fn nobody_notices(how: End) {
    let (mut engine, lab) = site(true);
    let before = running(&engine, &lab);
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    until("requests flow", || load.requests() > 50);
    restart_in_service(&mut engine, &lab, how);
    assert_eq!(running(&engine, &lab), before, "its process was not started anew");
    restart_in_deploys(&mut engine, &lab, how);
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    assert!(tally.versions.len() >= 2, "both versions answered: {:?}", tally.versions);
}

#[test]
fn with_live_restore_nobody_notices_that_the_engine_was_killed() {
    nobody_notices(End::Killed);
}

#[test]
fn with_live_restore_nobody_notices_that_the_engine_was_stopped() {
    nobody_notices(End::Told);
}

/// An engine that was killed leaves its containers running. They end only when it comes back, and it does not start them
/// again: that is left to the agent.
#[test]
fn without_live_restore_all_comes_back_after_the_engine_was_killed() {
    let (mut engine, lab) = site(false);
    let load = Load::start(lab.ingress, "web.test", vec![Client::get(false), Client::post(false)]);
    until("requests flow", || load.requests() > 50);
    engine.kill();
    noticed(&lab);
    let tally = load.stop();
    assert_eq!(tally.failed, 0, "what ran goes on without its engine: {:#?}", tally.reasons);
    engine.start();
    settled(&lab, &lab.image("v1"));
    restart_in_service(&mut engine, &lab, End::Killed);
    restart_in_deploys(&mut engine, &lab, End::Killed);
}

/// An engine that is told to end stops its containers. It starts them again by itself, but over a dead socket, which the
/// agent must take out of their way.
#[test]
fn without_live_restore_all_comes_back_after_the_engine_was_stopped() {
    let (mut engine, lab) = site(false);
    restart_in_service(&mut engine, &lab, End::Told);
    restart_in_deploys(&mut engine, &lab, End::Told);
}

/// Docker itself carries what comes to a port, and stops with the engine. The app goes on, and nobody replaces it for that.
#[test]
fn behind_a_port_an_app_is_cut_off_while_its_engine_is_away_and_is_not_replaced() {
    let mut engine = Engine::with_ports();
    let mut lab = Lab::with(&Setup { no_agent: true, top: "resync = \"1s\"", ..Setup::default() });
    engine.load(&lab.image("v1"));
    lab.start_agent(&[("DOCKER_HOST", &engine.host())]);
    let spec = lab.port_spec(&lab.image("v1"), "web.test", "").replace("interval: 1s", "interval: 3s, retries: 1");
    lab.deploy("web", "apps/web/spec", &spec);
    let before = running(&engine, &lab);
    for how in [End::Killed, End::Told] {
        end(&mut engine, how);
        noticed(&lab);
        until("it is cut off", || lab.get("web.test", "/").is_ok_and(|(code, _)| code == 502));
        // Docker is asked each second. Unhealthy after 3 s, an instance is watched for 5 s before it is replaced; what was
        // answered last says nothing any more once the engine is back.
        let asked = || lab.metric("demae_docker_errors_total", "kind=\"unreachable\",operation=\"list\"");
        let known = asked();
        until("it is unhealthy for longer than that", || asked() >= known + 12.0);
        engine.start();
        settled(&lab, &lab.image("v1"));
        assert_eq!(running(&engine, &lab), before, "{how:?}: the same process, and no other");
    }
    assert_eq!(lab.agent_log().matches("\"step\":\"create\"").count(), 1, "no other was begun");
    lab.kill_agent();
}
