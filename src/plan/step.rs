//! Steps. A step carries all it needs, so its execution decides nothing.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use crate::model::{
    name::{ContainerId, ImageDigest, ImageRef, ReleaseId},
    observed::{InstanceKey, Via},
    release::Release,
    spec::{HealthCheck, Ingress},
};

/// A step and its reason.
#[derive(Debug, Clone, PartialEq)]
pub struct Planned {
    /// The step.
    pub step: Step,
    /// The reason, as the end of a sentence.
    pub reason: &'static str,
}

impl Planned {
    pub(super) fn new(step: Step, reason: &'static str) -> Self {
        Self { step, reason }
    }
}

impl fmt::Display for Planned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.step, self.reason)
    }
}

/// The kind of a failed pull of an image that the registry does not have.
pub const IMAGE_ABSENT: &str = "image_absent";

/// Reason for stopping an instance that still has connections.
pub const TIME_IS_OVER: &str = "its drain time is over";

/// A step for one app. Each is idempotent and leaves a trace that the next observation finds.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Pull an image.
    Pull {
        /// Its reference.
        image: ImageRef,
        /// Which one it is, whatever its tag means by now.
        digest: Option<ImageDigest>,
    },
    /// Write the env-file of a release.
    WriteEnvFile(Arc<Release>),
    /// Create a container, beside those that run.
    Create {
        /// Its number.
        key: InstanceKey,
        /// Its release.
        release: Arc<Release>,
        /// The image id that the release was resolved to.
        image: String,
        /// Its drain time.
        drain: Duration,
        /// The `Host` of its health check, unless the check names one.
        host: Option<String>,
    },
    /// Start or unpause a container.
    Start(Handle),
    /// Remove a dead socket in the way of the next start.
    ClearSocket(Handle),
    /// Point the slots of a kind at these instances; other slots of that kind are removed.
    Switch(Via, BTreeMap<u16, InstanceKey>),
    /// Probe through nginx, and record that the release answers.
    Prove {
        /// The release.
        release: ReleaseId,
        /// Where to probe; a worker is recorded without a probe.
        ingress: Option<Ingress>,
        /// The health check of its instances: the proof demands no more.
        check: HealthCheck,
    },
    /// Make Docker keep a proven instance running.
    Settle(Handle),
    /// Stop a container.
    Stop {
        /// The container.
        handle: Handle,
        /// Time until it is killed.
        grace: Duration,
    },
    /// Remove a container that has ended, with its socket directory.
    Remove(Handle),
    /// Remove a failed candidate of a proven release; another one is created after a pause.
    Discard {
        /// The container.
        handle: Handle,
        /// The reason, for operators.
        why: String,
    },
    /// Record the evidence that a release failed.
    RecordVerdict {
        /// The candidate that failed; `None` if there is none, since its image is nowhere.
        handle: Option<Handle>,
        /// The release, whose secrets must not be in the evidence.
        release: Arc<Release>,
        /// One sentence.
        cause: String,
        /// Its exit code, if it ended.
        exit_code: Option<i64>,
        /// How often the release has failed here, this time included.
        attempts: u32,
        /// Digest of what the verdict depends on beside the release.
        conditions: String,
    },
    /// Remove files that nothing needs.
    CleanUp(Leftovers),
}

/// A container, by key for operators and by id for Docker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handle {
    /// Its key.
    pub key: InstanceKey,
    /// Docker's id.
    pub id: ContainerId,
}

/// Files of an app that nothing needs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Leftovers {
    /// Env-files of these releases.
    pub env_files: Vec<ReleaseId>,
    /// Socket directories of these instances.
    pub socket_dirs: Vec<InstanceKey>,
    /// Verdicts on these releases.
    pub verdicts: Vec<ReleaseId>,
    /// The record of the proven release, and every directory of the app.
    pub everything: bool,
}

impl Leftovers {
    /// Whether nothing is left over.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The kinds of steps: a bounded set, for metrics, logs and back-off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StepKind {
    /// [`Step::Pull`]
    Pull,
    /// [`Step::WriteEnvFile`]
    WriteEnvFile,
    /// [`Step::Create`]
    Create,
    /// [`Step::Start`]
    Start,
    /// [`Step::ClearSocket`]
    ClearSocket,
    /// [`Step::Switch`]
    Switch,
    /// [`Step::Prove`]
    Prove,
    /// [`Step::Settle`]
    Settle,
    /// [`Step::Stop`]
    Stop,
    /// [`Step::Remove`]
    Remove,
    /// [`Step::Discard`]
    Discard,
    /// [`Step::RecordVerdict`]
    RecordVerdict,
    /// [`Step::CleanUp`]
    CleanUp,
}

impl StepKind {
    /// Every kind.
    pub const ALL: [StepKind; 13] = [
        Self::Pull,
        Self::WriteEnvFile,
        Self::Create,
        Self::Start,
        Self::ClearSocket,
        Self::Switch,
        Self::Prove,
        Self::Settle,
        Self::Stop,
        Self::Remove,
        Self::Discard,
        Self::RecordVerdict,
        Self::CleanUp,
    ];

    /// Its name in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pull => "pull",
            Self::WriteEnvFile => "write_env_file",
            Self::Create => "create",
            Self::Start => "start",
            Self::ClearSocket => "clear_socket",
            Self::Switch => "switch",
            Self::Prove => "prove",
            Self::Settle => "settle",
            Self::Stop => "stop",
            Self::Remove => "remove",
            Self::Discard => "discard",
            Self::RecordVerdict => "record_verdict",
            Self::CleanUp => "clean_up",
        }
    }
}

impl Step {
    /// The existing container that it affects, if any.
    pub fn handle(&self) -> Option<&Handle> {
        match self {
            Self::Start(handle)
            | Self::ClearSocket(handle)
            | Self::Settle(handle)
            | Self::Stop { handle, .. }
            | Self::Remove(handle)
            | Self::Discard { handle, .. } => Some(handle),
            Self::RecordVerdict { handle, .. } => handle.as_ref(),
            Self::Pull { .. }
            | Self::WriteEnvFile(_)
            | Self::Create { .. }
            | Self::Switch(..)
            | Self::Prove { .. }
            | Self::CleanUp(_) => None,
        }
    }

    /// Whether it waits for a program to exit, for up to its grace period. Other steps of the app go on meanwhile.
    pub fn is_ending(&self) -> bool {
        matches!(self, Self::Stop { .. } | Self::Discard { .. })
    }

    /// Its kind.
    pub fn kind(&self) -> StepKind {
        match self {
            Self::Pull { .. } => StepKind::Pull,
            Self::WriteEnvFile(_) => StepKind::WriteEnvFile,
            Self::Create { .. } => StepKind::Create,
            Self::Start(_) => StepKind::Start,
            Self::ClearSocket(_) => StepKind::ClearSocket,
            Self::Switch(..) => StepKind::Switch,
            Self::Prove { .. } => StepKind::Prove,
            Self::Settle(_) => StepKind::Settle,
            Self::Stop { .. } => StepKind::Stop,
            Self::Remove(_) => StepKind::Remove,
            Self::Discard { .. } => StepKind::Discard,
            Self::RecordVerdict { .. } => StepKind::RecordVerdict,
            Self::CleanUp(_) => StepKind::CleanUp,
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pull { image, digest: None } => write!(f, "pull {image}"),
            Self::Pull { image, digest: Some(digest) } => write!(f, "pull {}", image.at(digest)),
            Self::WriteEnvFile(release) => write!(f, "write env-file of {}", release.id),
            Self::Create { key, release, .. } => write!(f, "create {key} from {}", release.image),
            Self::Start(handle) => write!(f, "start {}", handle.key),
            Self::ClearSocket(handle) => write!(f, "clear socket of {}", handle.key),
            Self::Switch(_, slots) if slots.is_empty() => f.write_str("remove routes"),
            Self::Switch(_, slots) => {
                f.write_str("switch")?;
                for (slot, key) in slots {
                    write!(f, " {slot}->{key}")?;
                }
                Ok(())
            }
            Self::Prove { release, ingress: Some(_), .. } => write!(f, "prove {release} through nginx"),
            Self::Prove { release, ingress: None, .. } => write!(f, "record {release} as proven"),
            Self::Settle(handle) => write!(f, "settle {}", handle.key),
            Self::Stop { handle, .. } => write!(f, "stop {}", handle.key),
            Self::Remove(handle) => write!(f, "remove {}", handle.key),
            Self::Discard { handle, why } => write!(f, "discard {} ({why})", handle.key),
            Self::RecordVerdict { release, cause, .. } => write!(f, "record verdict on {} ({cause})", release.id),
            Self::CleanUp(left) => {
                f.write_str("clean up")?;
                for release in &left.env_files {
                    write!(f, " env-file {release}")?;
                }
                for key in &left.socket_dirs {
                    write!(f, " socket {key}")?;
                }
                for release in &left.verdicts {
                    write!(f, " verdict {release}")?;
                }
                f.write_str(if left.everything { " everything" } else { "" })
            }
        }
    }
}
