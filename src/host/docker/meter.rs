//! What is asked of the engine, by name, and who hears how long it took.

use std::{fmt, time::Duration};

/// A call to the engine: a bounded set, for messages and metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Its version.
    Version,
    /// Where it keeps things.
    Info,
    /// Containers by label.
    List,
    /// One container.
    Inspect,
    /// One image.
    InspectImage,
    /// Make a container.
    Create,
    /// Start or unpause one.
    Start,
    /// End one.
    Stop,
    /// Remove one.
    Remove,
    /// Change its restart policy, or its name.
    Update,
    /// Send it a signal.
    Signal,
    /// Run a command in it.
    Exec,
    /// Bring an image here.
    Pull,
    /// Listen for events.
    Events,
}

impl Operation {
    /// Every operation that is measured; events are listened to for days.
    pub const MEASURED: [Self; 13] = [
        Self::Version,
        Self::Info,
        Self::List,
        Self::Inspect,
        Self::InspectImage,
        Self::Create,
        Self::Start,
        Self::Stop,
        Self::Remove,
        Self::Update,
        Self::Signal,
        Self::Exec,
        Self::Pull,
    ];

    /// Whether that something is not there is an answer like any other.
    pub fn may_find_nothing(self) -> bool {
        matches!(self, Self::Inspect | Self::InspectImage | Self::Stop | Self::Remove)
    }

    /// The word for it, in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Version => "version",
            Self::Info => "info",
            Self::List => "list",
            Self::Inspect => "inspect",
            Self::InspectImage => "inspect_image",
            Self::Create => "create",
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Remove => "remove",
            Self::Update => "update",
            Self::Signal => "signal",
            Self::Exec => "exec",
            Self::Pull => "pull",
            Self::Events => "events",
        }
    }
}

/// As the end of `Docker cannot …`.
impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Version => "tell its version",
            Self::Info => "tell about itself",
            Self::List => "list containers",
            Self::Inspect => "inspect",
            Self::InspectImage => "inspect the image",
            Self::Create => "create the container",
            Self::Start => "start the container",
            Self::Stop => "stop the container",
            Self::Remove => "remove the container",
            Self::Update => "change the restart policy",
            Self::Signal => "signal the container",
            Self::Exec => "run a command",
            Self::Pull => "pull the image",
            Self::Events => "tell events",
        })
    }
}

/// How a call failed: a bounded set, for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The engine is not there.
    Unreachable,
    /// It did not answer in time.
    Timeout,
    /// It said no. That something is not there is an answer, and no failure.
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

/// Hears of every call. It must not block: a deploy waits for it.
pub trait Meter: Send + Sync {
    /// A call ended, well or not.
    fn called(&self, operation: Operation, took: Duration, failure: Option<Failure>);

    /// An image came, with so many bytes over the line.
    fn pulled(&self, bytes: u64, took: Duration);
}

/// Hears nothing: for commands that ask once and leave.
#[derive(Debug, Clone, Copy)]
pub struct NoMeter;

impl Meter for NoMeter {
    fn called(&self, _: Operation, _: Duration, _: Option<Failure>) {}

    fn pulled(&self, _: u64, _: Duration) {}
}
