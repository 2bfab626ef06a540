//! `demae redeploy`

use super::{ChangeArgs, Decision, Fleet};
use crate::{
    cli::{Ended, Failed, print::Printer},
    model::{name::AppName, time::Timestamp},
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

/// A new release of the same image and variables.
fn decide(fleet: &Fleet, app: &AppName, now: &str) -> Result<Decision, Failed> {
    fleet.app(app)?;
    let pin = Key::Pin(app.clone());
    if let Some(pinned) = fleet.text(&pin) {
        return Err(Failed::because(format!(
            "{app} is pinned to {pinned} (`demae deploy {app} IMAGE` ends that, and so does deleting `{pin}`)"
        )));
    }
    let restart = (Key::Restart(app.clone()), now.as_bytes().to_vec());
    let changed = [(restart.0.clone(), Some(restart.1.clone()))];
    let release = match fleet.contents.with(app, &changed, &fleet.key) {
        Some(Ok(everywhere)) => everywhere.target.release.id.clone(),
        _ => return Err(Failed::because(format!("`{app}` would be invalid"))),
    };
    let decided_from = [Key::Spec(app.clone()), Key::Image(app.clone()), pin, restart.0.clone()];
    let unchanged = decided_from.into_iter().map(|key| (key.clone(), fleet.modified(&key))).collect();
    Ok(Decision::new(Edit { unchanged, puts: vec![restart], ..Edit::default() }, release, true))
}
