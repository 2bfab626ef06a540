//! Bad input, manual changes and failed dependencies: each affects its own app only.
#![expect(
    clippy::disallowed_methods,
    reason = "a test prints its figures, and runs programs and writes files of its own"
)]

use std::{fs, os::unix::fs::PermissionsExt as _, process::Command, time::Duration};

use crate::support::{
    lab::{Lab, Setup},
    load::{Client, Load, mixed},
    process::{docker, run},
    wait::{pause, until},
};
use demae::model::status::State;

#[test]
fn bad_input_is_reported_in_one_sentence_and_stops_nothing() {
    let lab = Lab::new();
    let image = lab.image("v1");
    lab.deploy("good", "apps/good/spec", &lab.socket_spec(&image, "good.test", ""));
    let load = Load::start(lab.ingress, "good.test", vec![Client::get(true), Client::post(false)]);
    let worker = |more: &str| format!("image: \"{image}\"\n{more}");
    let quick = "healthcheck: {http: /healthz, start_period: 500ms, interval: 200ms}\n";

    lab.put("apps/not-yaml/spec", "image: [");
    lab.put("apps/unknown-keys/spec", &worker("enviroment: {}\nports: ['80:80']\n"));
    lab.put("apps/../x/spec", "image: web");
    lab.put("apps/injected/spec", &worker("ingress: {hosts: ['x; } server {'], port: 80}\n"));
    lab.put("apps/thief/spec", &lab.port_spec(&image, "good.test", ""));
    lab.put("apps/no-image/spec", &worker("").replace(&image, "localhost:1/none:v1"));
    lab.put("apps/exits/spec", &worker("environment: {MOOD: exit}\n"));
    let deaf = format!(
        "environment: {{MOOD: deaf}}\n{quick}ingress: {{hosts: [deaf.test], port: 8080}}\nstop_grace_period: 1s\n"
    );
    lab.put("apps/deaf/spec", &worker(&deaf));
    lab.put("env/big/A", &"x".repeat(1024 * 1024));
    lab.put("apps/big/spec", &worker(""));
    lab.put_bytes("env/not-utf8/A", b"caf\xe9");
    lab.put("apps/not-utf8/spec", &worker(""));
    lab.put_bytes("apps/bytes/spec", b"image: \xff\xfe");

    let says = |app: &str, state: State, words: &[&str]| {
        let status = lab.wait_app(app, &format!("{state:?} with {words:?}"), |s| {
            s.state == state && words.iter().all(|w| s.reason.contains(w))
        });
        assert!(!status.reason.contains('\n'), "one sentence: {}", status.reason);
        println!("{app}: {}", status.reason);
    };
    says("not-yaml", State::Invalid, &["line 1", "not YAML"]);
    says(
        "unknown-keys",
        State::Invalid,
        &["line 2", "`enviroment`", "did you mean `environment`", "line 3", "`ports`", "ingress.port"],
    );
    says("injected", State::Invalid, &["line 2", "ingress.hosts[0]", "not valid"]);
    says("thief", State::Blocked, &["`good.test`", "belongs to app `good`"]);
    // With a broken spec it still claims nothing.
    lab.put("apps/thief/spec", "image: [");
    says("thief", State::Invalid, &["not YAML"]);
    assert!(lab.get("good.test", "/").expect("an answer").1.contains("version=v1"));
    lab.put("apps/thief/spec", &lab.port_spec(&image, "good.test", ""));
    says("thief", State::Blocked, &["belongs to app `good`"]);
    says("no-image", State::Converging, &["localhost:1/none:v1", "cannot be pulled"]);
    says("exits", State::Blocked, &["exit code 3", "demae retry exits"]);
    says("deaf", State::Blocked, &["not healthy within"]);
    says("big", State::Invalid, &["env/big/A", "1048578 bytes", "131071"]);
    says("not-utf8", State::Invalid, &["env/not-utf8/A", "not UTF-8 at byte 3"]);
    says("bytes", State::Invalid, &["not UTF-8 at byte 7"]);
    let unreadable = lab.status().expect("a status").unreadable;
    assert!(unreadable.iter().any(|p| p.key == "apps/../x/spec" && p.message.contains("app name")), "{unreadable:?}");
    let exits = lab.app("exits").and_then(|a| a.verdict).expect("a verdict");
    assert_eq!(exits.exit_code, Some(3));
    assert!(exits.log_tail.contains("cannot work like this"), "{}", exits.log_tail);

    // `demae status` says the same, and the other apps converge.
    let output = lab.demae(&["status"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success() && text.contains("apps/../x/spec") && text.contains("belongs to app `good`"),
        "{text}"
    );
    lab.deploy("other", "apps/other/spec", &lab.socket_spec(&image, "other.test", ""));
    lab.deploy("good", "apps/good/image", &lab.image("v2"));
    let tally = load.stop();
    assert_eq!(tally.failed, 0, "{:#?}", tally.reasons);
    // Failed candidates are removed; only the two good apps have containers.
    until("failed candidates are removed", || lab.containers().len() == 2);

    // An app whose valid spec is broken keeps running.
    lab.put("apps/good/spec", "image: web\nnonsense: 1\n");
    says("good", State::Invalid, &["`nonsense`"]);
    assert_eq!(lab.get("good.test", "/").expect("an answer").0, 200);
}

#[test]
fn failed_release_keeps_the_old_one_serving_and_can_be_retried() {
    let lab = Lab::new();
    lab.deploy(
        "web",
        "apps/web/spec",
        &lab.socket_spec(&lab.image("v1"), "web.test", "")
            .replace("start_period: 10s", "start_period: 500ms")
            .replace("interval: 1s", "interval: 200ms"),
    );
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(2)));
    lab.put("env/web/MOOD", "sick");
    let failed = lab.wait_app("web", "blocked", |s| s.state == State::Blocked);
    assert!(failed.reason.contains("status 503"), "{}", failed.reason);
    assert_eq!(failed.healthy, 1, "the old release serves");
    until("the candidate is removed", || lab.containers().len() == 1);
    // The same release again, by a new value of `restart`; then a fixed one.
    let first = failed.release.clone();
    lab.put("apps/web/restart", "1");
    lab.wait_app("web", "blocked again, as another release", |s| s.state == State::Blocked && s.release != first);
    lab.del("env/web/MOOD");
    lab.wait_app("web", "converged", |s| s.state == State::Converged && s.verdict.is_none());
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    until("no verdict is left", || !lab.traces().iter().any(|t| t.ends_with(".json")));
}

/// What systemd does with the agent's directories at boot.
fn run_tmpfiles(lab: &Lab) {
    let text = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/demae.tmpfiles.conf")).expect("a file");
    let own = text.replace("/var/lib/demae", &lab.path("state").display().to_string());
    assert!(own != text && !own.lines().any(|l| !l.starts_with('#') && l.contains("/var/")), "{own}");
    fs::write(lab.path("tmpfiles.conf"), own).expect("a file");
    run(Command::new("systemd-tmpfiles").args(["--boot", "--remove", "--create"]).arg(lab.path("tmpfiles.conf")));
}

#[test]
fn rebooted_host_serves_again() {
    let mut lab = Lab::new();
    lab.deploy("sock", "apps/sock/spec", &lab.socket_spec(&lab.image("v1"), "sock.test", ""));
    lab.deploy("port", "apps/port/spec", &lab.port_spec(&lab.image("v1"), "port.test", ""));
    let before = lab.containers();
    for has_store in [true, false] {
        lab.kill_agent();
        lab.stop_nginx();
        for name in lab.containers() {
            docker(&["stop", "-t", "0", &name]);
        }
        fs::remove_dir_all(lab.path("run")).expect("the run directory is lost");
        if !has_store {
            lab.stop_etcd();
        }
        lab.start_nginx();
        // Docker starts proven instances, and nginx serves from the disk, with no agent running.
        run_tmpfiles(&lab);
        docker(&["start", &before[0], &before[1]]);
        let instance = lab.path("state/sockets/sock").read_dir().expect("a directory").next().expect("an instance");
        let socket = instance.expect("a directory").path().join("app.sock");
        // As by an app with a umask of 0007, the only kind that is reachable without an agent.
        until("it listens", || fs::set_permissions(&socket, fs::Permissions::from_mode(0o775)).is_ok());
        for host in ["sock.test", "port.test"] {
            until(&format!("`{host}` answers without an agent"), || {
                lab.get(host, "/").is_ok_and(|(code, _)| code == 200)
            });
        }
        lab.start_agent(&[]);
        for (app, host) in [("sock", "sock.test"), ("port", "port.test")] {
            lab.wait_app(app, "converged", |s| s.state == State::Converged && s.healthy == 1);
            assert_eq!(lab.get(host, "/").expect("an answer").0, 200, "{app}");
        }
        assert_eq!(lab.containers(), before, "the same containers were started, none was created");
        until("env-files exist again", || lab.traces().iter().filter(|t| t.ends_with("/env")).count() == 2);
    }
    // Recreated instances must work like restarted ones, from the ledger alone.
    docker(&["rm", "-f", &before[0]]);
    until("another one is created", || lab.containers().len() == 2);
    for app in ["sock", "port"] {
        lab.wait_app(app, "converged", |s| s.state == State::Converged && s.healthy == 1);
    }
    lab.start_etcd();
    until("the store is read again", || lab.status().is_some_and(|s| s.store.stale_since.is_none()));
    assert_eq!(lab.containers().len(), 2);
}

#[test]
fn manual_changes_are_reverted() {
    let lab = Lab::with(&Setup { top: "resync = \"2s\"", ..Setup::default() });
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let serves = || lab.get("web.test", "/").is_ok_and(|(code, _)| code == 200);
    let converged = || lab.app("web").is_some_and(|a| a.state == State::Converged && a.healthy == 1);
    let name = || lab.containers().first().cloned().unwrap_or_default();
    for command in [vec!["stop", "-t", "0"], vec!["kill"], vec!["pause"], vec!["rm", "-f"]] {
        let before = name();
        docker(&[command.clone(), vec![&before]].concat());
        until(&format!("it serves again after {command:?}"), || serves() && converged());
    }
    let set = fs::read_link(lab.path("state/nginx/live")).expect("a live set");
    fs::write(lab.path("state/nginx").join(set).join("app-web.conf"), "# a manual change\n").expect("a file");
    until("the file is rewritten", || {
        fs::read_to_string(lab.path("state/nginx/live/app-web.conf")).is_ok_and(|t| t.contains("upstream demae_web"))
            && serves()
    });
    // The route symlink itself.
    fs::remove_file(lab.path("state/routes/web/1.sock")).expect("a route");
    docker(&["update", "--restart", "unless-stopped", &name()]);
    until("the route is restored", || serves() && converged());
}

#[test]
fn an_unhealthy_replica_leaves_the_route_and_is_replaced() {
    let lab = Lab::new();
    let more = "deploy: {replicas_per_host: 2}\n";
    lab.deploy(
        "web",
        "apps/web/spec",
        &lab.socket_spec(&lab.image("v1"), "web.test", more).replace("interval: 1s", "interval: 300ms"),
    );
    let before = lab.containers();
    let (_, body) = lab.get("web.test", "/sicken").expect("an answer");
    assert!(body.contains("sick"), "{body}");
    lab.wait_app("web", "short of one healthy replica", |s| s.healthy == 1);
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(2)));
    lab.wait_app("web", "converged with two replicas", |s| s.state == State::Converged && s.healthy == 2);
    let after = lab.containers();
    assert_eq!(after.len(), 2);
    assert_ne!(before, after, "one was replaced");
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
}

#[test]
fn nginx_and_etcd_restarts_are_survived() {
    let mut lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    lab.stop_etcd();
    lab.wait_app("web", "still converged", |s| s.state == State::Converged);
    until("the loss of the store is reported", || lab.status().is_some_and(|s| s.store.error.is_some()));
    // Without the store apps are kept serving.
    docker(&["kill", &lab.containers()[0]]);
    until("it serves again", || lab.get("web.test", "/").is_ok_and(|(code, _)| code == 200));
    lab.start_etcd();
    until("the store is read again", || lab.status().is_some_and(|s| s.store.error.is_none()));
    lab.stop_nginx();
    lab.start_nginx();
    lab.deploy("web", "apps/web/image", &lab.image("v2"));
    assert!(lab.get("web.test", "/").expect("an answer").1.contains("version=v2"));
}

#[test]
fn broken_template_blocks_only_its_own_app() {
    let mut lab = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    fs::create_dir_all(lab.path("templates")).expect("a directory");
    fs::write(lab.path("templates/broken.conf.hbs"), "server { nonsense {{app}}; }\n").expect("a template");
    lab.start_agent(&[]);
    let image = lab.image("v1");
    let spec = lab.socket_spec(&image, "bad.test", "").replace("drain: 10s", "drain: 10s, template: broken");
    lab.put_all(&[
        ("apps/bad/spec".to_owned(), spec),
        ("apps/good/spec".to_owned(), lab.socket_spec(&image, "good.test", "")),
    ]);
    let bad = lab.wait_app("bad", "blocked", |s| s.state == State::Blocked);
    assert!(bad.reason.contains("nonsense"), "{}", bad.reason);
    lab.wait_app("good", "converged", |s| s.state == State::Converged);
    // A serving app keeps its last good virtual host.
    lab.put(
        "apps/good/spec",
        &lab.socket_spec(&image, "good.test", "").replace("drain: 10s", "drain: 10s, template: broken"),
    );
    lab.wait_app("good", "blocked", |s| s.state == State::Blocked);
    assert_eq!(lab.get("good.test", "/").expect("an answer").0, 200);
    assert_eq!(lab.get("unknown.test", "/").expect("an answer").0, 404, "a host without an app gets 404");
}

#[test]
fn paused_cordoned_and_drained_are_obeyed() {
    let lab = Lab::new();
    let image = lab.image("v1");
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&image, "web.test", ""));
    lab.put("apps/web/paused", "a person looks into it");
    lab.put("apps/web/image", &lab.image("v2"));
    let paused = lab.wait_app("web", "paused", |s| s.state == State::Paused);
    assert!(paused.reason.contains("a person looks into it"), "{}", paused.reason);
    assert!(lab.get("web.test", "/").expect("an answer").1.contains("version=v1"));
    lab.put(&format!("hosts/{}/mode", lab.host), "cordoned");
    lab.del("apps/web/paused");
    lab.wait_app("web", "updated on a cordoned host", |s| {
        s.state == State::Converged && s.image == Some(lab.image("v2"))
    });
    lab.put("apps/new/spec", &lab.socket_spec(&image, "new.test", ""));
    let new = lab.wait_app("new", "held back", |s| s.state == State::Blocked);
    assert!(new.is("cordoned"), "{new:?}");
    lab.put(
        "apps/picky/spec",
        &lab.socket_spec(&image, "picky.test", "deploy: {placement: {constraints: ['role == db']}}\n"),
    );
    lab.put(&format!("hosts/{}/labels", lab.host), "role: db");
    lab.put(&format!("hosts/{}/mode", lab.host), "active");
    lab.wait_app("picky", "converged by its label", |s| s.state == State::Converged);
    // Unreadable labels do not count as changed labels.
    lab.put(&format!("hosts/{}/labels", lab.host), "role: [db");
    until("it is reported", || lab.status().is_some_and(|s| !s.unreadable.is_empty()));
    lab.deploy("picky", "env/picky/GREETING", "still here");
    lab.put(&format!("hosts/{}/mode", lab.host), "drained");
    until("the drained host is empty", || lab.containers().is_empty() && lab.traces().is_empty());
    // A spec that breaks now brings no app back.
    lab.put("apps/web/spec", "image: [");
    lab.put(&format!("hosts/{}/labels", lab.host), "role: db");
    until("the change is read", || lab.status().is_some_and(|s| s.unreadable.is_empty()));
    assert!(lab.containers().is_empty(), "it came back: {:?}", lab.containers());
    pause();
}

#[test]
fn long_names_and_many_of_them_are_served() {
    let lab = Lab::new();
    let label = "x".repeat(60);
    let long = format!("{label}.{label}.{label}.{}.test", "y".repeat(60));
    let hosts: Vec<String> = (0..400).map(|n| format!("n{n}.many.test")).chain([long.clone()]).collect();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), &hosts.join(", "), ""));
    for host in [&long, &hosts[0], &hosts[399]] {
        assert_eq!(lab.get(host, "/").map(|(status, _)| status), Ok(200), "{host}");
    }
}

#[test]
fn volume_that_escapes_through_a_symlink_is_refused() {
    let lab = Lab::new();
    let place = std::path::PathBuf::from(format!("/srv/demae-lab-{}", lab.tag));
    std::fs::create_dir_all(&place).expect("a directory");
    std::os::unix::fs::symlink("/etc", place.join("evil")).expect("a symlink");
    std::fs::create_dir(place.join("fine")).expect("a directory");
    let spec = |volume: &str| {
        let more = format!("volumes: [\"{}/{volume}:/data\"]\n", place.display());
        lab.socket_spec(&lab.image("v1"), "web.test", &more)
    };
    lab.put("apps/web/spec", &spec("evil"));
    let blocked = lab.wait_app("web", "refused", |a| a.reason.contains("is really `/etc`"));
    let made = lab.containers().len();
    lab.deploy("web", "apps/web/spec", &spec("fine"));
    std::fs::remove_dir_all(&place).expect("it is removed");
    assert_eq!(made, 0, "{}", blocked.reason);
}

/// Only nginx's files show an app that never got a container.
#[test]
fn virtual_host_of_an_app_removed_while_the_agent_was_down_is_removed() {
    let mut lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let missing = format!("127.0.0.1:1/nowhere-{}:v1", lab.tag);
    lab.put("apps/ghost/spec", &lab.socket_spec(&missing, "ghost.test", ""));
    until("nginx serves it", || lab.get("ghost.test", "/").is_ok_and(|(code, _)| code == 502));
    lab.kill_agent();
    lab.del("apps/ghost/");
    lab.start_agent(&[]);
    until("nginx does not serve it any more", || lab.get("ghost.test", "/").is_ok_and(|(code, _)| code != 502));
    lab.wait_app("web", "converged", |a| a.state == State::Converged);
    until("it is not in the status", || lab.lists_no("ghost"));
    assert_eq!(lab.get("web.test", "/").map(|(code, _)| code), Ok(200));
}
