//! `demae retry`

use super::{ChangeArgs, Decision, Fleet, no_app};
use crate::{
    cli::{Ended, Failed, print::Printer},
    fleet::outcome::Wanted,
    model::{
        fleet::{CommandRun, CommandState},
        name::AppName,
        time::Timestamp,
    },
    store::{Edit, keys::Key},
};

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    change: ChangeArgs,
}

pub(in crate::cli) fn run(args: &Args, printer: &mut Printer) -> Ended {
    let now = Timestamp::now().to_string();
    args.change.run(printer, |fleet, app| decide(fleet, app, &now))
}

/// Deletes the verdicts of the wanted release, and the run of its command unless that is done, and tells hosts that theirs count no more.
fn decide(fleet: &Fleet, app: &AppName, now: &str) -> Result<Decision, Failed> {
    let release = match fleet.wanted(app) {
        Wanted::Release(release) => release,
        Wanted::Stopped(why) => return Err(Failed::because(format!("{app}: {why}"))),
        Wanted::Nothing => return Err(no_app(app)),
    };
    let statuses = fleet.statuses.get(app).into_iter().flatten();
    let failed_here = statuses
        .filter(|(_, (status, _))| status.verdict.is_some() && status.release.as_deref() == Some(release.as_str()));
    let key = (app.clone(), release.clone());
    let command = fleet.contents.records.commands.get(&key).and_then(|stored| stored.value.as_ref());
    let is_up = |run: &&CommandRun| fleet.contents.hosts.contains_key(&run.host);
    if let Some(run) = command.filter(is_up).filter(|run| run.state == CommandState::Started) {
        return Err(Failed::because(format!("the release command of {app} {release} runs on {}", run.host)));
    }
    // One that is done is not run again: a retry is for what failed.
    let runs_again = command.is_some_and(|run| run.state != CommandState::Done);
    let has_failed = fleet.contents.records.verdicts_of(app, &release).next().is_some() || failed_here.count() > 0;
    if !has_failed && !runs_again {
        return Err(Failed::because(format!("{app} {release} has not failed on any host; there is nothing to retry")));
    }
    let retry = Key::Retry(app.clone());
    let decided_from = [Key::Spec(app.clone()), Key::Image(app.clone()), Key::Pin(app.clone()), retry.clone()];
    let unchanged = decided_from.into_iter().map(|key| (key.clone(), fleet.modified(&key))).collect();
    let puts = vec![(retry, now.as_bytes().to_vec())];
    let forgiven = Some((app.clone(), release.clone()));
    let rerun = forgiven.clone().filter(|_| runs_again);
    Ok(Decision::new(Edit { unchanged, puts, forgiven, rerun, ..Edit::default() }, release, true))
}
