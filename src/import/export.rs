//! An app as a service of Compose, or as a `docker run` command: the way out.

use super::{
    Effect, Note,
    service::VERBATIM,
    tree::{entries, get, items, list, map, scalar, text, write},
};
use crate::model::{
    name::AppName,
    spec::{Endpoint, Probe, Spec, VolumeSource},
    yaml::{Node, Value},
};

/// Further keys that are the same in both.
const SAME: &[&str] = &["environment", "labels", "security_opt", "tmpfs", "volumes"];

/// What an app is exported from.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// Its name.
    pub app: &'a AppName,
    /// The spec, as a tree.
    pub tree: &'a Node,
    /// The same, checked.
    pub spec: &'a Spec,
    /// The image that it runs.
    pub image: &'a str,
    /// Whether it has variables beside those of its spec.
    pub has_variables: bool,
}

/// A Compose file with one service, and what differs.
pub fn to_compose(source: Source<'_>) -> (String, Vec<Note>) {
    let Source { app, tree, spec, image, has_variables } = source;
    let mut notes = Notes::default();
    let mut service: Vec<(String, Node)> = vec![("image".to_owned(), scalar(image))];
    for (key, node) in entries(tree) {
        let name = key.name.as_str();
        if VERBATIM.contains(&name) || SAME.contains(&name) {
            service.push((name.to_owned(), node.clone()));
        }
    }
    if get(tree, "restart").is_none() {
        service.push(("restart".to_owned(), scalar("unless-stopped")));
    }
    if has_variables {
        service.push(("env_file".to_owned(), list(vec![scalar(format!("{app}.env"))])));
        notes.add(
            "env",
            Effect::Changed,
            format!("`demae export {app} --format env > {app}.env` writes its variables"),
        );
    }
    let ports = ports(spec, &mut notes);
    if !ports.is_empty() {
        service.push(("ports".to_owned(), list(ports.iter().map(|p| scalar(format!("127.0.0.1:{p}:{p}"))).collect())));
    }
    service.extend(health(tree, spec, ports.first(), &mut notes).map(|check| ("healthcheck".to_owned(), check)));
    service.extend(deploy(tree, &mut notes).map(|deploy| ("deploy".to_owned(), deploy)));
    if spec.release_command.is_some() {
        notes.add("release_command", Effect::Dropped, "run it by hand before each release");
    }
    let named = spec.container.volumes.iter().filter_map(|volume| match &volume.source {
        VolumeSource::Named(name) => Some((name.clone(), map([("external", scalar("true"))]))),
        VolumeSource::Host(_) => None,
    });
    let named: Vec<(String, Node)> = named.collect();
    let mut file = vec![("services", map([(app.as_str(), map(service))]))];
    if !named.is_empty() {
        file.push(("volumes", map(named)));
    }
    let mut out: String = notes.0.iter().map(|note| format!("# {note}\n")).collect();
    out.push_str(&write(&escaped(&map(file))));
    (out, notes.0)
}

/// A `docker run` command, and what differs.
pub fn to_run(source: Source<'_>) -> (String, Vec<Note>) {
    let Source { app, tree, spec, image, has_variables } = source;
    let mut notes = Notes::default();
    let c = &spec.container;
    let mut words: Vec<String> =
        ["docker", "run", "--detach", "--restart", "unless-stopped"].map(String::from).to_vec();
    let mut option = |name: &str, value: &str| words.extend([format!("--{name}"), value.to_owned()]);
    option("name", app.as_str());
    if has_variables {
        option("env-file", &format!("{app}.env"));
        notes.add(
            "env",
            Effect::Changed,
            format!("`demae env export {app} --format docker > {app}.env` writes its variables"),
        );
    } else {
        for (name, value) in &spec.environment {
            option("env", &format!("{name}={}", value.expose()));
        }
    }
    for port in ports(spec, &mut notes) {
        option("publish", &format!("127.0.0.1:{port}:{port}"));
    }
    for volume in get(tree, "volumes").map(items).unwrap_or_default().into_iter().filter_map(text) {
        option("volume", volume);
    }
    for (name, values) in [
        ("tmpfs", &c.tmpfs),
        ("add-host", &c.extra_hosts),
        ("dns", &c.dns),
        ("group-add", &c.group_add),
        ("cap-add", &c.cap_add),
        ("cap-drop", &c.cap_drop),
        ("device", &c.devices.iter().map(ToString::to_string).collect()),
        ("sysctl", &c.sysctls.iter().map(|(name, value)| format!("{name}={value}")).collect()),
    ] {
        for value in values {
            option(name, value);
        }
    }
    let numbers = [("memory", c.memory), ("shm-size", c.shm_size), ("pids-limit", c.pids)];
    for (name, number) in numbers {
        if let Some(number) = number {
            option(name, &number.to_string());
        }
    }
    if let Some(nano) = c.nano_cpus {
        option("cpus", &format!("{}.{:03}", nano / 1_000_000_000, nano % 1_000_000_000 / 1_000_000));
    }
    let texts = [
        ("user", &c.user),
        ("workdir", &c.working_dir),
        ("hostname", &c.hostname),
        ("network", &c.network),
        ("stop-signal", &c.stop_signal),
    ];
    for (name, value) in texts {
        if let Some(value) = value {
            option(name, value);
        }
    }
    for (name, limit) in &c.ulimits {
        option("ulimit", &format!("{name}={}:{}", limit.soft, limit.hard));
    }
    for (name, value) in &c.labels {
        option("label", &format!("{name}={value}"));
    }
    if let Some(logging) = &c.logging {
        option("log-driver", &logging.driver);
        for (name, value) in &logging.options {
            option("log-opt", &format!("{name}={value}"));
        }
    }
    if c.no_new_privileges {
        option("security-opt", "no-new-privileges");
    }
    option("stop-timeout", &c.stop_grace_period.as_secs().to_string());
    // The first word is the program; the rest goes before the command.
    let (program, first) = match c.entrypoint.as_deref() {
        Some([program, rest @ ..]) => (Some(program), rest),
        _ => (None, &[][..]),
    };
    if let Some(program) = program {
        option("entrypoint", program);
    }
    if c.init {
        words.push("--init".to_owned());
    }
    if c.read_only {
        words.push("--read-only".to_owned());
    }
    words.push(image.to_owned());
    words.extend(first.iter().chain(c.command.iter().flatten()).cloned());
    if !matches!(spec.health.probe, Probe::Running) {
        notes.add("healthcheck", Effect::Dropped, "add one by `--health-cmd`");
    }
    let line: Vec<String> = words.iter().map(|word| quoted(word)).collect();
    (line.join(" "), notes.0)
}

#[derive(Default)]
struct Notes(Vec<Note>);

impl Notes {
    fn add(&mut self, key: &str, effect: Effect, message: impl Into<String>) {
        self.0.push(Note { line: 0, key: key.to_owned(), effect, message: message.into() });
    }
}

/// The ports that requests come to.
fn ports(spec: &Spec, notes: &mut Notes) -> Vec<u16> {
    let Some(ingress) = &spec.ingress else { return Vec::new() };
    let mut ports = Vec::new();
    for way in ingress.all() {
        let hosts: Vec<&str> = way.hosts.iter().map(crate::model::name::VirtualHost::as_str).collect();
        let hosts = hosts.join(", ");
        match &way.endpoint {
            Endpoint::Port(port) => {
                notes.add("ingress", Effect::Changed, format!("nginx is to forward {hosts} to 127.0.0.1:{port}"));
                if !ports.contains(port) {
                    ports.push(*port);
                }
            }
            Endpoint::Socket(path) => {
                let message =
                    format!("nginx is to forward {hosts} to the socket `{path}`: mount its directory from the host");
                notes.add("ingress", Effect::Changed, message);
            }
        }
    }
    ports
}

fn health(tree: &Node, spec: &Spec, port: Option<&u16>, notes: &mut Notes) -> Option<Node> {
    let given = get(tree, "healthcheck")?;
    let mut out: Vec<(String, Node)> = Vec::new();
    for (key, value) in entries(given) {
        match (key.name.as_str(), &spec.health.probe, port) {
            ("test" | "disable" | "interval" | "timeout" | "retries" | "start_period" | "start_interval", ..) => {
                out.push((key.name.clone(), value.clone()));
            }
            ("http", Probe::Http(path), Some(port)) => {
                let url = format!("http://127.0.0.1:{port}{path}");
                out.push(("test".to_owned(), list(["CMD", "wget", "-qO-", &url].map(scalar).to_vec())));
                notes.add("healthcheck.http", Effect::Changed, "the image needs `wget` for it");
            }
            (other, ..) => {
                notes.add(
                    &format!("healthcheck.{other}"),
                    Effect::Dropped,
                    "Compose asks a command in the container only",
                );
            }
        }
    }
    let has_test = out.iter().any(|(name, _)| name == "test" || name == "disable");
    has_test.then(|| map(out))
}

fn deploy(tree: &Node, notes: &mut Notes) -> Option<Node> {
    let mut out: Vec<(String, Node)> = Vec::new();
    for (key, value) in entries(get(tree, "deploy")?) {
        match key.name.as_str() {
            "resources" | "restart_policy" => out.push((key.name.clone(), value.clone())),
            "replicas_per_host" => out.push(("replicas".to_owned(), value.clone())),
            "placement" => {
                let constraints = get(value, "constraints").map(items).unwrap_or_default().into_iter().filter_map(text);
                let constraints = constraints.map(|text| scalar(format!("node.labels.{text}"))).collect();
                out.push(("placement".to_owned(), map([("constraints", list(constraints))])));
            }
            "update_config" => {
                let order = get(value, "order").map(|order| map([("order", order.clone())]));
                out.extend(order.map(|order| ("update_config".to_owned(), order)));
                for (key, _) in entries(value).iter().filter(|(key, _)| key.name != "order") {
                    notes.add(
                        &format!("deploy.update_config.{}", key.name),
                        Effect::Dropped,
                        "Compose runs on one host",
                    );
                }
            }
            _ => {}
        }
    }
    (!out.is_empty()).then(|| map(out))
}

/// With each `$` doubled, which Compose takes for a variable otherwise.
fn escaped(node: &Node) -> Node {
    match &node.value {
        Value::Scalar { text, .. } => scalar(text.replace('$', "$$")),
        Value::Seq(items) => list(items.iter().map(escaped).collect()),
        Value::Map(entries) => map(entries.iter().map(|(key, value)| (key.name.clone(), escaped(value)))),
        Value::Null => node.clone(),
    }
}

/// A word for a shell.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_-./:=@,+%".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}
