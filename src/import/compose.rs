//! Whole Compose files, and the stack files of Swarm, which are the same.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{
    Effect, ImportError, Imported, Note,
    interpolate::Variables,
    merge::merge,
    service::{Project, translate},
    tree::{entries, get, items, text},
};
use crate::model::{
    name::{AppName, VirtualHost},
    policy::Policy,
    yaml::{Key, Node, Value, parse_expanded},
};

/// How files are imported.
#[derive(Clone)]
pub struct Options<'a> {
    /// The name of the project, unless the files give one. Docker's volumes are named after it.
    pub project: String,
    /// Whether that name counts although the files give one.
    pub is_project_given: bool,
    /// Values of variables, as in `.env`.
    pub variables: BTreeMap<String, String>,
    /// Only these services, also those with a profile.
    pub services: BTreeSet<String>,
    /// Virtual hosts of services. Without the name of a service: of the only one that takes requests.
    pub hosts: Vec<(Option<String>, VirtualHost)>,
    /// Names of apps by services, where they are others.
    pub names: BTreeMap<String, AppName>,
    /// Keys that may be left out although they have no meaning here.
    pub dropped: BTreeSet<String>,
    /// What hosts allow.
    pub policy: Arc<Policy>,
    /// Reads a file that the service names.
    pub read: &'a dyn Fn(&str) -> Result<Vec<u8>, String>,
}

/// What became of a project.
#[derive(Debug)]
pub struct Outcome {
    /// Its services.
    pub apps: Vec<Imported>,
    /// What concerns more than one of them.
    pub notes: Vec<Note>,
}

impl Outcome {
    /// The worst that became of any key.
    pub fn worst(&self) -> Option<Effect> {
        self.apps.iter().flat_map(|app| &app.notes).chain(&self.notes).map(|note| note.effect).max()
    }
}

/// Makes apps of the services of files, each by its name and text; later files are merged over earlier ones.
///
/// # Errors
/// If a text is no Compose file, or a variable that must have a value has none.
pub fn compose(files: &[(String, Vec<u8>)], options: &Options<'_>) -> Result<Outcome, ImportError> {
    let mut variables = Variables::new(options.variables.clone());
    let (mut whole, mut errors): (Option<Node>, Vec<String>) = (None, Vec::new());
    for (name, text) in files {
        let mut node = parse_expanded(text).map_err(|problem| ImportError::one(format!("{name}: {problem}")))?;
        if !matches!(node.value, Value::Map(_)) || get(&node, "services").is_none() {
            return Err(ImportError::one(format!("{name}: this is no Compose file: it has no `services`")));
        }
        if let Err(what) = variables.resolve(&mut node, false) {
            errors.push(format!("{name}: {what}"));
        }
        let missing = std::mem::take(&mut variables.required);
        errors.extend(missing.into_iter().map(|(line, what)| {
            format!(
                "{name}: line {line}: {what} (a variable that must have a value; give it in the file of `--env-file`)"
            )
        }));
        whole = Some(match whole {
            Some(base) => merge(base, node, ""),
            None => node,
        });
    }
    if !errors.is_empty() {
        return Err(ImportError(errors));
    }
    let whole = whole.ok_or_else(|| ImportError::one("no file is given"))?;
    project(&whole, &variables, options)
}

/// Makes apps of the services of a file.
pub(super) fn project(whole: &Node, variables: &Variables, options: &Options<'_>) -> Result<Outcome, ImportError> {
    let services = extended(get(whole, "services").map(entries).unwrap_or_default())?;
    if let Some(unknown) = options.services.iter().find(|name| !services.contains_key(*name)) {
        let names: Vec<&str> = services.keys().map(String::as_str).collect();
        return Err(ImportError::one(format!("there is no service `{unknown}`; there are {}", names.join(", "))));
    }
    let mut notes = top_level(whole);
    notes.extend(variables.unset.iter().map(|(name, line)| Note {
        line: *line,
        key: format!("${name}"),
        effect: Effect::Changed,
        message: "it has no value: variables of apps that use it are left out, elsewhere it is an empty text (`--env-file` names a file with values)".to_owned(),
    }));
    notes.extend(variables.exposed.iter().map(|(name, line)| {
        Note {
            line: *line,
            key: format!("${name}"),
            effect: Effect::Changed,
            message:
                "its value stands in the spec, which is no place for a secret: let the app read it from a variable"
                    .to_owned(),
        }
    }));
    let project = Project {
        name: get(whole, "name")
            .and_then(text)
            .filter(|_| !options.is_project_given)
            .unwrap_or(&options.project)
            .to_owned(),
        definitions: whole,
        variables,
        waits: waits(&services),
        services: &services,
        options,
    };
    let mut apps = Vec::new();
    for (name, service) in &services {
        if let Some(note) = project.left_out(name, service) {
            notes.push(note);
        } else if options.services.is_empty() || options.services.contains(name) {
            apps.push(translate(&project, name, service)?);
        }
    }
    check_names(&apps)?;
    check_hosts(&project, &apps)?;
    Ok(Outcome { apps, notes })
}

/// The services, each over the one that it extends.
fn extended(services: &[(Key, Node)]) -> Result<BTreeMap<String, Node>, ImportError> {
    let by_name: BTreeMap<&str, &Node> = services.iter().map(|(key, node)| (key.name.as_str(), node)).collect();
    let whole = |name: &&str| Ok(((*name).to_owned(), over_base(name, &by_name, &mut BTreeSet::new())?));
    by_name.keys().map(whole).collect()
}

/// A service over the one that it extends. `seen` has the names on the way to it.
fn over_base<'n>(
    name: &'n str,
    by_name: &BTreeMap<&'n str, &'n Node>,
    seen: &mut BTreeSet<&'n str>,
) -> Result<Node, ImportError> {
    let wrong = |what: String| ImportError::one(format!("service `{name}`: {what}"));
    let Some(node) = by_name.get(name).copied() else { return Err(wrong("there is none".to_owned())) };
    let Some(extends) = get(node, "extends") else { return Ok(node.clone()) };
    seen.insert(name);
    if get(extends, "file").is_some() {
        return Err(wrong(
            "`extends.file` is not read; write out what it takes from there, or give what `docker compose config` prints"
                .to_owned(),
        ));
    }
    let base = text(extends).or_else(|| get(extends, "service").and_then(text)).unwrap_or_default();
    if seen.contains(base) || !by_name.contains_key(base) {
        return Err(wrong(format!("`extends` names no other service: `{base}`")));
    }
    // What a service needs beside it is not inherited.
    let base = without(&over_base(base, by_name, seen)?, &["depends_on", "links", "volumes_from"]);
    Ok(merge(base, without(node, &["extends"]), "services"))
}

/// A mapping without these keys.
fn without(node: &Node, keys: &[&str]) -> Node {
    let kept = entries(node).iter().filter(|(key, _)| !keys.contains(&key.name.as_str())).cloned();
    Node { value: Value::Map(kept.collect()), ..*node }
}

/// What the file says beside its services.
fn top_level(whole: &Node) -> Vec<Note> {
    let mut notes = Vec::new();
    for (key, _) in entries(whole) {
        let (effect, message) = match key.name.as_str() {
            "version" | "name" | "services" | "volumes" | "networks" | "secrets" | "configs" => continue,
            extension if extension.starts_with("x-") => continue,
            "include" => (Effect::Refused, "give the files that it names on the command line, too"),
            _ => (Effect::Refused, "this is not a key of a Compose file that can be imported"),
        };
        notes.push(Note { line: key.line, key: key.name.clone(), effect, message: message.to_owned() });
    }
    notes
}

/// Which services wait until another one has ended, by that one.
fn waits(services: &BTreeMap<String, Node>) -> BTreeMap<String, Vec<String>> {
    let mut waits: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (name, service) in services {
        let Some(depends) = get(service, "depends_on") else { continue };
        for (on, how) in entries(depends) {
            if get(how, "condition").and_then(text) == Some("service_completed_successfully") {
                waits.entry(on.name.clone()).or_default().push(name.clone());
            }
        }
    }
    waits
}

fn check_names(apps: &[Imported]) -> Result<(), ImportError> {
    let mut seen = BTreeSet::new();
    match apps.iter().find(|app| !seen.insert(&app.app)) {
        None => Ok(()),
        Some(app) => Err(ImportError::one(format!(
            "two services become the app `{}`; give one of them another name by `--app SERVICE=APP`",
            app.app
        ))),
    }
}

/// Each virtual host that was given has an app.
fn check_hosts(project: &Project<'_>, apps: &[Imported]) -> Result<(), ImportError> {
    let of_none = project.options.hosts.iter().filter(|(service, _)| service.is_none());
    let with_ports: Vec<&str> = project.with_requests().collect();
    if of_none.count() > 0 && with_ports.len() != 1 {
        let message = match with_ports.as_slice() {
            [] => "no service has `ports`; write `--host SERVICE=NAME`".to_owned(),
            several => format!("these services take requests: {}; write `--host SERVICE=NAME`", several.join(", ")),
        };
        return Err(ImportError::one(message));
    }
    let named = project.options.hosts.iter().filter_map(|(service, _)| service.as_ref());
    for service in named {
        let known = project.app_name(service).is_some_and(|name| apps.iter().any(|app| app.app == name));
        if !known {
            return Err(ImportError::one(format!("`--host`: there is no service `{service}`")));
        }
    }
    Ok(())
}

impl Project<'_> {
    /// Why a service becomes no app, if so.
    fn left_out(&self, name: &str, service: &Node) -> Option<Note> {
        if self.options.services.contains(name) {
            return None;
        }
        let note = |effect, message: String| Note { line: service.line, key: name.to_owned(), effect, message };
        let profiles: Vec<&str> =
            get(service, "profiles").map(items).unwrap_or_default().into_iter().filter_map(text).collect();
        if !profiles.is_empty() {
            return Some(note(
                Effect::Dropped,
                format!("only started with a profile ({}); `--service {name}` imports it", profiles.join(", ")),
            ));
        }
        let waiting = self.waits.get(name)?;
        let message = match self.runner_of(name) {
            Some(runner) => format!("it ends before others begin: it is the `release_command` of `{runner}`"),
            None => format!("it ends before {} begins, and an app does not end", waiting.join(", ")),
        };
        Some(note(Effect::Changed, message))
    }
}
