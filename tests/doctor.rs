//! `demae doctor`: finds what is wrong, says what to do, and changes nothing.
#![expect(clippy::disallowed_methods, reason = "a test writes files of its own")]

mod support;

use std::{fs, os::unix::fs::PermissionsExt as _};

use demae::model::status::State;
use support::{lab::Lab, relay::Relay, wait::until};

/// Level, message and remedy of each finding of a check.
fn findings(lab: &Lab, check: &str) -> Vec<(String, String, String)> {
    let output = lab.demae(&["doctor", "-o", "json"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let json: serde_json::Value = serde_json::from_str(&text)
        .unwrap_or_else(|e| panic!("{e}: {text}{}", String::from_utf8_lossy(&output.stderr)));
    let all = json["findings"].as_array().expect("findings");
    let fails = all.iter().any(|f| f["level"] == "fail");
    assert_eq!(output.status.success(), !fails, "the exit code says whether something is to be mended");
    let word = |f: &serde_json::Value, name: &str| f[name].as_str().unwrap_or_default().to_owned();
    for finding in all.iter().filter(|f| f["level"] != "ok") {
        assert!(!word(finding, "remedy").is_empty(), "what is wrong has a remedy: {finding}");
    }
    let of = |f: &&serde_json::Value| f["check"] == check;
    all.iter().filter(of).map(|f| (word(f, "level"), word(f, "message"), word(f, "remedy"))).collect()
}

fn level(lab: &Lab, check: &str) -> String {
    findings(lab, check).iter().map(|f| f.0.as_str()).collect::<Vec<_>>().join(" ")
}

#[test]
fn what_is_wrong_is_found_and_nothing_is_changed() {
    let mut lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let before = (lab.containers(), lab.traces(), lab.revision());
    for check in ["docker", "etcd", "clock", "nginx files", "state directory", "ports", "leftovers"] {
        assert_eq!(level(&lab, check), "ok", "{check}: {:?}", findings(&lab, check));
    }
    // A store without its identity is worth a word, and nginx 1.22 too.
    assert_eq!(level(&lab, "store"), "warn");
    assert!(findings(&lab, "store")[0].2.contains("demae init"));
    assert!(lab.demae(&["init"]).status.success());
    assert_eq!(level(&lab, "store"), "ok");
    let text = String::from_utf8_lossy(&lab.demae(&["doctor"]).stdout).into_owned();
    assert!(text.lines().any(|l| l.starts_with("ok    docker")) && text.contains("0 to mend"), "{text}");

    // Mounts, and their owners. Debian's nginx brings a directory that belongs to root.
    lab.put("apps/data/spec", "image: x:y\nuser: \"12345:12345\"\nvolumes: [\"/srv/demae-doctor-missing:/data\"]\n");
    assert_eq!(level(&lab, "mounts"), "fail");
    assert!(findings(&lab, "mounts")[0].1.contains("/srv/demae-doctor-missing"));
    lab.put("apps/data/spec", "image: x:y\nuser: \"12345:12345\"\nvolumes: [\"/var/www/html:/data\"]\n");
    assert_eq!(level(&lab, "mounts"), "warn");
    assert!(findings(&lab, "mounts")[0].2.contains("chown 12345:12345 /var/www/html"));
    lab.put("apps/data/spec", "image: x:y\nuser: \"12345:12345\"\nvolumes: [\"/var/www/html:/data:ro\"]\n");
    assert_eq!(level(&lab, "mounts"), "ok");
    lab.del("apps/data/");

    // Who an image that is not here runs as is not known, nor who a name means; nobody need write to what is only read.
    lab.put("apps/data/spec", "image: x:y\nvolumes: [\"/var/www/html:/data\"]\n");
    assert_eq!(level(&lab, "mounts"), "warn");
    lab.put("apps/data/spec", &format!("image: \"{}\"\nvolumes: [\"/var/www/html:/data\"]\n", lab.image("v1")));
    assert_eq!(level(&lab, "mounts"), "ok", "this one is root");
    lab.put("apps/data/spec", "image: x:y\nuser: www-data\nvolumes: [\"/var/www/html:/data:ro\"]\n");
    assert_eq!(level(&lab, "mounts"), "ok");
    lab.del("apps/data/");
    until("it has left", || lab.containers() == before.0 && lab.traces() == before.1);

    // A port range that the kernel uses.
    let config = fs::read_to_string(lab.path("agent.toml")).expect("a file");
    let range = config.lines().find(|l| l.starts_with("range = ")).expect("a range").to_owned();
    fs::write(lab.path("agent.toml"), config.replace(&range, "range = \"40000-40010\"")).expect("a file");
    assert_eq!(level(&lab, "ports"), "warn");
    fs::write(lab.path("agent.toml"), &config).expect("a file");

    // The ledger is everybody's to read.
    lab.stop_agent();
    fs::set_permissions(lab.path("state/ledger"), fs::Permissions::from_mode(0o644)).expect("a mode");
    assert_eq!(level(&lab, "ledger"), "fail");
    fs::set_permissions(lab.path("state/ledger"), fs::Permissions::from_mode(0o600)).expect("a mode");
    // By a store that is not believed nothing is left over.
    let cluster = lab.get_key("cluster");
    lab.put("cluster", "another");
    assert_eq!((level(&lab, "store"), findings(&lab, "leftovers").len()), ("fail".into(), 0));
    lab.put("cluster", &cluster);
    // What an agent would take away.
    lab.del("apps/web/");
    assert_eq!(level(&lab, "leftovers"), "warn");
    assert!(findings(&lab, "leftovers")[0].1.ends_with("web"));
    assert_eq!((lab.containers(), lab.traces()), (before.0, before.1), "nothing was changed");
    assert_eq!(lab.get("web.test", "/").map(|(code, _)| code), Ok(200));

    // An agent could not read what it kept.
    let ledger = fs::read(lab.path("state/ledger")).expect("a file");
    fs::write(lab.path("state/ledger"), &ledger[..ledger.len() / 2]).expect("a file");
    assert_eq!(level(&lab, "ledger"), "warn");
    fs::write(lab.path("state/ledger"), &ledger).expect("a file");

    // nginx goes on with what it has loaded, until it is to load it again.
    let conf = fs::read_to_string(lab.path("nginx.conf")).expect("a file");
    let without: String = conf.lines().filter(|l| !l.contains("/live/")).map(|l| format!("{l}\n")).collect();
    assert_ne!(conf, without);
    fs::write(lab.path("nginx.conf"), without).expect("a file");
    let found = findings(&lab, "nginx");
    assert!(found.iter().any(|f| f.0 == "fail" && f.1.contains("does not include demae's files")), "{found:?}");
    fs::write(lab.path("nginx.conf"), conf).expect("a file");

    // Everything is away.
    lab.stop_nginx();
    lab.stop_etcd();
    assert_eq!((level(&lab, "nginx"), level(&lab, "etcd")), ("fail".into(), "fail".into()));
    assert!(findings(&lab, "etcd")[0].2.contains("see that it runs there"));
    lab.start_etcd();
    lab.start_nginx();
    lab.start_agent(&[]);
    until("the app leaves", || lab.containers().is_empty());
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v2"), "web.test", ""));
    lab.wait_app("web", "converged", |s| s.state == State::Converged);
}

#[test]
fn an_engine_that_hangs_is_asked_once() {
    let mut lab = Lab::new();
    let relay = Relay::start(&lab.path("docker.sock"));
    lab.stop_agent();
    relay.hold(|_| true);
    let output = lab.demae_with(&[("DOCKER_HOST", &relay.host())], &["doctor"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("Docker does not answer (tell its version): no answer within 10 s"), "{text}");
    assert!(text.lines().any(|l| l.starts_with("ok    etcd")), "all else is looked at: {text}");
    assert!(relay.held() <= 2, "one question, and the list of containers that a store is held against");
    relay.pass();
}
