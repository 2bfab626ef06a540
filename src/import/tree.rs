//! Building and writing trees of YAML.

use crate::model::yaml::{Key, Node, Value};

fn node(value: Value) -> Node {
    Node { line: 0, column: 0, value }
}

/// A single value.
pub(super) fn scalar(text: impl Into<String>) -> Node {
    node(Value::Scalar { text: text.into(), quoted: false })
}

/// A list.
pub(super) fn list(items: Vec<Node>) -> Node {
    node(Value::Seq(items))
}

/// A mapping.
pub(super) fn map<K: Into<String>>(entries: impl IntoIterator<Item = (K, Node)>) -> Node {
    let key = |name: K| Key { name: name.into(), line: 0, column: 0 };
    node(Value::Map(entries.into_iter().map(|(name, value)| (key(name), value)).collect()))
}

/// The entries of a mapping; none for anything else.
pub(super) fn entries(node: &Node) -> &[(Key, Node)] {
    match &node.value {
        Value::Map(entries) => entries,
        _ => &[],
    }
}

/// The value of a key of a mapping, unless it is nothing.
pub(super) fn get<'n>(node: &'n Node, name: &str) -> Option<&'n Node> {
    entries(node).iter().find(|(key, _)| key.name == name).map(|(_, node)| node).filter(|n| n.value != Value::Null)
}

/// The text of a single value.
pub(super) fn text(node: &Node) -> Option<&str> {
    match &node.value {
        Value::Scalar { text, .. } => Some(text),
        _ => None,
    }
}

/// The items of a list; anything else but nothing is one item.
pub(super) fn items(node: &Node) -> Vec<&Node> {
    match &node.value {
        Value::Seq(items) => items.iter().collect(),
        Value::Scalar { .. } | Value::Map(_) => vec![node],
        Value::Null => Vec::new(),
    }
}

/// The names in a list, or the keys of a mapping.
pub(super) fn names(node: &Node) -> Vec<&str> {
    match &node.value {
        Value::Map(entries) => entries.iter().map(|(key, _)| key.name.as_str()).collect(),
        _ => items(node).into_iter().filter_map(text).collect(),
    }
}

/// Whether a key is true, in any of the ways in which YAML 1.1 says it.
pub(super) fn is_true(node: &Node, key: &str) -> bool {
    get(node, key).and_then(truth) == Some(true)
}

/// A truth value, as YAML 1.1 writes it.
pub(super) fn truth(node: &Node) -> Option<bool> {
    match text(node)?.to_lowercase().as_str() {
        "true" | "yes" | "on" | "y" | "1" => Some(true),
        "false" | "no" | "off" | "n" | "0" => Some(false),
        _ => None,
    }
}

/// The names and values of a mapping, or of a list of `name=value`. A name alone has no value.
pub(super) fn pairs(node: &Node) -> Vec<(String, Option<String>, usize)> {
    match &node.value {
        Value::Map(entries) => {
            entries.iter().map(|(key, value)| (key.name.clone(), text(value).map(str::to_owned), key.line)).collect()
        }
        _ => items(node)
            .into_iter()
            .filter_map(|item| {
                let text = text(item)?;
                let (name, value) = match text.split_once('=') {
                    Some((name, value)) => (name, Some(value.to_owned())),
                    None => (text, None),
                };
                Some((name.to_owned(), value, item.line))
            })
            .collect(),
    }
}

/// Writes a mapping as YAML, one key on a line.
pub(super) fn write(node: &Node) -> String {
    let mut out = String::new();
    write_block(node, 0, &mut out);
    out
}

fn write_block(node: &Node, indent: usize, out: &mut String) {
    let blanks = " ".repeat(indent);
    match &node.value {
        Value::Map(entries) => {
            for (key, value) in entries {
                out.push_str(&format!("{blanks}{}:", quoted(&key.name)));
                write_value(value, indent, out);
            }
        }
        Value::Seq(items) => {
            for item in items {
                out.push_str(&format!("{blanks}-"));
                write_value(item, indent, out);
            }
        }
        _ => {}
    }
}

/// What follows a key or a dash, to the end of the line.
fn write_value(node: &Node, indent: usize, out: &mut String) {
    match &node.value {
        Value::Null => out.push('\n'),
        Value::Scalar { text, .. } => out.push_str(&format!(" {}\n", quoted(text))),
        Value::Seq(items) if items.iter().all(|item| matches!(item.value, Value::Scalar { .. })) => {
            let items: Vec<String> = items.iter().filter_map(text).map(quoted).collect();
            out.push_str(&format!(" [{}]\n", items.join(", ")));
        }
        Value::Map(entries) if entries.is_empty() => out.push_str(" {}\n"),
        Value::Map(_) | Value::Seq(_) => {
            out.push('\n');
            write_block(node, indent + 2, out);
        }
    }
}

/// A text that YAML reads as itself: plain where that is safe in any place, else in double quotes, whose escapes are those
/// of JSON.
fn quoted(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_./@+-=:".contains(c);
    let starts = text.chars().next().is_some_and(|c| c.is_ascii_alphanumeric() || "_./".contains(c));
    // Words and numbers to which YAML gives a type.
    let is_word = matches!(text.to_ascii_lowercase().as_str(), "null" | "yes" | "no" | "on" | "off" | "y" | "n");
    let is_number = text.starts_with(|c: char| c.is_ascii_digit() || c == '.') && text.contains([':', '_', 'e', 'x']);
    if starts && text.chars().all(is_plain) && !text.ends_with(':') && !is_word && !(is_number && text.len() < 20) {
        return text.to_owned();
    }
    crate::model::text::json(&text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::yaml::parse;

    /// Without what a text does not keep: positions, and which quotes there were.
    fn bare(node: &Node) -> Node {
        match &node.value {
            Value::Null => scalar(""),
            Value::Scalar { text, .. } => scalar(text.clone()),
            Value::Seq(items) => list(items.iter().map(bare).collect()),
            Value::Map(entries) => map(entries.iter().map(|(key, value)| (key.name.clone(), bare(value)))),
        }
    }

    fn trees() -> impl Strategy<Value = Node> {
        let leaf = any::<String>().prop_map(scalar);
        let tree = leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(list),
                prop::collection::btree_map(".*", inner, 1..4).prop_map(map),
            ]
        });
        prop::collection::btree_map("[a-z<.\\-]{1,5}", tree, 1..4).prop_map(map)
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(tree in trees()) {
            let text = write(&tree);
            // A merge key is refused, whatever is around it.
            prop_assume!(!text.contains("<<"));
            let read = parse(text.as_bytes());
            prop_assert!(read.is_ok(), "{:?}: {}", read, text);
            prop_assert_eq!(read.map(|read| bare(&read)), Ok(bare(&tree)), "{}", text);
        }
    }
}
