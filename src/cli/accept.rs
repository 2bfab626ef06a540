//! `demae store` and `demae confirm`: accept a store that the agent does not trust.

use std::io::{BufRead as _, IsTerminal as _};

use super::{Common, Ended, Exit, Failed, fleet, print::Printer, runtime, setup};
use crate::{
    config::Config,
    host::{files, layout::Layout},
    model::name::AppName,
    store::{self, Comparison, StoreError},
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Do not prompt
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    common: Common,
}

/// `demae store`
#[derive(Debug, clap::Args)]
pub(super) struct StoreArgs {
    #[command(subcommand)]
    verb: StoreVerb,
}

#[derive(Debug, clap::Subcommand)]
enum StoreVerb {
    /// Show its members, its revision, and the agents that use it
    Status(fleet::store_status::Args),
    /// Show what the store would change, and accept it as trusted on every host
    Accept(AcceptArgs),
}

#[derive(Debug, clap::Args)]
struct AcceptArgs {
    /// Accept it on this host only
    #[arg(long)]
    this_host: bool,
    #[command(flatten)]
    args: Args,
}

/// How far an acceptance goes.
#[derive(Clone, Copy, PartialEq)]
enum Reach {
    Host,
    Fleet,
}

/// `demae store …`
pub(super) fn store(args: &StoreArgs, printer: &mut Printer) -> Ended {
    let AcceptArgs { args, this_host } = match &args.verb {
        StoreVerb::Status(args) => return fleet::store_status::run(args, printer),
        StoreVerb::Accept(args) => args,
    };
    let reach = if *this_host { Reach::Host } else { Reach::Fleet };
    let kinds = ["sentinel_missing", "other_store", "older_revision", "mass_removal"];
    run(args, printer, &kinds, "demae store accept", reach)
}

/// `demae confirm`: only for a mass removal that the brake held back.
pub(super) fn confirm(args: &Args, printer: &mut Printer) -> Ended {
    run(args, printer, &["mass_removal"], "demae confirm", Reach::Host)
}

fn run(args: &Args, printer: &mut Printer, kinds: &[&str], verb: &str, reach: Reach) -> Ended {
    let config = Config::load(&args.common)?;
    let layout = Layout::new(&config.state_dir, &config.run_dir);
    let world = setup::world(&config, None, std::sync::Arc::new(crate::host::docker::NoMeter))?;
    let disk = setup::Disk(layout.clone());
    let found = runtime(1)?.block_on(async {
        let viewer = setup::viewer(&config, &world).await?;
        let failed = |e: StoreError| Failed::try_later(e.to_string());
        let found = store::compare(&config.etcd, &viewer, &disk).await.map_err(failed)?;
        // A claim on the host's name is reported after the state of the store: it does not hide that.
        let claimed =
            store::claimed(&config.etcd, &config.host, setup::agent_id(&layout)?.as_deref()).await.map_err(failed)?;
        Ok::<_, Failed>(Comparison { block: found.block.clone().or(claimed), ..found })
    })?;
    let Some(block) = &found.block else {
        printer.line("the agent of this host trusts the store already; there is nothing to accept");
        return Ok(Exit::Success);
    };
    // A mass removal is of this host, whatever the verb.
    let reach = if block.kind == "mass_removal" { Reach::Host } else { reach };
    printer.line(&block.message);
    show(&found, reach, printer);
    if !kinds.contains(&block.kind.as_str()) {
        return Err(Failed::because(format!("`{verb}` is not for this: {}", block.remedy)));
    }
    if !args.yes && !is_confirmed(printer)? {
        printer.error("nothing is accepted");
        return Ok(Exit::Failure);
    }
    files::make_dir(layout.state(), 0o755)?;
    files::write(&layout.accepted(), &serde_json::to_vec_pretty(&found.accept())?, 0o600)?;
    if reach == Reach::Fleet {
        let accept = store::accept_for_fleet(&config.etcd, &found);
        runtime(1)?.block_on(accept).map_err(|e| Failed::try_later(format!("accepted on this host only: {e}")))?;
        printer.line("accepted for every host; each agent applies it within seconds, or when it is back within 24 h");
    } else {
        printer.line("accepted; the agent of this host applies it within seconds");
    }
    Ok(Exit::Success)
}

fn show(found: &Comparison, reach: Reach, printer: &mut Printer) {
    let names =
        |apps: &std::collections::BTreeSet<AppName>| apps.iter().map(AppName::as_str).collect::<Vec<_>>().join(", ");
    for (what, apps) in [
        ("would be removed from this host", &found.leaving),
        ("would get another release", &found.changing),
        ("would be added", &found.coming),
    ] {
        if !apps.is_empty() {
            printer.line(&format!("  {what}: {}", names(apps)));
        }
    }
    if found.leaving.is_empty() && found.changing.is_empty() && found.coming.is_empty() {
        printer.line("  nothing would change on this host");
    }
    if reach == Reach::Fleet && !found.missing.is_empty() {
        printer.line(&format!("  would be removed from every host that runs them: {}", names(&found.missing)));
    }
}

fn is_confirmed(printer: &mut Printer) -> Result<bool, Failed> {
    if !std::io::stdin().is_terminal() {
        return Err(Failed::because("stdin is not a terminal; pass --yes to confirm"));
    }
    printer.error("type `yes` to accept:");
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    Ok(answer.trim() == "yes")
}
