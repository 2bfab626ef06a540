//! `demae schema`

use super::{Ended, Exit, print::Printer};
use crate::model::{spec, status};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Of what
    #[arg(value_enum, default_value = "spec")]
    of: Of,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Of {
    /// A spec
    Spec,
    /// What `demae status -o json` prints
    Status,
}

pub(super) fn run(args: &Args, printer: &mut Printer) -> Ended {
    let schema = match args.of {
        Of::Spec => spec::SCHEMA,
        Of::Status => status::SCHEMA,
    };
    printer.line(schema.trim_end());
    Ok(Exit::Success)
}
