//! Each member of etcd by itself, for whoever wants to know which of them is ill.

use etcd_client::GetOptions;

use super::client::{Connection, EtcdConfig, StoreError};

/// A member that answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its version; nothing if this user may not ask for it.
    pub version: Option<String>,
    /// How many keys of people it has.
    pub keys: i64,
}

/// Asks every configured member for what an agent would read, and how old it is. Writes nothing.
pub async fn members(config: &EtcdConfig) -> Vec<(String, Result<Member, StoreError>)> {
    let mut found = Vec::new();
    for (turn, endpoint) in config.endpoints.iter().enumerate() {
        let asking = async {
            let mut connection = Connection::open(config, turn).await?;
            let (from, to) = config.prefix.intent();
            let options = GetOptions::new().with_range(to).with_count_only();
            let failed = connection.failed("reading");
            let keys = connection.client.get(from, Some(options)).await.map_err(failed)?.count();
            let version = connection.client.status().await.ok().map(|s| s.version().to_owned());
            Ok(Member { version, keys })
        };
        found.push((endpoint.clone(), asking.await));
    }
    found
}
