//! Variables as files have them: `.env` files, and Docker's env-files.

use std::collections::BTreeMap;

use super::name::EnvName;

/// How a file is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// As `.env` files: quotes, `export`, comments after values
    Dotenv,
    /// As `docker run --env-file` reads it: all after `=` is the value
    Docker,
    /// As `.env` files, with values in which `$` begins a variable, as in a Compose file, and `$$` stands for itself. A
    /// name without `=` is left out.
    Compose,
}

/// A line that is wrong, from 1, and why.
pub type WrongLine = (usize, String);

/// Reads the variables of a file. Of a variable that is there twice the last one counts, as for Compose and Docker.
///
/// # Errors
/// All lines that are wrong, and why; without their values.
pub fn parse(text: &str, format: Format) -> Result<BTreeMap<EnvName, String>, Vec<WrongLine>> {
    parse_in_order(text, format).map(|values| values.into_iter().collect())
}

/// Reads the variables of a file, in its order.
///
/// # Errors
/// As [`parse`].
pub fn parse_in_order(text: &str, format: Format) -> Result<Vec<(EnvName, String)>, Vec<WrongLine>> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let (mut values, mut problems) = (Vec::new(), Vec::new());
    let mut rest = Lines { text, line: 0 };
    while let Some(line) = rest.next() {
        let (number, line) = (rest.line, line.trim_start());
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if format == Format::Compose && !line.contains('=') && name_of(line.trim_end()).is_ok() {
            continue;
        }
        let read = match format {
            Format::Docker => docker(line),
            Format::Dotenv | Format::Compose => dotenv(line, &mut rest, format == Format::Compose),
        };
        match read {
            Ok(variable) => values.push(variable),
            Err(problem) => problems.push((number, problem)),
        }
    }
    if problems.is_empty() { Ok(values) } else { Err(problems) }
}

/// The lines of a text that are not read yet.
struct Lines<'t> {
    text: &'t str,
    /// The number of the line that was read last, from 1.
    line: usize,
}

impl<'t> Lines<'t> {
    fn next(&mut self) -> Option<&'t str> {
        if self.text.is_empty() {
            return None;
        }
        let (line, rest) = self.text.split_once('\n').unwrap_or((self.text, ""));
        self.text = rest;
        self.line += 1;
        Some(line.strip_suffix('\r').unwrap_or(line))
    }
}

fn name_of(text: &str) -> Result<EnvName, String> {
    // The text itself is not told: it may be a part of a value.
    EnvName::try_from(text).map_err(|_| "what is before `=` is not the name of a variable".to_owned())
}

fn docker(line: &str) -> Result<(EnvName, String), String> {
    match line.split_once('=') {
        Some((name, value)) => Ok((name_of(name)?, value.to_owned())),
        None => Err("there is no `=`: Docker would take the value from its own environment".to_owned()),
    }
}

fn dotenv<'t>(line: &'t str, rest: &mut Lines<'t>, has_variables: bool) -> Result<(EnvName, String), String> {
    let line = line.strip_prefix("export ").map_or(line, str::trim_start);
    let (name, value) = line.split_once('=').ok_or("there is no `=`")?;
    let name = name_of(name.trim_end())?;
    let quoted = match value.trim_start().chars().next() {
        Some(quote @ ('\'' | '"')) => {
            let (value, after) = quoted(&value.trim_start()[1..], quote, rest, has_variables)?;
            if !(after.trim().is_empty() || after.trim_start().starts_with('#')) {
                return Err(format!("after the closing {quote} there is more"));
            }
            value
        }
        _ => {
            let value = value[..value.find(" #").unwrap_or(value.len())].trim();
            if !has_variables {
                literal(value)?;
            }
            value.to_owned()
        }
    };
    Ok((name, quoted))
}

/// The text up to the closing quote, which may be some lines later, and what follows it on its line.
fn quoted<'t>(
    first: &'t str,
    quote: char,
    rest: &mut Lines<'t>,
    has_variables: bool,
) -> Result<(String, &'t str), String> {
    let mut value = String::new();
    let dollar = if has_variables { "$$" } else { "$" };
    let mut line = first;
    loop {
        let mut chars = line.char_indices();
        while let Some((at, c)) = chars.next() {
            match c {
                _ if c == quote => return Ok((value, &line[at + 1..])),
                '\\' if quote == '"' => match chars.next() {
                    Some((_, 'n')) => value.push('\n'),
                    Some((_, 'r')) => value.push('\r'),
                    Some((_, 't')) => value.push('\t'),
                    Some((_, 'a')) => value.push('\u{7}'),
                    Some((_, 'b')) => value.push('\u{8}'),
                    Some((_, 'f')) => value.push('\u{c}'),
                    Some((_, 'v')) => value.push('\u{b}'),
                    Some((_, '$')) => value.push_str(dollar),
                    Some((_, c @ ('"' | '\\'))) => value.push(c),
                    Some((_, other)) => value.extend(['\\', other]),
                    None => value.push('\\'),
                },
                '\\' if line[at + 1..].starts_with('\'') => {
                    chars.next();
                    value.push('\'');
                }
                '$' if quote == '"' && has_variables => value.push('$'),
                '$' if quote == '"' => literal("$")?,
                '$' => value.push_str(dollar),
                _ => value.push(c),
            }
        }
        line = rest.next().ok_or_else(|| format!("the closing {quote} is missing"))?;
        value.push('\n');
    }
}

/// Refuses what Compose would replace: written as it is here, the app would get other text than before.
fn literal(value: &str) -> Result<(), String> {
    if value.contains('$') {
        return Err(
            "Compose would replace `$` and what follows it; write the value in single quotes to keep it".to_owned()
        );
    }
    Ok(())
}

/// The same variables as a file.
///
/// # Errors
/// A variable that the format cannot carry, and why.
pub fn write(values: &BTreeMap<EnvName, String>, format: Format) -> Result<String, String> {
    let mut text = String::new();
    for (name, value) in values {
        match format {
            Format::Docker if value.contains(['\n', '\r']) => {
                return Err(format!(
                    "{name} has a line break, which Docker's format cannot carry (`--format dotenv` can)"
                ));
            }
            Format::Docker => text.push_str(&format!("{name}={value}\n")),
            // In single quotes Compose takes `\'` for a quote.
            Format::Dotenv | Format::Compose if value.contains(['\'', '\\', '\r', '\n']) => {
                let escaped = value.replace('\\', "\\\\").replace('"', "\\\"").replace('$', "\\$");
                let escaped = escaped.replace('\n', "\\n").replace('\r', "\\r");
                text.push_str(&format!("{name}=\"{escaped}\"\n"));
            }
            Format::Dotenv | Format::Compose => text.push_str(&format!("{name}='{value}'\n")),
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(text: &str) -> Vec<(String, String)> {
        let values = parse(text, Format::Dotenv).expect("it is read");
        values.into_iter().map(|(name, value)| (name.to_string(), value)).collect()
    }

    #[test]
    fn dotenv_files_are_read_as_compose_reads_them() {
        let text = "\u{feff}# a comment\nexport A=1\r\nB = two words # why\nC='a $X \\n b'\nD=\"a\\n\\\"b\\\" \\$X\" # d\n\
                    E=\nF=a#b\nG=\"first\nsecond\"\nH=#336699\nI= # none\nJ='it\\'s'\nA=2\n";
        let expected = [
            ("A", "2"),
            ("B", "two words"),
            ("C", "a $X \\n b"),
            ("D", "a\n\"b\" $X"),
            ("E", ""),
            ("F", "a#b"),
            ("G", "first\nsecond"),
            ("H", "#336699"),
            ("I", ""),
            ("J", "it's"),
        ];
        assert_eq!(read(text), expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }

    #[test]
    fn wrong_lines_are_named_without_their_values() {
        let text = "A=1\nsecret word\nB=pass$$\nC=\"x\" y\n1 2=3\nD=\"never closed\n";
        let problems = parse(text, Format::Dotenv).expect_err("they are wrong");
        assert_eq!(problems.iter().map(|(line, _)| *line).collect::<Vec<_>>(), [2, 3, 4, 5, 6]);
        assert!(problems.iter().all(|(_, what)| !what.contains("secret") && !what.contains("never")), "{problems:?}");
    }

    #[test]
    fn docker_files_are_literal() {
        let values = parse("# no\nA='1' # one\n B=$X\n", Format::Docker).expect("it is read");
        let values: Vec<(&str, &str)> = values.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        assert_eq!(values, [("A", "'1' # one"), ("B", "$X")]);
        assert_eq!(parse("HOME\n", Format::Docker).expect_err("it has no value").len(), 1);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(value in any::<String>()) {
            let name = EnvName::try_from("NAME").expect("a name");
            let values = BTreeMap::from([(name, value.replace('\0', ""))]);
            for format in [Format::Dotenv, Format::Docker] {
                if let Ok(text) = write(&values, format) {
                    let read = parse(&text, format);
                    prop_assert_eq!(read.as_ref(), Ok(&values), "{}", text);
                }
            }
            let dotenv = write(&values, Format::Dotenv);
            prop_assert!(dotenv.is_ok());
        }
    }
}
