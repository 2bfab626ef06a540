//! What is true on this host, as far as it was looked at.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{
    name::{ContainerId, ImageRef, ReleaseId},
    spec::{Endpoint, HealthCheck},
    time::Timestamp,
};

/// One app on this host.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ObservedApp {
    /// Its containers, by release and number.
    pub instances: Vec<Instance>,
    /// The local id of the image that is wanted, if it is on this host.
    pub image: Option<String>,
    /// Whether the engine refused to make a container since the image is gone, though others of the release still have it.
    pub image_lost: bool,
    /// Whether this agent has pulled the image for the release that is wanted.
    pub pulled: bool,
    /// Its route symlinks: slot to the instance it leads to; `None` where it leads nowhere known.
    pub slots: BTreeMap<u16, Option<InstanceKey>>,
    /// When the symlinks last changed.
    pub slots_changed: Timestamp,
    /// Releases with an env-file.
    pub env_files: BTreeSet<ReleaseId>,
    /// Instances with a socket directory.
    pub socket_dirs: BTreeSet<InstanceKey>,
    /// The release last proven through nginx (or, for a worker, seen healthy).
    pub proven: Option<ReleaseId>,
    /// When that was recorded.
    pub proven_at: Option<Timestamp>,
    /// Releases that failed here.
    pub verdicts: BTreeMap<ReleaseId, Verdict>,
    /// Containers with this host's name and this app's that another agent made.
    pub foreign: Vec<Foreign>,
}

/// A container that has this host's name, and that another agent made.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Foreign {
    /// Its name.
    pub name: String,
    /// Whose it is, in words.
    pub owner: String,
}

/// What an app is looked at for.
#[derive(Debug, Clone, PartialEq)]
pub struct Wanted {
    /// The release that is wanted.
    pub release: ReleaseId,
    /// Its image.
    pub image: ImageRef,
    /// Whether its image is to be looked for even if an instance that lives has it.
    pub image_lost: bool,
}

/// Which instance: its release and its number, which tells replicas of one release apart.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct InstanceKey {
    /// The release.
    pub release: ReleaseId,
    /// From 1.
    pub number: u16,
}

impl std::fmt::Display for InstanceKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.release, self.number)
    }
}

/// A container of a release.
#[derive(Debug, Clone, PartialEq)]
pub struct Instance {
    /// Its key.
    pub key: InstanceKey,
    /// Docker's id.
    pub id: ContainerId,
    /// Docker's id of its image.
    pub image: String,
    /// The image as it was ordered, where its container tells.
    pub ordered: Option<ImageRef>,
    /// What Docker says of it.
    pub phase: Phase,
    /// What its checks say.
    pub health: Health,
    /// Whether Docker keeps it running: given once it is proven.
    pub settled: bool,
    /// Whether the agent ended it, or was about to, before its release was proven. How it ended says nothing then.
    pub leaving: bool,
    /// Whether it was OOM-killed.
    pub out_of_memory: bool,
    /// When it last started, or was created.
    pub started: Timestamp,
    /// How often Docker has started it again by itself.
    pub restarts: u32,
    /// Where it takes requests.
    pub address: Option<Address>,
    /// Where it takes requests beside that, in the order of its release.
    pub more: Vec<Address>,
    /// Where it listens inside, for each of its addresses; nothing where that is not known.
    pub listens: Vec<Endpoint>,
    /// Connections that nginx has to it, where that was counted.
    pub connections: Option<usize>,
    /// Its own check, from its labels: an old instance is asked as its release says.
    pub check: HealthCheck,
    /// The host that its check asks for, unless the check names one.
    pub check_host: Option<String>,
    /// Its own drain time.
    pub drain: Duration,
    /// How long it may take to end.
    pub grace: Duration,
    /// Whether a socket lies there that nobody listens on.
    pub stale_socket: bool,
    /// Whether something else than a socket lies in the place of its socket: a symlink would lead nginx anywhere.
    pub wrong_socket: bool,
    /// Whether it does not run and another program has its port meanwhile: it can never be started again.
    pub port_taken: bool,
}

impl Instance {
    /// Whether it could answer a request.
    pub fn is_running(&self) -> bool {
        self.phase == Phase::Running
    }

    /// Whether its process may exist.
    pub fn is_alive(&self) -> bool {
        matches!(self.phase, Phase::Running | Phase::Paused | Phase::Restarting)
    }

    /// Everywhere it takes requests.
    pub fn addresses(&self) -> impl Iterator<Item = &Address> {
        self.address.iter().chain(&self.more)
    }

    /// Where it takes the requests that are for a place inside: for the only place, or the first, unless that is named.
    pub fn address_of(&self, endpoint: Option<&Endpoint>) -> Option<&Address> {
        match endpoint {
            None => self.address.as_ref(),
            Some(endpoint) => self.addresses().nth(self.listens.iter().position(|e| e == endpoint)?),
        }
    }

    /// When it must be healthy at the latest.
    pub fn deadline(&self) -> Timestamp {
        self.started.plus(self.check.deadline())
    }
}

/// Where an instance takes requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A unix socket at this path of the host.
    Socket(String),
    /// A port of the loopback address.
    Port(u16),
}

/// What Docker says of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    /// Made, never started.
    Created,
    /// Its process runs.
    Running,
    /// Frozen by somebody.
    Paused,
    /// Between two starts by Docker.
    Restarting,
    /// Ended, with this code.
    Exited(i64),
    /// Being removed, or stuck in it.
    Removing,
}

impl Phase {
    /// Docker's word for it.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Restarting => "restarting",
            Self::Exited(_) => "exited",
            Self::Removing => "removing",
        }
    }
}

/// What the checks say of an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// Not asked yet by this agent. Never a reason to take an instance out of service.
    Unknown,
    /// Asked, not healthy yet; the last answer.
    Starting(String),
    /// Healthy.
    Healthy,
    /// It was healthy, or its time is over.
    Unhealthy {
        /// Since when.
        since: Timestamp,
        /// The last answer.
        answer: String,
    },
}

impl Health {
    /// Whether it is known to be well.
    pub fn is_healthy(&self) -> bool {
        *self == Health::Healthy
    }

    /// Whether it is known to be unwell.
    pub fn is_unhealthy(&self) -> bool {
        matches!(self, Health::Unhealthy { .. })
    }
}

/// Why a release failed on this host. Kept until another release is wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// The release.
    pub release: ReleaseId,
    /// One sentence.
    pub cause: String,
    /// The exit code, if its process ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i64>,
    /// The end of its log.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub log_tail: String,
    /// When.
    pub at: Timestamp,
    /// How often it has failed here in a row.
    #[serde(default = "once")]
    pub attempts: u32,
    /// Stands for what it depends on beside the release: see [`Target::conditions`](super::desired::Target::conditions).
    /// Empty from a demae that did not say.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub conditions: String,
}

fn once() -> u32 {
    1
}
