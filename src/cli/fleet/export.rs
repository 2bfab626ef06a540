//! `demae export`

use super::{Fleet, StoreArgs, env::values};
use crate::{
    cli::{Ended, Exit, Failed, print::Printer, runtime},
    import::export::{Source, to_compose, to_run},
    model::{
        dotenv,
        name::{AppName, EnvName},
        spec::Spec,
        yaml,
    },
    store::keys::Key,
};

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// The app
    #[arg(value_name = "APP")]
    app: String,
    /// What is printed
    #[arg(long, value_enum, default_value = "compose")]
    format: Format,
    #[command(flatten)]
    store: StoreArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// A Compose file with one service
    Compose,
    /// A `docker run` command
    Run,
    /// Its variables, as a `.env` file
    Env,
}

pub(in crate::cli) fn run(args: &Args, printer: &mut Printer) -> Ended {
    let config = args.store.etcd()?;
    let app = AppName::try_from(args.app.as_str())?;
    let fleet = runtime(1)?.block_on(Fleet::read(&config))?;
    let everywhere = fleet.app(&app)?;
    let text = fleet.contents.entry(&Key::Spec(app.clone())).map(|entry| entry.value().to_vec()).unwrap_or_default();
    let spec = Spec::parse(&text)?;
    let release = &everywhere.target.release;
    if args.format == Format::Env {
        let text = dotenv::write(&values(&fleet, &app)?, dotenv::Format::Dotenv).map_err(Failed::because)?;
        printer.line(text.trim_end());
        return Ok(Exit::Success);
    }
    let is_of_spec = |name: &EnvName| spec.environment.contains_key(name);
    let has_variables = !release.env.keys().all(is_of_spec);
    let tree = yaml::parse(&text).map_err(|problem| Failed::because(problem.to_string()))?;
    let source = Source { app: &app, tree: &tree, spec: &spec, image: release.image.as_str(), has_variables };
    let (printed, notes) = match args.format {
        Format::Run => to_run(source),
        _ => to_compose(source),
    };
    printer.line(printed.trim_end());
    for note in &notes {
        printer.error(&note.to_string());
    }
    Ok(if notes.is_empty() { Exit::Success } else { Exit::Changes })
}
