//! What a deploy reports: events, a webhook, log lines.
#![expect(clippy::disallowed_methods, reason = "a test runs programs and writes files of its own")]

use std::{
    fs,
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
    time::Duration,
};

use crate::support::{
    lab::{Lab, Setup},
    load::{Client, Load, mixed},
    receiver::Receiver,
    wait::until,
};
use demae::model::{
    event::{Event, Outcome, What},
    status::State,
};
use hmac::Mac as _;

fn events(lab: &Lab, args: &[&str]) -> Vec<Event> {
    let args: Vec<&str> = ["events", "--no-follow"].into_iter().chain(args.iter().copied()).collect();
    let output = lab.demae(&args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("text");
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

#[test]
fn deploy_steps_are_reported_as_events() {
    let lab = Lab::new();
    let mut follow = Command::new(env!("CARGO_BIN_EXE_demae"));
    follow.args(["events", "web", "--agent", &format!("http://{}/metrics", lab.metrics)]);
    follow.stdout(Stdio::piped()).stderr(Stdio::null());
    let mut following = follow.spawn().expect("demae runs");
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    lab.deploy("other", "apps/other/spec", &lab.socket_spec(&lab.image("v1"), "other.test", ""));
    lab.deploy("web", "apps/web/image", &lab.image("v2"));

    let all = events(&lab, &["web"]);
    assert!(all.iter().all(|e| e.app.as_ref().is_some_and(|a| a.as_str() == "web")), "{all:#?}");
    assert!(all.windows(2).all(|pair| pair[0].seq < pair[1].seq && pair[0].at <= pair[1].at));
    let changes: Vec<&str> = all
        .iter()
        .filter_map(|e| match &e.what {
            What::Converged { change, .. } => Some(change.as_str()),
            _ => None,
        })
        .collect();
    assert_eq!(changes, ["new", "image"]);
    let steps: Vec<&str> = all
        .iter()
        .filter_map(|e| match &e.what {
            What::Step { step, outcome: Outcome::Done, .. } => Some(step.as_str()),
            _ => None,
        })
        .collect();
    for step in ["write_env_file", "create", "start", "switch", "prove", "settle", "stop", "remove"] {
        assert!(steps.contains(&step), "{step} is reported: {steps:?}");
    }
    // A follower got the same events.
    let lines = BufReader::new(following.stdout.take().expect("a pipe")).lines();
    let followed: Vec<Event> =
        lines.take(all.len()).map(|l| serde_json::from_str(&l.expect("a line")).expect("an event")).collect();
    assert_eq!(followed, all);
    following.kill().expect("it runs");
    following.wait().expect("it ends");

    let spec = lab.socket_spec(&lab.image("v1"), "web.test", "");
    lab.put("apps/web/spec", "imagee: x\n");
    lab.wait_app("web", "invalid", |s| s.state == State::Invalid);
    let blocks = events(&lab, &["web", "--type", "block"]);
    assert!(matches!(&blocks.last().expect("a block").what, What::Block { kind, remedy }
        if kind == "invalid" && remedy.contains("put a corrected value")));
    lab.put("apps/web/spec", &spec);
    lab.wait_app("web", "converged", |s| s.state == State::Converged);
    let gone = events(&lab, &["web", "--type", "unblock"]);
    assert!(matches!(&gone.last().expect("it is over").what, What::Unblock { kind } if kind == "invalid"));
    assert!(events(&lab, &["unknown"]).is_empty());
}

#[test]
fn webhook_delivery_is_signed_and_retried() {
    // The first response means "retry later".
    let receiver = Receiver::start(|before| if before == 0 { 503 } else { 204 });
    let secret = tempfile::NamedTempFile::new().expect("a file");
    fs::write(secret.path(), "canary-secret\n").expect("a file");
    let sections = format!(
        "[webhook]\nurl = \"http://{}/hook?x=1\"\nsecret_file = \"{}\"\nevents = [\"converged\", \"verdict\", \"block\"]\n",
        receiver.address,
        secret.path().display()
    );
    let lab = Lab::with(&Setup { sections: &sections, ..Setup::default() });
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    until("the first event is delivered twice", || receiver.deliveries().len() >= 2);
    let sick = lab
        .socket_spec(&lab.image("v1"), "web.test", "")
        .replace("start_period: 10s", "start_period: 1s, retries: 1")
        .replace("app.sock}", "app.sock, MOOD: sick}");
    lab.put("apps/web/spec", &sick);
    lab.wait_app("web", "halted", |s| s.state == State::Blocked);
    let types = || receiver.deliveries().iter().map(|t| t.headers["x-demae-event"].clone()).collect::<Vec<_>>();
    until("the verdict and the block are delivered", || types().ends_with(&["verdict".to_owned(), "block".to_owned()]));

    let sent = receiver.deliveries();
    assert_eq!(types(), ["converged", "converged", "verdict", "block"]);
    assert_eq!(sent[0].headers["x-demae-delivery"], sent[1].headers["x-demae-delivery"], "one event, delivered twice");
    assert_ne!(sent[1].headers["x-demae-delivery"], sent[2].headers["x-demae-delivery"]);
    for each in &sent {
        let mac = hmac::Hmac::<sha2::Sha256>::new_from_slice(b"canary-secret").expect("a key");
        let tag = mac.chain_update(&each.body).finalize().into_bytes();
        let hex: String = tag.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(each.headers["x-demae-signature-256"], format!("sha256={hex}"));
        assert!(each.headers["request"].starts_with("POST /hook?x=1 "));
        let event: Event = serde_json::from_str(&each.body).expect("an event");
        assert_eq!(event.what.as_str(), each.headers["x-demae-event"]);
    }
    assert_eq!(lab.metric("demae_webhook_deliveries_total", "delivered"), 3.0);
    assert!(!lab.agent_log().contains("canary-secret"));
}

#[test]
fn hanging_webhook_delays_nothing() {
    // It accepts connections and sends nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("[webhook]\nurl = \"http://{}/\"\n", silent.local_addr().expect("an address"));
    let mut lab = Lab::with(&Setup { sections: &url, ..Setup::default() });
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    lab.deploy("web", "apps/web/image", &lab.image("v2"));
    lab.deploy("web", "apps/web/image", &lab.image("v1"));
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    // It does not delay shutdown either; the log counts the events that were not sent.
    assert!(lab.stop_agent() < Duration::from_secs(8));
    let log = lab.agent_log();
    assert!(log.contains("events were not sent to the webhook: the agent is shutting down"), "{log}");
}

#[test]
fn each_deploy_is_one_tree_of_spans_in_the_log() {
    let lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let load = Load::start(lab.ingress, "web.test", vec![Client::slow(true, 200)]);
    until("requests are served", || load.requests() > 0);
    let status = lab.deploy("web", "apps/web/image", &lab.image("v2"));
    load.stop();
    let release = status.release.expect("a release");
    let mut under = Vec::new();
    for line in lab.agent_log().lines() {
        let json: serde_json::Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        let spans: Vec<&serde_json::Value> = json["spans"].as_array().into_iter().flatten().collect();
        let Some(root) = spans.first() else { continue };
        assert_eq!((root["name"].as_str(), root["app"].as_str()), (Some("deploy"), Some("web")), "{line}");
        if root["release"] == release.as_str() {
            assert_eq!(root["change"], "image");
            under.push(spans.get(1).and_then(|s| s["name"].as_str()).unwrap_or("deploy").to_owned());
        }
    }
    let wanted =
        ["write_env_file", "create", "start", "health", "switch", "prove", "settle", "drain", "stop", "remove"];
    for span in wanted {
        assert!(under.iter().any(|u| u == span), "{span} is in the tree: {under:?}");
    }
    assert_eq!(under.last().map(String::as_str), Some("deploy"), "it ends with its root: {under:?}");
}

#[test]
fn convergence_time_excludes_blocks_and_superseded_changes_count_once() {
    let lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    // A release that fails, until the spec is fixed.
    let sick = lab
        .socket_spec(&lab.image("v1"), "web.test", "")
        .replace("start_period: 10s", "start_period: 1s, retries: 1")
        .replace("app.sock}", "app.sock, MOOD: sick}");
    lab.put("apps/web/spec", &sick);
    let halted = lab.wait_app("web", "halted", |s| s.state == State::Blocked && s.verdict.is_some());
    let bad = halted.release.expect("a release");
    let ended = |line: &str| line.contains("the deploy ends here") && line.contains(&bad);
    until("its tree of spans has an end", || lab.agent_log().lines().any(ended));
    let fixed = std::time::Instant::now();
    lab.put("apps/web/spec", &lab.socket_spec(&lab.image("v2"), "web.test", ""));
    lab.wait_app("web", "converged on v2", |s| s.state == State::Converged && s.image == Some(lab.image("v2")));
    let took = |e: &Event| match &e.what {
        What::Converged { took_ms, .. } => Some(*took_ms),
        _ => None,
    };
    let last = || events(&lab, &["web"]).iter().filter_map(took).next_back().expect("it has converged");
    assert!(u128::from(last()) <= fixed.elapsed().as_millis(), "{} ms count from the change that converged", last());

    // A paused app that needs no step once it is resumed.
    lab.put("apps/web/paused", "for a test");
    lab.wait_app("web", "paused", |s| s.state == State::Paused);
    let released = std::time::Instant::now();
    lab.del("apps/web/paused");
    lab.wait_app("web", "converged", |s| s.state == State::Converged);
    assert!(u128::from(last()) <= released.elapsed().as_millis(), "{} ms", last());

    // Two quick changes count as one, and the instances of the second become healthy in its own span tree.
    let healthy = |lab: &Lab| lab.agent_log().matches("all instances are healthy").count();
    let before = (healthy(&lab), events(&lab, &["web"]).iter().filter_map(took).count());
    lab.put("env/web/GREETING", "one");
    lab.wait_app("web", "converging", |s| s.state == State::Converging);
    lab.put("env/web/GREETING", "two");
    until("the second one serves", || lab.get("web.test", "/").is_ok_and(|(_, body)| body.contains("greeting=two")));
    lab.wait_app("web", "converged", |s| s.state == State::Converged);
    assert_eq!(events(&lab, &["web"]).iter().filter_map(took).count(), before.1 + 1);
    assert!(healthy(&lab) > before.0, "{}", lab.agent_log());
}

#[test]
fn events_are_followed_over_a_restart_of_the_agent() {
    let mut lab = Lab::new();
    let mut follow = Command::new(env!("CARGO_BIN_EXE_demae"));
    follow.args(["events", "--agent", &format!("http://{}/metrics", lab.metrics)]);
    let mut following = follow.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("demae runs");
    let mut notes = BufReader::new(following.stderr.take().expect("a pipe")).lines();
    let mut lines = BufReader::new(following.stdout.take().expect("a pipe")).lines();
    let mut next = || serde_json::from_str::<Event>(&lines.next().expect("a line").expect("text")).expect("an event");
    lab.put("apps/typo/spec", "imagee: x\n");
    next();
    lab.kill_agent();
    assert!(notes.next().expect("a line").expect("text").contains("ended; waiting for it"));
    lab.start_agent(&[]);
    assert!(notes.next().expect("a line").expect("text").contains("is back"));
    // Many at once, so that several occur within a millisecond.
    let worker = format!("image: \"{}\"\nstop_grace_period: 1s\n", lab.image("v1"));
    let apps: Vec<String> = (0..8).map(|n| format!("w{n}")).collect();
    lab.put_all(&apps.iter().map(|a| (format!("apps/{a}/spec"), worker.clone())).collect::<Vec<_>>());
    for app in &apps {
        lab.wait_app(app, "converged", |s| s.state == State::Converged);
    }
    let all = events(&lab, &[]);
    // The previous run may have more events to read.
    let followed = std::iter::from_fn(|| Some(next())).skip_while(|e| e.run != all[0].run).take(all.len());
    assert_eq!(followed.collect::<Vec<_>>(), all);
    following.kill().expect("it runs");
    following.wait().expect("it ends");
}
