//! Properties for any input: one function for each parser or writer of untrusted data. It panics on a violation.
//!
//! libFuzzer calls them with generated input (`fuzz/fuzz_targets/`), `tests/fuzz/` with mutations of the corpus. They
//! are independent of the code under test: each rule is reimplemented from its documentation.

mod env_file;
mod keys;
mod ledger;
mod spec;
mod templates;

pub use env_file::{check as env_file, variables};
pub use keys::check as keys;
pub use ledger::check as ledger;
pub use spec::{check as spec, denied};
pub use templates::{Directive, check as templates, directives};

/// Decisions and fields from the bytes of an input. Past the end all decisions are 0.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn byte(&mut self) -> u8 {
        match self.0 {
            [first, rest @ ..] => {
                self.0 = rest;
                *first
            }
            [] => 0,
        }
    }

    /// A number from 0 to `n`, exclusive.
    fn below(&mut self, n: usize) -> usize {
        (usize::from(self.byte()) * 256 + usize::from(self.byte())) % n.max(1)
    }

    fn number(&mut self) -> u64 {
        (0..8).fold(0, |n, _| (n << 8) | u64::from(self.byte()))
    }

    /// The bytes before the next NUL, which no name and no value of an environment can contain.
    fn field(&mut self) -> Option<&'a [u8]> {
        let all = self.0;
        if all.is_empty() {
            return None;
        }
        let end = all.iter().position(|b| *b == 0).unwrap_or(all.len());
        self.0 = all.get(end + 1..).unwrap_or_default();
        Some(&all[..end])
    }

    fn text(&mut self) -> String {
        String::from_utf8_lossy(self.field().unwrap_or_default()).into_owned()
    }
}

/// A name from a field: as is, or, since few inputs are valid, mapped to the letters of names.
fn name<T: TryFrom<String>>(field: &[u8], letters: &[u8]) -> Option<T> {
    let plain = || field.iter().map(|b| char::from(letters[usize::from(*b) % letters.len()])).collect::<String>();
    T::try_from(String::from_utf8_lossy(field).into_owned()).ok().or_else(|| T::try_from(plain()).ok())
}

/// Whether a name is a valid label: `[a-z0-9]`, and `-` inside, up to 40.
fn is_label(text: &str) -> bool {
    text.len() <= 40
        && text.split('-').all(|part| part.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9')))
        && text.starts_with(|c: char| c != '-')
        && !text.ends_with('-')
}

/// Whether a variable name is valid.
fn is_variable(text: &str) -> bool {
    let word = |c: char| ('!'..='~').contains(&c) && !matches!(c, '=' | '/' | '"' | '\'' | '`' | '#' | '\\');
    (1..=255).contains(&text.len())
        && text.chars().all(word)
        && !matches!(text, "." | "..")
        && !text.starts_with("DEMAE_")
}

/// Whether a terminal would interpret it instead of showing it: control characters, and bidirectional overrides.
fn is_control(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}
