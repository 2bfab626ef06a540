//! Reads of etcd: the desired range at one revision, what proves that a store is unchanged, the release key.

use etcd_client::{Compare, CompareOp, Error, GetOptions, GetResponse, SortOrder, SortTarget, Txn, TxnOp};
use serde::de::DeserializeOwned;
use sha2::{Digest as _, Sha256};

use super::{
    client::{Connection, StoreError},
    contents::{Contents, Entry, Write},
    keys::Prefix,
    trust::{Fence, FleetAcceptance, Identity},
};
use crate::model::{name::HostName, release::ReleaseKey, text::hex};

/// Keys of one page. With the largest value etcd takes (1.5 MiB) a page of this size fits the decoding limit below in
/// any store of ordinary size.
const PAGE: i64 = 500;
/// Largest answer that is decoded: the client's own limit of 4 MiB is reached by a thousand specs.
pub(super) const LARGEST: usize = 256 << 20;
/// gRPC's `OUT_OF_RANGE`, with which etcd answers for a revision that is compacted or not there yet.
/// <https://grpc.io/docs/guides/status-codes/>
const OUT_OF_RANGE: i32 = 11;

/// A full read of a store.
#[derive(Debug, Clone)]
pub struct Reading {
    /// The desired range.
    pub contents: Contents,
    /// The identity of the store.
    pub identity: Identity,
    /// The key that release ids are made with, if it has one.
    pub key: Option<ReleaseKey>,
    /// The fence of this host, if it has one.
    pub fence: Option<Fence>,
    /// What a person accepted for the whole fleet, if anything.
    pub fleet_acceptance: Option<FleetAcceptance>,
    /// True if the history of the store contains the newest accepted write. False if that cannot be known, since its
    /// revision is compacted.
    pub has_newest: bool,
}

/// What tells whether a store is as it was read, without reading it again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proof {
    /// The revision of the store.
    pub revision: i64,
    /// etcd's cluster id.
    pub etcd: u64,
    /// Keys in the desired range.
    pub total: usize,
    /// The last writes of keys that were written after the revision that was asked about.
    pub written: Vec<Write>,
    /// The fingerprint of the release key, if the store has one.
    pub key: Option<String>,
    /// The fence of this host, if the store has one.
    pub fence: Option<Fence>,
    /// What a person accepted for the whole fleet, if anything.
    pub fleet_acceptance: Option<FleetAcceptance>,
}

/// Reads everything at one revision, page by page. `newest` is the newest write that was accepted: it is looked for in
/// the history of the store.
///
/// # Errors
/// If a call fails.
pub async fn read(
    connection: &Connection,
    prefix: &Prefix,
    host: &HostName,
    newest: Option<&Write>,
) -> Result<Reading, StoreError> {
    let mut kv = connection.client.kv_client().max_decoding_message_size(LARGEST);
    let failed = connection.failed("reading");
    let (mut from, to) = prefix.desired_range();
    let mut contents = Contents::default();
    let mut etcd = 0;
    loop {
        let mut options =
            GetOptions::new().with_range(to.clone()).with_limit(PAGE).with_sort(SortTarget::Key, SortOrder::Ascend);
        if contents.revision > 0 {
            options = options.with_revision(contents.revision);
        }
        let answer = kv.get(from.clone(), Some(options)).await.map_err(&failed)?;
        if contents.revision == 0 {
            (contents.revision, etcd) = head(&answer);
        }
        for kv in answer.kvs() {
            if let Some(rest) = prefix.strip(kv.key()) {
                let entry = Entry::new(kv.value().to_vec(), kv.create_revision(), kv.mod_revision());
                contents.entries.insert(rest.to_vec(), entry);
            }
        }
        match answer.kvs().last() {
            // The first key after the last one.
            Some(last) if answer.more() => from = [last.key(), &[0]].concat(),
            _ => break,
        }
    }
    let key = release_key(connection, prefix).await?;
    let (fence, _) = value(connection, &prefix.fence(host)).await?;
    let fleet_acceptance = fleet_acceptance(connection, prefix).await?;
    let identity =
        Identity { cluster: contents.cluster(), etcd, revision: contents.revision, key: key.as_ref().map(fingerprint) };
    // Asked last: if the store is exchanged meanwhile, the new one answers.
    let has_newest = match newest {
        Some(newest) if !contents.shows(newest) => is_in_history(connection, prefix, newest).await?,
        _ => true,
    };
    Ok(Reading { contents, identity, key, fence, fleet_acceptance, has_newest })
}

/// Asks which keys were written after a revision, and how many there are: a small answer from a store in which little
/// happens, however much it holds.
///
/// # Errors
/// If the call fails.
pub async fn prove(connection: &Connection, prefix: &Prefix, host: &HostName, since: i64) -> Result<Proof, StoreError> {
    let (from, to) = prefix.desired_range();
    let options = GetOptions::new().with_range(to).with_keys_only().with_min_mod_revision(since + 1);
    let mut kv = connection.client.kv_client().max_decoding_message_size(LARGEST);
    let answer = kv.get(from, Some(options)).await.map_err(connection.failed("looking for writes"))?;
    let (revision, etcd) = head(&answer);
    let write =
        |kv: &etcd_client::KeyValue| Some(Write { key: prefix.strip(kv.key())?.to_vec(), revision: kv.mod_revision() });
    let written = answer.kvs().iter().filter_map(write).collect();
    let total = usize::try_from(answer.count()).unwrap_or(usize::MAX);
    let key = release_key(connection, prefix).await?.as_ref().map(fingerprint);
    let (fence, _) = value(connection, &prefix.fence(host)).await?;
    let fleet_acceptance = fleet_acceptance(connection, prefix).await?;
    Ok(Proof { revision, etcd, total, written, key, fence, fleet_acceptance })
}

fn head(answer: &GetResponse) -> (i64, u64) {
    answer.header().map_or((0, 0), |header| (header.revision(), header.cluster_id()))
}

/// True if the history of a store has this write.
async fn is_in_history(connection: &Connection, prefix: &Prefix, write: &Write) -> Result<bool, StoreError> {
    let key = [prefix.key("").as_bytes(), &write.key].concat();
    let then = GetOptions::new().with_revision(write.revision).with_keys_only();
    match connection.client.kv_client().get(key, Some(then)).await {
        Ok(answer) => Ok(answer.kvs().first().is_some_and(|kv| kv.mod_revision() == write.revision)),
        Err(Error::GRpcStatus(status)) if status.code() as i32 == OUT_OF_RANGE => Ok(false),
        Err(e) => Err(connection.failed("looking for the newest write in the history")(e)),
    }
}

/// The value of a key that agents write, `None` if it is missing or not readable; and the revision of its last write, 0 if
/// it is missing.
pub(super) async fn value<T: DeserializeOwned>(
    connection: &Connection,
    key: &str,
) -> Result<(Option<T>, i64), StoreError> {
    let failed = connection.failed("reading a key of the agents");
    let answer = connection.client.kv_client().get(key, None).await.map_err(failed)?;
    let Some(kv) = answer.kvs().first() else { return Ok((None, 0)) };
    let value = match serde_json::from_slice(kv.value()) {
        Ok(value) => Some(value),
        Err(e) => {
            tracing::warn!("`{key}` in the store is not readable, and counts as missing: {e}");
            None
        }
    };
    Ok((value, kv.mod_revision()))
}

/// What a person accepted for the whole fleet.
///
/// # Errors
/// If the call fails.
pub(super) async fn fleet_acceptance(
    connection: &Connection,
    prefix: &Prefix,
) -> Result<Option<FleetAcceptance>, StoreError> {
    Ok(value(connection, &prefix.fleet_acceptance()).await?.0)
}

/// A fingerprint of a release key, which does not reveal it.
pub fn fingerprint(key: &ReleaseKey) -> String {
    hex(&Sha256::digest(key.expose())[..8])
}

pub(super) async fn release_key(connection: &Connection, prefix: &Prefix) -> Result<Option<ReleaseKey>, StoreError> {
    let failed = connection.failed("reading the release key");
    let answer = connection.client.kv_client().get(prefix.release_key(), None).await.map_err(failed)?;
    Ok(answer.kvs().first().map(|kv| ReleaseKey::new(kv.value())))
}

/// Creates the release key of a store that has none: the known one, since another one would change every release id and
/// replace every container; else a random one.
///
/// # Errors
/// If a call fails.
pub(super) async fn make_release_key(
    connection: &Connection,
    prefix: &Prefix,
    known: Option<&ReleaseKey>,
) -> Result<ReleaseKey, StoreError> {
    let key = prefix.release_key();
    let fresh = match known {
        Some(known) => known.expose().to_vec(),
        None => {
            super::random_id().map_err(|source| StoreError::File { path: "/dev/urandom".into(), source })?.into_bytes()
        }
    };
    // The first agent creates it; the others read it.
    let create = Txn::new().when([Compare::create_revision(key.clone(), CompareOp::Equal, 0)]).and_then([TxnOp::put(
        key.clone(),
        fresh,
        None,
    )]);
    let mut kv = connection.client.kv_client();
    kv.txn(create).await.map_err(connection.failed("making the release key"))?;
    release_key(connection, prefix).await?.ok_or_else(|| StoreError::Call {
        endpoint: connection.endpoint.clone(),
        operation: "reading the release key",
        reason: format!("`{key}` is gone right after it was made"),
    })
}
