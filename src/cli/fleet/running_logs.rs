//! `demae logs` without `--failed`: what the containers of an app on this host print.

use std::{collections::BTreeSet, pin::Pin, sync::Arc, time::Duration};

use futures_util::{Stream, StreamExt as _, stream::SelectAll};

use crate::{
    cli::{Ended, Exit, Failed, print::Printer, runtime, setup},
    config::{Config, Flags},
    host::docker::{Found, NoMeter},
    model::name::{AppName, ContainerId},
    world::World,
};

/// How often new containers are looked for while their output is followed.
const LOOK: Duration = Duration::from_secs(1);

/// What is printed.
pub(super) struct Wanted {
    /// Lines from before, of each container.
    pub(super) lines: u32,
    /// Whether what comes is printed too.
    pub(super) follow: bool,
    /// Whether each line has its time.
    pub(super) timestamps: bool,
}

type Lines = SelectAll<Pin<Box<dyn Stream<Item = (String, String)> + Send>>>;

/// Prints it until its end, or with `follow` until Ctrl-C.
pub(super) fn print(flags: &Flags, app: &AppName, wanted: &Wanted, printer: &mut Printer) -> Ended {
    let config = Config::load(flags)?;
    let world = setup::world(&config, None, Arc::new(NoMeter))?;
    runtime(1)?.block_on(async {
        let (mut lines, mut known) = (Lines::new(), BTreeSet::new());
        add(&world, app, wanted, (&mut lines, &mut known)).await?;
        if known.is_empty() {
            return Err(Failed::because(format!(
                "no container of `{app}` is on this host (`demae status {app}`); `--failed` shows what a failed release printed"
            )));
        }
        let mut pressed = std::pin::pin!(tokio::signal::ctrl_c());
        let mut look = tokio::time::interval(LOOK);
        loop {
            tokio::select! {
                line = lines.next(), if !lines.is_empty() => match line {
                    Some((from, line)) if !printer.try_line(&format!("{from} │ {line}")) => return Ok(Exit::Success),
                    Some(_) => {}
                    None if wanted.follow => {}
                    None => return Ok(Exit::Success),
                },
                _ = look.tick(), if wanted.follow => add(&world, app, wanted, (&mut lines, &mut known)).await?,
                pressed = &mut pressed => {
                    pressed?;
                    return Ok(Exit::Success);
                }
            }
        }
    })
}

/// Adds the containers that are not there yet.
async fn add(
    world: &World,
    app: &AppName,
    wanted: &Wanted,
    (lines, known): (&mut Lines, &mut BTreeSet<ContainerId>),
) -> Result<(), Failed> {
    for Found { id, key, .. } in world.docker.instances(app, None, &world.clock).await?.own {
        if known.insert(id.clone()) {
            let from = key.to_string();
            let log = world.docker.log_lines(&id, wanted.lines, wanted.follow, wanted.timestamps)?;
            lines.push(log.map(move |line| (from.clone(), line)).boxed());
        }
    }
    Ok(())
}
