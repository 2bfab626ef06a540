//! `demae version`

use serde::Serialize;

use super::{Ended, Exit, Format, print::Printer};
use crate::{
    model::{fleet, status},
    store::FEATURES,
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// What is printed
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
}

/// The JSON output.
#[derive(Debug, Serialize)]
struct Shown {
    /// Of this program.
    demae: &'static str,
    /// Of the status that it reads and writes.
    status: u32,
    /// Of the records of rollouts that it reads and writes.
    rollouts: u32,
    /// What it understands beyond the first version.
    features: &'static [&'static str],
}

pub(super) fn run(args: &Args, printer: &mut Printer) -> Ended {
    let demae = env!("CARGO_PKG_VERSION");
    match args.output {
        Format::Text => printer.line(&format!("demae {demae}")),
        Format::Json => {
            let shown = Shown { demae, status: status::VERSION, rollouts: fleet::VERSION, features: FEATURES };
            printer.line(&serde_json::to_string_pretty(&shown)?);
        }
    }
    Ok(Exit::Success)
}
