//! Prometheus' text format, written directly from the values at the moment of a scrape.
//!
//! A host with many apps has thousands of lines, so there is no intermediate form. The format is that of "Exposition
//! formats" in Prometheus' documentation, version 0.0.4.

use std::fmt::Write as _;

/// A buffer of lines.
#[derive(Debug, Default)]
pub(super) struct Text(String);

impl Text {
    /// Begins a family; its series follow.
    pub(super) fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.put(&["# HELP ", name, " ", help, "\n# TYPE ", name, " ", kind, "\n"]);
    }

    /// One series.
    pub(super) fn series(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        self.0.push_str(name);
        let mut open = '{';
        for (label, value) in labels {
            self.0.push(std::mem::replace(&mut open, ','));
            self.put(&[label, "=\""]);
            self.escaped(value);
            self.0.push('"');
        }
        if !labels.is_empty() {
            self.0.push('}');
        }
        self.0.push(' ');
        self.number(value);
    }

    /// A family of one series without labels.
    pub(super) fn single(&mut self, name: &str, kind: &str, help: &str, value: f64) {
        self.family(name, kind, help);
        self.series(name, &[], value);
    }

    /// Parts of a line, as they are.
    pub(super) fn put(&mut self, parts: &[&str]) {
        parts.iter().for_each(|part| self.0.push_str(part));
    }

    /// A number, and the end of its line.
    pub(super) fn number(&mut self, value: f64) {
        // Writing to a string cannot fail.
        let _ = match value {
            _ if value == f64::INFINITY => self.0.write_str("+Inf"),
            _ => write!(self.0, "{value}"),
        };
        self.0.push('\n');
    }

    /// A whole number, and the end of its line.
    pub(super) fn count(&mut self, value: u64) {
        let _ = writeln!(self.0, "{value}");
    }

    /// A value of a label.
    fn escaped(&mut self, value: &str) {
        if !value.contains(['\\', '"', '\n']) {
            return self.0.push_str(value);
        }
        for c in value.chars() {
            match c {
                '\\' => self.0.push_str("\\\\"),
                '"' => self.0.push_str("\\\""),
                '\n' => self.0.push_str("\\n"),
                c => self.0.push(c),
            }
        }
    }

    pub(super) fn finish(self) -> String {
        self.0
    }
}

impl From<String> for Text {
    fn from(text: String) -> Self {
        Self(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_follows_prometheus_format() {
        let mut text = Text::default();
        text.family("a_total", "counter", "What it is");
        text.series("a_total", &[("path", "C:\\x \"y\"\nz"), ("b", "1")], 3.0);
        text.single("age_seconds", "gauge", "Age", f64::INFINITY);
        text.series("small", &[], 0.25);
        let expected = "# HELP a_total What it is\n# TYPE a_total counter\n\
            a_total{path=\"C:\\\\x \\\"y\\\"\\nz\",b=\"1\"} 3\n\
            # HELP age_seconds Age\n# TYPE age_seconds gauge\nage_seconds +Inf\nsmall 0.25\n";
        assert_eq!(text.finish(), expected);
    }
}
