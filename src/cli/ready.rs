//! `demae ready`

use std::time::Duration;

use tokio::time::Instant;

use super::{Ended, Exit, Failed, agent_address, print::Printer, runtime};
use crate::{host::probe, model::text};

/// Poll interval while waiting.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Address of the agent; its metrics URL will do
    #[arg(long, env = "DEMAE_METRICS", value_name = "URL")]
    agent: Option<String>,
    /// Wait until it is ready, at most this long
    #[arg(long, value_name = "DURATION")]
    wait: Option<String>,
}

pub(super) fn run(args: &Args, printer: &mut Printer) -> Ended {
    let wait = args.wait.as_deref().map(text::duration).transpose().map_err(Failed::usage)?.unwrap_or_default();
    let address = agent_address(args.agent.as_deref())?;
    runtime(1)?.block_on(async {
        let until = Instant::now() + wait;
        loop {
            let response = probe::get_tcp(&address, "localhost", "/readyz", Duration::from_secs(2)).await;
            let why = match response {
                Ok(answer) if answer.status == 200 => {
                    printer.line(answer.body.trim());
                    return Ok(Exit::Success);
                }
                Ok(answer) if answer.status == 503 => answer.body.trim().to_owned(),
                Ok(answer) => format!("{address} is not an agent: it answers with status {}", answer.status),
                Err(e) => format!("no agent answers at {address}: {e}"),
            };
            if Instant::now() >= until {
                return Err(Failed::because(format!("not ready: {why}")));
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    })
}
