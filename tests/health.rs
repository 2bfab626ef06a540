//! Health is a positive sign, and the proof through nginx asks for no more than the health check.

mod support;

use std::time::Duration;

use demae::model::status::State;
use support::{
    lab::{Lab, Setup},
    load::{Client, Load, Tally},
    wait::until,
};

/// An app behind a port, with all defaults but the time that it needs to listen.
fn default_spec(image: &str, host: &str, start_ms: u64) -> String {
    format!(
        "{{image: \"{image}\", environment: {{START_MS: \"{start_ms}\"}}, ingress: {{hosts: [{host}], port: 8080}}}}"
    )
}

/// How many deploys each; the long form asks for more.
fn deploys() -> usize {
    std::env::var("DEMAE_DEFAULT_DEPLOYS").ok().and_then(|n| n.parse().ok()).unwrap_or(3)
}

/// Deploys of an app with all defaults, while 200 new connections a second ask for it.
pub fn deploy_under_load(lab: &Lab, start_ms: u64) -> Tally {
    let (app, host) = (format!("web{start_ms}"), format!("web{start_ms}.test"));
    lab.deploy(&app, &format!("apps/{app}/spec"), &default_spec(&lab.image("v1"), &host, start_ms));
    // Four clients with pauses of 20 ms.
    let clients = (0..4).map(|_| Client::get(false).pausing(Duration::from_millis(20))).collect();
    let load = Load::start(lab.ingress, &host, clients);
    until("requests flow", || load.requests() > 50);
    for n in 0..deploys() {
        lab.deploy(&app, &format!("apps/{app}/restart"), &n.to_string());
    }
    load.stop()
}

#[test]
fn an_app_behind_a_port_with_all_defaults_loses_nothing_however_long_it_takes_to_listen() {
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

/// The same where Docker publishes ports by rules of the kernel, with no proxy that takes connections before the app does. The
/// engine changes the rules of its network namespace, so this test runs in one of its own.
#[test]
fn without_dockers_proxy_it_loses_nothing_either() {
    const INSIDE: &str = "DEMAE_TEST_IN_A_NAMESPACE";
    let name = "without_dockers_proxy_it_loses_nothing_either";
    if std::env::var_os(INSIDE).is_none() {
        let own = std::env::current_exe().expect("a program");
        let mut inside = support::process::command("unshare");
        inside.args(["--net", "--"]).arg(own).args(["--exact", name, "--nocapture"]).env(INSIDE, "1");
        let output = inside.output().expect("it runs");
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
        return;
    }
    support::process::run(support::process::command("ip").args(["link", "set", "lo", "up"]));
    let engine = support::engine::Engine::without_userland_proxy();
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
fn an_app_behind_a_port_is_asked_as_soon_as_it_is_started() {
    let lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &default_spec(&lab.image("v1"), "web.test", 0));
    let times: Vec<u64> = (0..3)
        .map(|n| {
            let status = lab.deploy("web", "apps/web/restart", &n.to_string());
            let at = |what: &str| status.timeline.iter().find(|m| m.what == what).map_or(0, |m| m.ms);
            at("healthy") - at("started")
        })
        .collect();
    // A connection that is begun too early costs a second.
    assert!(times.iter().all(|ms| *ms < 500), "from started to healthy: {times:?} ms");
}

#[test]
fn slow_and_guarded_paths_are_no_fault_of_the_release() {
    let mut lab = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    let dir = lab.path("templates");
    std::fs::create_dir(&dir).expect("a directory");
    let guarded = include_str!("../deploy/nginx/default.conf.hbs");
    let guard = |rule: &str| guarded.replacen("    location / {", &format!("    location / {{\n        {rule}"), 1);
    support::files::write(&dir.join("denied.conf.hbs"), &guard("deny all;"));
    support::files::write(&dir.join("closed.conf.hbs"), &guard("return 503;"));
    support::files::write(&lab.path("users"), "me:{PLAIN}secret\n");
    let basic = format!("auth_basic x; auth_basic_user_file {};", lab.path("users").display());
    support::files::write(&dir.join("basic.conf.hbs"), &guard(&basic));
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
        support::lab::user_line()
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
    // The host that was asked for is named.
    lab.put(
        "apps/other/spec",
        &format!(
            "environment: {{ONLY_HOST: else.test}}\n{}",
            spec("other.test", "{http: /healthz, start_period: 500ms, interval: 200ms}", "")
        ),
    );
    let told = lab.wait_app("other", "told which host it refuses", |s| s.state == State::Blocked);
    assert!(told.reason.contains("for host `other.test`") && told.reason.contains("400"), "{}", told.reason);
    lab.put(
        "apps/other/spec",
        &format!(
            "environment: {{ONLY_HOST: else.test}}\n{}",
            spec("other.test", "{http: /healthz, host: else.test}", "")
        ),
    );
    lab.wait_app("other", "converged", |s| s.state == State::Converged);
}
