//! What people write by the command line: several keys at once, if nothing that they were decided from has changed.

use etcd_client::{Compare, CompareOp, DeleteOptions, Txn, TxnOp};

use super::{client::StoreError, fleet::FleetSession, keys::Key};
use crate::model::{
    fleet::FleetKey,
    name::{AppName, HostName, ReleaseId, SetName},
};

/// Keys that are written together, or not at all.
#[derive(Debug, Clone, Default)]
pub struct Edit {
    /// Keys that must not have changed, with their mod revisions; 0 for one that does not exist.
    pub unchanged: Vec<(Key, i64)>,
    /// Keys that are put.
    pub puts: Vec<(Key, Vec<u8>)>,
    /// Keys that are deleted.
    pub deletes: Vec<Key>,
    /// A set of variables that is deleted.
    pub set: Option<SetName>,
    /// A release whose verdicts are deleted.
    pub forgiven: Option<(AppName, ReleaseId)>,
    /// A release whose command is to run again.
    pub rerun: Option<(AppName, ReleaseId)>,
    /// An app of which nothing is to be left in the store, and the hosts that had it.
    pub forgotten: Option<(AppName, Vec<HostName>)>,
    /// A host of which nothing is to be left in the store, and the apps in whose turns it went away.
    pub gone_host: Option<(HostName, Vec<AppName>)>,
}

impl Edit {
    /// Whether it writes nothing.
    pub fn is_empty(&self) -> bool {
        let nothing = self.forgiven.is_none() && self.rerun.is_none() && self.forgotten.is_none();
        let nothing = nothing && self.gone_host.is_none();
        self.puts.is_empty() && self.deletes.is_empty() && nothing
    }
}

impl FleetSession {
    /// Makes an edit. Returns its revision; `None` if something of what it was decided from has changed.
    ///
    /// # Errors
    /// If the call fails: then it is unknown whether it was made.
    pub async fn edit(&self, edit: &Edit) -> Result<Option<i64>, StoreError> {
        let own = |key: &Key| self.prefix.key(&key.to_string());
        let unchanged = |(key, revision): &(Key, i64)| Compare::mod_revision(own(key), CompareOp::Equal, *revision);
        let conditions: Vec<Compare> = edit.unchanged.iter().map(unchanged).collect();
        let puts = edit.puts.iter().map(|(key, value)| TxnOp::put(own(key), value.clone(), None));
        let deletes = edit.deletes.iter().map(|key| TxnOp::delete(own(key), None));
        let sets = edit.set.iter().map(|set| {
            let set = self.prefix.key(&format!("env/{set}/"));
            TxnOp::delete(set, Some(DeleteOptions::new().with_prefix()))
        });
        let deletes = deletes.chain(sets);
        let forgiven = edit.forgiven.iter().map(|(app, release)| {
            TxnOp::delete(self.prefix.verdicts(app, release), Some(DeleteOptions::new().with_prefix()))
        });
        let commands = edit.rerun.iter().map(|(app, release)| {
            let key = self.prefix.fleet(&FleetKey::Command(app.clone(), release.clone()));
            TxnOp::delete(key, None)
        });
        let forgotten = edit.forgotten.iter().flat_map(|(app, hosts)| {
            let below =
                self.prefix.records_of(app).map(|key| TxnOp::delete(key, Some(DeleteOptions::new().with_prefix())));
            let of_host = |host: &HostName| {
                let keys = [FleetKey::Permit(host.clone(), app.clone()), FleetKey::Proof(host.clone(), app.clone())];
                keys.map(|key| TxnOp::delete(self.prefix.fleet(&key), None))
            };
            let rollout = TxnOp::delete(self.prefix.fleet(&FleetKey::Rollout(app.clone())), None);
            below.into_iter().chain(hosts.iter().flat_map(of_host)).chain([rollout])
        });
        let gone = edit.gone_host.iter().flat_map(|(host, lost)| {
            let below = ["hosts", "state/proven", "state/permits", "state/apps"];
            let below = below.map(|place| self.prefix.key(&format!("{place}/{host}/")));
            let below = below.map(|place| TxnOp::delete(place, Some(DeleteOptions::new().with_prefix())));
            let lost = lost.iter().map(|app| self.prefix.fleet(&FleetKey::Lost(app.clone(), host.clone())));
            let single = lost.chain([self.prefix.fence(host)]).map(|key| TxnOp::delete(key, None));
            below.into_iter().chain(single)
        });
        let writes = puts.chain(deletes).chain(forgiven).chain(commands).chain(forgotten).chain(gone);
        let writes: Vec<TxnOp> = writes.collect();
        let answer = self.connection.client.clone().txn(Txn::new().when(conditions).and_then(writes)).await;
        let answer = answer.map_err(self.connection.failed("writing the change"))?;
        Ok(answer.succeeded().then(|| answer.header().map_or(0, etcd_client::ResponseHeader::revision)))
    }
}
