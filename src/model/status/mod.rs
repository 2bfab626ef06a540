//! The status of an agent and its apps: the JSON of `demae status -o json`, of the agent's `/status`, and of the keys
//! under `state/`.

use serde::{Deserialize, Serialize};

use super::{
    desired::HostMode,
    name::{HostName, ImageDigest},
    observed::Verdict,
    problem::Problem,
    time::Timestamp,
};

/// The version of this format. A reader must not guess at an unknown one.
pub const VERSION: u32 = 1;

/// The JSON Schema (draft 2020-12) of `demae status -o json`. A test holds the output of the program to it.
pub const SCHEMA: &str = include_str!("status.schema.json");

/// One host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostStatus {
    /// [`VERSION`].
    pub version: u32,
    /// The host.
    pub host: HostName,
    /// Whether it takes apps.
    pub mode: HostMode,
    /// The version of the agent.
    pub agent: String,
    /// The agent's view of the store.
    pub store: StoreStatus,
    /// What the host as a whole waits for, if anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy: Option<String>,
    /// Why TCP apps get published ports, and nginx is reloaded for them, if it is not by this host's settings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp_routes: Option<String>,
    /// Its apps, by name.
    pub apps: Vec<AppStatus>,
    /// Unreadable keys that belong to no app.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unreadable: Vec<Problem>,
}

/// The agent's view of etcd.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StoreStatus {
    /// The revision last read; 0 before the first read.
    pub revision: i64,
    /// When the store was last known to be in sync.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub synced: Option<Timestamp>,
    /// Why it is unreachable now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Why it is quarantined.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block: Option<StoreBlock>,
    /// Set while the agent runs from its ledger: when that was last in sync.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stale_since: Option<Timestamp>,
}

/// Why a reachable store is quarantined. An operator must resolve it; until then the last good state stays.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreBlock {
    /// Its kind.
    pub kind: String,
    /// The cause.
    pub message: String,
    /// What an operator can do.
    pub remedy: String,
}

impl StoreBlock {
    /// Every kind.
    pub const KINDS: [&'static str; 5] =
        ["sentinel_missing", "other_store", "older_revision", "mass_removal", NAME_TAKEN];
}

/// The kind of a block while another agent has the name of this host.
pub const NAME_TAKEN: &str = "name_taken";

impl std::fmt::Display for StoreBlock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.message, self.remedy)
    }
}

/// One app on one host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AppStatus {
    /// The app.
    pub app: String,
    /// The host.
    pub host: HostName,
    /// Its state.
    pub state: State,
    /// The wanted release.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release: Option<String>,
    /// The mod revision of the spec that this is about; 0 if there is none, and from agents that do not say it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub spec_revision: i64,
    /// The serving release, if it differs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serving: Option<String>,
    /// The wanted image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Its digest, by its reference, or by what a host has written of the release.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<ImageDigest>,
    /// Number of wanted instances.
    pub wanted: u16,
    /// Number of healthy instances that serve.
    pub healthy: u16,
    /// When it entered this state.
    pub since: Timestamp,
    /// Why it is not converged, in one sentence; or that a person pinned what it runs.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// The same for programs, a bounded set: kinds of blocks, waits and failed steps as in the metrics, `unhealthy` after an
    /// instance was discarded for its health, and `unobserved` if the app cannot be inspected.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kinds: Vec<String>,
    /// The evidence against the wanted release, if it failed here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdict: Option<Verdict>,
    /// The steps of the last change, with milliseconds since it was seen.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub timeline: Vec<Moment>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
fn is_zero(revision: &i64) -> bool {
    *revision == 0
}

impl AppStatus {
    /// The release that the instances of this host run: the serving one, if it differs from the wanted one.
    pub fn runs(&self) -> Option<&str> {
        self.serving.as_deref().or(self.release.as_deref())
    }

    /// The same, if any of them is healthy.
    pub fn serves(&self) -> Option<&str> {
        self.runs().filter(|_| self.healthy > 0)
    }

    /// Whether something of this kind holds it back.
    pub fn is(&self, kind: &str) -> bool {
        self.kinds.iter().any(|known| known == kind)
    }
}

/// A milestone of a change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// Its name: `pulled`, `started`, `healthy`, `switched`, `proven`, `drained`, `stopped` and so on.
    pub what: String,
    /// Milliseconds since the change was seen in the store.
    pub ms: u64,
}

/// The state of an app.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It matches the desired state.
    Converged,
    /// A step or wait is in progress.
    Converging,
    /// An operator must act.
    Blocked,
    /// Its spec or another key is invalid.
    Invalid,
    /// An operator paused it.
    Paused,
    /// Leaving this host.
    Leaving,
}

impl State {
    /// Every state.
    pub const ALL: [Self; 6] =
        [Self::Converged, Self::Converging, Self::Blocked, Self::Invalid, Self::Paused, Self::Leaving];

    /// Its name, as serialized.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Converged => "converged",
            State::Converging => "converging",
            State::Blocked => "blocked",
            State::Invalid => "invalid",
            State::Paused => "paused",
            State::Leaving => "leaving",
        }
    }
}
