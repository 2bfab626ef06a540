//! Why nothing is done just now: waits, which end by themselves, and blocks, which a person must end.

use std::{fmt, time::Duration};

use super::step::StepKind;
use crate::model::{
    mounts::NestedMount,
    name::{AppName, UrlPath, VirtualHost},
    observed::{InstanceKey, Verdict},
    problem::Problems,
    time::{Timestamp, humane},
};

/// Something that ends by itself.
#[derive(Debug, Clone, PartialEq)]
pub enum Wait {
    /// A step is under way.
    Busy(StepKind),
    /// An instance is not healthy yet.
    Health {
        /// Which.
        key: InstanceKey,
        /// At the latest.
        until: Timestamp,
        /// What it last answered.
        answer: String,
        /// When it may be healthy without anybody telling.
        again: Timestamp,
    },
    /// Requests are still under way.
    Drain {
        /// Which instance.
        key: InstanceKey,
        /// How many connections, where that is known.
        connections: Option<usize>,
        /// At the latest.
        until: Timestamp,
        /// Counted again then.
        again: Timestamp,
    },
    /// A step failed and is tried again.
    CoolingDown {
        /// Which.
        step: StepKind,
        /// When.
        until: Timestamp,
        /// Failures so far.
        attempts: u32,
        /// The last error.
        error: String,
    },
    /// nginx does not serve yet what it should.
    Proxy(String),
    /// An instance in service is unhealthy, and is watched a while before it is replaced.
    Recovery {
        /// Which.
        key: InstanceKey,
        /// Replaced then.
        until: Timestamp,
        /// What it last answered.
        answer: String,
    },
    /// Docker is removing it.
    Removal(InstanceKey),
    /// An instance was asked to end.
    Stopping {
        /// Which.
        key: InstanceKey,
        /// It is killed then.
        until: Timestamp,
    },
    /// An app was deleted from the store, and stays a moment, in which it may be put back.
    Deletion(Timestamp),
    /// A release that failed is tried again: none has ever been proven here, so nothing is lost by it.
    Retry {
        /// Then.
        until: Timestamp,
        /// Failures so far.
        attempts: u32,
    },
    /// An image is loaded by other means; it is looked for again then.
    Image(Timestamp),
    /// The store has not been read, and so nobody knows whether the app is wanted.
    Store(String),
}

impl Wait {
    /// Every kind.
    pub const KINDS: [&'static str; 12] = [
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
    ];

    /// When to look again, if nothing happens before.
    pub fn look_again(&self, now: Timestamp) -> Option<Timestamp> {
        match self {
            // The store wakes the loop when it is read, and so does the end of what is under way.
            Self::Busy(_) | Self::Store(_) | Self::Stopping { .. } => None,
            Self::Health { again: until, .. }
            | Self::CoolingDown { until, .. }
            | Self::Recovery { until, .. }
            | Self::Retry { until, .. }
            | Self::Deletion(until)
            | Self::Image(until) => Some(*until),
            Self::Drain { again, .. } => Some(*again),
            Self::Proxy(_) | Self::Removal(_) => Some(now.plus(Duration::from_secs(1))),
        }
    }

    /// The same, with its times told by another clock.
    #[must_use]
    pub fn timed(mut self, tell: &impl Fn(Timestamp) -> Timestamp) -> Self {
        match &mut self {
            Self::Health { until, again, .. } | Self::Drain { until, again, .. } => {
                (*until, *again) = (tell(*until), tell(*again));
            }
            Self::CoolingDown { until, .. }
            | Self::Recovery { until, .. }
            | Self::Stopping { until, .. }
            | Self::Retry { until, .. }
            | Self::Deletion(until)
            | Self::Image(until) => *until = tell(*until),
            Self::Busy(_) | Self::Proxy(_) | Self::Removal(_) | Self::Store(_) => {}
        }
        self
    }

    /// The kind: a bounded set, for metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Busy(_) => "busy",
            Self::Health { .. } => "health",
            Self::Drain { .. } => "drain",
            Self::CoolingDown { .. } => "cooling_down",
            Self::Proxy(_) => "proxy",
            Self::Recovery { .. } => "recovery",
            Self::Removal(_) => "removal",
            Self::Stopping { .. } => "stopping",
            Self::Deletion(_) => "deletion",
            Self::Retry { .. } => "retry",
            Self::Image(_) => "image",
            Self::Store(_) => "store",
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
            Self::CoolingDown { step, until, attempts, error } => {
                if *step == StepKind::Discard {
                    return write!(f, "{attempts} instances were given up, the next one comes at {until}: {error}");
                }
                write!(f, "step `{}` failed {attempts} times, next try at {until}: {error}", step.as_str())
            }
            Self::Proxy(what) => f.write_str(what),
            Self::Recovery { key, until, answer } => {
                write!(f, "{key} is unhealthy and is replaced at {until} unless it recovers: {answer}")
            }
            Self::Image(until) => write!(f, "the image is looked for again at {until}"),
            Self::Store(why) => write!(f, "kept as it is until the store can be read: {why}"),
            Self::Removal(key) => write!(f, "Docker is removing {key}"),
            Self::Stopping { key, until } => {
                write!(f, "stopping {key}; it is killed at {until} unless it has ended")
            }
            Self::Deletion(until) => write!(f, "it leaves at {until}, unless it is put back before"),
            Self::Retry { until, attempts } => write!(f, "tried again at {until}, after {attempts} failures"),
        }
    }
}

/// Something that a person must end.
#[derive(Debug, Clone, PartialEq)]
pub enum Block {
    /// What was written cannot be used.
    Invalid(Problems),
    /// A person asked to leave the app as it is.
    Paused(String),
    /// This host takes nothing new.
    Cordoned,
    /// The release failed here.
    Halted(Verdict),
    /// Another app holds a virtual host.
    HostTaken {
        /// Which.
        host: VirtualHost,
        /// The path below it, if that is all that is claimed.
        path: Option<UrlPath>,
        /// By whom.
        owner: AppName,
    },
    /// nginx refused the vhost.
    RoutesRejected(String),
    /// The image is nowhere to be had.
    ImageMissing(String),
    /// Containers of the app belong to another agent with this host's name.
    Foreign {
        /// One of them.
        name: String,
        /// By which id that agent is known, or why none is.
        owner: String,
    },
    /// A volume lies below a writable mount, so what it leads to could be exchanged.
    MountUnsafe(NestedMount),
    /// The plan was refused by its second reader: a mistake in demae.
    Refused(String),
}

impl Block {
    /// Every kind.
    pub const KINDS: [&'static str; 10] = [
        "invalid",
        "paused",
        "cordoned",
        "halted",
        "host_taken",
        "routes_rejected",
        "image_missing",
        "mount_unsafe",
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
            Self::Foreign { .. } => "foreign",
            Self::Refused(_) => "refused",
        }
    }

    /// What a person can do.
    pub fn remedy(&self, app: &AppName) -> String {
        match self {
            Self::Invalid(_) => "put a corrected value; `demae validate` checks a spec beforehand".to_owned(),
            Self::Paused(_) => format!("delete `apps/{app}/paused` to go on"),
            Self::Cordoned => "set `hosts/<host>/mode` to `active` to let it come".to_owned(),
            Self::Halted(_) => {
                format!(
                    "put a mended image or environment, or a new value to `apps/{app}/restart` to try this one again"
                )
            }
            Self::HostTaken { .. } => "take the virtual host out of one of the two specs".to_owned(),
            Self::RoutesRejected(_) => "mend the spec, or the template on the host".to_owned(),
            Self::ImageMissing(_) => "push the image, or mend its name; it is tried again by itself".to_owned(),
            Self::MountUnsafe(_) => {
                "mount a directory beside it, or mount the upper one with `:ro` everywhere".to_owned()
            }
            Self::Foreign { .. } => {
                "stop one of the two agents, or give it another name; to take its containers over, `demae adopt ID`"
                    .to_owned()
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
            Self::MountUnsafe(NestedMount { path, above, owner }) => write!(
                f,
                "volume `{path}` lies below `{above}`, which app `{owner}` may write to: it could be led anywhere on this host"
            ),
            Self::Refused(violation) => write!(f, "the plan was refused: {violation}"),
        }
    }
}

/// For a cause: how long something took.
pub(super) fn within(duration: Duration) -> String {
    format!("within {}", humane(duration))
}
