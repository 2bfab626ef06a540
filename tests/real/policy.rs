//! What root of a host allows: while releases come, while the file is broken, and while an app tries to get out of what it
//! may mount.
#![expect(clippy::disallowed_methods, reason = "a test writes files of its own")]

use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{Duration, SystemTime},
};

use crate::support::{
    files::Place,
    images,
    lab::{Lab, Setup},
    load::{self, Load},
    process::docker,
    relay::{Relay, is},
    wait::until,
};
use demae::model::{
    status::{AppStatus, State},
    time::Timestamp,
};

fn is_refused(app: &AppStatus) -> bool {
    app.state == State::Blocked && app.is("not_allowed")
}

#[test]
fn a_policy_that_is_replaced_during_deploys_lets_nothing_else_in_and_stops_nothing() {
    let lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v0"), "web.test", ""));
    let load = Load::start(lab.ingress, "web.test", load::mixed(Duration::from_millis(2)));
    let policy = lab.path("policy.toml");
    let (mut refused, mut taken) = (0, 0);
    for round in 1..=8_u64 {
        let before = lab.app("web").expect("it is there").release;
        lab.put("apps/web/image", &lab.image(&format!("v{round}")));
        // Not waited for: each round replaces the policy at another step of the deploy.
        std::thread::sleep(Duration::from_millis(round * 12));
        fs::write(lab.path("policy.new"), "[containers]\nread_only = true\n").expect("a file");
        fs::rename(lab.path("policy.new"), &policy).expect("renamed");
        let narrowed = SystemTime::now();
        let is_decided = |s: &AppStatus| s.release != before && (s.state == State::Converged || is_refused(s));
        let decided = lab.wait_app("web", "decided", is_decided);
        match decided.state {
            State::Converged => taken += 1,
            _ => {
                refused += 1;
                assert!(decided.reason.contains("policy.toml:2") && decided.healthy > 0, "{}", decided.reason);
            }
        }
        for name in lab.containers() {
            let format = "{{.Created}} {{.HostConfig.ReadonlyRootfs}}";
            let text = docker(&["inspect", "--format", format, &name]);
            let (created, read_only) = text.split_once(' ').expect("two words");
            let since = narrowed.duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_millis();
            let created = Timestamp::parse(created).expect("a time").as_millis();
            // What was asked of Docker just before is created just after.
            let is_late = u128::from(created.unsigned_abs()) > since + 1000;
            assert!(read_only == "true" || !is_late, "{name} was created {created}, and not allowed since {since}");
        }
        fs::remove_file(&policy).expect("removed");
        lab.wait_app("web", "converged once it is allowed", |s| s.state == State::Converged);
    }
    assert!(refused > 0, "{taken} of 8 were taken: none came too late");
    let tally = load.stop();
    assert_eq!(tally.failed, 0, "{:#?}", tally.reasons);
}

/// The step is under way, and has asked which ports are in use; the request to create the container is not sent yet.
#[test]
fn a_policy_that_is_narrowed_during_the_step_stops_its_request() {
    let mut lab = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    let relay = Relay::start(&lab.path("docker.sock"));
    lab.start_agent(&[("DOCKER_HOST", &relay.host())]);
    lab.deploy("web", "apps/web/spec", &lab.port_spec(&lab.image("v1"), "web.test", ""));
    let next = lab.image("v2");
    let (is_looked_for, version) = (AtomicBool::new(false), format!("/images/{next}/json"));
    let lists_all = |line: &str| line.contains("/containers/json") && !line.contains("demae.app%3D");
    relay.hold_next(move |line| {
        is_looked_for.fetch_or(line.contains(&version), Relaxed);
        is_looked_for.load(Relaxed) && lists_all(line)
    });
    let creates = |relay: &Relay| relay.seen(is("POST", "/containers/create"));
    let before = creates(&relay);
    lab.put("apps/web/image", &next);
    until("the step asks for ports", || relay.held() == 1);
    assert_eq!(creates(&relay), before);
    fs::write(lab.path("policy.new"), "[containers]\nread_only = true\n").expect("a file");
    fs::rename(lab.path("policy.new"), lab.path("policy.toml")).expect("renamed");
    relay.pass();
    let app = lab.wait_app("web", "refused", is_refused);
    assert!(app.healthy > 0 && creates(&relay) == before, "{app:?}");
    // The step itself was refused, by the second reading.
    assert!(lab.metric("demae_step_failures_total", "error=\"not_allowed\"") >= 1.0);
    fs::remove_file(lab.path("policy.toml")).expect("removed");
    lab.wait_app("web", "converged once it is allowed", |s| s.state == State::Converged);
}

#[test]
fn a_policy_that_cannot_be_used_lets_nothing_be_created() {
    let lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let policy = lab.path("policy.toml");
    fs::write(&policy, "[containers]\nread_only = perhaps\n").expect("a file");
    lab.put("apps/web/image", &lab.image("v2"));
    let app = lab.wait_app("web", "refused", is_refused);
    assert!(app.reason.contains("policy.toml") && app.reason.contains("line 2"), "{}", app.reason);
    assert_eq!(lab.metric("demae_policy_usable", ""), 0.0);
    let (code, out, _) = lab.ask(&["doctor"]);
    assert!(code == 1 && out.lines().any(|line| line.starts_with("FAIL") && line.contains("policy")), "{out}");
    // What serves goes on, and comes back by itself.
    let [name] = lab.containers().try_into().expect("one container");
    docker(&["kill", &name]);
    until("it serves again", || lab.get("web.test", "/").is_ok_and(|(_, body)| body.contains("version=v1")));
    assert_eq!(lab.containers(), [name]);
    let (code, _, err) = lab.ask(&["run", "web", "--", "/app", "exit", "0"]);
    assert!(code == 125 && err.contains("creates nothing"), "{code}: {err}");
    fs::write(&policy, "").expect("a file");
    lab.wait_app("web", "converged", |s| s.state == State::Converged);
    until("it is usable", || lab.metric("demae_policy_usable", "") == 1.0);
}

#[test]
fn a_host_may_allow_what_others_refuse() {
    let lab = Lab::new();
    let spec = lab.socket_spec(&lab.image("v1"), "web.test", "cap_add: [NET_ADMIN]\ndevices: [/dev/null]\n");
    lab.put("apps/web/spec", &spec);
    let app = lab.wait_app("web", "refused", is_refused);
    for part in ["`cap_add`", "`devices[0]`", &lab.host] {
        assert!(app.reason.contains(part), "{}", app.reason);
    }
    let text = "[apps.web.containers]\ncap_add = ['NET_ADMIN']\ndevices = ['/dev/null']\n";
    fs::write(lab.path("policy.toml"), text).expect("a file");
    lab.wait_app("web", "converged", |s| s.state == State::Converged);
    let [name] = lab.containers().try_into().expect("one container");
    assert_eq!(docker(&["inspect", "--format", "{{.HostConfig.CapAdd}}", &name]), "[NET_ADMIN]");
    // A virtual host that is not allowed is not served, and the ones before are.
    fs::write(lab.path("policy.toml"), format!("{text}[ingress]\nhosts = ['web.test']\n")).expect("a file");
    lab.put("apps/web/spec", &spec.replace("[web.test]", "[web.test, other.test]"));
    lab.wait_app("web", "refused", is_refused);
    assert_eq!(lab.get("web.test", "/").expect("an answer").0, 200);
    assert_ne!(lab.get("other.test", "/").map(|(code, _)| code), Ok(200));
}

#[test]
fn an_app_with_a_shell_cannot_swap_what_another_one_mounts() {
    let place = Place::new();
    let dir = place.0.display();
    let lab = Lab::new();
    let shell = format!("demae-lab-{}-shell:v1", lab.tag);
    images::build_shell(&shell, &lab.path("shell"));
    lab.remove_on_drop(shell.clone());
    let spec = |volumes: &str, script: &str| {
        format!(
            "image: \"{shell}\"\nentrypoint: [/busybox, sh, -c]\ncommand: [\"{script}\"]\nnetwork_mode: none\n\
             stop_grace_period: 1s\nvolumes: [{volumes}]\n"
        )
    };
    let idle = "while true; do /busybox sleep 1; done";
    // It swaps what lies below for a link to the host's files, and back, as fast as it can.
    let swap = "cd /data; while true; do /busybox mv inner kept; /busybox ln -s /etc inner; /busybox rm inner; /busybox mv kept inner; done";

    // The one below is there first: the other one gets no container, whatever it is called.
    lab.deploy("inner", "apps/inner/spec", &spec(&format!("\"{dir}/inner:/data\""), idle));
    lab.put("apps/above/spec", &spec(&format!("\"{dir}:/data\""), swap));
    let app = lab.wait_app("above", "refused", |s| s.state == State::Blocked);
    assert!(
        app.is("mount_unsafe") && app.reason.contains("/inner`, which a container of app `inner`"),
        "{}",
        app.reason
    );
    lab.deploy("inner", "apps/inner/restart", "1");
    assert_eq!(lab.containers().len(), 1, "only that of the app that was first");

    // Once its neighbour is gone it gets what it asks for. Now the other one is refused.
    lab.del("apps/inner/");
    lab.wait_app("above", "converged", |s| s.state == State::Converged);
    lab.put("apps/inner/spec", &spec(&format!("\"{dir}/inner:/data\""), idle));
    let app = lab.wait_app("inner", "refused", |s| s.state == State::Blocked);
    assert!(app.is("mount_unsafe"), "{}", app.reason);

    // What it has left behind is not followed, though nothing is mounted above it any more.
    let leave = "cd /data; while true; do [ -L inner ] || /busybox rm -rf inner kept; /busybox ln -sfn /etc inner; /busybox sleep 1; done";
    lab.deploy("above", "apps/above/spec", &spec(&format!("\"{dir}:/data\""), leave));
    until("it has left a link", || place.0.join("inner").is_symlink());
    lab.del("apps/above/");
    let app = lab.wait_app("inner", "refused by what the path leads to", |s| {
        s.is("not_allowed") || s.reason.contains("is really `/etc`")
    });
    assert!(app.reason.contains("is really `/etc`"), "{}", app.reason);
    until("nothing runs", || lab.containers().is_empty());

    // A container is not started again once its path leads elsewhere.
    let inner = place.0.join("inner");
    fs::remove_file(&inner).expect("removed");
    fs::create_dir(&inner).expect("a directory");
    lab.wait_app("inner", "converged", |s| s.state == State::Converged);
    let [name] = lab.containers().try_into().expect("one container");
    docker(&["update", "--restart", "no", &name]);
    fs::remove_dir(&inner).expect("removed");
    std::os::unix::fs::symlink("/etc", &inner).expect("a link");
    docker(&["kill", &name]);
    lab.wait_app("inner", "not started", |s| s.reason.contains("is really `/etc`"));
    let running = docker(&["ps", "-q", "--filter", &format!("label=demae.host={}", lab.host)]);
    assert_eq!(running, "", "neither it nor one in its place");
}
