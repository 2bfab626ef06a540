//! A second reading of the rules, over the request that Docker gets. It shares no code with the first one, knows the keys
//! of such a request that demae writes, and refuses every other one.

use std::path::Path;

use serde_json::Value;

use super::{MOUNTABLE, Policy, Rules, Volumes};
use crate::model::name::AppName;

/// A request to create a container.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The app that it is for.
    pub app: &'a AppName,
    /// The image that its release names.
    pub image: &'a str,
    /// The body.
    pub body: &'a Value,
    /// A directory of demae's own that may be mounted.
    pub own_dir: Option<&'a str>,
    /// The network that demae itself chose for it.
    pub own_network: Option<&'a str>,
}

/// Keys of a request that demae writes.
const BODY: [&str; 20] = [
    "Image",
    "Cmd",
    "Entrypoint",
    "User",
    "WorkingDir",
    "Hostname",
    "Env",
    "Labels",
    "ExposedPorts",
    "Healthcheck",
    "StopSignal",
    "StopTimeout",
    "HostConfig",
    "NetworkingConfig",
    "Tty",
    "OpenStdin",
    "StdinOnce",
    "AttachStdin",
    "AttachStdout",
    "AttachStderr",
];
/// Keys of its `HostConfig`.
const HOST_CONFIG: [&str; 21] = [
    "Mounts",
    "PortBindings",
    "RestartPolicy",
    "LogConfig",
    "NetworkMode",
    "ExtraHosts",
    "Dns",
    "GroupAdd",
    "SecurityOpt",
    "ShmSize",
    "Ulimits",
    "CapAdd",
    "CapDrop",
    "Devices",
    "Sysctls",
    "Tmpfs",
    "ReadonlyRootfs",
    "Init",
    "Memory",
    "NanoCpus",
    "PidsLimit",
];

/// What a request asks for that the rules do not allow. Empty if they allow all of it.
pub fn judge(policy: &Policy, request: Request<'_>) -> Vec<String> {
    if let Some(why) = &policy.unusable {
        return vec![why.clone()];
    }
    let own = policy.apps.get(request.app);
    let judge = Judge { own, general: &policy.general, request };
    let mut found = Vec::new();
    judge.keys(&mut found);
    judge.image(&mut found);
    judge.mounts(&mut found);
    judge.user(&mut found);
    judge.rights(&mut found);
    judge.network(&mut found);
    judge.limits(&mut found);
    judge.environment(&mut found);
    found
}

struct Judge<'a> {
    own: Option<&'a Rules>,
    general: &'a Rules,
    request: Request<'a>,
}

/// The rule that holds for the app.
macro_rules! rule {
    ($judge:expr, $name:ident) => {
        match $judge.own.map(|own| &own.$name) {
            Some(Some(own)) => Some(&own.value),
            _ => $judge.general.$name.as_ref().map(|general| &general.value),
        }
    };
}

impl<'a> Judge<'a> {
    fn host(&self, key: &str) -> &'a Value {
        &self.request.body["HostConfig"][key]
    }

    fn texts(&self, key: &str) -> impl Iterator<Item = &'a str> {
        self.host(key).as_array().into_iter().flatten().map(|value| value.as_str().unwrap_or("?"))
    }

    fn keys(&self, found: &mut Vec<String>) {
        for (at, known) in [(self.request.body, &BODY[..]), (&self.request.body["HostConfig"], &HOST_CONFIG[..])] {
            let Some(entries) = at.as_object() else {
                found.push("it is no request to create a container".to_owned());
                continue;
            };
            let unknown = entries.iter().filter(|(key, value)| !value.is_null() && !known.contains(&key.as_str()));
            found.extend(unknown.map(|(key, _)| format!("`{key}` is nothing that a spec asks for")));
        }
    }

    fn image(&self, found: &mut Vec<String>) {
        let image = self.request.image;
        let is_archive = image.starts_with("docker-archive:") || image.starts_with("oci-archive:");
        let (allowed, place) = if is_archive {
            let rest = image.split_once(':').map_or("", |(_, rest)| rest);
            let rest = rest.rsplit_once('#').map_or(rest, |(rest, _)| rest);
            let place = rest.rsplit_once("@sha256:").map_or(rest, |(rest, _)| rest);
            (rule!(self, archives), place.to_owned())
        } else {
            (rule!(self, registries), whole_name(image))
        };
        let is_free = MOUNTABLE.iter().any(|dir| Path::new(&place).starts_with(dir)) || place.contains("://");
        if is_archive && allowed.is_none() && !is_free {
            found.push(format!("the image comes from `{place}`"));
        }
        if allowed.is_some_and(|all| all.iter().all(|pattern| !pattern.matches(&place))) {
            found.push(format!("the image comes from `{place}`"));
        }
        let without_name = image.split('#').next().unwrap_or(image);
        if rule!(self, require_digest) == Some(&true) && !without_name.contains("@sha256:") {
            found.push("the image has no digest".to_owned());
        }
    }

    fn mounts(&self, found: &mut Vec<String>) {
        for mount in self.host("Mounts").as_array().into_iter().flatten() {
            let source = mount["Source"].as_str().unwrap_or_default();
            let reads_only = mount["ReadOnly"] == Value::Bool(true);
            let fine = match mount["Type"].as_str() {
                Some("bind") => self.request.own_dir == Some(source) || self.may_bind(Path::new(source), reads_only),
                Some("volume") => self.may_have_volume(source),
                _ => false,
            };
            if !fine {
                found.push(format!("the mount of `{source}`"));
            }
        }
    }

    fn may_bind(&self, source: &Path, reads_only: bool) -> bool {
        let is_socket = source.extension().is_some_and(|end| end == "sock");
        let Some(rules) = rule!(self, mounts) else {
            let mut above = source.ancestors().skip(1);
            return !is_socket && above.any(|dir| MOUNTABLE.iter().any(|place| Path::new(place) == dir));
        };
        let named = |rule: &super::MountRule| {
            std::path::PathBuf::from(rule.path.split("{app}").collect::<Vec<_>>().join(self.request.app.as_str()))
        };
        // What may only be read is not to be reached from above.
        let is_protected = |dir: &Path| dir != source && dir.starts_with(source);
        if !reads_only && rules.iter().any(|rule| rule.read_only && is_protected(&named(rule))) {
            return false;
        }
        // From the path upwards: the first directory with a rule decides.
        for (depth, dir) in source.ancestors().enumerate() {
            let mut here = rules.iter().filter(|rule| named(rule) == dir);
            // Of two for the same directory the last one counts.
            if let Some(rule) = here.next_back() {
                return (reads_only || !rule.read_only) && (depth == 0 || !is_socket);
            }
        }
        false
    }

    fn may_have_volume(&self, name: &str) -> bool {
        // A name with a slash would be a path.
        if name.contains('/') {
            return false;
        }
        match rule!(self, volumes) {
            None | Some(Volumes::Any) => true,
            Some(Volumes::None) => false,
            Some(Volumes::Own) => name.split(['.', '_']).next() == Some(self.request.app.as_str()),
        }
    }

    fn user(&self, found: &mut Vec<String>) {
        let Some(ranges) = rule!(self, users) else { return };
        let fits = |id: &str| {
            let id: u64 = if id.starts_with('+') { u64::MAX } else { id.parse().unwrap_or(u64::MAX) };
            ranges.iter().any(|(from, to)| u64::from(*from) <= id && id <= u64::from(*to))
        };
        let user = self.request.body["User"].as_str().unwrap_or_default();
        let mut ids: Vec<&str> = user.split(':').collect();
        if ids.len() < 2 {
            // A group of the image's choice.
            ids.push("");
        }
        ids.extend(self.texts("GroupAdd"));
        found.extend(ids.into_iter().filter(|id| !fits(id)).map(|id| format!("the user or group `{id}`")));
    }

    fn rights(&self, found: &mut Vec<String>) {
        let bare = |cap: &str| cap.to_uppercase().trim_start_matches("CAP_").to_owned();
        let may_add = rule!(self, cap_add).map(Vec::as_slice).unwrap_or_default();
        let added = self.texts("CapAdd").map(bare).filter(|cap| !may_add.contains(cap));
        found.extend(added.map(|cap| format!("the capability `{cap}`")));
        let dropped: Vec<String> = self.texts("CapDrop").map(bare).collect();
        let must_drop = rule!(self, cap_drop).into_iter().flatten();
        let kept = must_drop.filter(|cap| !dropped.iter().any(|gone| gone == *cap || gone == "ALL"));
        found.extend(kept.map(|cap| format!("the capability `{cap}`, which is not dropped")));
        if rule!(self, no_new_privileges) == Some(&true) && !self.texts("SecurityOpt").any(|t| t == "no-new-privileges")
        {
            found.push("more privileges later".to_owned());
        }
        let others = self.texts("SecurityOpt").filter(|option| *option != "no-new-privileges");
        found.extend(others.map(|option| format!("the security option `{option}`")));
        if rule!(self, read_only) == Some(&true) && *self.host("ReadonlyRootfs") != Value::Bool(true) {
            found.push("a root file system that it can write to".to_owned());
        }
        for device in self.host("Devices").as_array().into_iter().flatten() {
            let path = device["PathOnHost"].as_str().unwrap_or_default();
            if !rule!(self, devices).is_some_and(|all| all.iter().any(|pattern| pattern.matches(path))) {
                found.push(format!("the device `{path}`"));
            }
        }
        for name in self.host("Sysctls").as_object().into_iter().flatten().map(|(name, _)| name) {
            if !rule!(self, sysctls).is_some_and(|all| all.iter().any(|pattern| pattern.matches(name))) {
                found.push(format!("the setting `{name}`"));
            }
        }
        let driver = self.host("LogConfig")["Type"].as_str().unwrap_or_default();
        if rule!(self, log_drivers).is_some_and(|all| all.iter().all(|allowed| allowed != driver)) {
            found.push(format!("the logging driver `{driver}`"));
        }
        for options in self.host("Tmpfs").as_object().into_iter().flatten().filter(|(_, options)| *options != "") {
            found.push(format!("options of the tmpfs `{}`", options.0));
        }
        let bindings = self.host("PortBindings").as_object().into_iter().flatten();
        for binding in bindings.flat_map(|(_, all)| all.as_array().into_iter().flatten()) {
            if binding["HostIp"] != "127.0.0.1" {
                found.push(format!("the port {}", binding["HostPort"]));
            }
        }
    }

    fn network(&self, found: &mut Vec<String>) {
        let mode = self.host("NetworkMode").as_str().unwrap_or("bridge");
        let mode = if self.request.own_network == Some(mode) { "bridge" } else { mode };
        let fine = match (mode, rule!(self, networks)) {
            ("none", _) => true,
            (mode, _) if mode.contains([':', '/']) => false,
            ("host", rules) => rules.is_some_and(|all| all.iter().any(|pattern| pattern.as_str() == "host")),
            (_, None) => true,
            (mode, Some(all)) => all.iter().any(|pattern| pattern.matches(mode)),
        };
        if !fine {
            found.push(format!("the network `{mode}`"));
        }
        let joined = self.request.body["NetworkingConfig"]["EndpointsConfig"].as_object().into_iter().flatten();
        for (name, _) in joined.filter(|(name, _)| self.host("NetworkMode") != name.as_str()) {
            found.push(format!("the network `{name}` beside its own"));
        }
    }

    fn limits(&self, found: &mut Vec<String>) {
        let limits =
            [("Memory", rule!(self, memory)), ("NanoCpus", rule!(self, nano_cpus)), ("PidsLimit", rule!(self, pids))];
        for (key, most) in limits {
            // To Docker, 0 and -1 are no limit.
            let is_limited = |most: &i64| self.host(key).as_i64().is_some_and(|much| (1..=*most).contains(&much));
            if most.is_some_and(|most| !is_limited(most)) {
                found.push(format!("`{key}` {}", self.host(key)));
            }
        }
    }

    fn environment(&self, found: &mut Vec<String>) {
        let Some(denied) = rule!(self, env_deny) else { return };
        for text in self.request.body["Env"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            let name = text.split('=').next().unwrap_or_default();
            // Those are demae's own.
            if !name.starts_with("DEMAE_") && denied.iter().any(|pattern| pattern.matches(name)) {
                found.push(format!("the variable `{name}`"));
            }
        }
    }
}

/// The whole name of an image: with its registry, without tag and digest.
fn whole_name(image: &str) -> String {
    let name = image.split('@').next().unwrap_or(image);
    let (dirs, last) = name.rsplit_once('/').map_or((None, name), |(dirs, last)| (Some(dirs), last));
    let last = last.split(':').next().unwrap_or(last);
    match dirs {
        None => format!("docker.io/library/{last}"),
        Some(dirs) => {
            let first = dirs.split('/').next().unwrap_or(dirs);
            let is_registry = first == "localhost" || first.chars().any(|c| c == '.' || c == ':' || c.is_uppercase());
            let hub = dirs.strip_prefix("index.docker.io").filter(|_| first == "index.docker.io");
            match (is_registry, hub) {
                (true, Some(rest)) => format!("docker.io{}/{last}", if rest.is_empty() { "/library" } else { rest }),
                (true, None) if dirs == "docker.io" => format!("docker.io/library/{last}"),
                (true, None) => format!("{dirs}/{last}"),
                (false, _) => format!("docker.io/{dirs}/{last}"),
            }
        }
    }
}
