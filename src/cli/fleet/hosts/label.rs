//! `demae hosts label`

use std::collections::BTreeMap;

use super::known;
use crate::{
    cli::{
        Ended, Exit, Failed,
        fleet::{Fleet, StoreArgs, write_alone},
        print::Printer,
    },
    model::{
        name::HostName,
        text::json,
        yaml::{self, Value},
    },
    store::{Edit, keys::Key},
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The host
    #[arg(value_name = "HOST", index = 1)]
    host: String,
    /// What is set; `NAME-` takes a label away
    #[arg(value_name = "NAME=VALUE", index = 2, required = true)]
    labels: Vec<String>,
    #[command(flatten)]
    store: StoreArgs,
}

/// Changes labels of a host in the store; those in the file of its agent are merged below them.
pub(super) fn run(args: &Args, printer: &mut Printer) -> Ended {
    let host = HostName::try_from(args.host.as_str())?;
    let changes = args.labels.iter().map(|text| change(text)).collect::<Result<Vec<_>, _>>()?;
    let key = Key::HostLabels(host.clone());
    let revision = write_alone(&args.store, printer, |fleet| {
        if !known(fleet).contains(&host) && fleet.contents.entry(&key).is_none() {
            return Err(Failed::because(format!("no host `{host}` is known (`demae hosts` lists them)")));
        }
        let before = labels(fleet, &key)?;
        let mut after = before.clone();
        for (name, value) in &changes {
            match value {
                Some(value) => drop(after.insert(name.clone(), value.clone())),
                None => drop(after.remove(name)),
            }
        }
        let unchanged = vec![(key.clone(), fleet.modified(&key))];
        let (mut puts, mut deletes) = (Vec::new(), Vec::new());
        if after.is_empty() && fleet.contents.entry(&key).is_some() {
            deletes.push(key.clone());
        } else if after != before {
            puts.push((key.clone(), json(&after).into_bytes()));
        }
        Ok(Edit { unchanged, puts, deletes, ..Edit::default() })
    })?;
    printer.line(&match revision {
        Some(revision) => format!("the labels of {host} are changed (revision {revision})"),
        None => format!("{host} has these labels already"),
    });
    Ok(Exit::Success)
}

/// A label that is set, or taken away.
fn change(text: &str) -> Result<(String, Option<String>), Failed> {
    match (text.split_once('='), text.strip_suffix('-')) {
        (Some((name, value)), _) if !name.is_empty() => Ok((name.to_owned(), Some(value.to_owned()))),
        (None, Some(name)) if !name.is_empty() => Ok((name.to_owned(), None)),
        _ => Err(Failed::usage(format!("`{text}`: write it like `role=web`, or `role-` to take it away"))),
    }
}

/// The labels in the store.
fn labels(fleet: &Fleet, key: &Key) -> Result<BTreeMap<String, String>, Failed> {
    let Some(entry) = fleet.contents.entry(key) else { return Ok(BTreeMap::new()) };
    let unreadable =
        |why: String| Failed::because(format!("`{key}` is not a mapping of labels, and is left as it is: {why}"));
    let node = yaml::parse(entry.value()).map_err(|e| unreadable(e.to_string()))?;
    let Value::Map(entries) = node.value else { return Err(unreadable("it is something else".to_owned())) };
    let label = |(key, node): (yaml::Key, yaml::Node)| match node.value {
        Value::Scalar { text, .. } => Ok((key.name, text)),
        _ => Err(unreadable(format!("`{}` has no single value", key.name))),
    };
    entries.into_iter().map(label).collect()
}
