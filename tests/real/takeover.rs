//! A container behind a hand-written server of nginx, whose requests go over to an app, and back.
#![expect(clippy::disallowed_methods, reason = "a test runs programs and writes files of its own")]

use std::fs;

use demae::model::status::State;

use crate::support::{
    containers::inspect,
    lab::{Lab, Setup},
    load::{Client, Load},
    names::free_address,
    process::docker,
    wait::until,
};

/// A container with a published port, and a server for it, after or before demae's files.
fn hand_written(lab: &Lab, host: &str, is_first: bool) -> String {
    let name = format!("old-{}", lab.host);
    let label = format!("demae.host={}", lab.host);
    let image = lab.image("v1");
    // Over a restart of the container, too.
    let port = free_address().port();
    let published = format!("127.0.0.1:{port}:8080");
    docker(&[
        "run",
        "-d",
        "--restart",
        "always",
        "--name",
        &name,
        "--label",
        &label,
        "-p",
        &published,
        "-e",
        "PORT=8080",
        &image,
    ]);
    let site = lab.path("site.conf");
    let server = format!(
        "server {{ listen {}; server_name {host}; location / {{ proxy_pass http://127.0.0.1:{port}; }} }}\n",
        lab.ingress
    );
    fs::write(&site, server).expect("a file");
    let conf = lab.path("nginx.conf");
    let text = fs::read_to_string(&conf).expect("a file");
    let include = format!("include {};\n", site.display());
    let own = format!("include {}/state/nginx/live/*.conf;\n", lab.dir.path().display());
    let both = if is_first { include + &own } else { own.clone() + &include };
    fs::write(&conf, text.replacen(&own, &both, 1)).expect("a file");
    name
}

fn lab() -> Lab {
    Lab::with(&Setup { no_agent: true, tcp_routes: true, ..Setup::default() })
}

#[test]
fn requests_go_over_to_an_app_and_back_and_none_fails() {
    let mut lab = lab();
    let old = hand_written(&lab, "web.test", false);
    lab.start_agent(&[]);
    lab.deploy("other", "apps/other/spec", &lab.socket_spec(&lab.image("v1"), "other.test", ""));
    let body = |lab: &Lab| lab.get("web.test", "/").expect("an answer").1;
    until("the hand-written server forwards", || body(&lab).contains("version=v1"));
    // The app runs beside it, and takes nothing by itself.
    lab.put("apps/web/spec", &lab.port_spec(&lab.image("v2"), "web.test", ""));
    let blocked = lab.wait_app("web", "blocked by the server", |s| s.state == State::Blocked);
    assert!(blocked.reason.contains("demae takeover"), "{}", blocked.reason);
    assert!(body(&lab).contains("version=v1"));

    let clients = || vec![Client::get(true), Client::get(false), Client::post(false)];
    let load = Load::start(lab.ingress, "web.test", clients());
    let (code, out, err) = lab.ask(&["takeover", "web", "--from", &old]);
    assert_eq!(code, 0, "{out}{err}");
    assert!(body(&lab).contains("version=v2") && err.contains("--undo"), "{out}{err}");
    let tally = load.stop();
    assert_eq!(tally.wrong, 0, "none failed: {:#?}", tally.reasons);
    let state = || inspect(&old, "{{.State.Running}} {{.HostConfig.RestartPolicy.Name}}");
    assert_eq!(state(), "false no", "it is stopped, and kept");

    // It stays so over an image of its own.
    lab.deploy("web", "apps/web/image", &lab.image("v1"));

    let load = Load::start(lab.ingress, "web.test", clients());
    let (code, out, err) = lab.ask(&["takeover", "web", "--undo"]);
    assert_eq!(code, 0, "{out}{err}");
    let tally = load.stop();
    assert_eq!(tally.wrong, 0, "none failed: {:#?}", tally.reasons);
    assert_eq!(state(), "true always");
    assert!(lab.lists_no("web") && body(&lab).contains("version=v1"));
    // What it may take is forgotten.
    lab.put("apps/web/spec", &lab.port_spec(&lab.image("v2"), "web.test", ""));
    lab.wait_app("web", "blocked by the server", |s| s.state == State::Blocked);
}

#[test]
fn nothing_is_touched_that_cannot_be_taken_over() {
    let mut lab = lab();
    // nginx gives the host to this one, whatever demae writes.
    let old = hand_written(&lab, "web.test", true);
    lab.start_agent(&[]);
    lab.deploy("other", "apps/other/spec", &lab.socket_spec(&lab.image("v1"), "other.test", ""));
    let (code, _, err) = lab.ask(&["takeover", "web", "--from", &old]);
    assert!(code == 1 && err.contains("no app `web`"), "{err}");
    lab.put("apps/web/spec", &lab.port_spec(&lab.image("v2"), "web.test", ""));
    lab.wait_app("web", "blocked by the server", |s| s.state == State::Blocked);
    for (args, code, says) in [
        (&["takeover", "web", "--from", "no-such-container"][..], 1, "no-such-container"),
        (&["takeover", "web", "--undo"], 1, "taken nothing over"),
        (&["takeover", "web", "--from", &old, "--port", "9"], 1, "does not answer"),
        (&["takeover", "web", "--from", &old], 4, "before demae's files"),
    ] {
        let (ended, out, err) = lab.ask(args);
        assert_eq!((ended, out.as_str()), (code, ""), "{args:?}: {err}");
        assert!(err.contains(says), "{args:?}: {err}");
    }
    assert_eq!(inspect(&old, "{{.State.Running}} {{.HostConfig.RestartPolicy.Name}}"), "true always");
    assert!(lab.get("web.test", "/").expect("an answer").1.contains("version=v1"));
}
