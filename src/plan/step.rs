//! Things to do. A step carries all it needs; whoever performs it has nothing left to decide.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use crate::model::{
    name::{ContainerId, ImageRef, ReleaseId},
    observed::InstanceKey,
    release::Release,
    spec::{HealthCheck, Ingress},
};

/// A step and why it is taken.
#[derive(Debug, Clone, PartialEq)]
pub struct Planned {
    /// What.
    pub step: Step,
    /// Why, as the end of a sentence.
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

/// Why an instance is stopped that still had connections.
pub const TIME_IS_OVER: &str = "its drain time is over";

/// Something to do for one app. Each is idempotent and leaves a trace that the next look finds.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Bring the image here.
    Pull(ImageRef),
    /// Write the env-file of a release.
    WriteEnvFile(Arc<Release>),
    /// Make a container, beside whatever runs.
    Create {
        /// Its number.
        key: InstanceKey,
        /// What it is made from.
        release: Arc<Release>,
        /// The image id that the release was resolved to.
        image: String,
        /// How long requests may take to leave it.
        drain: Duration,
        /// The host that its health check asks for, unless the check names one.
        host: Option<String>,
    },
    /// Start, or unpause, a container.
    Start(Handle),
    /// Remove a dead socket in the way of the next start.
    ClearSocket(Handle),
    /// Point the route symlinks at these instances; slots that are not named go.
    Switch(BTreeMap<u16, InstanceKey>),
    /// Ask through nginx, and record that the release answers.
    Prove {
        /// The release.
        release: ReleaseId,
        /// Where to ask; a worker is recorded without being asked.
        ingress: Option<Ingress>,
        /// How its instances are asked whether they are well: the proof asks for no more.
        check: HealthCheck,
    },
    /// Let Docker keep a proven instance running.
    Settle(Handle),
    /// End a container.
    Stop {
        /// Which.
        handle: Handle,
        /// How long it may take.
        grace: Duration,
    },
    /// Remove a container that has ended, with its socket directory.
    Remove(Handle),
    /// Remove a candidate that failed though its release is proven; another is made after a pause.
    Discard {
        /// Which.
        handle: Handle,
        /// Why, for people.
        why: String,
    },
    /// Keep the evidence that a release failed.
    RecordVerdict {
        /// The candidate that failed.
        handle: Handle,
        /// The release, whose secrets must not be in the evidence.
        release: Arc<Release>,
        /// One sentence.
        cause: String,
        /// Its exit code, if it ended.
        exit_code: Option<i64>,
        /// How often the release has failed here, with this time.
        attempts: u32,
        /// Stands for what the verdict depends on beside the release.
        conditions: String,
    },
    /// Remove files that nothing needs any more.
    CleanUp(Leftovers),
}

/// A container, by key for people and by id for Docker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handle {
    /// For people.
    pub key: InstanceKey,
    /// For Docker.
    pub id: ContainerId,
}

/// Files of an app that nothing needs any more.
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

    /// The word for it, in logs and metrics.
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
    /// The container that it is done to, if it is done to one that is there.
    pub fn handle(&self) -> Option<&Handle> {
        match self {
            Self::Start(handle)
            | Self::ClearSocket(handle)
            | Self::Settle(handle)
            | Self::Stop { handle, .. }
            | Self::Remove(handle)
            | Self::Discard { handle, .. }
            | Self::RecordVerdict { handle, .. } => Some(handle),
            Self::Pull(_)
            | Self::WriteEnvFile(_)
            | Self::Create { .. }
            | Self::Switch(_)
            | Self::Prove { .. }
            | Self::CleanUp(_) => None,
        }
    }

    /// Whether it waits for a program to end, which may take as long as its grace. Other steps of the app go on meanwhile.
    pub fn is_ending(&self) -> bool {
        matches!(self, Self::Stop { .. } | Self::Discard { .. })
    }

    /// Its kind.
    pub fn kind(&self) -> StepKind {
        match self {
            Self::Pull(_) => StepKind::Pull,
            Self::WriteEnvFile(_) => StepKind::WriteEnvFile,
            Self::Create { .. } => StepKind::Create,
            Self::Start(_) => StepKind::Start,
            Self::ClearSocket(_) => StepKind::ClearSocket,
            Self::Switch(_) => StepKind::Switch,
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
            Self::Pull(image) => write!(f, "pull {image}"),
            Self::WriteEnvFile(release) => write!(f, "write env-file of {}", release.id),
            Self::Create { key, release, .. } => write!(f, "create {key} from {}", release.image),
            Self::Start(handle) => write!(f, "start {}", handle.key),
            Self::ClearSocket(handle) => write!(f, "clear socket of {}", handle.key),
            Self::Switch(slots) if slots.is_empty() => f.write_str("remove routes"),
            Self::Switch(slots) => {
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
            Self::RecordVerdict { handle, cause, .. } => {
                write!(f, "record verdict on {} ({cause})", handle.key.release)
            }
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
