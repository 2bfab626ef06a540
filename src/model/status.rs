//! What an agent tells of itself and its apps: the JSON of `demae status -o json`, of the agent's `/status`, and of
//! the keys under `state/`.

use serde::{Deserialize, Serialize};

use super::{desired::HostMode, name::HostName, observed::Verdict, problem::Problem, time::Timestamp};

/// The version of this form. A reader that knows another must not guess.
pub const VERSION: u32 = 1;

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
    /// Whether the store has been read.
    pub store: StoreStatus,
    /// What nginx as a whole waits for, if anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy: Option<String>,
    /// By name.
    pub apps: Vec<AppStatus>,
    /// Keys that belong to no app because they cannot be read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unreadable: Vec<Problem>,
}

/// The agent's view of etcd.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StoreStatus {
    /// The revision last read; 0 before the first read.
    pub revision: i64,
    /// When the store was last proven to be as it was read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub synced: Option<Timestamp>,
    /// Why it cannot be read now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Why what it says is not taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block: Option<StoreBlock>,
    /// Set while the agent runs from what it kept on disk: when that was last proven.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stale_since: Option<Timestamp>,
}

/// Why a store that can be read is not believed. A person must end it; until then what was last good goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreBlock {
    /// In one word.
    pub kind: String,
    /// In one sentence.
    pub message: String,
    /// What a person can do.
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
    /// In one word.
    pub state: State,
    /// The release that is wanted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release: Option<String>,
    /// The release that serves, if it is another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serving: Option<String>,
    /// The image that is wanted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Instances that are wanted.
    pub wanted: u16,
    /// Instances that serve and are healthy.
    pub healthy: u16,
    /// When it came into this state.
    pub since: Timestamp,
    /// Why it is not converged, in one sentence.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// The evidence against the wanted release, if it failed here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdict: Option<Verdict>,
    /// The steps of the last change, with milliseconds since it was seen.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub timeline: Vec<Moment>,
}

/// Something that happened in a change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// What: `pulled`, `started`, `healthy`, `switched`, `proven`, `drained`, `stopped` and so on.
    pub what: String,
    /// Milliseconds since the change was seen in the store.
    pub ms: u64,
}

/// An app in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Converged,
    /// On its way, or waiting for something that ends by itself.
    Converging,
    /// A person must act.
    Blocked,
    /// What was written cannot be used.
    Invalid,
    /// Left as it is, because a person said so.
    Paused,
    /// Leaving this host.
    Leaving,
}

impl State {
    /// Every state.
    pub const ALL: [Self; 6] =
        [Self::Converged, Self::Converging, Self::Blocked, Self::Invalid, Self::Paused, Self::Leaving];

    /// The word.
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
