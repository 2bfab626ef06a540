//! Specs: every text is parsed in bounded time, to a valid spec or to helpful problems. No spec can ask for more of its
//! host than specs may.

use std::{
    collections::BTreeMap,
    sync::LazyLock,
    time::{Duration, Instant},
};

use demae::{
    host::docker::{CreateRequest, create_body},
    model::{
        name::{AppName, HostName, ImageRef},
        observed::InstanceKey,
        policy::{Asked, BUILT_IN},
        problem::Problems,
        release::{Release, ReleaseKey},
        spec::{self, Spec},
        yaml,
    },
};
use serde_json::Value;

use super::is_control;

/// Time limit for one text, on a loaded machine and without optimisation. Quadratic parsing takes minutes.
const TIME_LIMIT: Duration = Duration::from_secs(20);
/// Total size of the problems of one text, in bytes. They are published, in values of at most 1.5 MiB.
const MAX_PROBLEMS: usize = 512 * 1024;
/// The socket directory that the agent mounts into the container.
const SOCKET_DIR: &str = "/var/lib/demae/sockets/web/0123456789ab.1";

static SCHEMA: LazyLock<Value> =
    LazyLock::new(|| serde_json::from_str(spec::SCHEMA).expect("the schema of a spec is JSON"));

/// Checks the spec parser.
pub fn check(bytes: &[u8]) {
    let begun = Instant::now();
    let read = Spec::parse(bytes);
    let took = begun.elapsed();
    assert!(took < TIME_LIMIT, "a text of {} bytes took {took:?}", bytes.len());
    assert!(read == Spec::parse(bytes), "the same text is read in two ways: {read:?}");
    match &read {
        Ok(spec) => {
            has_only_known_keys(bytes);
            durations_are_in_range(spec);
            if is_allowed(spec) {
                asks_for_nothing_denied(spec);
            }
        }
        Err(problems) => help(bytes, problems),
    }
}

/// Problems name the error and its place, and are safe to display.
fn help(bytes: &[u8], problems: &Problems) {
    assert!(!problems.is_empty(), "refused without a reason");
    let last = last_line(bytes);
    let (mut before, mut reported) = ((0, 0), 0);
    for problem in problems.iter() {
        let text = problem.to_string();
        assert!(!problem.message.trim().is_empty(), "a problem without a message: {problem:?}");
        assert!(problem.hint.as_ref().is_none_or(|h| !h.trim().is_empty()), "an empty hint: {problem:?}");
        assert!(!text.contains(is_control), "a terminal would interpret this: {text:?}");
        if bytes.len() <= yaml::MAX_TEXT {
            assert!((1..=last).contains(&problem.line), "there are {last} lines: {problem:?}");
            assert!(problem.column >= 1, "columns begin at 1: {problem:?}");
        } else {
            assert_eq!(problem.line, 0, "a place in a text that was not parsed: {problem:?}");
        }
        assert!(before <= (problem.line, problem.column), "not in the order of the text: {problems:?}");
        before = (problem.line, problem.column);
        reported += text.len();
    }
    assert!(reported <= MAX_PROBLEMS, "the problems of {} bytes come to {reported} bytes", bytes.len());
}

/// The number of the last line. YAML line breaks are CR, LF and CR LF.
fn last_line(bytes: &[u8]) -> usize {
    let is_break = |(i, b): (usize, &u8)| *b == b'\n' || (*b == b'\r' && bytes.get(i + 1) != Some(&b'\n'));
    let breaks = bytes.iter().enumerate().filter(|at| is_break(*at)).count();
    let is_open = !matches!(bytes.last(), Some(b'\n' | b'\r'));
    (breaks + usize::from(is_open)).max(1)
}

/// A parsed spec has no key that the schema forbids, and no part of the text was ignored.
fn has_only_known_keys(bytes: &[u8]) {
    assert!(bytes.len() <= yaml::MAX_TEXT, "{} bytes were read", bytes.len());
    assert!(!bytes.contains(&0), "the text after a NUL was ignored");
    let node = yaml::parse(bytes).expect("what is a spec is YAML");
    let mut unknown = Vec::new();
    walk(&node, &SCHEMA, true, &mut unknown);
    assert!(unknown.is_empty(), "the schema has no {unknown:?}");
    // Parse JSON a second time, with an independent parser.
    if let (Ok(Value::Object(json)), yaml::Value::Map(entries)) = (serde_json::from_slice::<Value>(bytes), &node.value)
    {
        let mut keys: Vec<&str> = entries.iter().map(|(key, _)| key.name.as_str()).collect();
        keys.sort_unstable();
        let mut others: Vec<&str> = json.keys().map(String::as_str).collect();
        others.sort_unstable();
        assert_eq!(keys, others, "as YAML and as JSON");
    }
}

/// Collects keys of closed mappings that the schema does not name.
fn walk(node: &yaml::Node, schema: &Value, is_top: bool, unknown: &mut Vec<String>) {
    let yaml::Value::Map(entries) = &node.value else { return };
    if schema["additionalProperties"] != Value::Bool(false) {
        return;
    }
    for (key, node) in entries {
        match schema["properties"].get(key.name.as_str()) {
            Some(schema) => walk(node, schema, false, unknown),
            None if is_top && key.name.starts_with("x-") => {}
            None => unknown.push(key.name.clone()),
        }
    }
}

/// Durations can be multiplied as in the agent, added to now, and passed to Docker, which takes nanoseconds in 63 bits.
fn durations_are_in_range(spec: &Spec) {
    let health = &spec.health;
    let forgiven = health.interval.checked_mul(health.retries).expect("the failures that are forgiven come to an end");
    let mut times = vec![health.interval, health.timeout, health.start_period, spec.container.stop_grace_period];
    for time in &times {
        assert!(i64::try_from(time.as_nanos()).is_ok(), "Docker cannot represent {time:?}");
    }
    times.extend([health.start_interval, health.deadline(), forgiven]);
    times.extend(spec.ingress.iter().flat_map(|i| [i.drain, i.read_timeout]));
    for time in times {
        assert!(Instant::now().checked_add(time).is_some(), "{time:?} from now is never");
    }
    assert!(spec.ingress.as_ref().is_none_or(|i| !i.hosts.is_empty() && i.read_timeout.as_secs() > 0), "{spec:?}");
    assert!(spec.deploy.replicas_per_host > 0 && health.retries > 0 && health.successes > 0, "{spec:?}");
}

/// Whether a host without a policy of its own runs it.
fn is_allowed(spec: &Spec) -> bool {
    let app = AppName::try_from("web").expect("a name");
    let (image, container, ingress) = (spec.image.as_ref(), &spec.container, spec.ingress.as_ref());
    BUILT_IN.refusals_of(Asked { app: &app, image, container, ingress }, spec.environment.keys()).is_empty()
}

/// The body of the create call holds what demae adds, and only allowed parts of the spec.
fn asks_for_nothing_denied(spec: &Spec) {
    let app = AppName::try_from("web").expect("a name");
    let host = HostName::try_from("web1").expect("a name");
    let image = spec.image.clone().unwrap_or_else(|| ImageRef::try_from("web:v1").expect("an image"));
    let release = Release::new(
        &ReleaseKey::new("key"),
        image,
        spec.container.clone(),
        spec.environment.clone(),
        spec.health.clone(),
        spec.ingress.as_ref().map(|i| i.endpoint.clone()),
        None,
    );
    let key = InstanceKey { release: release.id.clone(), number: 1 };
    let body = create_body(
        &host,
        &CreateRequest {
            app: &app,
            key: &key,
            release: &release,
            image: "sha256:0123",
            socket_dir: Some(SOCKET_DIR),
            port: Some(20_001),
            own_address: None,
            shared_network: Some("demae"),
            drain: spec.ingress.as_ref().map_or(Duration::ZERO, |i| i.drain),
            more_ports: &[],
            real_paths: &BTreeMap::new(),
            check_host: Some("a.example"),
        },
    );
    let denied = denied(&body);
    assert!(denied.is_empty(), "{denied:?} in {body}");
    let variables = list(&body["Env"]).count();
    assert_eq!(variables, spec.environment.len() + 4, "variables of the spec, and four of demae: {body}");
    assert!(
        body["Labels"]["demae.app"] == "web" && body["Labels"]["demae.host"] == "web1",
        "labels are missing: {body}"
    );
}

/// Allowed keys in the body of a create call.
const BODY: &[&str] = &[
    "Image",
    "Cmd",
    "Entrypoint",
    "User",
    "WorkingDir",
    "Env",
    "Labels",
    "ExposedPorts",
    "Healthcheck",
    "StopSignal",
    "StopTimeout",
    "Hostname",
    "HostConfig",
    "NetworkingConfig",
];
/// Allowed keys in its `HostConfig`. Not among them: privileges, devices, namespaces, sysctls.
const HOST_CONFIG: &[&str] = &[
    "Mounts",
    "PortBindings",
    "RestartPolicy",
    "LogConfig",
    "NetworkMode",
    "ExtraHosts",
    "Dns",
    "SecurityOpt",
    "ShmSize",
    "Ulimits",
    "CapDrop",
    "Tmpfs",
    "ReadonlyRootfs",
    "Init",
    "Memory",
    "NanoCpus",
    "PidsLimit",
];
/// Host directories below which apps may mount.
const MOUNTABLE: &[&str] = &["srv", "opt", "mnt", "media", "data", "home"];

/// Everything in the body of a create call that no spec may ask for. An allow list, so that new features of Docker are
/// denied.
pub fn denied(body: &Value) -> Vec<String> {
    let mut found = Vec::new();
    if body["Image"].as_str().is_none_or(str::is_empty) {
        found.push("no image".to_owned());
    }
    only(body, BODY, &mut found);
    let host = &body["HostConfig"];
    only(host, HOST_CONFIG, &mut found);
    only(&body["Healthcheck"], &["Test", "Interval", "Timeout", "Retries", "StartPeriod"], &mut found);
    for mount in list(&host["Mounts"]) {
        only(mount, &["Type", "Source", "Target", "ReadOnly"], &mut found);
        if !is_harmless(mount) {
            found.push(format!("mount {mount}"));
        }
    }
    for options in values(&host["Tmpfs"]) {
        if options != "" {
            found.push(format!("options {options} of a tmpfs"));
        }
    }
    for option in list(&host["SecurityOpt"]).filter(|option| *option != "no-new-privileges") {
        found.push(format!("security option {option}"));
    }
    let network = &host["NetworkMode"];
    if !network.is_null() && network.as_str().is_none_or(|n| n == "host" || n.contains([':', '/'])) {
        found.push(format!("network {network}"));
    }
    for (name, endpoint) in body["NetworkingConfig"]["EndpointsConfig"].as_object().into_iter().flatten() {
        only(endpoint, &["Aliases", "IPAMConfig"], &mut found);
        if host["NetworkMode"] != name.as_str() || endpoint["Aliases"] != serde_json::json!(["web"]) {
            found.push(format!("in network {name}: {endpoint}"));
        }
    }
    if host["RestartPolicy"]["Name"] != "no" {
        found.push(format!("restart policy {}", host["RestartPolicy"]));
    }
    for binding in values(&host["PortBindings"]).flat_map(list) {
        if binding["HostIp"] != "127.0.0.1" {
            found.push(format!("port {binding}"));
        }
    }
    let mut own = 0;
    for variable in list(&body["Env"]) {
        let text = variable.as_str().unwrap_or_default();
        let (name, value) = text.split_once('=').unwrap_or_default();
        own += usize::from(name.starts_with("DEMAE_"));
        if value.contains('\0') || !(super::is_variable(name) || name.starts_with("DEMAE_")) {
            found.push(format!("variable {variable}"));
        }
    }
    if own != 4 {
        found.push(format!("{own} variables of demae"));
    }
    found
}

fn only(value: &Value, allowed: &[&str], found: &mut Vec<String>) {
    for (key, _) in value.as_object().into_iter().flatten() {
        if !allowed.contains(&key.as_str()) {
            found.push(key.clone());
        }
    }
}

fn values(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_object().into_iter().flat_map(|o| o.values())
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn is_harmless(mount: &Value) -> bool {
    let text = |name: &str| mount[name].as_str().unwrap_or_default();
    let (source, target) = (text("Source"), text("Target"));
    let comes_from = match text("Type") {
        "bind" => source == SOCKET_DIR || is_mountable(source),
        // A name with a slash would be a path; `.` and `..` would be directories of Docker's.
        "volume" => !source.is_empty() && !source.contains('/') && !source.starts_with('.'),
        _ => false,
    };
    comes_from && parts(target).is_some()
}

fn is_mountable(path: &str) -> bool {
    !path.ends_with(".sock")
        && match parts(path).as_deref() {
            Some(["var", "www", _, ..]) => true,
            Some([top, _, ..]) => MOUNTABLE.contains(top),
            _ => false,
        }
}

/// The parts of an absolute path, other than the root, without `..`.
fn parts(path: &str) -> Option<Vec<&str>> {
    let parts: Vec<&str> = path.strip_prefix('/')?.split('/').collect();
    parts.iter().all(|p| !matches!(*p, "" | "." | "..") && !p.contains('\0')).then_some(parts)
}
