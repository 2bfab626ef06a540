//! `demae events`

use std::time::Duration;

use super::{Ended, Exit, Failed, agent_address, print::Printer, runtime};
use crate::{
    host::probe,
    model::event::{Event, VERSION, What},
};

/// Retry interval while the agent is down.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Address of the agent; its metrics URL will do
    #[arg(long, env = "DEMAE_METRICS", value_name = "URL")]
    agent: Option<String>,
    /// Print the events in memory and exit
    #[arg(long)]
    no_follow: bool,
    /// Only these types: step, verdict, block, unblock, converged, reload, store
    #[arg(long = "type", value_delimiter = ',', value_name = "TYPE,…")]
    types: Vec<String>,
    /// What is printed
    #[arg(short, long, value_enum, default_value = "json")]
    output: Output,
    /// Only events of these apps
    #[arg(value_name = "APP")]
    apps: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    /// One JSON object a line, as sent by the agent
    Json,
    /// One sentence a line
    Text,
}

pub(super) fn run(args: &Args, printer: &mut Printer) -> Ended {
    if let Some(unknown) = args.types.iter().find(|t| !What::TYPES.contains(&t.as_str())) {
        let known = What::TYPES.join("`, `");
        return Err(Failed::usage(format!("`{unknown}` is not a type of event; there are `{known}`")));
    }
    runtime(1)?.block_on(follow(args, printer))
}

async fn follow(args: &Args, printer: &mut Printer) -> Ended {
    let address = agent_address(args.agent.as_deref())?;
    let uri = if args.no_follow { "/events" } else { "/events?follow" };
    let mut seen = (0, 0);
    let mut was_connected = false;
    loop {
        let (mut wrong, mut closed) = (None, false);
        let note = if was_connected { Some(format!("note: the agent at {address} is back")) } else { None };
        let ended = probe::lines(
            &address,
            uri,
            Duration::from_secs(5),
            || {
                if let Some(note) = note {
                    Printer::new(true).error(&note);
                }
            },
            |line| {
                let shown = show(args, line, &mut seen, printer);
                closed |= matches!(shown, Ok(false));
                shown.unwrap_or_else(|e| {
                    wrong = Some(e);
                    false
                })
            },
        )
        .await;
        if let Some(wrong) = wrong {
            return Err(wrong);
        }
        match ended {
            // The output pipe is closed.
            _ if closed => return Ok(Exit::Success),
            Ok(()) if args.no_follow => return Ok(Exit::Success),
            Ok(()) => printer.error(&format!("note: the agent at {address} ended; waiting for it")),
            Err(e) if !was_connected => return Err(Failed::try_later(format!("no agent answers at {address}: {e}"))),
            Err(_) => {}
        }
        was_connected = true;
        tokio::time::sleep(RETRY_INTERVAL).await;
    }
}

/// The fields of an event that every version has.
#[derive(serde::Deserialize)]
struct VersionOnly {
    version: u32,
}

/// Prints an event that matches the filters and is new. False once the output is closed.
fn show(args: &Args, line: &str, seen: &mut (i64, u64), printer: &mut Printer) -> Result<bool, Failed> {
    let not_an_event =
        |e: serde_json::Error| Failed::because(format!("not an event of an agent: {e}; is `--agent` right?"));
    let head: VersionOnly = serde_json::from_str(line).map_err(not_an_event)?;
    if head.version != VERSION {
        return Err(Failed::because(format!(
            "the agent sends version {} of events, this program reads version {VERSION}; use the agent's own `demae`",
            head.version
        )));
    }
    let event: Event = serde_json::from_str(line).map_err(not_an_event)?;
    // After a reconnect the same run sends again what it has in memory.
    if event.seq > 0 {
        if event.run == seen.0 && event.seq <= seen.1 {
            return Ok(true);
        }
        *seen = (event.run, event.seq);
    }
    let lost = matches!(event.what, What::Lost { .. });
    let is_listed = |app: &str| args.apps.iter().any(|a| a == app);
    let app_matches = args.apps.is_empty() || event.app.as_ref().is_some_and(|app| is_listed(app.as_str()));
    let type_matches = args.types.is_empty() || args.types.iter().any(|t| t == event.what.as_str());
    if !(lost || app_matches && type_matches) {
        return Ok(true);
    }
    Ok(match args.output {
        Output::Json => printer.try_line(line),
        Output::Text => {
            let app = event.app.as_ref().map_or("-", |app| app.as_str());
            printer.try_line(&format!(
                "{}  {}  {app}  {:<9}  {}",
                event.at,
                event.host,
                event.what.as_str(),
                event.message
            ))
        }
    })
}
