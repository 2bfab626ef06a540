//! `demae validate`

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{Ended, Exit, Failed, input::read_file_or_stdin, print::Printer};
use crate::model::{
    name::AppName,
    policy::{Asked, BUILT_IN, Policy},
    spec::Spec,
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Spec files, YAML or JSON; `-` for standard input
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// The policy of a host, in place of the rules that hold without one
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
}

pub(super) fn run(args: &Args, printer: &mut Printer) -> Ended {
    let rules = match &args.policy {
        Some(path) => Rules::of_file(path)?,
        None => Rules::built_in(),
    };
    check(&args.files, None, &rules, printer)
}

/// Checks files, and prints what is wrong with each.
pub(super) fn check(files: &[PathBuf], app: Option<&AppName>, rules: &Rules, printer: &mut Printer) -> Ended {
    let mut exit = Exit::Success;
    for file in files {
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
            Ok(spec) => {
                let refused = rules.refusals(file, app, &spec);
                for refusal in &refused {
                    exit = Exit::Failure;
                    printer.line(&format!("{name}: {refusal}"));
                }
                if refused.is_empty() {
                    printer.line(&format!("{name}: fine"));
                }
            }
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

/// Rules that specs are checked against.
pub(super) struct Rules(Arc<Policy>);

impl Rules {
    /// These.
    pub(super) fn new(policy: Arc<Policy>) -> Self {
        Self(policy)
    }

    /// Why they cannot be used, if so.
    pub(super) fn why_unusable(&self) -> Option<&str> {
        self.0.why_unusable()
    }

    /// For an import.
    pub(super) fn policy(self) -> Arc<Policy> {
        self.0
    }

    /// Those that hold on a host without a policy.
    pub(super) fn built_in() -> Self {
        Self(BUILT_IN.clone())
    }

    /// Those of a file, of any owner.
    pub(super) fn of_file(path: &Path) -> Result<Self, Failed> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| Failed::because(format!("cannot read `{}`: {e}", path.display())))?;
        let name = path.display().to_string();
        let policy = Policy::parse("", &name, &text).map_err(|e| Failed::because(e.to_string()))?;
        Ok(Self(Arc::new(policy)))
    }

    /// What they do not allow of a spec, which is of the app that its file is named for.
    pub(super) fn refusals(&self, file: &Path, app: Option<&AppName>, spec: &Spec) -> Vec<String> {
        let named = file.file_stem().and_then(|stem| AppName::try_from(stem.to_string_lossy().as_ref()).ok());
        let Some(app) = app.cloned().or(named).or_else(|| AppName::try_from("app").ok()) else { return Vec::new() };
        let (image, container, ingress) = (spec.image.as_ref(), &spec.container, spec.ingress.as_ref());
        let asked = Asked { app: &app, image, container, ingress };
        self.0.refusals_of(asked, spec.environment.keys()).iter().map(ToString::to_string).collect()
    }
}
