//! What a waiting verb prints: progress by host on standard error, and one line or object at the end on standard output.

use serde::Serialize;
use tokio::time::Instant;

use super::{
    Fleet,
    progress::{Form, Progress, Stage},
    summary::serving,
};
use crate::{
    cli::{Exit, Format, print::Printer},
    fleet::outcome::{Failure, Outcome, Until},
    model::{
        name::{AppName, HostName, ReleaseId},
        status::{AppStatus, State, VERSION},
        time::human,
    },
};

/// What was printed so far.
pub(super) struct Report {
    app: AppName,
    release: ReleaseId,
    revision: i64,
    format: Format,
    began: Instant,
    pub(super) progress: Progress,
}

/// The JSON output.
#[derive(Debug, Serialize)]
struct Shown<'a> {
    version: u32,
    app: &'a AppName,
    release: &'a ReleaseId,
    #[serde(skip_serializing_if = "Option::is_none")]
    revision: Option<i64>,
    outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    took_ms: Option<u128>,
    hosts: Vec<ShownHost>,
}

#[derive(Debug, Serialize)]
struct ShownHost {
    host: HostName,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    release: Option<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    reason: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    verdict: Option<String>,
}

impl Report {
    pub(super) fn new(app: AppName, release: ReleaseId, revision: i64, format: Format, form: Form) -> Self {
        Self { app, release, revision, format, began: Instant::now(), progress: Progress::new(form) }
    }

    /// Prints what changed on each host.
    pub(super) fn show(&mut self, fleet: &Fleet, outcome: &Outcome, printer: &mut Printer) {
        let statuses = fleet.statuses.get(&self.app).into_iter().flatten();
        let stages = statuses.map(|(host, (status, _))| (host.clone(), stage(status, &self.release)));
        self.progress.hosts(printer, stages.collect());
        match outcome {
            Outcome::Pending(Some(why)) => self.progress.note(printer, &format!("waiting: {why}")),
            Outcome::Blocked(None, why) => self.progress.note(printer, why),
            Outcome::Blocked(Some(host), why) => self.progress.note(printer, &format!("{host}: {why}")),
            _ => {}
        }
    }

    /// The change was written, and is not waited for.
    pub(super) fn detached(&self, printer: &mut Printer) {
        match self.format {
            Format::Json => self.print(printer, "written", None, Vec::new()),
            Format::Text => printer.line(&format!("{} {} is wanted{}", self.app, self.release, self.at())),
        }
    }

    /// The wait ends before it is decided.
    pub(super) fn goes_on(&self, printer: &mut Printer, why: &str) {
        if self.format == Format::Json {
            self.print(printer, "undecided", Some(why.to_owned()), Vec::new());
        }
        printer.error(&format!("{why}; it goes on. To wait again: demae wait {} --release {}", self.app, self.release));
    }

    fn at(&self) -> String {
        if self.revision > 0 { format!(" (revision {})", self.revision) } else { String::new() }
    }

    fn print(&self, printer: &mut Printer, outcome: &'static str, reason: Option<String>, hosts: Vec<ShownHost>) {
        let shown = Shown {
            version: VERSION,
            app: &self.app,
            release: &self.release,
            revision: Some(self.revision).filter(|revision| *revision > 0),
            outcome,
            reason,
            took_ms: Some(self.began.elapsed().as_millis()),
            hosts,
        };
        match serde_json::to_string_pretty(&shown) {
            Ok(text) => printer.line(&text),
            Err(e) => printer.error(&format!("error: {e}")),
        }
    }

    fn hosts(&self, fleet: &Fleet) -> Vec<ShownHost> {
        let statuses = fleet.statuses.get(&self.app).into_iter().flatten();
        let verdict = |host: &HostName| {
            let key = (self.app.clone(), self.release.clone(), host.clone());
            fleet.contents.records.verdicts.get(&key)?.value.as_ref().map(|verdict| verdict.cause.clone())
        };
        let one = |(host, (status, _)): (&HostName, &(AppStatus, i64))| ShownHost {
            host: host.clone(),
            state: status.state.as_str(),
            release: status.runs().map(str::to_owned),
            reason: status.reason.clone(),
            verdict: verdict(host).or_else(|| status.verdict.as_ref().map(|v| v.cause.clone())),
        };
        statuses.map(one).collect()
    }
}

fn stage(status: &AppStatus, release: &ReleaseId) -> Stage {
    let state = status.state.as_str();
    if status.release.as_deref() != Some(release.as_str()) {
        let runs = status.runs().unwrap_or("nothing");
        let text = match status.reason.as_str() {
            "" => format!("runs {runs}"),
            reason => format!("runs {runs}: {reason}"),
        };
        return Stage { state, text, done: false };
    }
    let text = match (status.reason.as_str(), status.timeline.last()) {
        ("", Some(moment)) => format!("{state}  {} after {} ms", moment.what, moment.ms),
        ("", None) => state.to_owned(),
        (reason, _) => format!("{state}  {reason}"),
    };
    Stage { state, text, done: status.state == State::Converged }
}

/// Says what became of a release, and what to do next.
pub(super) fn conclude(report: &Report, outcome: &Outcome, fleet: &Fleet, goal: Until, printer: &mut Printer) -> Exit {
    let Report { app, release, .. } = report;
    let (exit, word, reason) = match outcome {
        Outcome::Converged(_) => (Exit::Success, "converged", None),
        Outcome::Canaries if goal == Until::Canary => (Exit::Success, "canary", None),
        Outcome::Canaries => (Exit::Promote, "canary", None),
        Outcome::Failed(failure) => (Exit::Release, "failed", Some(of_failure(failure))),
        Outcome::Blocked(None, why) => (Exit::Blocked, "blocked", Some(why.clone())),
        Outcome::Blocked(Some(host), why) => (Exit::Blocked, "blocked", Some(format!("{host}: {why}"))),
        Outcome::Superseded(why) => (Exit::Superseded, "superseded", Some(why.clone())),
        Outcome::Pending(why) => (Exit::Undecided, "undecided", why.clone()),
    };
    if report.format == Format::Json {
        report.print(printer, word, reason.clone(), report.hosts(fleet));
    }
    let reason = reason.unwrap_or_default();
    match outcome {
        Outcome::Converged(count) => {
            let (took, at) = (human(report.began.elapsed()), report.at());
            let verb = if goal == Until::Serving { "serves" } else { "converged" };
            let hosts = if *count == 1 { "1 host".to_owned() } else { format!("{count} hosts") };
            if report.format == Format::Text {
                printer.line(&format!("{app} {release} {verb} on {hosts} in {took}{at}"));
            }
        }
        Outcome::Canaries => {
            if report.format == Format::Text {
                printer.line(&format!("{app} {release} is proven on its canaries, and waits"));
            }
            printer.error(&format!("Next:  demae promote {app}   ·   demae rollback {app}"));
        }
        Outcome::Failed(failure) => {
            tell_failure(report, failure, fleet, printer);
            printer.error(&format!("demae: {app} {release} failed: {reason}"));
            printer
                .error(&format!("Next:  demae retry {app}   ·   demae rollback {app}   ·   demae deploy {app} IMAGE"));
        }
        Outcome::Blocked(host, _) => {
            printer.error(&format!("demae: {app} {release} is blocked: {reason}"));
            let next = match host {
                Some(host) => format!("demae status {app}, on {host}"),
                None => format!("demae status --fleet {app}"),
            };
            printer.error(&format!("Next:  {next}   ·   demae wait {app} --release {release}"));
        }
        Outcome::Superseded(why) => {
            printer.error(&format!("demae: {app} {release} is superseded: {why}"));
        }
        Outcome::Pending(_) => {}
    }
    exit
}

fn of_failure(failure: &Failure) -> String {
    let Failure { host, cause, .. } = failure;
    match host {
        Some(host) => format!("on {host}: {cause}"),
        None => cause.clone(),
    }
}

/// The evidence, and what still serves.
fn tell_failure(report: &Report, failure: &Failure, fleet: &Fleet, printer: &mut Printer) {
    let host = failure.host.as_ref().map_or_else(|| report.app.to_string(), ToString::to_string);
    for line in failure.log_tail.lines() {
        printer.error(&format!("{host}    | {line}"));
    }
    let statuses = fleet.statuses.get(&report.app).into_iter().flatten();
    for (release, count) in serving(statuses.map(|(_, (status, _))| status)) {
        printer.error(&format!("{release} serves on {count} {}", if count == 1 { "host" } else { "hosts" }));
    }
    // GitHub shows this line at the top of the run.
    if std::env::var_os("GITHUB_ACTIONS").is_some_and(|value| value == "true") {
        let cause = failure.cause.replace('%', "%25").replace('\n', "%0A");
        printer.error(&format!("::error title={} on {host}::{cause}", report.app));
    }
}
