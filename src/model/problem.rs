//! Problems in user input, with place and remedy.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Largest part of a problem that is shown, in bytes.
const SHOWN: usize = 1000;
/// Most problems of one text or app that are kept and shown.
pub const MOST_PROBLEMS: usize = 100;
/// Most bytes of them.
const MOST_BYTES: usize = 16 * 1024;

/// User input made safe for a terminal: bounded, without control characters, colours and bidirectional overrides.
fn shown(text: impl Into<String>) -> String {
    bounded(text, SHOWN)
}

/// A text of about at most this many bytes, made safe for a terminal, a log and a store: input of users and programs
/// may have any length.
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

/// One problem in a file or key: place, cause, remedy.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Problem {
    /// Line in the text, from 1; 0 where the problem has no place in a text.
    pub line: usize,
    /// Column in the line, from 1; 0 where the problem has no place in a text.
    pub column: usize,
    /// The key of the problem, dotted (`healthcheck.interval`), or the etcd key.
    pub key: String,
    /// What is wrong, lower case, without a final full stop.
    pub message: String,
    /// The remedy, if known.
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

/// All problems found, not only the first. Never empty when used as an error.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Problems(Vec<Problem>);

/// Reads user input, and turns a panic into a problem of that input: a bug that one text triggers must not stop the
/// others.
///
/// # Errors
/// What is wrong with it.
pub fn catch_panic<T>(read: impl FnOnce() -> Result<T, Problems>) -> Result<T, Problems> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(read)).unwrap_or_else(|_| {
        let problem = Problem::new("", "reading this ended in a panic; the log of the agent has it");
        Err(problem.hint("this is a bug in demae: please report it, with the input").into())
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

    /// Sorts by place in the text.
    #[must_use]
    pub fn sorted(mut self) -> Self {
        self.0.sort();
        self
    }

    /// The first problems, and the number of the rest: bounded, since they are part of the status of an app.
    #[must_use]
    pub fn bounded(self) -> Self {
        self.within(MOST_BYTES)
    }

    /// The first problems that fit into this many bytes, and the number of the rest.
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

/// The known word that is most similar to `word`, if one is close.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|k| (strsim::jaro_winkler(word, k), k))
        .filter(|(score, _)| *score > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, k)| k)
}

/// An error and its causes as one line, without repetition.
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
    fn panic_while_reading_one_text_is_a_problem_of_that_text() {
        assert_eq!(catch_panic(|| Ok(1)), Ok(1));
        let problems = catch_panic(|| -> Result<(), Problems> { panic!("a mistake") }).expect_err("it panicked");
        let text = problems.to_string();
        assert!(text.contains("ended in a panic") && text.contains("please report it"), "{text}");
    }
}
