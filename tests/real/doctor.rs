//! `demae doctor`: finds problems, gives remedies, and changes nothing.
#![expect(clippy::disallowed_methods, reason = "a test writes files of its own")]

use std::{fs, os::unix::fs::PermissionsExt as _};

use crate::support::{lab::Lab, relay::Relay, wait::until};
use demae::model::status::State;

/// Level, message and remedy of each finding of a check.
fn findings(lab: &Lab, check: &str) -> Vec<(String, String, String)> {
    let output = lab.demae(&["doctor", "-o", "json"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let json: serde_json::Value = serde_json::from_str(&text)
        .unwrap_or_else(|e| panic!("{e}: {text}{}", String::from_utf8_lossy(&output.stderr)));
    let all = json["findings"].as_array().expect("findings");
    let fails = all.iter().any(|f| f["level"] == "fail");
    assert_eq!(output.status.success(), !fails, "the exit code says whether a check failed");
    let word = |f: &serde_json::Value, name: &str| f[name].as_str().unwrap_or_default().to_owned();
    for finding in all.iter().filter(|f| f["level"] != "ok") {
        assert!(!word(finding, "remedy").is_empty(), "every problem has a remedy: {finding}");
    }
    let of = |f: &&serde_json::Value| f["check"] == check;
    all.iter().filter(of).map(|f| (word(f, "level"), word(f, "message"), word(f, "remedy"))).collect()
}

fn level(lab: &Lab, check: &str) -> String {
    findings(lab, check).iter().map(|f| f.0.as_str()).collect::<Vec<_>>().join(" ")
}

#[test]
fn doctor_finds_problems_and_changes_nothing() {
    let mut lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let before = (lab.containers(), lab.traces(), lab.revision());
    for check in ["docker", "etcd", "clock", "nginx files", "state directory", "ports", "leftovers"] {
        assert_eq!(level(&lab, check), "ok", "{check}: {:?}", findings(&lab, check));
    }
    // A store without a `cluster` key is worth a warning, and so is nginx 1.22.
    assert_eq!(level(&lab, "store"), "warn");
    assert!(findings(&lab, "store")[0].2.contains("demae init"));
    assert!(lab.demae(&["init"]).status.success());
    assert_eq!(level(&lab, "store"), "ok");
    let text = String::from_utf8_lossy(&lab.demae(&["doctor"]).stdout).into_owned();
    assert!(text.lines().any(|l| l.starts_with("ok    docker")) && text.contains("0 failures"), "{text}");

    // Mounts and their owners. Debian's nginx package has a directory owned by root.
    lab.put("apps/data/spec", "image: x:y\nuser: \"12345:12345\"\nvolumes: [\"/srv/demae-doctor-missing:/data\"]\n");
    assert_eq!(level(&lab, "mounts"), "fail");
    assert!(findings(&lab, "mounts")[0].1.contains("/srv/demae-doctor-missing"));
    lab.put("apps/data/spec", "image: x:y\nuser: \"12345:12345\"\nvolumes: [\"/var/www/html:/data\"]\n");
    assert_eq!(level(&lab, "mounts"), "warn");
    assert!(findings(&lab, "mounts")[0].2.contains("chown 12345:12345 /var/www/html"));
    lab.put("apps/data/spec", "image: x:y\nuser: \"12345:12345\"\nvolumes: [\"/var/www/html:/data:ro\"]\n");
    assert_eq!(level(&lab, "mounts"), "ok");
    lab.del("apps/data/");

    // The user of a missing image is unknown, and so is a user name; a read-only mount needs no write access.
    lab.put("apps/data/spec", "image: x:y\nvolumes: [\"/var/www/html:/data\"]\n");
    assert_eq!(level(&lab, "mounts"), "warn");
    lab.put("apps/data/spec", &format!("image: \"{}\"\nvolumes: [\"/var/www/html:/data\"]\n", lab.image("v1")));
    assert_eq!(level(&lab, "mounts"), "ok", "this one is root");
    lab.put("apps/data/spec", "image: x:y\nuser: www-data\nvolumes: [\"/var/www/html:/data:ro\"]\n");
    assert_eq!(level(&lab, "mounts"), "ok");
    lab.del("apps/data/");
    until("it is removed", || lab.containers() == before.0 && lab.traces() == before.1);

    // A port range that the kernel uses.
    let config = fs::read_to_string(lab.path("agent.toml")).expect("a file");
    let range = config.lines().find(|l| l.starts_with("range = ")).expect("a range").to_owned();
    fs::write(lab.path("agent.toml"), config.replace(&range, "range = \"40000-40010\"")).expect("a file");
    assert_eq!(level(&lab, "ports"), "warn");
    fs::write(lab.path("agent.toml"), &config).expect("a file");

    // The ledger is readable by everybody.
    lab.stop_agent();
    fs::set_permissions(lab.path("state/ledger"), fs::Permissions::from_mode(0o644)).expect("a mode");
    assert_eq!(level(&lab, "ledger"), "fail");
    fs::set_permissions(lab.path("state/ledger"), fs::Permissions::from_mode(0o600)).expect("a mode");
    // With an untrusted store nothing counts as left over.
    let cluster = lab.get_key("cluster");
    lab.put("cluster", "another");
    assert_eq!((level(&lab, "store"), findings(&lab, "leftovers").len()), ("fail".into(), 0));
    lab.put("cluster", &cluster);
    // What an agent would remove.
    lab.del("apps/web/");
    assert_eq!(level(&lab, "leftovers"), "warn");
    assert!(findings(&lab, "leftovers")[0].1.ends_with("web"));
    assert_eq!((lab.containers(), lab.traces()), (before.0, before.1), "nothing was changed");
    assert_eq!(lab.get("web.test", "/").map(|(code, _)| code), Ok(200));

    // An agent could not read this ledger.
    let ledger = fs::read(lab.path("state/ledger")).expect("a file");
    fs::write(lab.path("state/ledger"), &ledger[..ledger.len() / 2]).expect("a file");
    assert_eq!(level(&lab, "ledger"), "warn");
    fs::write(lab.path("state/ledger"), &ledger).expect("a file");

    // nginx keeps its loaded configuration until it reloads.
    let conf = fs::read_to_string(lab.path("nginx.conf")).expect("a file");
    let without: String = conf.lines().filter(|l| !l.contains("/live/")).map(|l| format!("{l}\n")).collect();
    assert_ne!(conf, without);
    fs::write(lab.path("nginx.conf"), without).expect("a file");
    let found = findings(&lab, "nginx");
    assert!(found.iter().any(|f| f.0 == "fail" && f.1.contains("does not include demae's files")), "{found:?}");
    fs::write(lab.path("nginx.conf"), conf).expect("a file");

    // Everything is down.
    lab.stop_nginx();
    lab.stop_etcd();
    assert_eq!((level(&lab, "nginx"), level(&lab, "etcd")), ("fail".into(), "fail".into()));
    assert!(findings(&lab, "etcd")[0].2.contains("make sure that it runs there"));
    lab.start_etcd();
    lab.start_nginx();
    lab.start_agent(&[]);
    until("the app is removed", || lab.containers().is_empty());
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v2"), "web.test", ""));
    lab.wait_app("web", "converged", |s| s.state == State::Converged);
}

#[test]
fn doctor_queries_a_hanging_engine_once() {
    let mut lab = Lab::new();
    let relay = Relay::start(&lab.path("docker.sock"));
    lab.stop_agent();
    relay.hold(|_| true);
    let output = lab.demae_with(&[("DOCKER_HOST", &relay.host())], &["doctor"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("Docker does not answer (report its version): no answer within 10 s"), "{text}");
    assert!(text.lines().any(|l| l.starts_with("ok    etcd")), "everything else is checked: {text}");
    assert!(relay.held() <= 2, "one call, and the container list for the store check");
    relay.pass();
}
