//! Pure decisions: from desired and observed state to the next safe step.
//!
//! Time is an input; there is no I/O, no log, no randomness and no async, so each decision can be shown as a table,
//! checked as a property, and made again after any crash.

pub mod app;
pub mod check;
mod draft;
mod group;
pub mod proxy;
mod retire;
mod routes;
pub mod simulate;
pub mod step;
pub mod wait;

use std::collections::BTreeMap;

use crate::model::{
    desired::DesiredApp,
    fleet::{FleetImage, Turn},
    mounts::NestedMount,
    name::{AppName, ContainerId, ReleaseId},
    observed::{Instance, ObservedApp},
    policy::Policy,
    proxy::{Rejected, Vhost},
    time::Timestamp,
};
use step::{Planned, StepKind};
use wait::{Block, Wait};

/// All inputs of a plan for one app.
#[derive(Debug, Clone)]
pub struct AppInput<'a> {
    /// The app.
    pub app: &'a AppName,
    /// Desired state.
    pub desired: &'a DesiredApp,
    /// Observed state.
    pub observed: &'a ObservedApp,
    /// What this host may do about a release that is not proven on it.
    pub turn: &'a Turn,
    /// Which image the release is in the fleet.
    pub image: &'a FleetImage,
    /// What nginx serves of it.
    pub proxy: ProxyView<'a>,
    /// Another app that holds one of its virtual hosts.
    pub conflict: Option<proxy::Conflict>,
    /// Steps in backoff.
    pub backoffs: &'a Backoffs,
    /// A volume of the app that another mount can replace.
    pub nested: Option<&'a NestedMount>,
    /// What this host allows.
    pub policy: &'a Policy,
    /// Until when a deleted app stays as it is.
    pub stays_until: Option<Timestamp>,
    /// The step in flight, if any.
    pub busy: Option<StepKind>,
    /// Instances that are being stopped, and when they are killed. Other steps go on meanwhile.
    pub stopping: &'a Stopping,
    /// Now.
    pub now: Timestamp,
}

/// Instances that are being stopped, with the time at which they are killed.
pub type Stopping = BTreeMap<ContainerId, Timestamp>;

/// No instance is being stopped.
pub static NONE_STOPPING: Stopping = Stopping::new();

/// Nothing limits a host.
pub static FREE: Turn = Turn::Free;

impl AppInput<'_> {
    /// Whether an instance is being stopped.
    pub(crate) fn is_stopping(&self, instance: &Instance) -> bool {
        self.stopping.contains_key(&instance.id)
    }
}

/// What nginx serves of one app.
#[derive(Debug, Clone, Default)]
pub struct ProxyView<'a> {
    /// Its part of the live set.
    pub live: Option<&'a Vhost>,
    /// Whether the live set is what workers answer with.
    pub serving: bool,
    /// Its rejected vhost, and why.
    pub rejected: Option<&'a Rejected>,
    /// Whether workers with an older set still finish requests.
    pub old_workers: bool,
    /// When its part of the live set last changed or was removed.
    pub changed: Timestamp,
    /// Ports that requests went to in earlier sets; `None` if unknown.
    pub previous_ports: Option<&'a [u16]>,
    /// Why nginx as a whole cannot be changed now.
    pub trouble: Option<&'a str>,
    /// Digest of the templates and settings of this host.
    pub templates: &'a str,
}

/// Steps of one app that failed recently, by kind.
pub type Backoffs = BTreeMap<StepKind, Backoff>;

/// Backoff of a step that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backoff {
    /// Earliest next attempt.
    pub until: Timestamp,
    /// Consecutive failures.
    pub attempts: u32,
    /// The last error.
    pub error: String,
    /// Its kind.
    pub kind: &'static str,
    /// Whether a retry can help without an operator.
    pub temporary: bool,
}

/// The plan for one app.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AppPlan {
    /// The next step. Never more than one, so each is decided on the result of the last one.
    pub step: Option<Planned>,
    /// What it waits for.
    pub waits: Vec<Wait>,
    /// What an operator must resolve.
    pub blocks: Vec<Block>,
    /// What nginx should serve.
    pub vhost: VhostWish,
    /// Whether only its permit keeps it from moving requests to the wanted release, or from stopping an instance for it.
    pub commits: bool,
    /// The release that serves.
    pub serving: Option<ReleaseId>,
    /// Number of healthy instances that serve.
    pub healthy: u16,
}

impl AppPlan {
    /// Whether there is no step, wait or block.
    pub fn is_converged(&self) -> bool {
        self.step.is_none() && self.waits.is_empty() && self.blocks.is_empty()
    }

    /// When to plan again, if nothing happens before.
    pub fn wake_at(&self, now: Timestamp) -> Option<Timestamp> {
        self.waits.iter().filter_map(|w| w.recheck_at(now)).min()
    }
}

/// What nginx should serve of one app.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum VhostWish {
    /// What it serves now.
    #[default]
    Keep,
    /// This.
    Set(Vhost),
    /// This, though no instance is up yet; ignored while another app is served by one of its hosts.
    Announce(Vhost),
    /// Nothing.
    Remove,
}
