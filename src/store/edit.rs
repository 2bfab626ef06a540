//! What people write by the command line: several keys at once, if nothing that they were decided from has changed.

use etcd_client::{Compare, CompareOp, DeleteOptions, Txn, TxnOp};

use super::{client::StoreError, fleet::FleetSession, keys::Key};
use crate::model::{
    fleet::FleetKey,
    name::{AppName, ReleaseId},
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
    /// A release whose verdicts are deleted.
    pub forgiven: Option<(AppName, ReleaseId)>,
    /// A release whose command is to run again.
    pub rerun: Option<(AppName, ReleaseId)>,
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
        let forgiven = edit.forgiven.iter().map(|(app, release)| {
            TxnOp::delete(self.prefix.verdicts(app, release), Some(DeleteOptions::new().with_prefix()))
        });
        let commands = edit.rerun.iter().map(|(app, release)| {
            let key = self.prefix.fleet(&FleetKey::Command(app.clone(), release.clone()));
            TxnOp::delete(key, None)
        });
        let writes: Vec<TxnOp> = puts.chain(deletes).chain(forgiven).chain(commands).collect();
        let answer = self.connection.client.clone().txn(Txn::new().when(conditions).and_then(writes)).await;
        let answer = answer.map_err(self.connection.failed("writing the change"))?;
        Ok(answer.succeeded().then(|| answer.header().map_or(0, etcd_client::ResponseHeader::revision)))
    }
}
