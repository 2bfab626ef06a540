//! The agent stands still in the middle of a deploy, as on a machine that was suspended or starved, and the world goes on.
//! What it had decided is looked at again before any of it is done.

mod support;

use std::{
    fs,
    time::{Duration, Instant},
};

use demae::model::status::State;
use support::{
    containers::{ids, inspect, only},
    lab::{Lab, Setup},
    load::{Client, Load},
    process::{docker, signal},
    relay::{Relay, is},
    wait::until,
};

/// Longer than any decision keeps.
const STANDSTILL: Duration = Duration::from_secs(11);

fn quick() -> Vec<Client> {
    let pause = Duration::from_millis(5);
    vec![Client::get(true).pausing(pause), Client::post(false).pausing(pause)]
}

/// Puts v2, holds the agent still at a boundary while something happens, and wakes it.
fn stand_still(lab: &mut Lab, boundary: &str, meanwhile: impl FnOnce(&Lab)) {
    lab.kill_agent();
    lab.put("apps/web/image", &lab.image("v2"));
    lab.start_agent(&[("DEMAE_STANDSTILL", boundary)]);
    let pid = lab.agent_pid().expect("it runs");
    let stands = || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
        stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T'))
    };
    until(&format!("the agent stands still at `{boundary}`"), stands);
    let began = Instant::now();
    meanwhile(lab);
    until("it stood still for long", || began.elapsed() > STANDSTILL);
    signal(pid, "-CONT");
    until("it decides anew", || lab.agent_log().contains("decided anew, as it comes late"));
    until("it is counted", || lab.metric("demae_standstills_total", "") >= 1.0);
}

fn settles(lab: &Lab, version: &str) {
    let image = lab.image(version);
    lab.wait_app("web", "converged", |a| a.state == State::Converged && a.image.as_ref() == Some(&image));
    until("nothing is left over", || ids(lab, "web").len() == 1);
    let answer = lab.get("web.test", "/").map(|(_, body)| body);
    assert!(answer.as_ref().is_ok_and(|body| body.contains(&format!("version={version} "))), "{answer:?}");
}

/// One step at a time, and one that hangs.
#[test]
fn a_step_that_waited_long_for_its_turn_is_decided_anew() {
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
    lab.wait_app("web", "about to begin", |a| a.reason.starts_with("write env-file"));
    // Nobody wants that any more when its turn comes.
    let began = Instant::now();
    lab.put("apps/web/image", &lab.image("v1"));
    until("it waited long", || began.elapsed() > Duration::from_secs(6));
    let written = lab.metric("demae_steps_total", "kind=\"write_env_file\"");
    relay.pass();
    settles(&lab, "v1");
    until("it is decided anew", || lab.agent_log().contains("decided anew, as it comes late: write env-file"));
    assert!((lab.metric("demae_steps_total", "kind=\"write_env_file\"") - written).abs() < 0.5, "it was not done");
    let v2 = lab.image("v2");
    lab.wait_app("other", "converged", |a| a.state == State::Converged && a.image.as_ref() == Some(&v2));
    nothing_lost(load);
}

/// The container of v2, by its image.
fn newcomer(lab: &Lab) -> String {
    let image = lab.image("v2");
    let ids = docker(&["ps", "-aq", "--filter", &format!("ancestor={image}")]);
    ids.lines().next().expect("a container of v2").to_owned()
}

fn nothing_lost(load: Load) {
    let tally = load.stop();
    assert!(tally.requests > 100, "{}", tally.requests);
    assert_eq!((tally.failed, tally.stale), (0, 0), "of {}: {:#?}", tally.requests, tally.reasons);
}

#[test]
fn no_route_is_turned_to_what_died_while_the_agent_stood_still() {
    let mut lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let load = Load::start(lab.ingress, "web.test", quick());
    stand_still(&mut lab, "switch", |lab| {
        docker(&["rm", "-f", &newcomer(lab)]);
    });
    settles(&lab, "v2");
    nothing_lost(load);
}

/// Its last answer, from before, says that it is healthy.
#[test]
fn who_hangs_since_the_agent_stood_still_gets_no_requests() {
    let mut lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let load = Load::start(lab.ingress, "web.test", quick());
    let mut hanging = None;
    stand_still(&mut lab, "switch", |lab| {
        let id = newcomer(lab);
        signal(pid_of(&id), "-STOP");
        hanging = Some(id);
    });
    lab.wait_app("web", "waiting for it", |a| a.reason.starts_with("waiting until"));
    assert!(lab.metric("demae_steps_total", "kind=\"switch\"") < 0.5, "no route was turned to it");
    assert!(lab.get("web.test", "/").is_ok_and(|(_, body)| body.contains("version=v1 ")));
    signal(pid_of(&hanging.expect("it was stopped")), "-CONT");
    settles(&lab, "v2");
    nothing_lost(load);
}

#[test]
fn nginx_is_not_told_of_what_died_while_the_agent_stood_still() {
    let mut lab = Lab::with(&Setup { nginx: "profile = \"strict\"", ..Setup::default() });
    lab.deploy("web", "apps/web/spec", &lab.port_spec(&lab.image("v1"), "web.test", ""));
    let load = Load::start(lab.ingress, "web.test", quick());
    stand_still(&mut lab, "nginx", |lab| {
        docker(&["rm", "-f", &newcomer(lab)]);
    });
    settles(&lab, "v2");
    nothing_lost(load);
}

#[test]
fn nothing_is_stopped_by_a_decision_from_before_the_wish_changed() {
    let mut lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let load = Load::start(lab.ingress, "web.test", quick());
    let old = only(&lab, "web");
    let running = || inspect(&old, "{{.Id}} {{.State.StartedAt}}");
    let before = running();
    stand_still(&mut lab, "stop", |lab| lab.put("apps/web/image", &lab.image("v1")));
    settles(&lab, "v1");
    assert_eq!(running(), before, "it was about to be stopped, and is wanted again");
    nothing_lost(load);
}

/// Its program, which is the only child of Docker's own init.
fn pid_of(id: &str) -> u32 {
    let init = inspect(id, "{{.State.Pid}}");
    let children = fs::read_to_string(format!("/proc/{init}/task/{init}/children")).expect("it runs");
    children.trim().parse().expect("one child")
}
