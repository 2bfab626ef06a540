//! Parses a tree with positions into a [`Spec`]: every key known, every value checked, every problem reported.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    Amount, ContainerSpec, Deploy, Endpoint, FailureAction, HealthCheck, Ingress, Logging, Order, Probe, Spec, Update,
    fields::{Fields, Reader},
    update::ratio,
    values::{
        self, absolute, capability, constraint, device, host_header, http_path, is_system_dir, nano_cpus, network,
        printable, pull_policy, signal, volume,
    },
};
use crate::model::{
    env::{self, Secret},
    name::{EnvName, SetName, UrlPath, VirtualHost},
    problem::Problems,
    proxy::RESPONSE_HEADER_SIZE,
    text,
    yaml::{self, Node, Value},
};

/// Default limit of a request body, in bytes. nginx's own 1 MiB refuses a photo; without a limit one client could fill
/// nginx's disk.
const MAX_BODY_SIZE: u64 = 100 * 1024 * 1024;
/// Most bytes of labels, and of a health check command: both are labels of the container.
const MOST_LABELS: usize = 16 * 1024;
const MOST_TEST: usize = 4 * 1024;
/// Most ingresses of one app.
const MOST_INGRESSES: usize = 16;
/// Most virtual hosts of one app: each costs nginx memory and reload time.
const MOST_HOSTS: usize = 1000;

pub(super) fn spec(text: &[u8]) -> Result<Spec, Problems> {
    let node = yaml::parse(text)?;
    let mut reader = Reader { problems: Problems::default() };
    let spec = reader.spec(&node);
    if reader.problems.is_empty() { Ok(spec) } else { Err(reader.problems.sorted().bounded()) }
}

impl Reader {
    fn spec(&mut self, node: &Node) -> Spec {
        let f = self.fields("", node);
        let ingress = f.get("ingress").and_then(|n| self.ingresses(n));
        let health = self.health(&f, ingress.as_ref());
        let (deploy, memory, nano_cpus, pids) = self.deploy(&f);
        let (memory, nano_cpus, pids) = self.short_limits(&f, (memory, nano_cpus, pids));
        self.without_effect(&f);
        let container = ContainerSpec {
            command: self.command(&f, "command"),
            entrypoint: self.command(&f, "entrypoint"),
            user: self.string(&f, "user"),
            working_dir: self.read(&f, "working_dir", |t| absolute(t).map(str::to_owned)),
            volumes: self.items(&f, "volumes", volume),
            tmpfs: self.tmpfs(&f),
            network: self.read(&f, "network_mode", network).flatten(),
            extra_hosts: self.extra_hosts(&f),
            hostname: self.hostname(&f),
            dns: self.dns(&f),
            group_add: self.items(&f, "group_add", |t| printable(t).map(str::to_owned)),
            no_new_privileges: self.no_new_privileges(&f),
            shm_size: self.shm_size(&f),
            ulimits: self.ulimits(&f),
            labels: self.labels(&f),
            cap_add: self.items(&f, "cap_add", capability),
            devices: self.items(&f, "devices", device),
            sysctls: self.sysctls(&f),
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
        if let (Some(Ingress { endpoint: Endpoint::Port(_), .. }), Some("host"), Some(n)) =
            (&ingress, container.network.as_deref(), f.get("network_mode"))
        {
            let message = "two releases cannot listen on one port of the host at once; use `ingress.socket`";
            self.problem("network_mode", n, message);
        }
        let release_command = self.command(&f, "release_command");
        if let (Some(_), false, Some(n)) = (&release_command, deploy.update.is_paced(), f.get("release_command")) {
            self.problem("release_command", n, "without turns each host would run it; leave out `parallelism: 0`");
        }
        Spec {
            release_command,
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
        // Docker returns them with each list of containers.
        let bytes: usize = out.iter().map(|(name, value)| name.len() + value.len()).sum();
        if let (true, Some(node)) = (bytes > MOST_LABELS, f.get("labels")) {
            self.problem("labels", node, format!("{bytes} bytes of labels are more than {MOST_LABELS}"));
        }
        out
    }

    fn logging(&mut self, node: &Node) -> Logging {
        let f = self.fields("logging", node);
        let driver = self.string(&f, "driver").unwrap_or_else(|| "json-file".to_owned());
        let options = self.pairs(&f, "options").into_iter().map(|(k, v, _)| (k, v)).collect();
        Logging { driver, options }
    }

    /// One ingress, or a list of them.
    fn ingresses(&mut self, node: &Node) -> Option<Ingress> {
        let Value::Seq(items) = &node.value else { return Some(self.ingress(node)) };
        let mut all = items.iter().map(|item| self.ingress(item)).collect::<Vec<_>>().into_iter();
        let mut first = all.next();
        if first.is_none() {
            self.problem("ingress", node, "the list is empty; leave `ingress` out for an app that takes no requests");
        }
        if let Some(first) = &mut first {
            first.more = all.collect();
            self.check_together(first, node);
        }
        first
    }

    fn check_together(&mut self, ingress: &Ingress, node: &Node) {
        if ingress.more.len() >= MOST_INGRESSES {
            self.problem("ingress", node, format!("at most {MOST_INGRESSES} ways in can be given"));
        }
        let dir = |endpoint: &Endpoint| match endpoint {
            Endpoint::Socket(path) => path.rsplit_once('/').map(|(dir, _)| dir.to_owned()),
            Endpoint::Port(_) => None,
        };
        if ingress.more.iter().any(|i| dir(&i.endpoint) != dir(&ingress.endpoint)) {
            let message =
                "all of them need a `port`, or all a `socket` in one directory, which is mounted from the host";
            self.problem("ingress", node, message);
        }
        for way in ingress.all().filter(|_| !ingress.more.is_empty()) {
            let Endpoint::Socket(path) = &way.endpoint else { continue };
            let name = path.rsplit('/').next().unwrap_or_default();
            // It becomes part of nginx's configuration.
            if !name.bytes().all(|b| b.is_ascii_alphanumeric() || b".-_".contains(&b)) {
                let message = format!(
                    "`{name}`: where there are several sockets, their names have letters, digits, `.`, `-` and `_`"
                );
                self.problem("ingress.socket", node, message);
            }
        }
        let mut seen = BTreeSet::new();
        for way in ingress.all() {
            for host in way.hosts.iter().filter(|host| !seen.insert((way.path.clone(), (*host).clone()))) {
                self.problem("ingress.hosts", node, format!("`{host}` is in two of them"));
            }
        }
    }

    fn ingress(&mut self, node: &Node) -> Ingress {
        let f = self.fields("ingress", node);
        let mut hosts: Vec<VirtualHost> = Vec::new();
        // A set beside the list: a text has room for fifty thousand hosts.
        let mut seen = BTreeSet::new();
        for host in self.items(&f, "hosts", VirtualHost::from_spec) {
            if seen.insert(host.clone()) {
                hosts.push(host);
            } else {
                self.problem("ingress.hosts", node, format!("`{host}` is listed twice"));
            }
        }
        if hosts.len() > MOST_HOSTS {
            let message = format!(
                "{} virtual hosts are more than {MOST_HOSTS}; use `*` for all that no other app claims",
                hosts.len()
            );
            self.problem("ingress.hosts", node, message);
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
        let path = self.read(&f, "path", |t| UrlPath::try_from(t));
        let strip_path = self.boolean(&f, "strip_path").unwrap_or(false);
        if let (None, true, Some(node)) = (&path, strip_path, f.get("strip_path")) {
            self.problem("ingress.strip_path", node, "there is no `path` to leave out");
        }
        if let (true, Some(node)) = (hosts.iter().any(VirtualHost::is_catch_all), f.get("path")) {
            self.problem("ingress.path", node, "`*` matches whole hosts, and cannot have a `path`");
        }
        if let (Some(_), Some(node)) = (&path, f.get("template")) {
            let message = "an app below a `path` is part of the server of its host, and has no template of its own";
            self.problem("ingress.template", node, message);
        }
        Ingress {
            hosts,
            endpoint,
            drain: self.read(&f, "drain", text::duration).unwrap_or(std::time::Duration::from_secs(30)),
            template: self.read(&f, "template", |t| t.try_into()),
            max_body_size: self.read(&f, "max_body_size", text::size).unwrap_or(MAX_BODY_SIZE),
            read_timeout: self
                .read(&f, "read_timeout", |t| match text::duration(t)? {
                    d if d.as_secs() >= 1 => Ok(d),
                    _ => Err("at least `1s` is needed".to_owned()),
                })
                .unwrap_or(std::time::Duration::from_secs(60)),
            response_header_size: self
                .read(&f, "response_header_size", |t| match text::size(t)? {
                    size if (4 * 1024..=1024 * 1024).contains(&size) => Ok(size),
                    _ => Err("use `4k` to `1m`".to_owned()),
                })
                .unwrap_or(RESPONSE_HEADER_SIZE),
            request_buffering: self.boolean(&f, "request_buffering").unwrap_or(true),
            path,
            strip_path,
            more: Vec::new(),
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
            self.problem("healthcheck", node, "`http` and `tcp` probe the `ingress`, and there is none; use `test`");
        }
        let host = self.read(&f, "host", host_header);
        if let (Some(_), false, Some(node)) = (&host, matches!(probe, Probe::Http(_)), f.get("host")) {
            self.problem("healthcheck.host", node, "only `http` uses a host");
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
            host,
        }
    }

    /// Compose's `test`: `[CMD, …]`, `[CMD-SHELL, …]`, `[NONE]`, or one text for a shell.
    fn test(&mut self, f: &Fields<'_>) -> Option<Probe> {
        let node = f.get("test")?;
        if let Value::Seq(_) = node.value {
            let words = self.items(f, "test", |t| Ok::<_, String>(t.to_owned()));
            let bytes: usize = words.iter().map(String::len).sum();
            if bytes > MOST_TEST {
                let message = format!("a command of {bytes} bytes is longer than {MOST_TEST}; put it into the image");
                self.problem("healthcheck.test", node, message);
            }
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
        if text.len() > MOST_TEST {
            let message =
                format!("a command of {} bytes is longer than {MOST_TEST}; put it into the image", text.len());
            self.problem("healthcheck.test", node, message);
        }
        Some(Probe::Command(vec!["CMD-SHELL".to_owned(), text.to_owned()]))
    }

    fn deploy(&mut self, top: &Fields<'_>) -> (Deploy, Option<i64>, Option<i64>, Option<i64>) {
        let mut deploy = Deploy::default();
        let (mut memory, mut cpus, mut pids) = (None, None, None);
        let Some(node) = top.get("deploy") else { return (deploy, memory, cpus, pids) };
        let f = self.fields("deploy", node);
        self.restart_policy(&f);
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
                memory = self.read(&limits, "memory", values::memory);
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
            self.pacing(&update, &mut deploy.update);
        }
        (deploy, memory, cpus, pids)
    }

    fn pacing(&mut self, f: &Fields<'_>, update: &mut Update) {
        if let Some(parallelism) = self.read(f, "parallelism", Amount::parse) {
            update.parallelism = parallelism;
        }
        update.monitor = self.read(f, "monitor", text::duration);
        update.max_failures = self.read(f, "max_failure_ratio", ratio).unwrap_or_default();
        if let Some(n) = self.number(f, "canary", 0, 10_000) {
            update.canary = u16::try_from(n).unwrap_or(u16::MAX);
        }
        update.auto_promote_after = self.read(f, "auto_promote_after", text::duration);
        if let Some(action) = self.read(f, "failure_action", |t| match t {
            "rollback" => Ok(FailureAction::Rollback),
            "pause" => Ok(FailureAction::Pause),
            other => Err(format!("`{other}` is not a failure action; use `rollback` or `pause`")),
        }) {
            update.on_failure = action;
        }
    }
}

#[cfg(test)]
#[path = "read_tests.rs"]
mod tests;
