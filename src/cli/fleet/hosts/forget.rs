//! `demae hosts forget`

use super::{ModeArgs, known};
use crate::{
    cli::{Ended, Exit, Failed, fleet::write_alone, print::Printer},
    model::name::HostName,
    store::{Edit, keys::Key},
};

/// Most apps in one transaction: etcd takes 128 operations.
const MOST_APPS: usize = 100;

/// Deletes what a host that is gone for good has left in the store.
pub(super) fn run(args: &ModeArgs, printer: &mut Printer) -> Ended {
    let host = HostName::try_from(args.host.as_str())?;
    let revision = write_alone(&args.store, printer, |fleet| {
        if fleet.contents.hosts.contains_key(&host) {
            return Err(Failed::because(format!(
                "the agent of {host} is up: drain it first (`demae hosts drain {host}`), and stop its agent"
            )));
        }
        let keys = [Key::HostMode(host.clone()), Key::HostLabels(host.clone())];
        if !known(fleet).contains(&host) && keys.iter().all(|key| fleet.contents.entry(key).is_none()) {
            return Err(Failed::because(format!("no host `{host}` is known (`demae hosts` lists them)")));
        }
        let records = &fleet.contents.records;
        if let Some((_, app)) = records.permits.keys().map(|(app, of)| (of, app)).find(|(of, _)| **of == host) {
            return Err(Failed::because(format!(
                "{host} went away in its turn for {app}, and is counted: wait until that is given up, or `demae rollback {app}`"
            )));
        }
        let lost = records.lost.keys().filter(|(_, of)| *of == host).map(|(app, _)| app.clone()).take(MOST_APPS);
        let gone_host = Some((host.clone(), lost.collect()));
        let unchanged = keys.iter().map(|key| (key.clone(), fleet.modified(key))).collect();
        Ok(Edit { unchanged, gone_host, ..Edit::default() })
    })?;
    let revision = revision.map(|revision| format!(" (revision {revision})")).unwrap_or_default();
    printer.line(&format!("{host} is forgotten{revision}"));
    Ok(Exit::Success)
}
