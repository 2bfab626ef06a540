//! The command line of `docker run`, as a service.

use std::collections::BTreeMap;

use super::{
    ImportError,
    compose::{Options, Outcome, project},
    interpolate::Variables,
    list, map, scalar,
    tree::{self, get, items},
};
use crate::model::{text, yaml::Node};

/// What becomes of an option of `docker run`.
#[derive(Clone, Copy)]
enum Kind {
    /// It takes no value, and says nothing about the container.
    Nothing,
    /// It takes no value, and sets this key to `true`.
    Switch(&'static str),
    /// It sets this key.
    One(&'static str),
    /// It adds to the list of this key.
    Many(&'static str),
    /// It adds `name=value` to the mapping of this key.
    Pair(&'static str),
    /// It sets a key of the health check.
    Health(&'static str),
    /// It takes a value, and says nothing about the container.
    Ignored,
}

use Kind::{Health, Ignored, Many, Nothing, One, Pair, Switch};

/// The options of `docker run` that containers have had for long, by docker-run(1).
const LONG: &[(&str, Kind)] = &[
    ("add-host", Many("extra_hosts")),
    ("attach", Ignored),
    ("cap-add", Many("cap_add")),
    ("cap-drop", Many("cap_drop")),
    ("cgroup-parent", One("cgroup_parent")),
    ("cidfile", Ignored),
    ("cpu-shares", One("cpu_shares")),
    ("cpus", One("cpus")),
    ("cpuset-cpus", One("cpuset")),
    ("detach", Nothing),
    ("device", Many("devices")),
    ("dns", Many("dns")),
    ("dns-search", Many("dns_search")),
    ("domainname", One("domainname")),
    ("entrypoint", One("entrypoint")),
    ("env", Many("environment")),
    ("env-file", Many("env_file")),
    ("expose", Many("expose")),
    ("gpus", One("gpus")),
    ("group-add", Many("group_add")),
    ("health-cmd", Health("test")),
    ("health-interval", Health("interval")),
    ("health-retries", Health("retries")),
    ("health-start-period", Health("start_period")),
    ("health-timeout", Health("timeout")),
    ("hostname", One("hostname")),
    ("init", Switch("init")),
    ("interactive", Switch("stdin_open")),
    ("ipc", One("ipc")),
    ("label", Many("labels")),
    ("link", Many("links")),
    ("log-driver", One("log-driver")),
    ("log-opt", Pair("log-opt")),
    ("mac-address", One("mac_address")),
    ("memory", One("mem_limit")),
    ("memory-reservation", One("mem_reservation")),
    ("memory-swap", One("memswap_limit")),
    ("mount", Many("mount")),
    ("name", One("container_name")),
    ("net", One("network_mode")),
    ("network", One("network_mode")),
    ("network-alias", Many("links")),
    ("no-healthcheck", Health("disable")),
    ("pid", One("pid")),
    ("pids-limit", One("pids_limit")),
    ("platform", One("platform")),
    ("privileged", Switch("privileged")),
    ("publish", Many("ports")),
    ("pull", One("pull_policy")),
    ("quiet", Nothing),
    ("read-only", Switch("read_only")),
    ("restart", One("restart")),
    ("rm", Nothing),
    ("runtime", One("runtime")),
    ("security-opt", Many("security_opt")),
    ("shm-size", One("shm_size")),
    ("stop-signal", One("stop_signal")),
    ("stop-timeout", One("stop-timeout")),
    ("sysctl", Many("sysctls")),
    ("tmpfs", Many("tmpfs")),
    ("tty", Switch("tty")),
    ("ulimit", Pair("ulimits")),
    ("user", One("user")),
    ("userns", One("userns_mode")),
    ("uts", One("uts")),
    ("volume", Many("volumes")),
    ("volumes-from", Many("volumes_from")),
    ("workdir", One("working_dir")),
];

/// Their letters.
const SHORT: &[(char, &str)] = &[
    ('a', "attach"),
    ('c', "cpu-shares"),
    ('d', "detach"),
    ('e', "env"),
    ('h', "hostname"),
    ('i', "interactive"),
    ('l', "label"),
    ('m', "memory"),
    ('p', "publish"),
    ('q', "quiet"),
    ('t', "tty"),
    ('u', "user"),
    ('v', "volume"),
    ('w', "workdir"),
];

/// The options that were found.
#[derive(Default)]
struct Found {
    one: BTreeMap<&'static str, String>,
    many: BTreeMap<&'static str, Vec<String>>,
    health: BTreeMap<&'static str, String>,
}

/// Makes an app of the words of a command line that begins with `docker run`, or with what follows it.
///
/// # Errors
/// If an option is not known, or there is no image.
pub fn run_line(words: &[String], options: &Options<'_>) -> Result<Outcome, ImportError> {
    let mut words = words.iter().map(String::as_str).peekable();
    while words.next_if(|word| matches!(*word, "sudo" | "docker" | "podman" | "container" | "run" | "create")).is_some()
    {
    }
    let mut found = Found::default();
    while let Some(word) = words.next_if(|word| word.starts_with('-') && *word != "-") {
        if word == "--" {
            break;
        }
        let mut next = |name: &str| {
            let value = words.next();
            value.map(str::to_owned).ok_or_else(|| ImportError::one(format!("`{name}` has no value")))
        };
        match word.strip_prefix("--") {
            Some(long) => {
                let (name, value) = long.split_once('=').map_or((long, None), |(name, value)| (name, Some(value)));
                let kind = kind(name)?;
                let value = match (value, kind) {
                    (Some(value), _) => value.to_owned(),
                    (None, Nothing | Switch(_) | Health("disable")) => "true".to_owned(),
                    (None, _) => next(word)?,
                };
                found.take(kind, value);
            }
            None => {
                for (at, letter) in word[1..].char_indices() {
                    let name = SHORT.iter().find(|(known, _)| *known == letter).map(|(_, name)| *name);
                    let kind = kind(name.unwrap_or(word))?;
                    if matches!(kind, Nothing | Switch(_)) {
                        found.take(kind, "true".to_owned());
                        continue;
                    }
                    let rest = word[1 + at + letter.len_utf8()..].trim_start_matches('=');
                    let value = if rest.is_empty() { next(word)? } else { rest.to_owned() };
                    found.take(kind, value);
                    break;
                }
            }
        }
    }
    let image = words.next().ok_or_else(|| ImportError::one("no image is given"))?;
    let command: Vec<String> = words.map(str::to_owned).collect();
    let name = match found.one.get("container_name") {
        Some(name) => name.clone(),
        // What `docker run` would invent is none.
        None => {
            let last = image.rsplit('/').next().unwrap_or(image);
            last.split([':', '@']).next().unwrap_or(last).to_owned()
        }
    };
    let service = found.service(image, &command);
    alone(&name, service, options)
}

/// Makes an app of one service that belongs to no project: names of volumes are what they are.
pub(super) fn alone(name: &str, service: Node, options: &Options<'_>) -> Result<Outcome, ImportError> {
    let volumes = get(&service, "volumes").map(items).unwrap_or_default();
    let source = |volume: &Node| {
        let short = tree::text(volume).and_then(|volume| Some(volume.split_once(':')?.0.to_owned()));
        short.or_else(|| get(volume, "source").and_then(tree::text).map(str::to_owned))
    };
    let sources = volumes.into_iter().filter_map(source);
    let named: Vec<(String, Node)> = sources.map(|source| (source.clone(), map([("name", scalar(source))]))).collect();
    let whole = map([("services", map([(name, service)])), ("volumes", map(named))]);
    project(&whole, &Variables::new(options.variables.clone()), options)
}

fn kind(name: &str) -> Result<Kind, ImportError> {
    let known = LONG.iter().find(|(known, _)| *known == name).map(|(_, kind)| *kind);
    known.ok_or_else(|| {
        let name = if name.starts_with('-') { name.to_owned() } else { format!("--{name}") };
        ImportError::one(format!("`{name}` is not an option of `docker run` that can be imported"))
    })
}

impl Found {
    fn take(&mut self, kind: Kind, value: String) {
        match kind {
            Nothing | Ignored => {}
            Switch(key) | One(key) => drop(self.one.insert(key, value)),
            Many(key) | Pair(key) => self.many.entry(key).or_default().push(value),
            Health(key) => drop(self.health.insert(key, value)),
        }
    }

    fn service(mut self, image: &str, command: &[String]) -> Node {
        let mut service: Vec<(String, Node)> = vec![("image".to_owned(), scalar(image))];
        if !command.is_empty() {
            service.push(("command".to_owned(), list(command.iter().map(scalar).collect())));
        }
        let driver = self.one.remove("log-driver");
        let log_options = self.many.remove("log-opt").unwrap_or_default();
        if driver.is_some() || !log_options.is_empty() {
            let driver = driver.unwrap_or_else(|| "json-file".to_owned());
            let all = pairs(&log_options).map(|(name, value)| (name, scalar(value)));
            service.push(("logging".to_owned(), map([("driver", scalar(driver)), ("options", map(all))])));
        }
        if let Some(seconds) = self.one.remove("stop-timeout") {
            service.push(("stop_grace_period".to_owned(), scalar(format!("{seconds}s"))));
        }
        if let Some(limits) = self.many.remove("ulimits") {
            let limit = |text: String| match text.split_once(':') {
                Some((soft, hard)) => map([("soft", scalar(soft)), ("hard", scalar(hard))]),
                None => scalar(text),
            };
            let all = pairs(&limits).map(|(name, value)| (name, limit(value)));
            service.push(("ulimits".to_owned(), map(all)));
        }
        let mut volumes: Vec<Node> = self.many.remove("volumes").unwrap_or_default().into_iter().map(scalar).collect();
        volumes.extend(self.many.remove("mount").unwrap_or_default().iter().map(|text| mount(text)));
        if !volumes.is_empty() {
            service.push(("volumes".to_owned(), list(volumes)));
        }
        if !self.health.is_empty() {
            let all = self.health.into_iter().map(|(name, value)| (name, scalar(value)));
            service.push(("healthcheck".to_owned(), map(all)));
        }
        // One word, whatever is in it.
        if let Some(entrypoint) = self.one.remove("entrypoint") {
            service.push(("entrypoint".to_owned(), list(vec![scalar(entrypoint)])));
        }
        // Docker takes these files literally.
        let literal = |path: String| map([("path", scalar(path)), ("format", scalar("raw"))]);
        if let Some(files) = self.many.remove("env_file") {
            service.push(("env_file".to_owned(), list(files.into_iter().map(literal).collect())));
        }
        service.extend(self.one.into_iter().map(|(name, value)| (name.to_owned(), scalar(value))));
        let lists = self.many.into_iter();
        service.extend(lists.map(|(name, all)| (name.to_owned(), list(all.into_iter().map(scalar).collect()))));
        map(service)
    }
}

fn pairs(all: &[String]) -> impl Iterator<Item = (String, String)> {
    all.iter().map(|text| {
        let (name, value) = text.split_once('=').unwrap_or((text, ""));
        (name.to_owned(), value.to_owned())
    })
}

/// `type=bind,source=/a,target=/b,readonly`, as Compose has it.
fn mount(text: &str) -> Node {
    let mut out = Vec::new();
    for part in text.split(',') {
        let (name, value) = part.split_once('=').unwrap_or((part, "true"));
        let name = match name {
            "src" => "source",
            "dst" | "destination" => "target",
            "readonly" | "ro" => "read_only",
            other => other,
        };
        out.push((name, scalar(value)));
    }
    map(out)
}

/// The words of a text that holds a command line, with lines that go on after a backslash.
///
/// # Errors
/// If a quote is not closed.
pub fn split(line: &str) -> Result<Vec<String>, String> {
    text::words(&line.replace("\\\r\n", " ").replace("\\\n", " "))
}
