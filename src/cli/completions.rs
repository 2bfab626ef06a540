//! `demae completions` and `demae man`: made from the command line itself.

use std::path::PathBuf;

use clap::{Command, CommandFactory as _};
use clap_complete::Shell;

use super::{Cli, Ended, Exit, Failed, print::Printer};

#[derive(Debug, clap::Args)]
pub(super) struct CompletionsArgs {
    /// The shell
    #[arg(value_name = "SHELL")]
    shell: Shell,
}

#[derive(Debug, clap::Args)]
pub(super) struct ManArgs {
    /// Directory for a page of each command, instead of the first page on standard output
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

pub(super) fn completions(args: &CompletionsArgs, printer: &mut Printer) -> Ended {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "demae", &mut text);
    printer.line(String::from_utf8_lossy(&text).trim_end());
    Ok(Exit::Success)
}

pub(super) fn man(args: &ManArgs, printer: &mut Printer) -> Ended {
    let command = Cli::command().disable_help_subcommand(true);
    let Some(dir) = &args.out else {
        printer.line(page(&command)?.trim_end());
        return Ok(Exit::Success);
    };
    clap_mangen::generate_to(command, dir)
        .map_err(|e| Failed::because(format!("cannot write the pages to `{}`: {e}", dir.display())))?;
    Ok(Exit::Success)
}

fn page(command: &Command) -> Result<String, Failed> {
    let mut text = Vec::new();
    clap_mangen::Man::new(command.clone()).render(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}
