//! `demae validate`

use std::path::PathBuf;

use super::{Ended, Exit, input::read_file_or_stdin, print::Printer};
use crate::model::spec::Spec;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Spec files, YAML or JSON; `-` for standard input
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

pub(super) fn run(args: &Args, printer: &mut Printer) -> Ended {
    let mut exit = Exit::Success;
    for file in &args.files {
        let name = file.display();
        let text = match read_file_or_stdin(file) {
            Ok(text) => text,
            Err(failed) => {
                printer.error(&format!("{name}: {}", failed.message));
                exit = Exit::Failure;
                continue;
            }
        };
        match Spec::parse(&text) {
            Ok(_) => printer.line(&format!("{name}: fine")),
            Err(problems) => {
                exit = Exit::Failure;
                for problem in problems.iter() {
                    let key = if problem.key.is_empty() { String::new() } else { format!("`{}`: ", problem.key) };
                    let hint = problem.hint.as_ref().map(|h| format!(" ({h})")).unwrap_or_default();
                    printer
                        .line(&format!("{name}:{}:{}: {key}{}{hint}", problem.line, problem.column, problem.message));
                }
            }
        }
    }
    Ok(exit)
}
