//! `demae rollback`

use super::{
    Decision, Fleet, StoreArgs,
    wait::{WaitArgs, follow},
    write,
};
use crate::{
    cli::{Ended, Failed, print::Printer, runtime},
    model::{
        fleet::{KeptRelease, RolloutPhase},
        name::{AppName, ReleaseId},
        time::{Timestamp, human},
    },
    store::{Edit, keys::Key},
};

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// The app
    #[arg(value_name = "APP")]
    app: String,
    /// A kept release; unless given, the last one that was proven before the wanted one
    #[arg(value_name = "RELEASE")]
    release: Option<String>,
    #[command(flatten)]
    wait: WaitArgs,
    #[command(flatten)]
    store: StoreArgs,
}

pub(in crate::cli) fn run(args: &Args, printer: &mut Printer) -> Ended {
    args.wait.check()?;
    let config = args.store.etcd_to_write(printer)?;
    let app = AppName::try_from(args.app.as_str())?;
    let asked = args.release.as_deref().map(ReleaseId::try_from).transpose()?;
    runtime(1)?.block_on(async {
        let fleet = Fleet::read(&config).await?;
        // The same one however often it is decided: after the first write, the last good one would be another.
        let (release, kept) = choose(&fleet, &app, asked.as_ref())?;
        let image = kept.image.as_deref().map_or(String::new(), |image| format!("{}, ", image.trim()));
        let age = human(Timestamp::now().since(kept.opened));
        printer.error(&format!("{app} goes back to {release} ({image}deployed {age} ago)"));
        let written = write(&config, None, |fleet| decide(fleet, &app, &release)).await?;
        follow(&config, &app, written, &args.wait, printer).await
    })
}

/// The release to go back to.
fn choose(fleet: &Fleet, app: &AppName, asked: Option<&ReleaseId>) -> Result<(ReleaseId, KeptRelease), Failed> {
    // A pin of an app that is gone would be taken by the next one of that name.
    fleet.app(app)?;
    let kept = fleet.contents.records.kept.iter().filter(|((of, _), _)| of == app);
    let kept = kept.filter_map(|((_, release), stored)| Some((release, stored.value.as_ref()?)));
    let proven: Vec<(&ReleaseId, &KeptRelease)> = kept.filter(|(_, kept)| kept.proven.is_some()).collect();
    if let Some(asked) = asked {
        let found = proven.iter().find(|(release, _)| *release == asked);
        return match found {
            Some((release, kept)) => Ok(((*release).clone(), (*kept).clone())),
            None => Err(Failed::because(format!(
                "{asked} is no release of {app} that was proven and is kept; these are: {}",
                listed(&proven)
            ))),
        };
    }
    // The same command again is no second step back.
    let pin = fleet.contents.pin(app).ok().flatten();
    if let Some((release, kept)) = proven.iter().find(|(release, _)| Some(*release) == pin.as_ref()) {
        return Ok(((*release).clone(), (*kept).clone()));
    }
    let rollout = fleet.contents.records.rollouts.get(app).and_then(|stored| stored.value.as_ref());
    let is_done = |phase| matches!(phase, RolloutPhase::Done | RolloutPhase::Restored);
    // A rollout that is under way, or failed, has not changed what is proven.
    let before = rollout.filter(|rollout| !is_done(rollout.phase)).and_then(|rollout| rollout.from.as_ref());
    let current = rollout.map(|rollout| (&rollout.release, rollout.opened));
    let is_before = |release: &ReleaseId, kept: &KeptRelease| {
        current.is_none_or(|(current, opened)| release != current && kept.opened <= opened)
    };
    let last = proven.iter().filter(|(release, kept)| is_before(release, kept)).max_by_key(|(_, kept)| kept.proven);
    let chosen = proven.iter().find(|(release, _)| Some(*release) == before).or(last);
    match chosen {
        Some((release, kept)) => Ok(((*release).clone(), (*kept).clone())),
        None => Err(Failed::because(format!(
            "no earlier release of {app} that was proven is kept (releases are kept from when rollouts are turned on)"
        ))),
    }
}

fn listed(proven: &[(&ReleaseId, &KeptRelease)]) -> String {
    let mut sorted = proven.to_vec();
    sorted.sort_by_key(|(_, kept)| std::cmp::Reverse(kept.proven));
    let one = |(release, kept): &(&ReleaseId, &KeptRelease)| match kept.image.as_deref() {
        Some(image) => format!("{release} ({})", image.trim()),
        None => release.to_string(),
    };
    if sorted.is_empty() { "none".to_owned() } else { sorted.iter().map(one).collect::<Vec<_>>().join(", ") }
}

/// Pins a release.
fn decide(fleet: &Fleet, app: &AppName, release: &ReleaseId) -> Result<Decision, Failed> {
    let without_turns: Vec<String> =
        fleet.hosts(app).into_iter().filter(|(_, takes)| !takes).map(|(host, _)| host.to_string()).collect();
    if !without_turns.is_empty() {
        return Err(Failed::because(format!(
            "{} would not go back: no turns are taken there (`demae doctor` on that host says why)",
            without_turns.join(", ")
        )));
    }
    let pin = Key::Pin(app.clone());
    let spec = Key::Spec(app.clone());
    let unchanged = [spec, pin.clone()].into_iter().map(|key| (key.clone(), fleet.modified(&key))).collect();
    let is_pinned = fleet.text(&pin).is_some_and(|text| text == release.as_str());
    let puts = if is_pinned { Vec::new() } else { vec![(pin, release.to_string().into_bytes())] };
    let edit = Edit { unchanged, puts, ..Edit::default() };
    Ok(Decision::new(edit, release.clone(), true))
}
