//! One service of a Compose file, as the spec of an app.

mod deploy;
mod environment;
mod health;
mod ingress;
mod keys;
mod volumes;

use std::collections::BTreeMap;

use super::{
    Effect, ImportError, Imported, Note,
    compose::Options,
    interpolate::Variables,
    list, map, scalar,
    tree::{entries, get, is_true, items, names, text, truth, write},
};
use crate::model::{
    name::{AppName, EnvName},
    policy::{Asked, Refusal},
    spec::Spec,
    yaml::{Node, Value},
};
pub(super) use keys::VERBATIM;
use keys::{DROPPED, ORDER, REFUSED};

/// The project that a service is part of.
pub(super) struct Project<'a> {
    pub(super) name: String,
    /// The whole file, for what is defined beside its services.
    pub(super) definitions: &'a Node,
    pub(super) variables: &'a Variables,
    /// Services that wait until another one has ended, by that one.
    pub(super) waits: BTreeMap<String, Vec<String>>,
    pub(super) services: &'a BTreeMap<String, Node>,
    pub(super) options: &'a Options<'a>,
}

impl Project<'_> {
    /// The app of a service: its name, in the letters that apps have.
    pub(super) fn app_name(&self, service: &str) -> Option<AppName> {
        if let Some(name) = self.options.names.get(service) {
            return Some(name.clone());
        }
        let letters = service.to_lowercase().replace(['_', '.'], "-");
        AppName::try_from(letters.trim_matches('-')).ok()
    }

    /// The service that runs the command of one that ends before it, as its `release_command`: one with the same image,
    /// if there is any; the first that takes requests rather than another.
    pub(super) fn runner_of(&self, before: &str) -> Option<&str> {
        let made_of = |node: &'_ Node| get(node, "image").or_else(|| get(node, "build")).map(|n| n.value.clone());
        let service = self.services.get(before)?;
        if get(service, "command").is_none() || get(service, "entrypoint").is_some() {
            return None;
        }
        let waiting = self.waits.get(before)?.iter();
        let waiting = waiting.filter_map(|name| self.services.get_key_value(name));
        let mut alike: Vec<(&String, &Node)> = waiting.filter(|(_, node)| made_of(node) == made_of(service)).collect();
        alike.sort_by_key(|(_, node)| !ingress::takes_requests(node));
        alike.first().map(|(name, _)| name.as_str())
    }

    /// A definition below `volumes`, `networks`, `secrets` or `configs`.
    fn definition(&self, of: &str, name: &str) -> Option<&Node> {
        get(get(self.definitions, of)?, name)
    }

    /// The services that have ports for requests.
    pub(super) fn with_requests(&self) -> impl Iterator<Item = &str> {
        let chosen = |name: &str| self.options.services.is_empty() || self.options.services.contains(name);
        let services = self.services.iter().filter(move |(name, _)| chosen(name) && !self.waits.contains_key(*name));
        services.filter(|(_, node)| ingress::takes_requests(node)).map(|(name, _)| name.as_str())
    }
}

/// Whether a refusal is about a key of a spec, or a part of it.
fn is_of(refusal: &Refusal, key: &str) -> bool {
    refusal.key.split(['.', '[']).next() == Some(key)
}

/// A service on its way to a spec.
struct Translation<'a> {
    project: &'a Project<'a>,
    /// The name of the service.
    name: &'a str,
    app: AppName,
    service: &'a Node,
    spec: BTreeMap<&'static str, Node>,
    env: BTreeMap<EnvName, String>,
    notes: Vec<Note>,
}

/// Translates a service.
///
/// # Errors
/// If it has no name that an app can have, or a file that it names cannot be read.
pub(super) fn translate(project: &Project<'_>, name: &str, service: &Node) -> Result<Imported, ImportError> {
    let app = project.app_name(name).ok_or_else(|| {
        ImportError::one(format!("service `{name}`: no app can have this name; give it one by `--app {name}=APP`"))
    })?;
    let mut translation =
        Translation { project, name, app, service, spec: BTreeMap::new(), env: BTreeMap::new(), notes: Vec::new() };
    translation.run()?;
    Ok(translation.finish())
}

impl<'a> Translation<'a> {
    fn run(&mut self) -> Result<(), ImportError> {
        if !matches!(self.service.value, Value::Map(_)) {
            return Err(ImportError::one(format!("service `{}`: expected a mapping", self.name)));
        }
        if self.name != self.app.as_str() {
            let message = format!("it is the app `{}` now, and others reach it by that name", self.app);
            self.note(self.service.line, "services", Effect::Changed, message);
        }
        // Who takes requests decides on the health check, and volumes on the order.
        self.environment()?;
        self.ingress();
        self.volumes();
        for (key, node) in entries(self.service) {
            if node.value != Value::Null {
                self.key(&key.name, key.line, node);
            }
        }
        self.limits();
        self.release_command();
        self.order();
        Ok(())
    }

    fn key(&mut self, key: &str, line: usize, node: &'a Node) {
        match key {
            "environment" | "env_file" | "ports" | "expose" | "labels" | "volumes" | "tmpfs" | "secrets"
            | "configs" => {}
            extension if extension.starts_with("x-") => {}
            "image" => self.image(node, line),
            "build" => self.build(line),
            "healthcheck" => self.health(node, line),
            "deploy" => self.deploy(node),
            "container_name" => {
                let name = text(node).unwrap_or_default();
                if name != self.app.as_str() {
                    let message = format!("two releases run side by side; the app is `{}`", self.app);
                    self.note(line, key, Effect::Dropped, message);
                }
            }
            // Its end is what others wait for.
            "restart" if text(node) == Some("no") && self.project.waits.contains_key(self.name) => {}
            "scale" => self.replicas(node, line, "scale"),
            "depends_on" => {
                let message = format!("an app must wait by itself for what it needs: {}", names(node).join(", "));
                self.note(line, key, Effect::Dropped, message);
            }
            "networks" => self.networks(node, line),
            "stdin_open" | "tty" if truth(node) == Some(true) => {
                self.note(line, key, Effect::Dropped, "an app has no terminal");
            }
            "security_opt" => self.security(node, line),
            "cap_add" | "devices" | "sysctls" | "device_cgroup_rules" if is_empty(node) => {}
            "privileged" | "oom_kill_disable" if truth(node) == Some(false) => {}
            "pull_policy" if !matches!(text(node), Some("missing" | "if_not_present" | "always" | "never")) => {
                self.note(line, key, Effect::Dropped, "only `missing`, `always` and `never` are pull policies here");
            }
            "ipc" if matches!(text(node), Some("private" | "shareable")) => {
                self.note(line, key, Effect::Dropped, "each app has its own");
            }
            "mem_limit" | "cpus" | "pids_limit" if matches!(text(node), Some("0" | "-1")) => {}
            _ => self.key_by_name(key, line, node),
        }
    }

    /// A key whose value makes no difference.
    fn key_by_name(&mut self, key: &str, line: usize, node: &Node) {
        let find = |table: &[(&str, &'static str)]| table.iter().find(|(name, _)| *name == key).map(|(_, why)| *why);
        if let Some(why) = find(REFUSED) {
            self.refuse(line, key, why);
        } else if let Some(why) = find(DROPPED) {
            self.note(line, key, Effect::Dropped, why);
        } else if VERBATIM.contains(&key) {
            self.verbatim(key, line, node);
        } else {
            self.refuse(line, key, "this is not a key of a service that can be imported");
        }
    }

    /// Takes a key as it is, if a spec can have it so.
    fn verbatim(&mut self, key: &str, line: usize, node: &Node) {
        let Some(name) = ORDER.iter().find(|name| **name == key) else { return };
        let is_switch = matches!(key, "init" | "read_only" | "stdin_open" | "tty");
        let node = match truth(node).filter(|_| is_switch) {
            Some(value) => scalar(value.to_string()),
            None => node.clone(),
        };
        match self.objection(name, &node) {
            None => drop(self.spec.insert(name, node)),
            Some(why) => self.refuse(line, key, why),
        }
    }

    /// Why a spec cannot have this key with this value, if so.
    fn objection(&self, key: &str, node: &Node) -> Option<String> {
        let alone = match key {
            "image" => map([(key, node.clone())]),
            _ => map([("image", scalar("a:1")), (key, node.clone())]),
        };
        let problems = match Spec::parse(write(&alone).as_bytes()) {
            Ok(spec) => {
                return self.refusals(&spec).into_iter().find(|refusal| is_of(refusal, key)).map(|r| r.reason());
            }
            Err(problems) => problems,
        };
        let problem = problems.iter().next()?;
        Some(match &problem.hint {
            Some(hint) => format!("{} ({hint})", problem.message),
            None => problem.message.clone(),
        })
    }

    /// What the hosts do not allow of a spec.
    fn refusals(&self, spec: &Spec) -> Vec<Refusal> {
        let (image, container, ingress) = (spec.image.as_ref(), &spec.container, spec.ingress.as_ref());
        let asked = Asked { app: &self.app, image, container, ingress };
        self.project.options.policy.refusals_of(asked, self.env.keys())
    }

    fn put(&mut self, key: &'static str, node: Node) {
        self.spec.insert(key, node);
    }

    fn note(&mut self, line: usize, key: &str, effect: Effect, message: impl Into<String>) {
        self.notes.push(Note { line, key: key.to_owned(), effect, message: message.into() });
    }

    /// Without this key the app is another one, unless that is what is asked for.
    fn refuse(&mut self, line: usize, key: &str, message: impl Into<String>) {
        let first = key.split(['.', '[']).next().unwrap_or(key);
        let is_wanted = self.project.options.dropped.contains(first);
        let effect = if is_wanted { Effect::Dropped } else { Effect::Refused };
        let message: String = message.into();
        let message = if is_wanted { format!("as asked by `--drop`; {message}") } else { message };
        self.note(line, key, effect, message);
    }

    fn image(&mut self, node: &Node, line: usize) {
        let image = text(node).unwrap_or_default();
        let name = image.rsplit('/').next().unwrap_or(image);
        let is_fixed = name.contains('@') || name.split_once(':').is_some_and(|(_, tag)| tag != "latest");
        self.verbatim("image", line, node);
        if !is_fixed && self.spec.contains_key("image") {
            self.note(
                line,
                "image",
                Effect::Changed,
                "a tag that moves is only looked at for a new release: name a version",
            );
        }
    }

    fn build(&mut self, line: usize) {
        if get(self.service, "image").is_some() {
            return self.note(line, "build", Effect::Dropped, "build and push the image elsewhere, such as in CI");
        }
        let image = format!("{}-{}", self.project.name, self.name);
        let message = format!("build and push the image elsewhere, and name it in place of `{image}`");
        self.note(line, "build", Effect::Changed, message);
        self.put("image", scalar(image));
    }

    fn security(&mut self, node: &Node, line: usize) {
        let mut kept = Vec::new();
        for item in items(node) {
            match text(item).unwrap_or_default() {
                option if option.starts_with("no-new-privileges") => {
                    if !option.ends_with("false") {
                        kept.push(scalar("no-new-privileges"));
                    }
                }
                option if option.starts_with("label") => {
                    self.note(
                        line,
                        "security_opt",
                        Effect::Dropped,
                        format!("`{option}`: the engine's labels stay as they are"),
                    );
                }
                option => self.refuse(line, "security_opt", format!("`{option}`: the engine's profiles stay on")),
            }
        }
        if !kept.is_empty() {
            self.put("security_opt", list(kept));
        }
    }

    /// Apps find each other by their names, so networks that are only for that are not needed.
    fn networks(&mut self, node: &Node, line: usize) {
        let names = names(node);
        let external = |name: &&str| {
            let definition = self.project.definition("networks", name)?;
            is_true(definition, "external").then(|| get(definition, "name").and_then(text).unwrap_or(name).to_owned())
        };
        let outside: Vec<String> = names.iter().filter_map(external).collect();
        let is_behind_proxy = ingress::labels(self.service).keys().any(|label| label.starts_with("traefik."));
        match outside.as_slice() {
            [one] if names.len() == 1 && !is_behind_proxy => {
                self.put("network_mode", scalar(one.clone()));
                let message = format!("`network_mode: {one}`: the network must exist on each host");
                self.note(line, "networks", Effect::Changed, message);
            }
            [] if names == ["default"] => {}
            _ => {
                let message = format!("apps of a host find each other by their names; left out: {}", names.join(", "));
                self.note(line, "networks", Effect::Dropped, message);
            }
        }
    }

    /// Another service with the same image that ends before this one begins.
    fn release_command(&mut self) {
        for (before, waiting) in &self.project.waits {
            if !waiting.iter().any(|service| service == self.name) {
                continue;
            }
            let Some(service) = self.project.services.get(before) else { continue };
            if self.project.runner_of(before) == Some(self.name) {
                if let Some(command) = get(service, "command") {
                    self.put("release_command", command.clone());
                    let message = format!(
                        "once for each release, what `{before}` did, with the variables and the user of this app: it has the same image"
                    );
                    self.note(command.line, "release_command", Effect::Changed, message);
                }
            } else if self.project.runner_of(before).is_none() {
                let message = format!("`{before}` ran before it, and does not any more");
                self.note(service.line, "depends_on", Effect::Changed, message);
            }
        }
    }

    fn finish(mut self) -> Imported {
        if !self.spec.contains_key("image") && !self.notes.iter().any(|note| note.key == "image") {
            self.note(self.service.line, "image", Effect::Refused, "the service has neither `image` nor `build`");
        }
        let ordered = ORDER.iter().filter_map(|key| Some((*key, self.spec.get(key)?.clone())));
        let body = write(&map(ordered));
        if self.notes.iter().all(|note| note.effect != Effect::Refused) {
            let found: Vec<(String, String)> = match Spec::parse(body.as_bytes()) {
                Ok(spec) => self.refusals(&spec).into_iter().map(|r| (r.key.clone(), r.reason())).collect(),
                Err(problems) => problems.iter().map(|p| (p.key.clone(), p.message.clone())).collect(),
            };
            for (key, message) in found {
                self.note(self.service.line, &key, Effect::Refused, message);
            }
        }
        self.notes.sort_by_key(|note| note.line);
        let mut spec = format!("# Imported from the service `{}` of `{}`.\n", self.name, self.project.name);
        for note in &self.notes {
            spec.push_str(&format!("# {}\n", note.to_string().replace(['\n', '\r'], " ")));
        }
        if !self.env.is_empty() {
            spec.push_str(&format!("# Its variables belong below `env/{}/`.\n", self.app));
        }
        spec.push_str(&body);
        Imported { app: self.app, spec, env: self.env, notes: self.notes }
    }
}

fn is_empty(node: &Node) -> bool {
    matches!(&node.value, Value::Seq(items) if items.is_empty())
        || matches!(&node.value, Value::Map(all) if all.is_empty())
}
