//! Writes to the store that hold only if nothing they were decided from has changed.

use crate::model::{
    name::{AppName, HostName, ReleaseId},
    text::json,
};

/// A key that transactions of rollouts compare or write.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum FleetKey {
    /// `state/leader`
    Leader,
    /// `state/hosts/<host>`, on the lease of its agent
    Host(HostName),
    /// `state/rollouts/<app>`
    Rollout(AppName),
    /// `state/permits/<host>/<app>`
    Permit(HostName, AppName),
    /// `state/verdicts/<app>/<release>/<host>`
    Verdict(AppName, ReleaseId, HostName),
    /// `state/lost/<app>/<host>`
    Lost(AppName, HostName),
    /// `state/proven/<host>/<app>`
    Proof(HostName, AppName),
    /// `state/apps/<host>/<app>`, on the lease of its agent
    Status(HostName, AppName),
    /// `state/releases/<app>/<release>`
    Kept(AppName, ReleaseId),
    /// `secret/releases/<app>/<release>`
    KeptEnv(AppName, ReleaseId),
    /// `state/commands/<app>/<release>`
    Command(AppName, ReleaseId),
    /// `state/digests/<app>/<release>`
    Digest(AppName, ReleaseId),
    /// `apps/<app>/spec`
    Spec(AppName),
    /// `apps/<app>/image`
    Image(AppName),
    /// `apps/<app>/retry`
    Retry(AppName),
    /// `freeze`
    Freeze,
}

/// What must hold for a transaction to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// The create revision of a key; 0 if there is none.
    Created(FleetKey, i64),
    /// The mod revision of a key; 0 if there is none.
    Modified(FleetKey, i64),
    /// The key of this host's name is on the lease of this run of its agent.
    HoldsName(HostName),
    /// No verdict of this release is newer than this revision.
    NoVerdictSince(AppName, ReleaseId, i64),
}

/// One write of a transaction. Its debug form has no value, which may hold secrets.
#[derive(Clone, PartialEq, Eq)]
pub enum Write {
    /// Puts a value.
    Put(FleetKey, String),
    /// Deletes a key.
    Delete(FleetKey),
}

impl std::fmt::Debug for Write {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Put(key, _) => write!(f, "Put({key:?})"),
            Self::Delete(key) => write!(f, "Delete({key:?})"),
        }
    }
}

impl Write {
    /// Puts a record.
    pub fn record(key: FleetKey, record: &impl serde::Serialize) -> Self {
        Self::Put(key, json(record))
    }
}

/// Why a transaction is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum TransactionKind {
    /// The leader opens a rollout, or replaces one, and may grant the first permit.
    Open,
    /// The leader grants permits.
    Grant,
    /// The leader changes the phase of a rollout.
    ChangePhase,
    /// The leader takes back a permit of a host that is gone and has switched nothing.
    Withdraw,
    /// The leader gives up a host that went away in its turn.
    DeclareLost,
    /// A host is about to move requests, or to stop what served.
    Commit,
    /// A host has proven a release.
    Prove,
    /// A host has found that a release fails.
    Judge,
    /// A host gives its permit back.
    GiveBack,
    /// A host puts back its permit, which was deleted during its turn.
    Restore,
    /// A host is about to start the command of a release.
    StartCommand,
    /// The command of a release has ended.
    EndCommand,
    /// A host has pulled the image of a release, and no other one has before.
    WriteDigest,
}

impl TransactionKind {
    /// Every kind.
    pub const ALL: [Self; 13] = [
        Self::Open,
        Self::Grant,
        Self::ChangePhase,
        Self::Withdraw,
        Self::DeclareLost,
        Self::Commit,
        Self::Prove,
        Self::Judge,
        Self::GiveBack,
        Self::Restore,
        Self::StartCommand,
        Self::EndCommand,
        Self::WriteDigest,
    ];

    /// Its name in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Grant => "grant",
            Self::ChangePhase => "change-phase",
            Self::Withdraw => "withdraw",
            Self::DeclareLost => "declare-lost",
            Self::Commit => "commit",
            Self::Prove => "prove",
            Self::Judge => "judge",
            Self::GiveBack => "give-back",
            Self::Restore => "restore",
            Self::StartCommand => "start-command",
            Self::EndCommand => "end-command",
            Self::WriteDigest => "write-digest",
        }
    }
}

/// Writes that are made together, or not at all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transaction {
    /// Why.
    pub kind: TransactionKind,
    /// All of them must hold.
    pub conditions: Vec<Condition>,
    /// What is written then.
    pub writes: Vec<Write>,
}
