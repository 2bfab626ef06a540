//! Why there is no step: waits, which end by themselves, and blocks, which an operator must resolve.

use std::{fmt, time::Duration};

use super::step::StepKind;
use crate::model::{
    mounts::{NestedMount, Relation},
    name::{AppName, UrlPath, VirtualHost},
    observed::{InstanceKey, Verdict},
    policy::Refusal,
    problem::Problems,
    time::{Timestamp, human},
};

/// A wait: it ends by itself.
#[derive(Debug, Clone, PartialEq)]
pub enum Wait {
    /// A step is in flight.
    Busy(StepKind),
    /// An instance is not healthy yet.
    Health {
        /// The instance.
        key: InstanceKey,
        /// The deadline.
        until: Timestamp,
        /// The last probe result.
        answer: String,
        /// When it may be healthy without an event.
        again: Timestamp,
    },
    /// Requests are still in flight.
    Drain {
        /// The instance.
        key: InstanceKey,
        /// Number of connections, if known.
        connections: Option<usize>,
        /// The deadline.
        until: Timestamp,
        /// When they are counted again.
        again: Timestamp,
    },
    /// A step failed and is in backoff.
    Backoff {
        /// The step.
        step: StepKind,
        /// Next attempt.
        until: Timestamp,
        /// Failures so far.
        attempts: u32,
        /// The last error.
        error: String,
        /// Its kind.
        error_kind: &'static str,
    },
    /// nginx does not serve the wished vhost yet.
    Proxy(String),
    /// An instance in service is unhealthy, and gets some time to recover before it is replaced.
    Recovery {
        /// The instance.
        key: InstanceKey,
        /// When it is replaced.
        until: Timestamp,
        /// The last probe result.
        answer: String,
    },
    /// Docker is removing it.
    Removal(InstanceKey),
    /// An instance is being stopped.
    Stopping {
        /// The instance.
        key: InstanceKey,
        /// When it is killed.
        until: Timestamp,
    },
    /// An app was deleted from the store, and stays until this time in case it is put back.
    Deletion(Timestamp),
    /// A failed release is retried: none was ever proven here, so nothing is lost by it.
    Retry {
        /// Next attempt.
        until: Timestamp,
        /// Failures so far.
        attempts: u32,
    },
    /// An image is loaded by other means; next check for it.
    Image(Timestamp),
    /// The store has not been read, so the desired state is unknown.
    Store(String),
    /// It is not this host's turn, for this reason.
    Turn(String),
    /// All is ready; the record that requests move is being written.
    Commit,
    /// The image is here; its digest is being written, so that all hosts run the same one.
    Digest,
    /// The release serves, and counts as proven at this time unless it fails before.
    Monitor(Timestamp),
}

impl Wait {
    /// Every kind.
    pub const KINDS: [&'static str; 16] = [
        "busy",
        "health",
        "drain",
        "cooling_down",
        "proxy",
        "recovery",
        "removal",
        "stopping",
        "deletion",
        "retry",
        "image",
        "store",
        "turn",
        "commit",
        "digest",
        "monitor",
    ];

    /// When to plan again, if nothing happens before.
    pub fn recheck_at(&self, now: Timestamp) -> Option<Timestamp> {
        match self {
            // These wake the loop when they end.
            Self::Busy(_) | Self::Store(_) | Self::Stopping { .. } | Self::Turn(_) | Self::Commit | Self::Digest => {
                None
            }
            Self::Health { again: until, .. }
            | Self::Backoff { until, .. }
            | Self::Recovery { until, .. }
            | Self::Retry { until, .. }
            | Self::Deletion(until)
            | Self::Monitor(until)
            | Self::Image(until) => Some(*until),
            Self::Drain { again, .. } => Some(*again),
            Self::Proxy(_) | Self::Removal(_) => Some(now.plus(Duration::from_secs(1))),
        }
    }

    /// The same, with its times converted to another clock.
    #[must_use]
    pub fn with_times(mut self, convert: &impl Fn(Timestamp) -> Timestamp) -> Self {
        match &mut self {
            Self::Health { until, again, .. } | Self::Drain { until, again, .. } => {
                (*until, *again) = (convert(*until), convert(*again));
            }
            Self::Backoff { until, .. }
            | Self::Recovery { until, .. }
            | Self::Stopping { until, .. }
            | Self::Retry { until, .. }
            | Self::Deletion(until)
            | Self::Monitor(until)
            | Self::Image(until) => *until = convert(*until),
            Self::Busy(_)
            | Self::Proxy(_)
            | Self::Removal(_)
            | Self::Store(_)
            | Self::Turn(_)
            | Self::Commit
            | Self::Digest => {}
        }
        self
    }

    /// The kind of the error that it is about, if any.
    pub fn error_kind(&self) -> Option<&'static str> {
        match self {
            Self::Backoff { error_kind, .. } => Some(error_kind),
            _ => None,
        }
    }

    /// The kind: a bounded set, for metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Busy(_) => "busy",
            Self::Health { .. } => "health",
            Self::Drain { .. } => "drain",
            Self::Backoff { .. } => "cooling_down",
            Self::Proxy(_) => "proxy",
            Self::Recovery { .. } => "recovery",
            Self::Removal(_) => "removal",
            Self::Stopping { .. } => "stopping",
            Self::Deletion(_) => "deletion",
            Self::Retry { .. } => "retry",
            Self::Image(_) => "image",
            Self::Store(_) => "store",
            Self::Turn(_) => "turn",
            Self::Commit => "commit",
            Self::Digest => "digest",
            Self::Monitor(_) => "monitor",
        }
    }
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Busy(kind) => write!(f, "step `{}` is under way", kind.as_str()),
            Self::Health { key, until, answer, .. } => {
                write!(f, "waiting until {key} is healthy, at the latest at {until}")?;
                if answer.is_empty() { Ok(()) } else { write!(f, " (last answer: {answer})") }
            }
            Self::Drain { key, connections: Some(0), until, .. } => {
                write!(f, "draining {key}: an old nginx worker may still know it, at the latest until {until}")
            }
            Self::Drain { key, connections: Some(n), until, .. } => {
                write!(f, "draining {key}: {n} connections left, at the latest until {until}")
            }
            Self::Drain { key, connections: None, until, .. } => {
                write!(f, "draining {key} until {until}; its connections cannot be counted")
            }
            Self::Backoff { step, until, attempts, error, .. } => {
                if *step == StepKind::Discard {
                    return write!(
                        f,
                        "{attempts} instances failed and were removed, the next one is created at {until}: {error}"
                    );
                }
                write!(f, "step `{}` failed {attempts} times, next try at {until}: {error}", step.as_str())
            }
            Self::Proxy(what) => f.write_str(what),
            Self::Recovery { key, until, answer } => {
                write!(f, "{key} is unhealthy and is replaced at {until} unless it recovers: {answer}")
            }
            Self::Image(until) => write!(f, "the image is looked for again at {until}"),
            Self::Store(why) => write!(f, "kept as it is until the store can be read: {why}"),
            Self::Turn(why) => write!(f, "waiting for the turn of this host: {why}"),
            Self::Digest => f.write_str("the image is here; writing down its digest, which all hosts go by"),
            Self::Commit => f.write_str("ready; writing down that requests move to the new release"),
            Self::Monitor(until) => {
                write!(f, "the new release serves, and is proven at {until} unless it fails before")
            }
            Self::Removal(key) => write!(f, "Docker is removing {key}"),
            Self::Stopping { key, until } => {
                write!(f, "stopping {key}; it is killed at {until} unless it has ended")
            }
            Self::Deletion(until) => write!(f, "it is removed at {until}, unless it is put back before"),
            Self::Retry { until, attempts } => write!(f, "tried again at {until}, after {attempts} failures"),
        }
    }
}

/// A block: an operator must resolve it.
#[derive(Debug, Clone, PartialEq)]
pub enum Block {
    /// The spec or another key is invalid.
    Invalid(Problems),
    /// An operator paused the app.
    Paused(String),
    /// This host is cordoned.
    Cordoned,
    /// The release failed here.
    Halted(Verdict),
    /// Another app holds a virtual host.
    HostTaken {
        /// The host.
        host: VirtualHost,
        /// The path below it, if only that is claimed.
        path: Option<UrlPath>,
        /// The app that holds it.
        owner: AppName,
    },
    /// nginx rejected the vhost.
    RoutesRejected(String),
    /// The image cannot be pulled.
    ImageMissing(String),
    /// Containers of the app belong to another agent with this host's name.
    Foreign {
        /// Name of one of them.
        name: String,
        /// The id of that agent, or why it is unknown.
        owner: String,
    },
    /// A volume lies below a writable mount, or is one and lies above another, so a source can be replaced.
    MountUnsafe(NestedMount),
    /// This host does not allow what the spec asks for.
    NotAllowed(Vec<Refusal>),
    /// The check refused the plan: a bug in demae.
    Refused(String),
}

impl Block {
    /// Every kind.
    pub const KINDS: [&'static str; 11] = [
        "invalid",
        "paused",
        "cordoned",
        "halted",
        "host_taken",
        "routes_rejected",
        "image_missing",
        "mount_unsafe",
        "not_allowed",
        "foreign",
        "refused",
    ];

    /// The kind: a bounded set, for metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Invalid(_) => "invalid",
            Self::Paused(_) => "paused",
            Self::Cordoned => "cordoned",
            Self::Halted(_) => "halted",
            Self::HostTaken { .. } => "host_taken",
            Self::RoutesRejected(_) => "routes_rejected",
            Self::ImageMissing(_) => "image_missing",
            Self::MountUnsafe(_) => "mount_unsafe",
            Self::NotAllowed(_) => "not_allowed",
            Self::Foreign { .. } => "foreign",
            Self::Refused(_) => "refused",
        }
    }

    /// What an operator can do.
    pub fn remedy(&self, app: &AppName) -> String {
        match self {
            Self::Invalid(_) => "put a corrected value; `demae validate` checks a spec beforehand".to_owned(),
            Self::Paused(_) => format!("`demae resume {app}`, or delete `apps/{app}/paused`, to go on"),
            Self::Cordoned => "set `hosts/<host>/mode` to `active` to admit it".to_owned(),
            Self::Halted(_) => {
                format!("deploy a fixed image or environment; if the cause was elsewhere, `demae retry {app}`")
            }
            Self::HostTaken { .. } => "take the virtual host out of one of the two specs".to_owned(),
            Self::RoutesRejected(_) => "fix the spec, or the template on the host".to_owned(),
            Self::ImageMissing(_) => "see to what it says on this host, or put another image; it is tried again by itself".to_owned(),
            Self::MountUnsafe(_) => {
                "mount a directory beside it, or mount the upper one with `:ro` everywhere; its own containers from before count, too".to_owned()
            }
            Self::Foreign { .. } => {
                "stop one of the two agents, or give it another name; to take its containers over, `demae adopt ID`"
                    .to_owned()
            }
            Self::NotAllowed(_) => {
                "change the spec, or let root of the host change its policy; what runs goes on as it is".to_owned()
            }
            Self::Refused(_) => "please report this; the app is left as it is".to_owned(),
        }
    }
}

impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid(problems) => write!(f, "{problems}"),
            Self::Paused(reason) => write!(f, "paused: {reason}"),
            Self::Cordoned => f.write_str("this host is cordoned and takes no new app"),
            Self::Halted(verdict) => write!(f, "release {} failed: {}", verdict.release, verdict.cause),
            Self::HostTaken { host, path, owner } => {
                let path = path.as_ref().map_or("", UrlPath::as_str);
                write!(f, "virtual host `{host}{path}` belongs to app `{owner}`")
            }
            Self::RoutesRejected(error) => write!(f, "nginx refuses this app: {error}"),
            Self::ImageMissing(error) => f.write_str(error),
            Self::Foreign { name, owner } => write!(
                f,
                "container `{name}` has this host's name and belongs to another agent: {owner}; nothing is created beside it"
            ),
            Self::MountUnsafe(NestedMount { path, relation: Relation::Below, other, owner }) => write!(
                f,
                "volume `{path}` lies below `{other}`, which app `{owner}` may write to: it could resolve to any path on this host"
            ),
            Self::MountUnsafe(NestedMount { path, relation: Relation::Above, other, owner }) => write!(
                f,
                "volume `{path}` lies above `{other}`, which a container of app `{owner}` has mounted: that could then resolve to any path on this host"
            ),
            Self::NotAllowed(refusals) => {
                let mut separator = "";
                for refusal in refusals {
                    write!(f, "{separator}{refusal}")?;
                    separator = "; ";
                }
                Ok(())
            }
            Self::Refused(violation) => write!(f, "the plan was refused: {violation}"),
        }
    }
}

/// A duration, as part of a verdict's cause.
pub(super) fn within(duration: Duration) -> String {
    format!("within {}", human(duration))
}
