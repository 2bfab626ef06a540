//! `deploy`, and the limits that are written in two places.

use super::{Effect, Node, Translation, Value, list, map, scalar};
use crate::import::tree::{entries, get, items, text};

impl Translation<'_> {
    pub(super) fn deploy(&mut self, node: &Node) {
        for (key, value) in entries(node) {
            let name = format!("deploy.{}", key.name);
            match key.name.as_str() {
                _ if value.value == Value::Null => {}
                "mode" => {
                    if text(value) != Some("global") {
                        self.note(
                            key.line,
                            &name,
                            Effect::Dropped,
                            "an app runs on each host that its constraints name",
                        );
                    }
                }
                "replicas" => self.replicas(value, key.line, &name),
                "placement" => self.placement(value),
                "resources" => self.resources(value),
                "restart_policy" => self.part("restart_policy", value, key.line),
                "update_config" => self.update(value),
                "labels" | "endpoint_mode" | "rollback_config" => {
                    self.note(key.line, &name, Effect::Dropped, "it is for the services of Swarm");
                }
                _ => self.refuse(key.line, &name, "this is not a key of `deploy`"),
            }
        }
    }

    /// Takes a part of `deploy` as it is, if a spec can have it so.
    fn part(&mut self, key: &'static str, value: &Node, line: usize) {
        match self.objection("deploy", &map([(key, value.clone())])) {
            Some(why) => self.refuse(line, &format!("deploy.{key}"), why),
            None => {
                for (below, value) in entries(value) {
                    self.put_deploy(key, &below.name, value.clone());
                }
            }
        }
    }

    pub(super) fn replicas(&mut self, node: &Node, line: usize, key: &str) {
        match text(node).and_then(|count| count.parse::<u16>().ok()) {
            Some(0) => self.refuse(line, key, "an app has at least one instance; `demae pause` keeps one as it is"),
            Some(1) => {}
            Some(count) => {
                self.note(
                    line,
                    key,
                    Effect::Changed,
                    format!("{count} on each host: there is no scheduler over all hosts"),
                );
                self.put_deploy("", "replicas_per_host", scalar(count.to_string()));
            }
            None => self.refuse(line, key, "this is not a number of instances"),
        }
    }

    fn placement(&mut self, node: &Node) {
        let mut kept = Vec::new();
        for (key, value) in entries(node) {
            if key.name != "constraints" {
                let key_name = format!("deploy.placement.{}", key.name);
                self.note(key.line, &key_name, Effect::Dropped, "hosts are chosen by constraints alone");
                continue;
            }
            for item in items(value) {
                let written = text(item).unwrap_or_default().trim();
                let label = written.strip_prefix("node.labels.").or_else(|| written.strip_prefix("engine.labels."));
                let other =
                    ["node.hostname", "node.role", "node.id"].into_iter().find(|known| written.starts_with(known));
                match (label, other) {
                    (Some(label), _) => kept.push(scalar(label)),
                    // Without it the app would run on every host; so it runs nowhere until a host has the label.
                    (None, Some(known)) => {
                        let label = written.strip_prefix("node.").unwrap_or(written);
                        let message =
                            format!("`{label}`: `{known}` is Swarm's; give the hosts that are meant this label");
                        self.note(item.line, "deploy.placement.constraints", Effect::Changed, message);
                        kept.push(scalar(label));
                    }
                    (None, None) => {
                        let message = format!("`{written}`: hosts are distinguished by labels alone");
                        self.note(item.line, "deploy.placement.constraints", Effect::Dropped, message);
                    }
                }
            }
        }
        if !kept.is_empty() {
            self.put_deploy("placement", "constraints", list(kept));
        }
    }

    fn resources(&mut self, node: &Node) {
        for (key, value) in entries(node) {
            if key.name != "limits" {
                let name = format!("deploy.resources.{}", key.name);
                self.note(key.line, &name, Effect::Dropped, "nothing is reserved; there are limits");
                continue;
            }
            let known: Vec<(String, Node)> = entries(value)
                .iter()
                .filter(|(k, v)| is_limit(&k.name, v))
                .map(|(k, v)| (k.name.clone(), v.clone()))
                .collect();
            for (key, _) in
                entries(value).iter().filter(|(k, _)| !matches!(k.name.as_str(), "memory" | "cpus" | "pids"))
            {
                let name = format!("deploy.resources.limits.{}", key.name);
                self.note(key.line, &name, Effect::Dropped, "limits are `memory`, `cpus` and `pids`");
            }
            let limits = map(known);
            match self.objection("deploy", &map([("resources", map([("limits", limits.clone())]))])) {
                Some(why) => self.refuse(key.line, "deploy.resources.limits", why),
                None if entries(&limits).is_empty() => {}
                None => self.put_deploy("resources", "limits", limits),
            }
        }
    }

    fn update(&mut self, node: &Node) {
        for (key, value) in entries(node) {
            let name = format!("deploy.update_config.{}", key.name);
            match key.name.as_str() {
                "delay" => self.note(
                    key.line,
                    &name,
                    Effect::Dropped,
                    "`monitor` is how long a host is looked at before the next one",
                ),
                "failure_action" if text(value) == Some("continue") => {
                    self.note(
                        key.line,
                        &name,
                        Effect::Dropped,
                        "a release that fails goes no further; what served before goes on",
                    );
                }
                "parallelism" | "monitor" | "failure_action" | "max_failure_ratio" | "order" => {
                    let below = map([("update_config", map([(key.name.as_str(), value.clone())]))]);
                    match self.objection("deploy", &below) {
                        Some(why) => self.refuse(key.line, &name, why),
                        None => self.put_deploy("update_config", &key.name, value.clone()),
                    }
                }
                _ => self.refuse(key.line, &name, "this is not a key of `update_config`"),
            }
        }
    }

    /// A limit that is given twice is taken from `deploy`, as Compose does it.
    pub(super) fn limits(&mut self) {
        let deploy = get(self.service, "deploy").and_then(|d| get(d, "resources")).and_then(|r| get(r, "limits"));
        for (short, long) in [("mem_limit", "memory"), ("cpus", "cpus"), ("pids_limit", "pids")] {
            if deploy.is_some_and(|limits| get(limits, long).is_some()) {
                self.spec.remove(short);
            }
        }
    }

    /// Puts a key below a part of `deploy`, or below `deploy` itself where the part has no name.
    pub(super) fn put_deploy(&mut self, part: &str, key: &str, value: Node) {
        let mut deploy: Vec<(String, Node)> = self.spec.get("deploy").map(owned).unwrap_or_default();
        if part.is_empty() {
            deploy.retain(|(name, _)| name != key);
            deploy.push((key.to_owned(), value));
        } else {
            let at = deploy.iter().position(|(name, _)| name == part);
            let mut below = at.map(|at| owned(&deploy.remove(at).1)).unwrap_or_default();
            below.retain(|(name, _)| name != key);
            below.push((key.to_owned(), value));
            deploy.push((part.to_owned(), map(below)));
        }
        self.put("deploy", map(deploy));
    }
}

fn is_limit(name: &str, value: &Node) -> bool {
    matches!(name, "memory" | "cpus" | "pids") && value.value != Value::Null && text(value) != Some("0")
}

fn owned(node: &Node) -> Vec<(String, Node)> {
    entries(node).iter().map(|(key, node)| (key.name.clone(), node.clone())).collect()
}
