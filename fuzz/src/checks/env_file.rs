//! An env-file: Docker reads from it the values that were put in, byte for byte, and no others.

use std::collections::BTreeMap;

use demae::model::{
    env::{check_value, env_file},
    name::EnvName,
};

use super::name;

/// Most bytes of a line that Docker reads, with its line break.
const LONGEST_LINE: usize = 64 * 1024;
/// What names are spelled in.
const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ_0123456789abcdefghijklmnopqrstuvwxyz";

/// Fields `NAME=value`, with a NUL between them.
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
    // Lines about as long as can be are dear, so they are rare.
    if let [b'~', more, ..] = bytes {
        let name = EnvName::try_from("LONG").expect("a name");
        given.insert(name, "x".repeat(LONGEST_LINE - 16 + usize::from(*more % 32)));
    }
    let text = env_file(given.iter().map(|(name, value)| (name.as_str(), value.as_str())));
    let read = variables(&text).unwrap_or_else(|why| panic!("Docker does not take it: {why}: {text:?}"));
    let fits = |name: &EnvName, value: &str| {
        !value.contains(['\n', '\r']) && name.as_str().len() + value.len() + 2 <= LONGEST_LINE
    };
    let wanted: BTreeMap<String, String> = given
        .iter()
        .filter(|(name, value)| fits(name, value))
        .map(|(name, value)| (name.to_string(), value.clone()))
        .collect();
    assert!(read == wanted, "{wanted:?} is read as {read:?}");
    // What is left out is told, without its value.
    let told: Vec<&str> = text.lines().filter(|l| l.starts_with('#')).collect();
    let left_out: Vec<&EnvName> = given.iter().filter(|(name, value)| !fits(name, value)).map(|(n, _)| n).collect();
    assert_eq!(told.len(), left_out.len(), "{told:?} tells of {left_out:?}");
    for (line, name) in told.iter().zip(left_out) {
        let why = ["it has a line break", "it is longer than 64 KiB"];
        let fine = |w: &str| *line == format!("# {name} cannot stand in an env-file ({w}); the container has it");
        assert!(why.into_iter().any(fine), "{line:?}");
    }
}

/// The variables of an env-file, as `docker run --env-file` documents it: a line each, `#` in front of what is none, blanks
/// in front dropped, all behind the first `=` taken as it is.
///
/// # Errors
/// What Docker would refuse, or take from somewhere else.
pub fn variables(text: &str) -> Result<BTreeMap<String, String>, String> {
    let mut found = BTreeMap::new();
    for line in text.strip_prefix('\u{feff}').unwrap_or(text).split('\n') {
        if line.len() + 1 > LONGEST_LINE {
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
            return Err(format!("`{name}` stands twice"));
        }
    }
    Ok(found)
}
