//! `demae status --fleet`: one line for each app, those with trouble first.

use serde::Serialize;

use super::{
    Fleet, card,
    summary::{Shown, is_well, of_app},
};
use crate::{
    cli::{Ended, Exit, Format, print::Printer, runtime},
    model::{
        name::{AppName, HostName},
        status::VERSION,
        time::{Timestamp, human},
    },
    store::{client::EtcdConfig, keys::Key},
};

#[derive(Debug, Serialize)]
struct ShownAll {
    version: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    leader: Option<HostName>,
    #[serde(skip_serializing_if = "Option::is_none")]
    frozen: Option<String>,
    apps: Vec<Shown>,
}

/// Reads and prints the apps of a fleet; all of them, or these.
///
/// # Errors
/// If the store cannot be read, or one of them is not in it.
pub(in crate::cli) fn run(
    config: &EtcdConfig,
    apps: &[String],
    all: bool,
    format: Format,
    printer: &mut Printer,
) -> Ended {
    let only = apps.iter().map(|app| AppName::try_from(app.as_str())).collect::<Result<Vec<_>, _>>()?;
    print(&runtime(1)?.block_on(Fleet::read(config))?, &only, all, format, printer)
}

fn print(fleet: &Fleet, only: &[AppName], all: bool, format: Format, printer: &mut Printer) -> Ended {
    let is_known = |app: &AppName| fleet.contents.apps().contains_key(app) || fleet.statuses.contains_key(app);
    let missing = only.iter().find(|app| !is_known(app));
    if let Some(missing) = missing {
        fleet.app(missing)?;
    }
    let apps = fleet.contents.apps().keys().chain(fleet.statuses.iter().filter(|(_, h)| !h.is_empty()).map(|(a, _)| a));
    let mut apps: Vec<AppName> = apps.filter(|app| only.is_empty() || only.contains(app)).cloned().collect();
    apps.sort();
    apps.dedup();
    let mut shown: Vec<Shown> = apps.into_iter().map(|app| of_app(fleet, app)).collect();
    shown.sort_by_key(|app| (is_well(app), app.app.clone()));
    let leader = fleet.contents.records.leader.as_ref().and_then(|leader| leader.value.clone());
    let frozen = fleet.text(&Key::Freeze);
    if format == Format::Json {
        let leader = leader.map(|leader| leader.host);
        printer.line(&serde_json::to_string_pretty(&ShownAll { version: VERSION, leader, frozen, apps: shown })?);
        return Ok(Exit::Success);
    }
    if let ([_], [app]) = (only, shown.as_slice()) {
        card::print(fleet, &app.app, app, printer);
    } else {
        print_table(&shown, all || !only.is_empty(), printer);
    }
    match leader {
        Some(leader) => {
            printer.error(&format!("{} leads since {}", leader.host, human(Timestamp::now().since(leader.since))));
        }
        None if fleet.contents.hosts.values().any(crate::rollout::takes_turns) => {
            printer.error("note: no agent leads the fleet, so no host gets a turn");
        }
        None => {}
    }
    if let Some(reason) = frozen {
        printer.error(&format!("note: the fleet is frozen, and no host gets a turn: {reason}"));
    }
    Ok(Exit::Success)
}

/// Whether apps that have converged are only counted, so that those with trouble are seen. Those that are asked for are
/// shown whatever their state.
pub(in crate::cli) fn is_folded(well: usize, trouble: usize, is_asked_for: bool) -> bool {
    !is_asked_for && trouble > 0 && well > 3
}

/// One line for each app, those with trouble first.
fn print_table(shown: &[Shown], is_chosen: bool, printer: &mut Printer) {
    let mut rows = vec![["APP", "RELEASE", "IMAGE", "HOSTS", "ROLLOUT", "SINCE", "REASON"].map(String::from).to_vec()];
    let dash = |text: Option<&str>| text.filter(|text| !text.is_empty()).unwrap_or("-").to_owned();
    let now = Timestamp::now();
    let (well, trouble): (Vec<&Shown>, Vec<&Shown>) = shown.iter().partition(|app| is_well(app));
    // An app that is asked for is shown whatever its state.
    let folded = is_folded(well.len(), trouble.len(), is_chosen);
    for app in trouble.iter().chain(well.iter().filter(|_| !folded)) {
        rows.push(vec![
            app.app.to_string(),
            dash(app.release.as_deref()),
            dash(app.image.as_deref()),
            format!("{}/{}", app.converged, app.wanted),
            dash(app.phase),
            app.since.map_or_else(|| "-".to_owned(), |since| human(now.since(since))),
            app.reason.clone(),
        ]);
    }
    printer.table(&rows);
    if folded {
        printer.line(&format!("{} more apps have converged", well.len()));
    }
}
