//! `demae restore-routes`

use super::{Common, Ended, Exit, Failed, print::Printer, runtime, setup};
use crate::{config::Config, host::docker::NoMeter};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    common: Common,
}

/// Puts the routes of TCP apps back as they were. At boot that is needed before the agent runs, which etcd or Docker may
/// delay. Nothing is asked of either.
pub(super) fn run(args: &Args, printer: &mut Printer) -> Ended {
    let config = Config::load(&args.common)?;
    let world = setup::world(&config, None, std::sync::Arc::new(NoMeter))?;
    let count = runtime(1)?.block_on(world.tcp_routes.restore_if_any()).map_err(Failed::from)?;
    printer.line(&match count {
        0 => "no TCP app has a route on this host".to_owned(),
        1 => "1 route is restored".to_owned(),
        count => format!("{count} routes are restored"),
    });
    Ok(Exit::Success)
}
