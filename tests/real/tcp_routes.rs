//! TCP apps behind the kernel's table: what happens to tables, routes, addresses and containers.
#![expect(clippy::disallowed_methods, reason = "a test runs programs of its own")]

use std::{
    process::Command,
    time::{Duration, Instant},
};

use crate::support::{
    containers::{ids, inspect, only},
    lab::{Lab, Setup},
    load::{Client, Load, mixed},
    process::{docker, run},
    wait::until,
};
use demae::model::status::State;

fn lab() -> Lab {
    Lab::with(&Setup { tcp_routes: true, ..Setup::default() })
}

fn deploy(lab: &Lab, app: &str, host: &str) {
    lab.deploy(app, &format!("apps/{app}/spec"), &lab.port_spec(&lab.image("v1"), host, ""));
}

/// The address of a container, by its label.
fn address(id: &str) -> String {
    inspect(id, "{{index .Config.Labels \"demae.address\"}}")
}

/// A container of someone else in the lab's network, removed with the lab by its label.
fn newcomer(lab: &Lab) -> String {
    let network = &lab.tcp_routes.as_ref().expect("tcp routes").network;
    let label = format!("demae.host={}", lab.host);
    docker(&["run", "-d", "--network", network, "--label", &label, &lab.image("v2")])
}

fn ip(id: &str) -> String {
    inspect(id, "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}")
}

#[test]
fn instance_has_no_published_port_and_sees_a_private_peer() {
    let lab = lab();
    deploy(&lab, "web", "web.test");
    let id = only(&lab, "web");
    assert_eq!(inspect(&id, "{{json .HostConfig.PortBindings}}"), "{}", "no port is published");
    assert_eq!(ip(&id), address(&id), "it has the address that it was given");
    let (_, peer) = lab.get("web.test", "/peer").expect("an answer");
    assert!(peer.starts_with("10."), "frameworks trust a private peer as a proxy: {peer}");
    assert_eq!(lab.metric("demae_tcp_routes", ""), 1.0);
    // Nothing is left of an app that is removed.
    lab.del("apps/web/");
    until("the app is gone", || lab.lists_no("web") && lab.containers().is_empty() && lab.traces().is_empty());
    let listing = lab.tcp_routes.as_ref().expect("tcp routes").listing();
    assert!(listing.contains("map routes") && !listing.contains("elements"), "{listing}");
}

/// Keep-alive clients, new connections, long responses, a lost table and a lost route.
#[test]
fn lost_table_and_route_are_put_back_within_a_second() {
    let lab = lab();
    deploy(&lab, "web", "web.test");
    let own = lab.tcp_routes.as_ref().expect("tcp routes");
    for lost in ["table", "route"] {
        if lost == "table" {
            own.delete_table();
        } else {
            own.delete_route();
        }
        let began = Instant::now();
        until("requests are answered again", || lab.get("web.test", "/").is_ok_and(|(status, _)| status == 200));
        let took = began.elapsed();
        assert!(took < Duration::from_secs(2), "the {lost} was put back after {took:?}");
        assert!(own.listing().contains("elements") && own.has_route());
    }
}

#[test]
fn routes_are_restored_at_boot_without_the_agent() {
    let mut lab = lab();
    deploy(&lab, "web", "web.test");
    lab.kill_agent();
    let own = lab.tcp_routes.as_ref().expect("tcp routes");
    own.delete_table();
    own.delete_route();
    let (status, _) = lab.get("web.test", "/").expect("nginx answers");
    assert_ne!(status, 200, "without the table nobody is reached");
    let mut restore = Command::new(env!("CARGO_BIN_EXE_demae"));
    run(restore.arg("restore-routes").arg("--config").arg(lab.path("agent.toml")).env("DOCKER_HOST", "/nowhere"));
    let (status, body) = lab.get("web.test", "/").expect("an answer");
    assert!(status == 200 && body.contains("version=v1"), "{status} {body}");
}

/// Containers die and are started by Docker while no agent runs, and others come in between: every answer is from the
/// right app, or there is none.
#[test]
fn requests_never_reach_another_container_while_the_agent_is_dead() {
    let rounds = std::env::var("DEMAE_ADDRESS_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(3);
    let mut lab = lab();
    deploy(&lab, "web", "web.test");
    deploy(&lab, "other", "other.test");
    lab.kill_agent();
    let (web, other) = (only(&lab, "web"), only(&lab, "other"));
    let is_right = |host: &str, app: &str| match lab.get(host, "/") {
        Ok((200, body)) => assert!(body.contains("version=v1") && body.contains(app), "{host}: {body}"),
        Ok((502 | 504, _)) => {}
        other => panic!("{host}: {other:?}"),
    };
    for _ in 0..rounds {
        docker(&["kill", &web]);
        let first = newcomer(&lab);
        is_right("web.test", "");
        docker(&["kill", &other]);
        let second = newcomer(&lab);
        let own = [address(&web), address(&other)];
        assert!(!own.contains(&ip(&first)) && !own.contains(&ip(&second)), "Docker gives fixed addresses to nobody");
        is_right("web.test", "");
        is_right("other.test", "");
        // In the other order.
        docker(&["start", &other]);
        docker(&["start", &web]);
        for host in ["web.test", "other.test"] {
            until("it answers again", || lab.get(host, "/").is_ok_and(|(status, _)| status == 200));
        }
        assert_eq!([ip(&web), ip(&other)], own, "they have the same addresses as before");
        docker(&["rm", "-f", &first, &second]);
    }
}

#[test]
fn request_to_an_ended_instance_is_refused_at_once() {
    let lab = lab();
    let spec = lab.port_spec(&lab.image("v1"), "web.test", "deploy: {replicas_per_host: 2}\n");
    lab.deploy("web", "apps/web/spec", &spec);
    let own = lab.tcp_routes.as_ref().expect("tcp routes");
    let ids = crate::support::containers::ids(&lab, "web");
    let gone = address(&ids[0]);
    assert!(own.listing().contains(&format!("{gone} .")));
    // Stopped by a person: Docker does not start it again, the agent does.
    docker(&["pause", &ids[1]]);
    docker(&["unpause", &ids[1]]);
    let load = Load::start(lab.ingress, "web.test", vec![Client::get(false).pausing(Duration::from_millis(20))]);
    docker(&["kill", &ids[0]]);
    until("its entry is gone, or it serves again", || {
        !own.listing().contains(&format!("{gone} .")) || inspect(&ids[0], "{{.State.Running}}") == "true"
    });
    lab.wait_app("web", "converged with both", |a| a.state == State::Converged && a.healthy == 2);
    let tally = load.stop();
    // One that began before Docker reported the end waits for nginx's `proxy_connect_timeout` of 2 s, and is tried on
    // the other instance then. None waits twice.
    assert!(tally.slowest < Duration::from_secs(3), "no request waits for a dead instance: {:?}", tally.slowest);
}

#[test]
fn published_ports_are_the_fallback_and_apps_go_over_without_a_gap() {
    let mut lab = Lab::with(&Setup { tcp_routes: true, no_agent: true, ..Setup::default() });
    let own = lab.tcp_routes.as_ref().expect("tcp routes");
    // Something else on this host has the addresses.
    run(Command::new("ip").args(["route", "add", "blackhole", &own.range]));
    let range = own.range.clone();
    lab.start_agent(&[]);
    lab.wait_ready();
    deploy(&lab, "web", "web.test");
    let why = lab.status().and_then(|status| status.tcp_routes).expect("the status says why");
    assert!(why.contains("is in use"), "{why}");
    assert_ne!(inspect(&only(&lab, "web"), "{{json .HostConfig.PortBindings}}"), "{}", "its port is published");
    assert_eq!(lab.metric("demae_tcp_routes", ""), 0.0);
    run(Command::new("ip").args(["route", "del", "blackhole", &range]));
    until("the routes can be used", || lab.status().is_some_and(|status| status.tcp_routes.is_none()));
    let new = vec![Client::get(false).pausing(Duration::from_millis(3)), Client::slow(false, 500)];
    let load = Load::start(lab.ingress, "web.test", new);
    until("requests are served", || load.requests() > 20);
    lab.deploy("web", "apps/web/image", &lab.image("v2"));
    assert_eq!(inspect(&only(&lab, "web"), "{{json .HostConfig.PortBindings}}"), "{}", "no port is published any more");
    // And back, to a socket.
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "of {}: {:#?}", tally.requests, tally.reasons);
}

/// Two agents on one machine, with the same addresses by mistake: the second one leaves them to the first.
#[test]
fn addresses_of_another_agent_are_left_alone() {
    let first = lab();
    deploy(&first, "web", "web.test");
    let own = first.tcp_routes.as_ref().expect("tcp routes");
    let mut second = Lab::with(&Setup { tcp_routes: true, no_agent: true, ..Setup::default() });
    let text = std::fs::read_to_string(second.path("agent.toml")).expect("a file");
    let other = second.tcp_routes.as_ref().expect("tcp routes");
    std::fs::write(second.path("agent.toml"), text.replace(&other.range, &own.range)).expect("a file");
    second.start_agent(&[]);
    second.wait_ready();
    until("the second agent says why", || second.status().is_some_and(|s| s.tcp_routes.is_some()));
    let why = second.status().and_then(|status| status.tcp_routes).expect("why");
    assert!(why.contains(&own.table), "{why}");
    deploy(&second, "web", "second.test");
    assert_eq!(first.get("web.test", "/").map(|(status, _)| status), Ok(200));
    assert_eq!(second.get("second.test", "/").map(|(status, _)| status), Ok(200));
}

#[test]
fn mixed_requests_survive_switches_between_replicas() {
    let lab = lab();
    let spec = |replicas: u16| {
        lab.port_spec(&lab.image("v1"), "web.test", &format!("deploy: {{replicas_per_host: {replicas}}}\n"))
    };
    lab.deploy("web", "apps/web/spec", &spec(2));
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(2)));
    until("requests are served", || load.requests() > 50);
    lab.deploy("web", "apps/web/image", &lab.image("v2"));
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "of {}: {:#?}", tally.requests, tally.reasons);
    lab.put("apps/web/spec", &spec(1));
    lab.wait_app("web", "converged with one", |a| a.state == State::Converged && a.wanted == 1);
    assert_eq!((lab.containers().len(), lab.get("web.test", "/").map(|(s, _)| s)), (1, Ok(200)));
}

#[test]
fn instance_that_lost_its_address_is_replaced() {
    let lab = lab();
    deploy(&lab, "web", "web.test");
    let id = only(&lab, "web");
    docker(&["network", "disconnect", &lab.tcp_routes.as_ref().expect("tcp routes").network, &id]);
    until("another instance serves", || {
        let replaced = !ids(&lab, "web").contains(&id);
        replaced && lab.get("web.test", "/").is_ok_and(|(status, _)| status == 200)
    });
}

/// A database and a worker have no ingress; requests come to the web app alone.
#[test]
fn apps_of_a_host_find_each_other_by_their_names() {
    let lab = lab();
    let network = lab.tcp_routes.as_ref().expect("tcp routes").network.clone();
    deploy(&lab, "web", "web.test");
    let worker = format!("image: {}\nenvironment: {{PORT: 5432}}\n", lab.image("v2"));
    lab.deploy("db", "apps/db/spec", &worker);
    let reached = || lab.get("web.test", "/reach?db:5432").expect("an answer").1;
    until("the web app reaches the database", || reached().contains("version=v2"));
    let networks = inspect(&only(&lab, "db"), "{{range $name, $n := .NetworkSettings.Networks}}{{$name}} {{end}}");
    assert_eq!(networks.trim(), network, "it is in the network of the other apps");
    // The name goes with its app.
    lab.del("apps/db/");
    until("the database is gone", || ids(&lab, "db").is_empty() && lab.get("web.test", "/reach?db:5432").is_ok());
    assert!(reached().contains("no such name"), "{}", reached());
}
