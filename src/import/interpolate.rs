//! Variables in the values of a Compose file: `$NAME`, `${NAME:-default}` and their like, by the rules of the Compose
//! specification ("Interpolation").

use std::collections::{BTreeMap, BTreeSet};

use crate::model::{
    dotenv,
    name::EnvName,
    yaml::{Node, Value},
};

/// Deepest nesting of defaults in defaults.
const MAX_DEPTH: usize = 16;

/// The variables that a file may use, and what was found out about them.
#[derive(Debug, Default)]
pub(super) struct Variables {
    known: BTreeMap<String, String>,
    /// Those whose values are in the text that was resolved last.
    used: BTreeSet<String>,
    /// Those that are used and have no value, with the first line of each.
    pub(super) unset: BTreeMap<String, usize>,
    /// Those whose names say that they are secret, and whose values are used beside `environment`, with a line of each.
    pub(super) exposed: BTreeMap<String, usize>,
    /// Those that must have one, with the file's own words.
    pub(super) required: BTreeSet<(usize, String)>,
}

/// Whether a variable is secret, by its name.
fn is_secret(name: &str) -> bool {
    let name = name.to_ascii_uppercase();
    ["PASS", "SECRET", "TOKEN", "KEY", "CREDENTIAL"].iter().any(|part| name.contains(part))
}

/// What a value became.
struct Resolved {
    text: String,
    /// A variable without a value is in it.
    is_unset: bool,
}

impl Variables {
    pub(super) fn new(known: BTreeMap<String, String>) -> Self {
        Self { known, ..Self::default() }
    }

    pub(super) fn known(&self) -> &BTreeMap<String, String> {
        &self.known
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.known.get(name).map(String::as_str)
    }

    /// Replaces the variables in all values below a node. A value below `environment` with a variable that has no value
    /// becomes nothing, so that no app starts with half of a secret; elsewhere an empty text takes its place.
    ///
    /// # Errors
    /// The line, and what is wrong there.
    pub(super) fn resolve(&mut self, node: &mut Node, in_environment: bool) -> Result<(), String> {
        let line = node.line;
        match &mut node.value {
            Value::Null => {}
            Value::Scalar { text, .. } => {
                if !text.contains('$') {
                    return Ok(());
                }
                self.used.clear();
                let found = self.text(text, line, 0).map_err(|what| format!("line {line}: {what}"))?;
                if !in_environment {
                    let secret = self.used.iter().filter(|name| is_secret(name));
                    self.exposed.extend(secret.map(|name| (name.clone(), line)));
                }
                if !in_environment || !found.is_unset {
                    *text = found.text;
                } else {
                    // Nothing would mean that the value is to be found by the name.
                    node.value = Value::Seq(Vec::new());
                }
            }
            Value::Seq(items) => {
                for item in items {
                    self.resolve(item, in_environment)?;
                }
            }
            Value::Map(entries) => {
                for (key, value) in entries {
                    self.resolve(value, in_environment || key.name == "environment")?;
                }
            }
        }
        Ok(())
    }

    fn text(&mut self, text: &str, line: usize, depth: usize) -> Result<Resolved, String> {
        if depth > MAX_DEPTH {
            return Err("the variables are nested too deeply".to_owned());
        }
        let (mut out, mut is_unset, mut rest) = (String::new(), false, text);
        while let Some(at) = rest.find('$') {
            out.push_str(&rest[..at]);
            let after = &rest[at + 1..];
            if let Some(after) = after.strip_prefix('$') {
                out.push('$');
                rest = after;
                continue;
            }
            let (found, after) = match after.strip_prefix('{') {
                Some(inner) => {
                    let end = closing(inner).ok_or("a `${` is not closed")?;
                    (self.braced(&inner[..end], line, depth)?, &inner[end + 1..])
                }
                None => {
                    let end = name_length(after);
                    if end == 0 {
                        return Err("a `$` that stands for itself is written `$$`".to_owned());
                    }
                    (self.value(&after[..end], line), &after[end..])
                }
            };
            out.push_str(&found.text);
            is_unset |= found.is_unset;
            rest = after;
        }
        out.push_str(rest);
        Ok(Resolved { text: out, is_unset })
    }

    fn value(&mut self, name: &str, line: usize) -> Resolved {
        match self.known.get(name) {
            Some(text) => {
                self.used.insert(name.to_owned());
                Resolved { text: text.clone(), is_unset: false }
            }
            None => {
                self.unset.entry(name.to_owned()).or_insert(line);
                Resolved { text: String::new(), is_unset: true }
            }
        }
    }

    /// What is between the braces.
    fn braced(&mut self, inner: &str, line: usize, depth: usize) -> Result<Resolved, String> {
        let end = name_length(inner);
        let (name, operation) = inner.split_at(end);
        if name.is_empty() {
            return Err(format!("`${{{inner}}}` names no variable"));
        }
        let is_strict = operation.starts_with(':');
        let mut operation = operation.strip_prefix(':').unwrap_or(operation).chars();
        let (kind, word) = (operation.next(), operation.as_str());
        let set = self.known.get(name).filter(|value| !(is_strict && value.is_empty())).cloned();
        match (kind, set) {
            (None, _) if !is_strict => Ok(self.value(name, line)),
            (Some('-' | '?'), Some(text)) => {
                self.used.insert(name.to_owned());
                Ok(Resolved { text, is_unset: false })
            }
            (Some('-'), None) | (Some('+'), Some(_)) => self.text(word, line, depth + 1),
            (Some('+'), None) => Ok(Resolved { text: String::new(), is_unset: false }),
            (Some('?'), None) => {
                let word = if word.is_empty() { "it must have a value" } else { word };
                self.required.insert((line, format!("{name}: {word}")));
                Ok(Resolved { text: String::new(), is_unset: true })
            }
            _ => Err(format!("`${{{inner}}}` is not a variable of Compose")),
        }
    }
}

/// Values by name, and names without a value.
pub type FileVariables = (BTreeMap<EnvName, String>, Vec<EnvName>);

/// The variables of a `.env` file, and the names of those that are left out, since a part of them is unknown. One may be
/// used in those after it.
///
/// # Errors
/// All lines that are wrong, and why; without their values.
pub fn variables(file: &str, known: &BTreeMap<String, String>) -> Result<FileVariables, Vec<dotenv::WrongLine>> {
    let mut so_far = Variables::new(known.clone());
    let (mut values, mut left_out) = (BTreeMap::new(), Vec::new());
    for (name, value) in dotenv::parse_in_order(file, dotenv::Format::Compose)? {
        // The message would have a part of the value.
        let found = so_far.text(&value, 0, 0);
        let found = found.map_err(|_| vec![(0, format!("{name}: what follows a `$` is not a variable"))])?;
        if found.is_unset {
            left_out.push(name);
        } else {
            so_far.known.insert(name.to_string(), found.text.clone());
            values.insert(name, found.text);
        }
    }
    Ok((values, left_out))
}

fn name_length(text: &str) -> usize {
    let is_first = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    if !is_first {
        return 0;
    }
    text.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(text.len())
}

/// The place of the brace that closes, with braces of variables inside.
fn closing(text: &str) -> Option<usize> {
    let mut depth = 0_usize;
    let mut before = ' ';
    for (at, c) in text.char_indices() {
        match c {
            '{' if before == '$' => depth += 1,
            '}' if depth == 0 => return Some(at),
            '}' => depth -= 1,
            _ => {}
        }
        before = c;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::import::tree::scalar;

    fn resolved(text: &str) -> Result<String, String> {
        let known = [("A", "a"), ("EMPTY", "")].map(|(name, value)| (name.to_owned(), value.to_owned()));
        let mut variables = Variables::new(known.into());
        let mut node = scalar(text);
        variables.resolve(&mut node, false)?;
        match node.value {
            Value::Scalar { text, .. } => Ok(text),
            other => Err(format!("{other:?}")),
        }
    }

    #[test]
    fn variables_are_replaced_as_compose_replaces_them() {
        for (text, expected) in [
            ("$A-${A}", "a-a"),
            ("$$A $${A}", "$A ${A}"),
            ("${EMPTY:-b} ${EMPTY-b}", "b "),
            ("${NONE:-x:y} ${NONE-}", "x:y "),
            ("${NONE:-${ALSO:-$A}}", "a"),
            ("${A:+yes} ${EMPTY:+yes} ${EMPTY+yes}", "yes  yes"),
            ("${A:?why} ${EMPTY?why}", "a "),
            ("[$NONE]", "[]"),
        ] {
            assert_eq!(resolved(text).as_deref(), Ok(expected), "{text}");
        }
        for wrong in ["${A", "$", "$1", "${}", "${A:x}", "${A/b/c}"] {
            assert!(resolved(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn value_with_an_unknown_part_is_left_out_of_the_environment() {
        let mut variables = Variables::default();
        let mut node = list_of(&["URL=db://user:$PASSWORD@db", "$WHOLE", "B=${C:-c}"]);
        variables.resolve(&mut node, true).expect("it is read");
        let left_out = || crate::import::list(Vec::new());
        let expected = crate::import::list(vec![left_out(), left_out(), scalar("B=c")]);
        assert_eq!(node, expected);
        assert_eq!(variables.unset.keys().collect::<Vec<_>>(), ["PASSWORD", "WHOLE"]);
    }

    #[test]
    fn files_use_their_own_variables() {
        let text = "A=1\nexport B=\"x-${A}-\\$A\"\nC='$A' # literal\nD=${NONE}\nE=${NONE:-e}\nTZ\nA=2\nF=$A\nG=$K\n";
        let known = BTreeMap::from([("K".to_owned(), "k".to_owned())]);
        let (found, left_out) = variables(text, &known).expect("it is read");
        assert_eq!(left_out.iter().map(EnvName::as_str).collect::<Vec<_>>(), ["D"]);
        let found: Vec<(&str, &str)> = found.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        assert_eq!(found, [("A", "2"), ("B", "x-1-$A"), ("C", "$A"), ("E", "e"), ("F", "2"), ("G", "k")]);
    }

    #[test]
    fn secrets_beside_the_environment_are_named() {
        let known = [("REDIS_PASSWORD", "hunter2"), ("TAG", "v1"), ("API_KEY", "abc")];
        let known = known.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let mut variables = Variables::new(known.into());
        let mut command = scalar("redis-server --requirepass ${REDIS_PASSWORD:?} --tag $TAG");
        variables.resolve(&mut command, false).expect("it is read");
        variables.resolve(&mut scalar("KEY=$API_KEY"), true).expect("it is read");
        assert_eq!(variables.exposed.keys().collect::<Vec<_>>(), ["REDIS_PASSWORD"]);
    }

    fn list_of(texts: &[&str]) -> Node {
        crate::import::list(texts.iter().map(|text| scalar(*text)).collect())
    }
}
