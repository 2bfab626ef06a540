//! The agent ends between any two steps, as by `kill -9`, under load. The next start finishes the work.
#![expect(clippy::print_stdout, reason = "a test tells its figures, and runs programs and writes files of its own")]

mod support;

use std::{path::Path, time::Duration};

use support::{
    lab::{Lab, Setup},
    load::{Client, Load},
    wait::{pause, until},
};

use demae::model::status::State;

/// Every boundary in the long form; every seventh in the short one, begun at another place for each mode.
fn stride() -> usize {
    if std::env::var("DEMAE_ALL_KILL_POINTS").is_ok() { 1 } else { 7 }
}

/// How many files there are, and sets for nginx. What a kill leaves of one that was half written is one too many. Of sets
/// the one before is kept, whatever is in it.
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
    until("requests flow", || load.requests() > 20);
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
            // There are no more boundaries in a deploy.
            lab.kill_agent();
            break;
        }
        kills += 1;
        lab.start_agent(&[]);
        lab.wait_app("web", "converged after a crash", |a| {
            a.state == State::Converged && a.image.as_ref() == Some(image)
        });
        until("the last leftovers go", || traces(&lab) == clean);
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
fn a_crash_anywhere_in_port_mode_loses_nothing() {
    let lab = Lab::with(&Setup { nginx: "profile = \"strict\"", ..Setup::default() });
    let spec = lab.port_spec(&lab.image("v1"), "web.test", "");
    let quick = Duration::from_millis(5);
    let clients = vec![Client::get(true).pausing(quick), Client::post(false).pausing(quick), Client::slow(false, 500)];
    crash_everywhere(lab, &spec, clients, 2);
}

/// What is not a deploy over a running app: the first one, one that fails, and the end of an app. Another app serves all
/// along, and the one in question never answers wrongly.
#[test]
fn a_crash_in_a_first_deploy_a_failed_one_or_a_removal_is_made_good() {
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
                until(&format!("{what} is made good after a kill at boundary {boundary}"), || done(&lab));
            }
            if what == "a failure" {
                // The old instance serves on.
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

/// In every lab a contradiction fails the test; here it is seen that there is a comparison at all.
#[test]
fn after_each_step_the_host_is_held_to_the_model() {
    let mut lab = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    lab.start_agent(&[("DEMAE_LOG", "info,demae::agent::prediction=debug")]);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    lab.deploy("web", "apps/web/image", &lab.image("v2"));
    lab.del("apps/web/");
    until("it has left", || lab.containers().is_empty() && lab.app("web").is_none());
    let log = lab.agent_log();
    let agreed: Vec<&str> = log.lines().filter(|l| l.contains("model and host agree")).collect();
    for step in ["write env-file", "create", "start", "switch", "prove", "settle", "stop", "remove", "clean up"] {
        let told = format!("\"step\":\"{step} ");
        assert!(agreed.iter().any(|l| l.contains(&told)), "`{step}` is compared: {agreed:#?}");
    }
}
