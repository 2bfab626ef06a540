//! `demae status --fleet APP`: one app, why it is not converged, and what to do next.

use super::{
    Fleet,
    logs::evidence,
    summary::{Shown, serving},
};
use crate::{
    cli::print::Printer,
    fleet::outcome::{Outcome, Until, Wanted},
    model::{
        name::AppName,
        time::{Timestamp, human},
    },
};

/// Most lines of a log that are shown.
const LINES: usize = 8;

/// Prints what is wanted of an app, what serves, why they differ, and the next commands.
pub(super) fn print(fleet: &Fleet, app: &AppName, shown: &Shown, printer: &mut Printer) {
    let release = match fleet.wanted(app) {
        Wanted::Release(release) => Some(release),
        _ => None,
    };
    printer.field("App:", app.as_str());
    let what = [shown.release.as_deref(), shown.image.as_deref()].into_iter().flatten().collect::<Vec<_>>().join("  ");
    printer.field("Wanted:", if what.is_empty() { "nothing" } else { &what });
    if let Some(digest) = release.as_ref().and_then(|release| fleet.contents.records.digest(app, release)) {
        printer.field("Digest:", digest.as_str());
    }
    let now = Timestamp::now();
    let kept = release.as_ref().and_then(|release| fleet.contents.records.kept.get(&(app.clone(), release.clone())));
    if let Some(kept) = kept.and_then(|stored| stored.value.as_ref()) {
        let by = kept.by.as_deref().unwrap_or("not recorded");
        printer.field("By:", &format!("{by}, {} ago", human(now.since(kept.opened))));
    }
    if let (Some(phase), Some(since)) = (shown.phase, shown.since) {
        printer.field("Rollout:", &format!("{phase}, {} ago", human(now.since(since))));
    }
    for (runs, count) in serving(shown.hosts.iter()) {
        printer.field("Serving:", &format!("{runs} on {count} of {} hosts", shown.wanted));
    }
    hosts(shown, printer);
    let outcome = release.as_ref().map(|release| fleet.outcome(app, release, 0, Until::Converged));
    let why = why(fleet, app, outcome.as_ref(), shown);
    if !why.is_empty() {
        printer.line("");
        printer.field("Why:", &why);
    }
    if let Some(Outcome::Failed(_)) = outcome {
        print_evidence(fleet, app, printer);
    }
    for (n, command) in next(fleet, app, outcome.as_ref()).iter().enumerate() {
        printer.field(if n == 0 { "Next:" } else { "" }, command);
    }
}

fn hosts(shown: &Shown, printer: &mut Printer) {
    let mut rows = vec![["HOST", "RUNS", "HEALTHY", "STATE", "REASON"].map(String::from).to_vec()];
    for status in &shown.hosts {
        rows.push(vec![
            status.host.to_string(),
            status.runs().unwrap_or("-").to_owned(),
            format!("{}/{}", status.healthy, status.wanted),
            status.state.as_str().to_owned(),
            status.reason.clone(),
        ]);
    }
    if rows.len() > 1 {
        printer.line("");
        printer.table(&rows);
    }
}

/// One sentence; empty if all is well.
fn why(fleet: &Fleet, app: &AppName, outcome: Option<&Outcome>, shown: &Shown) -> String {
    match outcome {
        Some(Outcome::Converged(_)) | None if shown.reason.is_empty() => String::new(),
        Some(Outcome::Failed(failure)) => match &failure.host {
            Some(host) => format!("it failed on {host}: {}", failure.cause),
            None => format!("it failed: {}", failure.cause),
        },
        Some(Outcome::Canaries) => "it is proven on its canaries, and waits for a promotion".to_owned(),
        Some(Outcome::Blocked(Some(host), why)) => format!("{host}: {why}"),
        Some(Outcome::Blocked(None, why) | Outcome::Pending(Some(why))) => why.clone(),
        _ if fleet.hosts(app).is_empty() => {
            "no host that is up is to run it: see its constraints, and `demae hosts`".to_owned()
        }
        _ => shown.reason.clone(),
    }
}

/// The end of the log of the release that failed.
fn print_evidence(fleet: &Fleet, app: &AppName, printer: &mut Printer) {
    let found = evidence(fleet, app);
    let latest = found.iter().max_by_key(|(_, evidence)| evidence.at);
    let Some(((host, _), evidence)) = latest.filter(|(_, evidence)| !evidence.log_tail.trim().is_empty()) else {
        return;
    };
    let lines: Vec<&str> = evidence.log_tail.lines().collect();
    for (n, line) in lines[lines.len().saturating_sub(LINES)..].iter().enumerate() {
        printer.field(if n == 0 { "Evidence:" } else { "" }, &format!("{host} │ {line}"));
    }
}

/// The commands that a person may want to type now.
fn next(fleet: &Fleet, app: &AppName, outcome: Option<&Outcome>) -> Vec<String> {
    let is_paused = matches!(fleet.contents.apps().get(app), Some(Ok(everywhere)) if everywhere.paused.is_some());
    match outcome {
        _ if is_paused => vec![format!("demae resume {app}")],
        Some(Outcome::Failed(_)) => {
            vec![format!("demae logs {app} --failed"), format!("demae retry {app}"), format!("demae rollback {app}")]
        }
        Some(Outcome::Canaries) => vec![format!("demae promote {app}"), format!("demae rollback {app}")],
        Some(Outcome::Blocked(Some(host), _)) => vec![format!("demae doctor, on {host}"), format!("demae wait {app}")],
        Some(Outcome::Blocked(None, _)) => vec![format!("demae wait {app}")],
        Some(Outcome::Pending(_)) => vec![format!("demae wait {app}"), format!("demae history {app}")],
        Some(Outcome::Converged(_) | Outcome::Superseded(_)) | None => Vec::new(),
    }
}
