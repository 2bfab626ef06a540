//! The agent exits between any two steps, as by `kill -9`, under load. The next start finishes the work.
#![expect(clippy::print_stdout, reason = "a test prints its figures, and runs programs and writes files of its own")]

use std::{path::Path, time::Duration};

use crate::support::{
    lab::{Lab, Setup},
    load::{Client, Load},
    wait::{pause, until},
};

use demae::model::status::State;

/// Every boundary in the long form; every seventh in the short form, from another offset for each mode.
fn stride() -> usize {
    if std::env::var("DEMAE_ALL_KILL_POINTS").is_ok() { 1 } else { 7 }
}

/// The number of files and nginx sets. A half-written file left by a kill counts. The previous set is kept, whatever is
/// in it.
fn leftovers(lab: &Lab) -> usize {
    lab.files().iter().filter(|f| !f.contains(".set/") && (f.ends_with(".set") || !Path::new(f).is_dir())).count()
}

fn crash_everywhere(mut lab: Lab, spec: &str, clients: Vec<Client>, first: usize) {
    lab.deploy("web", "apps/web/spec", spec);
    let traces = |lab: &Lab| {
        let release = lab.app("web").and_then(|a| a.release).expect("a release");
        let traces: Vec<String> =
            lab.traces().into_iter().map(|t| t.replace(&release, "RELEASE").replace(".2/", ".1/")).collect();
        (lab.containers().len(), leftovers(lab), traces)
    };
    let clean = traces(&lab);
    let load = Load::start(lab.ingress, "web.test", clients);
    until("requests are served", || load.requests() > 20);
    lab.kill_agent();
    let images = [lab.image("v2"), lab.image("v1")];
    let mut kills = 0;
    let first = if stride() == 1 { 1 } else { first };
    for (round, boundary) in (first..).step_by(stride()).enumerate() {
        let image = &images[round % 2];
        lab.put("apps/web/image", image);
        lab.start_agent(&[("DEMAE_FAILPOINT", &boundary.to_string())]);
        let done =
            |lab: &Lab| lab.app("web").is_some_and(|a| a.state == State::Converged && a.image.as_ref() == Some(image));
        let mut ended = false;
        until("the agent ends at the failpoint, or is done", || {
            ended = lab.agent_ended();
            ended || done(&lab)
        });
        if !ended {
            // A deploy has no more boundaries.
            lab.kill_agent();
            break;
        }
        kills += 1;
        lab.start_agent(&[]);
        lab.wait_app("web", "converged after a crash", |a| {
            a.state == State::Converged && a.image.as_ref() == Some(image)
        });
        until("the last leftovers are removed", || traces(&lab) == clean);
        let tally = load.so_far();
        let lost = tally.failed + tally.stale;
        assert_eq!(lost, 0, "requests were lost around the kill at boundary {boundary}: {:#?}", tally.reasons);
        lab.kill_agent();
    }
    let tally = load.stop();
    println!("{kills} kills: requests: {}  failed: {}  stale: {}", tally.requests, tally.failed, tally.stale);
    assert!(kills >= 3, "too few boundaries: {kills}");
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    pause();
}

#[test]
fn a_crash_anywhere_in_socket_mode_loses_nothing() {
    let lab = Lab::new();
    let spec = lab.socket_spec(&lab.image("v1"), "web.test", "");
    let quick = Duration::from_millis(5);
    let clients = vec![Client::get(true).pausing(quick), Client::post(false).pausing(quick), Client::slow(false, 500)];
    crash_everywhere(lab, &spec, clients, 1);
}

#[test]
fn a_crash_anywhere_in_table_mode_loses_nothing() {
    let lab = Lab::with(&Setup { tcp_routes: true, ..Setup::default() });
    let spec = lab.port_spec(&lab.image("v1"), "web.test", "");
    let quick = Duration::from_millis(5);
    let clients = vec![Client::get(true).pausing(quick), Client::post(false).pausing(quick), Client::slow(false, 500)];
    crash_everywhere(lab, &spec, clients, 4);
}

#[test]
fn a_crash_anywhere_in_port_mode_loses_nothing() {
    let lab = Lab::with(&Setup { nginx: "profile = \"strict\"", ..Setup::default() });
    let spec = lab.port_spec(&lab.image("v1"), "web.test", "");
    let quick = Duration::from_millis(5);
    let clients = vec![Client::get(true).pausing(quick), Client::post(false).pausing(quick), Client::slow(false, 500)];
    crash_everywhere(lab, &spec, clients, 2);
}

/// First deploy, failed deploy and removal. Another app serves throughout, and the app under test never answers
/// wrongly.
#[test]
fn crash_in_a_first_deploy_a_failed_one_or_a_removal_is_recovered_from() {
    // Each round reloads nginx.
    let mut lab = Lab::with(&Setup { nginx: "profile = \"strict\"", ..Setup::default() });
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let load = Load::start(lab.ingress, "web.test", vec![Client::get(true).pausing(Duration::from_millis(5))]);
    let spec = lab.socket_spec(&lab.image("v1"), "new.test", "");
    let (before, files) = (lab.containers().len(), leftovers(&lab));
    lab.kill_agent();
    let mut kills = 0;
    let (first, stride) = if stride() == 1 { (1, 1) } else { (3, stride() * 2) };
    for boundary in (first..).step_by(stride) {
        let mut ends = 0;
        for what in ["the first deploy", "a failure", "the removal"] {
            match what {
                "the first deploy" => lab.put("apps/new/spec", &spec),
                "a failure" => lab.put("env/new/MOOD", "exit"),
                _ => {
                    lab.del("apps/new/spec");
                    lab.del("env/new/MOOD");
                }
            }
            let done = |lab: &Lab| match (what, lab.app("new")) {
                ("the first deploy", Some(app)) => app.state == State::Converged,
                ("a failure", Some(app)) => app.state == State::Blocked,
                ("the removal", None) => lab.status().is_some() && lab.containers().len() == before,
                _ => false,
            };
            lab.start_agent(&[("DEMAE_FAILPOINT", &boundary.to_string())]);
            let mut ended = false;
            until(&format!("{what}: the agent ends at boundary {boundary}, or is done"), || {
                ended = lab.agent_ended();
                ended || done(&lab)
            });
            if ended {
                ends += 1;
                lab.start_agent(&[]);
                until(&format!("{what} is recovered after a kill at boundary {boundary}"), || done(&lab));
            }
            if what == "a failure" {
                // The old instance keeps serving.
                assert_eq!(lab.get("new.test", "/").map(|(status, _)| status), Ok(200), "after {boundary}");
            }
            lab.kill_agent();
        }
        kills += ends;
        if ends == 0 {
            break;
        }
    }
    let tally = load.stop();
    println!("{kills} kills: requests: {}  failed: {}", tally.requests, tally.failed);
    assert!(kills >= 3, "too few boundaries: {kills}");
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    lab.start_agent(&[]);
    lab.wait_app("web", "converged", |a| a.state == State::Converged);
    let left: Vec<String> = lab.traces().into_iter().filter(|t| t.contains("/new")).collect();
    assert!(left.is_empty(), "{left:#?}");
    until("nothing else is left either", || leftovers(&lab) == files);
}

/// In every lab a mismatch fails the test; this test shows that the comparison happens at all.
#[test]
fn host_is_compared_with_the_model_after_each_step() {
    let mut lab = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    lab.start_agent(&[("DEMAE_LOG", "info,demae::agent::prediction=debug")]);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    lab.deploy("web", "apps/web/image", &lab.image("v2"));
    lab.del("apps/web/");
    until("it is removed", || lab.containers().is_empty() && lab.lists_no("web"));
    let log = lab.agent_log();
    let agreed: Vec<&str> = log.lines().filter(|l| l.contains("model and host agree")).collect();
    for step in ["write env-file", "create", "start", "switch", "prove", "settle", "stop", "remove", "clean up"] {
        let message = format!("\"step\":\"{step} ");
        assert!(agreed.iter().any(|l| l.contains(&message)), "`{step}` is compared: {agreed:#?}");
    }
}
