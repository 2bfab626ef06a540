//! `demae run`

use std::{sync::Arc, time::Duration};

use super::{Ends, NOT_RUN, TerminalArgs, ended, not_run, not_started, pass_on};
use crate::{
    cli::{Common, Ended, Failed, fleet, print::Printer, runtime, setup, setup::Disk},
    config::Config,
    fleet::records::image_of,
    host::docker::{Docker, NoMeter, Terminal},
    model::{
        desired::{DesiredApp, Target},
        fleet::{FleetImage, UNREADABLE_IMAGE},
        name::{AppName, ContainerId, ImageDigest},
    },
    plan::wait::Block,
    store,
    world::World,
};

/// What a command has to end after Ctrl-C.
const GRACE: Duration = Duration::from_secs(10);

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    terminal: TerminalArgs,
    /// The app
    #[arg(value_name = "APP")]
    app: String,
    /// The command, after `--`: given to the image's entry point, if it has one, as with `docker run`
    #[arg(value_name = "COMMAND", required = true, last = true)]
    command: Vec<String>,
    #[command(flatten)]
    common: Common,
}

pub(in crate::cli) fn run(args: &Args, printer: &mut Printer) -> Ended {
    let app = AppName::try_from(args.app.as_str()).map_err(Failed::from).map_err(not_run)?;
    let mut start = || -> Ended {
        let terminal = args.terminal.check()?;
        let config = Config::load(&args.common)?;
        let world = setup::world(&config, None, Arc::new(NoMeter))?;
        let runtime = runtime(1)?;
        let ended = runtime.block_on(async {
            let (target, digest) = target(&config, &world, &app).await?;
            printer.error(&format!("in a container like those of {app} {}", target.release.id));
            task(&world, &app, (&target, digest.as_ref()), &args.command, terminal).await
        });
        // A read from standard input may be in flight for ever.
        runtime.shutdown_background();
        ended
    };
    start().map_err(not_run)
}

/// What the app is to run here, as an agent would take it from the store, and the digest of its image, if hosts go by that.
async fn target(config: &Config, world: &World, app: &AppName) -> Result<(Target, Option<ImageDigest>), Failed> {
    let (pin, records) = fleet::pin_and_records(&config.etcd, app).await?;
    let viewer = setup::viewer(config, world).await?;
    let compared = store::compare(&config.etcd, &viewer, &Disk(world.layout.clone())).await;
    let compared = compared.map_err(|e| Failed::try_later(e.to_string()))?;
    match compared.acting.apps.get(app) {
        Some(desired @ (DesiredApp::Run(_) | DesiredApp::Invalid { last_good: Some(_), .. })) => {
            let target = desired.target().cloned().ok_or_else(|| Failed::because("it has no release"))?;
            match pin.filter(|pin| *pin != target.release.id) {
                Some(pin) => Err(Failed::because(format!(
                    "`{app}` is pinned to {pin}, and the keys make {} now: `demae exec` runs a command in a container of what serves",
                    target.release.id
                ))),
                None => {
                    let written = records.digests.get(&(app.clone(), target.release.id.clone()));
                    match image_of(&target, written) {
                        FleetImage::Unreadable => Err(Failed::because(format!("`{app}`: {UNREADABLE_IMAGE}"))),
                        image => Ok((target, image.digest().cloned())),
                    }
                }
            }
        }
        Some(DesiredApp::Absent(why) | DesiredApp::Unknown(why) | DesiredApp::Paused(why)) => {
            Err(Failed::because(format!("`{app}` is not to run on this host: {why}")))
        }
        Some(DesiredApp::Invalid { problems, .. }) => Err(Failed::because(format!("`{app}` is invalid:\n{problems}"))),
        None => Err(Failed::because(format!("no app `{app}` is in the store"))),
    }
}

async fn task(
    world: &World,
    app: &AppName,
    (target, digest): (&Target, Option<&ImageDigest>),
    command: &[String],
    terminal: Terminal,
) -> Ended {
    let release = &target.release;
    let refused = world.docker.policy().refusals(app, release, None);
    if !refused.is_empty() {
        return Err(Failed::because(Block::NotAllowed(refused).to_string()));
    }
    world.check_mounts(app, &release.container)?;
    let image = release.image.fixed(digest);
    if world.docker.image(&image.tagged()).await?.is_none() {
        // Not noted as the agent's: it alone writes down what it may remove.
        world.images.fetch(app, &release.image, digest, false).await?;
    }
    let network = world.shared_network(release).await;
    let docker = &world.docker;
    // Whatever ends this program but a kill ends the container too.
    let mut ends = Ends::new()?;
    let container = docker.create_task(app, (release, &image), command, terminal, network).await?;
    let ended = attached(docker, &container, terminal, &mut ends).await;
    if ended.is_err() {
        // It may run still, for example after the reader of its output has gone. One that does not is no error here.
        let _ = docker.stop(&container, GRACE).await;
    }
    match docker.remove(&container).await {
        Ok(()) => ended,
        Err(e) => Err(Failed::child(NOT_RUN, format!("its container {} is left: {e}", container.short()))),
    }
}

async fn attached(docker: &Docker, container: &ContainerId, terminal: Terminal, ends: &mut Ends) -> Ended {
    let mut task = docker.attach(container, terminal).await?;
    docker.start(container).await.map_err(|e| not_started(&e))?;
    let mut work = std::pin::pin!(pass_on(docker, &mut task, terminal));
    loop {
        tokio::select! {
            passed = &mut work => break drop(passed?),
            () = ends.next() => docker.stop(container, GRACE).await?,
        }
    }
    Ok(ended(docker.exit_code(container).await?))
}
