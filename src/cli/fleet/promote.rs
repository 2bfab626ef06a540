//! `demae promote`

use super::{ChangeArgs, Decision, Fleet};
use crate::{
    cli::{Ended, Failed, print::Printer},
    model::{fleet::RolloutPhase, name::AppName},
    store::{Edit, keys::Key},
};

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    change: ChangeArgs,
}

pub(in crate::cli) fn run(args: &Args, printer: &mut Printer) -> Ended {
    args.change.run(printer, decide)
}

fn decide(fleet: &Fleet, app: &AppName) -> Result<Decision, Failed> {
    let rollout = fleet.contents.records.rollouts.get(app).and_then(|stored| stored.value.as_ref());
    let Some(rollout) = rollout else {
        fleet.app(app)?;
        return Err(Failed::because(format!("{app} has no rollout")));
    };
    let release = rollout.release.clone();
    match rollout.phase {
        RolloutPhase::Waiting => {}
        RolloutPhase::Canary => {
            return Err(Failed::because(format!(
                "the canaries of {app} have not proven {release} yet (`demae wait {app} --until canary` waits for them)"
            )));
        }
        phase => {
            return Err(Failed::because(format!(
                "the rollout of {app} {release} waits for no promotion: it is {}",
                phase.as_str()
            )));
        }
    }
    let promote = Key::Promote(app.clone());
    let unchanged =
        [Key::Spec(app.clone()), promote.clone()].into_iter().map(|key| (key.clone(), fleet.modified(&key))).collect();
    let puts = vec![(promote, release.to_string().into_bytes())];
    Ok(Decision::new(Edit { unchanged, puts, ..Edit::default() }, release, true))
}
