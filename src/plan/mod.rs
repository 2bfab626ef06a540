//! Decisions, and nothing but decisions: from what is wanted and what is observed to the next safe step.
//!
//! Everything here is pure. The time is an input; there is no I/O, no log, no randomness and no async, so each decision
//! can be shown as a table, checked as a property, and made again after any crash.

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
    mounts::NestedMount,
    name::{AppName, ContainerId, ReleaseId},
    observed::{Instance, ObservedApp},
    proxy::{Rejected, Vhost},
    time::Timestamp,
};
use step::{Planned, StepKind};
use wait::{Block, Wait};

/// Everything a decision about one app is made from.
#[derive(Debug, Clone)]
pub struct AppInput<'a> {
    /// The app.
    pub app: &'a AppName,
    /// What is wanted.
    pub desired: &'a DesiredApp,
    /// What is there.
    pub observed: &'a ObservedApp,
    /// What nginx serves of it.
    pub proxy: ProxyView<'a>,
    /// Another app that holds one of its virtual hosts.
    pub conflict: Option<proxy::Conflict>,
    /// Steps that failed and are not due yet.
    pub cooling: &'a Cooling,
    /// A volume of its that another mount can replace.
    pub nested: Option<&'a NestedMount>,
    /// Until when it stays as it is though it is not wanted any more.
    pub stays_until: Option<Timestamp>,
    /// The step under way, if one is.
    pub busy: Option<StepKind>,
    /// Instances that were asked to end, and until when they may take for it. That holds up nothing else.
    pub stopping: &'a Stopping,
    /// Now.
    pub now: Timestamp,
}

/// Instances that were asked to end, with the time at which they are killed.
pub type Stopping = BTreeMap<ContainerId, Timestamp>;

/// Where none is.
pub static NONE_STOPPING: Stopping = Stopping::new();

impl AppInput<'_> {
    /// Whether an instance was asked to end already.
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
    /// Its vhost that was refused, and why.
    pub rejected: Option<&'a Rejected>,
    /// Whether workers with an older set still finish requests.
    pub old_workers: bool,
    /// When its part of the live set last changed, or went.
    pub changed: Timestamp,
    /// Ports that requests went to in earlier sets; `None` where that is not known.
    pub left: Option<&'a [u16]>,
    /// Why nginx as a whole cannot be changed now.
    pub trouble: Option<&'a str>,
    /// Stands for the templates and settings of this host.
    pub templates: &'a str,
}

/// Steps of one app that failed lately.
pub type Cooling = BTreeMap<StepKind, Cooled>;

/// A step that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cooled {
    /// Not again before.
    pub until: Timestamp,
    /// Failures in a row.
    pub attempts: u32,
    /// The last error.
    pub error: String,
    /// Whether trying again can help without a person.
    pub temporary: bool,
}

/// The decision about one app.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AppPlan {
    /// The next step. Never more than one, so that each is decided on what the last one left.
    pub step: Option<Planned>,
    /// What ends by itself.
    pub waits: Vec<Wait>,
    /// What a person must end.
    pub blocks: Vec<Block>,
    /// What nginx should serve.
    pub vhost: VhostWish,
    /// The release that serves.
    pub serving: Option<ReleaseId>,
    /// How many healthy instances serve.
    pub healthy: u16,
}

impl AppPlan {
    /// Whether nothing is left to do, to wait for or to complain about.
    pub fn is_converged(&self) -> bool {
        self.step.is_none() && self.waits.is_empty() && self.blocks.is_empty()
    }

    /// When this is to be looked at again, if nothing happens before.
    pub fn wake_at(&self, now: Timestamp) -> Option<Timestamp> {
        self.waits.iter().filter_map(|w| w.look_again(now)).min()
    }
}

/// What one app wants of nginx.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum VhostWish {
    /// Whatever it serves of it now.
    #[default]
    Keep,
    /// This.
    Set(Vhost),
    /// This, though nobody answers there yet, unless another app is still served by one of its hosts.
    Announce(Vhost),
    /// Nothing.
    Remove,
}
