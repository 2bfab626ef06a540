//! What happened on a host, one thing at a time: the lines of `demae events`, and what a webhook is told.

use serde::{Deserialize, Serialize};

use super::{
    name::{AppName, HostName},
    time::Timestamp,
};

/// The version of this form. A reader that knows another must not guess.
pub const VERSION: u32 = 1;

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// [`VERSION`].
    pub version: u32,
    /// Which run of the agent: when it started, in milliseconds since 1970.
    pub run: i64,
    /// Counts up from 1 within the run; 0 for what is no event of the agent.
    pub seq: u64,
    /// When.
    pub at: Timestamp,
    /// Where.
    pub host: HostName,
    /// The app, if it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub app: Option<AppName>,
    /// What.
    #[serde(flatten)]
    pub what: What,
    /// The same in one sentence, for people.
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
        /// Which.
        release: String,
        /// The exit code, if its process ended.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        exit_code: Option<i64>,
    },
    /// Something that a person must end.
    Block {
        /// Its kind.
        kind: String,
        /// What a person can do.
        remedy: String,
    },
    /// A block is gone.
    Unblock {
        /// Its kind.
        kind: String,
    },
    /// An app is as it should be, after a change.
    Converged {
        /// The kind of the change.
        change: String,
        /// The release, if one is wanted.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        release: Option<String>,
        /// Milliseconds since the change was seen.
        took_ms: u64,
    },
    /// nginx was given another configuration.
    Reload {
        /// How that ended.
        outcome: Outcome,
        /// Milliseconds it took.
        took_ms: u64,
    },
    /// The store cannot be read, or can be again.
    Store {
        /// Whether it can be read.
        reachable: bool,
    },
    /// A reader was too slow, and missed events.
    Lost {
        /// How many.
        count: u64,
    },
}

/// How something ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Well.
    Done,
    /// Badly.
    Failed,
}

impl Outcome {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Failed => "failed",
        }
    }
}

impl What {
    /// The types, as they are written.
    pub const TYPES: [&'static str; 8] =
        ["step", "verdict", "block", "unblock", "converged", "reload", "store", "lost"];

    /// Its type, as it is written.
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
    fn an_event_is_one_flat_line() {
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
