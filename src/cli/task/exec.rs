//! `demae exec`

use std::sync::Arc;

use super::{Ends, NOT_FOUND, NOT_STARTED, TerminalArgs, ended, is_not_found, not_run, not_started, pass_on};
use crate::{
    cli::{Common, Ended, Exit, Failed, print::Printer, runtime, setup},
    config::Config,
    host::docker::{Found, NoMeter},
    model::{name::AppName, observed::Phase},
};

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// Only in this instance, by its number: `2` of `9c41e7aa03d5.2`
    #[arg(long, value_name = "NUMBER")]
    replica: Option<u16>,
    #[command(flatten)]
    terminal: TerminalArgs,
    /// The app
    #[arg(value_name = "APP")]
    app: String,
    /// The command, after `--`
    #[arg(value_name = "COMMAND", required = true, last = true)]
    command: Vec<String>,
    #[command(flatten)]
    common: Common,
}

pub(in crate::cli) fn run(args: &Args, printer: &mut Printer) -> Ended {
    exec(args, printer).map_err(not_run)
}

fn exec(args: &Args, printer: &mut Printer) -> Ended {
    let app = AppName::try_from(args.app.as_str())?;
    let terminal = args.terminal.check()?;
    let config = Config::load(&args.common)?;
    let world = setup::world(&config, None, Arc::new(NoMeter))?;
    let runtime = runtime(1)?;
    let ended = runtime.block_on(async {
        let instances = world.docker.instances(&app, None, &world.clock).await?;
        let mut running: Vec<Found> =
            instances.own.into_iter().filter(|found| matches!(found.phase, Phase::Running)).collect();
        running.retain(|found| args.replica.is_none_or(|number| found.key.number == number));
        // The newest: the others may be leaving.
        running.sort_by_key(|found| (found.leaving, std::cmp::Reverse(found.started)));
        let found = running.first().ok_or_else(|| {
            let which = args.replica.map(|number| format!(" with the number {number}")).unwrap_or_default();
            Failed::because(format!("no container of `{app}`{which} runs on this host (`demae status {app}`)"))
        })?;
        if running.len() > 1 {
            printer.error(&format!("in {}, one of {}", found.key, running.len()));
        }
        let mut task = world.docker.exec_task(&found.id, &args.command, terminal).await.map_err(|e| not_started(&e))?;
        let mut ends = Ends::new()?;
        let last = tokio::select! {
            last = pass_on(&world.docker, &mut task, terminal) => last?,
            () = ends.next() => {
                printer.error(&format!("the command goes on in {} (`docker top {}`)", found.key, found.id.short()));
                return Ok(Exit::Interrupted);
            }
        };
        let code = world.docker.exec_code(&task).await?.unwrap_or(-1);
        // Older engines print why a program cannot be started, as if it were its output, and have one code for all.
        let is_missing = code == i64::from(NOT_STARTED) && is_not_found(&String::from_utf8_lossy(&last));
        Ok(if is_missing { Exit::Child(NOT_FOUND) } else { ended(code) })
    });
    // A read from standard input may be in flight for ever.
    runtime.shutdown_background();
    ended
}
