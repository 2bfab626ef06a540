//! `demae policy`

use std::path::PathBuf;

use super::{
    Common, Ended, Failed,
    print::Printer,
    validate::{Rules, check},
};
use crate::{config::Config, host::policy::PolicyFile, model::name::AppName};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Check whether this host would run what spec files ask for
    Check(CheckArgs),
}

#[derive(Debug, clap::Args)]
struct CheckArgs {
    /// Spec files, YAML or JSON; `-` for standard input
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// The policy of another host, in place of this one's
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
    /// The app, if the name of the file is another one
    #[arg(long, value_name = "APP")]
    app: Option<String>,
    #[command(flatten)]
    common: Common,
}

pub(super) fn run(args: &Args, printer: &mut Printer) -> Ended {
    let Verb::Check(args) = &args.verb;
    let app = args.app.as_deref().map(AppName::try_from).transpose()?;
    let rules = match &args.policy {
        Some(path) => Rules::of_file(path)?,
        None => {
            let config = Config::load(&args.common)?;
            Rules::new(PolicyFile::at(&config.policy, &config.host).current())
        }
    };
    if let Some(why) = rules.why_unusable() {
        return Err(Failed::because(why));
    }
    check(&args.files, app.as_ref(), &rules, printer)
}
