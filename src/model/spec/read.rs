//! From a tree with positions to a [`Spec`]: every key known, every value checked, every problem kept.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    ContainerSpec, Deploy, Endpoint, HealthCheck, Ingress, Logging, Order, Probe, Spec,
    values::{
        absolute, constraint, http_path, is_system_dir, nano_cpus, network, printable, pull_policy, signal, volume,
    },
};
use crate::model::{
    env::{self, Secret},
    name::{EnvName, SetName, VirtualHost},
    problem::{Problem, Problems, nearest},
    text,
    yaml::{self, Key, Node, Value},
};

/// Keys of each mapping of a spec, by its dotted path. The JSON Schema is held to this list by a test.
const KEYS: &[(&str, &[&str])] = &[
    (
        "",
        &[
            "image",
            "command",
            "entrypoint",
            "environment",
            "env_from",
            "volumes",
            "tmpfs",
            "user",
            "working_dir",
            "network_mode",
            "extra_hosts",
            "labels",
            "cap_drop",
            "read_only",
            "init",
            "logging",
            "healthcheck",
            "ingress",
            "stop_signal",
            "stop_grace_period",
            "pull_policy",
            "deploy",
        ],
    ),
    (
        "healthcheck",
        &[
            "http",
            "tcp",
            "test",
            "disable",
            "interval",
            "timeout",
            "retries",
            "start_period",
            "start_interval",
            "successes",
        ],
    ),
    ("ingress", &["hosts", "socket", "port", "drain", "template", "max_body_size", "read_timeout"]),
    ("logging", &["driver", "options"]),
    ("deploy", &["mode", "replicas_per_host", "placement", "resources", "update_config"]),
    ("deploy.placement", &["constraints"]),
    ("deploy.resources", &["limits"]),
    ("deploy.resources.limits", &["memory", "cpus", "pids"]),
    ("deploy.update_config", &["parallelism", "order", "monitor", "failure_action"]),
];

/// Keys that Compose knows and a host cannot use, each with what to do instead.
const NOT_HERE: &[(&str, &str)] = &[
    ("build", "build the image elsewhere and name it in `image`"),
    ("ports", "use `ingress.port`; nginx is the way in"),
    ("expose", "use `ingress.port`"),
    ("restart", "leave it out; a proven instance is always restarted"),
    ("container_name", "leave it out; two releases run side by side, so names are demae's"),
    ("depends_on", "leave it out; make the app wait for what it needs"),
    ("env_file", "put the variables under `env/<app>/` in etcd, or use `env_from`"),
    ("networks", "use `network_mode` with the name of a network that exists"),
    ("secrets", "put them under `env/<app>/` in etcd"),
    ("configs", "mount a file with `volumes`"),
    ("privileged", "no app gets the rights of its host"),
    ("cap_add", "no app gets more rights than Docker's default"),
    ("devices", "no app gets the devices of its host"),
    ("pid", "no app gets the namespaces of its host"),
    ("ipc", "no app gets the namespaces of its host"),
    ("security_opt", "the engine's default profile stays on"),
    ("replicas", "use `replicas_per_host`; a count over all hosts needs a scheduler"),
    ("release_command", "run it by hand before the deploy; once per release for the whole fleet cannot be held yet"),
    ("reservations", "use `limits`"),
    ("restart_policy", "leave it out; a proven instance is always restarted"),
    ("rollback_config", "leave it out; the old instances keep serving until the new ones are proven"),
];

/// Most problems of one text that are told. They are published, and a store takes values of 1.5 MiB.
const MOST_PROBLEMS: usize = 100;

pub(super) fn spec(text: &[u8]) -> Result<Spec, Problems> {
    let node = yaml::parse(text)?;
    let mut reader = Reader { problems: Problems::default() };
    let spec = reader.spec(&node);
    if reader.problems.is_empty() { Ok(spec) } else { Err(reader.problems.sorted().first(MOST_PROBLEMS)) }
}

struct Reader {
    problems: Problems,
}

/// The entries of one mapping, asked for by name.
struct Fields<'n> {
    path: &'static str,
    entries: &'n [(Key, Node)],
}

impl<'n> Fields<'n> {
    fn get(&self, name: &str) -> Option<&'n Node> {
        self.entries.iter().find(|(k, _)| k.name == name).map(|(_, n)| n).filter(|n| n.value != Value::Null)
    }

    fn key(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }
}

impl Reader {
    fn problem(&mut self, key: impl Into<String>, node: &Node, message: impl Into<String>) {
        self.problems.push(Problem::new(key, message).at(node.line, node.column));
    }

    /// The mapping at `path`, after its keys have been checked.
    fn fields<'n>(&mut self, path: &'static str, node: &'n Node) -> Fields<'n> {
        let Value::Map(entries) = &node.value else {
            let message = format!("a mapping is wanted here, this is {}", node.value.kind());
            self.problem(path, node, message);
            return Fields { path, entries: &[] };
        };
        let known = KEYS.iter().find(|(p, _)| *p == path).map_or(&[][..], |(_, keys)| keys);
        let fields = Fields { path, entries };
        for (key, _) in entries {
            if known.contains(&key.name.as_str()) || (path.is_empty() && key.name.starts_with("x-")) {
                continue;
            }
            let mut problem = match NOT_HERE.iter().find(|(k, _)| *k == key.name) {
                Some((_, instead)) => Problem::new(fields.key(&key.name), "this key is not supported").hint(*instead),
                None => Problem::new(fields.key(&key.name), "unknown key"),
            };
            if problem.hint.is_none() {
                problem.hint = nearest(&key.name, known.iter().copied()).map(|k| format!("did you mean `{k}`?"));
            }
            self.problems.push(problem.at(key.line, key.column));
        }
        fields
    }

    /// The text of a scalar at `key`.
    fn text<'n>(&mut self, key: &str, node: &'n Node) -> Option<&'n str> {
        match &node.value {
            Value::Scalar { text, .. } => Some(text),
            other => {
                let message = format!("a single value is wanted here, this is {}", other.kind());
                self.problem(key, node, message);
                None
            }
        }
    }

    /// A scalar read by `read`; on a mistake a problem is kept and the answer is `None`.
    fn read<T, E: ToString>(
        &mut self,
        fields: &Fields<'_>,
        name: &str,
        read: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<T> {
        let node = fields.get(name)?;
        let key = fields.key(name);
        let text = self.text(&key, node)?;
        read(text).map_err(|e| self.problem(key, node, e.to_string())).ok()
    }

    fn string(&mut self, fields: &Fields<'_>, name: &str) -> Option<String> {
        self.read(fields, name, |t| printable(t).map(str::to_owned))
    }

    fn boolean(&mut self, fields: &Fields<'_>, name: &str) -> Option<bool> {
        self.read(fields, name, |t| match t {
            "true" => Ok(true),
            "false" => Ok(false),
            other => Err(format!("`{other}` is neither `true` nor `false`")),
        })
    }

    fn number(&mut self, fields: &Fields<'_>, name: &str, least: u32, most: u32) -> Option<u32> {
        self.read(fields, name, |t| match t.parse::<u32>() {
            Ok(n) if (least..=most).contains(&n) => Ok(n),
            _ => Err(format!("`{t}` is not a whole number from {least} to {most}")),
        })
    }

    fn list<'n>(&mut self, fields: &Fields<'n>, name: &str) -> &'n [Node] {
        match fields.get(name) {
            None => &[],
            Some(Node { value: Value::Seq(items), .. }) => items,
            Some(node) => {
                let message = format!("a list is wanted here, this is {}", node.value.kind());
                self.problem(fields.key(name), node, message);
                &[]
            }
        }
    }

    /// A list of scalars, each read by `read`.
    fn items<T, E: ToString>(
        &mut self,
        fields: &Fields<'_>,
        name: &str,
        read: impl Fn(&str) -> Result<T, E>,
    ) -> Vec<T> {
        let mut out = Vec::new();
        for (i, node) in self.list(fields, name).iter().enumerate() {
            let key = format!("{}[{i}]", fields.key(name));
            if let Some(text) = self.text(&key, node) {
                match read(text) {
                    Ok(value) => out.push(value),
                    Err(e) => self.problem(key, node, e.to_string()),
                }
            }
        }
        out
    }

    /// A mapping or a list of `name=value`, as Compose allows for `environment` and `labels`.
    fn pairs(&mut self, fields: &Fields<'_>, name: &str) -> Vec<(String, String, Node)> {
        let Some(node) = fields.get(name) else { return Vec::new() };
        let mut out = Vec::new();
        match &node.value {
            Value::Map(entries) => {
                for (key, value) in entries {
                    let path = format!("{}.{}", fields.key(name), key.name);
                    if value.value == Value::Null {
                        self.problem(path, value, "there is no value; write `\"\"` for an empty one");
                    } else if let Some(text) = self.text(&path, value) {
                        let at = Node { line: key.line, column: key.column, value: Value::Null };
                        out.push((key.name.clone(), text.to_owned(), at));
                    }
                }
            }
            Value::Seq(items) => {
                for (i, item) in items.iter().enumerate() {
                    let path = format!("{}[{i}]", fields.key(name));
                    match self.text(&path, item).map(|t| t.split_once('=')) {
                        Some(Some((key, value))) => out.push((key.to_owned(), value.to_owned(), item.clone())),
                        Some(None) => self.problem(path, item, "write it as `NAME=value`"),
                        None => {}
                    }
                }
            }
            other => {
                let message = format!("a mapping or a list is wanted here, this is {}", other.kind());
                self.problem(fields.key(name), node, message);
            }
        }
        out
    }

    /// A command: a list of words, or one text that is split into words.
    fn command(&mut self, fields: &Fields<'_>, name: &str) -> Option<Vec<String>> {
        match fields.get(name)?.value {
            Value::Seq(_) => Some(self.items(fields, name, |t| Ok::<_, String>(t.to_owned()))),
            _ => self.read(fields, name, text::words),
        }
    }

    fn spec(&mut self, node: &Node) -> Spec {
        let f = self.fields("", node);
        let ingress = f.get("ingress").map(|n| self.ingress(n));
        let health = self.health(&f, ingress.as_ref());
        let (deploy, memory, nano_cpus, pids) = self.deploy(&f);
        let container = ContainerSpec {
            command: self.command(&f, "command"),
            entrypoint: self.command(&f, "entrypoint"),
            user: self.string(&f, "user"),
            working_dir: self.read(&f, "working_dir", |t| absolute(t).map(str::to_owned)),
            volumes: self.items(&f, "volumes", volume),
            tmpfs: self.items(&f, "tmpfs", |t| absolute(t).map(str::to_owned)),
            network: self.read(&f, "network_mode", network).flatten(),
            extra_hosts: self.items(&f, "extra_hosts", |t| printable(t).map(str::to_owned)),
            labels: self.labels(&f),
            cap_drop: self.items(&f, "cap_drop", |t| printable(t).map(str::to_owned)),
            read_only: self.boolean(&f, "read_only").unwrap_or(false),
            init: self.boolean(&f, "init").unwrap_or(true),
            memory,
            nano_cpus,
            pids,
            logging: f.get("logging").map(|n| self.logging(n)),
            stop_signal: self.read(&f, "stop_signal", signal),
            stop_grace_period: self
                .read(&f, "stop_grace_period", text::duration)
                .unwrap_or(std::time::Duration::from_secs(10)),
        };
        if let (Some(Ingress { endpoint: Endpoint::Port(_), .. }), Some("none"), Some(n)) =
            (&ingress, container.network.as_deref(), f.get("network_mode"))
        {
            self.problem(
                "network_mode",
                n,
                "an app with `ingress.port` needs a network; use `ingress.socket` or `bridge`",
            );
        }
        Spec {
            image: self.read(&f, "image", |t| t.try_into()),
            container,
            environment: self.environment(&f),
            env_from: self.items(&f, "env_from", |t| SetName::try_from(t)),
            health,
            ingress,
            pull_policy: self.read(&f, "pull_policy", pull_policy).unwrap_or_default(),
            deploy,
        }
    }

    fn environment(&mut self, f: &Fields<'_>) -> BTreeMap<EnvName, Secret> {
        let mut out = BTreeMap::new();
        for (name, value, node) in self.pairs(f, "environment") {
            let key = format!("environment.{name}");
            match EnvName::try_from(name.as_str()).map_err(|e| e.to_string()) {
                Ok(env_name) => match env::check_value(&name, &value) {
                    Ok(()) => {
                        out.insert(env_name, Secret::new(value));
                    }
                    Err(e) => self.problem(key, &node, e),
                },
                Err(e) => self.problem("environment", &node, e),
            }
        }
        out
    }

    fn labels(&mut self, f: &Fields<'_>) -> BTreeMap<String, String> {
        let mut out = BTreeMap::new();
        for (name, value, node) in self.pairs(f, "labels") {
            if name.is_empty() || name.starts_with("demae.") || printable(&name).is_err() {
                self.problem(
                    "labels",
                    &node,
                    format!("`{}` cannot be a label here; `demae.…` is demae's own", name.escape_debug()),
                );
            } else {
                out.insert(name, value);
            }
        }
        out
    }

    fn logging(&mut self, node: &Node) -> Logging {
        let f = self.fields("logging", node);
        let driver = self.string(&f, "driver").unwrap_or_else(|| "json-file".to_owned());
        let options = self.pairs(&f, "options").into_iter().map(|(k, v, _)| (k, v)).collect();
        Logging { driver, options }
    }

    fn ingress(&mut self, node: &Node) -> Ingress {
        let f = self.fields("ingress", node);
        let mut hosts: Vec<VirtualHost> = Vec::new();
        // A set beside the list: a text has room for fifty thousand hosts.
        let mut seen = BTreeSet::new();
        for host in self.items(&f, "hosts", |t| VirtualHost::try_from(t)) {
            if seen.insert(host.clone()) {
                hosts.push(host);
            } else {
                self.problem("ingress.hosts", node, format!("`{host}` stands twice"));
            }
        }
        if self.list(&f, "hosts").is_empty() {
            self.problem("ingress.hosts", node, "name at least one virtual host");
        }
        let socket = self.read(&f, "socket", |t| {
            let path = absolute(t)?;
            let dir = path.rsplit_once('/').map_or("", |(dir, _)| dir);
            if dir.is_empty() || is_system_dir(dir) || path.len() > 100 {
                return Err(format!(
                    "`{path}` cannot be the socket: its directory is mounted from the host, so give it one of its own, such as `/run/app/web.sock`"
                ));
            }
            Ok(path.to_owned())
        });
        let port = self.number(&f, "port", 1, 65535);
        let endpoint = match (socket, port) {
            (Some(path), None) => Endpoint::Socket(path),
            (None, Some(port)) => Endpoint::Port(u16::try_from(port).unwrap_or(1)),
            (Some(_), Some(_)) => {
                self.problem("ingress", node, "give `socket` or `port`, not both");
                Endpoint::Port(1)
            }
            (None, None) => {
                if f.get("socket").is_none() && f.get("port").is_none() {
                    self.problem(
                        "ingress",
                        node,
                        "say where the app listens: `socket: /run/app/web.sock` or `port: 8080`",
                    );
                }
                Endpoint::Port(1)
            }
        };
        Ingress {
            hosts,
            endpoint,
            drain: self.read(&f, "drain", text::duration).unwrap_or(std::time::Duration::from_secs(30)),
            template: self.read(&f, "template", |t| t.try_into()),
            max_body_size: self.read(&f, "max_body_size", text::size).unwrap_or(1024 * 1024),
            read_timeout: self
                .read(&f, "read_timeout", |t| match text::duration(t)? {
                    d if d.as_secs() >= 1 => Ok(d),
                    _ => Err("at least `1s` is needed".to_owned()),
                })
                .unwrap_or(std::time::Duration::from_secs(60)),
        }
    }

    fn health(&mut self, top: &Fields<'_>, ingress: Option<&Ingress>) -> HealthCheck {
        let fallback = if ingress.is_some() { Probe::Tcp } else { Probe::Running };
        let default = HealthCheck { probe: fallback, ..HealthCheck::default() };
        let Some(node) = top.get("healthcheck") else { return default };
        let f = self.fields("healthcheck", node);
        let mut probes = Vec::new();
        if let Some(path) = self.read(&f, "http", http_path) {
            probes.push(Probe::Http(path));
        }
        if self.boolean(&f, "tcp") == Some(true) {
            probes.push(Probe::Tcp);
        }
        if let Some(test) = self.test(&f) {
            probes.push(test);
        }
        if self.boolean(&f, "disable") == Some(true) {
            probes.push(Probe::Running);
        }
        if probes.len() > 1 {
            self.problem("healthcheck", node, "give one of `http`, `tcp`, `test` and `disable`");
        }
        let probe = probes.pop().unwrap_or(default.probe);
        if ingress.is_none() && matches!(probe, Probe::Http(_) | Probe::Tcp) {
            self.problem(
                "healthcheck",
                node,
                "`http` and `tcp` ask where the traffic goes, and there is no `ingress`; use `test`",
            );
        }
        let at_least = |least: u64, what: &'static str| {
            move |t: &str| match text::duration(t) {
                Ok(d) if d.as_millis() < u128::from(least) => Err(format!("at least `{what}` is needed")),
                other => other,
            }
        };
        HealthCheck {
            probe,
            interval: self.read(&f, "interval", at_least(100, "100ms")).unwrap_or(default.interval),
            timeout: self.read(&f, "timeout", at_least(1, "1ms")).unwrap_or(default.timeout),
            retries: self.number(&f, "retries", 1, 1000).unwrap_or(default.retries),
            start_period: self.read(&f, "start_period", text::duration).unwrap_or(default.start_period),
            start_interval: self.read(&f, "start_interval", at_least(1, "1ms")).unwrap_or(default.start_interval),
            successes: self.number(&f, "successes", 1, 100).unwrap_or(default.successes),
        }
    }

    /// Compose's `test`: `[CMD, …]`, `[CMD-SHELL, …]`, `[NONE]`, or one text for a shell.
    fn test(&mut self, f: &Fields<'_>) -> Option<Probe> {
        let node = f.get("test")?;
        if let Value::Seq(_) = node.value {
            let words = self.items(f, "test", |t| Ok::<_, String>(t.to_owned()));
            return match words.first().map(String::as_str) {
                Some("NONE") => Some(Probe::Running),
                Some("CMD" | "CMD-SHELL") if words.len() > 1 => Some(Probe::Command(words)),
                _ => {
                    self.problem("healthcheck.test", node, "begin the list with `CMD`, `CMD-SHELL` or `NONE`");
                    None
                }
            };
        }
        let text = self.text("healthcheck.test", node)?;
        Some(Probe::Command(vec!["CMD-SHELL".to_owned(), text.to_owned()]))
    }

    fn deploy(&mut self, top: &Fields<'_>) -> (Deploy, Option<i64>, Option<i64>, Option<i64>) {
        let mut deploy = Deploy::default();
        let (mut memory, mut cpus, mut pids) = (None, None, None);
        let Some(node) = top.get("deploy") else { return (deploy, memory, cpus, pids) };
        let f = self.fields("deploy", node);
        self.read(&f, "mode", |t| match t {
            "global" => Ok(()),
            "replicated" => {
                Err("`replicated` needs a scheduler, which does not exist yet; use `global` with constraints"
                    .to_owned())
            }
            other => Err(format!("`{other}` is not a mode; use `global`")),
        });
        if let Some(n) = self.number(&f, "replicas_per_host", 1, 100) {
            deploy.replicas_per_host = u16::try_from(n).unwrap_or(1);
        }
        if let Some(node) = f.get("placement") {
            let placement = self.fields("deploy.placement", node);
            deploy.constraints = self.items(&placement, "constraints", constraint);
        }
        if let Some(node) = f.get("resources") {
            let resources = self.fields("deploy.resources", node);
            if let Some(node) = resources.get("limits") {
                let limits = self.fields("deploy.resources.limits", node);
                memory = self.read(&limits, "memory", |t| match text::size(t)? {
                    // Docker's own minimum.
                    bytes if bytes < 6 * 1024 * 1024 => Err("Docker needs at least `6M`".to_owned()),
                    bytes => i64::try_from(bytes).map_err(|_| "this is too much".to_owned()),
                });
                cpus = self.read(&limits, "cpus", nano_cpus);
                pids = self.number(&limits, "pids", 1, 4_194_304).map(i64::from);
            }
        }
        if let Some(node) = f.get("update_config") {
            let update = self.fields("deploy.update_config", node);
            if let Some(order) = self.read(&update, "order", |t| match t {
                "start-first" => Ok(Order::StartFirst),
                "stop-first" => Ok(Order::StopFirst),
                other => Err(format!("`{other}` is not an order; use `start-first` or `stop-first`")),
            }) {
                deploy.order = order;
            }
            self.number(&update, "parallelism", 0, 100_000);
            self.read(&update, "monitor", text::duration);
            self.read(&update, "failure_action", |t| match t {
                "rollback" | "pause" => Ok(()),
                other => Err(format!("`{other}` is not a failure action; use `rollback` or `pause`")),
            });
        }
        (deploy, memory, cpus, pids)
    }
}

#[cfg(test)]
#[path = "read_tests.rs"]
mod tests;
