//! What a store would change on a host, for a person who is to accept it; the acceptance for the fleet; the creation of
//! a store's identity.

use std::collections::BTreeSet;

use etcd_client::{Compare, CompareOp, Txn, TxnOp};

use super::{
    client::{Connection, EtcdConfig, StoreError},
    contents::Contents,
    interpret::Interpreter,
    keys::Key,
    random_id,
    read::{Reading, read},
    recall::{recall, unproven},
    trust::{
        Acceptance, Acceptances, Continuity, FLEET_ACCEPTANCE_VERSION, FleetAcceptance, Found, Identity, LedgerError,
        StateStore,
    },
    update::Viewer,
};
use crate::model::{
    desired::{DesiredApp, Snapshot},
    name::AppName,
    release::ReleaseKey,
    status::StoreBlock,
    text::json,
    time::Timestamp,
};

/// A store, compared with what an agent last accepted.
#[derive(Debug, Clone)]
pub struct Comparison {
    /// The identity of the store.
    pub found: Identity,
    /// The identity that the agent last accepted, if its ledger has one.
    pub known: Option<Identity>,
    /// Why its ledger cannot be used, if it cannot.
    pub lost: Option<LedgerError>,
    /// Why the agent does not trust the store, if it does not.
    pub block: Option<StoreBlock>,
    /// Apps that would be removed from this host.
    pub leaving: BTreeSet<AppName>,
    /// Apps that would be added.
    pub coming: BTreeSet<AppName>,
    /// Apps that would get another release.
    pub changing: BTreeSet<AppName>,
    /// Apps that the store has no spec of and the ledger has: every host that runs them would remove them.
    pub missing: BTreeSet<AppName>,
    /// The desired state of this host by the store.
    pub snapshot: Snapshot,
    /// The desired state that the agent works by now: that of the store, or, while it is not trusted, the last accepted.
    pub acting: Snapshot,
}

impl Comparison {
    /// The acceptance of all of this on this host.
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

/// Reads a store, and compares it with what the agent of this host last accepted. Writes nothing.
///
/// # Errors
/// If no member answers; the last error.
pub async fn compare(config: &EtcdConfig, viewer: &Viewer, disk: &dyn StateStore) -> Result<Comparison, StoreError> {
    let mut reader = Interpreter::new(viewer.host.clone(), viewer.labels.clone());
    let (trust, kept) = recall(disk, viewer, &config.prefix, &mut reader);
    let (kept, lost) = match kept {
        Ok(kept) => (kept, None),
        Err(e) => (None, Some(e)),
    };
    let newest = kept.as_ref().and_then(|kept| kept.ledger.contents.newest());
    let ask = async |connection: Connection| read(&connection, &config.prefix, &viewer.host, newest.as_ref()).await;
    let Reading { contents, identity: found, key, fence, fleet_acceptance, has_newest } =
        super::each_member(config, ask).await?;
    // A store without a key gets the one that is known; without one any will do, since nothing is made by it.
    let known = kept.as_ref().map(|kept| kept.ledger.key.clone());
    let key = key.or(known).unwrap_or_else(|| ReleaseKey::new(""));
    let after = reader.snapshot(&contents, &key);
    let nothing = Contents::default();
    let before = kept.as_ref().map_or(&nothing, |kept| &kept.ledger.contents);
    let record = kept.as_ref().and_then(|kept| kept.ledger.fence.clone()).unwrap_or_default();
    let is_unchanged = kept.as_ref().is_some_and(|kept| kept.snapshot.has_same_effect(&after));
    let continuity = Continuity::Read { fence: record.compare(fence.as_ref()), has_newest, is_unchanged };
    let judged = Found { identity: &found, contents: &contents, snapshot: &after, continuity };
    let accepted = Acceptances { fleet: fleet_acceptance, ..Acceptances::default() };
    let block = trust.judge(judged, before, viewer.brake, &accepted).err();
    let specs = |contents: &Contents| -> BTreeSet<AppName> {
        let apps = contents.entries.keys().filter_map(|key| match Key::parse(key) {
            Ok(Key::Spec(app)) => Some(app),
            _ => None,
        });
        apps.collect()
    };
    let missing = specs(before).difference(&specs(&contents)).cloned().collect();
    let before = kept.map(|kept| kept.snapshot).unwrap_or_default();
    let wanted = |snapshot: &Snapshot, app: &AppName| match snapshot.apps.get(app) {
        None | Some(DesiredApp::Absent(_)) => None,
        Some(DesiredApp::Run(target)) => Some(Some(target.release.id.clone())),
        Some(_) => Some(None),
    };
    let all: BTreeSet<AppName> = trust.placed_apps.iter().chain(after.apps.keys()).cloned().collect();
    let of = |fits: &dyn Fn(&AppName) -> bool| all.iter().filter(|a| fits(a)).cloned().collect();
    Ok(Comparison {
        leaving: trust.leaving(&after),
        coming: of(&|a| !trust.placed_apps.contains(a) && wanted(&after, a).is_some()),
        changing: of(&|a| match (wanted(&before, a), wanted(&after, a)) {
            (Some(old), Some(new)) => old != new,
            _ => false,
        }),
        missing,
        acting: if block.is_some() { unproven(before) } else { after.clone() },
        known: trust.identity,
        lost,
        found,
        block,
        snapshot: after,
    })
}

/// Accepts a store for every host: writes `state/accept`. Each agent that does not trust the store takes it by that, once
/// and within a day.
///
/// # Errors
/// If no member answers, or the key may not be written.
pub async fn accept_for_fleet(config: &EtcdConfig, found: &Comparison) -> Result<(), StoreError> {
    let id = random_id().map_err(|source| StoreError::File { path: "/dev/urandom".into(), source })?;
    let (version, id) = (FLEET_ACCEPTANCE_VERSION, id[..16].to_owned());
    let acceptance = FleetAcceptance {
        version,
        id,
        identity: found.found.clone(),
        leaving: found.missing.union(&found.leaving).cloned().collect(),
        at: Timestamp::now(),
    };
    let text = json(&acceptance);
    super::each_member(config, async |mut connection: Connection| {
        let failed = connection.failed("accepting the store for the fleet");
        connection.client.put(config.prefix.fleet_acceptance(), text.clone(), None).await.map_err(failed)?;
        Ok(())
    })
    .await
}

/// Creates the identity of a store, the `cluster` key, or returns the one it has. True if it was created.
///
/// # Errors
/// If no member answers, or it may not be written.
pub async fn init(config: &EtcdConfig) -> Result<(String, bool), StoreError> {
    let id = random_id().map_err(|source| StoreError::File { path: "/dev/urandom".into(), source })?;
    let id = &id[..16];
    let key = config.prefix.key("cluster");
    super::each_member(config, async |mut connection: Connection| {
        let failed = connection.failed("making the `cluster` key");
        // The first caller creates it; all others get what the first one created.
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
