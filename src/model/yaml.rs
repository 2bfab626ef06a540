//! A YAML or JSON text as a tree with the position of every node.
//!
//! Serde would stop at the first problem and lose its position; users want all of them, with lines. The texts come from
//! a store with many writers, so size and depth are bounded and aliases refused.

use std::collections::HashMap;

use saphyr_parser::{Event, Parser, ScalarStyle, Span};

use super::problem::Problem;

/// Largest accepted text, in bytes. A spec is a page; 256 KiB leaves room for a list of a thousand hosts.
pub const MAX_TEXT: usize = 256 * 1024;
/// Deepest accepted nesting.
const MAX_DEPTH: usize = 32;

/// A value and its position.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// Line, from 1.
    pub line: usize,
    /// Column, from 1.
    pub column: usize,
    /// The value.
    pub value: Value,
}

/// A value. Scalars keep their spelling: `0755` and `yes` are not converted.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Nothing, `null` or `~`.
    Null,
    /// A scalar; `quoted` distinguishes `"true"` from `true`.
    Scalar {
        /// As written, after unquoting.
        text: String,
        /// Whether it was quoted or a block scalar.
        quoted: bool,
    },
    /// A list.
    Seq(Vec<Node>),
    /// A mapping, in source order. Keys are unique.
    Map(Vec<(Key, Node)>),
}

/// The key of an entry, and its position.
#[derive(Debug, Clone, PartialEq)]
pub struct Key {
    /// The name.
    pub name: String,
    /// Line, from 1.
    pub line: usize,
    /// Column, from 1.
    pub column: usize,
}

impl Value {
    /// Its kind, for an error message.
    pub fn kind(&self) -> &'static str {
        match self {
            Value::Null => "nothing",
            Value::Scalar { .. } => "a single value",
            Value::Seq(_) => "a list",
            Value::Map(_) => "a mapping",
        }
    }
}

/// Reads one document.
///
/// # Errors
/// The first place where the text is not YAML, is too large or too deep, or uses what is refused.
pub fn parse(bytes: &[u8]) -> Result<Node, Problem> {
    if bytes.len() > MAX_TEXT {
        return Err(Problem::new(
            "",
            format!("the text has {} bytes; {MAX_TEXT} is the most that is read", bytes.len()),
        ));
    }
    let text = std::str::from_utf8(bytes).map_err(|e| {
        let before = &bytes[..e.valid_up_to()];
        let line = before.iter().filter(|b| **b == b'\n').count() + 1;
        Problem::new("", format!("the text is not UTF-8 at byte {}", e.valid_up_to())).at(line, 1)
    })?;
    let last = text.lines().count().max(1);
    let mut reader = Reader { events: Parser::new_from_str(text), depth: 0, last };
    reader.document().map_err(|mut problem| {
        problem.line = problem.line.min(last);
        problem
    })
}

struct Reader<'i> {
    events: Parser<'i, saphyr_parser::StrInput<'i>>,
    depth: usize,
    /// The last line: the parser reports errors at the end on the line after it.
    last: usize,
}

impl<'i> Reader<'i> {
    fn next(&mut self) -> Result<(Event<'i>, Span), Problem> {
        match self.events.next() {
            Some(Ok(found)) => Ok(found),
            Some(Err(e)) => {
                let at = e.marker();
                Err(Problem::new("", format!("this is not YAML: {}", e.info())).at(at.line(), at.col() + 1))
            }
            None => Err(Problem::new("", "the text ends too early")),
        }
    }

    fn document(&mut self) -> Result<Node, Problem> {
        loop {
            match self.next()? {
                (Event::StreamStart | Event::DocumentStart(_) | Event::Nothing, _) => {}
                (Event::StreamEnd, _) => return Err(Problem::new("", "the text is empty").at(1, 1)),
                (event, span) => {
                    let node = self.node(event, span)?;
                    loop {
                        match self.next()? {
                            (Event::StreamEnd, _) => return Ok(node),
                            (Event::DocumentStart(_), span) => {
                                return Err(problem(span, "a second document begins here; only one is read"));
                            }
                            _ => {}
                        }
                    }
                }
            }
        }
    }

    fn node(&mut self, event: Event<'i>, span: Span) -> Result<Node, Problem> {
        if self.depth >= MAX_DEPTH {
            return Err(problem(span, "the text is nested too deeply"));
        }
        let (line, column) = (span.start.line().min(self.last), span.start.col() + 1);
        let value = match event {
            Event::Scalar(text, style, anchor, tag) => {
                refuse_extras(span, anchor, tag.is_some())?;
                let quoted = style != ScalarStyle::Plain;
                if !quoted && matches!(&*text, "" | "~" | "null") {
                    Value::Null
                } else {
                    Value::Scalar { text: text.into_owned(), quoted }
                }
            }
            Event::SequenceStart(anchor, tag) => {
                refuse_extras(span, anchor, tag.is_some())?;
                self.depth += 1;
                let mut items = Vec::new();
                loop {
                    let (event, span) = self.next()?;
                    if matches!(event, Event::SequenceEnd) {
                        break;
                    }
                    items.push(self.node(event, span)?);
                }
                self.depth -= 1;
                Value::Seq(items)
            }
            Event::MappingStart(anchor, tag) => {
                refuse_extras(span, anchor, tag.is_some())?;
                self.depth += 1;
                let entries = self.entries()?;
                self.depth -= 1;
                Value::Map(entries)
            }
            Event::Alias(_) => {
                return Err(problem(span, "aliases (`*name`) are not read; write the value out"));
            }
            _ => return Err(problem(span, "this is not allowed here")),
        };
        Ok(Node { line, column, value })
    }

    fn entries(&mut self) -> Result<Vec<(Key, Node)>, Problem> {
        let mut entries: Vec<(Key, Node)> = Vec::new();
        // A map beside the list, with the line of each key: a text has room for fifty thousand keys.
        let mut seen: HashMap<String, usize> = HashMap::new();
        loop {
            let (event, span) = self.next()?;
            let name = match event {
                Event::MappingEnd => return Ok(entries),
                Event::Scalar(text, ..) => text.into_owned(),
                _ => return Err(problem(span, "a key must be a single word")),
            };
            if name == "<<" {
                return Err(problem(span, "merge keys (`<<`) are not read; write the values out"));
            }
            let key = Key { name, line: span.start.line().min(self.last), column: span.start.col() + 1 };
            if let Some(first) = seen.insert(key.name.clone(), key.line) {
                let message = format!("duplicate key; it is already on line {first}");
                return Err(Problem::new(key.name, message).at(key.line, key.column));
            }
            let (event, span) = self.next()?;
            let node = self.node(event, span)?;
            entries.push((key, node));
        }
    }
}

fn problem(span: Span, message: &str) -> Problem {
    Problem::new("", message).at(span.start.line(), span.start.col() + 1)
}

fn refuse_extras(span: Span, anchor: usize, tagged: bool) -> Result<(), Problem> {
    if anchor != 0 {
        return Err(problem(span, "anchors (`&name`) are not read; write the value out where it is used"));
    }
    if tagged {
        return Err(problem(span, "tags (`!name`) are not read"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalars_keep_spelling_and_position() {
        let node = parse(b"a: 0755\nb: [yes, \"no\"]\nc:\n").expect("this is YAML");
        let Value::Map(entries) = node.value else { panic!("a mapping") };
        assert_eq!(entries[0].1.value, Value::Scalar { text: "0755".into(), quoted: false });
        assert_eq!((entries[1].0.line, entries[1].1.column), (2, 4));
        assert_eq!(entries[2].1.value, Value::Null);
    }

    #[test]
    fn hostile_yaml_is_refused_with_one_problem() {
        let deep = "[".repeat(60);
        let deeper = "[".repeat(100_000);
        for (text, says) in [
            (deep.as_bytes(), "nested too deeply"),
            (deeper.as_bytes(), "recursion limit"),
            (b"a: &x 1\nb: *x", "anchors"),
            (b"a: 1\na: 2", "already on line 1"),
            (b"a: \xff", "not UTF-8 at byte 3"),
            (b"a: [1", "not YAML"),
            (b"", "empty"),
            (b"a: 1\n---\nb: 2\n", "second document"),
        ] {
            let problem = parse(text).expect_err("this is refused");
            assert!(problem.message.contains(says), "{problem}");
        }
    }
}
