//! What a deploy tells: events, a webhook, lines of the log.
#![expect(clippy::disallowed_methods, reason = "a test runs programs and writes files of its own")]

mod support;

use std::{
    fs,
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
    time::Duration,
};

use demae::model::{
    event::{Event, Outcome, What},
    status::State,
};
use hmac::Mac as _;
use support::{
    lab::{Lab, Setup},
    load::{Client, Load, mixed},
    receiver::Receiver,
    wait::until,
};

fn events(lab: &Lab, args: &[&str]) -> Vec<Event> {
    let args: Vec<&str> = ["events", "--no-follow"].into_iter().chain(args.iter().copied()).collect();
    let output = lab.demae(&args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("text");
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

#[test]
fn what_a_deploy_does_can_be_followed() {
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
        assert!(steps.contains(&step), "{step} is told: {steps:?}");
    }
    // The same, by whoever followed all the time.
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
    assert!(events(&lab, &["nobody"]).is_empty());
}

#[test]
fn a_webhook_is_told_with_a_signature_and_again_if_need_be() {
    // The first answer says "later".
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
    until("the first event is told twice", || receiver.told().len() >= 2);
    let sick = lab
        .socket_spec(&lab.image("v1"), "web.test", "")
        .replace("start_period: 10s", "start_period: 1s, retries: 1")
        .replace("app.sock}", "app.sock, MOOD: sick}");
    lab.put("apps/web/spec", &sick);
    lab.wait_app("web", "halted", |s| s.state == State::Blocked);
    let types = || receiver.told().iter().map(|t| t.headers["x-demae-event"].clone()).collect::<Vec<_>>();
    until("the verdict and the block are told", || types().ends_with(&["verdict".to_owned(), "block".to_owned()]));

    let told = receiver.told();
    assert_eq!(types(), ["converged", "converged", "verdict", "block"]);
    assert_eq!(told[0].headers["x-demae-delivery"], told[1].headers["x-demae-delivery"], "one event, told twice");
    assert_ne!(told[1].headers["x-demae-delivery"], told[2].headers["x-demae-delivery"]);
    for each in &told {
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
fn a_webhook_that_hangs_holds_up_nothing() {
    // It takes connections and says nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("[webhook]\nurl = \"http://{}/\"\n", silent.local_addr().expect("an address"));
    let mut lab = Lab::with(&Setup { sections: &url, ..Setup::default() });
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));
    lab.deploy("web", "apps/web/image", &lab.image("v2"));
    lab.deploy("web", "apps/web/image", &lab.image("v1"));
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    // Nor does it keep the agent from ending, which says what was not told.
    assert!(lab.stop_agent() < Duration::from_secs(8));
    let log = lab.agent_log();
    assert!(log.contains("events are not told to the webhook: the agent ends"), "{log}");
}

#[test]
fn each_deploy_is_one_tree_of_spans_in_the_log() {
    let lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let load = Load::start(lab.ingress, "web.test", vec![Client::slow(true, 200)]);
    until("requests flow", || load.requests() > 0);
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
fn what_people_take_is_not_measured_and_a_change_of_mind_is_one_change() {
    let lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    // A release that fails, and stays so until somebody mends it.
    let sick = lab
        .socket_spec(&lab.image("v1"), "web.test", "")
        .replace("start_period: 10s", "start_period: 1s, retries: 1")
        .replace("app.sock}", "app.sock, MOOD: sick}");
    lab.put("apps/web/spec", &sick);
    let halted = lab.wait_app("web", "halted", |s| s.state == State::Blocked && s.verdict.is_some());
    let bad = halted.release.expect("a release");
    let ended = |line: &str| line.contains("the deploy ends here") && line.contains(&bad);
    until("its tree of spans has an end", || lab.agent_log().lines().any(ended));
    let mended = std::time::Instant::now();
    lab.put("apps/web/spec", &lab.socket_spec(&lab.image("v2"), "web.test", ""));
    lab.wait_app("web", "converged on v2", |s| s.state == State::Converged && s.image == Some(lab.image("v2")));
    let took = |e: &Event| match &e.what {
        What::Converged { took_ms, .. } => Some(*took_ms),
        _ => None,
    };
    let last = || events(&lab, &["web"]).iter().filter_map(took).next_back().expect("it has converged");
    assert!(u128::from(last()) <= mended.elapsed().as_millis(), "{} ms count from the wish that was met", last());

    // Nothing is to be done for an app that was held back for a while.
    lab.put("apps/web/paused", "for a test");
    lab.wait_app("web", "paused", |s| s.state == State::Paused);
    let released = std::time::Instant::now();
    lab.del("apps/web/paused");
    lab.wait_app("web", "converged", |s| s.state == State::Converged);
    assert!(u128::from(last()) <= released.elapsed().as_millis(), "{} ms", last());

    // Two wishes at once are one change, and the second one's instances get healthy in its own tree.
    let healthy = |lab: &Lab| lab.agent_log().matches("all instances are healthy").count();
    let before = (healthy(&lab), events(&lab, &["web"]).iter().filter_map(took).count());
    lab.put("env/web/GREETING", "one");
    lab.wait_app("web", "on its way", |s| s.state == State::Converging);
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
    // Many at once, so that several happen within a millisecond.
    let worker = format!("image: \"{}\"\nstop_grace_period: 1s\n", lab.image("v1"));
    let apps: Vec<String> = (0..8).map(|n| format!("w{n}")).collect();
    lab.put_all(&apps.iter().map(|a| (format!("apps/{a}/spec"), worker.clone())).collect::<Vec<_>>());
    for app in &apps {
        lab.wait_app(app, "converged", |s| s.state == State::Converged);
    }
    let all = events(&lab, &[]);
    // Of the run before there may be more to read.
    let followed = std::iter::from_fn(|| Some(next())).skip_while(|e| e.run != all[0].run).take(all.len());
    assert_eq!(followed.collect::<Vec<_>>(), all);
    following.kill().expect("it runs");
    following.wait().expect("it ends");
}
