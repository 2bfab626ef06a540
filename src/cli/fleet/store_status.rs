//! `demae store status`

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Fleet, StoreArgs};
use crate::{
    cli::{Ended, Exit, Format, print::Printer, runtime},
    model::{name::HostName, status::VERSION},
    store::{self, MemberState, StoreError, keys::Key},
};

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// What is printed
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
    #[command(flatten)]
    store: StoreArgs,
}

/// The JSON output.
#[derive(Debug, Serialize)]
struct Shown {
    version: u32,
    prefix: String,
    /// The id that `demae init` gave it.
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster: Option<String>,
    revision: i64,
    members: Vec<ShownMember>,
    /// The host whose agent leads the fleet.
    #[serde(skip_serializing_if = "Option::is_none")]
    leader: Option<HostName>,
    /// How many agents run, by their version.
    agents: BTreeMap<String, usize>,
    apps: usize,
    /// Why no host gets a turn, if a person froze the fleet.
    #[serde(skip_serializing_if = "Option::is_none")]
    frozen: Option<String>,
}

/// The JSON output if nothing else can be read.
#[derive(Debug, Serialize)]
struct ShownMembers {
    version: u32,
    members: Vec<ShownMember>,
}

#[derive(Debug, Serialize)]
struct ShownMember {
    endpoint: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<String>,
    leader: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    database_bytes: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    revision: Option<i64>,
    /// What is wrong with it; empty if nothing is.
    problems: Vec<String>,
}

pub(in crate::cli) fn run(args: &Args, printer: &mut Printer) -> Ended {
    let config = args.store.etcd()?;
    let (fleet, members) =
        runtime(1)?.block_on(async { (Fleet::read(&config).await, store::member_states(&config).await) });
    let fleet = match fleet {
        Ok(fleet) => fleet,
        // The members are of interest all the same.
        Err(failed) => {
            let members: Vec<ShownMember> = members.into_iter().map(shown_member).collect();
            match args.output {
                Format::Json => {
                    printer.line(&serde_json::to_string_pretty(&ShownMembers { version: VERSION, members })?);
                }
                Format::Text => print_members(&members, printer),
            }
            return Err(failed);
        }
    };
    let shown = shown(&fleet, config.prefix.as_str(), members);
    match args.output {
        Format::Json => printer.line(&serde_json::to_string_pretty(&shown)?),
        Format::Text => print(&shown, printer),
    }
    Ok(Exit::Success)
}

fn shown(fleet: &Fleet, prefix: &str, members: Vec<(String, Result<MemberState, StoreError>)>) -> Shown {
    let leader = fleet.contents.records.leader.as_ref().and_then(|leader| leader.value.as_ref());
    let mut agents = BTreeMap::new();
    for info in fleet.contents.hosts.values() {
        *agents.entry(info.agent.clone()).or_default() += 1;
    }
    Shown {
        version: VERSION,
        prefix: prefix.to_owned(),
        cluster: fleet.text(&Key::Cluster).filter(|id| !id.is_empty()),
        revision: fleet.revision,
        members: members.into_iter().map(shown_member).collect(),
        leader: leader.map(|leader| leader.host.clone()),
        agents,
        apps: fleet.contents.apps().len(),
        frozen: fleet.text(&Key::Freeze),
    }
}

fn shown_member((endpoint, state): (String, Result<MemberState, StoreError>)) -> ShownMember {
    match state {
        Ok(MemberState { version, is_leader, database_bytes, revision, errors }) => ShownMember {
            endpoint,
            version: Some(version),
            leader: is_leader,
            database_bytes: Some(database_bytes),
            revision: Some(revision),
            problems: errors,
        },
        Err(e) => ShownMember {
            endpoint,
            version: None,
            leader: false,
            database_bytes: None,
            revision: None,
            problems: vec![e.to_string()],
        },
    }
}

fn print(shown: &Shown, printer: &mut Printer) {
    let none = || "none".to_owned();
    let cluster =
        shown.cluster.clone().unwrap_or_else(|| "no id: a wipe would not be noticed (`demae init`)".to_owned());
    printer.field("Store:", &format!("{} at revision {}", shown.prefix, shown.revision));
    printer.field("Id:", &cluster);
    printer.field("Leader:", &shown.leader.as_ref().map_or_else(none, ToString::to_string));
    let agents: Vec<String> = shown.agents.iter().map(|(version, count)| format!("{count} of {version}")).collect();
    printer.field("Agents:", &if agents.is_empty() { none() } else { agents.join(", ") });
    printer.field("Apps:", &shown.apps.to_string());
    if let Some(why) = &shown.frozen {
        printer.field("Frozen:", if why.is_empty() { "no reason given" } else { why });
    }
    printer.line("");
    print_members(&shown.members, printer);
}

fn print_members(members: &[ShownMember], printer: &mut Printer) {
    let mut rows = vec![["MEMBER", "VERSION", "LEADS", "DATABASE", "REVISION", "PROBLEMS"].map(String::from).to_vec()];
    for member in members {
        let dash = || "-".to_owned();
        rows.push(vec![
            member.endpoint.clone(),
            member.version.clone().unwrap_or_else(dash),
            if member.leader { "yes".to_owned() } else { dash() },
            member.database_bytes.map_or_else(dash, |bytes| format!("{} KiB", bytes / 1024)),
            member.revision.map_or_else(dash, |revision| revision.to_string()),
            if member.problems.is_empty() { dash() } else { member.problems.join("; ") },
        ]);
    }
    printer.table(&rows);
}
