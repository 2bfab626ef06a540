//! `demae history`

use serde::Serialize;

use super::{Fleet, StoreArgs, no_app};
use crate::{
    cli::{Ended, Exit, Format, print::Printer, runtime},
    fleet::outcome::Wanted,
    model::{
        fleet::{KeptRelease, RolloutPhase},
        name::{AppName, ImageDigest, ReleaseId},
        status::VERSION,
        time::{Timestamp, human},
    },
};

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// The app
    #[arg(value_name = "APP")]
    app: String,
    /// What is printed
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
    #[command(flatten)]
    store: StoreArgs,
}

/// One release in the JSON output.
#[derive(Debug, Serialize)]
struct Shown {
    release: ReleaseId,
    opened: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    image: Option<String>,
    /// Which image that is on every host.
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<ImageDigest>,
    #[serde(skip_serializing_if = "Option::is_none")]
    by: Option<String>,
    /// Whether it is wanted now.
    wanted: bool,
    /// `proven`, `failed`, `superseded`, or the phase of its rollout.
    result: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    proven: Option<Timestamp>,
    #[serde(skip_serializing_if = "String::is_empty")]
    reason: String,
}

#[derive(Debug, Serialize)]
struct ShownAll {
    version: u32,
    app: AppName,
    releases: Vec<Shown>,
}

pub(in crate::cli) fn run(args: &Args, printer: &mut Printer) -> Ended {
    let config = args.store.etcd()?;
    let app = AppName::try_from(args.app.as_str())?;
    let fleet = runtime(1)?.block_on(Fleet::read(&config))?;
    let kept = fleet.contents.records.kept.iter().filter(|((of, _), _)| *of == app);
    let kept = kept.filter_map(|((_, release), stored)| Some((release, stored.value.as_ref()?)));
    let mut releases: Vec<Shown> = kept.map(|(release, kept)| shown(&fleet, &app, release, kept)).collect();
    releases.sort_by_key(|release| std::cmp::Reverse(release.opened));
    if releases.is_empty() && !fleet.contents.apps().contains_key(&app) {
        return Err(no_app(&app));
    }
    if args.output == Format::Json {
        printer.line(&serde_json::to_string_pretty(&ShownAll { version: VERSION, app, releases })?);
        return Ok(Exit::Success);
    }
    let mut rows = vec![["RELEASE", "AGE", "RESULT", "IMAGE", "BY", "REASON"].map(String::from).to_vec()];
    let now = Timestamp::now();
    for release in &releases {
        rows.push(vec![
            format!("{}{}", release.release, if release.wanted { " *" } else { "" }),
            human(now.since(release.opened)),
            release.result.to_owned(),
            release.image.clone().unwrap_or_else(|| "of the spec".to_owned()),
            release.by.clone().unwrap_or_else(|| "-".to_owned()),
            release.reason.clone(),
        ]);
    }
    printer.table(&rows);
    if releases.is_empty() {
        printer.error(&format!("note: no release of {app} is kept: they are from when its hosts take turns"));
    }
    Ok(Exit::Success)
}

fn shown(fleet: &Fleet, app: &AppName, release: &ReleaseId, kept: &KeptRelease) -> Shown {
    let records = &fleet.contents.records;
    let rollout = records.rollouts.get(app).and_then(|stored| stored.value.as_ref());
    let rollout = rollout.filter(|rollout| rollout.release == *release);
    let verdict = records.verdicts_of(app, release).min_by_key(|(_, verdict)| verdict.created);
    let failure = verdict.map(|(host, stored)| {
        let cause = stored.value.as_ref().map_or("no cause is given", |verdict| verdict.cause.as_str());
        format!("{host}: {cause}")
    });
    let (result, reason) = match (rollout.map(|rollout| rollout.phase), failure) {
        (Some(RolloutPhase::Done | RolloutPhase::Restored), _) => ("proven", String::new()),
        (Some(phase), failure) => {
            let reason = rollout.map(|rollout| rollout.reason.clone()).unwrap_or_default();
            (phase.as_str(), failure.unwrap_or(reason))
        }
        (None, _) if kept.proven.is_some() => ("proven", String::new()),
        (None, Some(failure)) => ("failed", failure),
        (None, None) => ("superseded", String::new()),
    };
    Shown {
        release: release.clone(),
        opened: kept.opened,
        digest: records.digest(app, release).cloned(),
        image: kept.image.as_deref().map(|image| image.trim().to_owned()),
        by: kept.by.clone(),
        wanted: fleet.wanted(app) == Wanted::Release(release.clone()),
        result,
        proven: kept.proven,
        reason,
    }
}
