//! The records of a rollout, as JSON in the store. Unknown fields are ignored, so that versions can be mixed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::model::{
    name::{EnvName, HostName, ImageDigest, ReleaseId, SetName},
    time::Timestamp,
};

/// The version of these forms.
pub const VERSION: u32 = 1;
/// How release ids are made. A leader that makes them in another way must not take each of its ids for a new release.
pub const SCHEME: u32 = 1;

fn version() -> u32 {
    VERSION
}

/// `state/leader`: the agent that decides for the fleet. Its term is the create revision of this key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leader {
    /// [`VERSION`].
    #[serde(default = "version")]
    pub version: u32,
    /// Its host.
    pub host: HostName,
    /// The run of its agent.
    #[serde(default)]
    pub run: String,
    /// Since when.
    pub since: Timestamp,
}

/// The machine of a host, in `state/hosts/<host>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capacity {
    /// Its memory, in bytes.
    pub memory_bytes: u64,
    /// Its cores.
    pub cpus: u32,
    /// The size of the file system of Docker's data directory, in bytes; `None` if it is on no disk of this machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes: Option<u64>,
    /// What images must be made for, such as `linux/amd64`.
    pub platform: String,
    /// The version of its Docker engine.
    pub docker: String,
}

/// `state/rollouts/<app>`: the release that the fleet goes to. It is written only when the phase changes; its mod revision
/// is the epoch of its permits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rollout {
    /// [`VERSION`].
    #[serde(default = "version")]
    pub version: u32,
    /// The release.
    pub release: ReleaseId,
    /// The release that the fleet had proven before: what hosts go back to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<ReleaseId>,
    /// How far it is.
    pub phase: RolloutPhase,
    /// [`SCHEME`].
    #[serde(default = "version")]
    pub scheme: u32,
    /// How many hosts had the app when the phase last changed, also those that were down.
    #[serde(default)]
    pub hosts: u32,
    /// Whether a person pinned the release.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pinned: bool,
    /// When it was opened.
    pub opened: Timestamp,
    /// When the phase last changed.
    pub changed: Timestamp,
    /// Why it is in this phase, in one sentence; empty if there is nothing to say.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
}

impl Rollout {
    /// The release that the fleet has proven, as far as this record says: an aborted one never is.
    pub fn proven(&self) -> Option<&ReleaseId> {
        match self.phase {
            RolloutPhase::Done | RolloutPhase::Restored => Some(&self.release),
            _ => self.from.as_ref(),
        }
    }
}

/// How far a rollout is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RolloutPhase {
    /// On the canaries.
    Canary,
    /// Proven on the canaries; a person, or a time, promotes it.
    Waiting,
    /// Turn by turn over all hosts.
    Rolling,
    /// Proven on every host that was up.
    Done,
    /// A release that was proven before is wanted again: hosts take it without a turn.
    Restored,
    /// Stopped by a failure; what serves serves.
    Halted,
    /// Stopped by a failure; hosts go back to the release before.
    Reverting,
    /// No host has a turn any more.
    Reverted,
}

impl RolloutPhase {
    /// Every phase.
    pub const ALL: [Self; 8] = [
        Self::Canary,
        Self::Waiting,
        Self::Rolling,
        Self::Done,
        Self::Restored,
        Self::Halted,
        Self::Reverting,
        Self::Reverted,
    ];

    /// Its name, as serialized.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Canary => "canary",
            Self::Waiting => "waiting",
            Self::Rolling => "rolling",
            Self::Done => "done",
            Self::Restored => "restored",
            Self::Halted => "halted",
            Self::Reverting => "reverting",
            Self::Reverted => "reverted",
        }
    }

    /// Whether it goes on by itself.
    pub fn is_under_way(self) -> bool {
        matches!(self, Self::Canary | Self::Waiting | Self::Rolling)
    }
}

/// `state/permits/<host>/<app>`: the turn of a host. It hangs on no lease: a host that is gone still counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Permit {
    /// [`VERSION`].
    #[serde(default = "version")]
    pub version: u32,
    /// For which release.
    pub release: ReleaseId,
    /// The mod revision of the rollout when it was granted; 0 if both were written at once, so that it is the create
    /// revision of the permit.
    pub epoch: i64,
    /// How far the host may go.
    pub phase: PermitPhase,
    /// When it was granted.
    pub granted: Timestamp,
    /// The newest verdict of this release that the leader knew.
    #[serde(default)]
    pub seen: i64,
    /// Whether a newer verdict keeps the host from switching: no failure is allowed.
    #[serde(default)]
    pub strict: bool,
    /// Whether nothing of the app was proven in the fleet: there is nothing to go back to, so a host on which the release
    /// fails keeps its turn, and tries again.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub first: bool,
}

/// How far a permit goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PermitPhase {
    /// Nothing irreversible was done.
    Try,
    /// Requests may go to the release.
    Switch,
}

/// `state/verdicts/<app>/<release>/<host>`: the release failed there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostVerdict {
    /// [`VERSION`].
    #[serde(default = "version")]
    pub version: u32,
    /// Why, in one sentence.
    pub cause: String,
    /// The exit code, if its process ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i64>,
    /// The end of its log, without the values of its environment.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub log_tail: String,
    /// When.
    pub at: Timestamp,
}

/// `state/lost/<app>/<host>`: the host went away in a turn, with requests possibly on an unproven release.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lost {
    /// [`VERSION`].
    #[serde(default = "version")]
    pub version: u32,
    /// The release of its permit.
    pub release: ReleaseId,
    /// When it was given up.
    pub at: Timestamp,
}

/// `state/proven/<host>/<app>`: the release that a host has proven last. On no lease, so that a restarted store or host is
/// never taken for one on which nothing ran.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proof {
    /// [`VERSION`].
    #[serde(default = "version")]
    pub version: u32,
    /// The release; `None` if the host has none of this app.
    pub release: Option<ReleaseId>,
}

/// `state/releases/<app>/<release>`: what a release was made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptRelease {
    /// [`VERSION`].
    #[serde(default = "version")]
    pub version: u32,
    /// `apps/<app>/spec`.
    pub spec: String,
    /// `apps/<app>/image`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// `apps/<app>/restart`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restart: Option<String>,
    /// When its rollout was opened.
    pub opened: Timestamp,
    /// When its rollout was done; `None` if it never was. Only then hosts may go back to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proven: Option<Timestamp>,
    /// Who wanted it, and why: `apps/<app>/by`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
}

/// `state/commands/<app>/<release>`: the run of the release's command, of which there is one in the fleet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandRun {
    /// [`VERSION`].
    #[serde(default = "version")]
    pub version: u32,
    /// The host that runs it, or has run it.
    pub host: HostName,
    /// The run of its agent that wrote the start.
    #[serde(default)]
    pub run: String,
    /// How far it is.
    pub state: CommandState,
    /// When it was started.
    pub started: Timestamp,
    /// Why it failed, or is unknown; empty otherwise.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub cause: String,
}

/// `state/digests/<app>/<release>`: the image that a release is on every host, whatever its tag means by now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolvedImage {
    /// [`VERSION`].
    #[serde(default = "version")]
    pub version: u32,
    /// What the tag meant when the release was first pulled.
    pub digest: ImageDigest,
    /// The host that has pulled it.
    pub host: HostName,
}

/// How far the command of a release is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CommandState {
    /// It was started, and may have ended.
    Started,
    /// It has ended with exit code 0.
    Done,
    /// It has ended otherwise.
    Failed,
    /// Whether it has run is not known: a person decides.
    Unknown,
}

/// A run of a command that ended on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndedCommand {
    /// Of which release.
    pub release: ReleaseId,
    /// When it was started, by its record.
    pub started: Timestamp,
    /// How it ended.
    pub end: CommandEnd,
    /// The digest of the image that it ran from, if the registry gave it one.
    pub digest: Option<ImageDigest>,
}

/// How the command of a release ended on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CommandEnd {
    /// With exit code 0.
    Done,
    /// Otherwise: the evidence.
    Failed(HostVerdict),
    /// It is not known, for this reason.
    Unknown(String),
}

impl std::fmt::Display for CommandEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Done => f.write_str("exit code 0"),
            Self::Failed(verdict) => f.write_str(&verdict.cause),
            Self::Unknown(why) => write!(f, "whether it has run is not known: {why}"),
        }
    }
}

/// `secret/releases/<app>/<release>`: the variables of a release, by set.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptEnv {
    /// [`VERSION`].
    #[serde(default = "version")]
    pub version: u32,
    /// Values by set and name.
    pub sets: BTreeMap<SetName, BTreeMap<EnvName, String>>,
}

impl std::fmt::Debug for KeptEnv {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeptEnv").field("sets", &self.sets.keys().collect::<Vec<_>>()).finish_non_exhaustive()
    }
}
