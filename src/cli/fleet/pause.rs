//! `demae pause` and `demae resume`

use super::{Fleet, StoreArgs, write_alone};
use crate::{
    cli::{Ended, Exit, Failed, print::Printer},
    model::name::AppName,
    store::{Edit, keys::Key},
};

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct PauseArgs {
    /// The app
    #[arg(value_name = "APP")]
    app: String,
    /// Why, for `demae status`
    #[arg(value_name = "REASON")]
    reason: Option<String>,
    #[command(flatten)]
    store: StoreArgs,
}

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct ResumeArgs {
    /// The app
    #[arg(value_name = "APP")]
    app: String,
    #[command(flatten)]
    store: StoreArgs,
}

/// Keeps an app as it is on every host.
pub(in crate::cli) fn pause(args: &PauseArgs, printer: &mut Printer) -> Ended {
    let app = AppName::try_from(args.app.as_str())?;
    let reason = args.reason.clone().unwrap_or_default();
    let revision = write_alone(&args.store, printer, |fleet| {
        exists(fleet, &app)?;
        let key = Key::Paused(app.clone());
        let is_same = fleet.contents.entry(&key).is_some_and(|entry| entry.value() == reason.as_bytes());
        let puts = if is_same { Vec::new() } else { vec![(key.clone(), reason.clone().into_bytes())] };
        Ok(Edit { unchanged: vec![(key.clone(), fleet.modified(&key))], puts, ..Edit::default() })
    })?;
    printer.line(&match revision {
        Some(revision) => format!("{app} is paused (revision {revision})"),
        None => format!("{app} is paused already"),
    });
    printer.error(&format!("What runs keeps serving, and is not changed. To go on: demae resume {app}"));
    Ok(Exit::Success)
}

/// Lets an app be changed again.
pub(in crate::cli) fn resume(args: &ResumeArgs, printer: &mut Printer) -> Ended {
    let app = AppName::try_from(args.app.as_str())?;
    let revision = write_alone(&args.store, printer, |fleet| {
        exists(fleet, &app)?;
        let key = Key::Paused(app.clone());
        let deletes: Vec<Key> = [key.clone()].into_iter().filter(|key| fleet.contents.entry(key).is_some()).collect();
        Ok(Edit { unchanged: vec![(key.clone(), fleet.modified(&key))], deletes, ..Edit::default() })
    })?;
    printer.line(&match revision {
        Some(revision) => format!("{app} is not paused any more (revision {revision})"),
        None => format!("{app} was not paused"),
    });
    printer.error(&format!("To wait for what was changed meanwhile: demae wait {app}"));
    Ok(Exit::Success)
}

/// A key of an app that does not exist would bind the next one of that name.
fn exists(fleet: &Fleet, app: &AppName) -> Result<(), Failed> {
    match fleet.app(app) {
        // One that is invalid may be paused all the same.
        Err(failed) if !fleet.contents.apps().contains_key(app) => Err(failed),
        _ => Ok(()),
    }
}
