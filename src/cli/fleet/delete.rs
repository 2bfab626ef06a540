//! `demae delete`

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{IsTerminal as _, stdin},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    Changes, Fleet, StoreArgs,
    attempts::{Waited, attempts},
    commit,
    env::users,
    no_app, until,
};
use crate::{
    cli::{Ended, Exit, Failed, Format, print::Printer, runtime},
    model::{
        name::{AppName, HostName, SetName},
        status::VERSION,
        text::{self, json},
    },
    store::{Edit, StoreError, client::EtcdConfig, keys::Key},
};

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// The app
    #[arg(value_name = "APP")]
    app: String,
    /// Without asking
    #[arg(long)]
    yes: bool,
    /// Also its own variables, `env/APP/`
    #[arg(long)]
    env: bool,
    /// Longest wait
    #[arg(long, value_name = "DURATION", default_value = "15m")]
    timeout: String,
    /// Do not wait
    #[arg(long)]
    detach: bool,
    #[command(flatten)]
    store: StoreArgs,
}

pub(in crate::cli) fn run(args: &Args, printer: &mut Printer) -> Ended {
    let config = args.store.etcd_to_write(printer)?;
    let app = AppName::try_from(args.app.as_str())?;
    let timeout = text::duration(&args.timeout).map_err(|e| Failed::usage(format!("--timeout: {e}")))?;
    if !args.yes && !stdin().is_terminal() {
        return Err(Failed::because(format!(
            "this removes {app} from every host; without a terminal, say so by `--yes`"
        )));
    }
    runtime(1)?.block_on(async {
        if !args.yes {
            let fleet = Fleet::read(&config).await?;
            confirm(&fleet, &app, printer)?;
        }
        let (revision, ()) = commit(&config, None, |fleet| Ok((edit(fleet, &app, args.env)?, ()))).await?;
        if args.detach {
            printer.line(&format!("{app} is to be removed (revision {revision})"));
            return Ok(Exit::Success);
        }
        wait_gone(&config, &app, (revision, Format::Text), timeout, printer).await
    })
}

/// Asks for the name of the app.
fn confirm(fleet: &Fleet, app: &AppName, printer: &mut Printer) -> Result<(), Failed> {
    let hosts = fleet.statuses.get(app).map_or(0, BTreeMap::len);
    printer.error(&format!("This removes {app} from {hosts} hosts, with its containers. Type its name to go on:"));
    let mut line = String::new();
    stdin().read_line(&mut line)?;
    if line.trim() == app.as_str() { Ok(()) } else { Err(Failed::because("nothing was written")) }
}

/// Deletes all that people wrote about an app.
pub(super) fn edit(fleet: &Fleet, app: &AppName, env: bool) -> Result<Edit, Failed> {
    let spec = Key::Spec(app.clone());
    if fleet.contents.entry(&spec).is_none() {
        // One that was interrupted goes on.
        return if hosts_with(fleet, app).is_empty() { Err(no_app(app)) } else { Ok(Edit::default()) };
    }
    let keys = [Key::Image, Key::Restart, Key::Paused, Key::Pin, Key::Promote, Key::Retry, Key::By];
    let mut set = None;
    let mut deletes: Vec<Key> = keys.iter().map(|key| key(app.clone())).collect();
    if env {
        let own = SetName::try_from(app.as_str())?;
        let others: Vec<&str> =
            users(fleet, &own).into_iter().filter(|user| *user != app).map(AppName::as_str).collect();
        if !others.is_empty() {
            return Err(Failed::because(format!(
                "`env/{own}/` is also used by {} (`env_from` in the spec); without `--env` it stays",
                others.join(", ")
            )));
        }
        set = Some(own);
    }
    deletes.retain(|key| fleet.contents.entry(key).is_some());
    deletes.insert(0, spec.clone());
    Ok(Edit { unchanged: vec![(spec.clone(), fleet.modified(&spec))], deletes, set, ..Edit::default() })
}

/// How long no host must have it before it is said to be gone: one that was about to start it says so within seconds.
const SETTLED: Duration = Duration::from_secs(5);

/// Hosts that report the app, also in words that this version cannot read.
fn hosts_with(fleet: &Fleet, app: &AppName) -> BTreeSet<HostName> {
    let reports = fleet.contents.records.served.keys();
    reports.filter(|(of, _)| of == app).map(|(_, host)| host.clone()).collect()
}

/// Waits until no host has the app.
pub(super) async fn wait_gone(
    config: &EtcdConfig,
    app: &AppName,
    (revision, format): (i64, Format),
    timeout: Duration,
    printer: &mut Printer,
) -> Ended {
    let again = format!("it goes on; `demae status --fleet {app}` shows how far it is");
    let (mut left, settled) = (BTreeSet::new(), Instant::now() + SETTLED);
    let ended = attempts(Instant::now() + timeout, async |turn| {
        match leave(config, turn, app, (&mut left, settled), printer).await {
            Ok(exit) => {
                if exit == Exit::Success {
                    forget(config, app, printer).await;
                    let at = if revision > 0 { format!(" (revision {revision})") } else { String::new() };
                    printer.line(&match format {
                        Format::Text => format!("{app} is removed{at}"),
                        Format::Json => {
                            json(&serde_json::json!({ "version": VERSION, "app": app, "outcome": "removed" }))
                        }
                    });
                }
                Some(exit)
            }
            Err(e) => {
                printer.error(&format!("note: the store cannot be read now: {e}"));
                None
            }
        }
    });
    match ended.await? {
        Waited::Done(exit) => Ok(exit),
        Waited::TimedOut => {
            printer.error(&format!(
                "{app} is not removed in time; {again}, and `demae status` on a host what holds it up"
            ));
            Ok(Exit::Undecided)
        }
        Waited::Interrupted => {
            printer.error(&format!("stopped waiting; {again}"));
            Ok(Exit::Interrupted)
        }
    }
}

/// Most hosts whose records go in one transaction, with two each: etcd takes 128 operations.
const MOST_HOSTS: usize = 50;

/// Deletes what the fleet has kept of an app that is gone everywhere. Without the rights for it, or if it is deployed again
/// at this moment, that stays, and does no harm.
async fn forget(config: &EtcdConfig, app: &AppName, printer: &mut Printer) {
    let decide = |fleet: &Fleet| {
        let spec = Key::Spec(app.clone());
        if fleet.contents.entry(&spec).is_some() {
            return Ok((Edit::default(), ()));
        }
        let records = &fleet.contents.records;
        let hosts: BTreeSet<&HostName> = records
            .proofs
            .keys()
            .map(|(of, host)| (of, host))
            .chain(records.permits.keys().map(|(of, host)| (of, host)))
            .filter(|(of, _)| *of == app)
            .map(|(_, host)| host)
            .take(MOST_HOSTS)
            .collect();
        let forgotten = Some((app.clone(), hosts.into_iter().cloned().collect()));
        Ok((Edit { unchanged: vec![(spec, 0)], forgotten, ..Edit::default() }, ()))
    };
    if let Err(failed) = commit(config, None, decide).await {
        printer.error(&format!("note: the records of its releases are still in the store: {}", failed.message));
    }
}

async fn leave(
    config: &EtcdConfig,
    turn: usize,
    app: &AppName,
    (left, settled): (&mut BTreeSet<HostName>, Instant),
    printer: &mut Printer,
) -> Result<Exit, StoreError> {
    let mut fleet = match Fleet::read_from(config, turn).await? {
        Ok(fleet) => fleet,
        Err(failed) => {
            printer.error(&format!("error: {}", failed.message));
            return Ok(failed.exit);
        }
    };
    let mut changes: Changes = fleet.changes().await?;
    loop {
        if fleet.contents.entry(&Key::Spec(app.clone())).is_some() {
            printer.error(&format!("demae: {app} was deployed again meanwhile"));
            return Ok(Exit::Superseded);
        }
        let here = hosts_with(&fleet, app);
        for host in left.difference(&here) {
            printer.error(&format!("{host}  {app} is removed"));
        }
        // A host that had just begun to bring it up has not said so yet.
        let now = Instant::now();
        if here.is_empty() && now >= settled {
            return Ok(Exit::Success);
        }
        if here != *left && !here.is_empty() {
            let hosts: Vec<&str> = here.iter().map(HostName::as_str).collect();
            printer.error(&format!("waiting until {app} has left {}", hosts.join(", ")));
        }
        let pause = here.is_empty().then_some(settled);
        *left = here;
        tokio::select! {
            news = fleet.next(&mut changes) => news?,
            () = until(pause) => {}
        }
    }
}
