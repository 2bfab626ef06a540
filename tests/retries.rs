//! What is tried again by itself, how soon, and what does not wait for it.
#![expect(clippy::disallowed_methods, reason = "a test writes files of its own")]

mod support;

use std::{
    fs,
    time::{Duration, Instant},
};

use demae::model::status::State;
use support::{
    containers::ids,
    lab::{Lab, Setup},
    names::random,
    wait::{until, until_within},
};

#[test]
fn a_first_deploy_that_fails_is_tried_again_until_what_it_needs_is_there() {
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
    assert!(failed.reason.contains("exit code 1") && failed.reason.contains("tried again at"), "{}", failed.reason);
    assert!(failed.verdict.is_some_and(|v| v.log_tail.contains("no database yet")));
    lab.wait_app("web", "failed again", |s| s.verdict.as_ref().is_some_and(|v| v.attempts == 2));
    fs::write(place.join("now"), "").expect("a file");
    lab.wait_app("web", "converged", |s| s.state == State::Converged && s.verdict.is_none());
    // Once something serves, a release that fails waits for a person.
    lab.put("env/web/MOOD", "exit");
    let failed = lab.wait_app("web", "failed", |s| s.state == State::Blocked);
    assert!(!failed.reason.contains("tried again"), "{}", failed.reason);
    // What the verdict depended on changes, and the release does not.
    let verdicts = || lab.metric("demae_events_total", "type=\"verdict\"");
    let before = verdicts();
    lab.put("apps/web/spec", &format!("{spec}deploy: {{update_config: {{order: stop-first}}}}\n"));
    until("it is tried again", || verdicts() > before);
    drop(lab);
    let _ = fs::remove_dir_all(place);
}

#[test]
fn an_instance_that_takes_long_to_end_holds_up_no_other_release() {
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
        until("it answers", || lab.get("web.test", "/").is_ok_and(|(_, body)| body.contains(&word)));
    }
    assert!(began.elapsed() < Duration::from_secs(20), "two releases took {:?}", began.elapsed());
    let leaving = lab.wait_app("web", "told what it waits for", |s| s.reason.contains("stopping"));
    assert!(leaving.reason.contains("killed at"), "{}", leaving.reason);
    until_within(Duration::from_secs(90), "the old ones are gone", || ids(&lab, "web").len() == 1);
    lab.wait_app("web", "converged", |s| s.state == State::Converged);
}

#[test]
fn an_app_that_falls_ill_after_each_start_is_replaced_ever_more_slowly_and_reported() {
    let lab = Lab::with(&Setup { top: "resync = \"1s\"\n", ..Setup::default() });
    let spec = lab
        .socket_spec(&lab.image("v1"), "web.test", "")
        .replace("{SOCKET:", "{SICK_AFTER_MS: \"1500\", SOCKET:")
        .replace("interval: 1s", "interval: 200ms, retries: 1");
    lab.deploy("web", "apps/web/spec", &spec);
    lab.wait_app("web", "held back", |s| s.reason.contains("given up") || s.reason.contains("was replaced"));
    // Each pause is twice the one before, so three in a row come to more than five seconds.
    until_within(Duration::from_secs(120), "it is reported though it is up", || {
        lab.app("web").is_some_and(|s| s.reason.contains("unstable"))
    });
}
