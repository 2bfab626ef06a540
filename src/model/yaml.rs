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
/// Most nodes of a text whose aliases are expanded: a page of aliases of aliases could fill the memory.
const MAX_NODES: usize = 100_000;

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

impl Node {
    /// How many nodes it is made of.
    fn count(&self) -> usize {
        1 + match &self.value {
            Value::Null | Value::Scalar { .. } => 0,
            Value::Seq(items) => items.iter().map(Node::count).sum(),
            Value::Map(entries) => entries.iter().map(|(_, node)| node.count()).sum::<usize>(),
        }
    }
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
    read(bytes, None)
}

/// Parses a text whose aliases and merge keys are replaced by what they refer to, as in Compose files. The positions are
/// those of what is referred to.
///
/// # Errors
/// As [`parse`]; also if it refers to what does not exist, or becomes too large.
pub fn parse_expanded(bytes: &[u8]) -> Result<Node, Problem> {
    read(bytes, Some(Anchors { nodes: HashMap::new(), left: MAX_NODES }))
}

fn read(bytes: &[u8], anchors: Option<Anchors>) -> Result<Node, Problem> {
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
    let mut reader = Reader { events: Parser::new_from_str(text), depth: 0, last, anchors };
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
    /// What aliases refer to, if they are expanded.
    anchors: Option<Anchors>,
}

struct Anchors {
    nodes: HashMap<usize, Node>,
    /// How many more nodes there may be.
    left: usize,
}

impl Anchors {
    /// Takes nodes from the limit; false if it is reached.
    fn count(&mut self, nodes: usize) -> bool {
        self.left = self.left.saturating_sub(nodes);
        self.left > 0
    }
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
        if let Some(anchors) = &mut self.anchors
            && !anchors.count(1)
        {
            return Err(problem(span, "the text has too many values"));
        }
        let anchor = match &event {
            Event::Scalar(_, _, anchor, _) | Event::SequenceStart(anchor, _) | Event::MappingStart(anchor, _) => {
                *anchor
            }
            _ => 0,
        };
        let value = match event {
            Event::Scalar(text, style, _, tag) => {
                self.refuse_extras(span, anchor, tag.is_some())?;
                let quoted = style != ScalarStyle::Plain;
                if !quoted && matches!(&*text, "" | "~" | "null") {
                    Value::Null
                } else {
                    Value::Scalar { text: text.into_owned(), quoted }
                }
            }
            Event::SequenceStart(_, tag) => {
                self.refuse_extras(span, anchor, tag.is_some())?;
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
            Event::MappingStart(_, tag) => {
                self.refuse_extras(span, anchor, tag.is_some())?;
                self.depth += 1;
                let entries = self.entries()?;
                self.depth -= 1;
                Value::Map(entries)
            }
            Event::Alias(name) => return self.alias(name, span),
            _ => return Err(problem(span, "this is not allowed here")),
        };
        let node = Node { line, column, value };
        if let Some(anchors) = self.anchors.as_mut().filter(|_| anchor != 0) {
            anchors.nodes.insert(anchor, node.clone());
        }
        Ok(node)
    }

    fn refuse_extras(&self, span: Span, anchor: usize, tagged: bool) -> Result<(), Problem> {
        if anchor != 0 && self.anchors.is_none() {
            return Err(problem(span, "anchors (`&name`) are not read; write the value out where it is used"));
        }
        if tagged {
            return Err(problem(span, "tags (`!name`) are not read"));
        }
        Ok(())
    }

    fn alias(&mut self, name: usize, span: Span) -> Result<Node, Problem> {
        let Some(anchors) = &mut self.anchors else {
            return Err(problem(span, "aliases (`*name`) are not read; write the value out"));
        };
        // An alias inside of what it refers to has no node yet.
        let Some(node) = anchors.nodes.get(&name).cloned() else {
            return Err(problem(span, "this alias refers to what contains it"));
        };
        if !anchors.count(node.count()) {
            return Err(problem(span, "with this alias the text has too many values"));
        }
        Ok(node)
    }

    /// The entries of a merge key: a mapping, or a list of them, of which the first one counts.
    fn merge(&mut self) -> Result<Vec<(Key, Node)>, Problem> {
        let (event, span) = self.next()?;
        let node = self.node(event, span)?;
        let maps = match node.value {
            Value::Seq(items) => items.into_iter().map(|item| item.value).collect(),
            other => vec![other],
        };
        let mut entries = Vec::new();
        for map in maps {
            let Value::Map(map) = map else {
                return Err(problem(span, "a merge key (`<<`) needs a mapping, or a list of them"));
            };
            entries.extend(map);
        }
        Ok(entries)
    }

    fn entries(&mut self) -> Result<Vec<(Key, Node)>, Problem> {
        let mut entries: Vec<(Key, Node)> = Vec::new();
        // A map beside the list, with the line of each key: a text has room for fifty thousand keys.
        let mut seen: HashMap<String, usize> = HashMap::new();
        let mut merged = Vec::new();
        loop {
            let (event, span) = self.next()?;
            let name = match event {
                Event::MappingEnd => {
                    for (key, node) in merged {
                        let Key { name, line, .. } = &key;
                        if !seen.contains_key(name) {
                            seen.insert(name.clone(), *line);
                            entries.push((key, node));
                        }
                    }
                    return Ok(entries);
                }
                Event::Scalar(text, ..) => text.into_owned(),
                _ => return Err(problem(span, "a key must be a single word")),
            };
            if name == "<<" && self.anchors.is_some() {
                merged.extend(self.merge()?);
                continue;
            }
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
    fn expanded_text_has_what_its_aliases_refer_to() {
        let text =
            b"a: &a {x: 1, y: 2}\nb: &b {y: 3, z: 4}\nc: {y: 5, <<: *a}\nd: {<<: [*a, *b]}\ne: *a\nf: &f one\ng: *f\n";
        let node = parse_expanded(text).expect("it is read");
        let Value::Map(entries) = node.value else { panic!("a mapping") };
        let texts = |at: usize| -> Vec<(String, String)> {
            let Value::Map(entries) = &entries[at].1.value else { panic!("a mapping") };
            let text = |node: &Node| match &node.value {
                Value::Scalar { text, .. } => text.clone(),
                other => panic!("{other:?}"),
            };
            entries.iter().map(|(key, node)| (key.name.clone(), text(node))).collect()
        };
        let pairs = |list: &[(&str, &str)]| -> Vec<(String, String)> {
            list.iter().map(|(key, text)| ((*key).to_owned(), (*text).to_owned())).collect()
        };
        assert_eq!(texts(2), pairs(&[("y", "5"), ("x", "1")]), "its own keys win");
        assert_eq!(texts(3), pairs(&[("x", "1"), ("y", "2"), ("z", "4")]), "the first one wins");
        assert_eq!(entries[4].1, entries[0].1);
        assert_eq!(entries[6].1.value, Value::Scalar { text: "one".into(), quoted: false });

        let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for n in 1..9 {
            let before = format!("*a{}", n - 1);
            bomb.push_str(&format!("a{n}: &a{n} [{}]\n", [before.as_str(); 10].join(", ")));
        }
        for (text, says) in [
            (bomb.as_str(), "too many values"),
            ("a: &a [*a]\n", "contains it"),
            ("a: {<<: 1}\n", "needs a mapping"),
            ("a: !reset null\n", "tags"),
        ] {
            let problem = parse_expanded(text.as_bytes()).expect_err("it is refused");
            assert!(problem.message.contains(says), "{problem}");
        }
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
