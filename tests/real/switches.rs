//! Switches under load: real etcd, real nginx, real containers, and a client that counts every lost request.
#![expect(clippy::print_stdout, reason = "a test prints its figures, and runs programs and writes files of its own")]

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use crate::support::{
    lab::{Lab, Setup},
    load::{Client, Load, Tally, mixed},
    process::docker,
    wait::{pause, until},
};
use demae::model::status::State;

/// The number of switches; the long form asks for more.
fn switches(short: usize, variable: &str) -> usize {
    std::env::var(variable).ok().and_then(|n| n.parse().ok()).unwrap_or(short)
}

/// Deploys back and forth. Each release takes over before the next one is put, while the previous one may still be
/// draining; the last one is awaited until it has converged.
fn switch(lab: &Lab, app: &str, count: usize) {
    let images = [lab.image("v2"), lab.image("v1")];
    for n in 0..count {
        lab.take_over(app, &format!("apps/{app}/restart"), &format!("switch {n}"));
        if n % 10 == 9 {
            lab.deploy(app, &format!("apps/{app}/image"), &images[n / 10 % 2]);
        }
    }
    lab.deploy(app, &format!("apps/{app}/image"), &images[count / 10 % 2]);
}

/// A spec without a health check, as most people start.
fn with_default_check(spec: &str) -> String {
    let lines = spec.lines().filter(|line| !line.starts_with("healthcheck:"));
    lines.map(|line| format!("{line}\n")).collect()
}

fn expect_none_lost(tally: &Tally, what: &str) {
    println!(
        "{what}: requests: {}  failed: {}  stale: {}  slowest: {:?}",
        tally.requests, tally.failed, tally.stale, tally.slowest
    );
    assert_eq!((tally.failed, tally.stale), (0, 0), "{what}: {:#?}", tally.reasons);
    assert!(tally.requests > 100, "{what}: too few requests: {}", tally.requests);
}

#[test]
fn socket_mode_loses_nothing() {
    let lab = Lab::new();
    let count = switches(12, "DEMAE_SOCKET_SWITCHES");
    // Many switches are spread over apps that switch in parallel, each under its own load.
    let apps: Vec<String> = (0..if count < 100 { 1 } else { 4 }).map(|n| format!("web{n}")).collect();
    for app in &apps {
        let spec = with_default_check(&lab.socket_spec(&lab.image("v1"), &format!("{app}.test"), ""));
        lab.deploy(app, &format!("apps/{app}/spec"), &spec);
    }
    let reloads = lab.metric("demae_nginx_reloads_total", "done");
    let pause = Duration::from_millis(if count < 100 { 2 } else { 10 });
    let tallies: Vec<Tally> = std::thread::scope(|scope| {
        let work = |app: &String| {
            let load = Load::start(lab.ingress, &format!("{app}.test"), mixed(pause));
            until("requests are served", || load.requests() > 50);
            switch(&lab, app, count / apps.len());
            load.stop()
        };
        let threads: Vec<_> = apps.iter().map(|app| scope.spawn(move || work(app))).collect();
        threads.into_iter().map(|t| t.join().expect("it switched")).collect()
    });
    let mut total = Tally::default();
    for tally in &tallies {
        assert!(tally.versions.len() >= 2, "both versions answered: {:?}", tally.versions);
        total.requests += tally.requests;
        total.failed += tally.failed;
        total.stale += tally.stale;
        total.slowest = total.slowest.max(tally.slowest);
        total.reasons.extend(tally.reasons.clone());
    }
    expect_none_lost(&total, &format!("{count} switches in socket mode"));
    assert_eq!(lab.metric("demae_nginx_reloads_total", "done"), reloads, "an image change reloads nothing");
    if apps.len() == 1 {
        // Where changes are faster than requests end, an instance may be stopped at its drain timeout.
        assert_eq!(lab.metric("demae_drains_total", "cut"), 0.0, "every drain waited for its requests");
    }
    assert_eq!(lab.containers().len(), apps.len());
}

#[test]
fn port_mode_loses_nothing_on_new_connections() {
    let lab = Lab::new();
    let spec = with_default_check(&lab.port_spec(&lab.image("v1"), "web.test", ""));
    lab.deploy("web", "apps/web/spec", &spec);
    let quick = Duration::from_millis(2);
    let clients =
        vec![Client::get(false).pausing(quick), Client::post(false).pausing(quick), Client::slow(false, 2000)];
    let load = Load::start(lab.ingress, "web.test", clients);
    until("requests are served", || load.requests() > 50);
    let count = switches(5, "DEMAE_PORT_SWITCHES");
    switch(&lab, "web", count);
    expect_none_lost(&load.stop(), &format!("{count} switches in port mode, new connections"));
}

#[test]
fn port_mode_loses_nothing_under_the_strict_profile() {
    let lab = Lab::with(&Setup { nginx: "profile = \"strict\"", ..Setup::default() });
    lab.deploy("web", "apps/web/spec", &lab.port_spec(&lab.image("v1"), "web.test", ""));
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(2)));
    until("requests are served", || load.requests() > 50);
    let count = switches(5, "DEMAE_PORT_SWITCHES");
    switch(&lab, "web", count);
    expect_none_lost(&load.stop(), &format!("{count} switches in port mode, strict profile"));
}

#[test]
fn table_mode_loses_nothing() {
    let lab = Lab::with(&Setup { tcp_routes: true, ..Setup::default() });
    let spec = with_default_check(&lab.port_spec(&lab.image("v1"), "web.test", ""));
    lab.deploy("web", "apps/web/spec", &spec);
    let reloads = lab.metric("demae_nginx_reloads_total", "done");
    let count = switches(12, "DEMAE_TABLE_SWITCHES");
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(if count < 100 { 2 } else { 10 })));
    until("requests are served", || load.requests() > 50);
    switch(&lab, "web", count);
    let tally = load.stop();
    assert!(tally.versions.len() >= 2, "both versions answered: {:?}", tally.versions);
    expect_none_lost(&tally, &format!("{count} switches in table mode"));
    assert_eq!(lab.metric("demae_nginx_reloads_total", "done"), reloads, "an image change reloads nothing");
    assert_eq!(lab.metric("demae_drains_total", "cut"), 0.0, "every drain waited for its requests");
    assert_eq!(lab.containers().len(), 1);
}

/// nginx before 1.27.4 closes idle connections at a reload, and a request in flight on one is lost. This is not
/// asserted, only that nothing else is lost; the figure is printed for the documentation.
#[test]
fn port_mode_loses_only_reused_connections_under_the_default_profile() {
    let lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.port_spec(&lab.image("v1"), "web.test", ""));
    let clients = (0..4).map(|_| Client::get(true).pausing(Duration::from_millis(1))).collect();
    let load = Load::start(lab.ingress, "web.test", clients);
    until("requests are served", || load.requests() > 50);
    let count = switches(5, "DEMAE_PORT_SWITCHES");
    switch(&lab, "web", count);
    let tally = load.stop();
    let share = tally.stale as f64 * 100.0 / tally.requests as f64;
    println!(
        "{count} switches in port mode, default profile: requests: {}  failed: {}  stale: {} ({share:.2} %)",
        tally.requests, tally.failed, tally.stale
    );
    assert_eq!(tally.failed, 0, "{:#?}", tally.reasons);
}

/// A negative control: killing an instance under load loses requests.
#[test]
fn load_client_counts_the_requests_lost_by_an_early_stop() {
    let lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(2)));
    until("requests are served", || load.requests() > 50);
    for name in lab.containers() {
        docker(&["kill", &name]);
    }
    until("requests fail", || load.so_far().failed > 0);
    let tally = load.stop();
    println!("negative control: requests: {}  failed: {}", tally.requests, tally.failed);
    assert!(tally.failed > 0);
}

#[test]
fn open_streams_and_upgraded_connections_are_drained() {
    let lab = Lab::new();
    drains_open_connections(&lab, &lab.socket_spec(&lab.image("v1"), "web.test", ""));
}

#[test]
fn open_streams_and_upgraded_connections_are_drained_in_table_mode() {
    let lab = Lab::with(&Setup { tcp_routes: true, ..Setup::default() });
    drains_open_connections(&lab, &lab.port_spec(&lab.image("v1"), "web.test", ""));
}

fn drains_open_connections(lab: &Lab, spec: &str) {
    lab.deploy("web", "apps/web/spec", spec);
    let mut stream = TcpStream::connect(lab.ingress).expect("a connection");
    write!(stream, "GET /stream?25 HTTP/1.1\r\nHost: web.test\r\nConnection: close\r\n\r\n").expect("sent");
    let mut echo = TcpStream::connect(lab.ingress).expect("a connection");
    write!(echo, "GET /echo HTTP/1.1\r\nHost: web.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        .expect("sent");
    let mut bytes = [0; 1024];
    let n = echo.read(&mut bytes).expect("an answer");
    assert!(bytes[..n].starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&bytes[..n]));
    // The first lines have arrived, so the stream is open when the switch begins.
    let n = stream.read(&mut bytes).expect("the beginning of the stream");
    let mut text = String::from_utf8_lossy(&bytes[..n]).into_owned();

    lab.put("apps/web/image", &lab.image("v2"));
    until("new requests reach v2", || lab.get("web.test", "/").is_ok_and(|(_, body)| body.contains("version=v2")));
    for n in 0..20 {
        let message = format!("message {n}");
        echo.write_all(message.as_bytes()).expect("sent");
        let mut back = vec![0; message.len()];
        echo.read_exact(&mut back).expect("echoed, through the switch");
        assert_eq!(back, message.as_bytes());
        pause();
    }
    let old = lab.wait_app("web", "draining", |s| s.reason.contains("draining") || s.state == State::Converged);
    assert!(
        old.is("drain") && old.reason.contains("connections left"),
        "the old instance is kept for its connections: {old:?}"
    );
    stream.read_to_string(&mut text).expect("the whole stream");
    assert!(text.contains("line 24 of version v1") && text.ends_with("0\r\n\r\n"), "the stream was cut: {text}");
    drop(echo);
    let began = Instant::now();
    lab.wait_app("web", "converged", |s| s.state == State::Converged);
    assert!(began.elapsed() < Duration::from_secs(8), "without connections the drain ends at once");
    assert_eq!(lab.containers().len(), 1);
}

#[test]
fn several_replicas_and_hosts_switch_as_one() {
    let lab = Lab::new();
    let spec = |image: &str| lab.socket_spec(image, "a.test, b.test", "deploy: {replicas_per_host: 3}\n");
    lab.deploy("web", "apps/web/spec", &spec(&lab.image("v1")));
    let replicas = |host: &str| {
        let bodies = (0..30).map(|_| lab.get(host, "/").expect("an answer").1);
        bodies
            .map(|b| b.split("replica=").nth(1).and_then(|r| r.chars().next()).unwrap_or('?'))
            .collect::<std::collections::BTreeSet<char>>()
    };
    assert_eq!(replicas("b.test").len(), 3, "all replicas answer");
    let load = Load::start(lab.ingress, "a.test", mixed(Duration::from_millis(2)));
    lab.deploy("web", "apps/web/image", &lab.image("v2"));
    expect_none_lost(&load.stop(), "a switch of three replicas");
    assert_eq!(lab.app("web").map(|a| a.healthy), Some(3));

    // Fewer and more replicas, without a new release, under load.
    let load = Load::start(lab.ingress, "a.test", mixed(Duration::from_millis(2)));
    let release = lab.app("web").and_then(|a| a.release);
    for (count, line) in [(1, "1"), (2, "2")] {
        lab.put(
            "apps/web/spec",
            &lab.socket_spec(&lab.image("v1"), "a.test, b.test", &format!("deploy: {{replicas_per_host: {line}}}\n")),
        );
        let status =
            lab.wait_app("web", "converged on another count", |s| s.state == State::Converged && s.wanted == count);
        assert_eq!((status.release, lab.containers().len()), (release.clone(), usize::from(count)));
    }
    let tally = load.stop();
    // Another number of slots is another configuration, so nginx reloads: only reused connections may be lost.
    assert_eq!(tally.failed, 0, "{:#?}", tally.reasons);
}
