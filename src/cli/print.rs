//! Output for people: data to standard output, all else to standard error. A closed pipe is no error.

use std::io::Write as _;

/// Prints lines and tables.
#[derive(Debug)]
pub(super) struct Printer(());

impl Printer {
    pub(super) fn new() -> Self {
        Self(())
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

    /// A table: columns are padded to their widest cell, except the last one.
    pub(super) fn table(&mut self, rows: &[Vec<String>]) {
        let columns = rows.first().map_or(0, Vec::len);
        let widths: Vec<usize> = (0..columns)
            .map(|c| rows.iter().filter_map(|r| r.get(c)).map(|t| t.chars().count()).max().unwrap_or(0))
            .collect();
        for row in rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(&format!("{cell:<width$}  "));
            }
            self.line(line.trim_end());
        }
    }
}
