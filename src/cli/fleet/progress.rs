//! What a waiting verb prints meanwhile, on standard error: lines for a log, a picture for a terminal, or JSON for a
//! program.

use std::{
    collections::BTreeMap,
    io::{IsTerminal as _, Write as _, stderr},
};

use serde::Serialize;

use crate::{cli::print::Printer, model::name::HostName};

/// Most hosts in the picture: those that are not there yet come first, and the others are counted.
const MOST_LINES: usize = 8;

/// The form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Form {
    /// A picture on a terminal, else lines
    Auto,
    /// A picture of the hosts that is drawn again at each change
    Tty,
    /// A line for each change of a host
    Plain,
    /// The same, a JSON object for each
    Json,
}

/// Where a host is with a release.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Stage {
    pub(super) state: &'static str,
    /// In a few words.
    pub(super) text: String,
    /// Whether it has converged on the release that is waited for.
    pub(super) done: bool,
}

/// A line of the JSON form.
#[derive(Serialize)]
#[serde(untagged)]
enum Line<'a> {
    Host {
        host: &'a HostName,
        #[serde(flatten)]
        stage: &'a Stage,
    },
    Note {
        note: &'a str,
    },
}

/// What was printed so far.
pub(super) struct Progress {
    form: Form,
    last_note: String,
    stages: BTreeMap<HostName, Stage>,
    /// How many lines the picture has.
    drawn: usize,
}

impl Progress {
    pub(super) fn new(form: Form) -> Self {
        let form = match form {
            Form::Auto if stderr().is_terminal() => Form::Tty,
            Form::Auto => Form::Plain,
            form => form,
        };
        Self { form, last_note: String::new(), stages: BTreeMap::new(), drawn: 0 }
    }

    /// Prints a note, once.
    pub(super) fn note(&mut self, printer: &mut Printer, note: &str) {
        if self.last_note == note {
            return;
        }
        note.clone_into(&mut self.last_note);
        match self.form {
            Form::Json => json(printer, &Line::Note { note }),
            _ => {
                self.erase();
                printer.error(&format!("note: {note}"));
                self.draw();
            }
        }
    }

    /// Prints what changed on each host.
    pub(super) fn hosts(&mut self, printer: &mut Printer, stages: BTreeMap<HostName, Stage>) {
        if stages == self.stages {
            return;
        }
        let changed = stages.iter().filter(|(host, stage)| self.stages.get(*host) != Some(stage));
        match self.form {
            Form::Json => changed.for_each(|(host, stage)| json(printer, &Line::Host { host, stage })),
            Form::Plain | Form::Auto => changed.for_each(|(host, stage)| printer.error(&line(host, stage))),
            Form::Tty => self.erase(),
        }
        self.stages = stages;
        self.draw();
    }

    fn erase(&mut self) {
        if self.drawn > 0 {
            // ECMA-48: up so many lines, and erase to the end of the screen.
            let _ = write!(stderr(), "\u{1b}[{}A\u{1b}[J", self.drawn);
            self.drawn = 0;
        }
    }

    fn draw(&mut self) {
        if self.form != Form::Tty {
            return;
        }
        let size = rustix::termios::tcgetwinsize(stderr()).ok();
        // A line that is wrapped would be two to erase.
        let width = size.map(|size| usize::from(size.ws_col)).filter(|width| *width > 0).unwrap_or(80);
        let lines = picture(&self.stages);
        self.drawn = lines.len();
        let text: String =
            lines.iter().map(|line| line.chars().take(width - 1).chain(['\n']).collect::<String>()).collect();
        let _ = stderr().write_all(text.as_bytes());
    }
}

/// The hosts that are not there yet, and how many are.
fn picture(stages: &BTreeMap<HostName, Stage>) -> Vec<String> {
    let mut hosts: Vec<_> = stages.iter().collect();
    hosts.sort_by_key(|(_, stage)| stage.done);
    let mut lines: Vec<String> = hosts.iter().take(MOST_LINES).map(|(host, stage)| line(host, stage)).collect();
    if hosts.len() > MOST_LINES {
        let done = stages.values().filter(|stage| stage.done).count();
        lines.push(format!("{done} of {} hosts are done", hosts.len()));
    }
    lines
}

fn line(host: &HostName, stage: &Stage) -> String {
    format!("{host}  {}", stage.text)
}

fn json(printer: &mut Printer, line: &Line<'_>) {
    match serde_json::to_string(line) {
        Ok(text) => printer.error(&text),
        Err(e) => printer.error(&format!("error: {e}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn picture_shows_what_is_not_done_and_counts_the_rest() {
        let stage = |done: bool| Stage { state: "converging", text: format!("done {done}"), done };
        let host = |n: usize| HostName::try_from(format!("web{n}").as_str()).expect("a name");
        let few: BTreeMap<_, _> = (0..2).map(|n| (host(n), stage(n == 0))).collect();
        assert_eq!(picture(&few), ["web1  done false", "web0  done true"]);
        let many: BTreeMap<_, _> = (0..20).map(|n| (host(n), stage(n != 13))).collect();
        let lines = picture(&many);
        assert_eq!((lines.len(), lines[0].as_str()), (MOST_LINES + 1, "web13  done false"));
        assert_eq!(lines.last().map(String::as_str), Some("19 of 20 hosts are done"));
    }
}
