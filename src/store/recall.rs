//! What an agent finds in its ledger.

use super::{
    contents::Entry,
    interpret::Interpreter,
    keys::Prefix,
    trust::{Head, Ledger, LedgerError, StateStore, StoreTrust},
    update::Viewer,
};
use crate::model::{
    desired::{DesiredApp, Snapshot},
    name::AppName,
};

/// What an earlier agent accepted last.
pub(super) struct Recalled {
    pub(super) ledger: Ledger,
    /// What it means for this host.
    pub(super) snapshot: Snapshot,
    /// The revision of the last read or comparison: every key that the store held then was known.
    pub(super) proven: i64,
}

/// What an earlier agent accepted, or why it is lost, and the trust that follows from it.
pub(super) fn recall(
    disk: &dyn StateStore,
    viewer: &Viewer,
    prefix: &Prefix,
    interpreter: &mut Interpreter,
) -> (StoreTrust, Result<Option<Recalled>, LedgerError>) {
    let mut trust = StoreTrust { placed_apps: viewer.traces.clone(), ..StoreTrust::default() };
    let read = disk.ledger().map_err(LedgerError::Read);
    let parsed = read.and_then(|text| text.map(|text| Ledger::parse(&text, &viewer.host, prefix)).transpose());
    match parsed {
        Ok(None) => {
            // Apps have left traces here, and what an earlier agent accepted is gone: as if the ledger were damaged.
            trust.ledger_lost = !viewer.traces.is_empty();
            (trust, Ok(None))
        }
        Ok(Some(mut ledger)) => {
            let is_of_host = |(key, _): &(&Vec<u8>, &Entry)| key.starts_with(b"hosts/");
            let hosts =
                ledger.contents.entries.iter().filter(is_of_host).map(|(k, e)| (k.clone(), e.clone())).collect();
            for (app, entries) in &ledger.last_good {
                interpreter.remember(app, entries, &hosts, &ledger.key);
            }
            let snapshot = interpreter.snapshot(&ledger.contents, &ledger.key);
            let head = disk.head().and_then(|text| serde_json::from_slice::<Head>(&text).ok());
            let head = head.filter(|head| head.etcd == ledger.identity.etcd);
            let proven = head.as_ref().map_or(i64::MAX, |head| head.revision).min(ledger.contents.revision);
            // An older head is of a store that was there before this one was accepted.
            if let Some(head) = head.filter(|head| head.proven >= ledger.saved) {
                ledger.identity.revision = ledger.identity.revision.max(head.revision);
                ledger.saved = ledger.saved.max(head.proven);
            }
            trust.accept(ledger.identity.clone(), &snapshot);
            trust.quarantine = ledger.quarantine.clone();
            trust.fleet_acceptance = ledger.fleet_acceptance.clone();
            (trust, Ok(Some(Recalled { ledger, snapshot, proven })))
        }
        Err(e) => {
            trust.distrust(&e);
            (trust, Err(e))
        }
    }
}

/// A snapshot as it holds while the store cannot be read. That an app was not wanted then is no reason to remove it now.
pub(super) fn unproven(snapshot: Snapshot) -> Snapshot {
    let keep = |(app, desired): (AppName, DesiredApp)| {
        let desired = match desired {
            DesiredApp::Absent(why) => DesiredApp::Unknown(format!("{why}, as the store last said")),
            other => other,
        };
        (app, desired)
    };
    Snapshot { proven: false, apps: snapshot.apps.into_iter().map(keep).collect(), ..snapshot }
}
