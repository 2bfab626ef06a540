//! Each member of etcd by itself, to tell which of them is unhealthy.

use etcd_client::{Compare, CompareOp, GetOptions, Txn, TxnOp};

use super::client::{Connection, EtcdConfig, StoreError};
use crate::model::name::HostName;

/// A member that answers.
#[derive(Debug)]
pub struct Member {
    /// Its version; `None` if this user may not ask for it.
    pub version: Option<String>,
    /// Keys in the desired range.
    pub keys: i64,
    /// Whether this user may write what an agent writes, and the member takes writes.
    pub writable: Result<(), StoreError>,
}

/// Asks every configured member for what an agent of this host would read, its version, and whether the user may write
/// what an agent writes. Writes nothing.
pub async fn members(config: &EtcdConfig, host: &HostName) -> Vec<(String, Result<Member, StoreError>)> {
    let mut found = Vec::new();
    for (turn, endpoint) in config.endpoints.iter().enumerate() {
        let asking = async {
            let mut connection = Connection::open(config, turn).await?;
            let (from, to) = config.prefix.desired_range();
            let options = GetOptions::new().with_range(to).with_count_only();
            let failed = connection.failed("reading");
            let keys = connection.client.get(from, Some(options)).await.map_err(failed)?.count();
            let writable = may_write(&mut connection, config, host).await;
            let version = connection.client.status().await.ok().map(|s| s.version().to_owned());
            Ok(Member { version, keys, writable })
        };
        found.push((endpoint.clone(), asking.await));
    }
    found
}

/// Whether the user may write what an agent writes. etcd checks the rights for all of a transaction before it compares
/// anything, and this comparison never holds.
async fn may_write(connection: &mut Connection, config: &EtcdConfig, host: &HostName) -> Result<(), StoreError> {
    let keys = [
        format!("state/hosts/{host}"),
        format!("state/apps/{host}/a"),
        format!("state/fence/{host}"),
        "secret/release-key".to_owned(),
    ];
    try_to_write(connection, &keys.map(|rest| config.prefix.key(&rest))).await
}

/// What the user may write that no agent writes, in words.
///
/// # Errors
/// If no member answers, or one fails otherwise.
pub async fn may_write_more(config: &EtcdConfig, host: &HostName) -> Result<Vec<&'static str>, StoreError> {
    let mut connection = Connection::open(config, 0).await?;
    let mut found = Vec::new();
    for (rest, what) in [
        ("apps/a/spec".to_owned(), "the spec of any app"),
        ("apps/a/image".to_owned(), "the image of any app"),
        ("env/a/A".to_owned(), "variables"),
        (format!("hosts/{host}/mode"), "the modes of hosts"),
        ("freeze".to_owned(), "`freeze`"),
        ("cluster".to_owned(), "`cluster`"),
        (format!("state/hosts/{host}-other"), "what other hosts report"),
    ] {
        match try_to_write(&mut connection, &[config.prefix.key(&rest)]).await {
            Ok(()) => found.push(what),
            Err(e) if e.is_of_rights() => {}
            Err(e) => return Err(e),
        }
    }
    Ok(found)
}

/// Tries the rights, and writes nothing.
async fn try_to_write(connection: &mut Connection, keys: &[String]) -> Result<(), StoreError> {
    let never = Compare::version(keys[0].as_str(), CompareOp::Less, 0);
    let puts = keys.iter().map(|key| TxnOp::put(key.as_str(), "", None));
    let txn = Txn::new().when([never]).and_then(puts.collect::<Vec<_>>());
    let failed = connection.failed("asking whether it may be written");
    connection.client.txn(txn).await.map_err(failed).map(|_| ())
}

/// What a member says of itself.
#[derive(Debug)]
pub struct MemberState {
    /// Its version.
    pub version: String,
    /// Whether it leads the cluster.
    pub is_leader: bool,
    /// The size of its database, in bytes.
    pub database_bytes: i64,
    /// Its revision.
    pub revision: i64,
    /// What is wrong with it, in etcd's words: `memberID:… alarm:NOSPACE`.
    pub errors: Vec<String>,
}

/// Asks every configured member how it is.
pub async fn member_states(config: &EtcdConfig) -> Vec<(String, Result<MemberState, StoreError>)> {
    let mut found = Vec::new();
    for (turn, endpoint) in config.endpoints.iter().enumerate() {
        let asking = async {
            let mut connection = Connection::open(config, turn).await?;
            let failed = connection.failed("asking how it is");
            let status = connection.client.status().await.map_err(failed)?;
            let (member, revision) = status.header().map_or((0, 0), |header| (header.member_id(), header.revision()));
            Ok(MemberState {
                version: status.version().to_owned(),
                is_leader: member != 0 && status.leader() == member,
                database_bytes: status.db_size(),
                revision,
                errors: status.errors().to_vec(),
            })
        };
        found.push((endpoint.clone(), asking.await));
    }
    found
}
