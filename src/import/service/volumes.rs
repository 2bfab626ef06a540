//! `volumes`, `tmpfs`, `secrets` and `configs`.

use super::{Effect, Node, Translation, Value, list, scalar};
use crate::import::tree::{get, is_true, items, text};

/// Files of the host that images expect for their time zone.
const TIME_ZONE: [&str; 3] = ["/etc/localtime", "/etc/timezone", "/usr/share/zoneinfo"];

/// A mount of a service.
struct Mount {
    source: Option<String>,
    target: String,
    is_read_only: bool,
    line: usize,
}

impl<'a> Translation<'a> {
    /// Takes all mounts of the service.
    pub(super) fn volumes(&mut self) {
        let (mut volumes, mut tmpfs) = (Vec::new(), Vec::new());
        for item in get(self.service, "tmpfs").map(items).unwrap_or_default() {
            let written = text(item).unwrap_or_default();
            let path = written.split(':').next().unwrap_or_default();
            if path != written {
                self.note(item.line, "tmpfs", Effect::Changed, format!("`{path}`, without options"));
            }
            tmpfs.push(scalar(path));
        }
        for item in get(self.service, "volumes").map(items).unwrap_or_default() {
            match self.mount(item) {
                Some(mount) => volumes.extend(self.volume(mount)),
                None if get(item, "type").and_then(text) == Some("tmpfs") => {
                    tmpfs.extend(get(item, "target").and_then(text).map(scalar));
                }
                None => self.refuse(item.line, "volumes", "this is not a volume that can be mounted"),
            }
        }
        for (kind, base) in [("secrets", "/run/secrets/"), ("configs", "/")] {
            volumes.extend(self.files(kind, base));
        }
        for (key, found) in [("volumes", volumes), ("tmpfs", tmpfs)] {
            let line = get(self.service, key).map_or(self.service.line, |node| node.line);
            if !found.is_empty() {
                self.verbatim(key, line, &list(found));
            }
        }
    }

    fn mount(&mut self, item: &'a Node) -> Option<Mount> {
        let line = item.line;
        let Value::Map(_) = &item.value else {
            let mut parts: Vec<&str> = text(item)?.split(':').collect();
            // `D:\` and the like have no meaning here, and are refused by what comes out.
            let options = if parts.len() == 3 { parts.pop() } else { None };
            let is_read_only = options.is_some_and(|options| options.split(',').any(|option| option == "ro"));
            let rest =
                options.map(|all| all.split(',').filter(|option| !matches!(*option, "ro" | "rw")).collect::<Vec<_>>());
            if let Some(rest) = rest.filter(|rest| !rest.is_empty()) {
                self.note(line, "volumes", Effect::Changed, format!("without the options {}", rest.join(", ")));
            }
            return match parts.as_slice() {
                [target] => Some(Mount { source: None, target: (*target).to_owned(), is_read_only, line }),
                [source, target] => {
                    Some(Mount { source: Some((*source).to_owned()), target: (*target).to_owned(), is_read_only, line })
                }
                _ => None,
            };
        };
        if get(item, "volume").is_some_and(|volume| get(volume, "subpath").is_some()) {
            return None;
        }
        let is_kind = |kind: &str| get(item, "type").and_then(text).is_none_or(|found| found == kind);
        if !is_kind("volume") && !is_kind("bind") {
            return None;
        }
        Some(Mount {
            source: get(item, "source").and_then(text).map(str::to_owned),
            target: get(item, "target").and_then(text)?.to_owned(),
            is_read_only: is_true(item, "read_only") || is_true(item, "readonly"),
            line,
        })
    }

    /// How it is written in a spec; `None` if it is left out.
    fn volume(&mut self, mount: Mount) -> Option<Node> {
        let Mount { source, target, is_read_only, line } = mount;
        let target = if target.len() > 1 { target.trim_end_matches('/').to_owned() } else { target };
        let source = match source {
            // Docker makes one without a name for each container.
            None => {
                let name = format!("{}{}", self.app, target.replace('/', "-"));
                self.note(
                    line,
                    "volumes",
                    Effect::Changed,
                    format!("`{target}` has no source: it gets the volume `{name}`"),
                );
                name
            }
            Some(path) if TIME_ZONE.iter().any(|known| path == *known) => {
                self.note(line, "volumes", Effect::Dropped, format!("`{path}`: set the variable `TZ`"));
                return None;
            }
            Some(path) if path.starts_with(['.', '~']) => self.beside(&path, line),
            Some(path) if path.starts_with('/') => {
                if path.len() > 1 {
                    path.trim_end_matches('/').to_owned()
                } else {
                    path
                }
            }
            Some(name) => self.named(&name, line),
        };
        let written = format!("{source}:{target}{}", if is_read_only { ":ro" } else { "" });
        let item = scalar(written);
        if let Some(why) = self.objection("volumes", &list(vec![item.clone()])) {
            self.refuse(line, "volumes", why);
            return None;
        }
        Some(item)
    }

    /// A path beside the Compose file gets a place that is the same on each host.
    fn beside(&mut self, path: &str, line: usize) -> String {
        let mut parts: Vec<&str> = Vec::new();
        for part in path.split('/').filter(|part| !matches!(*part, "" | ".")) {
            match part {
                // Outside of the project there may be the same names.
                ".." if parts.is_empty() || parts.last() == Some(&"parent") => parts.push("parent"),
                ".." => drop(parts.pop()),
                "~" => parts.push("home"),
                part => parts.push(part),
            }
        }
        let base = format!("/srv/{}", self.project.name);
        let place = if parts.is_empty() { base } else { format!("{base}/{}", parts.join("/")) };
        self.note(line, "volumes", Effect::Changed, format!("`{path}` is to be put to `{place}` on each host"));
        place
    }

    /// The name that Compose gives to a volume, so that what is in it is found again.
    fn named(&mut self, name: &str, line: usize) -> String {
        let definition = self.project.definition("volumes", name);
        let given = definition.and_then(|node| get(node, "name")).and_then(text);
        let is_external = definition.is_some_and(|node| is_true(node, "external"));
        let is_special = |node: &Node| {
            let is_local = get(node, "driver").and_then(text).is_none_or(|driver| driver == "local");
            !is_local || get(node, "driver_opts").is_some()
        };
        if definition.is_some_and(is_special) {
            let message = format!("`{name}` has a driver or options of its own: create the volume on each host first");
            self.note(line, "volumes", Effect::Changed, message);
        }
        match given {
            Some(given) => given.to_owned(),
            None if is_external => name.to_owned(),
            None => {
                let whole = format!("{}_{name}", self.project.name);
                self.note(
                    line,
                    "volumes",
                    Effect::Changed,
                    format!("`{name}` is Docker's volume `{whole}`, as Compose names it"),
                );
                whole
            }
        }
    }

    /// Secrets and configurations are files that are mounted.
    fn files(&mut self, kind: &'static str, base: &str) -> Vec<Node> {
        let mut out = Vec::new();
        for item in get(self.service, kind).map(items).unwrap_or_default() {
            let Some(name) = text(item).or_else(|| get(item, "source").and_then(text)) else {
                self.refuse(item.line, kind, "it has no name");
                continue;
            };
            let target = get(item, "target").and_then(text).unwrap_or(name);
            let target = if target.starts_with('/') { target.to_owned() } else { format!("{base}{target}") };
            let place = format!("/srv/{}/{kind}/{name}", self.project.name);
            let message =
                format!("`{name}` is a file that is to be put to `{place}` on each host, readable for the app alone");
            self.note(item.line, kind, Effect::Changed, message);
            out.push(scalar(format!("{place}:{target}:ro")));
        }
        out
    }

    /// Two instances must not write to the same files, so one stops before the other starts.
    pub(super) fn order(&mut self) {
        let volumes = self.spec.get("volumes").map(items).unwrap_or_default();
        let is_shared = volumes.into_iter().filter_map(text).any(|volume| !volume.ends_with(":ro"));
        let has_order =
            self.spec.get("deploy").and_then(|d| get(d, "update_config")).is_some_and(|u| get(u, "order").is_some());
        if !is_shared || has_order {
            return;
        }
        let line = get(self.service, "volumes").map_or(self.service.line, |node| node.line);
        self.note(
            line,
            "deploy.update_config.order",
            Effect::Changed,
            "`stop-first`, as Compose does it, since the app writes to volumes; without it a deploy has no gap",
        );
        self.put_deploy("update_config", "order", scalar("stop-first"));
    }
}
