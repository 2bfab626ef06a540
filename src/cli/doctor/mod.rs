//! `demae doctor`: checks everything that an agent needs, changes nothing, and suggests fixes.

mod apps;
mod host;
mod store;

use serde::Serialize;

use super::{Common, Ended, Exit, print::Printer, runtime, setup};
use crate::{config::Config, host::docker::NoMeter, world::World};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// What is printed
    #[arg(short, long, value_enum, default_value = "text")]
    output: Output,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    /// A line for each finding
    Text,
    /// JSON
    Json,
}

/// The severity of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    /// As it should be.
    Ok,
    /// It works, and may cause trouble later.
    Warn,
    /// An agent cannot do its work.
    Fail,
}

/// The result of one check.
#[derive(Debug, Serialize)]
struct Finding {
    /// The name of the check.
    check: &'static str,
    level: Level,
    /// What was found.
    message: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

/// Findings, in the order of the checks.
#[derive(Debug, Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn ok(&mut self, check: &'static str, message: impl Into<String>) {
        self.0.push(Finding { check, level: Level::Ok, message: message.into(), remedy: None });
    }

    fn warn(&mut self, check: &'static str, message: impl Into<String>, remedy: impl Into<String>) {
        let (message, remedy) = (message.into(), Some(remedy.into()));
        self.0.push(Finding { check, level: Level::Warn, message, remedy });
    }

    fn fail(&mut self, check: &'static str, message: impl Into<String>, remedy: impl Into<String>) {
        let (message, remedy) = (message.into(), Some(remedy.into()));
        self.0.push(Finding { check, level: Level::Fail, message, remedy });
    }
}

/// The inputs of all checks.
struct Context<'a> {
    config: &'a Config,
    world: &'a World,
    /// Whether Docker answers. If not, no other check waits for it again.
    docker_answers: bool,
}

pub(super) fn run(args: &Args, printer: &mut Printer) -> Ended {
    let config = Config::load(&args.common)?;
    let world = setup::world(&config, None, std::sync::Arc::new(NoMeter))?;
    let mut context = Context { config: &config, world: &world, docker_answers: false };
    let found = runtime(1)?.block_on(async {
        let mut found = Findings::default();
        context.docker_answers = host::docker(&context, &mut found).await;
        if context.docker_answers || config.nginx.container.is_none() {
            host::nginx(&context, &mut found).await;
        }
        host::policy(&context, &mut found);
        host::registries(&context, &mut found);
        host::directories(&context, &mut found).await;
        host::sockets(&context, &mut found);
        host::ports(&context, &mut found);
        host::tcp_routes(&context, &mut found).await;
        store::members(&context, &mut found).await;
        store::excess_rights(&context, &mut found).await;
        let snapshot = store::trust(&context, &mut found).await;
        store::rollouts(&context, &mut found).await;
        if context.docker_answers {
            apps::leftovers(&context, snapshot.as_ref(), &mut found).await;
            apps::copies(&context, &mut found).await;
            apps::foreign(&context, &mut found).await;
        }
        if let Some(snapshot) = &snapshot {
            apps::mounts(&context, snapshot, &mut found).await;
        }
        found.0
    });
    let worst = found.iter().map(|f| f.level).max();
    if args.output == Output::Json {
        printer.line(&serde_json::to_string_pretty(&serde_json::json!({ "version": 1, "findings": found }))?);
    } else {
        print(&found, printer);
    }
    Ok(if worst == Some(Level::Fail) { Exit::Failure } else { Exit::Success })
}

fn print(found: &[Finding], printer: &mut Printer) {
    let width = found.iter().map(|f| f.check.len()).max().unwrap_or(0);
    for finding in found {
        let level = match finding.level {
            Level::Ok => "ok  ",
            Level::Warn => "warn",
            Level::Fail => "FAIL",
        };
        printer.line(&format!("{level}  {:width$}  {}", finding.check, finding.message));
        if let Some(remedy) = &finding.remedy {
            printer.line(&format!("      {:width$}  -> {remedy}", ""));
        }
    }
    let count = |level: Level| found.iter().filter(|f| f.level == level).count();
    let (fails, warns) = (count(Level::Fail), count(Level::Warn));
    printer.line(&format!("{} checks, {warns} warnings, {fails} failures", found.len()));
}
