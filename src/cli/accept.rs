//! `demae store accept` and `demae confirm`: what a person says to an agent that does not believe its store.

use std::io::{BufRead as _, IsTerminal as _};

use super::{Common, Ended, Exit, Failed, print::Printer, runtime, setup};
use crate::{
    config::Config,
    host::{files, layout::Layout},
    model::name::AppName,
    store::{self, Comparison, StoreError},
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    common: Common,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

/// `demae store`
#[derive(Debug, clap::Args)]
pub(super) struct StoreArgs {
    #[command(subcommand)]
    verb: StoreVerb,
}

#[derive(Debug, clap::Subcommand)]
enum StoreVerb {
    /// Show what the store would change on this host, and take it from now on though it is not the one from before
    Accept(Args),
}

/// `demae store …`
pub(super) fn store(args: &StoreArgs, printer: &mut Printer) -> Ended {
    let StoreVerb::Accept(args) = &args.verb;
    run(args, printer, &["sentinel_missing", "other_store", "older_revision", "mass_removal"], "demae store accept")
}

/// `demae confirm`: only for the brake.
pub(super) fn confirm(args: &Args, printer: &mut Printer) -> Ended {
    run(args, printer, &["mass_removal"], "demae confirm")
}

fn run(args: &Args, printer: &mut Printer, kinds: &[&str], verb: &str) -> Ended {
    let config = Config::load(&args.common)?;
    let layout = Layout::new(&config.state_dir, &config.run_dir);
    let world = setup::world(&config, None, std::sync::Arc::new(crate::host::docker::NoMeter))?;
    let shelf = setup::Disk(layout.clone());
    let found = runtime(1)?.block_on(async {
        let viewer = setup::viewer(&config, &world).await?;
        let failed = |e: StoreError| Failed::for_now(e.to_string());
        let found = store::compare(&config.etcd, &viewer, &shelf).await.map_err(failed)?;
        // Whose the name is comes after what the store is: it is no reason to leave that unsaid.
        let claimed =
            store::claimed(&config.etcd, &config.host, setup::agent_id(&layout)?.as_deref()).await.map_err(failed)?;
        Ok::<_, Failed>(Comparison { block: found.block.clone().or(claimed), ..found })
    })?;
    let Some(block) = &found.block else {
        printer.line("the agent of this host takes the store as it is; there is nothing to accept");
        return Ok(Exit::Success);
    };
    printer.line(&block.message);
    show(&found, printer);
    if !kinds.contains(&block.kind.as_str()) {
        return Err(Failed::because(format!("`{verb}` is not for this: {}", block.remedy)));
    }
    if !args.yes && !asked(printer)? {
        printer.error("nothing is accepted");
        return Ok(Exit::Failure);
    }
    files::make_dir(layout.state(), 0o755)?;
    files::write(&layout.accepted(), &serde_json::to_vec_pretty(&found.accept())?, 0o600)?;
    printer.line("accepted; the agent of this host takes it within seconds");
    Ok(Exit::Success)
}

fn show(found: &Comparison, printer: &mut Printer) {
    let names =
        |apps: &std::collections::BTreeSet<AppName>| apps.iter().map(AppName::as_str).collect::<Vec<_>>().join(", ");
    for (what, apps) in [
        ("would leave this host", &found.leaving),
        ("would get another release", &found.changing),
        ("would come", &found.coming),
    ] {
        if !apps.is_empty() {
            printer.line(&format!("  {what}: {}", names(apps)));
        }
    }
    if found.leaving.is_empty() && found.changing.is_empty() && found.coming.is_empty() {
        printer.line("  nothing would change on this host");
    }
}

fn asked(printer: &mut Printer) -> Result<bool, Failed> {
    if !std::io::stdin().is_terminal() {
        return Err(Failed::because("nobody can be asked here; say `--yes` if this is what you want"));
    }
    printer.error("type `yes` to accept this:");
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    Ok(answer.trim() == "yes")
}
