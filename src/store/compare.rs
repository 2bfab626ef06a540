//! What a store would change on a host, for whoever is to accept it; and the making of its identity.

use std::collections::BTreeSet;

use etcd_client::{Compare, CompareOp, Txn, TxnOp};

use super::{
    belief::{Viewer, recall, unproven},
    client::{Connection, EtcdConfig, StoreError},
    ledger::{LedgerError, Shelf},
    read::{Contents, Reader, Reading, random_id, read},
    standing::{Acceptance, Found, Identity},
};
use crate::model::{
    desired::{DesiredApp, Snapshot},
    name::AppName,
    release::ReleaseKey,
    status::StoreBlock,
    time::Timestamp,
};

/// A store, held against what an agent last believed.
#[derive(Debug, Clone)]
pub struct Comparison {
    /// Which store it is.
    pub found: Identity,
    /// What the agent last believed, if it kept anything.
    pub known: Option<Identity>,
    /// Why what it kept cannot be used, if it cannot.
    pub lost: Option<LedgerError>,
    /// Why the agent does not take it, if it does not.
    pub block: Option<StoreBlock>,
    /// Apps that would leave this host.
    pub leaving: BTreeSet<AppName>,
    /// Apps that would come.
    pub coming: BTreeSet<AppName>,
    /// Apps that would get another release.
    pub changing: BTreeSet<AppName>,
    /// What it says.
    pub snapshot: Snapshot,
    /// What the agent goes by now: what the store says, or, while it does not take that, what it took last.
    pub acting: Snapshot,
}

impl Comparison {
    /// What to write down for an agent, if all of this is accepted.
    pub fn accept(&self) -> Acceptance {
        let kind = self.block.as_ref().map(|block| block.kind.clone());
        Acceptance {
            identity: Some(self.found.clone()),
            leaving: self.leaving.clone(),
            kind,
            at: Some(Timestamp::now()),
        }
    }
}

/// Reads a store, and holds it against what the agent of this host last believed. Writes nothing.
///
/// # Errors
/// If no member answers; the last error.
pub async fn compare(config: &EtcdConfig, viewer: &Viewer, shelf: &dyn Shelf) -> Result<Comparison, StoreError> {
    let mut reader = Reader::new(viewer.host.clone(), viewer.labels.clone());
    let (standing, kept) = recall(shelf, viewer, &config.prefix, &mut reader);
    let (kept, lost) = match kept {
        Ok(kept) => (kept, None),
        Err(e) => (None, Some(e)),
    };
    let landmark = kept.as_ref().and_then(|(ledger, _)| ledger.landmark());
    let ask = async |connection: Connection| read(&connection, &config.prefix, landmark.clone()).await;
    let Reading { contents, identity: found, key, forgotten } = super::each_member(config, ask).await?;
    // A store without a key gets the one that is known; without one any will do, since nothing is made by it.
    let known = kept.as_ref().map(|(ledger, _)| ledger.key.clone());
    let key = key.or(known).unwrap_or_else(|| ReleaseKey::new(""));
    let after = reader.snapshot(&contents, &key);
    let nothing = Contents::default();
    let before = kept.as_ref().map_or(&nothing, |(ledger, _)| &ledger.contents);
    let judged = Found { identity: &found, contents: &contents, snapshot: &after, forgotten: forgotten.as_ref() };
    let block = standing.judge(judged, before, viewer.brake, &Acceptance::default()).err();
    let before = kept.map(|(_, snapshot)| snapshot).unwrap_or_default();
    let wanted = |snapshot: &Snapshot, app: &AppName| match snapshot.apps.get(app) {
        None | Some(DesiredApp::Absent(_)) => None,
        Some(DesiredApp::Run(target)) => Some(Some(target.release.id.clone())),
        Some(_) => Some(None),
    };
    let all: BTreeSet<AppName> = standing.here.iter().chain(after.apps.keys()).cloned().collect();
    let of = |fits: &dyn Fn(&AppName) -> bool| all.iter().filter(|a| fits(a)).cloned().collect();
    Ok(Comparison {
        leaving: standing.leaving(&after),
        coming: of(&|a| !standing.here.contains(a) && wanted(&after, a).is_some()),
        changing: of(&|a| match (wanted(&before, a), wanted(&after, a)) {
            (Some(old), Some(new)) => old != new,
            _ => false,
        }),
        acting: if block.is_some() { unproven(before) } else { after.clone() },
        known: standing.identity,
        lost,
        found,
        block,
        snapshot: after,
    })
}

/// Gives a store its identity, the `cluster` key; or tells the one that it has. True if it was made.
///
/// # Errors
/// If no member answers, or it may not be written.
pub async fn init(config: &EtcdConfig) -> Result<(String, bool), StoreError> {
    let id = random_id().map_err(|source| StoreError::File { path: "/dev/urandom".into(), source })?;
    let id = &id[..16];
    let key = config.prefix.key("cluster");
    super::each_member(config, async |mut connection: Connection| {
        let failed = connection.failed("making the `cluster` key");
        // Whoever is first makes it; everybody else is told what the first one made.
        let create = Txn::new()
            .when([Compare::create_revision(key.clone(), CompareOp::Equal, 0)])
            .and_then([TxnOp::put(key.clone(), id, None)])
            .or_else([TxnOp::get(key.clone(), None)]);
        let answer = connection.client.txn(create).await.map_err(&failed)?;
        if answer.succeeded() {
            return Ok((id.to_owned(), true));
        }
        let found = answer.op_responses().into_iter().find_map(|response| match response {
            etcd_client::TxnOpResponse::Get(get) => {
                get.kvs().first().map(|kv| String::from_utf8_lossy(kv.value()).trim().to_owned())
            }
            _ => None,
        });
        Ok((found.unwrap_or_default(), false))
    })
    .await
}
