//! Names of the calls to the engine, and the hook that measures them.

use std::{fmt, time::Duration};

/// A call to the engine: a bounded set, for messages and metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// The engine's version.
    Version,
    /// The engine's directories.
    Info,
    /// List containers by label.
    List,
    /// Inspect a container.
    Inspect,
    /// Inspect an image.
    InspectImage,
    /// Remove an image.
    RemoveImage,
    /// Create a container.
    Create,
    /// Start or unpause a container.
    Start,
    /// Stop a container.
    Stop,
    /// Remove a container.
    Remove,
    /// Change a container's restart policy or name.
    Update,
    /// Send a signal to a container.
    Signal,
    /// Run a command in a container.
    Exec,
    /// Pull an image.
    Pull,
    /// Inspect or create the network of the apps.
    Network,
    /// Stream events.
    Events,
}

impl Operation {
    /// Every operation that is measured; an event stream lasts for days.
    pub const MEASURED: [Self; 15] = [
        Self::Version,
        Self::Info,
        Self::List,
        Self::Inspect,
        Self::InspectImage,
        Self::RemoveImage,
        Self::Create,
        Self::Start,
        Self::Stop,
        Self::Remove,
        Self::Update,
        Self::Signal,
        Self::Exec,
        Self::Pull,
        Self::Network,
    ];

    /// Whether 404 is an ordinary answer, not a failure.
    pub fn allows_not_found(self) -> bool {
        matches!(
            self,
            Self::Inspect | Self::InspectImage | Self::RemoveImage | Self::Network | Self::Stop | Self::Remove
        )
    }

    /// The word for it, in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Version => "version",
            Self::Info => "info",
            Self::List => "list",
            Self::Inspect => "inspect",
            Self::InspectImage => "inspect_image",
            Self::RemoveImage => "remove_image",
            Self::Create => "create",
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Remove => "remove",
            Self::Update => "update",
            Self::Signal => "signal",
            Self::Exec => "exec",
            Self::Pull => "pull",
            Self::Network => "network",
            Self::Events => "events",
        }
    }
}

/// As the end of `Docker cannot …`.
impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Version => "report its version",
            Self::Info => "report its settings",
            Self::List => "list containers",
            Self::Inspect => "inspect",
            Self::InspectImage => "inspect the image",
            Self::RemoveImage => "remove the image",
            Self::Create => "create the container",
            Self::Start => "start the container",
            Self::Stop => "stop the container",
            Self::Remove => "remove the container",
            Self::Update => "change the restart policy",
            Self::Signal => "signal the container",
            Self::Exec => "run a command",
            Self::Pull => "pull the image",
            Self::Network => "make the network of the apps",
            Self::Events => "stream events",
        })
    }
}

/// How a call failed: a bounded set, for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The engine cannot be reached.
    Unreachable,
    /// No answer in time.
    Timeout,
    /// The engine refused. An expected 404 is no failure.
    Refused,
}

impl Failure {
    /// Every failure.
    pub const ALL: [Self; 3] = [Self::Unreachable, Self::Timeout, Self::Refused];

    /// The word for it, in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unreachable => "unreachable",
            Self::Timeout => "timeout",
            Self::Refused => "refused",
        }
    }
}

/// Measures every call. Must not block: a deploy waits for it.
pub trait Meter: Send + Sync {
    /// A call ended, successful or not.
    fn called(&self, operation: Operation, took: Duration, failure: Option<Failure>);

    /// An image was pulled; `bytes` were downloaded.
    fn pulled(&self, bytes: u64, took: Duration);

    /// An image was removed to make room.
    fn removed_image(&self);
}

/// Measures nothing: for one-off commands.
#[derive(Debug, Clone, Copy)]
pub struct NoMeter;

impl Meter for NoMeter {
    fn called(&self, _: Operation, _: Duration, _: Option<Failure>) {}

    fn pulled(&self, _: u64, _: Duration) {}

    fn removed_image(&self) {}
}
