//! Which host has the next turn.

use super::records::Records;
use crate::model::name::{AppName, HostName, ReleaseId};

/// The label of hosts that go first.
pub(super) const CANARY: &str = "canary";

/// The place of a host in the order of turns; the least goes first. What is broken has the least to lose, and what an
/// aborted rollout left is to be put right. Within a class the order is by name, and not by anything of the release: so
/// releases that fail one after the other meet the same first host.
pub(super) fn place<'a>(
    records: &Records,
    (app, host): (&'a AppName, &'a HostName),
    is_canary: bool,
    release: &ReleaseId,
    from: Option<&ReleaseId>,
) -> (u8, &'a HostName) {
    let served = records.served.get(&(app.clone(), host.clone())).and_then(|s| s.value.as_ref()?.release());
    let class = match served {
        None => 0,
        Some(served) if served != release && from.is_some_and(|from| from != served) => 1,
        Some(_) if is_canary => 2,
        Some(_) => 3,
    };
    (class, host)
}
