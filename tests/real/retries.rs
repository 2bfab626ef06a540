//! Automatic retries: what is retried, with which backoff, and what is not delayed by it.
#![expect(clippy::disallowed_methods, reason = "a test writes files of its own")]

use std::{
    fs,
    time::{Duration, Instant},
};

use crate::support::{
    containers::ids,
    lab::{Lab, Setup},
    names::random,
    wait::{until, until_within},
};
use demae::model::status::State;

#[test]
fn failed_first_deploy_is_retried_until_its_dependency_is_there() {
    let place = std::path::Path::new("/srv").join(format!("demae-test-{}", random()));
    fs::create_dir_all(&place).expect("a directory");
    let lab = Lab::new();
    let spec = format!(
        "{}volumes: [\"{}:/ready:ro\"]\n",
        lab.socket_spec(&lab.image("v1"), "web.test", "").replace("{SOCKET:", "{MOOD: late, SOCKET:"),
        place.display()
    );
    lab.put("apps/web/spec", &spec);
    let failed = lab.wait_app("web", "failed once", |s| s.state == State::Blocked);
    assert!(failed.is("halted") && failed.is("retry"), "{failed:?}");
    assert!(failed.verdict.is_some_and(|v| v.exit_code == Some(1) && v.log_tail.contains("no database yet")));
    lab.wait_app("web", "failed again", |s| s.verdict.as_ref().is_some_and(|v| v.attempts == 2));
    fs::write(place.join("now"), "").expect("a file");
    lab.wait_app("web", "converged", |s| s.state == State::Converged && s.verdict.is_none());
    // Once an instance serves, a failed release waits for a person.
    lab.put("env/web/MOOD", "exit");
    let failed = lab.wait_app("web", "failed", |s| s.state == State::Blocked);
    assert!(!failed.is("retry"), "{failed:?}");
    // Only a person can ask for another try.
    let verdicts = || lab.metric("demae_events_total", "type=\"verdict\"");
    let before = verdicts();
    let output = lab.demae(&["retry", "web"]);
    assert_eq!(output.status.code(), Some(3), "it failed again: {output:?}");
    assert!(verdicts() > before, "it was tried again");
    drop(lab);
    let _ = fs::remove_dir_all(place);
}

#[test]
fn slow_stop_delays_no_later_release() {
    let lab = Lab::new();
    // As PID 1 without a handler of its own it ignores TERM.
    let spec = lab
        .socket_spec(&lab.image("v1"), "web.test", "init: false\n")
        .replace("stop_grace_period: 2s", "stop_grace_period: 30s");
    lab.deploy("web", "apps/web/spec", &spec);
    let began = Instant::now();
    for version in ["v2", "v3"] {
        lab.put("apps/web/image", &lab.image(version));
        let word = format!("version={version}");
        until("the new version answers", || lab.get("web.test", "/").is_ok_and(|(_, body)| body.contains(&word)));
    }
    assert!(began.elapsed() < Duration::from_secs(20), "two releases took {:?}", began.elapsed());
    lab.wait_app("web", "waiting for a stop", |s| s.is("stopping") && s.reason.contains("killed at"));
    until_within(Duration::from_secs(90), "the old ones are removed", || ids(&lab, "web").len() == 1);
    lab.wait_app("web", "converged", |s| s.state == State::Converged);
}

#[test]
fn app_unhealthy_after_each_start_is_replaced_with_backoff_and_reported() {
    let lab = Lab::with(&Setup { top: "resync = \"1s\"\n", ..Setup::default() });
    let spec = lab
        .socket_spec(&lab.image("v1"), "web.test", "")
        .replace("{SOCKET:", "{SICK_AFTER_MS: \"3000\", SOCKET:")
        .replace("interval: 1s", "interval: 200ms, retries: 1");
    lab.deploy("web", "apps/web/spec", &spec);
    lab.wait_app("web", "in backoff", |s| s.reason.contains("given up") || s.reason.contains("was replaced"));
    // Each backoff is twice the previous one, so three in a row exceed five seconds.
    until_within(Duration::from_secs(120), "it is reported as unstable", || {
        lab.app("web").is_some_and(|s| s.reason.contains("unstable"))
    });
}
