//! `demae validate`

use std::{io::Read as _, path::PathBuf};

use super::{Ended, Exit, print::Printer};
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
        let read = if file.as_os_str() == "-" {
            let mut text = Vec::new();
            std::io::stdin().read_to_end(&mut text).map(|_| text)
        } else {
            std::fs::read(file)
        };
        let text = match read {
            Ok(text) => text,
            Err(e) => {
                printer.error(&format!("{name}: cannot read it: {e}"));
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
