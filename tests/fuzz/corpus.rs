//! Starting inputs of the search: the corpus and dictionaries that libFuzzer uses too.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// Files of a directory below `fuzz/`, with their names.
pub fn files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    names(dir).into_iter().map(|name| (name.clone(), fs::read(fuzz(dir).join(&name)).expect("a file"))).collect()
}

pub fn names(dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(fuzz(dir)).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    entries.map(|e| e.expect("an entry").file_name().into_string().expect("UTF-8")).collect()
}

pub fn fuzz(path: &Path) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(path)
}

/// The tokens of a target, from libFuzzer's dictionary: one in quotes per line.
pub fn tokens(target: &str) -> Vec<Vec<u8>> {
    let path = fuzz(Path::new("dictionaries")).join(format!("{target}.dict"));
    let text = fs::read_to_string(path).expect("a dictionary");
    let lines = text.lines().filter(|l| !l.is_empty() && !l.starts_with('#'));
    lines.map(|l| token(l).unwrap_or_else(|| panic!("not a word of a dictionary: {l}"))).collect()
}

/// Parses a token like libFuzzer: in quotes, with `\"`, `\\` and `\x00`.
fn token(line: &str) -> Option<Vec<u8>> {
    let mut rest = line.strip_prefix('"')?.strip_suffix('"')?.as_bytes();
    let mut token = Vec::new();
    while let [first, more @ ..] = rest {
        rest = more;
        if *first != b'\\' {
            token.push(*first);
            continue;
        }
        match rest {
            [escaped @ (b'"' | b'\\'), more @ ..] => {
                token.push(*escaped);
                rest = more;
            }
            [b'x', high, low, more @ ..] => {
                token.push(u8::from_str_radix(std::str::from_utf8(&[*high, *low]).ok()?, 16).ok()?);
                rest = more;
            }
            _ => return None,
        }
    }
    Some(token)
}
