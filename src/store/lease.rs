//! The lease of this agent: kept alive on one connection at a time, and shared by all that hangs on it.

use std::time::Duration;

use tokio::{
    sync::watch::{Receiver, Sender},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    client::{Connection, EtcdConfig, StoreError},
    update::Update,
};
use crate::retry::Retry;

/// How long keys outlive an agent that is gone.
pub(super) const TTL: Duration = Duration::from_secs(30);
/// Between two renewals.
const RENEWAL: Duration = Duration::from_secs(10);

/// For etcd, which counts in seconds.
pub(super) fn seconds(time: Duration) -> i64 {
    i64::try_from(time.as_secs()).unwrap_or(i64::MAX)
}

/// A lease that is kept alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// Its id.
    pub id: i64,
    /// The cluster id of the etcd that granted it.
    pub etcd: u64,
}

/// Keeps a lease until cancelled, then revokes it. `leases` holds it while it is alive, and `None` before that and after
/// it is lost. It survives a change of members: only a lease that ran out, or one of an etcd that is not trusted, is
/// replaced.
pub async fn keep_lease(
    config: EtcdConfig,
    mut updates: Receiver<Update>,
    leases: Sender<Option<Lease>>,
    token: CancellationToken,
) {
    let mut retry = Retry::new(Duration::from_millis(200), Duration::from_secs(5));
    let mut turn = 0;
    let mut held = None;
    loop {
        let began = Instant::now();
        let ended = session(&config, turn, &mut updates, &leases, &mut held, &token).await;
        let Err(error) = ended else { return };
        tracing::debug!("the lease is not renewed now: {error}");
        if held.is_none_or(|(_, expires): (Lease, Instant)| expires <= Instant::now()) {
            held = None;
            leases.send_if_modified(|lease| lease.take().is_some());
        }
        if began.elapsed() > TTL {
            retry.reset();
        }
        turn += 1;
        tokio::select! {
            () = token.cancelled() => return,
            () = tokio::time::sleep(retry.pause()) => {}
        }
    }
}

/// One connection, from the grant or the first renewal to its end. Ends well only if cancelled.
async fn session(
    config: &EtcdConfig,
    turn: usize,
    updates: &mut Receiver<Update>,
    leases: &Sender<Option<Lease>>,
    held: &mut Option<(Lease, Instant)>,
    token: &CancellationToken,
) -> Result<(), StoreError> {
    let mut connection = Connection::open(config, turn).await?;
    let call = |reason: &str| StoreError::Call {
        endpoint: connection.endpoint.clone(),
        operation: "renewing the lease",
        reason: reason.to_owned(),
    };
    let (lease, mut renew_at) = match *held {
        Some((lease, expires)) if expires > Instant::now() => (lease, Instant::now()),
        _ => {
            let asked = Instant::now();
            let granted =
                connection.client.lease_grant(seconds(TTL), None).await.map_err(connection.failed("taking a lease"))?;
            let etcd = granted.header().map_or(0, etcd_client::ResponseHeader::cluster_id);
            let lease = Lease { id: granted.id(), etcd };
            *held = Some((lease, asked + TTL));
            (lease, asked + RENEWAL)
        }
    };
    let (mut keeper, mut answers) = match connection.client.lease_keep_alive(lease.id).await {
        Ok(opened) => opened,
        Err(e) => {
            // etcd does not know it any more: the next one is granted at once.
            if matches!(e, etcd_client::Error::LeaseKeepAliveError(_)) {
                *held = None;
            }
            return Err(connection.failed("keeping the lease")(e));
        }
    };
    leases.send_if_modified(|current| current.replace(lease) != Some(lease));
    loop {
        let is_elsewhere = {
            let update = updates.borrow_and_update();
            update.trusted && update.etcd != lease.etcd
        };
        if is_elsewhere {
            *held = None;
            return Err(call("this is another etcd than the trusted one"));
        }
        tokio::select! {
            () = token.cancelled() => break,
            changed = updates.changed() => if changed.is_err() { break },
            () = tokio::time::sleep_until(renew_at) => {
                let asked = Instant::now();
                keeper.keep_alive().await.map_err(connection.failed("renewing the lease"))?;
                let answer = tokio::time::timeout(config.command_timeout, answers.message()).await;
                let Some(answer) = answer.ok().and_then(Result::ok).flatten() else { return Err(call("no answer")) };
                if answer.ttl() <= 0 {
                    *held = None;
                    return Err(call("it is lost"));
                }
                *held = Some((lease, asked + TTL));
                renew_at = asked + RENEWAL;
            }
        }
    }
    // The keys go with their lease: the status of an agent that has ended is no status, and the name is free.
    leases.send_if_modified(|current| current.take().is_some());
    if let Err(e) = connection.client.lease_revoke(lease.id).await {
        tracing::debug!("{}", connection.failed("revoking the lease")(e));
    }
    Ok(())
}
