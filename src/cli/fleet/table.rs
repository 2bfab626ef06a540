//! `demae status --fleet`: one line for each app, those with trouble first.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Fleet, card};
use crate::{
    cli::{Ended, Exit, Format, print::Printer, runtime},
    fleet::outcome::Wanted,
    model::{
        name::{AppName, HostName},
        status::{AppStatus, State, VERSION},
        time::{Timestamp, human},
    },
    store::{client::EtcdConfig, keys::Key},
};

/// One app in the JSON output.
#[derive(Debug, Serialize)]
pub(super) struct Shown {
    app: AppName,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) release: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) image: Option<String>,
    /// Hosts that are up and are to run it.
    pub(super) wanted: usize,
    /// Those of them that have converged on the release.
    converged: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) phase: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) since: Option<Timestamp>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) reason: String,
    pub(super) hosts: Vec<AppStatus>,
}

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

fn is_well(app: &Shown) -> bool {
    app.wanted == app.converged && app.reason.is_empty()
}

fn of_app(fleet: &Fleet, app: AppName) -> Shown {
    let none = BTreeMap::new();
    let statuses = fleet.statuses.get(&app).unwrap_or(&none);
    let hosts = fleet.hosts(&app);
    let rollout = fleet.contents.records.rollouts.get(&app).and_then(|stored| stored.value.as_ref());
    let (release, stopped) = match fleet.wanted(&app) {
        Wanted::Release(release) => (Some(release.to_string()), None),
        Wanted::Stopped(why) => (None, Some(why)),
        Wanted::Nothing => (None, Some("it is being removed".to_owned())),
    };
    let is_there =
        |status: &AppStatus| status.state == State::Converged && status.serving.is_none() && status.release == release;
    let there = |host: &&HostName| statuses.get(*host).is_some_and(|(status, _)| is_there(status));
    let rollout = rollout.filter(|rollout| release.as_deref() == Some(rollout.release.as_str()));
    // The first host that says why it is not there.
    let reasons = statuses.iter().filter(|(_, (status, _))| !is_there(status) && !status.reason.is_empty());
    let reason = reasons.map(|(host, (status, _))| format!("{host}: {}", status.reason)).next();
    let of_rollout = rollout.map(|rollout| rollout.reason.clone()).filter(|reason| !reason.is_empty());
    let pinned = rollout.is_some_and(|rollout| rollout.pinned).then(|| "a person pinned this release".to_owned());
    let image = match fleet.contents.apps().get(&app) {
        Some(Ok(everywhere)) if pinned.is_none() => Some(everywhere.target.release.image.to_string()),
        _ => statuses.values().find_map(|(status, _)| status.image.clone()),
    };
    Shown {
        wanted: hosts.len(),
        converged: hosts.keys().filter(there).count(),
        phase: rollout.map(|rollout| rollout.phase.as_str()),
        since: rollout.map(|rollout| rollout.changed),
        reason: stopped.or(of_rollout).or(reason).or(pinned).unwrap_or_default(),
        release,
        image,
        hosts: statuses.values().map(|(status, _)| status.clone()).collect(),
        app,
    }
}
