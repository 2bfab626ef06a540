//! Commands that need a host: `agent --once`, `plan`, `status`, SIGTERM, and `dev` from start to Ctrl-C.
#![expect(clippy::disallowed_methods, reason = "a test runs programs and writes files of its own")]

use std::{fs, path::Path, process::Command, time::Duration};

use crate::support::{
    json_schema::problems,
    lab::{Lab, Setup},
    load::{Client, Load},
    wait::until,
};
use demae::model::status::State;

#[test]
fn plan_prints_and_once_applies_and_term_keeps_everything_serving() {
    let mut lab = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    let spec = lab.socket_spec(&lab.image("v1"), "web.test", "");
    lab.put("apps/web/spec", &spec);
    let plan = || {
        let output = lab.demae(&["plan"]);
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (code, text) = plan();
    assert_eq!(code, Some(2), "{text}");
    let steps = ["write env-file", "create", "start", "switch 1->", "prove", "settle"];
    assert!(steps.iter().all(|s| text.contains(s)), "{text}");
    assert!(lab.containers().is_empty() && lab.traces().is_empty(), "a plan does nothing");

    let once = lab.demae(&["agent", "--once", "--timeout", "60s"]);
    assert_eq!(once.status.code(), Some(0), "{}", String::from_utf8_lossy(&once.stderr));
    assert_eq!(lab.get("web.test", "/").expect("an answer").0, 200, "it serves, and no agent runs");
    let (code, text) = plan();
    assert_eq!((code, text.as_str()), (Some(0), "web: nothing to do\n"));

    // A person must act: `--once` exits with 1, and `status` reads the store if no agent answers.
    lab.put("apps/bad/spec", "imagee: x");
    let once = lab.demae(&["agent", "--once", "--timeout", "60s"]);
    assert_eq!(once.status.code(), Some(1), "{}", String::from_utf8_lossy(&once.stderr));

    lab.start_agent(&[]);
    lab.wait_app("web", "converged", |s| s.state == State::Converged);
    let before = lab.containers();
    let load = Load::start(lab.ingress, "web.test", vec![Client::get(true), Client::post(false)]);
    // During a deploy.
    lab.put("apps/web/image", &lab.image("v2"));
    until("the deploy began", || lab.containers().len() == 2);
    let took = lab.stop_agent();
    assert!(took < Duration::from_secs(10), "it took {took:?} to end");
    assert!(lab.containers().iter().any(|c| before.contains(c)), "the serving instance is still there");
    lab.start_agent(&[]);
    lab.wait_app("web", "converged", |s| s.state == State::Converged && s.image == Some(lab.image("v2")));
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    let output = lab.demae(&["status", "-o", "json", "web"]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("it is JSON");
    assert_eq!((json["version"].as_i64(), json["apps"][0]["state"].as_str()), (Some(1), Some("converged")));
}

#[test]
fn two_hosts_share_an_engine_and_a_store() {
    let mut first = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    let mut second = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    // The second host reads the first one's store.
    let file = second.path("agent.toml");
    let text = fs::read_to_string(&file).expect("a file").replace(&second.etcd.to_string(), &first.etcd.to_string());
    fs::write(&file, text).expect("a file");
    first.start_agent(&[]);
    second.start_agent(&[]);
    let image = first.image("v1");
    first.put("apps/web/spec", &first.socket_spec(&image, "web.test", ""));
    first.put(
        "apps/one/spec",
        &first.socket_spec(&image, "one.test", "deploy: {placement: {constraints: ['place == here']}}\n"),
    );
    first.put(&format!("hosts/{}/labels", second.host), "place: here");
    let a = first.wait_app("web", "converged", |s| s.state == State::Converged);
    let b = second.wait_app("web", "converged", |s| s.state == State::Converged);
    assert_eq!(a.release, b.release, "one release, made with one key");
    second.wait_app("one", "converged", |s| s.state == State::Converged);
    assert_eq!((first.containers().len(), second.containers().len()), (1, 2));
    assert!(first.lists_no("one"));
    first.put(&format!("hosts/{}/mode", first.host), "drained");
    until("one host is drained", || first.containers().is_empty());
    assert_eq!((second.containers().len(), second.get("web.test", "/").expect("an answer").0), (2, 200));
}

/// A command of a shell; its exit code and both outputs.
fn shell(lab: &Lab, command: &str) -> (i32, String, String) {
    let output = Command::new("bash")
        .args(["-c", command])
        .env(
            "PATH",
            format!(
                "{}:/usr/bin:/bin",
                Path::new(env!("CARGO_BIN_EXE_demae")).parent().expect("a directory").display()
            ),
        )
        .env("DEMAE_CONFIG", lab.path("agent.toml"))
        .env("DEMAE_METRICS", format!("http://{}/metrics", lab.metrics))
        .env("TERM", "xterm")
        .env_remove("ETCDCTL_ENDPOINTS")
        .output()
        .expect("bash runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

#[test]
fn status_fits_its_terminal_and_a_closed_pipe_is_no_error() {
    let lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    lab.put(
        "apps/broken/spec",
        "image: demae-test/none:v1\nvolumes: ['/srv/demae-test/does-not-exist:/data']\npull_policy: never\n",
    );
    lab.wait_app("broken", "blocked", |s| s.state == State::Blocked);
    for width in [40, 80, 200] {
        // A terminal of its own, by script(1).
        let (code, out, err) = shell(&lab, &format!("script -qec 'stty cols {width}; demae status' /dev/null"));
        assert_eq!(code, 0, "{out}{err}");
        assert!(out.contains("\u{1b}[31mblocked\u{1b}[0m"), "trouble is red: {out:?}");
        let plain =
            out.replace("\u{1b}[31m", "").replace("\u{1b}[32m", "").replace("\u{1b}[33m", "").replace("\u{1b}[0m", "");
        let longest = plain.lines().map(|line| line.trim_end().chars().count()).max();
        assert!(longest.is_some_and(|longest| longest <= width), "{longest:?} at {width}: {plain}");
        let place = |app: &str| plain.lines().position(|line| line.starts_with(app)).expect("a line");
        assert!(place("broken") < place("web"), "trouble comes first: {plain}");
    }
    let (_, out, _) = shell(&lab, "script -qec 'NO_COLOR=1 demae status' /dev/null");
    assert!(!out.contains('\u{1b}'), "{out:?}");
    // A program gets whole lines without colours.
    let (code, out, _) = shell(&lab, "demae status");
    assert!(code == 0 && !out.contains('\u{1b}') && out.lines().count() == 3, "{out}");
    for command in ["demae status | head -1", "set -o pipefail; demae status >&-", "demae status -o json | head -c 10"]
    {
        let (code, _, err) = shell(&lab, command);
        assert_eq!((code, err.as_str()), (0, ""), "{command}");
    }
    let json = |text: &str| serde_json::from_str(text).expect("it is JSON");
    let (schema, shown) = (shell(&lab, "demae schema status").1, shell(&lab, "demae status -o json").1);
    assert_eq!(problems(&json(&schema), &json(&shown)), Vec::<String>::new(), "{shown}");
    // On a terminal the progress is a picture, drawn again in its place.
    let (code, out, _) = shell(&lab, "script -qec 'stty cols 60; demae redeploy web' /dev/null");
    assert!(code == 0 && out.contains("\u{1b}[1A\u{1b}[J"), "{out:?}");
    assert!(out.contains("converged on 1 host"), "{out}");
}
