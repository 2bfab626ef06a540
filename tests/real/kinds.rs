//! Other kinds of apps: workers, stop-first apps, apps with a Docker healthcheck, apps pulled from a registry.

use std::time::Duration;

use crate::support::{
    lab::Lab,
    load::{Client, Load, mixed},
    names::free_address,
    process::docker,
    registry::Registry,
    wait::until,
};
use demae::model::status::{AppStatus, State};

#[test]
fn a_worker_is_replaced_and_kept_running() {
    let lab = Lab::new();
    let image = lab.image("v1");
    lab.deploy(
        "worker",
        "apps/worker/spec",
        &format!("image: \"{image}\"\nstop_grace_period: 1s\ndeploy: {{replicas_per_host: 2}}\n"),
    );
    let first = lab.containers();
    assert_eq!(first.len(), 2);
    let took = lab.app("worker").and_then(|a| a.timeline.last().map(|m| m.ms)).expect("a timeline");
    assert!(took < 20_000, "a worker settles in seconds, not at its deadline: {took} ms");
    docker(&["kill", &first[0]]);
    until("it runs again", || lab.app("worker").is_some_and(|a| a.state == State::Converged && a.healthy == 2));
    let status = lab.deploy("worker", "env/worker/GREETING", "hello");
    assert_eq!((status.healthy, lab.containers().len()), (2, 2));
    assert!(lab.containers().iter().all(|c| !first.contains(c)), "both were replaced");
    lab.del("apps/worker/");
    until("nothing is left", || lab.containers().is_empty() && lab.traces().is_empty());
}

#[test]
fn stop_first_app_never_runs_two_instances() {
    let lab = Lab::new();
    let more = "deploy: {update_config: {order: stop-first}}\n";
    lab.deploy("one", "apps/one/spec", &lab.socket_spec(&lab.image("v1"), "one.test", more));
    lab.put("apps/one/image", &lab.image("v2"));
    let filter = format!("label=demae.host={}", lab.host);
    let mut most = 0;
    until("v2 serves", || {
        let running = docker(&["ps", "-q", "--filter", &filter]).lines().count();
        most = most.max(running);
        lab.app("one").is_some_and(|a| a.state == State::Converged && a.image == Some(lab.image("v2")))
    });
    assert_eq!(most, 1, "two ran at once");
    // A failing release: the old one is started again.
    lab.put("env/one/MOOD", "exit");
    lab.wait_app("one", "blocked, and serving again", |s| s.state == State::Blocked && s.healthy == 1);
    assert!(lab.get("one.test", "/").expect("an answer").1.contains("version=v2"));
}

#[test]
fn app_with_a_docker_healthcheck_is_routed() {
    let lab = Lab::new();
    let check = "healthcheck: {test: [CMD, /app, check], interval: 300ms, start_period: 10s}";
    let spec = lab
        .socket_spec(&lab.image("v1"), "asked.test", "")
        .replace("healthcheck: {http: /healthz, interval: 1s, start_period: 10s}", check);
    assert!(spec.contains("CMD"), "{spec}");
    lab.deploy("asked", "apps/asked/spec", &spec);
    let load = Load::start(lab.ingress, "asked.test", mixed(Duration::from_millis(2)));
    lab.deploy("asked", "apps/asked/image", &lab.image("v2"));
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
}

#[test]
fn image_that_is_pushed_late_takes_another_try() {
    let lab = Lab::new();
    let registry = Registry::start(free_address(), lab.dir.path());
    let name = |version: &str| registry.name(version);
    let push = |version: &str| registry.push(&lab.image(version), version);
    let spec = lab.socket_spec(&name("v1"), "pulled.test", "pull_policy: always\n");
    // While the app serves nothing, its image is waited for.
    lab.put("apps/pulled/spec", &spec);
    let is_waiting = |status: &AppStatus| status.is("image_missing") && status.is("cooling_down");
    lab.wait_app("pulled", "waiting for its first image", is_waiting);
    push("v1");
    lab.wait_app("pulled", "serving", |s| s.state == State::Converged);
    assert!(lab.app("pulled").is_some_and(|a| a.timeline.iter().any(|m| m.what == "pulled")));
    let load = Load::start(lab.ingress, "pulled.test", vec![Client::get(true)]);
    // CI is late: the tag is put before the image is pushed.
    lab.put("apps/pulled/image", &name("v2"));
    let status = lab.wait_app("pulled", "failed", |s| s.is("halted"));
    assert!(status.verdict.is_some_and(|verdict| verdict.cause.contains(&name("v2"))), "{}", status.reason);
    push("v2");
    let (code, _, err) = lab.ask(&["retry", "pulled", "--timeout", "60s"]);
    assert_eq!(code, 0, "{err}");
    let status = lab.app("pulled").expect("it is there");
    assert_eq!((status.state, status.image), (State::Converged, Some(name("v2"))));
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
}

#[test]
fn moved_tag_changes_no_instance_of_a_release() {
    let lab = Lab::new();
    let (v1, v2) = (lab.image("v1"), lab.image("v2"));
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&v1, "web.test", ""));
    // This tag removes the image at the end.
    let first = format!("{v1}-first");
    docker(&["tag", &v1, &first]);
    lab.remove_on_drop(first);
    docker(&["tag", &v2, &v1]);
    // More instances of a release use its image.
    lab.put("apps/web/spec", &lab.socket_spec(&v1, "web.test", "deploy: {replicas_per_host: 2}\n"));
    lab.wait_app("web", "converged with two instances", |a| a.state == State::Converged && a.healthy == 2);
    let images: std::collections::BTreeSet<String> =
        lab.containers().iter().map(|id| docker(&["inspect", "--format", "{{.Image}}", id])).collect();
    assert_eq!((lab.containers().len(), images.len()), (2, 1), "{images:?}");
    assert_eq!(lab.get("web.test", "/").map(|(_, body)| body.contains("v1")), Ok(true));
    // Another release of the same tag uses the image that the tag names now.
    lab.take_over("web", "apps/web/restart", "1");
    assert_eq!(lab.get("web.test", "/").map(|(_, body)| body.contains("v2")), Ok(true));
}
