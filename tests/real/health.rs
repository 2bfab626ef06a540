//! Health requires a positive response, and the proof through nginx demands no more than the health check.

use std::time::Duration;

use crate::support::{
    lab::{Lab, Setup},
    load::{Client, Load, Tally},
    wait::until,
};
use demae::model::status::State;

/// A port app with all defaults except its delay before listening.
fn default_spec(image: &str, host: &str, start_ms: u64) -> String {
    format!(
        "{{image: \"{image}\", environment: {{START_MS: \"{start_ms}\"}}, ingress: {{hosts: [{host}], port: 8080}}}}"
    )
}

/// Deploys per app; the long form asks for more.
fn deploys() -> usize {
    std::env::var("DEMAE_DEFAULT_DEPLOYS").ok().and_then(|n| n.parse().ok()).unwrap_or(3)
}

/// Deploys a default app under a load of 200 new connections a second.
pub fn deploy_under_load(lab: &Lab, start_ms: u64) -> Tally {
    let (app, host) = (format!("web{start_ms}"), format!("web{start_ms}.test"));
    lab.deploy(&app, &format!("apps/{app}/spec"), &default_spec(&lab.image("v1"), &host, start_ms));
    // Four clients with pauses of 20 ms.
    let clients = (0..4).map(|_| Client::get(false).pausing(Duration::from_millis(20))).collect();
    let load = Load::start(lab.ingress, &host, clients);
    until("requests are served", || load.requests() > 50);
    for n in 0..deploys() {
        lab.deploy(&app, &format!("apps/{app}/restart"), &n.to_string());
    }
    load.stop()
}

#[test]
fn port_app_with_defaults_loses_nothing_however_slow_it_listens() {
    let lab = Lab::new();
    let tallies: Vec<(u64, Tally)> = std::thread::scope(|scope| {
        let work = |ms: u64| {
            (
                ms,
                scope.spawn({
                    let lab = &lab;
                    move || deploy_under_load(lab, ms)
                }),
            )
        };
        let threads: Vec<_> = [100, 1000, 3000].map(work).into_iter().collect();
        threads.into_iter().map(|(ms, t)| (ms, t.join().expect("it deployed"))).collect()
    });
    for (ms, tally) in tallies {
        println!("listens after {ms} ms: requests: {}  failed: {}", tally.requests, tally.failed);
        assert_eq!((tally.failed, tally.stale), (0, 0), "{ms} ms: {:#?}", tally.reasons);
        assert!(tally.requests > 200, "{ms} ms: {}", tally.requests);
    }
}

/// The same where Docker publishes ports by netfilter rules, without a proxy that accepts connections before the app.
/// The engine changes the rules of its network namespace, so the test runs in one of its own.
#[test]
fn port_app_without_userland_proxy_loses_nothing() {
    const INSIDE: &str = "DEMAE_TEST_IN_A_NAMESPACE";
    let name = "health::port_app_without_userland_proxy_loses_nothing";
    if std::env::var_os(INSIDE).is_none() {
        let own = std::env::current_exe().expect("a program");
        let mut inside = crate::support::process::command("unshare");
        inside.args(["--net", "--"]).arg(own).args(["--exact", name, "--nocapture"]).env(INSIDE, "1");
        let output = inside.output().expect("it runs");
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
        text.lines().filter(|line| line.contains("requests")).for_each(|line| println!("{line}"));
        return;
    }
    crate::support::process::run(crate::support::process::command("ip").args(["link", "set", "lo", "up"]));
    let engine = crate::support::engine::Engine::without_userland_proxy();
    let mut lab = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    engine.load(&lab.image("v1"));
    lab.start_agent(&[("DOCKER_HOST", &engine.host())]);
    lab.wait_ready();
    for ms in [100, 1000, 3000] {
        let tally = deploy_under_load(&lab, ms);
        assert_eq!((tally.failed, tally.stale), (0, 0), "{ms} ms: {:#?}", tally.reasons);
        assert!(tally.requests > 200, "{ms} ms: {}", tally.requests);
    }
    lab.stop_agent();
}

#[test]
fn port_app_is_probed_as_soon_as_it_is_started() {
    let lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &default_spec(&lab.image("v1"), "web.test", 0));
    let times: Vec<u64> = (0..3)
        .map(|n| {
            let status = lab.deploy("web", "apps/web/restart", &n.to_string());
            let at = |what: &str| status.timeline.iter().find(|m| m.what == what).map_or(0, |m| m.ms);
            at("healthy") - at("started")
        })
        .collect();
    // A connection attempt before the app listens costs a second.
    assert!(times.iter().all(|ms| *ms < 500), "from started to healthy: {times:?} ms");
}

#[test]
fn slow_and_guarded_paths_do_not_fail_the_release() {
    let mut lab = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    let dir = lab.path("templates");
    std::fs::create_dir(&dir).expect("a directory");
    let guarded = include_str!("../../deploy/nginx/default.conf.hbs");
    let guard = |rule: &str| guarded.replacen("    location / {", &format!("    location / {{\n        {rule}"), 1);
    crate::support::files::write(&dir.join("denied.conf.hbs"), &guard("deny all;"));
    crate::support::files::write(&dir.join("closed.conf.hbs"), &guard("return 503;"));
    crate::support::files::write(&lab.path("users"), "me:{PLAIN}secret\n");
    let basic = format!("auth_basic x; auth_basic_user_file {};", lab.path("users").display());
    crate::support::files::write(&dir.join("basic.conf.hbs"), &guard(&basic));
    lab.start_agent(&[]);
    lab.wait_ready();
    let image = lab.image("v1");
    let spec = |host: &str, check: &str, ingress: &str| {
        format!(
            "image: \"{image}\"\nhealthcheck: {check}\ningress: {{hosts: [{host}], port: 8080{ingress}}}\nstop_grace_period: 1s\n"
        )
    };
    let http = "{http: /healthz}";
    let rows = [
        ("slow", spec("slow.test", "{http: '/slow?3000', timeout: 10s, interval: 10s}", "")),
        ("denied", spec("denied.test", http, ", template: denied")),
        ("closed", spec("closed.test", http, ", template: closed")),
        ("basic", spec("basic.test", http, ", template: basic")),
        ("picky", format!("environment: {{ONLY_HOST: picky.test}}\n{}", spec("picky.test", http, ""))),
    ];
    let socket = format!(
        "image: \"{image}\"\n{}environment: {{ONLY_HOST: sock.test, SOCKET: /run/app/a.sock}}\nhealthcheck: {http}\n\
         ingress: {{hosts: [sock.test], socket: /run/app/a.sock}}\nstop_grace_period: 1s\n",
        crate::support::lab::user_line()
    );
    let gateway =
        format!("environment: {{ROOT_STATUS: \"502 Bad Gateway\"}}\n{}", spec("gateway.test", "{tcp: true}", ""));
    let rows: Vec<(&str, String)> = rows.into_iter().chain([("sock", socket), ("gateway", gateway)]).collect();
    for (app, spec) in &rows {
        lab.put(&format!("apps/{app}/spec"), spec);
    }
    for (app, _) in &rows {
        let status = lab.wait_app(app, "converged", |s| matches!(s.state, State::Converged | State::Blocked));
        assert_eq!(status.state, State::Converged, "{app}: {}", status.reason);
    }
    // The error names the requested host.
    lab.put(
        "apps/other/spec",
        &format!(
            "environment: {{ONLY_HOST: else.test}}\n{}",
            spec("other.test", "{http: /healthz, start_period: 500ms, interval: 200ms}", "")
        ),
    );
    let blocked = lab.wait_app("other", "blocked for the host that it rejects", |s| s.state == State::Blocked);
    assert!(blocked.reason.contains("for host `other.test`") && blocked.reason.contains("400"), "{}", blocked.reason);
    lab.put(
        "apps/other/spec",
        &format!(
            "environment: {{ONLY_HOST: else.test}}\n{}",
            spec("other.test", "{http: /healthz, host: else.test}", "")
        ),
    );
    lab.wait_app("other", "converged", |s| s.state == State::Converged);
}
