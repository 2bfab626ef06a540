//! What the store says of one app in the fleet.

use std::collections::BTreeMap;

use serde::Serialize;

use super::Fleet;
use crate::{
    fleet::outcome::Wanted,
    model::{
        name::{AppName, HostName},
        status::{AppStatus, State},
        time::Timestamp,
    },
};

/// One app, as in the JSON output.
#[derive(Debug, Serialize)]
pub(super) struct Shown {
    pub(super) app: AppName,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) release: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) image: Option<String>,
    /// Hosts that are up and are to run it.
    pub(super) wanted: usize,
    /// Those of them that have converged on the release.
    pub(super) converged: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) phase: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) since: Option<Timestamp>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) reason: String,
    pub(super) hosts: Vec<AppStatus>,
}

/// The releases that answer, with the number of hosts of each.
pub(super) fn serving<'s>(statuses: impl Iterator<Item = &'s AppStatus>) -> BTreeMap<&'s str, usize> {
    let mut counts = BTreeMap::new();
    for release in statuses.filter_map(AppStatus::serves) {
        *counts.entry(release).or_default() += 1;
    }
    counts
}

/// Whether it has converged on all hosts.
pub(super) fn is_well(app: &Shown) -> bool {
    app.wanted == app.converged && app.reason.is_empty()
}

/// What is known of an app.
pub(super) fn of_app(fleet: &Fleet, app: AppName) -> Shown {
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
