//! A rollout over the hosts of a fleet: what is written to the store about it, and the turn of a host.

mod record;
mod transaction;

pub use record::{
    Capacity, CommandEnd, CommandRun, CommandState, EndedCommand, HostVerdict, KeptEnv, KeptRelease, Leader, Lost,
    Permit, PermitPhase, Proof, ResolvedImage, Rollout, RolloutPhase, SCHEME, VERSION,
};
pub use transaction::{Condition, FleetKey, Transaction, TransactionKind, Write};

use std::time::Duration;

use super::{desired::Target, name::ImageDigest, spec::PullPolicy};

/// Why nothing is started of a release whose image is [`FleetImage::Unreadable`].
pub const UNREADABLE_IMAGE: &str =
    "the record of which image it is, in `state/digests/`, cannot be read by this version";

/// Which image a release is in the fleet. A tag may mean another one a moment later, so the host that pulls it first
/// writes its digest down, and all hosts run that.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum FleetImage {
    /// The one that its reference leads to here: that can only ever be one, or this host takes no turns.
    #[default]
    AsNamed,
    /// The one that is pulled first; its digest is not written yet.
    Unwritten,
    /// The one with this digest.
    Written(ImageDigest),
    /// Whether it is written was not read yet.
    Unread,
    /// It is written which, in a form that this version cannot read.
    Unreadable,
}

impl FleetImage {
    /// By what is written of a release: `None` if nothing is, `Some(None)` if it cannot be read. An image that hosts do not
    /// pull is the one that each of them has.
    pub fn of(target: &Target, written: Option<Option<&ImageDigest>>) -> Self {
        let image = &target.release.image;
        if image.is_fixed() || image.archive().is_some() || target.pull_policy == PullPolicy::Never {
            return Self::AsNamed;
        }
        match written {
            None => Self::Unwritten,
            Some(None) => Self::Unreadable,
            Some(Some(digest)) => Self::Written(digest.clone()),
        }
    }

    /// Its digest, if that is written.
    pub fn digest(&self) -> Option<&ImageDigest> {
        match self {
            Self::Written(digest) => Some(digest),
            Self::AsNamed | Self::Unwritten | Self::Unread | Self::Unreadable => None,
        }
    }
}

/// What a host may do about the wanted release of an app. It binds only while that release is not proven on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Turn {
    /// Everything: the fleet has proven the release, or nothing limits how many hosts change at a time.
    Free,
    /// Nothing, for this reason: what serves keeps serving.
    Held(String),
    /// Start instances beside the old ones. Nothing is taken from the old release, and no request goes to the new one.
    Try,
    /// Everything: the record of it says so.
    Switch {
        /// How long the release must serve before it counts as proven.
        monitor: Duration,
        /// False if the record was written so long ago that it must be confirmed before requests move.
        confirmed: bool,
    },
}

impl Turn {
    /// Whether requests may move to the wanted release, and its predecessor may be stopped for it.
    pub fn may_switch(&self) -> bool {
        matches!(self, Self::Free | Self::Switch { confirmed: true, .. })
    }

    /// How long the release must serve before it counts as proven.
    pub fn monitor(&self) -> Duration {
        match self {
            Self::Switch { monitor, .. } => *monitor,
            Self::Free | Self::Held(_) | Self::Try => Duration::ZERO,
        }
    }
}
