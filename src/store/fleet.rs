//! Records of rollouts in etcd: read at one revision, watched, and written by transactions that compare.

use std::{collections::BTreeMap, time::Duration};

use etcd_client::{
    Compare, CompareOp, Event, EventType, GetOptions, PutOptions, Txn, TxnOp, TxnOpResponse, WatchOptions, WatchStream,
};

use super::{
    audit::{Audit, Written},
    client::{Connection, EtcdConfig, StoreError},
    contents::Entry,
    keys::{KeyRange, Prefix},
    lease::seconds,
    read::{LARGEST, release_key},
    update::Change,
};
use crate::model::{
    fleet::{Condition, FleetKey, Leader, Transaction, Write},
    name::HostName,
    release::ReleaseKey,
    text::json,
};

/// One connection to a member, for rollouts.
#[derive(Clone)]
pub struct FleetSession {
    pub(super) connection: Connection,
    pub(super) prefix: Prefix,
    command_timeout: Duration,
}

/// Keys at one revision.
pub struct FleetReading {
    /// Keys without their prefix.
    pub entries: Vec<(Vec<u8>, Entry)>,
    /// The revision.
    pub revision: i64,
    /// The cluster id of the etcd.
    pub etcd: u64,
}

/// A stream of changes.
pub struct FleetWatch {
    stream: WatchStream,
    connection: Connection,
    prefix: Prefix,
}

/// A term of leadership.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Term {
    /// The create revision of the leader's key.
    pub revision: i64,
    /// The lease on which it is.
    pub lease: i64,
}

impl FleetSession {
    /// Connects to a member: `turn` modulo their number.
    ///
    /// # Errors
    /// If the connection cannot be made.
    pub async fn open(config: &EtcdConfig, turn: usize) -> Result<Self, StoreError> {
        let connection = Connection::open(config, turn).await?;
        Ok(Self { connection, prefix: config.prefix.clone(), command_timeout: config.command_timeout })
    }

    /// Reads ranges at one revision.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn read(&self, ranges: &[KeyRange]) -> Result<FleetReading, StoreError> {
        let failed = self.connection.failed("reading the records of rollouts");
        let get = |(from, to): &KeyRange| TxnOp::get(from.clone(), Some(GetOptions::new().with_range(to.clone())));
        let mut kv = self.connection.client.kv_client().max_decoding_message_size(LARGEST);
        let answer = kv.txn(Txn::new().and_then(ranges.iter().map(get).collect::<Vec<_>>())).await.map_err(failed)?;
        let (revision, etcd) = answer.header().map_or((0, 0), |header| (header.revision(), header.cluster_id()));
        let mut entries = Vec::new();
        for response in answer.op_responses() {
            let TxnOpResponse::Get(found) = response else { continue };
            for kv in found.kvs() {
                if let Some(rest) = self.prefix.strip(kv.key()) {
                    let entry = Entry::new(kv.value().to_vec(), kv.create_revision(), kv.mod_revision());
                    entries.push((rest.to_vec(), entry));
                }
            }
        }
        Ok(FleetReading { entries, revision, etcd })
    }

    /// Compares what watches have brought with what was written. Returns false if events are lost: everything must be read
    /// again.
    ///
    /// # Errors
    /// If the store does not answer.
    pub async fn audit(&self, audit: &mut Audit) -> Result<bool, StoreError> {
        let written = self.written_since(audit.ranges(), audit.since()).await?;
        Ok(audit.settle(&written))
    }

    /// What was written in ranges after a revision.
    ///
    /// # Errors
    /// If the call fails.
    async fn written_since(&self, ranges: &[KeyRange], since: i64) -> Result<Written, StoreError> {
        let failed = self.connection.failed("looking for writes about rollouts");
        let get = |(from, to): &KeyRange| {
            let options = GetOptions::new().with_range(to.clone()).with_keys_only().with_min_mod_revision(since + 1);
            TxnOp::get(from.clone(), Some(options))
        };
        let mut kv = self.connection.client.kv_client().max_decoding_message_size(LARGEST);
        let answer = kv.txn(Txn::new().and_then(ranges.iter().map(get).collect::<Vec<_>>())).await.map_err(failed)?;
        let revision = answer.header().map_or(0, etcd_client::ResponseHeader::revision);
        let (mut total, mut keys) = (0, BTreeMap::new());
        for response in answer.op_responses() {
            let TxnOpResponse::Get(found) = response else { continue };
            total += found.count();
            let written = found.kvs().iter();
            keys.extend(written.filter_map(|kv| Some((self.prefix.strip(kv.key())?.to_vec(), kv.mod_revision()))));
        }
        Ok(Written { revision, total, keys })
    }

    /// The value of a key; `None` if there is none.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn get(&self, key: &FleetKey) -> Result<Option<Vec<u8>>, StoreError> {
        let mut kv = self.connection.client.kv_client().max_decoding_message_size(LARGEST);
        let failed = self.connection.failed("reading a record of a rollout");
        let answer = kv.get(self.prefix.fleet(key), None).await.map_err(failed)?;
        Ok(answer.kvs().first().map(|kv| kv.value().to_vec()))
    }

    /// The key that release ids are made with.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn release_key(&self) -> Result<Option<ReleaseKey>, StoreError> {
        release_key(&self.connection, &self.prefix).await
    }

    /// Tries the rights of a host that takes turns: to read the variables of kept releases, and to write which image a
    /// release is. Writes nothing.
    ///
    /// # Errors
    /// If this user lacks the rights, or the call fails.
    pub async fn try_rights(&self) -> Result<(), StoreError> {
        let (from, to) = self.prefix.kept_variables();
        let get = TxnOp::get(from, Some(GetOptions::new().with_range(to).with_keys_only().with_limit(1)));
        let failed = self.connection.failed("reading `secret/releases/`, or writing `state/digests/`");
        let txn = self.never().and_then([TxnOp::put(self.prefix.key("state/digests/a"), "", None)]).or_else([get]);
        self.connection.client.clone().txn(txn).await.map_err(failed).map(drop)
    }

    /// Tries the rights of a leader: to read all that is about the fleet, and to keep releases. Writes nothing.
    ///
    /// # Errors
    /// If this user lacks them, or the call fails.
    pub async fn try_rights_to_lead(&self) -> Result<(), StoreError> {
        let (kept, _) = self.prefix.kept_variables();
        let (from, to) = self.prefix.leader_range();
        let get = TxnOp::get(from, Some(GetOptions::new().with_range(to).with_keys_only().with_limit(1)));
        let txn = self.never().and_then([TxnOp::put(kept, "", None)]).or_else([get]);
        let failed = self.connection.failed("trying the rights to lead");
        self.connection.client.clone().txn(txn).await.map_err(failed).map(drop)
    }

    /// A transaction whose condition never holds: etcd checks the rights for both branches before it compares.
    fn never(&self) -> Txn {
        let key = self.prefix.fleet(&FleetKey::Leader);
        Txn::new().when([Compare::create_revision(key, CompareOp::Equal, i64::MAX)])
    }

    /// Whether an agent leads the fleet.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn has_leader(&self) -> Result<bool, StoreError> {
        Ok(self.get(&FleetKey::Leader).await?.is_some())
    }

    /// Watches a range from a revision on.
    ///
    /// # Errors
    /// If the watch cannot be opened.
    pub async fn watch(&self, (from, to): KeyRange, first: i64) -> Result<FleetWatch, StoreError> {
        let mut client = self.connection.client.watch_client().max_decoding_message_size(LARGEST);
        let options = WatchOptions::new().with_range(to).with_start_revision(first).with_fragment();
        let opened = tokio::time::timeout(self.command_timeout, client.watch(from, Some(options))).await;
        let Ok(opened) = opened else {
            return Err(StoreError::silent(&self.connection.endpoint, self.command_timeout));
        };
        let stream = opened.map_err(self.connection.failed("opening the watch of rollouts"))?;
        Ok(FleetWatch { stream, connection: self.connection.clone(), prefix: self.prefix.clone() })
    }

    /// Makes a transaction if its conditions hold. Returns its revision; `None` if they do not. `lease` is the lease of
    /// this agent, on which the key of its name must be.
    ///
    /// # Errors
    /// If the call fails: then it is unknown whether it was made.
    pub async fn commit(&self, transaction: &Transaction, lease: i64) -> Result<Option<i64>, StoreError> {
        let conditions: Vec<Compare> = transaction.conditions.iter().map(|c| self.compare(c, lease)).collect();
        let write = |write: &Write| match write {
            Write::Put(key, value) => TxnOp::put(self.prefix.fleet(key), value.clone(), None),
            Write::Delete(key) => TxnOp::delete(self.prefix.fleet(key), None),
        };
        let writes: Vec<TxnOp> = transaction.writes.iter().map(write).collect();
        let failed = self.connection.failed("writing a record of a rollout");
        let answer = self.connection.client.clone().txn(Txn::new().when(conditions).and_then(writes)).await;
        let answer = answer.map_err(failed)?;
        Ok(answer.succeeded().then(|| answer.header().map_or(0, etcd_client::ResponseHeader::revision)))
    }

    fn compare(&self, condition: &Condition, lease: i64) -> Compare {
        match condition {
            Condition::Created(key, revision) => {
                Compare::create_revision(self.prefix.fleet(key), CompareOp::Equal, *revision)
            }
            Condition::Modified(key, revision) => {
                Compare::mod_revision(self.prefix.fleet(key), CompareOp::Equal, *revision)
            }
            Condition::HoldsName(host) => {
                let key = self.prefix.fleet(&FleetKey::Host(host.clone()));
                Compare::lease(key, CompareOp::Equal, lease)
            }
            // It holds for every key of the range, or for none at all.
            Condition::NoVerdictSince(app, release, revision) => {
                let verdicts = self.prefix.verdicts(app, release);
                Compare::mod_revision(verdicts, CompareOp::Less, revision + 1).with_prefix()
            }
        }
    }

    /// Becomes the leader if there is none, on a lease of its own. Returns `None` if there is one.
    ///
    /// # Errors
    /// If a call fails.
    pub async fn lead(&self, leader: &Leader, ttl: Duration) -> Result<Option<Term>, StoreError> {
        let failed = self.connection.failed("becoming the leader");
        let mut client = self.connection.client.clone();
        let lease = client.lease_grant(seconds(ttl), None).await.map_err(&failed)?.id();
        let key = self.prefix.fleet(&FleetKey::Leader);
        let free = Compare::create_revision(key.clone(), CompareOp::Equal, 0);
        let put = TxnOp::put(key, json(leader), Some(PutOptions::new().with_lease(lease)));
        let answer = client.txn(Txn::new().when([free]).and_then([put])).await.map_err(&failed)?;
        if !answer.succeeded() {
            client.lease_revoke(lease).await.map_err(&failed)?;
            return Ok(None);
        }
        let revision = answer.header().map_or(0, etcd_client::ResponseHeader::revision);
        Ok(Some(Term { revision, lease }))
    }

    /// Renews a term. Returns false if it has ended.
    ///
    /// # Errors
    /// If the call fails.
    pub async fn renew(&self, term: Term) -> Result<bool, StoreError> {
        let failed = self.connection.failed("renewing the leader's lease");
        let mut client = self.connection.client.clone();
        let (mut keeper, mut answers) = match client.lease_keep_alive(term.lease).await {
            Ok(opened) => opened,
            Err(etcd_client::Error::LeaseKeepAliveError(_)) => return Ok(false),
            Err(e) => return Err(failed(e)),
        };
        keeper.keep_alive().await.map_err(&failed)?;
        let answer = tokio::time::timeout(self.command_timeout, answers.message()).await;
        let answer = answer.map_err(|_| StoreError::silent(&self.connection.endpoint, self.command_timeout))?;
        Ok(answer.map_err(failed)?.is_some_and(|answer| answer.ttl() > 0))
    }

    /// Ends a term at once.
    pub async fn resign(&self, term: Term) {
        if let Err(e) = self.connection.client.clone().lease_revoke(term.lease).await {
            tracing::debug!("{}", self.connection.failed("giving up the lead")(e));
        }
    }

    /// What a host reads: all rollouts, its own permits, its own proofs, hosts that are lost, verdicts; and runs of commands
    /// and digests of images, which are neighbours.
    pub fn host_ranges(&self, host: &HostName) -> [KeyRange; 6] {
        let below = |dir: String| {
            let from = self.prefix.key(&dir).into_bytes();
            // `0` follows `/`.
            let to = [&from[..from.len() - 1], b"0"].concat();
            (from, to)
        };
        [
            below("state/rollouts/".into()),
            below(format!("state/permits/{host}/")),
            below(format!("state/proven/{host}/")),
            below("state/lost/".into()),
            below("state/verdicts/".into()),
            (below("state/commands/".into()).0, below("state/digests/".into()).1),
        ]
    }

    /// What the command line reads: what people write, and what agents write, without secrets.
    pub fn client_ranges(&self) -> [KeyRange; 2] {
        [self.prefix.desired_range(), self.prefix.state_range()]
    }

    /// The range that a leader reads.
    pub fn leader_range(&self) -> KeyRange {
        self.prefix.leader_range()
    }
}

impl FleetWatch {
    /// The next changes, and the revision up to which they go. Cancel-safe.
    ///
    /// # Errors
    /// If the stream has ended.
    pub async fn next(&mut self) -> Result<(Vec<Change>, i64), StoreError> {
        let ended = |reason: String| StoreError::Watch { endpoint: self.connection.endpoint.clone(), reason };
        let message = self.stream.message().await.map_err(self.connection.failed("watching rollouts"))?;
        let message = message.ok_or_else(|| ended("was closed".into()))?;
        if message.canceled() {
            return Err(ended(format!("was cancelled: {}", message.cancel_reason())));
        }
        let change = |event: &Event| {
            let kv = event.kv()?;
            let entry = || Entry::new(kv.value().to_vec(), kv.create_revision(), kv.mod_revision());
            let value = (event.event_type() == EventType::Put).then(entry);
            let key = self.prefix.strip(kv.key()).map(<[u8]>::to_vec);
            Some(Change { key, revision: kv.mod_revision(), value })
        };
        let changes = message.events().iter().filter_map(change).collect();
        Ok((changes, message.header().map_or(0, etcd_client::ResponseHeader::revision)))
    }
}
