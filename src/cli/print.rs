//! Output for people: data to standard output, all else to standard error. A closed pipe is no error.

use std::{
    env,
    io::{IsTerminal as _, Write as _},
};

/// Narrowest last column of a table: below it each row becomes a block of its own.
const NARROWEST: usize = 24;
/// Words that say how something is, with their colours by ECMA-48 (31 red, 33 yellow, 32 green).
const COLOURS: &[(&str, &[&str])] = &[
    ("31", &["blocked", "invalid", "failed", "halted", "reverted", "reverting", "down"]),
    ("33", &["converging", "waiting", "paused", "leaving", "staged", "superseded", "cordoned", "drained"]),
    ("32", &["converged", "done", "proven", "active", "restored"]),
];

/// Prints lines and tables.
#[derive(Debug)]
pub(super) struct Printer {
    /// The width of the terminal, in characters; `None` where lines may be as long as they are.
    width: Option<usize>,
    is_coloured: bool,
}

impl Printer {
    /// For a terminal, by its width and its colours (`COLUMNS`, `NO_COLOR`, `CLICOLOR_FORCE`; <https://no-color.org>,
    /// <https://bixense.com/clicolors>); else for a program.
    pub(super) fn new(no_color: bool) -> Self {
        let out = std::io::stdout();
        let set = |name: &str| env::var(name).is_ok_and(|value| !value.is_empty());
        let is_forced = env::var("CLICOLOR_FORCE").is_ok_and(|value| !value.is_empty() && value != "0");
        let is_dumb = env::var("TERM").is_ok_and(|term| term == "dumb");
        let is_coloured = !no_color && !set("NO_COLOR") && (is_forced || out.is_terminal() && !is_dumb);
        let columns = env::var("COLUMNS").ok().and_then(|columns| columns.parse::<usize>().ok());
        let of_terminal = || rustix::termios::tcgetwinsize(&out).ok().map(|size| usize::from(size.ws_col));
        let width = columns.or_else(of_terminal).filter(|width| *width > 0);
        Self { width, is_coloured }
    }

    /// A line of data.
    pub(super) fn line(&mut self, text: &str) {
        let _ = writeln!(std::io::stdout(), "{text}");
    }

    /// A line of data; false once the output is closed.
    pub(super) fn try_line(&mut self, text: &str) -> bool {
        let mut out = std::io::stdout();
        writeln!(out, "{text}").and_then(|()| out.flush()).is_ok()
    }

    /// A message, on standard error.
    pub(super) fn error(&mut self, text: &str) {
        let _ = writeln!(std::io::stderr(), "{text}");
    }

    /// A table with its headings as the first row: columns are padded to their widest cell, except the last one, which is
    /// wrapped where the terminal ends.
    pub(super) fn table(&mut self, rows: &[Vec<String>]) {
        for line in self.layout(rows) {
            self.line(line.trim_end());
        }
    }

    /// A name and a text of any length, which is wrapped.
    pub(super) fn field(&mut self, name: &str, text: &str) {
        let room = self.width.map_or(usize::MAX, |width| width.saturating_sub(11).max(NARROWEST));
        for (n, part) in wrapped(text, room).into_iter().enumerate() {
            let name = if n == 0 { name } else { "" };
            self.line(format!("{name:<11}{part}").trim_end());
        }
    }

    fn layout(&self, rows: &[Vec<String>]) -> Vec<String> {
        let columns = rows.first().map_or(0, Vec::len);
        let width_of = |column: usize| rows.iter().filter_map(|r| r.get(column)).map(|t| t.chars().count()).max();
        let widths: Vec<usize> = (0..columns).map(|column| width_of(column).unwrap_or(0)).collect();
        let before: usize = widths.iter().take(columns.saturating_sub(1)).map(|width| width + 2).sum();
        let last = widths.last().copied().unwrap_or(0);
        let room = match self.width {
            Some(width) if before + last > width => width.saturating_sub(before),
            _ => usize::MAX,
        };
        if room < NARROWEST.min(last) {
            return self.blocks(rows);
        }
        let mut out = Vec::new();
        for row in rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths).take(columns - 1) {
                let padding = " ".repeat(width - cell.chars().count() + 2);
                line.push_str(&format!("{}{padding}", self.painted(cell)));
            }
            let mut parts = wrapped(row.last().map_or("", String::as_str), room).into_iter();
            out.push(line + &self.painted(&parts.next().unwrap_or_default()));
            out.extend(parts.map(|part| " ".repeat(before) + &part));
        }
        out
    }

    /// Each row as lines of its own: the first cell, then the others with their headings.
    fn blocks(&self, rows: &[Vec<String>]) -> Vec<String> {
        let Some((headings, rows)) = rows.split_first() else { return Vec::new() };
        let name = headings.iter().map(|heading| heading.trim().chars().count()).max().unwrap_or(0);
        let room = self.width.unwrap_or(usize::MAX).saturating_sub(name + 4).max(8);
        let mut out = Vec::new();
        for row in rows {
            out.push(row.first().cloned().unwrap_or_default());
            for (heading, cell) in headings.iter().zip(row).skip(1) {
                if cell == "-" || cell.is_empty() {
                    continue;
                }
                for (n, part) in wrapped(cell, room).into_iter().enumerate() {
                    let heading = if n == 0 { heading.trim() } else { "" };
                    out.push(format!("  {heading:<name$}  {}", self.painted(&part)));
                }
            }
        }
        out
    }

    /// A word that says how something is, in its colour.
    fn painted(&self, cell: &str) -> String {
        let colour = COLOURS.iter().find(|(_, words)| words.contains(&cell)).filter(|_| self.is_coloured);
        colour.map_or_else(|| cell.to_owned(), |(colour, _)| format!("\u{1b}[{colour}m{cell}\u{1b}[0m"))
    }
}

/// A text in lines of at most so many characters, broken at blanks; a longer word is broken where the line ends.
fn wrapped(text: &str, room: usize) -> Vec<String> {
    if text.chars().count() <= room {
        return vec![text.to_owned()];
    }
    let (mut lines, mut line) = (Vec::new(), String::new());
    for word in text.split(' ') {
        let used = line.chars().count();
        if used > 0 && used + 1 + word.chars().count() > room {
            lines.push(std::mem::take(&mut line));
        } else if used > 0 {
            line.push(' ');
        }
        line.push_str(word);
        while line.chars().count() > room {
            let rest: String = line.chars().skip(room).collect();
            let taken: String = line.chars().take(room).collect();
            lines.push(taken);
            line = rest;
        }
    }
    lines.push(line);
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn laid_out(width: Option<usize>) -> String {
        let rows = [
            ["APP", "HEALTHY", "STATE", "REASON"],
            ["web", "1/1", "converged", ""],
            ["shop", "0/2", "blocked", "the mount `/srv/shop/data` does not exist on this host: create it"],
        ];
        let rows: Vec<Vec<String>> = rows.iter().map(|row| row.map(String::from).to_vec()).collect();
        let printer = Printer { width, is_coloured: false };
        printer.layout(&rows).iter().map(|line| format!("{}\n", line.trim_end())).collect()
    }

    #[test]
    fn table_fits_the_terminal() {
        expect_test::expect![[r#"
            APP   HEALTHY  STATE      REASON
            web   1/1      converged
            shop  0/2      blocked    the mount `/srv/shop/data` does not exist on this host: create it
        "#]]
        .assert_eq(&laid_out(Some(200)));
        assert_eq!(laid_out(None), laid_out(Some(200)), "a program gets whole lines");
        expect_test::expect![[r#"
            APP   HEALTHY  STATE      REASON
            web   1/1      converged
            shop  0/2      blocked    the mount `/srv/shop/data` does not exist on this
                                      host: create it
        "#]]
        .assert_eq(&laid_out(Some(80)));
        expect_test::expect![[r#"
            web
              HEALTHY  1/1
              STATE    converged
            shop
              HEALTHY  0/2
              STATE    blocked
              REASON   the mount `/srv/shop/data`
                       does not exist on this host:
                       create it
        "#]]
        .assert_eq(&laid_out(Some(40)));
        for width in 1..100 {
            let longest = laid_out(Some(width)).lines().map(|line| line.chars().count()).max();
            assert!(longest.is_some_and(|longest| longest <= width.max(19)), "{width}: {longest:?}");
        }
    }

    #[test]
    fn only_words_of_state_are_coloured() {
        let printer = Printer { width: None, is_coloured: true };
        assert_eq!(printer.painted("blocked"), "\u{1b}[31mblocked\u{1b}[0m");
        assert_eq!(printer.painted("blocked by hand"), "blocked by hand");
        assert_eq!(Printer { is_coloured: false, ..printer }.painted("blocked"), "blocked");
    }
}
