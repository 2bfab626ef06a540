//! `demae hosts`

mod forget;
mod label;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use serde::Serialize;
use tokio::time::Instant;

use super::{
    Fleet, StoreArgs,
    attempts::{Waited, attempts},
    commit,
};
use crate::{
    cli::{Ended, Exit, Failed, Format, print::Printer, runtime},
    model::{
        desired::HostMode,
        fleet::Capacity,
        name::{AppName, HostName},
        status::{AppStatus, State, VERSION},
        text,
    },
    rollout::takes_turns,
    store::{Edit, StoreError, client::EtcdConfig, keys::Key},
};

#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(in crate::cli) struct Args {
    /// What is printed
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
    #[command(subcommand)]
    verb: Option<HostsVerb>,
    #[command(flatten)]
    store: StoreArgs,
}

#[derive(Debug, clap::Subcommand)]
enum HostsVerb {
    /// Keep what runs on a host, and start nothing new there
    Cordon(ModeArgs),
    /// Let a host take apps again
    Activate(ModeArgs),
    /// Remove all apps from a host, and wait until they have left
    Drain(DrainArgs),
    /// Set labels of a host, or take some away
    Label(label::Args),
    /// Delete what a host that is gone for good has left in the store
    Forget(ModeArgs),
}

#[derive(Debug, clap::Args)]
struct ModeArgs {
    /// The host
    #[arg(value_name = "HOST", index = 1)]
    host: String,
    #[command(flatten)]
    store: StoreArgs,
}

#[derive(Debug, clap::Args)]
struct DrainArgs {
    /// Also if an app then serves on no host
    #[arg(long)]
    force: bool,
    /// Longest wait
    #[arg(long, value_name = "DURATION", default_value = "15m")]
    timeout: String,
    /// Do not wait
    #[arg(long)]
    detach: bool,
    #[command(flatten)]
    mode: ModeArgs,
}

/// One host in the JSON output.
#[derive(Debug, Serialize)]
struct Shown {
    host: HostName,
    up: bool,
    mode: &'static str,
    leader: bool,
    rollouts: bool,
    agent: String,
    apps: usize,
    /// Apps that are not converged.
    trouble: Vec<AppName>,
    labels: BTreeMap<String, String>,
    /// From which it reaches etcd.
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<IpAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    capacity: Option<Capacity>,
}

#[derive(Debug, Serialize)]
struct ShownAll {
    version: u32,
    hosts: Vec<Shown>,
}

pub(in crate::cli) fn run(args: &Args, printer: &mut Printer) -> Ended {
    match &args.verb {
        None => {
            let config = args.store.etcd()?;
            list(&runtime(1)?.block_on(Fleet::read(&config))?, args.output, printer)
        }
        Some(HostsVerb::Cordon(args)) => set(args, HostMode::Cordoned, printer),
        Some(HostsVerb::Activate(args)) => set(args, HostMode::Active, printer),
        Some(HostsVerb::Drain(args)) => drain(args, printer),
        Some(HostsVerb::Label(args)) => label::run(args, printer),
        Some(HostsVerb::Forget(args)) => forget::run(args, printer),
    }
}

fn list(fleet: &Fleet, format: Format, printer: &mut Printer) -> Ended {
    let hosts: Vec<Shown> = known(fleet).into_iter().map(|host| shown(fleet, host)).collect();
    if format == Format::Json {
        printer.line(&serde_json::to_string_pretty(&ShownAll { version: VERSION, hosts })?);
        return Ok(Exit::Success);
    }
    let mut rows = vec![
        ["HOST", "MODE", "APPS", "TROUBLE", "CPUS", "MEMORY", "DISK", "ADDRESS", "AGENT", "LEADS", "LABELS"]
            .map(String::from)
            .to_vec(),
    ];
    let dash = |text: String| if text.is_empty() { "-".to_owned() } else { text };
    for host in &hosts {
        let labels: Vec<String> = host.labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
        rows.push(vec![
            host.host.to_string(),
            if host.up { host.mode.to_owned() } else { format!("down, {}", host.mode) },
            host.apps.to_string(),
            dash(host.trouble.iter().map(AppName::as_str).collect::<Vec<_>>().join(",")),
            dash(host.capacity.as_ref().map(|c| c.cpus.to_string()).unwrap_or_default()),
            dash(host.capacity.as_ref().map(|c| gib(c.memory_bytes)).unwrap_or_default()),
            dash(host.capacity.as_ref().and_then(|c| c.disk_bytes).map(gib).unwrap_or_default()),
            dash(host.address.map(|address| address.to_string()).unwrap_or_default()),
            dash(host.agent.clone()),
            if host.leader { "yes" } else { "-" }.to_owned(),
            dash(labels.join(",")),
        ]);
    }
    printer.table(&rows);
    if hosts.iter().any(|host| host.rollouts) && !hosts.iter().any(|host| host.leader) {
        printer.error("note: no agent leads the fleet, so no host gets a turn (`rollouts.lead` in the agents' files)");
    }
    Ok(Exit::Success)
}

fn gib(bytes: u64) -> String {
    let tenths = bytes * 10 / (1 << 30);
    format!("{}.{} GiB", tenths / 10, tenths % 10)
}

/// Hosts that are up, and those that have left something behind.
fn known(fleet: &Fleet) -> BTreeSet<HostName> {
    let records = &fleet.contents.records;
    let proofs = records.proofs.iter().filter(|(_, proof)| proof.value.as_ref().is_some_and(|p| p.release.is_some()));
    let away = proofs.map(|((_, host), _)| host).chain(records.permits.keys().map(|(_, host)| host));
    fleet.contents.hosts.keys().chain(away).cloned().collect()
}

fn shown(fleet: &Fleet, host: HostName) -> Shown {
    let info = fleet.contents.hosts.get(&host);
    let here = || fleet.statuses.iter().filter_map(|(app, hosts)| Some((app, &hosts.get(&host)?.0)));
    let asked = fleet.text(&Key::HostMode(host.clone()));
    let mode = match (info, asked.as_deref()) {
        (Some(info), _) => info.mode,
        (None, Some("drained")) => HostMode::Drained,
        (None, Some("cordoned")) => HostMode::Cordoned,
        _ => HostMode::Active,
    };
    let leader = fleet.contents.records.leader.as_ref().and_then(|leader| leader.value.as_ref());
    Shown {
        up: info.is_some(),
        mode: mode.as_str(),
        leader: leader.is_some_and(|leader| leader.host == host),
        rollouts: info.is_some_and(takes_turns),
        agent: info.map(|info| info.agent.clone()).unwrap_or_default(),
        apps: here().count(),
        trouble: here().filter(|(_, s)| s.state != State::Converged).map(|(app, _)| app.clone()).collect(),
        labels: info.map(|info| info.labels.clone()).unwrap_or_default(),
        address: info.and_then(|info| info.address),
        capacity: info.and_then(|info| info.capacity.clone()),
        host,
    }
}

/// Writes the mode of a host.
async fn write_mode(
    config: &EtcdConfig,
    host: &HostName,
    mode: HostMode,
    check: impl Fn(&Fleet) -> Result<(), Failed>,
) -> Result<(), Failed> {
    let key = Key::HostMode(host.clone());
    let decide = |fleet: &Fleet| {
        if !known(fleet).contains(host) && fleet.contents.entry(&key).is_none() {
            return Err(Failed::because(format!("no host `{host}` is known (`demae hosts` lists them)")));
        }
        check(fleet)?;
        // Two drains at once must not rely on each other's host.
        let mut read = if mode == HostMode::Drained { relied_on(fleet, host) } else { BTreeSet::new() };
        read.insert(host.clone());
        let unchanged = read.into_iter().map(Key::HostMode).map(|key| (key.clone(), fleet.modified(&key))).collect();
        let edit = match mode {
            HostMode::Active if fleet.contents.entry(&key).is_none() => Edit::default(),
            HostMode::Active => Edit { unchanged, deletes: vec![key.clone()], ..Edit::default() },
            _ => Edit { unchanged, puts: vec![(key.clone(), mode.as_str().into())], ..Edit::default() },
        };
        Ok((edit, ()))
    };
    commit(config, None, decide).await.map(drop)
}

fn set(args: &ModeArgs, mode: HostMode, printer: &mut Printer) -> Ended {
    let (config, host) = (args.store.etcd_to_write(printer)?, HostName::try_from(args.host.as_str())?);
    runtime(1)?.block_on(write_mode(&config, &host, mode, |_| Ok(())))?;
    printer.line(&format!("{host} is {}", mode.as_str()));
    Ok(Exit::Success)
}

fn drain(args: &DrainArgs, printer: &mut Printer) -> Ended {
    let (config, host) = (args.mode.store.etcd_to_write(printer)?, HostName::try_from(args.mode.host.as_str())?);
    let timeout = text::duration(&args.timeout).map_err(|e| Failed::usage(format!("--timeout: {e}")))?;
    let check = |fleet: &Fleet| match last_of(fleet, &host) {
        apps if apps.is_empty() || args.force => Ok(()),
        apps => Err(Failed::because(format!(
            "{} would serve nowhere without {host} (`--force` drains it all the same)",
            apps.join(", ")
        ))),
    };
    runtime(1)?.block_on(async {
        write_mode(&config, &host, HostMode::Drained, check).await?;
        if args.detach {
            printer.line(&format!("{host} is to be drained"));
            return Ok(Exit::Success);
        }
        let deadline = Instant::now() + timeout;
        let mut left = BTreeSet::new();
        let ended = attempts(deadline, async |turn| match wait_empty(&config, turn, &host, &mut left, printer).await {
            Ok(exit) => Some(exit),
            Err(e) => {
                printer.error(&format!("note: the store cannot be read now: {e}"));
                None
            }
        });
        let again = format!("it goes on. To wait again: demae hosts drain {host}");
        match ended.await? {
            Waited::Done(exit) => Ok(exit),
            Waited::TimedOut => {
                printer.error(&format!("not drained within {}; {again}", args.timeout));
                Ok(Exit::Undecided)
            }
            Waited::Interrupted => {
                printer.error(&format!("stopped waiting; {again}"));
                Ok(Exit::Interrupted)
            }
        }
    })
}

/// Another host that serves an app and stays, if there is one.
fn other_server<'f>(fleet: &'f Fleet, app: &AppName, host: &HostName) -> Option<&'f HostName> {
    let is_drained = |other: &HostName| fleet.text(&Key::HostMode(other.clone())).as_deref() == Some("drained");
    let stays = |other: &HostName| other != host && fleet.contents.hosts.contains_key(other) && !is_drained(other);
    let hosts = fleet.statuses.get(app)?.iter();
    hosts.filter(|(other, (status, _))| stays(other) && status.healthy > 0).map(|(other, _)| other).next()
}

/// Apps that a host serves.
fn served<'f>(fleet: &'f Fleet, host: &'f HostName) -> impl Iterator<Item = &'f AppName> {
    let serves = move |hosts: &BTreeMap<HostName, (AppStatus, i64)>| {
        hosts.get(host).is_some_and(|(status, _)| status.healthy > 0)
    };
    fleet.statuses.iter().filter(move |(_, hosts)| serves(hosts)).map(|(app, _)| app)
}

/// Apps that serve on this host, and on no other one that is up and stays.
fn last_of(fleet: &Fleet, host: &HostName) -> Vec<String> {
    let is_last = |app: &&AppName| other_server(fleet, app, host).is_none();
    served(fleet, host).filter(is_last).map(AppName::to_string).collect()
}

/// Hosts that must stay for what this one serves: one for each app, as many as etcd compares at once.
fn relied_on(fleet: &Fleet, host: &HostName) -> BTreeSet<HostName> {
    served(fleet, host).filter_map(|app| other_server(fleet, app, host)).take(100).cloned().collect()
}

/// Waits until no app is on a host.
async fn wait_empty(
    config: &EtcdConfig,
    turn: usize,
    host: &HostName,
    left: &mut BTreeSet<AppName>,
    printer: &mut Printer,
) -> Result<Exit, StoreError> {
    let mut fleet = match Fleet::read_from(config, turn).await? {
        Ok(fleet) => fleet,
        Err(failed) => {
            printer.error(&format!("error: {}", failed.message));
            return Ok(Exit::Failure);
        }
    };
    let mut changes = fleet.changes().await?;
    loop {
        let here: BTreeSet<AppName> =
            fleet.statuses.iter().filter(|(_, hosts)| hosts.contains_key(host)).map(|(app, _)| app.clone()).collect();
        for app in left.difference(&here) {
            printer.error(&format!("{app} has left {host}"));
        }
        left.clone_from(&here);
        let Some(info) = fleet.contents.hosts.get(host) else {
            printer.error(&format!("{host} is down: its apps are removed once its agent is back"));
            return Ok(Exit::Blocked);
        };
        if info.mode == HostMode::Drained && here.is_empty() {
            printer.line(&format!("{host} is drained"));
            return Ok(Exit::Success);
        }
        if fleet.text(&Key::HostMode(host.clone())).as_deref() != Some("drained") {
            printer.error(&format!("the mode of {host} was changed meanwhile"));
            return Ok(Exit::Superseded);
        }
        fleet.next(&mut changes).await?;
    }
}
