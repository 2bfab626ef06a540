//! `demae scale`

use super::{ChangeArgs, Decision, Fleet};
use crate::{
    cli::{Ended, Failed, print::Printer},
    model::{name::AppName, spec::with_replicas},
    store::{Edit, keys::Key},
};

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// How many instances each of its hosts runs, from 1 to 100
    #[arg(value_name = "COUNT", index = 2, value_parser = clap::value_parser!(u16).range(1..=100))]
    count: u16,
    #[command(flatten)]
    change: ChangeArgs,
}

pub(in crate::cli) fn run(args: &Args, printer: &mut Printer) -> Ended {
    args.change.run(printer, |fleet, app| decide(fleet, app, args.count))
}

/// Changes the count in the text of the spec. It makes no release: instances are added or removed.
fn decide(fleet: &Fleet, app: &AppName, count: u16) -> Result<Decision, Failed> {
    let everywhere = fleet.app(app)?;
    let (spec, pin) = (Key::Spec(app.clone()), Key::Pin(app.clone()));
    if let Some(pinned) = fleet.text(&pin) {
        return Err(Failed::because(format!(
            "{app} is pinned to {pinned}, and runs with the count of that release (`demae deploy {app} IMAGE` ends the pin)"
        )));
    }
    let release = everywhere.target.release.id.clone();
    let unchanged = [spec.clone(), pin].into_iter().map(|key| (key.clone(), fleet.modified(&key))).collect();
    let mut puts = Vec::new();
    if everywhere.target.replicas != count {
        let text = with_replicas(&everywhere.made_from.spec, count).ok_or_else(|| {
            Failed::because(format!(
                "the spec of {app} is written in a way in which this command cannot change `deploy.replicas_per_host`: change it in your file, and `demae apply` it"
            ))
        })?;
        puts.push((spec, text.into_bytes()));
    }
    let decision = Decision::new(Edit { unchanged, puts, ..Edit::default() }, release, false);
    Ok(decision.with_note("`demae apply` of a file that has another `replicas_per_host` takes this back".to_owned()))
}
