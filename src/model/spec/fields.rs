//! Readers for the mappings of a spec: known keys, and problems for unknown ones.

use super::values::printable;
use crate::model::{
    problem::{Problem, Problems, nearest},
    text,
    yaml::{Key, Node, Value},
};

/// Keys of each mapping of a spec, by its dotted path. A test compares the JSON Schema with this list.
pub(super) const KEYS: &[(&str, &[&str])] = &[
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
            "hostname",
            "dns",
            "group_add",
            "security_opt",
            "shm_size",
            "ulimits",
            "mem_limit",
            "cpus",
            "pids_limit",
            "restart",
            "stdin_open",
            "tty",
            "labels",
            "cap_add",
            "cap_drop",
            "devices",
            "sysctls",
            "read_only",
            "init",
            "logging",
            "healthcheck",
            "ingress",
            "stop_signal",
            "stop_grace_period",
            "pull_policy",
            "release_command",
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
            "host",
        ],
    ),
    (
        "ingress",
        &[
            "hosts",
            "path",
            "strip_path",
            "socket",
            "port",
            "drain",
            "template",
            "max_body_size",
            "read_timeout",
            "response_header_size",
            "request_buffering",
        ],
    ),
    ("logging", &["driver", "options"]),
    ("ulimits.*", &["soft", "hard"]),
    ("deploy", &["mode", "replicas_per_host", "placement", "resources", "restart_policy", "update_config"]),
    ("deploy.restart_policy", &["condition", "delay", "max_attempts", "window"]),
    ("deploy.placement", &["constraints"]),
    ("deploy.resources", &["limits"]),
    ("deploy.resources.limits", &["memory", "cpus", "pids"]),
    (
        "deploy.update_config",
        &["parallelism", "order", "monitor", "failure_action", "max_failure_ratio", "canary", "auto_promote_after"],
    ),
];

/// Compose keys that are not supported, each with the remedy.
const NOT_HERE: &[(&str, &str)] = &[
    ("build", "build the image elsewhere and name it in `image`"),
    ("ports", "use `ingress.port`; nginx is the way in"),
    ("expose", "use `ingress.port`"),
    ("container_name", "leave it out; two releases run side by side, so names are demae's"),
    ("depends_on", "leave it out; make the app wait for what it needs"),
    ("env_file", "put the variables under `env/<app>/` in etcd, or use `env_from`"),
    ("networks", "use `network_mode` with the name of a network that exists"),
    ("secrets", "put them under `env/<app>/` in etcd"),
    ("configs", "mount a file with `volumes`"),
    ("privileged", "no app gets the rights of its host"),
    ("pid", "no app gets the namespaces of its host"),
    ("ipc", "no app gets the namespaces of its host"),
    ("links", "apps reach each other through nginx, or by a network that exists (`network_mode`)"),
    ("runtime", "no app gets another runtime than the engine's own"),
    ("gpus", "no app gets the devices of its host"),
    ("platform", "leave it out; an image is taken for the platform of the host"),
    ("services", "this is a whole Compose file; `demae import compose FILE` makes specs of its services"),
    ("profiles", "leave it out; `deploy.placement.constraints` say where an app runs"),
    ("replicas", "use `replicas_per_host`; a count over all hosts needs a scheduler"),
    ("reservations", "use `limits`"),
    ("rollback_config", "leave it out; the old instances keep serving until the new ones are proven"),
];

pub(super) struct Reader {
    pub(super) problems: Problems,
}

/// The entries of one mapping, by name.
pub(super) struct Fields<'n> {
    path: &'static str,
    entries: &'n [(Key, Node)],
}

impl<'n> Fields<'n> {
    pub(super) fn get(&self, name: &str) -> Option<&'n Node> {
        self.entries.iter().find(|(k, _)| k.name == name).map(|(_, n)| n).filter(|n| n.value != Value::Null)
    }

    pub(super) fn key(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }
}

impl Reader {
    pub(super) fn problem(&mut self, key: impl Into<String>, node: &Node, message: impl Into<String>) {
        self.problems.push(Problem::new(key, message).at(node.line, node.column));
    }

    /// The mapping at `path`, with its keys checked.
    pub(super) fn fields<'n>(&mut self, path: &'static str, node: &'n Node) -> Fields<'n> {
        let Value::Map(entries) = &node.value else {
            let message = format!("expected a mapping, found {}", node.value.kind());
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
    pub(super) fn text<'n>(&mut self, key: &str, node: &'n Node) -> Option<&'n str> {
        match &node.value {
            Value::Scalar { text, .. } => Some(text),
            other => {
                let message = format!("expected a single value, found {}", other.kind());
                self.problem(key, node, message);
                None
            }
        }
    }

    /// A scalar parsed by `read`; on an error a problem is recorded and `None` returned.
    pub(super) fn read<T, E: ToString>(
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

    pub(super) fn string(&mut self, fields: &Fields<'_>, name: &str) -> Option<String> {
        self.read(fields, name, |t| printable(t).map(str::to_owned))
    }

    pub(super) fn boolean(&mut self, fields: &Fields<'_>, name: &str) -> Option<bool> {
        self.read(fields, name, |t| match t {
            "true" => Ok(true),
            "false" => Ok(false),
            other => Err(format!("`{other}` is neither `true` nor `false`")),
        })
    }

    pub(super) fn number(&mut self, fields: &Fields<'_>, name: &str, least: u32, most: u32) -> Option<u32> {
        self.read(fields, name, |t| match t.parse::<u32>() {
            Ok(n) if (least..=most).contains(&n) => Ok(n),
            _ => Err(format!("`{t}` is not a whole number from {least} to {most}")),
        })
    }

    pub(super) fn list<'n>(&mut self, fields: &Fields<'n>, name: &str) -> &'n [Node] {
        match fields.get(name) {
            None => &[],
            Some(Node { value: Value::Seq(items), .. }) => items,
            Some(node) => {
                let message = format!("expected a list, found {}", node.value.kind());
                self.problem(fields.key(name), node, message);
                &[]
            }
        }
    }

    /// A list of scalars, each parsed by `read`.
    pub(super) fn items<T, E: ToString>(
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
    pub(super) fn pairs(&mut self, fields: &Fields<'_>, name: &str) -> Vec<(String, String, Node)> {
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
                let message = format!("expected a mapping or a list, found {}", other.kind());
                self.problem(fields.key(name), node, message);
            }
        }
        out
    }

    /// A command: a list of words, or one text that is split into words.
    pub(super) fn command(&mut self, fields: &Fields<'_>, name: &str) -> Option<Vec<String>> {
        match fields.get(name)?.value {
            Value::Seq(_) => Some(self.items(fields, name, |t| Ok::<_, String>(t.to_owned()))),
            _ => self.read(fields, name, text::words),
        }
    }
}
