//! TCP apps behind the kernel's table: switches without a reload, and what else happens to tables, routes and containers.

use std::time::Duration;

use crate::support::{
    containers::{inspect, only},
    lab::{Lab, Setup},
    load::{Load, mixed},
    wait::until,
};

fn lab() -> Lab {
    Lab::with(&Setup { tcp_routes: true, ..Setup::default() })
}

#[test]
fn deploys_by_the_table_lose_nothing_and_reload_nothing() {
    let lab = lab();
    lab.deploy("web", "apps/web/spec", &lab.port_spec(&lab.image("v1"), "web.test", ""));
    let reloads = lab.metric("demae_nginx_reloads_total", "done");
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(2)));
    until("requests are served", || load.requests() > 50);
    for version in ["v2", "v1", "v2"] {
        lab.deploy("web", "apps/web/image", &lab.image(version));
    }
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "of {}: {:#?}", tally.requests, tally.reasons);
    assert_eq!(lab.metric("demae_nginx_reloads_total", "done"), reloads, "nginx was not reloaded");
    let ports = inspect(&only(&lab, "web"), "{{json .HostConfig.PortBindings}}");
    assert_eq!(ports, "{}", "no port is published");
}
