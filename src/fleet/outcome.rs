//! What became of a release, for those who wait for it.
//!
//! *Converged* is never said of another release than the one that is asked about, and a failure from before the question
//! is no answer to it.

use std::collections::BTreeMap;

use super::records::{Records, Stored};
use crate::model::{
    fleet::{CommandState, Rollout, RolloutPhase},
    name::{AppName, HostName, ReleaseId},
    status::{AppStatus, State},
};

/// A question about a release of an app, and all that is known, as of one revision.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    /// The app.
    pub app: &'a AppName,
    /// The release.
    pub release: &'a ReleaseId,
    /// The revision of the change that is waited for: failures from before it do not count. 0 if all do.
    pub since: i64,
    /// The mod revision of the spec now: a host that reports on an earlier one has not seen it yet. 0 if it does not matter.
    pub spec: i64,
    /// When the answer is yes.
    pub until: Until,
    /// What people want now.
    pub wanted: &'a Wanted,
    /// Hosts that are up and are to run the app, and whether each takes turns.
    pub hosts: &'a BTreeMap<HostName, bool>,
    /// What machines wrote.
    pub records: &'a Records,
    /// What hosts report of this app, with the mod revision.
    pub statuses: &'a BTreeMap<HostName, (AppStatus, i64)>,
    /// Why nothing may begin now, if a person froze the fleet.
    pub frozen: Option<&'a str>,
}

/// When a wait is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// Every host has proven the release, and nothing of the old one is left.
    Converged,
    /// Every host answers with the release; old connections may still drain.
    Serving,
    /// As converged, or proven on the canaries.
    Canary,
}

/// What people want of an app.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// It does not exist.
    Nothing,
    /// This release.
    Release(ReleaseId),
    /// It cannot be said, or a person stopped it: why.
    Stopped(String),
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It is so, on so many hosts.
    Converged(usize),
    /// Proven on the canaries; a person, or a time, promotes it.
    Canaries,
    /// The release failed.
    Failed(Failure),
    /// A person must act: on this host, if one is named.
    Blocked(Option<HostName>, String),
    /// Another change came between.
    Superseded(String),
    /// Not decided yet; what it waits for, if that is not the hosts.
    Pending(Option<String>),
}

/// Why a release failed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Failure {
    /// Where; `None` if it is not known.
    pub host: Option<HostName>,
    /// Why, in one sentence.
    pub cause: String,
    /// The exit code, if its process ended.
    pub exit_code: Option<i64>,
    /// The end of its log.
    pub log_tail: String,
}

/// What became of a release.
pub fn outcome(question: &Question<'_>) -> Outcome {
    match question.wanted {
        Wanted::Nothing => return Outcome::Superseded("the app was deleted".to_owned()),
        Wanted::Stopped(why) => return Outcome::Blocked(None, why.clone()),
        Wanted::Release(now) if now != question.release => return Outcome::Superseded(format!("{now} is wanted now")),
        Wanted::Release(_) => {}
    }
    question.by_rollout().unwrap_or_else(|| question.by_hosts())
}

impl Question<'_> {
    fn takes_turns(&self) -> bool {
        self.hosts.values().any(|takes| *takes)
    }

    /// The rollout of this release, if it was written for this question.
    fn rollout(&self) -> Option<&Rollout> {
        let Stored { value, modified, .. } = self.records.rollouts.get(self.app)?;
        value.as_ref().filter(|rollout| rollout.release == *self.release && *modified > self.since)
    }

    fn by_rollout(&self) -> Option<Outcome> {
        if !self.takes_turns() {
            return None;
        }
        let stored = self.records.rollouts.get(self.app)?;
        if stored.value.is_none() {
            let why = format!("the record `state/rollouts/{}` cannot be read by this version", self.app);
            return Some(Outcome::Blocked(None, why));
        }
        let rollout = self.rollout()?;
        let command = self.records.commands.get(&(self.app.clone(), self.release.clone()));
        if let Some(run) = command.and_then(|stored| stored.value.as_ref()) {
            let is_gone = run.state == CommandState::Started && !self.records.hosts.contains_key(&run.host);
            let cause = if is_gone { "the host is down" } else { &run.cause };
            if is_gone || run.state == CommandState::Unknown {
                let why = format!(
                    "whether its release command has run is not known ({cause}): see to it, then `demae retry {}` runs it again",
                    self.app
                );
                return Some(Outcome::Blocked(Some(run.host.clone()), why));
            }
        }
        match rollout.phase {
            RolloutPhase::Waiting => Some(Outcome::Canaries),
            RolloutPhase::Halted | RolloutPhase::Reverting | RolloutPhase::Reverted => {
                let lost = self.records.lost.keys().find(|(app, _)| app == self.app).map(|(_, host)| host.clone());
                Some(match (self.failure(), lost) {
                    (Some(failure), _) => Outcome::Failed(failure),
                    (None, Some(host)) => Outcome::Blocked(
                        Some(host),
                        "it went away in its turn; the rollout goes on once it is back".to_owned(),
                    ),
                    (None, None) => Outcome::Failed(Failure { cause: rollout.reason.clone(), ..Failure::default() }),
                })
            }
            _ => None,
        }
    }

    /// The first evidence against the release, among the verdicts of hosts that take turns.
    fn failure(&self) -> Option<Failure> {
        let (host, verdict) = self.records.verdicts_of(self.app, self.release).min_by_key(|(_, v)| v.created)?;
        let verdict = verdict.value.clone();
        Some(Failure {
            host: Some(host.clone()),
            cause: verdict.as_ref().map_or_else(|| "it failed".to_owned(), |v| v.cause.clone()),
            exit_code: verdict.as_ref().and_then(|v| v.exit_code),
            log_tail: verdict.map(|v| v.log_tail).unwrap_or_default(),
        })
    }

    fn by_hosts(&self) -> Outcome {
        let mut blocked = None;
        let (mut there, mut failed) = (0, 0);
        for (host, takes_turns) in self.hosts {
            // With turns, the rollout says what a failure means. Where one is allowed, that host stays behind.
            let verdict = self.records.verdicts.get(&(self.app.clone(), self.release.clone(), host.clone()));
            if let Some(stored) = verdict.filter(|_| *takes_turns && self.rollout().is_some()) {
                let cause = stored.value.as_ref().map_or("no cause is given", |verdict| verdict.cause.as_str());
                blocked.get_or_insert((host.clone(), format!("the release failed there: {cause}")));
                failed += 1;
                continue;
            }
            let Some((status, modified)) = self.statuses.get(host) else { continue };
            if status.release.as_deref() != Some(self.release.as_str()) {
                // Of an invalid app the last valid release runs.
                if status.state == State::Invalid && *modified > self.since {
                    blocked.get_or_insert((host.clone(), status.reason.clone()));
                }
                continue;
            }
            // What it says of an earlier spec is no answer. Agents of an earlier version do not say which one they have seen.
            if status.spec_revision != 0 && status.spec_revision < self.spec {
                continue;
            }
            if self.is_there(status) {
                there += 1;
                continue;
            }
            // The first release of an app is tried again; the answer is that it failed.
            let stored = self.records.rollouts.get(self.app).and_then(|stored| stored.value.as_ref());
            let is_first =
                stored.is_some_and(|r| r.release == *self.release && r.from.is_none() && r.phase.is_under_way());
            match &status.verdict {
                Some(_) if *takes_turns && !is_first => {}
                Some(verdict) if *modified > self.since => {
                    return Outcome::Failed(Failure {
                        host: Some(host.clone()),
                        cause: verdict.cause.clone(),
                        exit_code: verdict.exit_code,
                        log_tail: verdict.log_tail.clone(),
                    });
                }
                _ => {
                    if matches!(status.state, State::Blocked | State::Invalid) {
                        blocked.get_or_insert((host.clone(), status.reason.clone()));
                    }
                }
            }
        }
        let count = self.hosts.len();
        let is_rolled = !self.takes_turns()
            || self.until == Until::Serving
            || self.rollout().is_some_and(|r| matches!(r.phase, RolloutPhase::Done | RolloutPhase::Restored))
            // Nothing was written for this question: the fleet was there before.
            || self.since == 0 && !self.records.rollouts.contains_key(self.app);
        if count > 0 && there == count && is_rolled {
            return Outcome::Converged(count);
        }
        // While others have their turns, a failure that is allowed holds up nothing.
        if let Some((host, why)) = blocked.filter(|_| failed == 0 || there + failed == count) {
            return Outcome::Blocked(Some(host), why);
        }
        match self.frozen {
            Some(why) if self.takes_turns() => {
                let why = if why.is_empty() { "no reason given" } else { why };
                return Outcome::Blocked(None, format!("the fleet is frozen, and no host gets a turn: {why}"));
            }
            _ => {}
        }
        Outcome::Pending(if count == 0 {
            Some("no host that is up is to run it".to_owned())
        } else if self.takes_turns() && self.records.leader.is_none() {
            Some("no agent leads the fleet, so no host gets a turn".to_owned())
        } else if self.takes_turns() && self.rollout().is_none() {
            Some("its rollout is not opened yet".to_owned())
        } else {
            None
        })
    }

    fn is_there(&self, status: &AppStatus) -> bool {
        match self.until {
            Until::Converged | Until::Canary => status.state == State::Converged && status.serving.is_none(),
            Until::Serving => status.healthy > 0 && status.serving.is_none(),
        }
    }
}
