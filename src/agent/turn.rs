//! The turn of an app in a rollout, as the loop knows it.

use crate::{
    model::{
        desired::DesiredApp,
        fleet::{EndedCommand, Turn},
        problem::Problem,
        time::Timestamp,
    },
    plan::wait::Wait,
};

/// The part of an app that is about turns.
#[derive(Debug)]
pub(super) struct TurnState {
    /// What people want; what the app runs may be another release meanwhile.
    pub(super) intended: DesiredApp,
    /// How far it may go.
    pub(super) turn: Turn,
    /// Why it runs another release than the one that its keys make.
    pub(super) kept: Option<Kept>,
    /// A write is under way since then: nothing is decided before its answer.
    pub(super) writing: Option<Timestamp>,
    /// No write before.
    pub(super) write_after: Timestamp,
    /// When the last record of a switch was sent.
    pub(super) confirmed: Option<Timestamp>,
    /// Whether the command of a release is being run, or waited for.
    pub(super) running_command: bool,
    /// How it ended, until that is in the store.
    pub(super) command_end: Option<EndedCommand>,
    /// Why it cannot be run now.
    pub(super) command_trouble: Option<String>,
}

impl TurnState {
    pub(super) fn new(intended: DesiredApp) -> Self {
        Self {
            intended,
            turn: Turn::Free,
            kept: None,
            writing: None,
            write_after: Timestamp::default(),
            confirmed: None,
            running_command: false,
            command_end: None,
            command_trouble: None,
        }
    }

    /// Why an app that runs a kept release is not converged.
    pub(super) fn kept_wait(&self) -> Option<Wait> {
        match &self.kept {
            Some(Kept::Meanwhile(why)) => Some(Wait::Turn(why.clone())),
            Some(Kept::Pinned) | None => None,
        }
    }
}

/// What an app with a release command is on a host that takes no turns: invalid, since each such host would run it.
pub(super) fn without_turns(desired: &DesiredApp, before: &DesiredApp) -> Option<DesiredApp> {
    desired.target()?.release_command.as_ref()?;
    let problem = Problem::new("release_command", "this host takes no turns in rollouts, and would run it by itself");
    let problem = problem.hint("set `enabled = true` below `[rollouts]` in the file of its agent");
    Some(DesiredApp::Invalid { problems: problem.into(), last_good: before.target().cloned() })
}

/// Why an app runs a kept release.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kept {
    /// A person pinned it: it is the wanted one.
    Pinned,
    /// Until another one may come, for this reason.
    Meanwhile(String),
}
