//! etcd: the only users of `etcd-client`.
//!
//! The watch is only for speed. What is true is a full read, made at the start, after any gap, and at an interval.

mod belief;
mod claim;
pub mod client;
mod compare;
mod etcd;
pub mod keys;
mod landmark;
mod last_good;
mod ledger;
mod members;
mod publish;
mod read;
mod source;
mod standing;
mod watch;

pub use belief::{Belief, Change, News, Update, Viewer};
pub use claim::{Claim, HostInfo, Owner, claimed};
pub use client::StoreError;
pub use compare::{Comparison, compare, init};
pub use etcd::EtcdCluster;
pub use landmark::Landmark;
pub use ledger::{Ledger, LedgerError, Shelf};
pub use members::{Member, members};
pub use publish::{Publishing, publish, published};
pub use read::{Contents, Entry, Reading, fingerprint};
pub use source::{Session, Source, Watch};
pub use standing::{Acceptance, Brake, Found, Identity, Standing};
pub use watch::watch;

use client::{Connection, EtcdConfig};

/// Asks one member after the other until one answers.
///
/// # Errors
/// The last error.
async fn each_member<T>(
    config: &EtcdConfig,
    ask: impl AsyncFn(Connection) -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    let mut last = StoreError::Connect { endpoint: "nowhere".into(), reason: "no endpoint is configured".into() };
    for turn in 0..config.endpoints.len() {
        let attempt = async { ask(Connection::open(config, turn).await?).await };
        match attempt.await {
            Ok(answer) => return Ok(answer),
            Err(e) => last = e,
        }
    }
    Err(last)
}
