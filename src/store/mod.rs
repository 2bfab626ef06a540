//! etcd: the only users of `etcd-client`.
//!
//! The watch is only for speed. The truth is a full read, made at the start and after any gap, and a comparison with the
//! store at an interval.

mod audit;
mod cache;
mod claim;
pub mod client;
mod compare;
mod contents;
mod edit;
mod etcd;
mod fleet;
mod interpret;
pub mod keys;
mod last_good;
mod lease;
mod members;
mod publish;
mod read;
mod recall;
mod source;
mod trust;
mod update;
mod watch;

pub use audit::Audit;
pub use cache::DesiredCache;
pub use claim::{Claim, HostInfo, Owner, claimed};
pub use client::StoreError;
pub use compare::{Comparison, accept_for_fleet, compare, init};
pub use contents::{Contents, Entry, Write};
pub use edit::Edit;
pub use etcd::EtcdCluster;
pub use fleet::{FleetReading, FleetSession, FleetWatch, Term};
pub use interpret::{By, Everywhere, Interpreter, MadeFrom};
pub use keys::{KeyRange, parse_fleet};
pub use lease::{Lease, keep_lease};
pub use members::{Member, MemberState, may_write_more, member_states, members};
pub use publish::{FEATURES, Publishing, ROLLOUTS, Sources, publish, published};
pub use read::{Proof, Reading, fingerprint};
pub use source::{Session, Source, Watch};
pub use trust::{
    Acceptance, Brake, Fence, FenceMatch, FenceRecord, FleetAcceptance, Head, Identity, Ledger, LedgerError, Nonce,
    SharedFence, StateStore,
};
pub use update::{Change, News, Update, Viewer};
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

/// 256 random bits in hexadecimal.
fn random_id() -> std::io::Result<String> {
    let mut bytes = [0u8; 32];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(crate::model::text::hex(&bytes))
}
