//! The observed state of this host.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddrV4},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{
    name::{ContainerId, ImageDigest, ImageRef, ReleaseId},
    spec::{Endpoint, HealthCheck},
    time::Timestamp,
};

/// One app on this host.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ObservedApp {
    /// Its containers, by release and number.
    pub instances: Vec<Instance>,
    /// The local id of the wanted image, if it is on this host.
    pub image: Option<String>,
    /// What the registry called that image when the agent pulled it; `None` if others pulled, built or loaded it, or it was
    /// not looked for.
    pub image_digest: Option<ImageDigest>,
    /// Whether Docker refused to create a container since the image is gone, though other containers of the release
    /// still use it.
    pub image_lost: bool,
    /// Whether this agent has pulled the image for the wanted release.
    pub pulled: bool,
    /// Its route symlinks: slot to instance; `None` if the target is unknown.
    pub slots: BTreeMap<u16, Option<InstanceKey>>,
    /// Its slots in the kernel's table: slot to instance; `None` if the table leads elsewhere.
    pub mapped: BTreeMap<u16, Option<InstanceKey>>,
    /// The stable addresses of its slots in that table, as many as it has ever had or is to have.
    pub slot_addresses: BTreeMap<u16, Ipv4Addr>,
    /// When a symlink or an entry of the table last changed.
    pub slots_changed: Timestamp,
    /// Releases with an env-file.
    pub env_files: BTreeSet<ReleaseId>,
    /// Instances with a socket directory.
    pub socket_dirs: BTreeSet<InstanceKey>,
    /// The release last proven through nginx (for a worker: by health).
    pub proven: Option<ReleaseId>,
    /// When that was recorded.
    pub proven_at: Option<Timestamp>,
    /// Releases that failed here.
    pub verdicts: BTreeMap<ReleaseId, Verdict>,
    /// Containers of this host's name and this app that another agent created.
    pub foreign: Vec<Foreign>,
}

impl ObservedApp {
    /// Its slots of a kind.
    pub fn routes(&self, via: Via) -> &BTreeMap<u16, Option<InstanceKey>> {
        match via {
            Via::Symlinks => &self.slots,
            Via::Table => &self.mapped,
        }
    }

    /// Whether it has a slot of any kind.
    pub fn has_routes(&self) -> bool {
        Via::ALL.iter().any(|via| !self.routes(*via).is_empty())
    }
}

/// How a slot leads to an instance without nginx knowing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Via {
    /// By a symlink, to a unix socket.
    Symlinks,
    /// By an entry in a table of the kernel, from a stable address to that of the instance.
    Table,
}

impl Via {
    /// Both.
    pub const ALL: [Via; 2] = [Self::Symlinks, Self::Table];
}

/// A container of this host's name that another agent created.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Foreign {
    /// Its name.
    pub name: String,
    /// Its owner, in words.
    pub owner: String,
}

/// What to look for when observing an app.
#[derive(Debug, Clone, PartialEq)]
pub struct Wanted {
    /// The wanted release.
    pub release: ReleaseId,
    /// Its image.
    pub image: ImageRef,
    /// Which one that is, whatever its tag means; `None` if the tag says it.
    pub digest: Option<ImageDigest>,
    /// Whether to look the image up even if a live instance has it.
    pub image_lost: bool,
    /// For how many slots it needs stable addresses: as many as replicas, if it listens on one port.
    pub slots: u16,
}

/// Identifies an instance: its release and its number, which distinguishes replicas.
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
    /// The image as requested in the spec, if its container has that label.
    pub requested_image: Option<ImageRef>,
    /// Its state in Docker.
    pub phase: Phase,
    /// The result of its health checks.
    pub health: Health,
    /// Whether Docker keeps it running: set once it is proven.
    pub settled: bool,
    /// Whether the agent stopped it, or was about to, before its release was proven. Its exit code says nothing then.
    pub leaving: bool,
    /// Whether it was OOM-killed.
    pub out_of_memory: bool,
    /// When it last started, or was created.
    pub started: Timestamp,
    /// How often Docker has restarted it.
    pub restarts: u32,
    /// Where it takes requests.
    pub address: Option<Address>,
    /// Further addresses, in the order of its release.
    pub more: Vec<Address>,
    /// Its endpoint inside the container for each address; empty if unknown.
    pub listens: Vec<Endpoint>,
    /// Connections of nginx to it, if counted.
    pub connections: Option<usize>,
    /// When it was last seen without connections. A request that came later has its own drain time.
    pub idle_at: Option<Timestamp>,
    /// Its own check, from its labels: an old instance is checked as its release says.
    pub check: HealthCheck,
    /// The `Host` of its check, unless the check names one.
    pub check_host: Option<String>,
    /// Its own drain time.
    pub drain: Duration,
    /// Time to exit before it is killed.
    pub grace: Duration,
    /// Whether its socket is dead: nothing listens on it.
    pub stale_socket: bool,
    /// Whether its socket path is not a socket, and nginx would follow a symlink anywhere; or its address in demae's
    /// network is not the one it was created with, which may be another's by now.
    pub wrong_address: bool,
    /// Whether it is down and another program has its port: it can never be started again.
    pub port_taken: bool,
    /// What it has mounted of the host, without directories of demae's own.
    pub binds: Vec<Bind>,
}

/// A path of the host that is mounted into a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// The path, as it was given.
    pub source: String,
    /// Whether the container may only read it.
    pub read_only: bool,
    /// What it led to when the container was created; `None` if that is not known.
    pub real: Option<String>,
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

    /// All its addresses.
    pub fn addresses(&self) -> impl Iterator<Item = &Address> {
        self.address.iter().chain(&self.more)
    }

    /// The address for an endpoint inside the container; without one, the first address.
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
    /// A port of its own address in demae's network, the same for the life of the container.
    Own(SocketAddrV4),
}

impl Address {
    /// How requests are led there, if not by nginx's configuration.
    pub fn via(&self) -> Option<Via> {
        match self {
            Self::Socket(_) => Some(Via::Symlinks),
            Self::Own(_) => Some(Via::Table),
            Self::Port(_) => None,
        }
    }
}

/// The state of a container in Docker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    /// Created, never started.
    Created,
    /// Its process runs.
    Running,
    /// Paused.
    Paused,
    /// Between two starts by Docker.
    Restarting,
    /// Exited with this code.
    Exited(i64),
    /// Being removed, or stuck in it.
    Removing,
}

impl Phase {
    /// Docker's name for it.
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

/// The health of an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// Not probed yet by this agent. Never a reason to take an instance out of service.
    Unknown,
    /// Not healthy yet, before its deadline; the last probe result.
    Starting(String),
    /// Healthy.
    Healthy,
    /// It stopped being healthy, or missed its deadline.
    Unhealthy {
        /// Since when.
        since: Timestamp,
        /// The last probe result.
        answer: String,
    },
}

impl Health {
    /// Whether it is known to be healthy.
    pub fn is_healthy(&self) -> bool {
        *self == Health::Healthy
    }

    /// Whether it is known to be unhealthy.
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
    /// Digest of what it depends on beside the release: see [`Target::conditions`](super::desired::Target::conditions).
    /// Empty if written by a version without it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub conditions: String,
}

impl Verdict {
    /// Whether it was given under these [conditions](super::desired::Target::conditions), whatever the templates of the
    /// host were. One without conditions always counts.
    pub fn is_under(&self, conditions: &str) -> bool {
        self.conditions.split(' ').next().is_none_or(|own| own.is_empty() || own == conditions)
    }
}

fn once() -> u32 {
    1
}
