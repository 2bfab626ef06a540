//! The command line. One file per verb.

mod accept;
mod adopt;
mod agent;
mod completions;
mod dev;
mod doctor;
mod events;
mod fleet;
mod images;
mod import;
mod init;
mod input;
mod plan;
mod policy;
mod print;
mod ready;
#[cfg(test)]
mod reference;
mod restore_routes;
mod schema;
mod setup;
mod status;
mod task;
mod validate;
mod version;

use std::process::ExitCode;

use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand, error::ErrorKind, parser::ValueSource};

use crate::{
    config::{Flags, LISTEN},
    model::problem::chain,
};
use print::Printer;

/// Keeps the containers and the nginx of a Docker host as etcd says, and drops no request on the way
#[derive(Debug, Parser)]
#[command(
    name = "demae",
    version,
    about = "Keeps the containers and the nginx of a Docker host as etcd says, and drops no request on the way"
)]
struct Cli {
    /// No colours, as with `NO_COLOR`
    #[arg(long, global = true, help_heading = "Output")]
    no_color: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run the agent of this host
    Agent(agent::Args),
    /// Show the apps of this host: what is wanted, what serves, and why it differs
    Status(status::Args),
    /// Deploy an image of an app on every host that runs it, and wait for the outcome
    Deploy(fleet::deploy::Args),
    /// Deploy the same image and variables again, as a new release
    Redeploy(fleet::redeploy::Args),
    /// Go back to a release that was proven, and stay on it until the next deploy
    Rollback(fleet::rollback::Args),
    /// Let a release go beyond its canaries
    Promote(fleet::promote::Args),
    /// Try a release that failed once more
    Retry(fleet::retry::Args),
    /// Change how many instances of an app each of its hosts runs
    Scale(fleet::scale::Args),
    /// Wait until it is decided what became of a release
    Wait(fleet::wait::Args),
    /// Deploy specs from files, and wait for the outcome
    Apply(fleet::apply::Args),
    /// Show and change the variables of an app
    Env(fleet::env::Args),
    /// List the releases of an app: who wanted them, and what became of them
    History(fleet::history::Args),
    /// Compare what two releases of an app are made from
    Diff(fleet::diff::Args),
    /// Print what the containers of an app on this host print, or the end of the log of a release that failed
    Logs(fleet::logs::Args),
    /// Run a command once, in a container of its own like those of an app, on this host
    Run(task::run::Args),
    /// Run a command in a container of an app on this host
    Exec(task::exec::Args),
    /// Keep an app as it is, whatever is written, until it is resumed
    Pause(fleet::pause::PauseArgs),
    /// Let a paused app be changed again
    Resume(fleet::pause::ResumeArgs),
    /// Remove an app from every host
    Delete(fleet::delete::Args),
    /// List the hosts of the fleet, or take one out of service
    Hosts(fleet::hosts::Args),
    /// Follow what happens on this host: steps, verdicts, blocks, convergence
    Events(events::Args),
    /// Check whether the agent is ready, that is, has read etcd, Docker and nginx: exit code 0 if so, 1 if not
    Ready(ready::Args),
    /// Show what the agent would do now, without doing it
    Plan(plan::Args),
    /// Diagnose everything that an agent needs, without changing anything, and suggest fixes
    Doctor(doctor::Args),
    /// Initialise the store (run once)
    Init(init::Args),
    /// Confirm a held-back mass removal
    Confirm(accept::Args),
    /// Show the store, and manage trust in it
    Store(accept::StoreArgs),
    /// Adopt the containers of another agent with this host's name
    Adopt(adopt::Args),
    /// Make specs from files of Compose and Kamal, `docker run` commands and containers
    Import(import::Args),
    /// Print an app as a Compose file, a `docker run` command, or its variables
    Export(fleet::export::Args),
    /// Move the requests of a container to an app, behind a hand-written server of nginx
    Takeover(fleet::takeover::Args),
    /// List the images that the agent of this host has pulled, and why they stay
    Images(images::Args),
    /// Check spec files, and report every problem
    Validate(validate::Args),
    /// Check what this host allows
    Policy(policy::Args),
    /// Print the JSON Schema of a spec, or of a status
    Schema(schema::Args),
    /// Print the completions of a shell
    Completions(completions::CompletionsArgs),
    /// Print the manual pages
    Man(completions::ManArgs),
    /// Print the version of this program, and of what it reads and writes
    Version(version::Args),
    /// Put the routes of TCP apps back as they were; at boot, before the agent runs
    RestoreRoutes(restore_routes::Args),
    /// Run a complete demae on this machine to try it: etcd, nginx, agent
    Dev(dev::Args),
}

/// The exit code of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Exit {
    /// 0: success.
    Success,
    /// 1: invalid input, or the operation failed.
    Failure,
    /// 2: `plan` found something to do.
    Changes,
    /// 3: the release failed; what served before serves.
    Release,
    /// 4: a person must act.
    Blocked,
    /// 5: another change came between.
    Superseded,
    /// 6: proven on the canaries, and waiting for a promotion.
    Promote,
    /// 64: the command line is wrong (`EX_USAGE`, sysexits.h).
    Usage,
    /// 75: try again later (`EX_TEMPFAIL`, sysexits.h).
    TryAgain,
    /// The code of a command that a person runs, or 125 to 127 if it was not run.
    Child(u8),
    /// 124: written, and not decided in time (as `timeout`).
    Undecided,
    /// 130: interrupted while waiting (as shells say it: 128 + SIGINT).
    Interrupted,
}

impl Exit {
    fn code(self) -> ExitCode {
        ExitCode::from(match self {
            Exit::Success => 0,
            Exit::Failure => 1,
            Exit::Changes => 2,
            Exit::Release => 3,
            Exit::Blocked => 4,
            Exit::Superseded => 5,
            Exit::Promote => 6,
            Exit::Usage => 64,
            Exit::TryAgain => 75,
            Exit::Child(code) => code,
            Exit::Undecided => 124,
            Exit::Interrupted => 130,
        })
    }
}

/// A command that failed: what to print, once, at the top.
#[derive(Debug)]
struct Failed {
    exit: Exit,
    message: String,
}

impl Failed {
    fn because(message: impl Into<String>) -> Self {
        Self { exit: Exit::Failure, message: message.into() }
    }

    fn usage(message: impl Into<String>) -> Self {
        Self { exit: Exit::Usage, message: message.into() }
    }

    fn try_later(message: impl Into<String>) -> Self {
        Self { exit: Exit::TryAgain, message: message.into() }
    }

    fn blocked(message: impl Into<String>) -> Self {
        Self { exit: Exit::Blocked, message: message.into() }
    }

    fn superseded(message: impl Into<String>) -> Self {
        Self { exit: Exit::Superseded, message: message.into() }
    }

    fn child(code: u8, message: impl Into<String>) -> Self {
        Self { exit: Exit::Child(code), message: message.into() }
    }

    fn undecided(message: impl Into<String>) -> Self {
        Self { exit: Exit::Undecided, message: message.into() }
    }
}

/// An error with its chain of causes.
impl<E: std::error::Error> From<E> for Failed {
    fn from(error: E) -> Self {
        Self::because(chain(&error))
    }
}

/// Reads the command line and does what it says.
pub fn run() -> ExitCode {
    let parsed = Cli::command().try_get_matches();
    let parsed = parsed.and_then(|matches| check_context(&matches).and_then(|()| Cli::from_arg_matches(&matches)));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(e) => {
            // A closed pipe is no error.
            let _ = e.print();
            // clap's own 2 would mean "there are changes" to callers of `plan`; 64 is `EX_USAGE` of sysexits.h.
            return if e.use_stderr() { ExitCode::from(64) } else { ExitCode::SUCCESS };
        }
    };
    let mut printer = Printer::new(cli.no_color);
    let ended = match cli.verb {
        Verb::Agent(args) => agent::run(&args),
        Verb::Status(args) => status::run(&args, &mut printer),
        Verb::Deploy(args) => fleet::deploy::run(&args, &mut printer),
        Verb::Redeploy(args) => fleet::redeploy::run(&args, &mut printer),
        Verb::Rollback(args) => fleet::rollback::run(&args, &mut printer),
        Verb::Promote(args) => fleet::promote::run(&args, &mut printer),
        Verb::Retry(args) => fleet::retry::run(&args, &mut printer),
        Verb::Scale(args) => fleet::scale::run(&args, &mut printer),
        Verb::Wait(args) => fleet::wait::run(&args, &mut printer),
        Verb::Apply(args) => fleet::apply::run(&args, &mut printer),
        Verb::Env(args) => fleet::env::run(&args, &mut printer),
        Verb::History(args) => fleet::history::run(&args, &mut printer),
        Verb::Diff(args) => fleet::diff::run(&args, &mut printer),
        Verb::Logs(args) => fleet::logs::run(&args, &mut printer),
        Verb::Run(args) => task::run::run(&args, &mut printer),
        Verb::Exec(args) => task::exec::run(&args, &mut printer),
        Verb::Pause(args) => fleet::pause::pause(&args, &mut printer),
        Verb::Resume(args) => fleet::pause::resume(&args, &mut printer),
        Verb::Delete(args) => fleet::delete::run(&args, &mut printer),
        Verb::Hosts(args) => fleet::hosts::run(&args, &mut printer),
        Verb::Events(args) => events::run(&args, &mut printer),
        Verb::Ready(args) => ready::run(&args, &mut printer),
        Verb::Plan(args) => plan::run(&args, &mut printer),
        Verb::Doctor(args) => doctor::run(&args, &mut printer),
        Verb::Init(args) => init::run(&args, &mut printer),
        Verb::Confirm(args) => accept::confirm(&args, &mut printer),
        Verb::Store(args) => accept::store(&args, &mut printer),
        Verb::Adopt(args) => adopt::run(&args, &mut printer),
        Verb::Import(args) => import::run(&args, &mut printer),
        Verb::Export(args) => fleet::export::run(&args, &mut printer),
        Verb::Takeover(args) => fleet::takeover::run(&args, &mut printer),
        Verb::Images(args) => images::run(&args, &mut printer),
        Verb::Policy(args) => policy::run(&args, &mut printer),
        Verb::Validate(args) => validate::run(&args, &mut printer),
        Verb::Schema(args) => schema::run(&args, &mut printer),
        Verb::Completions(args) => completions::completions(&args, &mut printer),
        Verb::Man(args) => completions::man(&args, &mut printer),
        Verb::Version(args) => version::run(&args, &mut printer),
        Verb::RestoreRoutes(args) => restore_routes::run(&args, &mut printer),
        Verb::Dev(args) => dev::run(&args, &mut printer),
    };
    match ended {
        Ok(exit) => exit.code(),
        Err(failed) => {
            if !failed.message.is_empty() {
                printer.error(&format!("error: {}", failed.message));
            }
            failed.exit.code()
        }
    }
}

/// Refuses a store that is named twice on a command line: by a context, and by the flags of etcd. Variables of the
/// environment are for where there is no context.
fn check_context(matches: &clap::ArgMatches) -> Result<(), clap::Error> {
    let mut leaf = matches;
    while let Some((_, below)) = leaf.subcommand() {
        leaf = below;
    }
    let named = leaf.try_get_one::<String>("context").ok().flatten().filter(|name| !name.is_empty());
    let is_given = |id: &&str| {
        matches!(leaf.try_contains_id(id), Ok(true)) && leaf.value_source(id) == Some(ValueSource::CommandLine)
    };
    let given = [
        "config",
        "endpoints",
        "user",
        "password",
        "cacert",
        "cert",
        "key",
        "prefix",
        "dial_timeout",
        "command_timeout",
    ]
    .into_iter()
    .find(is_given);
    match (named, given) {
        (Some(name), Some(flag)) => {
            let message = format!(
                "the context `{name}` names the store, and so does `--{}`: give one of them\n",
                flag.replace('_', "-")
            );
            Err(clap::Error::raw(ErrorKind::ArgumentConflict, message))
        }
        _ => Ok(()),
    }
}

/// A runtime for one-off commands.
fn runtime(threads: usize) -> Result<tokio::runtime::Runtime, Failed> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    Ok(builder.worker_threads(threads).enable_all().build()?)
}

/// The address of an agent, from its URL or the default.
fn agent_address(url: Option<&str>) -> Result<String, Failed> {
    let url = url.unwrap_or(LISTEN);
    let rest = match url.split_once("://") {
        None => url,
        Some(("http", rest)) => rest,
        Some((scheme, _)) => {
            return Err(Failed::because(format!(
                "`{url}`: an agent is served over plain http, not {scheme}; write it like `http://{LISTEN}`"
            )));
        }
    };
    Ok(rest.split('/').next().unwrap_or_default().to_owned())
}

type Ended = Result<Exit, Failed>;

/// What is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// For people
    Text,
    /// JSON
    Json,
}

/// Flags of every verb that loads the configuration.
type Common = Flags;

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_well_formed() {
        super::Cli::command().debug_assert();
    }

    #[test]
    fn every_option_is_in_the_reference() {
        expect_test::expect_file!["../../docs/options.md"].assert_eq(&super::reference::text(super::Cli::command()));
    }
}
