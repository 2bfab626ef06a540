//! Kamal's `config/deploy.yml`: each role becomes an app.

use std::collections::BTreeMap;

use super::{
    Effect, ImportError, Note,
    compose::{Options, Outcome, project},
    interpolate::Variables,
    list, map, scalar,
    tree::{entries, get, items, text},
};
use crate::model::{
    name::VirtualHost,
    yaml::{Key, Node, Value, parse_expanded},
};

/// Keys that are for what demae does by other means, or does not do, and why.
const DROPPED: &[(&str, &str)] = &[
    ("aliases", "they are of Kamal's command line"),
    ("allow_empty_roles", "an app without hosts is no error"),
    ("asset_path", "serve assets from a volume or another host; two releases run side by side"),
    ("builder", "images are built elsewhere, such as in CI"),
    ("deploy_timeout", "`healthcheck.start_period` is how long an instance may take"),
    ("drain_timeout", "it is `ingress.drain`, 30 s unless given"),
    ("error_pages_path", "they belong into a template of nginx"),
    ("hooks_path", "there are no hooks; `release_command` runs once for each release"),
    ("minimum_version", "it is about Kamal"),
    ("primary_role", "apps are equal"),
    ("readiness_delay", "an instance is asked until it is healthy"),
    ("registry", "credentials are those of `docker login` on each host"),
    ("require_destination", "destinations are merged before: give the files one after the other"),
    ("retain_containers", "the last ten releases are kept"),
    ("run_directory", "it is of Kamal's hosts"),
    ("sshkit", "agents need no ssh"),
    ("ssh", "agents need no ssh"),
];
/// The role that takes requests.
const PRIMARY: &str = "web";

/// Makes apps of the roles of Kamal's files; those of a destination are merged over the first one. What is between `<%`
/// and `%>` is not run.
///
/// # Errors
/// If a text is not Kamal's.
pub fn kamal(files: &[(String, Vec<u8>)], options: &Options<'_>) -> Result<Outcome, ImportError> {
    let mut whole: Option<Node> = None;
    for (name, text) in files {
        if text.windows(2).any(|two| two == b"<%") {
            return Err(ImportError::one(format!(
                "{name}: Ruby between `<%` and `%>` is not run; give what `kamal config` prints, or write the values out"
            )));
        }
        let node = parse_expanded(text).map_err(|problem| ImportError::one(format!("{name}: {problem}")))?;
        whole = Some(match whole {
            Some(base) => super::merge::merge(base, node, ""),
            None => node,
        });
    }
    let whole = whole.ok_or_else(|| ImportError::one("no file is given"))?;
    let service = get(&whole, "service").and_then(text);
    let service = service.ok_or_else(|| ImportError::one("this is no file of Kamal: it has no `service`"))?;
    let mut notes = Vec::new();
    for (key, node) in entries(&whole) {
        notes.extend(of_top_level(key, node));
    }
    let mut services = Vec::new();
    for (role, settings) in roles(&whole) {
        let name = if role == PRIMARY { service.to_owned() } else { format!("{service}-{role}") };
        services.push((name, translated(&whole, &role, settings, &mut notes)));
    }
    // Volumes have the names that they have on the hosts.
    let volumes = get(&whole, "volumes").map(items).unwrap_or_default().into_iter().filter_map(text);
    let volumes = volumes.filter_map(|volume| volume.split_once(':')).map(|(source, _)| source.to_owned());
    let volumes: BTreeMap<String, Node> = volumes.map(|name| (name.clone(), map([("name", scalar(name))]))).collect();
    let file = map([("services", map(services)), ("volumes", map(volumes))]);
    let options = with_hosts(&whole, service, options);
    let mut outcome = project(&file, &Variables::new(options.variables.clone()), &options)?;
    outcome.notes.splice(0..0, notes);
    Ok(outcome)
}

/// The same options, with the hosts of kamal-proxy for the first role, unless others are given.
fn with_hosts<'a>(whole: &Node, service: &str, options: &Options<'a>) -> Options<'a> {
    let proxy = get(whole, "proxy");
    let named = [proxy.and_then(|proxy| get(proxy, "host")), proxy.and_then(|proxy| get(proxy, "hosts"))];
    let named = named.into_iter().flatten().flat_map(items).filter_map(text).flat_map(|hosts| hosts.split(','));
    let mut hosts = options.hosts.clone();
    if hosts.is_empty() {
        let valid = named.filter_map(|host| VirtualHost::try_from(host.trim()).ok());
        hosts = valid.map(|host| (Some(service.to_owned()), host)).collect();
    }
    Options { hosts, ..options.clone() }
}

fn of_top_level(key: &Key, node: &Node) -> Vec<Note> {
    let note =
        |key: String, line: usize, effect, message: &str| Note { line, key, effect, message: message.to_owned() };
    match key.name.as_str() {
        "service" | "image" | "servers" | "env" | "proxy" | "volumes" | "labels" | "logging" => Vec::new(),
        "boot" => {
            let message = "`deploy.update_config.parallelism` and `monitor` pace a release over hosts; one host is first, then a quarter at a time";
            vec![note(key.name.clone(), key.line, Effect::Dropped, message)]
        }
        "accessories" => entries(node)
            .iter()
            .map(|(accessory, _)| {
                let message = "it is an app of its own: `demae import container` makes a spec of its container";
                note(format!("accessories.{}", accessory.name), accessory.line, Effect::Dropped, message)
            })
            .collect(),
        name => match DROPPED.iter().find(|(known, _)| *known == name) {
            Some((_, why)) => vec![note(key.name.clone(), key.line, Effect::Dropped, why)],
            None => vec![note(
                key.name.clone(),
                key.line,
                Effect::Refused,
                "this is not a key of Kamal that can be imported",
            )],
        },
    }
}

/// The roles with their settings, if they have any. A plain list of hosts is one role.
fn roles(whole: &Node) -> Vec<(String, Option<&Node>)> {
    match get(whole, "servers").map(|servers| (&servers.value, servers)) {
        Some((Value::Map(roles), _)) => roles
            .iter()
            .map(|(key, node)| (key.name.clone(), matches!(node.value, Value::Map(_)).then_some(node)))
            .collect(),
        _ => vec![(PRIMARY.to_owned(), None)],
    }
}

/// A role as a service of Compose.
fn translated(whole: &Node, role: &str, settings: Option<&Node>, notes: &mut Vec<Note>) -> Node {
    let mut service: Vec<(String, Node)> = Vec::new();
    if let Some(image) = get(whole, "image").and_then(text) {
        let server = get(whole, "registry").and_then(|registry| get(registry, "server")).and_then(text);
        let whole = server.map_or_else(|| image.to_owned(), |server| format!("{server}/{image}"));
        service.push(("image".to_owned(), scalar(whole)));
    }
    for key in ["volumes", "labels", "logging"] {
        let own = settings.and_then(|settings| get(settings, key)).or_else(|| get(whole, key));
        service.extend(own.map(|node| (key.to_owned(), node.clone())));
    }
    if let Some(command) = settings.and_then(|settings| get(settings, "cmd")) {
        service.push(("command".to_owned(), command.clone()));
    }
    let environment = [get(whole, "env"), settings.and_then(|settings| get(settings, "env"))];
    let mut variables = Vec::new();
    for env in environment.into_iter().flatten() {
        // Either variables, or those that are known and the names of those that are secret.
        let clear = get(env, "clear").or_else(|| get(env, "secret").is_none().then_some(env));
        for (key, value) in clear.map(entries).unwrap_or_default() {
            variables.push((key.name.clone(), value.clone()));
        }
        for secret in get(env, "secret").map(items).unwrap_or_default().into_iter().filter_map(text) {
            // `NAME:OTHER` takes the value of another name.
            let (name, from) = secret.split_once(':').unwrap_or((secret, secret));
            notes.push(Note {
                line: 0,
                key: format!("env.secret.{name}"),
                effect: Effect::Changed,
                message: format!("set it before the first deploy: `{from}` of `.kamal/secrets`"),
            });
        }
    }
    if !variables.is_empty() {
        service.push(("environment".to_owned(), map(variables)));
    }
    if let Some(hosts) =
        settings.and_then(|settings| get(settings, "hosts")).or_else(|| get(get(whole, "servers")?, role))
    {
        let hosts: Vec<&str> = items(hosts).into_iter().filter_map(text).collect();
        if !hosts.is_empty() {
            notes.push(Note {
                line: 0,
                key: format!("servers.{role}"),
                effect: Effect::Changed,
                message: format!(
                    "an app runs where its constraints say: give {} the label `role = \"{role}\"`",
                    hosts.join(", ")
                ),
            });
        }
        let constraint = map([("constraints", list(vec![scalar(format!("node.labels.role == {role}"))]))]);
        service.push(("deploy".to_owned(), map([("placement", constraint)])));
    }
    let proxy = settings.and_then(|settings| get(settings, "proxy"));
    let is_off = proxy.and_then(text) == Some("false");
    if (role == PRIMARY || proxy.is_some()) && !is_off {
        let proxy = proxy.filter(|proxy| matches!(proxy.value, Value::Map(_))).or_else(|| get(whole, "proxy"));
        proxied(proxy, &mut service, notes);
    }
    map(service)
}

/// The settings of kamal-proxy.
fn proxied(proxy: Option<&Node>, service: &mut Vec<(String, Node)>, notes: &mut Vec<Note>) {
    let port = proxy.and_then(|proxy| get(proxy, "app_port")).and_then(text).unwrap_or("80").to_owned();
    let of_proxy = |name: &str| proxy.and_then(|proxy| get(proxy, name));
    let path = of_proxy("healthcheck").and_then(|check| get(check, "path")).and_then(text).unwrap_or("/up");
    let url = format!("http://localhost:{port}{path}");
    let test = map([("test", list(["CMD", "curl", "-f", &url].map(scalar).to_vec()))]);
    service.push(("ports".to_owned(), list(vec![scalar(port)])));
    service.push(("healthcheck".to_owned(), test));
    for (key, _) in proxy.map(entries).unwrap_or_default() {
        let message = match key.name.as_str() {
            "app_port" | "host" | "hosts" | "healthcheck" => continue,
            "ssl" => "certificates are nginx's: docs/guides/certificates.md",
            "response_timeout" => "it is `ingress.read_timeout`, 60 s unless given",
            "buffering" => "it is `ingress.request_buffering` and `max_body_size`",
            "path_prefix" | "strip_path_prefix" => "it is `ingress.path` and `strip_path`",
            _ => "it is of kamal-proxy; nginx is in its place",
        };
        notes.push(Note {
            line: key.line,
            key: format!("proxy.{}", key.name),
            effect: Effect::Dropped,
            message: message.to_owned(),
        });
    }
}
