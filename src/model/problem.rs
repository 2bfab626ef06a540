//! What is wrong with something a person wrote, said so that they can mend it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Most bytes of one part of a problem that are shown.
const SHOWN: usize = 1000;
/// Most problems of one text, or of one app, that are kept and shown.
pub const MOST_PROBLEMS: usize = 100;
/// Most bytes of them.
const MOST_BYTES: usize = 16 * 1024;

/// What people wrote, fit for a terminal: without what would move its cursor, colour it or turn its text around, and of a
/// length that can be read.
fn shown(text: impl Into<String>) -> String {
    bounded(text, SHOWN)
}

/// A text of at most so many bytes and a few, fit for a terminal, a log and a store: what people and programs wrote may
/// be of any length.
pub fn bounded(text: impl Into<String>, most: usize) -> String {
    let text = text.into();
    let moves = |c: char| {
        c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    if text.len() <= most && !text.chars().any(moves) {
        return text;
    }
    let mut out = String::new();
    for c in text.chars() {
        if out.len() >= most {
            out.push('…');
            break;
        }
        if moves(c) {
            out.extend(c.escape_debug());
        } else {
            out.push(c);
        }
    }
    out
}

/// One mistake in a file or a key: where it is, what it is, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Problem {
    /// Line in the text, from 1; 0 where the problem has no place in a text.
    pub line: usize,
    /// Column in the line, from 1; 0 where the problem has no place in a text.
    pub column: usize,
    /// The key the problem is at, dotted (`healthcheck.interval`), or the etcd key.
    pub key: String,
    /// What is wrong, lower case, without a final full stop.
    pub message: String,
    /// What to do about it, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl Problem {
    /// A problem without a place in a text.
    pub fn new(key: impl Into<String>, message: impl Into<String>) -> Self {
        Self { line: 0, column: 0, key: shown(key), message: shown(message), hint: None }
    }

    /// The same problem, at a place.
    #[must_use]
    pub fn at(mut self, line: usize, column: usize) -> Self {
        self.line = line;
        self.column = column;
        self
    }

    /// The same problem, with a remedy.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(shown(hint));
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line > 0 {
            write!(f, "line {}: ", self.line)?;
        }
        if !self.key.is_empty() {
            write!(f, "`{}`: ", self.key)?;
        }
        f.write_str(&self.message)?;
        if let Some(hint) = &self.hint {
            write!(f, " ({hint})")?;
        }
        Ok(())
    }
}

/// Every mistake found, not only the first. Never empty when used as an error.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Problems(Vec<Problem>);

/// Reads something that people wrote. A mistake of demae's that one text brings to light is a problem of that text, and
/// no reason to leave all others alone: a panic is told as one.
///
/// # Errors
/// What is wrong with it.
pub fn guarded<T>(read: impl FnOnce() -> Result<T, Problems>) -> Result<T, Problems> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(read)).unwrap_or_else(|_| {
        let problem = Problem::new("", "reading this ended in a panic; the log of the agent has it");
        Err(problem.hint("this is a mistake in demae: please report it, with what was written").into())
    })
}

impl Problems {
    /// Adds one.
    pub fn push(&mut self, problem: Problem) {
        self.0.push(problem);
    }

    /// Whether nothing is wrong.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// In the order of the text.
    pub fn iter(&self) -> impl Iterator<Item = &Problem> {
        self.0.iter()
    }

    /// Sorts by place, so that people can mend from top to bottom.
    #[must_use]
    pub fn sorted(mut self) -> Self {
        self.0.sort();
        self
    }

    /// The first of them, as many as can be shown, kept and published, and how many there are beside: people can write
    /// mistakes without end, and all of them are in the status of one app.
    #[must_use]
    pub fn bounded(self) -> Self {
        self.within(MOST_BYTES)
    }

    /// The first of them, as many as fit into so many bytes, and how many there are beside.
    #[must_use]
    pub fn within(mut self, most_bytes: usize) -> Self {
        let mut bytes = 0;
        let fits = |problem: &Problem| {
            bytes += problem.key.len() + problem.message.len() + problem.hint.as_ref().map_or(0, String::len);
            bytes <= most_bytes
        };
        let most = self.0.iter().take(MOST_PROBLEMS).take_while({
            let mut fits = fits;
            move |problem| fits(problem)
        });
        let most = most.count().max(1);
        if let Some((line, column)) = self.0.get(most).map(|p| (p.line, p.column)) {
            let more = self.0.len() - most;
            self.0.truncate(most);
            self.0.push(Problem::new("", format!("{more} more problems from here on")).at(line, column));
        }
        self
    }
}

impl From<Problem> for Problems {
    fn from(problem: Problem) -> Self {
        Self(vec![problem])
    }
}

impl FromIterator<Problem> for Problems {
    fn from_iter<T: IntoIterator<Item = Problem>>(iter: T) -> Self {
        Self(iter.into_iter().collect())
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str("; ")?;
            }
            write!(f, "{problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// `, did you mean …` for a word that is close to one of the known ones.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|k| (strsim::jaro_winkler(word, k), k))
        .filter(|(score, _)| *score > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, k)| k)
}

/// An error and its causes as one line, each told once.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let more = cause.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_over_one_text_is_a_problem_of_that_text() {
        assert_eq!(guarded(|| Ok(1)), Ok(1));
        let problems = guarded(|| -> Result<(), Problems> { panic!("a mistake") }).expect_err("it panicked");
        let told = problems.to_string();
        assert!(told.contains("ended in a panic") && told.contains("please report it"), "{told}");
    }
}
