//! `demae env`: the variables of an app.

mod change;
mod export;
mod list;

pub(super) use change::{check_count, users};
pub(super) use export::values;

use super::{ChangeArgs, Decision, Fleet, StoreArgs, no_app};
use crate::cli::{Ended, print::Printer};

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// List the variables of an app: where each comes from, and on how many hosts it is deployed
    List(list::Args),
    /// Set variables of an app, all in one release, and wait for the outcome
    Set(change::SetArgs),
    /// Remove variables of an app, all in one release, and wait for the outcome
    Unset(change::UnsetArgs),
    /// Set the variables that a file names, all in one release, and wait for the outcome
    Import(change::ImportArgs),
    /// Print the variables of an app with their values
    Export(export::Args),
}

pub(in crate::cli) fn run(args: &Args, printer: &mut Printer) -> Ended {
    match &args.verb {
        Verb::List(args) => list::run(args, printer),
        Verb::Set(args) => change::set(args, printer),
        Verb::Unset(args) => change::unset(args, printer),
        Verb::Import(args) => change::import(args, printer),
        Verb::Export(args) => export::run(args, printer),
    }
}
