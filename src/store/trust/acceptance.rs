//! What a person accepted: that this host takes a store, or that the whole fleet does.

use std::{collections::BTreeSet, time::Duration};

use serde::{Deserialize, Serialize};

use super::{Identity, MASS_REMOVAL};
use crate::model::{name::AppName, status::StoreBlock, time::Timestamp};

/// How long an acceptance on one host is good for. Its agent takes it within seconds; one that could not asks anew.
const HOST_ACCEPTANCE: Duration = Duration::from_secs(3600);
/// How long an acceptance for the fleet is good for: hosts that are away today take it when they are back.
const FLEET_ACCEPTANCE: Duration = Duration::from_secs(24 * 3600);

/// The version of the value of `state/accept`.
pub const FLEET_ACCEPTANCE_VERSION: u32 = 1;

/// What a person accepted on this host: one store, and that these apps leave. The form of `accepted.json`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Acceptance {
    /// The accepted store, as it was when the person looked.
    pub identity: Option<Identity>,
    /// Apps that may leave.
    pub leaving: BTreeSet<AppName>,
    /// The kind of the block that was shown, if it is known.
    #[serde(default)]
    pub kind: Option<String>,
    /// When; `None` from a version that did not keep it.
    #[serde(default)]
    pub at: Option<Timestamp>,
}

impl Acceptance {
    /// True if a read answers the question that the person was asked: the same etcd at that revision or later.
    pub fn is_settled_by(&self, found: &Identity) -> bool {
        self.identity.as_ref().is_some_and(|a| a.etcd == found.etcd && a.revision <= found.revision)
    }

    /// True while it is good.
    pub(in crate::store) fn is_valid(&self, now: Timestamp) -> bool {
        self.at.is_none_or(|at| now.since(at) <= HOST_ACCEPTANCE)
    }

    /// True if it covers a block: a confirmed mass removal is no acceptance of another store.
    pub(super) fn covers(&self, block: &StoreBlock, found: &Identity, leaving: &BTreeSet<AppName>) -> bool {
        self.identity.as_ref().is_some_and(|a| a.is_earlier_than(found))
            && (self.kind.as_deref() != Some(MASS_REMOVAL) || block.kind == MASS_REMOVAL)
            && leaving.is_subset(&self.leaving)
    }
}

/// What a person accepted for every host: the value of `state/accept`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FleetAcceptance {
    /// The version of this form.
    #[serde(default)]
    pub version: u32,
    /// A random word. Each host takes an acceptance once, and remembers the last one by this.
    pub id: String,
    /// The accepted store, as it was when the person looked.
    pub identity: Identity,
    /// Apps that the person was shown: they may leave any host.
    #[serde(default)]
    pub leaving: BTreeSet<AppName>,
    /// When.
    pub at: Timestamp,
}

impl FleetAcceptance {
    /// True if a host that last took `used` takes the store `found` by it now. A mass removal is accepted on its host.
    pub(super) fn covers(
        &self,
        block: &StoreBlock,
        found: &Identity,
        leaving: &BTreeSet<AppName>,
        (used, now): (Option<&str>, Timestamp),
    ) -> bool {
        used != Some(self.id.as_str())
            && block.kind != MASS_REMOVAL
            && now.since(self.at) <= FLEET_ACCEPTANCE
            && self.identity.is_earlier_than(found)
            && leaving.is_subset(&self.leaving)
    }
}
