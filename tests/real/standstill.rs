//! The agent is stopped during a deploy, as on a suspended or starved machine, while the host changes. Its decisions
//! are checked again before any step runs.

use std::{
    fs,
    time::{Duration, Instant},
};

use crate::support::{
    containers::{ids, inspect, only},
    lab::{Lab, Setup},
    load::{Client, Load},
    process::{docker, signal},
    relay::{Relay, is},
    wait::until,
};
use demae::model::status::State;

/// Longer than any decision is valid.
const STANDSTILL: Duration = Duration::from_secs(11);

fn quick() -> Vec<Client> {
    let pause = Duration::from_millis(5);
    vec![Client::get(true).pausing(pause), Client::post(false).pausing(pause)]
}

/// Puts v2, stops the agent at a boundary while something happens, and resumes it.
fn stall_agent(lab: &mut Lab, boundary: &str, meanwhile: impl FnOnce(&Lab)) {
    lab.kill_agent();
    lab.put("apps/web/image", &lab.image("v2"));
    lab.start_agent(&[("DEMAE_STANDSTILL", boundary)]);
    let pid = lab.agent_pid().expect("it runs");
    let is_stopped = || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
        stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T'))
    };
    until(&format!("the agent is stopped at `{boundary}`"), is_stopped);
    let began = Instant::now();
    meanwhile(lab);
    until("the standstill is long enough", || began.elapsed() > STANDSTILL);
    signal(pid, "-CONT");
    until("it plans again", || lab.agent_log().contains("decision expired before the step started, planning again"));
    until("the standstill is counted", || lab.metric("demae_standstills_total", "") >= 1.0);
}

fn wait_settled(lab: &Lab, version: &str) {
    let image = lab.image(version);
    lab.wait_app("web", "converged", |a| a.state == State::Converged && a.image.as_ref() == Some(&image));
    until("only one container is left", || ids(lab, "web").len() == 1);
    let answer = lab.get("web.test", "/").map(|(_, body)| body);
    assert!(answer.as_ref().is_ok_and(|body| body.contains(&format!("version={version} "))), "{answer:?}");
}

/// One step at a time, and one that hangs.
#[test]
fn step_that_waited_long_for_its_turn_is_planned_again() {
    let mut lab = Lab::with(&Setup { no_agent: true, top: "parallel = 1", ..Setup::default() });
    let relay = Relay::start(&lab.path("docker.sock"));
    lab.start_agent(&[("DOCKER_HOST", &relay.host())]);
    for app in ["web", "other"] {
        let spec = lab.socket_spec(&lab.image("v1"), &format!("{app}.test"), "network_mode: none\n");
        lab.deploy(app, &format!("apps/{app}/spec"), &spec);
    }
    let load = Load::start(lab.ingress, "web.test", quick());
    relay.hold_next(is("POST", "/containers/create"));
    lab.put("apps/other/image", &lab.image("v2"));
    until("a step hangs", || relay.held() == 1);
    lab.put("apps/web/image", &lab.image("v2"));
    lab.wait_app("web", "waiting for its turn", |a| a.reason.starts_with("write env-file"));
    // Superseded before its turn comes.
    let began = Instant::now();
    lab.put("apps/web/image", &lab.image("v1"));
    until("the wait is long enough", || began.elapsed() > Duration::from_secs(6));
    let written = lab.metric("demae_steps_total", "kind=\"write_env_file\"");
    relay.pass();
    wait_settled(&lab, "v1");
    until("it is planned again", || {
        lab.agent_log().contains("decision expired before the step started, planning again: write env-file")
    });
    assert!((lab.metric("demae_steps_total", "kind=\"write_env_file\"") - written).abs() < 0.5, "the step did not run");
    let v2 = lab.image("v2");
    lab.wait_app("other", "converged", |a| a.state == State::Converged && a.image.as_ref() == Some(&v2));
    assert_nothing_lost(load);
}

/// The container of v2.
fn container_of_v2(lab: &Lab) -> String {
    // Labs share their images, so an image does not tell whose container it is.
    let is_v2 = |id: &String| inspect(id, "{{.Config.Env}}").contains("VERSION=v2");
    ids(lab, "web").into_iter().find(is_v2).expect("a container of v2")
}

fn assert_nothing_lost(load: Load) {
    let tally = load.stop();
    assert!(tally.requests > 100, "{}", tally.requests);
    assert_eq!((tally.failed, tally.stale), (0, 0), "of {}: {:#?}", tally.requests, tally.reasons);
}

#[test]
fn instance_that_died_during_a_standstill_gets_no_route() {
    let mut lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let load = Load::start(lab.ingress, "web.test", quick());
    stall_agent(&mut lab, "switch", |lab| {
        docker(&["rm", "-f", &container_of_v2(lab)]);
    });
    wait_settled(&lab, "v2");
    assert_nothing_lost(load);
}

/// Its last probe result, from before the standstill, is healthy.
#[test]
fn instance_that_hung_during_a_standstill_gets_no_requests() {
    let mut lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let load = Load::start(lab.ingress, "web.test", quick());
    let mut stopped = None;
    stall_agent(&mut lab, "switch", |lab| {
        let id = container_of_v2(lab);
        signal(pid_of(&id), "-STOP");
        stopped = Some(id);
    });
    lab.wait_app("web", "waiting for its health", |a| a.is("health"));
    assert!(lab.metric("demae_steps_total", "kind=\"switch\"") < 0.5, "no route was switched to it");
    assert!(lab.get("web.test", "/").is_ok_and(|(_, body)| body.contains("version=v1 ")));
    signal(pid_of(&stopped.expect("it was stopped")), "-CONT");
    wait_settled(&lab, "v2");
    assert_nothing_lost(load);
}

#[test]
fn instance_that_died_during_a_standstill_is_not_written_to_nginx() {
    let mut lab = Lab::with(&Setup { nginx: "profile = \"strict\"", ..Setup::default() });
    lab.deploy("web", "apps/web/spec", &lab.port_spec(&lab.image("v1"), "web.test", ""));
    let load = Load::start(lab.ingress, "web.test", quick());
    stall_agent(&mut lab, "nginx", |lab| {
        docker(&["rm", "-f", &container_of_v2(lab)]);
    });
    wait_settled(&lab, "v2");
    assert_nothing_lost(load);
}

#[test]
fn stop_planned_before_the_desired_state_changed_is_not_run() {
    let mut lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let load = Load::start(lab.ingress, "web.test", quick());
    let old = only(&lab, "web");
    let running = || inspect(&old, "{{.Id}} {{.State.StartedAt}}");
    let before = running();
    stall_agent(&mut lab, "stop", |lab| lab.put("apps/web/image", &lab.image("v1")));
    wait_settled(&lab, "v1");
    assert_eq!(running(), before, "the planned stop did not run");
    assert_nothing_lost(load);
}

/// The pid of its program, the only child of Docker's init process.
fn pid_of(id: &str) -> u32 {
    let init = inspect(id, "{{.State.Pid}}");
    let children = fs::read_to_string(format!("/proc/{init}/task/{init}/children")).expect("it runs");
    children.trim().parse().expect("one child")
}
