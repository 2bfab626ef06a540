//! What hosts allow: hostile specs against policies, read twice; and random ones.

use std::{collections::BTreeMap, fmt::Write as _, path::Path, time::Duration};

use demae::{
    host::docker::{CreateRequest, create_body},
    model::{
        name::{AppName, HostName},
        observed::InstanceKey,
        policy::{Policy, Request, judge},
        release::{Release, ReleaseKey},
        spec::Spec,
    },
};
use expect_test::expect_file;
use proptest::prelude::*;

const STRICT: &str = include_str!("../policy/strict.toml");
const OPEN: &str = include_str!("../policy/open.toml");

/// What each spec says besides, unless it says something else: all that the strict policy asks for.
const BASE: [(&str, &str); 7] = [
    ("image", "\"registry.example.com/web:v1\""),
    ("user", "\"1000:1000\""),
    ("cap_drop", "[ALL]"),
    ("security_opt", "[no-new-privileges]"),
    ("mem_limit", "64M"),
    ("cpus", "0.5"),
    ("pids_limit", "10"),
];

fn app(name: &str) -> AppName {
    AppName::try_from(name).expect("a name")
}

fn policies() -> [(&'static str, Policy); 3] {
    [
        ("none", Policy::built_in("web1", "policy.toml")),
        ("open", Policy::parse("web1", "open.toml", OPEN).expect("it is valid")),
        ("strict", Policy::parse("web1", "strict.toml", STRICT).expect("it is valid")),
    ]
}

/// What the two readings say of a spec: what the planner refuses, and what the request to Docker is refused for.
fn readings(policy: &Policy, app: &AppName, spec: &Spec) -> (Vec<String>, Vec<String>) {
    let host = HostName::try_from("web1").expect("a name");
    let image = spec.image.clone().expect("it has an image");
    let endpoint = spec.ingress.as_ref().map(|i| i.endpoint.clone());
    let (container, env) = (spec.container.clone(), spec.environment.clone());
    let release = Release::new(&ReleaseKey::new("key"), image, container, env, spec.health.clone(), endpoint, None);
    let planned = policy.refusals(app, &release, None).iter().map(ToString::to_string).collect();
    let dir = "/var/lib/demae/sockets/web/0123456789ab.1";
    let key = InstanceKey { release: release.id.clone(), number: 1 };
    let request = CreateRequest {
        app,
        key: &key,
        release: &release,
        image: "sha256:0123",
        socket_dir: Some(dir),
        port: None,
        own_address: None,
        shared_network: Some("demae"),
        drain: Duration::ZERO,
        more_ports: &[],
        real_paths: &BTreeMap::new(),
        check_host: None,
    };
    let body = create_body(&host, &request);
    let own_network = spec.container.network.is_none().then_some("demae");
    let request = Request { app, image: release.image.as_str(), body: &body, own_dir: Some(dir), own_network };
    (planned, judge(policy, request))
}

#[test]
fn hostile_specs_get_what_each_policy_allows() {
    let text = include_str!("../policy/specs.txt");
    let mut table = String::new();
    let mut specs = 0;
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let line = if line == "{}" { "" } else { line };
        let others = BASE.iter().filter(|(key, _)| !line.contains(&format!("{key}:")));
        let others: Vec<String> = others.map(|(key, value)| format!("{key}: {value}")).collect();
        let whole = format!("{{{}}}", others.into_iter().chain([line.to_owned()]).collect::<Vec<_>>().join(", "));
        let spec = Spec::parse(whole.as_bytes()).unwrap_or_else(|e| panic!("{whole}: {e}"));
        specs += 1;
        writeln!(table, "{line}").expect("a text");
        for (name, policy) in policies() {
            let (planned, judged) = readings(&policy, &app("web"), &spec);
            assert_eq!(planned.is_empty(), judged.is_empty(), "{line}\n{name}: {planned:#?}\n{judged:#?}");
            let hosts = policy.refused_hosts(&app("web"), spec.ingress.as_ref());
            let all: Vec<String> = planned.into_iter().chain(hosts.iter().map(|(_, why)| why.to_string())).collect();
            if all.is_empty() {
                writeln!(table, "  {name}: allowed").expect("a text");
            }
            for why in all {
                writeln!(table, "  {name}: {why}").expect("a text");
            }
        }
    }
    assert!(specs >= 60, "{specs} specs");
    expect_file![Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/policy.txt")].assert_eq(&table);
}

#[test]
fn rules_of_one_app_are_wider_or_narrower_for_it_alone() {
    let [_, _, (_, strict)] = policies();
    let spec = Spec::parse(
        b"{image: \"nginx:1\", user: \"1000:1000\", cap_drop: [ALL], security_opt: [no-new-privileges], mem_limit: 64M, \
          cpus: 1, pids_limit: 10, read_only: true, volumes: [\"/var/log:/logs:ro\"]}",
    )
    .expect("a spec");
    assert!(readings(&strict, &app("monitoring"), &spec).0.is_empty());
    assert_eq!(readings(&strict, &app("other"), &spec).0.len(), 1);
    let spec = Spec::parse(b"{image: \"nginx:1\", cap_add: [NET_BIND_SERVICE]}").expect("a spec");
    let why = |name: &str| readings(&strict, &app(name), &spec).0.into_iter().find(|why| why.contains("cap_add"));
    assert_eq!(why("web"), None);
    assert!(why("other").is_some_and(|why| why.contains("strict.toml:15")), "{:?}", why("other"));
}

#[test]
fn a_broken_file_of_rules_says_where() {
    for (text, part) in [
        ("[mounts]\nallow = [{path = 'srv', mode = 'rw'}]", "policy.toml:2: `mounts.allow`"),
        ("[mounts]\nallow = [{path = '/srv/*', mode = 'rw'}]", "`/srv/*` is not a plain absolute path"),
        ("[mounts]\nallow = [{path = '/srv/{host}', mode = 'rw'}]", "not a plain absolute path"),
        ("[containers]\n\nusers = ['1000-10']", "policy.toml:3: `containers.users`"),
        ("[containers]\nmax_memory = 'much'", "policy.toml:2: `containers.max_memory`"),
        ("[containers]\nmax_pids = 0", "policy.toml:2"),
        ("[images]\nregistries = ['a/[']", "policy.toml:2"),
        ("[images]\nregistries = ['*.example.com/*']", "cannot stand in the name of a server"),
        ("[images]\narchives = ['https://*.example.com/*']", "cannot stand in the name of a server"),
        ("[apps.Web]\ningress.hosts = ['a']", "app name `Web`"),
        ("[container]\nusers = []", "unknown field"),
        ("[apps.web]\ncontainers.caps = []", "unknown field"),
        ("mounts", "line 1"),
    ] {
        let error = Policy::parse("web1", "policy.toml", text).expect_err(text).to_string();
        assert!(error.contains(part), "{text}: {error}");
    }
}

/// A part of a policy or of a spec: chosen often enough to meet its counterpart.
fn some(parts: &'static [&'static str]) -> impl Strategy<Value = Option<&'static str>> {
    proptest::option::of(proptest::sample::select(parts))
}

fn any_policy() -> impl Strategy<Value = String> {
    let mounts = some(&[
        "allow = [{path = '/srv', mode = 'ro'}, {path = '/srv/web', mode = 'rw'}]",
        "allow = [{path = '/srv/{app}', mode = 'rw'}, {path = '/srv/{app}/ro', mode = 'ro'}]",
        "allow = [{path = '/', mode = 'ro'}]",
        "allow = []",
    ]);
    let volumes = some(&["volumes = 'own'", "volumes = 'none'", "volumes = 'any'"]);
    let containers = proptest::sample::subsequence(
        vec![
            "users = ['1-1000']",
            "cap_add = ['NET_ADMIN']",
            "cap_drop = ['NET_RAW']",
            "no_new_privileges = true",
            "read_only = true",
            "devices = ['/dev/*']",
            "sysctls = ['net.*']",
            "networks = ['a*']",
            "log_drivers = ['local']",
            "max_memory = '64M'",
            "max_cpus = 1.0",
            "max_pids = 10",
            "env_deny = ['A*']",
        ],
        0..=13,
    );
    let images = some(&["registries = ['docker.io/*']", "registries = ['r.example/*']", "require_digest = true"]);
    let own = some(&["cap_add = ['SYS_TIME']", "read_only = false", "max_pids = 100"]);
    (mounts, volumes, containers, images, own).prop_map(|(mounts, volumes, containers, images, own)| {
        let line = |part: Option<&str>| part.map(|part| format!("{part}\n")).unwrap_or_default();
        format!(
            "[mounts]\n{}{}[images]\n{}[containers]\n{}\n[apps.web.containers]\n{}",
            line(mounts),
            line(volumes),
            line(images),
            containers.join("\n"),
            line(own)
        )
    })
}

fn any_spec() -> impl Strategy<Value = String> {
    let keys = proptest::sample::subsequence(
        vec![
            "volumes: [\"/srv/web/ro/a:/a\", \"web_x:/b\"]",
            "user: \"1000:7\"",
            "group_add: [\"7\"]",
            "cap_add: [NET_ADMIN]",
            "cap_drop: [ALL]",
            "security_opt: [no-new-privileges]",
            "read_only: true",
            "devices: [\"/dev/fuse\"]",
            "sysctls: {net.a: \"1\"}",
            "network_mode: a1",
            "logging: {driver: local}",
            "mem_limit: 32M",
            "cpus: 0.5",
            "pids_limit: 50",
            "environment: {A: b}",
        ],
        0..=15,
    );
    let image = proptest::sample::select(vec!["web", "r.example/web:v1", "team/web", "web@sha256:00"]);
    let other = some(&[
        "volumes: [\"/srv/web:/a:ro\", \"other:/b\"]",
        "volumes: [\"/srv:/a:ro\"]",
        "volumes: [\"/etc:/a:ro\"]",
    ]);
    (keys, image, other).prop_map(|(mut keys, image, other)| {
        if let Some(other) = other {
            keys.retain(|key| !key.starts_with("volumes"));
            keys.push(other);
        }
        let rest: BTreeMap<&str, &str> = keys.iter().map(|key| (*key, "")).collect();
        let rest: Vec<&str> = rest.into_keys().collect();
        format!("{{image: \"{image}\"{}{}}}", if rest.is_empty() { "" } else { ", " }, rest.join(", "))
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4_000, ..ProptestConfig::default() })]

    #[test]
    fn both_readings_of_any_policy_agree_about_any_spec(policy in any_policy(), spec in any_spec()) {
        let read = Policy::parse("web1", "policy.toml", &policy).map_err(|e| TestCaseError::fail(e.to_string()))?;
        let parsed = Spec::parse(spec.as_bytes()).map_err(|e| TestCaseError::fail(format!("{spec}: {e}")))?;
        let (planned, judged) = readings(&read, &app("web"), &parsed);
        prop_assert_eq!(planned.is_empty(), judged.is_empty(), "{}\n{}\n{:#?}\n{:#?}", policy, spec, planned, judged);
    }
}
