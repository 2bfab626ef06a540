//! The engine is killed, stopped and restarted, while apps serve and during deploys.
//!
//! It is an engine of the test's own; this machine's engine is not touched.

use std::time::Duration;

use crate::support::{
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
    Stopped,
}

fn end(engine: &mut Engine, how: End) {
    match how {
        End::Killed => engine.kill(),
        End::Stopped => engine.stop(),
    }
}

/// A host with an engine of its own and one app. The lab is dropped before its engine.
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

/// Waits until the agent reports that Docker does not answer.
fn wait_docker_unreachable(lab: &Lab) {
    until("the host reports that Docker does not answer", || {
        lab.status().is_some_and(|s| s.proxy.is_some_and(|note| note.contains("Docker does not answer")))
    });
}

/// Waits until Docker answers again and the app has converged on this image.
fn wait_settled(lab: &Lab, image: &str) {
    until(&format!("Docker answers and the app has converged on {image}"), || {
        // Check a request too: the agent's last view of the app may be older than this engine.
        lab.status().is_some_and(|s| s.proxy.is_none() && s.apps.len() == 1 && s.apps.iter().all(is_done(image)))
            && lab.get("web.test", "/").is_ok_and(|(code, _)| code == 200)
    });
    assert!(lab.app("web").is_some_and(|a| a.verdict.is_none()), "an engine that went away is no fault of a release");
}

/// The containers of the app with their start times.
fn running(engine: &Engine, lab: &Lab) -> Vec<String> {
    let ids = engine.containers(&lab.host);
    ids.iter().map(|id| engine.docker(&["inspect", "--format", "{{.Id}} {{.State.StartedAt}}", id])).collect()
}

fn restart_in_service(engine: &mut Engine, lab: &Lab, how: End) {
    let before = engine.containers(&lab.host);
    end(engine, how);
    wait_docker_unreachable(lab);
    engine.start();
    wait_settled(lab, &lab.image("v1"));
    assert_eq!(engine.containers(&lab.host), before, "the same container, and no other");
}

/// Deploys back and forth. During each deploy, one step later each time, the engine ends and is restarted.
fn restart_in_deploys(engine: &mut Engine, lab: &Lab, how: End) {
    for (round, moment) in ["create", "start", "switch", "stop"].into_iter().enumerate() {
        let image = lab.image(if round % 2 == 0 { "v2" } else { "v1" });
        let step = format!("\"step\":\"{moment}\"");
        let known = lab.agent_log().matches(&step).count();
        lab.put("apps/web/image", &image);
        until("a step of the deploy", || lab.agent_log().matches(&step).count() > known);
        end(engine, how);
        engine.start();
        wait_settled(lab, &image);
        assert_eq!(engine.containers(&lab.host).len(), 1, "one container after `{moment}`");
    }
}

fn check_live_restore(how: End) {
    let (mut engine, lab) = site(true);
    let before = running(&engine, &lab);
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    until("requests are served", || load.requests() > 50);
    restart_in_service(&mut engine, &lab, how);
    assert_eq!(running(&engine, &lab), before, "its process was not restarted");
    restart_in_deploys(&mut engine, &lab, how);
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    assert!(tally.versions.len() >= 2, "both versions answered: {:?}", tally.versions);
}

#[test]
fn engine_kill_with_live_restore_loses_no_request() {
    check_live_restore(End::Killed);
}

#[test]
fn engine_stop_with_live_restore_loses_no_request() {
    check_live_restore(End::Stopped);
}

/// A killed engine leaves its containers running. They end when it comes back, and it does not restart them: the agent
/// does.
#[test]
fn engine_kill_without_live_restore_is_recovered_from() {
    let (mut engine, lab) = site(false);
    let load = Load::start(lab.ingress, "web.test", vec![Client::get(false), Client::post(false)]);
    until("requests are served", || load.requests() > 50);
    engine.kill();
    wait_docker_unreachable(&lab);
    let tally = load.stop();
    assert_eq!(tally.failed, 0, "containers keep serving without their engine: {:#?}", tally.reasons);
    engine.start();
    wait_settled(&lab, &lab.image("v1"));
    restart_in_service(&mut engine, &lab, End::Killed);
    restart_in_deploys(&mut engine, &lab, End::Killed);
}

/// A stopped engine stops its containers. It restarts them itself, but over a stale socket, which the agent must remove
/// first.
#[test]
fn engine_stop_without_live_restore_is_recovered_from() {
    let (mut engine, lab) = site(false);
    restart_in_service(&mut engine, &lab, End::Stopped);
    restart_in_deploys(&mut engine, &lab, End::Stopped);
}

/// Docker's own proxy carries port traffic, and stops with the engine. The app keeps running and is not replaced.
#[test]
fn port_app_is_unreachable_and_not_replaced_while_its_engine_is_down() {
    let mut engine = Engine::with_ports();
    let mut lab = Lab::with(&Setup { no_agent: true, top: "resync = \"1s\"", ..Setup::default() });
    engine.load(&lab.image("v1"));
    lab.start_agent(&[("DOCKER_HOST", &engine.host())]);
    let spec = lab.port_spec(&lab.image("v1"), "web.test", "").replace("interval: 1s", "interval: 3s, retries: 1");
    lab.deploy("web", "apps/web/spec", &spec);
    let before = running(&engine, &lab);
    for how in [End::Killed, End::Stopped] {
        end(&mut engine, how);
        wait_docker_unreachable(&lab);
        until("it is unreachable", || lab.get("web.test", "/").is_ok_and(|(code, _)| code == 502));
        // Docker is queried each second. Unhealthy after 3 s, an instance is watched for 5 s before it is replaced; its
        // last probe result does not count once the engine is back.
        let failed_lists = || lab.metric("demae_docker_errors_total", "kind=\"unreachable\",operation=\"list\"");
        let known = failed_lists();
        until("it is unhealthy for longer than that", || failed_lists() >= known + 12.0);
        engine.start();
        wait_settled(&lab, &lab.image("v1"));
        assert_eq!(running(&engine, &lab), before, "{how:?}: the same process, and no other");
    }
    assert_eq!(lab.agent_log().matches("\"step\":\"create\"").count(), 1, "no other was created");
    lab.kill_agent();
}
