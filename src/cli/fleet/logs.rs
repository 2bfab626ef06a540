//! `demae logs`

use std::collections::BTreeMap;

use super::{Fleet, StoreArgs, no_app, running_logs};
use crate::{
    cli::{Ended, Exit, Failed, print::Printer, runtime},
    config::Flags,
    fleet::outcome::Wanted,
    model::{
        name::{AppName, HostName, ReleaseId},
        time::{Timestamp, human},
    },
};

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// The app
    #[arg(value_name = "APP")]
    app: String,
    /// Also what is printed from now on, until Ctrl-C
    #[arg(short, long, conflicts_with = "failed")]
    follow: bool,
    /// How many lines from before, of each container
    #[arg(short = 'n', long, value_name = "COUNT", default_value = "100", conflicts_with = "failed")]
    lines: u32,
    /// The time of each line
    #[arg(long, conflicts_with = "failed")]
    timestamps: bool,
    /// Instead, the end of the log of the release that failed, on each host on which it did
    #[arg(long)]
    failed: bool,
    /// With `--failed`: only from this host
    #[arg(long, value_name = "HOST", requires = "failed")]
    host: Option<String>,
    /// With `--failed`: of this release; unless given, of the wanted one, or of the last one that failed
    #[arg(long, value_name = "RELEASE", requires = "failed")]
    release: Option<String>,
    #[command(flatten)]
    store: StoreArgs,
}

/// The evidence against a release on a host.
pub(super) struct Evidence {
    release: ReleaseId,
    cause: String,
    pub(super) log_tail: String,
    pub(super) at: Timestamp,
}

pub(in crate::cli) fn run(args: &Args, printer: &mut Printer) -> Ended {
    let app = AppName::try_from(args.app.as_str())?;
    if !args.failed {
        let wanted = running_logs::Wanted { lines: args.lines, follow: args.follow, timestamps: args.timestamps };
        let flags = Flags { config: args.store.config.clone(), ..Flags::default() };
        return running_logs::print(&flags, &app, &wanted, printer);
    }
    let config = args.store.etcd()?;
    let only = args.host.as_deref().map(HostName::try_from).transpose()?;
    let release = args.release.as_deref().map(ReleaseId::try_from).transpose()?;
    let fleet = runtime(1)?.block_on(Fleet::read(&config))?;
    let mut found = evidence(&fleet, &app);
    found.retain(|(host, _), _| only.as_ref().is_none_or(|only| only == host));
    let release = match (release, fleet.wanted(&app)) {
        (Some(release), _) => Some(release),
        (None, Wanted::Release(wanted)) if found.keys().any(|(_, release)| *release == wanted) => Some(wanted),
        // After another deploy, what failed before it.
        (None, _) => found.values().max_by_key(|evidence| evidence.at).map(|evidence| evidence.release.clone()),
    };
    found.retain(|_, evidence| Some(&evidence.release) == release.as_ref());
    if found.is_empty() {
        if !fleet.contents.apps().contains_key(&app) {
            return Err(no_app(&app));
        }
        let place = only.map_or_else(String::new, |host| format!(" on {host}"));
        return Err(Failed::because(match args.release.as_deref() {
            Some(release) => format!("{app} {release} has not failed{place}, or its evidence is gone"),
            None => format!("no release of {app} has failed{place}, or its evidence is gone"),
        }));
    }
    let now = Timestamp::now();
    for ((host, _), evidence) in &found {
        let age = human(now.since(evidence.at));
        printer.error(&format!("{host}  {app} {}  {} ({age} ago)", evidence.release, evidence.cause));
        if evidence.log_tail.trim().is_empty() {
            printer.error(&format!("{host}  it had printed nothing"));
        }
        for line in evidence.log_tail.lines() {
            printer.line(&format!("{host} │ {line}"));
        }
    }
    Ok(Exit::Success)
}

/// All verdicts against releases of an app: those of the fleet, and those that only a host knows.
pub(super) fn evidence(fleet: &Fleet, app: &AppName) -> BTreeMap<(HostName, ReleaseId), Evidence> {
    let mut found = BTreeMap::new();
    for (host, (status, _)) in fleet.statuses.get(app).into_iter().flatten() {
        let Some(verdict) = &status.verdict else { continue };
        let release = verdict.release.clone();
        let (cause, log_tail) = (verdict.cause.clone(), verdict.log_tail.clone());
        found.insert((host.clone(), release.clone()), Evidence { release, cause, log_tail, at: verdict.at });
    }
    for ((of, release, host), stored) in &fleet.contents.records.verdicts {
        let Some(verdict) = stored.value.as_ref().filter(|_| of == app) else { continue };
        let (cause, log_tail) = (verdict.cause.clone(), verdict.log_tail.clone());
        let evidence = Evidence { release: release.clone(), cause, log_tail, at: verdict.at };
        found.insert((host.clone(), release.clone()), evidence);
    }
    found
}
