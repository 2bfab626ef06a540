//! The tasks of rollouts: the leader, which decides for the fleet, and the records of this host, which its agent follows.
//! Beside them what is known of the whole fleet, for the leader and the command line.

mod contents;
mod host;
mod leader;

pub use contents::{FleetContents, takes_turns};
pub use host::{Answer, HostRollouts, Link, Request, follow};
pub use leader::{LeaderOutlets, lead};

use tokio::sync::watch::Receiver;

use crate::store::Update;

/// Waits until the store is trusted, and returns the cluster id of its etcd. `None` if the agent is ending.
async fn trusted(updates: &mut Receiver<Update>) -> Option<u64> {
    updates.wait_for(|update| update.trusted).await.ok().map(|update| update.etcd)
}

/// Whether the store is still the trusted one.
fn is_trusted(updates: &Receiver<Update>, etcd: u64) -> bool {
    let update = updates.borrow();
    update.trusted && update.etcd == etcd
}
