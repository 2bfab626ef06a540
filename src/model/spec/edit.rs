//! Changes one value in the text of a spec, and leaves the rest as a person wrote it.

use super::Spec;
use crate::model::yaml::{self, Node, Value};

/// The text with another `deploy.replicas_per_host`. `None` if it is written in a way in which that cannot be changed
/// safely: what is returned reads as the same spec, but for the count.
pub fn with_replicas(text: &str, count: u16) -> Option<String> {
    let mut wanted = Spec::parse(text.as_bytes()).ok()?;
    wanted.deploy.replicas_per_host = count;
    let root = yaml::parse(text.as_bytes()).ok()?;
    let fits = |candidate: &String| Spec::parse(candidate.as_bytes()).is_ok_and(|spec| spec == wanted);
    candidates(text, &root, count).into_iter().find(fits)
}

/// Texts that may say it: in place of the old count, before the first key of `deploy`, or as a new `deploy`; each as a
/// block and in braces.
fn candidates(text: &str, root: &Node, count: u16) -> Vec<String> {
    let Some(deploy) = get(root, "deploy") else {
        let brace = insert(text, first_key(root), &format!("\"deploy\": {{\"replicas_per_host\": {count}}}, "));
        let newline = if text.ends_with('\n') { "" } else { "\n" };
        let block = format!("{text}{newline}deploy:\n  replicas_per_host: {count}\n");
        return [Some(block), brace].into_iter().flatten().collect();
    };
    if let Some(known) = get(deploy, "replicas_per_host") {
        return replace(text, known, count).into_iter().collect();
    }
    let Some((line, column)) = first_key(deploy) else { return Vec::new() };
    let indent = " ".repeat(column - 1);
    let block = insert(text, Some((line, column)), &format!("replicas_per_host: {count}\n{indent}"));
    let brace = insert(text, Some((line, column)), &format!("\"replicas_per_host\": {count}, "));
    [block, brace].into_iter().flatten().collect()
}

fn get<'n>(node: &'n Node, name: &str) -> Option<&'n Node> {
    let Value::Map(entries) = &node.value else { return None };
    entries.iter().find(|(key, _)| key.name == name).map(|(_, node)| node)
}

/// The line and column of the first key of a mapping.
fn first_key(node: &Node) -> Option<(usize, usize)> {
    match &node.value {
        Value::Map(entries) => entries.first().map(|(key, _)| (key.line, key.column)),
        _ => None,
    }
}

fn replace(text: &str, node: &Node, count: u16) -> Option<String> {
    let Value::Scalar { text: old, .. } = &node.value else { return None };
    let at = offset(text, node.line, node.column)?;
    let quote = text[at..].chars().next().filter(|c| matches!(c, '"' | '\'')).map_or(0, char::len_utf8);
    let rest = text[at + quote..].strip_prefix(old.as_str())?;
    Some(format!("{}{count}{rest}", &text[..at + quote]))
}

fn insert(text: &str, at: Option<(usize, usize)>, new: &str) -> Option<String> {
    let (line, column) = at?;
    let at = offset(text, line, column)?;
    Some(format!("{}{new}{}", &text[..at], &text[at..]))
}

/// The byte at a line and a column, both from 1; a column is a character.
fn offset(text: &str, line: usize, column: usize) -> Option<usize> {
    let before: usize = text.split_inclusive('\n').take(line - 1).map(str::len).sum();
    let (within, _) = text.get(before..)?.char_indices().nth(column - 1)?;
    Some(before + within)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn count_is_changed_and_the_rest_stays() {
        for (text, expected) in [
            (
                "# ours\nimage: web:v1 # fixed\n",
                Some("# ours\nimage: web:v1 # fixed\ndeploy:\n  replicas_per_host: 3\n"),
            ),
            ("image: web:v1", Some("image: web:v1\ndeploy:\n  replicas_per_host: 3\n")),
            (
                "deploy:\n    # of the shop\n    replicas_per_host: 1   # one\nimage: web:v1\n",
                Some("deploy:\n    # of the shop\n    replicas_per_host: 3   # one\nimage: web:v1\n"),
            ),
            ("deploy: {replicas_per_host: 12}\nimage: é:1\n", None),
            (
                "environment: {A: é}\ndeploy: {replicas_per_host: 12}\nimage: web:v1\n",
                Some("environment: {A: é}\ndeploy: {replicas_per_host: 3}\nimage: web:v1\n"),
            ),
            (
                "image: web:v1\ndeploy:\n  update_config: {order: stop-first}\n",
                Some("image: web:v1\ndeploy:\n  replicas_per_host: 3\n  update_config: {order: stop-first}\n"),
            ),
            (
                "image: web:v1\ndeploy: {update_config: {order: stop-first}}\n",
                Some("image: web:v1\ndeploy: {\"replicas_per_host\": 3, update_config: {order: stop-first}}\n"),
            ),
            ("{\"image\": \"web:v1\"}", Some("{\"deploy\": {\"replicas_per_host\": 3}, \"image\": \"web:v1\"}")),
            (
                "{\"image\": \"web:v1\",\n \"deploy\": {\"replicas_per_host\": 1}}",
                Some("{\"image\": \"web:v1\",\n \"deploy\": {\"replicas_per_host\": 3}}"),
            ),
            ("image: web:v1\ndeploy:\n", None),
        ] {
            assert_eq!(with_replicas(text, 3).as_deref(), expected, "{text}");
        }
    }
}
