//! Two Compose files over each other, and a service over the one that it extends, by the rules of the Compose
//! specification ("Merge and override").

use super::tree::{items, pairs, text};
use crate::model::yaml::{Key, Node, Value};

/// Puts `over` on top of `base`: mappings by their keys, lists one after the other, anything else replaced.
pub(super) fn merge(base: Node, over: Node, path: &str) -> Node {
    let (line, column) = (over.line, over.column);
    let last = path.rsplit('.').next().unwrap_or_default();
    let value = match (base.value, over.value) {
        (base, Value::Null) => base,
        (base, over) if matches!(last, "environment" | "labels" | "extra_hosts" | "args" | "sysctls") => {
            let [mut entries, over] = [base, over].map(|value| named(&Node { line, column, value }));
            for (key, node) in over {
                put(&mut entries, key, node);
            }
            Value::Map(entries)
        }
        (Value::Map(mut entries), Value::Map(over)) => {
            for (key, node) in over {
                let at = entries.iter().position(|(known, _)| known.name == key.name);
                match at {
                    Some(at) => {
                        let path = format!("{path}.{}", key.name);
                        let base = std::mem::replace(&mut entries[at].1, empty());
                        entries[at] = (key, merge(base, node, &path));
                    }
                    None => entries.push((key, node)),
                }
            }
            Value::Map(entries)
        }
        // One command replaces the other.
        (_, over) if matches!(last, "command" | "entrypoint" | "test") => over,
        (Value::Seq(mut items), Value::Seq(over)) => {
            if last == "volumes" {
                items.retain(|item| !over.iter().any(|other| target(other) == target(item)));
            }
            for item in over {
                if !items.iter().any(|known| known.value == item.value) {
                    items.push(item);
                }
            }
            Value::Seq(items)
        }
        (_, over) => over,
    };
    Node { line, column, value }
}

/// The names and values of a mapping or a list, as a mapping.
fn named(node: &Node) -> Vec<(Key, Node)> {
    if let Value::Map(entries) = &node.value {
        return entries.clone();
    }
    let mut entries = Vec::new();
    for (name, value, line) in pairs(node) {
        let value = match value {
            Some(text) => Value::Scalar { text, quoted: true },
            None => Value::Null,
        };
        put(&mut entries, Key { name, line, column: 1 }, Node { line, column: 1, value });
    }
    entries
}

fn put(entries: &mut Vec<(Key, Node)>, key: Key, node: Node) {
    match entries.iter_mut().find(|(known, _)| known.name == key.name) {
        Some((_, value)) => *value = node,
        None => entries.push((key, node)),
    }
}

/// Where a volume is mounted.
fn target(volume: &Node) -> Option<String> {
    match &volume.value {
        Value::Map(_) => super::tree::get(volume, "target").and_then(text).map(str::to_owned),
        _ => {
            let volume = items(volume).into_iter().next().and_then(text)?;
            let parts: Vec<&str> = volume.split(':').collect();
            parts.get(1).or(parts.first()).map(|target| (*target).to_owned())
        }
    }
}

fn empty() -> Node {
    Node { line: 0, column: 0, value: Value::Null }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{import::tree::write, model::yaml::parse};

    #[test]
    fn files_are_merged_as_compose_merges_them() {
        let read = |text: &str| parse(text.as_bytes()).expect("this is YAML");
        let base = read(
            "image: a:1\ncommand: [x, y]\nports: ['80:80']\nenvironment: [A=1, B=2]\nvolumes: ['./a:/a', 'b:/b']\n\
             healthcheck: {test: [CMD, a], interval: 5s}\n",
        );
        let over = read(
            "image: a:2\ncommand: z\nports: ['81:81', '80:80']\nenvironment: {B: 3}\nvolumes: ['./c:/a:ro']\n\
             healthcheck: {test: [CMD, b]}\nuser:\n",
        );
        let expected = read(
            "image: a:2\ncommand: z\nports: ['80:80', '81:81']\nenvironment: {A: 1, B: 3}\nvolumes: ['b:/b', './c:/a:ro']\n\
             healthcheck: {test: [CMD, b], interval: 5s}\nuser:\n",
        );
        assert_eq!(write(&merge(base, over, "services.web")), write(&expected));
    }
}
