//! What a host allows of what specs ask for: the rules of root's own file, or those that hold without one.
//!
//! A policy admits or refuses; it changes nothing that a spec says. What runs already is not touched by it.

mod judge;
mod read;

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, LazyLock},
};

use glob::Pattern;

use super::{
    name::{AppName, EnvName, ImageRef, VirtualHost},
    release::Release,
    spec::{ContainerSpec, Ingress, MOUNTABLE, Volume, VolumeSource},
};
pub use judge::{Request, judge};
pub use read::PolicyError;

/// The rules of a host.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    host: String,
    file: String,
    /// Why nothing may be created, if the file cannot be used.
    unusable: Option<String>,
    general: Rules,
    apps: BTreeMap<AppName, Rules>,
}

/// A rule, and the line that it is in.
#[derive(Debug, Clone, PartialEq)]
struct At<T> {
    value: T,
    line: usize,
}

/// The rules of one part of the file. Those that are missing there are the ones that hold without a file.
#[derive(Debug, Clone, Default, PartialEq)]
struct Rules {
    mounts: Option<At<Vec<MountRule>>>,
    volumes: Option<At<Volumes>>,
    registries: Option<At<Patterns>>,
    archives: Option<At<Patterns>>,
    require_digest: Option<At<bool>>,
    users: Option<At<Vec<(u32, u32)>>>,
    cap_add: Option<At<Vec<String>>>,
    cap_drop: Option<At<Vec<String>>>,
    no_new_privileges: Option<At<bool>>,
    read_only: Option<At<bool>>,
    devices: Option<At<Patterns>>,
    sysctls: Option<At<Patterns>>,
    networks: Option<At<Patterns>>,
    log_drivers: Option<At<Vec<String>>>,
    memory: Option<At<i64>>,
    nano_cpus: Option<At<i64>>,
    pids: Option<At<i64>>,
    env_deny: Option<At<Patterns>>,
    hosts: Option<At<Patterns>>,
}

/// Patterns as shells have them: `*` stands for any text, slashes and dots included.
type Patterns = Vec<Pattern>;

/// A path of the host that may be mounted, with all below it.
#[derive(Debug, Clone, PartialEq)]
struct MountRule {
    /// `{app}` stands for the name of the app.
    path: String,
    read_only: bool,
}

/// Which named volumes of Docker may be mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Volumes {
    None,
    /// `<app>`, and what begins with `<app>.` or `<app>_`: no name of an app has these letters.
    Own,
    Any,
}

/// Why a host does not run something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The key of the spec; empty if it is about all of it.
    pub key: String,
    /// The host.
    pub host: String,
    /// What it does not allow.
    pub what: String,
    /// The file with the rule, and its line; `None` for a line if no rule allows it.
    pub rule: (String, Option<usize>),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.key.is_empty() {
            write!(f, "`{}`: ", self.key)?;
        }
        f.write_str(&self.reason())
    }
}

impl Refusal {
    /// The same, without the key.
    pub fn reason(&self) -> String {
        let Self { key, host, what, rule: (file, line) } = self;
        let host = if host.is_empty() { "the host".to_owned() } else { format!("host `{host}`") };
        match line {
            _ if key.is_empty() => format!("{host} creates nothing: {what}"),
            Some(line) => format!("{host} {what} ({file}:{line})"),
            None => format!("{host} {what}, unless its {file} does"),
        }
    }
}

/// What is to run: what a policy looks at.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// The app.
    pub app: &'a AppName,
    /// Its image; `None` if it is not known yet.
    pub image: Option<&'a ImageRef>,
    /// Settings of its containers.
    pub container: &'a ContainerSpec,
    /// How requests reach it.
    pub ingress: Option<&'a Ingress>,
}

/// The rules that hold without a file, for inputs that have no host.
pub static BUILT_IN: LazyLock<Arc<Policy>> = LazyLock::new(|| Arc::new(Policy::built_in("", FILE)));

/// The name of the file in messages, where no other is known.
pub const FILE: &str = "policy.toml";

impl Policy {
    /// The rules that hold without a file.
    pub fn built_in(host: &str, file: &str) -> Self {
        let (host, file) = (host.to_owned(), file.to_owned());
        Self { host, file, unusable: None, general: Rules::default(), apps: BTreeMap::new() }
    }

    /// Those of a file that cannot be used: nothing is created.
    pub fn unusable(host: &str, file: &str, why: impl Into<String>) -> Self {
        Self { unusable: Some(why.into()), ..Self::built_in(host, file) }
    }

    /// Parses a file.
    ///
    /// # Errors
    /// The first problem, with its line.
    pub fn parse(host: &str, file: &str, text: &str) -> Result<Self, PolicyError> {
        read::policy(host, file, text)
    }

    /// Why its file cannot be used, if so.
    pub fn why_unusable(&self) -> Option<&str> {
        self.unusable.as_deref()
    }

    /// Names of apps with rules of their own.
    pub fn apps(&self) -> impl Iterator<Item = &AppName> {
        self.apps.keys()
    }

    /// Why this host does not create containers of a release. Empty if it does.
    pub fn refusals(&self, app: &AppName, release: &Release, ingress: Option<&Ingress>) -> Vec<Refusal> {
        let asked = Asked { app, image: Some(&release.image), container: &release.container, ingress };
        self.refusals_of(asked, release.env.keys())
    }

    /// The same, for what is not a release yet.
    pub fn refusals_of<'e>(&self, asked: Asked<'_>, env: impl Iterator<Item = &'e EnvName>) -> Vec<Refusal> {
        if let Some(why) = &self.unusable {
            return vec![self.refusal("", why, None)];
        }
        let mut found = Vec::new();
        self.image(asked, &mut found);
        self.mounts(asked, &mut found);
        self.rights(asked, &mut found);
        self.limits(asked, &mut found);
        let deny = self.rule(asked.app, |r| r.env_deny.as_ref());
        for name in env {
            if let Some(deny) = deny.filter(|deny| matches(&deny.value, name.as_str())) {
                found.push(self.refusal(&format!("environment.{name}"), "sets no such variable", Some(deny.line)));
            }
        }
        found.extend(self.refused_hosts(asked.app, asked.ingress).into_iter().map(|(_, refusal)| refusal));
        found
    }

    /// The virtual hosts that it does not let the app have.
    pub fn refused_hosts<'i>(&self, app: &AppName, ingress: Option<&'i Ingress>) -> Vec<(&'i VirtualHost, Refusal)> {
        let Some(rule) = self.rule(app, |r| r.hosts.as_ref()) else { return Vec::new() };
        let hosts = ingress.into_iter().flat_map(Ingress::all).flat_map(|way| &way.hosts);
        let refused = hosts.filter(|host| !matches(&rule.value, host.as_str()));
        let what = |host: &VirtualHost| format!("does not let this app have `{host}`");
        refused.map(|host| (host, self.refusal("ingress.hosts", &what(host), Some(rule.line)))).collect()
    }

    /// The rule for an app: its own, or the general one.
    fn rule<'p, T>(&'p self, app: &AppName, get: impl Fn(&'p Rules) -> Option<&'p At<T>>) -> Option<&'p At<T>> {
        self.apps.get(app).and_then(&get).or_else(|| get(&self.general))
    }

    fn refusal(&self, key: &str, what: &str, line: Option<usize>) -> Refusal {
        let rule = (self.file.clone(), line);
        Refusal { key: key.to_owned(), host: self.host.clone(), what: what.to_owned(), rule }
    }

    fn image(&self, asked: Asked<'_>, found: &mut Vec<Refusal>) {
        let Some(image) = asked.image else { return };
        let (patterns, place, kind) = match image.archive() {
            Some(archive) => (self.rule(asked.app, |r| r.archives.as_ref()), archive.place().to_owned(), "archive"),
            None => (self.rule(asked.app, |r| r.registries.as_ref()), image.repository(), "repository"),
        };
        if archive_is_out_of_place(image, patterns.is_some()) {
            let places = MOUNTABLE.join(", ");
            let what = format!("takes no image from the archive `{place}`, only from below {places}");
            found.push(self.refusal("image", &what, None));
        }
        if let Some(rule) = patterns.filter(|rule| !matches(&rule.value, &place)) {
            found.push(self.refusal("image", &format!("takes no image from the {kind} `{place}`"), Some(rule.line)));
        }
        if let Some(rule) = self.rule(asked.app, |r| r.require_digest.as_ref()).filter(|rule| rule.value)
            && !image.is_fixed()
        {
            let what = format!("takes images by their digest only, and `{image}` has none");
            found.push(self.refusal("image", &what, Some(rule.line)));
        }
    }

    /// Whether an app may have an image from what the path of an archive leads to on this host.
    pub fn admits_archive(&self, app: &AppName, real: &str, resolve: &dyn Fn(&str) -> Option<String>) -> bool {
        let is_free = || MOUNTABLE.iter().filter_map(|place| resolve(place)).any(|place| is_below(real, &place));
        let rule = self.rule(app, |r| r.archives.as_ref());
        self.unusable.is_none() && rule.map_or_else(is_free, |rule| matches(&rule.value, real))
    }

    fn mounts(&self, asked: Asked<'_>, found: &mut Vec<Refusal>) {
        for (number, volume) in asked.container.volumes.iter().enumerate() {
            if let Err((what, line)) = self.mount(asked.app, volume) {
                found.push(self.refusal(&format!("volumes[{number}]"), &what, line));
            }
        }
    }

    fn mount(&self, app: &AppName, volume: &Volume) -> Result<(), (String, Option<usize>)> {
        match &volume.source {
            VolumeSource::Named(name) => {
                let Some(rule) = self.rule(app, |r| r.volumes.as_ref()) else { return Ok(()) };
                match rule.value {
                    Volumes::Any => Ok(()),
                    Volumes::Own if is_own_volume(app, name) => Ok(()),
                    Volumes::Own => Err((
                        format!("lets an app have volumes by its own name only, such as `{app}_data`, not `{name}`"),
                        Some(rule.line),
                    )),
                    Volumes::None => Err((format!("lets apps have no volume, such as `{name}`"), Some(rule.line))),
                }
            }
            VolumeSource::Host(path) => {
                self.mount_of(app, path, (volume.read_only, false), &|dir| Some(dir.to_owned()))
            }
        }
    }

    /// Whether an app may mount a path of the host; else why not. The directories that are free without rules are those that
    /// `resolve` makes of them: nothing but root can make links of these.
    fn mount_of(
        &self,
        app: &AppName,
        path: &str,
        (read_only, is_socket): (bool, bool),
        resolve: &dyn Fn(&str) -> Option<String>,
    ) -> Result<(), (String, Option<usize>)> {
        let is_socket = is_socket || path.ends_with(".sock");
        let Some(rule) = self.rule(app, |r| r.mounts.as_ref()) else {
            let mut places = MOUNTABLE.iter().filter_map(|place| resolve(place)).filter(|place| place != "/");
            let is_free = places.any(|place| is_below(path, &place) && path != place);
            return match is_free && !is_socket {
                true => Ok(()),
                false => Err((
                    format!("does not let apps mount `{path}`, only directories below {}", MOUNTABLE.join(", ")),
                    None,
                )),
            };
        };
        let covering = rule.value.iter().filter_map(|allowed| {
            // Not as `resolve` has it: an app may be able to write there, and to make a link of it.
            let place = allowed.path.replace("{app}", app.as_str());
            // A socket gives its user the rights of who listens there, so it must be named.
            let covers = is_below(path, &place) && (path == place || !is_socket);
            covers.then_some((place, allowed.read_only))
        });
        // What can be written through a directory above it is not protected.
        let protected = rule.value.iter().filter(|allowed| allowed.read_only && !read_only);
        let mut protected = protected.map(|allowed| allowed.path.replace("{app}", app.as_str()));
        if let Some(below) = protected.find(|place| place != path && is_below(place, path)) {
            let what = format!("lets this app only read `{below}`, so it cannot write to `{path}` above it");
            return Err((what, Some(rule.line)));
        }
        match covering.max_by_key(|(place, _)| place.len()) {
            None => Err((format!("does not let this app mount `{path}`"), Some(rule.line))),
            Some((place, true)) if !read_only => {
                Err((format!("lets this app only read `{place}`: write `{path}:…:ro`"), Some(rule.line)))
            }
            Some(_) => Ok(()),
        }
    }

    /// Whether an app may mount what a path of its spec leads to on this host. `resolve` follows links in the directories that
    /// are free without rules; `None` for one that does not exist.
    pub fn admits_real_path(
        &self,
        app: &AppName,
        real: &str,
        (read_only, is_socket): (bool, bool),
        resolve: &dyn Fn(&str) -> Option<String>,
    ) -> bool {
        self.unusable.is_none() && self.mount_of(app, real, (read_only, is_socket), resolve).is_ok()
    }

    fn rights(&self, asked: Asked<'_>, found: &mut Vec<Refusal>) {
        let c = asked.container;
        let app = asked.app;
        if let Some(rule) = self.rule(app, |r| r.users.as_ref()) {
            if let Err(what) = user_is_within(c.user.as_deref(), &rule.value) {
                found.push(self.refusal("user", &what, Some(rule.line)));
            }
            for group in c.group_add.iter().filter(|group| !is_within(group, &rule.value)) {
                let what = format!("lets apps have the groups {} only, by number, not `{group}`", ranges(&rule.value));
                found.push(self.refusal("group_add", &what, Some(rule.line)));
            }
        }
        let added = self.rule(app, |r| r.cap_add.as_ref());
        for cap in &c.cap_add {
            if !added.is_some_and(|rule| rule.value.contains(cap)) {
                let what = format!("does not let this app have the capability `{cap}`");
                found.push(self.refusal("cap_add", &what, added.map(|rule| rule.line)));
            }
        }
        if let Some(rule) = self.rule(app, |r| r.cap_drop.as_ref()) {
            let dropped: Vec<String> = c.cap_drop.iter().map(|cap| capability(cap)).collect();
            for cap in &rule.value {
                if !dropped.contains(cap) && !dropped.iter().any(|d| d == "ALL") {
                    let what = format!("runs apps only without the capability `{cap}`: write `cap_drop: [{cap}]`");
                    found.push(self.refusal("cap_drop", &what, Some(rule.line)));
                }
            }
        }
        let switches = [
            (
                "security_opt",
                "runs apps with `security_opt: [no-new-privileges]` only",
                c.no_new_privileges,
                self.rule(app, |r| r.no_new_privileges.as_ref()),
            ),
            (
                "read_only",
                "runs apps with `read_only: true` only",
                c.read_only,
                self.rule(app, |r| r.read_only.as_ref()),
            ),
        ];
        for (key, what, is_set, rule) in switches {
            if let Some(rule) = rule.filter(|rule| rule.value && !is_set) {
                found.push(self.refusal(key, what, Some(rule.line)));
            }
        }
        let devices = self.rule(app, |r| r.devices.as_ref());
        for (number, device) in c.devices.iter().enumerate() {
            if !devices.is_some_and(|rule| matches(&rule.value, &device.host)) {
                let what = format!("does not let this app have the device `{}`", device.host);
                found.push(self.refusal(&format!("devices[{number}]"), &what, devices.map(|rule| rule.line)));
            }
        }
        let sysctls = self.rule(app, |r| r.sysctls.as_ref());
        for name in c.sysctls.keys() {
            if !sysctls.is_some_and(|rule| matches(&rule.value, name)) {
                let what = format!("does not let this app set `{name}`");
                found.push(self.refusal(&format!("sysctls.{name}"), &what, sysctls.map(|rule| rule.line)));
            }
        }
        self.network(asked, found);
        if let Some(rule) = self.rule(app, |r| r.log_drivers.as_ref()) {
            let driver = c.logging.as_ref().map_or("json-file", |logging| logging.driver.as_str());
            if !rule.value.iter().any(|allowed| allowed == driver) {
                found.push(self.refusal(
                    "logging",
                    &format!("has no logging driver `{driver}` for apps"),
                    Some(rule.line),
                ));
            }
        }
    }

    fn network(&self, asked: Asked<'_>, found: &mut Vec<Refusal>) {
        let network = asked.container.network.as_deref().unwrap_or("bridge");
        let rule = self.rule(asked.app, |r| r.networks.as_ref());
        let is_allowed = match (rule, network) {
            // What runs in it can do nothing there.
            (None, "host") => false,
            // No pattern is meant to include the host's own.
            (Some(rule), "host") => rule.value.iter().any(|pattern| pattern.as_str() == "host"),
            (_, "none") | (None, _) => true,
            (Some(rule), network) => matches(&rule.value, network),
        };
        if !is_allowed {
            let what = format!("does not let this app have the network `{network}`");
            found.push(self.refusal("network_mode", &what, rule.map(|rule| rule.line)));
        }
    }

    fn limits(&self, asked: Asked<'_>, found: &mut Vec<Refusal>) {
        let c = asked.container;
        let limits = [
            ("mem_limit", bytes as fn(i64) -> String, c.memory, self.rule(asked.app, |r| r.memory.as_ref())),
            ("cpus", cores, c.nano_cpus, self.rule(asked.app, |r| r.nano_cpus.as_ref())),
            ("pids_limit", |n| format!("{n} processes"), c.pids, self.rule(asked.app, |r| r.pids.as_ref())),
        ];
        for (key, written, asked, rule) in limits {
            let Some(rule) = rule else { continue };
            let most = written(rule.value);
            let what = match asked {
                None => format!("runs apps with a limit only, of at most {most}"),
                Some(much) if much > rule.value => format!("gives this app at most {most}, not {}", written(much)),
                Some(_) => continue,
            };
            found.push(self.refusal(key, &what, Some(rule.line)));
        }
    }
}

/// Whether an archive is a path to which no rule leads: the agent reads it as root.
fn archive_is_out_of_place(image: &ImageRef, has_rule: bool) -> bool {
    let path = image.archive().filter(|archive| archive.scheme().is_none());
    path.is_some_and(|path| !has_rule && !MOUNTABLE.iter().any(|place| is_below(path.place(), place)))
}

fn matches(patterns: &[Pattern], text: &str) -> bool {
    patterns.iter().any(|pattern| pattern.matches(text))
}

/// Whether a path is a directory or lies below it.
fn is_below(path: &str, dir: &str) -> bool {
    let dir = dir.trim_end_matches('/');
    path.strip_prefix(dir).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn is_own_volume(app: &AppName, name: &str) -> bool {
    name.strip_prefix(app.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '_']))
}

/// The name of a capability without `CAP_`, in upper case.
pub(super) fn capability(text: &str) -> String {
    let upper = text.to_ascii_uppercase();
    upper.strip_prefix("CAP_").unwrap_or(&upper).to_owned()
}

/// Memory as a spec has it.
fn bytes(n: i64) -> String {
    match n {
        n if n % (1 << 30) == 0 => format!("{}G of memory", n >> 30),
        n if n % (1 << 20) == 0 => format!("{}M of memory", n >> 20),
        n => format!("{n} bytes of memory"),
    }
}

fn cores(nano: i64) -> String {
    let parts = format!("{}.{:09}", nano / 1_000_000_000, nano % 1_000_000_000);
    format!("{} cores", parts.trim_end_matches('0').trim_end_matches('.'))
}

fn is_within(id: &str, ranges: &[(u32, u32)]) -> bool {
    let is_number = !id.is_empty() && id.bytes().all(|b| b.is_ascii_digit());
    is_number && id.parse::<u32>().is_ok_and(|id| ranges.iter().any(|(from, to)| (*from..=*to).contains(&id)))
}

/// An image may give any number to a name, so only numbers count.
fn user_is_within(user: Option<&str>, allowed: &[(u32, u32)]) -> Result<(), String> {
    let Some(user) = user else {
        return Err(format!("runs apps by the users {} only, and the spec names none", ranges(allowed)));
    };
    // Without a group, the image says which one it is.
    let (id, group) = user.split_once(':').unwrap_or((user, ""));
    if is_within(id, allowed) && is_within(group, allowed) {
        return Ok(());
    }
    Err(format!(
        "runs apps by users and groups of {} only, as `user: \"NUMBER:NUMBER\"`, not `{user}`",
        ranges(allowed)
    ))
}

fn ranges(ranges: &[(u32, u32)]) -> String {
    let text = |(from, to): &(u32, u32)| if from == to { from.to_string() } else { format!("{from}-{to}") };
    ranges.iter().map(text).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
