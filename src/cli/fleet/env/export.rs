//! `demae env export`

use std::collections::BTreeMap;

use super::{Fleet, StoreArgs};
use crate::{
    cli::{Ended, Exit, Failed, print::Printer, runtime},
    model::{
        dotenv,
        name::{AppName, EnvName},
    },
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The app
    #[arg(value_name = "APP")]
    app: String,
    /// How it is written
    #[arg(long, value_enum, default_value = "dotenv")]
    format: Format,
    #[command(flatten)]
    store: StoreArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// As a `.env` file
    Dotenv,
    /// For `docker run --env-file`
    Docker,
    /// One object
    Json,
}

/// The variables of an app, with their values.
pub(in crate::cli::fleet) fn values(fleet: &Fleet, app: &AppName) -> Result<BTreeMap<EnvName, String>, Failed> {
    let env = &fleet.app(app)?.target.release.env;
    Ok(env.iter().map(|(name, value)| (name.clone(), value.expose().to_owned())).collect())
}

pub(super) fn run(args: &Args, printer: &mut Printer) -> Ended {
    let config = args.store.etcd()?;
    let app = AppName::try_from(args.app.as_str())?;
    let fleet = runtime(1)?.block_on(Fleet::read(&config))?;
    let values = values(&fleet, &app)?;
    let text = match args.format {
        Format::Json => serde_json::to_string_pretty(&values)?,
        Format::Dotenv => dotenv::write(&values, dotenv::Format::Dotenv).map_err(Failed::because)?,
        Format::Docker => dotenv::write(&values, dotenv::Format::Docker).map_err(Failed::because)?,
    };
    if !text.is_empty() {
        printer.line(text.trim_end_matches('\n'));
    }
    Ok(Exit::Success)
}
