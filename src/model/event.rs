//! Events of a host: the lines of `demae events`, and the payload of a webhook.

use serde::{Deserialize, Serialize};

use super::{
    name::{AppName, HostName},
    time::Timestamp,
};

/// The version of this format. A reader must not guess at an unknown one.
pub const VERSION: u32 = 1;

/// An event.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// [`VERSION`].
    pub version: u32,
    /// The run of the agent: its start, in milliseconds since 1970.
    pub run: i64,
    /// Counts up from 1 within the run; 0 if it is not an event of the agent.
    pub seq: u64,
    /// When it happened.
    pub at: Timestamp,
    /// The host.
    pub host: HostName,
    /// The app, if it concerns one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub app: Option<AppName>,
    /// What happened.
    #[serde(flatten)]
    pub what: What,
    /// The same in one sentence.
    pub message: String,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum What {
    /// A step ended.
    Step {
        /// Its kind.
        step: String,
        /// How it ended.
        outcome: Outcome,
        /// Milliseconds it took.
        took_ms: u64,
    },
    /// A release failed on this host.
    Verdict {
        /// The release.
        release: String,
        /// The exit code, if its process ended.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        exit_code: Option<i64>,
    },
    /// A block that an operator must resolve.
    Block {
        /// Its kind.
        kind: String,
        /// What an operator can do.
        remedy: String,
    },
    /// A block is resolved.
    Unblock {
        /// Its kind.
        kind: String,
    },
    /// An app converged after a change.
    Converged {
        /// The kind of the change.
        change: String,
        /// The wanted release, if any.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        release: Option<String>,
        /// Milliseconds since the change was seen.
        took_ms: u64,
    },
    /// nginx was reloaded.
    Reload {
        /// How that ended.
        outcome: Outcome,
        /// Milliseconds it took.
        took_ms: u64,
    },
    /// The store became unreachable, or reachable again.
    Store {
        /// Whether it is reachable.
        reachable: bool,
    },
    /// A reader was too slow, and missed events.
    Lost {
        /// How many.
        count: u64,
    },
}

/// An outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It succeeded.
    Done,
    /// It failed.
    Failed,
}

impl Outcome {
    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Failed => "failed",
        }
    }
}

impl What {
    /// All types, as serialized.
    pub const TYPES: [&'static str; 8] =
        ["step", "verdict", "block", "unblock", "converged", "reload", "store", "lost"];

    /// Its type, as serialized.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Step { .. } => "step",
            Self::Verdict { .. } => "verdict",
            Self::Block { .. } => "block",
            Self::Unblock { .. } => "unblock",
            Self::Converged { .. } => "converged",
            Self::Reload { .. } => "reload",
            Self::Store { .. } => "store",
            Self::Lost { .. } => "lost",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_serializes_as_one_flat_line() {
        let event = Event {
            version: VERSION,
            run: 3,
            seq: 7,
            at: Timestamp::from_millis(0),
            host: HostName::try_from("web1").expect("a name"),
            app: Some(AppName::try_from("web").expect("a name")),
            what: What::Step { step: "create".into(), outcome: Outcome::Done, took_ms: 7 },
            message: "create".into(),
        };
        let text = serde_json::to_string(&event).expect("JSON");
        expect_test::expect![[r#"{"version":1,"run":3,"seq":7,"at":"1970-01-01T00:00:00.000Z","host":"web1","app":"web","type":"step","step":"create","outcome":"done","took_ms":7,"message":"create"}"#]]
        .assert_eq(&text);
        assert_eq!(serde_json::from_str::<Event>(&text).expect("an event"), event);
        assert!(What::TYPES.contains(&event.what.as_str()));
    }
}
