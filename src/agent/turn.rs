//! The turn of an app in a rollout, as the loop knows it.

use crate::{
    model::{
        desired::{DesiredApp, Target},
        fleet::{EndedCommand, FleetImage, Turn},
        observed::Verdict,
        problem::Problem,
        time::Timestamp,
    },
    plan::{
        AppPlan,
        wait::{Block, Wait},
    },
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
    /// The evidence against the wanted release, if it failed here and another one runs; its time is that of the wall.
    pub(super) failed: Option<Verdict>,
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
    /// Which image the release that runs, or is to run, is in the fleet.
    pub(super) image: FleetImage,
}

impl TurnState {
    pub(super) fn new(intended: DesiredApp) -> Self {
        Self {
            intended,
            turn: Turn::Free,
            kept: None,
            failed: None,
            writing: None,
            write_after: Timestamp::default(),
            confirmed: None,
            running_command: false,
            command_end: None,
            command_trouble: None,
            image: FleetImage::AsNamed,
        }
    }

    /// The wanted release, while another one that the fleet has proven runs in its place.
    pub(super) fn kept_from(&self) -> Option<&Target> {
        self.intended.target().filter(|_| matches!(self.kept, Some(Kept::Meanwhile(_))))
    }

    /// Adds to a plan why an app that runs a kept release is not converged. Where the wanted one failed, a person must act.
    pub(super) fn tell_kept(&self, plan: &mut AppPlan) {
        let Some(Kept::Meanwhile(why)) = &self.kept else { return };
        match &self.failed {
            Some(verdict) => plan.blocks.push(Block::Halted(verdict.clone())),
            None => plan.waits.push(Wait::Turn(why.clone())),
        }
    }
}

/// What an app with a release command is on a host that takes no turns: invalid, since each such host would run it.
pub(super) fn without_turns(desired: &DesiredApp, before: &DesiredApp) -> Option<DesiredApp> {
    desired.target()?.release_command.as_ref()?;
    let problem = Problem::new("release_command", "this host takes no turns in rollouts, and would run it by itself");
    let problem = problem.hint("docs/rollouts.md says how it takes turns: `[rollouts]` in the file of its agent, and the rights of its etcd role");
    // A release whose command has not run yet is none to go on with.
    let last_good = before.target().filter(|target| target.release_command.is_none()).cloned();
    Some(DesiredApp::Invalid { problems: problem.into(), last_good })
}

/// Why an app runs a kept release.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kept {
    /// A person pinned it: it is the wanted one.
    Pinned,
    /// Until another one may come, for this reason.
    Meanwhile(String),
}
