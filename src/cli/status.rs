//! `demae status`

use std::time::Duration;

use serde::Serialize;

use super::{Common, Ended, Exit, Failed, Format, agent_address, fleet, print::Printer, runtime};
use crate::{
    config,
    host::probe,
    model::{
        problem::Problem,
        status::{AppStatus, HostStatus, State, StoreBlock, VERSION},
        time::{Timestamp, human},
    },
    store,
};

/// Shortest and longest poll interval of `--watch`.
const MIN_POLL_INTERVAL: Duration = Duration::from_millis(250);
const MAX_POLL_INTERVAL: Duration = Duration::from_secs(8);

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Address of the agent; its metrics URL will do
    #[arg(long, env = "DEMAE_METRICS", value_name = "URL")]
    agent: Option<String>,
    /// All hosts of the fleet, from the store, instead of this one
    #[arg(long, conflicts_with = "watch")]
    fleet: bool,
    /// The same, from a store of `~/.config/demae/contexts.toml`, by its name
    #[arg(long, env = "DEMAE_CONTEXT", value_name = "NAME")]
    context: Option<String>,
    /// Also the apps that have converged, if they are many
    #[arg(long)]
    all: bool,
    /// Print again at each change
    #[arg(long)]
    watch: bool,
    /// What is printed
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
    /// Only these apps
    #[arg(value_name = "APP")]
    apps: Vec<String>,
    #[command(flatten)]
    common: Common,
}

/// The JSON output.
#[derive(Debug, Serialize, PartialEq)]
struct Shown {
    version: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    proxy: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tcp_routes: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    store_error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    store_block: Option<StoreBlock>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stale_since: Option<Timestamp>,
    apps: Vec<AppStatus>,
    unreadable: Vec<Problem>,
}

pub(super) fn run(args: &Args, printer: &mut Printer) -> Ended {
    if let Some(name) = args.context.as_deref().filter(|name| !name.is_empty()) {
        if args.watch {
            return Err(Failed::usage("`--watch` shows the agent of this host, and a context is a store"));
        }
        return fleet::table::run(&config::context(name)?.etcd, &args.apps, args.all, args.output, printer);
    }
    if args.fleet {
        return fleet::table::run(&config::etcd_only(&args.common)?, &args.apps, args.all, args.output, printer);
    }
    runtime(1)?.block_on(async {
        let mut last = None;
        let mut last_note = String::new();
        let mut pause = MIN_POLL_INTERVAL;
        loop {
            let (shown, note) = read(args).await?;
            // Print the same note once; poll an absent agent less and less often.
            pause = if note.is_some() { (pause * 2).min(MAX_POLL_INTERVAL) } else { MIN_POLL_INTERVAL };
            let note = note.unwrap_or_default();
            if note != last_note && !note.is_empty() {
                printer.error(&format!("note: {note}"));
            }
            last_note = note;
            if last.is_none() {
                check_apps_exist(args, &shown.apps)?;
            }
            if last.as_ref() != Some(&shown) {
                if last.is_some() && args.output == Format::Text {
                    printer.line("");
                }
                print(args, &shown, printer)?;
                last = Some(shown);
            }
            if !args.watch {
                return Ok(Exit::Success);
            }
            tokio::time::sleep(pause).await;
        }
    })
}

/// Fails for an unknown app: an empty table would look like an answer.
fn check_apps_exist(args: &Args, found: &[AppStatus]) -> Result<(), Failed> {
    let Some(name) = args.apps.iter().find(|name| !found.iter().any(|a| a.app == **name)) else { return Ok(()) };
    Err(Failed::because(format!("no app `{}` is here, and none is wanted here", name.escape_debug())))
}

/// Status from the agent of this host; without one, what agents last published, with a note that says so.
async fn read(args: &Args) -> Result<(Shown, Option<String>), Failed> {
    let address = agent_address(args.agent.as_deref())?;
    let response = probe::get_tcp(&address, "localhost", "/status", Duration::from_secs(5)).await;
    let error = match response {
        Ok(answer) if answer.status == 200 => match serde_json::from_str::<HostStatus>(&answer.body) {
            Ok(status) if status.version == VERSION => return Ok((select(args, status), None)),
            Ok(status) => {
                return Err(Failed::because(format!(
                    "the agent at {address} sends version {} of status, this program reads version {VERSION}; use the agent's own `demae`",
                    status.version
                )));
            }
            Err(e) => format!("not the status of an agent: {e}"),
        },
        Ok(answer) => format!("answered with status {}", answer.status),
        Err(e) => e,
    };
    let etcd = config::etcd_only(&args.common)?;
    let mut apps = store::published(&etcd).await.map_err(|e| {
        Failed::try_later(format!("no agent answers at {address} ({error}), and the store neither: {e}"))
    })?;
    let note = format!("no agent answers at {address} ({error}); this is what agents last published to the store");
    apps.retain(|a| is_selected(args, &a.app) && args.common.host.as_ref().is_none_or(|h| *h == a.host.as_str()));
    let shown = Shown {
        version: VERSION,
        proxy: None,
        tcp_routes: None,
        store_error: None,
        store_block: None,
        stale_since: None,
        apps,
        unreadable: Vec::new(),
    };
    Ok((shown, Some(note)))
}

fn is_selected(args: &Args, app: &str) -> bool {
    args.apps.is_empty() || args.apps.iter().any(|a| a == app)
}

fn select(args: &Args, status: HostStatus) -> Shown {
    let unreadable = if args.apps.is_empty() { status.unreadable } else { Vec::new() };
    Shown {
        version: VERSION,
        proxy: status.proxy,
        tcp_routes: status.tcp_routes,
        store_error: status.store.error,
        store_block: status.store.block,
        stale_since: status.store.stale_since,
        apps: status.apps.into_iter().filter(|a| is_selected(args, &a.app)).collect(),
        unreadable,
    }
}

fn print(args: &Args, shown: &Shown, printer: &mut Printer) -> Result<(), Failed> {
    if args.output == Format::Json {
        printer.line(&serde_json::to_string_pretty(shown)?);
        return Ok(());
    }
    let now = Timestamp::now();
    let mut rows =
        vec![["APP", "HOST", "RELEASE", "IMAGE", "HEALTHY", "STATE", "SINCE", "REASON"].map(String::from).to_vec()];
    let is_well = |app: &&AppStatus| app.state == State::Converged && app.reason.is_empty();
    let (well, trouble): (Vec<&AppStatus>, Vec<&AppStatus>) = shown.apps.iter().partition(is_well);
    let is_folded = fleet::table::is_folded(well.len(), trouble.len(), args.all || !args.apps.is_empty());
    for app in trouble.into_iter().chain(well.iter().copied().filter(|_| !is_folded)) {
        let release = match (&app.release, &app.serving) {
            (Some(wanted), Some(serving)) => format!("{serving}->{wanted}"),
            (wanted, serving) => wanted.clone().or_else(|| serving.clone()).unwrap_or_else(|| "-".to_owned()),
        };
        rows.push(vec![
            app.app.clone(),
            app.host.to_string(),
            release,
            app.image.clone().unwrap_or_else(|| "-".to_owned()),
            format!("{}/{}", app.healthy, app.wanted),
            app.state.as_str().to_owned(),
            human(now.since(app.since)),
            app.reason.clone(),
        ]);
    }
    // An unreadable key is some user's app all the same: list it where they look for it.
    for problem in &shown.unreadable {
        let reason = match &problem.hint {
            Some(hint) => format!("{} ({hint})", problem.message),
            None => problem.message.clone(),
        };
        let name = problem.key.clone();
        let dash = || "-".to_owned();
        rows.push(vec![name, dash(), dash(), dash(), dash(), State::Invalid.as_str().to_owned(), dash(), reason]);
    }
    printer.table(&rows);
    if is_folded {
        printer.line(&format!("{} more apps have converged", well.len()));
    }
    for verdict in
        shown.apps.iter().filter_map(|a| a.verdict.as_ref().map(|v| (a, v))).filter(|(_, v)| !v.log_tail.is_empty())
    {
        printer.line(&format!("\nthe last lines of {} {}:", verdict.0.app, verdict.1.release));
        for line in verdict.1.log_tail.lines() {
            printer.line(&format!("  {line}"));
        }
    }
    if let Some(proxy) = &shown.proxy {
        printer.error(&format!("note: {proxy}"));
    }
    if let Some(why) = &shown.tcp_routes {
        printer.error(&format!("note: TCP apps get published ports, and nginx is reloaded for them: {why}"));
    }
    if let Some(block) = &shown.store_block {
        printer.error(&format!("note: the store is not trusted, and nothing changes: {block}"));
    }
    if let Some(since) = &shown.stale_since {
        printer.error(&format!("note: the agent runs on the state kept on disk, last confirmed at {since}"));
    }
    if let Some(error) = &shown.store_error {
        printer.error(&format!("note: the store cannot be read now: {error}"));
    }
    Ok(())
}
