//! One bad value costs one app on one host: not other apps, not published status, not the agent.
#![expect(clippy::disallowed_methods, reason = "a test writes files of its own")]

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use crate::support::{
    files::Place,
    lab::{Lab, Setup},
    load::{Client, Load},
    wait::until,
};
use demae::model::status::State;

#[test]
fn ten_thousand_bad_names_cost_one_app() {
    let lab = Lab::new();
    lab.deploy("good", "apps/good/spec", &lab.socket_spec(&lab.image("v1"), "good.test", ""));
    let published = |app: &str| lab.get_key(&format!("state/apps/{}/{app}", lab.host));
    until("its status is published", || published("good").contains("converged"));
    lab.put("apps/bad/spec", &lab.socket_spec(&lab.image("v1"), "bad.test", ""));
    let load = Load::start(lab.ingress, "good.test", vec![Client::get(false)]);
    for batch in 0..100 {
        let pairs = (0..100).map(|n| (format!("env/bad/A=B{batch}.{n}"), "x".to_owned()));
        lab.put_all(&pairs.collect::<Vec<_>>());
    }
    let bad = lab.wait_app("bad", "invalid because of its names", |s| {
        s.state == State::Invalid && s.reason.contains("more problems")
    });
    assert!(bad.reason.contains("delete this key"), "{}", bad.reason);
    until("its status is published", || published("bad").contains("invalid"));
    assert!(published("bad").len() < 64 * 1024, "{} bytes", published("bad").len());
    assert!(published("good").contains("converged") && !lab.get_key(&format!("state/hosts/{}", lab.host)).is_empty());
    assert_eq!(lab.metric("demae_status_unpublished_seconds", ""), 0.0);
    assert!(lab.agent_log().len() < 4 << 20, "{} bytes of log", lab.agent_log().len());
    // The other apps continue, and so does the bad one once its names are deleted.
    lab.deploy("good", "apps/good/image", &lab.image("v2"));
    lab.del("env/bad/");
    lab.wait_app("bad", "converged", |s| s.state == State::Converged);
    let tally = load.stop();
    assert_eq!(tally.failed, 0, "{:#?}", tally.reasons);
}

#[test]
fn names_as_docker_takes_them_reach_the_app() {
    let lab = Lab::new();
    let more = "";
    lab.put("env/web/cluster.name", "from the store");
    let spec = lab
        .socket_spec(&lab.image("v1"), "web.test", more)
        .replace("{SOCKET:", "{discovery.type: single-node, SOCKET:");
    lab.deploy("web", "apps/web/spec", &spec);
    assert_eq!(lab.get("web.test", "/env?discovery.type").expect("an answer").1, "single-node");
    assert_eq!(lab.get("web.test", "/env?cluster.name").expect("an answer").1, "from the store");
}

#[test]
fn a_volume_below_a_writable_mount_is_refused() {
    let place = Place::new();
    let lab = Lab::new();
    let dir = place.0.display();
    let spec = |volume: &str| {
        format!("image: \"{}\"\nnetwork_mode: none\nstop_grace_period: 1s\nvolumes: [\"{volume}\"]\n", lab.image("v1"))
    };
    lab.deploy("outer", "apps/outer/spec", &spec(&format!("{dir}:/data")));
    lab.put("apps/inner/spec", &spec(&format!("{dir}/inner:/data")));
    let blocked = lab.wait_app("inner", "refused", |s| s.state == State::Blocked);
    assert!(
        blocked.is("mount_unsafe") && ["/inner`", "`outer`"].iter().all(|name| blocked.reason.contains(name)),
        "{}",
        blocked.reason
    );
    assert_eq!(lab.containers().len(), 1, "nothing was created");
    // If all mounts are read-only, nothing below can be replaced.
    lab.deploy("outer", "apps/outer/spec", &spec(&format!("{dir}:/data:ro")));
    lab.wait_app("inner", "converged", |s| s.state == State::Converged);
}

#[test]
fn a_flood_of_silent_connections_costs_the_agent_nothing() {
    let lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let pid = lab.agent_pid().expect("it runs").to_string();
    crate::support::process::run(Command::new("prlimit").args(["--pid", &pid, "--nofile=1024:1024"]));
    let flood: Vec<TcpStream> = (0..1100).map(|_| TcpStream::connect(lab.metrics).expect("a connection")).collect();
    // The agent's loop needs file descriptors of the process.
    lab.put("apps/web/image", &lab.image("v2"));
    until("it deploys meanwhile", || lab.get("web.test", "/").is_ok_and(|(_, body)| body.contains("version=v2")));
    until("it answers again", || lab.status().is_some());
    drop(flood);
}

#[test]
fn symlink_in_place_of_a_socket_is_not_followed() {
    let lab = Lab::with(&Setup { top: "resync = \"1s\"\n", ..Setup::default() });
    // A replacement needs a while to listen.
    let spec = lab.socket_spec(&lab.image("v1"), "web.test", "").replace("{SOCKET:", "{START_MS: \"4000\", SOCKET:");
    lab.deploy("web", "apps/web/spec", &spec);
    let outside = lab.path("outside.sock");
    let listener = std::os::unix::net::UnixListener::bind(&outside).expect("a socket");
    fs::set_permissions(&outside, std::os::unix::fs::PermissionsExt::from_mode(0o666)).expect("rights");
    // It answers any client, as an engine would: only not being the app's own socket tells it apart.
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            count.fetch_add(1, Relaxed);
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\nConnection: close\r\n\r\noutside");
        }
    });
    let instance = fs::read_dir(lab.path("state/sockets/web")).expect("a directory").next().expect("one").expect("one");
    let socket = instance.path().join("app.sock");
    fs::remove_file(&socket).expect("it exists");
    std::os::unix::fs::symlink(&outside, &socket).expect("a symlink");
    let status = lab.wait_app("web", "another instance", |s| s.state != State::Converged);
    assert!(!status.reason.is_empty());
    until("a replacement is there", || lab.containers().len() == 2);
    for _ in 0..20 {
        let answer = lab.get("web.test", "/");
        assert!(answer.is_ok_and(|(_, body)| body != "outside"), "the symlink was followed");
    }
    let is_own = || lab.get("web.test", "/").is_ok_and(|(code, body)| code == 200 && body.contains("version="));
    until("requests go to a socket of the app again", is_own);
    // Neither nginx nor demae follows the symlink any more.
    let before = asked.load(Relaxed);
    for _ in 0..20 {
        assert!(is_own(), "the symlink was followed");
    }
    assert_eq!(asked.load(Relaxed), before, "the symlink was followed");
}
