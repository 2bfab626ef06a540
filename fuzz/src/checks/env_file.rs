//! Env-files: Docker reads the values that were written, byte for byte, and no others.

use std::collections::BTreeMap;

use demae::model::{
    env::{check_value, env_file},
    name::EnvName,
};

use super::name;

/// Longest line that Docker reads, in bytes, with its line break.
const MAX_LINE: usize = 64 * 1024;
/// Letters of names.
const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ_0123456789abcdefghijklmnopqrstuvwxyz";

/// Input: fields `NAME=value`, separated by NUL.
pub fn check(bytes: &[u8]) {
    let mut given: BTreeMap<EnvName, String> = BTreeMap::new();
    for field in bytes.split(|b| *b == 0) {
        let end = field.iter().position(|b| *b == b'=').unwrap_or(field.len().min(4));
        let value = String::from_utf8_lossy(field.get(end + 1..).unwrap_or_default());
        if let Some(name) = name::<EnvName>(&field[..end], LETTERS)
            && check_value(name.as_str(), &value).is_ok()
        {
            given.insert(name, value.into_owned());
        }
    }
    // Lines of about the maximum length are expensive, so they are rare.
    if let [b'~', more, ..] = bytes {
        let name = EnvName::try_from("LONG").expect("a name");
        given.insert(name, "x".repeat(MAX_LINE - 16 + usize::from(*more % 32)));
    }
    let text = env_file(given.iter().map(|(name, value)| (name.as_str(), value.as_str())));
    let read = variables(&text).unwrap_or_else(|why| panic!("Docker refuses it: {why}: {text:?}"));
    let fits = |name: &EnvName, value: &str| {
        !value.contains(['\n', '\r']) && name.as_str().len() + value.len() + 2 <= MAX_LINE
    };
    let wanted: BTreeMap<String, String> = given
        .iter()
        .filter(|(name, value)| fits(name, value))
        .map(|(name, value)| (name.to_string(), value.clone()))
        .collect();
    assert!(read == wanted, "{wanted:?} is read as {read:?}");
    // Omitted variables are reported, without their values.
    let reported: Vec<&str> = text.lines().filter(|l| l.starts_with('#')).collect();
    let left_out: Vec<&EnvName> = given.iter().filter(|(name, value)| !fits(name, value)).map(|(n, _)| n).collect();
    assert_eq!(reported.len(), left_out.len(), "{reported:?} reports {left_out:?}");
    for (line, name) in reported.iter().zip(left_out) {
        let why = ["it has a line break", "it is longer than 64 KiB"];
        let is_reason =
            |w: &str| *line == format!("# {name} cannot be written to an env-file ({w}); the container has it");
        assert!(why.into_iter().any(is_reason), "{line:?}");
    }
}

/// Parses an env-file, as `docker run --env-file` documents it: one variable a line, `#` comments, leading blanks
/// dropped, everything after the first `=` is the value.
///
/// # Errors
/// What Docker would refuse, or read from its own environment.
pub fn variables(text: &str) -> Result<BTreeMap<String, String>, String> {
    let mut found = BTreeMap::new();
    for line in text.strip_prefix('\u{feff}').unwrap_or(text).split('\n') {
        if line.len() + 1 > MAX_LINE {
            return Err(format!("a line has {} bytes", line.len()));
        }
        let line = line.strip_suffix('\r').unwrap_or(line).trim_start_matches([' ', '\t']);
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (name, value) = line.split_once('=').ok_or_else(|| format!("`{line}` has no value"))?;
        if name.is_empty() || name.contains(char::is_whitespace) {
            return Err(format!("`{name}` is no name"));
        }
        if found.insert(name.to_owned(), value.to_owned()).is_some() {
            return Err(format!("`{name}` is defined twice"));
        }
    }
    Ok(found)
}
