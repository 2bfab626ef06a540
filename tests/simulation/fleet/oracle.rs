//! What must hold of a fleet, judged from the true state of the hosts and the store.

use std::collections::{BTreeMap, BTreeSet};

use demae::model::{
    fleet::{
        CommandRun, CommandState, Condition, FleetKey, Permit, PermitPhase, Proof, Rollout, RolloutPhase, Transaction,
        TransactionKind, Write,
    },
    name::{AppName, HostName, ReleaseId},
    spec::Update,
};

use super::{
    host::{Quality, SimHost},
    store::{State, holds},
};

pub struct Oracle {
    /// Releases that the fleet has proven at some time.
    proven: BTreeSet<ReleaseId>,
    hosts: usize,
    allowed: usize,
    /// The largest number of hosts at a time that people ever wanted.
    parallelism: usize,
    /// Releases that have a command.
    pub with_command: BTreeSet<ReleaseId>,
    pub violations: Vec<String>,
}

impl Oracle {
    pub fn new(first: ReleaseId, hosts: usize) -> Self {
        Self {
            proven: [first].into(),
            hosts,
            allowed: 0,
            parallelism: 0,
            with_command: BTreeSet::new(),
            violations: Vec::new(),
        }
    }

    fn violate(&mut self, what: String) {
        self.violations.push(what);
    }

    /// After each event.
    pub fn look(&mut self, state: &State, hosts: &[SimHost], app: &AppName) {
        self.parallelism = self.parallelism.max(state.parallelism);
        if let Some(rollout) = rollout(state, app) {
            if matches!(rollout.phase, RolloutPhase::Done | RolloutPhase::Restored) {
                self.proven.insert(rollout.release.clone());
            }
            if let Some(from) = rollout.from.filter(|from| !self.proven.contains(from)) {
                self.violate(format!("{from} was never proven in the fleet, and hosts go back to it"));
            }
        }
        let mut started: Vec<&(ReleaseId, i64)> = hosts.iter().flat_map(|host| &host.started).collect();
        started.sort();
        if let Some(twice) = started.windows(2).find(|pair| pair[0] == pair[1]) {
            self.violate(format!("the command of {} was started twice", twice[0].0));
        }
        let is_unproven = |host: &&SimHost| match (&host.routed, &host.proven) {
            (Some(routed), Some(proven)) => routed != proven && !self.proven.contains(routed),
            _ => false,
        };
        let unproven: Vec<&str> = hosts.iter().filter(is_unproven).map(|host| host.name.as_str()).collect();
        if unproven.len() > self.parallelism + self.allowed {
            self.violate(format!("requests are on an unproven release on {}", unproven.join(", ")));
        }
    }

    /// After a transaction was made on a state.
    pub fn made(
        &mut self,
        before: &State,
        transaction: &Transaction,
        (run, is_leader): (u64, bool),
        app: &AppName,
        update: &Update,
        hosts: &[SimHost],
    ) {
        self.allowed = update.allowed_failures(self.hosts);
        let kind = transaction.kind;
        let by_host = !is_leader;
        for condition in &transaction.conditions {
            let what = match condition {
                Condition::HoldsName(host) if by_host => format!("another run of {host} wrote {}", kind.as_str()),
                Condition::Modified(FleetKey::Retry(_), _) => "a verdict from before another try is written".to_owned(),
                Condition::Created(FleetKey::Leader, term) if is_leader => {
                    format!("the leader of term {term} wrote {} after its term", kind.as_str())
                }
                _ => continue,
            };
            if !holds(before, condition, run) {
                self.violate(what);
            }
        }
        let puts = || {
            transaction.writes.iter().filter_map(|write| match write {
                Write::Put(key, text) => Some((key, text)),
                Write::Delete(_) => None,
            })
        };
        // Without any record, what most hosts have proven is all that is known.
        if kind == TransactionKind::Open && rollout(before, app).is_none() {
            let text = puts().find_map(|(key, text)| matches!(key, FleetKey::Rollout(_)).then_some(text));
            let opened: Option<Rollout> = text.and_then(|text| serde_json::from_str(text).ok());
            self.proven.extend(opened.and_then(|rollout| rollout.from));
        }
        for write in &transaction.writes {
            for what in self.wrong(kind, before, write, hosts) {
                self.violate(what);
            }
        }
        if matches!(kind, TransactionKind::Grant | TransactionKind::Open) {
            let granted = puts().filter(|(key, _)| matches!(key, FleetKey::Permit(..))).count();
            let is_open = |key: &&FleetKey| matches!(key, FleetKey::Permit(..) | FleetKey::Lost(..));
            let open = before.keys.keys().filter(is_open).count();
            let limit = before.parallelism + self.allowed;
            if granted > 0 && open + granted > limit {
                self.violate(format!(
                    "{open} hosts are in a turn or lost, and {granted} more get one, of {limit} of {app}"
                ));
            }
        }
    }

    /// What is wrong with one write, by the state before and the hosts as they are.
    fn wrong(&self, kind: TransactionKind, before: &State, write: &Write, hosts: &[SimHost]) -> Vec<String> {
        use TransactionKind::{
            ChangePhase, Commit, DeclareLost, EndCommand, GiveBack, Grant, Judge, Open, Restore, StartCommand, Withdraw,
        };
        let verdicts = |release: &ReleaseId| {
            before.keys.keys().filter(|k| matches!(k, FleetKey::Verdict(_, r, _) if r == release)).count()
        };
        let of = |host: &HostName| hosts.iter().find(|h| h.name == *host).expect("a host");
        let is_up = |host: &HostName| before.keys.contains_key(&FleetKey::Host(host.clone()));
        let is_frozen = before.keys.contains_key(&FleetKey::Freeze);
        let (key, old) = match write {
            Write::Put(key, _) | Write::Delete(key) => (key, before.keys.get(key)),
        };
        let now_rolls = before.keys.iter().find_map(|(key, value)| {
            let is_it = matches!(key, FleetKey::Rollout(_));
            is_it.then(|| (serde_json::from_str::<Rollout>(&value.text).expect("a rollout"), value.modified))
        });
        let mut wrong = Vec::new();
        let mut holds_not = |what: bool, text: String| wrong.extend(what.then_some(text));
        match (key, write) {
            (FleetKey::Permit(host, _), Write::Put(_, text)) => {
                let permit: Permit = serde_json::from_str(text).expect("a permit");
                let permit_before = old.map(|old| serde_json::from_str::<Permit>(&old.text).expect("a permit"));
                if matches!(kind, Grant | Open) {
                    holds_not(old.is_some(), format!("{host} has a turn, and gets another"));
                    holds_not(!is_up(host), format!("{host} is gone, and gets a turn"));
                    holds_not(is_frozen, format!("{host} gets a turn in a freeze"));
                    let too_many = verdicts(&permit.release) > self.allowed;
                    holds_not(too_many, format!("{host} gets a turn with {}, which failed", permit.release));
                }
                if kind == Grant {
                    let epoch = now_rolls.as_ref().map(|(_, modified)| *modified);
                    holds_not(epoch != Some(permit.epoch), format!("{host} gets a turn of an older rollout"));
                }
                if kind == Commit {
                    let failed = permit.strict && verdicts(&permit.release) > 0;
                    holds_not(failed, format!("{host} moves requests to {}, which failed", permit.release));
                    holds_not(is_frozen, format!("{host} moves requests in a freeze"));
                    let same = permit_before.as_ref().map(|p| &p.release) == Some(&permit.release);
                    holds_not(!same, format!("{host} moves requests to {} without a turn", permit.release));
                    let wanted = now_rolls.as_ref().is_some_and(|(r, _)| {
                        r.release == permit.release && (r.phase.is_under_way() || r.phase == RolloutPhase::Done)
                    });
                    holds_not(!wanted, format!("{host} moves requests to {}, which is not rolled out", permit.release));
                    let has_run = command(before, &permit.release).is_some_and(|run| run.state == CommandState::Done);
                    let too_early = self.with_command.contains(&permit.release) && !has_run;
                    holds_not(
                        too_early,
                        format!("{host} moves requests to {}, whose command has not run", permit.release),
                    );
                }
                if kind == Restore {
                    holds_not(old.is_some(), format!("{host} has a turn, and puts back another"));
                }
            }
            (FleetKey::Permit(host, _), Write::Delete(_)) => {
                let permit = old.map(|old| serde_json::from_str::<Permit>(&old.text).expect("a permit"));
                let phase = permit.as_ref().map(|p| p.phase);
                match kind {
                    Withdraw | DeclareLost => {
                        let expected = if kind == Withdraw { PermitPhase::Try } else { PermitPhase::Switch };
                        holds_not(phase != Some(expected), format!("the turn of {host} is taken in phase {phase:?}"));
                        holds_not(is_up(host), format!("{host} is there, and its turn is taken"));
                    }
                    GiveBack => {
                        let serves = |release: &ReleaseId| {
                            let host = of(host);
                            host.proven.is_some() && [&host.routed, &host.moving].contains(&&Some(release.clone()))
                        };
                        let serves = permit.as_ref().is_some_and(|p| serves(&p.release));
                        holds_not(serves, format!("{host} gives back its turn with requests on the release"));
                    }
                    _ => {
                        let other = permit.as_ref().is_some_and(|p| Some(&p.release) != of(host).proven.as_ref());
                        holds_not(other, format!("{host} ends the turn of another release as proven"));
                    }
                }
            }
            (FleetKey::Proof(host, _), Write::Put(_, text)) => {
                let proof: Proof = serde_json::from_str(text).expect("a proof");
                let host = of(host);
                let differs = proof.release != host.proven;
                holds_not(differs, format!("{} has proven {:?}, and says {:?}", host.name, host.proven, proof.release));
            }
            (FleetKey::Command(_, of), Write::Put(_, text)) => {
                let run: CommandRun = serde_json::from_str(text).expect("a run");
                let old = command(before, of);
                if kind == StartCommand {
                    let key = before.keys.iter().find_map(|(key, value)| match key {
                        FleetKey::Permit(host, _) if *host == run.host => Some(&value.text),
                        _ => None,
                    });
                    let permit = key.map(|text| serde_json::from_str::<Permit>(text).expect("a permit"));
                    let has_turn = permit.is_some_and(|permit| permit.release == *of);
                    holds_not(!has_turn, format!("{} starts the command of {of} without a turn", run.host));
                    holds_not(is_frozen, format!("{} starts the command of {of} in a freeze", run.host));
                    let rolls = now_rolls.as_ref().is_some_and(|(r, _)| r.release == *of);
                    holds_not(!rolls, format!("{} starts the command of {of}, which is not rolled out", run.host));
                    holds_not(old.is_some(), format!("the command of {of} is started again"));
                } else {
                    let own = old.is_some_and(|old| old.host == run.host && old.state == CommandState::Started);
                    holds_not(!own, format!("{} ends another run of the command of {of}", run.host));
                }
            }
            (FleetKey::Digest(_, of), Write::Put(_, text)) => {
                let same = old.is_none_or(|old| old.text == *text);
                holds_not(!same, format!("{of} is another image on the hosts that come later"));
            }
            (FleetKey::Verdict(_, _, host), Write::Put(..)) if matches!(kind, Judge | EndCommand) => {
                holds_not(old.is_some(), format!("the first evidence of {host} is replaced"));
            }
            (FleetKey::Rollout(_), Write::Put(_, text)) => {
                let next: Rollout = serde_json::from_str(text).expect("a rollout");
                let unwanted = kind == Open && next.release != before.wanted;
                holds_not(unwanted, format!("{} is wanted, and {} is opened", before.wanted, next.release));
                let again = kind == Open && now_rolls.as_ref().is_some_and(|(now, _)| now.release == next.release);
                holds_not(again, format!("the rollout of {} is opened twice", next.release));
                if let Some((now, _)) = &now_rolls {
                    let lost = kind == Open && next.from.as_ref() != now.proven();
                    holds_not(lost, format!("hosts go back to {:?}, and {:?} is proven", next.from, now.proven()));
                    let other = kind == ChangePhase && (now.release != next.release || now.opened != next.opened);
                    holds_not(
                        other,
                        format!("the rollout of {} is written over that of {}", next.release, now.release),
                    );
                    let ended = kind == ChangePhase
                        && matches!(now.phase, RolloutPhase::Reverting | RolloutPhase::Done)
                        && next.phase != RolloutPhase::Reverted;
                    holds_not(ended, format!("phase {} follows {}", next.phase.as_str(), now.phase.as_str()));
                }
            }
            _ => {}
        }
        wrong
    }

    /// When no faults are left, and time has passed.
    pub fn at_rest(
        &mut self,
        state: &State,
        hosts: &[SimHost],
        app: &AppName,
        qualities: &BTreeMap<ReleaseId, Quality>,
    ) {
        let quality = &qualities[&state.wanted];
        let Some(rollout) = rollout(state, app) else { return self.violate("there is no rollout".into()) };
        let permits: Vec<_> =
            state.keys.keys().filter(|k| matches!(k, FleetKey::Permit(..) | FleetKey::Lost(..))).collect();
        if !permits.is_empty() {
            self.violate(format!("turns do not end: {permits:?}"));
        }
        if rollout.release != state.wanted {
            self.violate(format!("{} is wanted, and the rollout is of {}", state.wanted, rollout.release));
        }
        let is_good = quality.is_good();
        let failed = state.keys.keys().any(|k| matches!(k, FleetKey::Verdict(_, r, _) if *r == state.wanted));
        let on = |release: &ReleaseId| hosts.iter().filter(|h| h.routed.as_ref() == Some(release)).count();
        match rollout.phase {
            RolloutPhase::Done | RolloutPhase::Restored => {
                if on(&state.wanted) != hosts.len() && is_good {
                    self.violate(format!(
                        "it is done, and only {} of {} hosts serve it",
                        on(&state.wanted),
                        hosts.len()
                    ));
                }
            }
            RolloutPhase::Halted | RolloutPhase::Reverted => {
                if is_good && !failed {
                    self.violate("nothing failed, and it is not done".into());
                }
            }
            RolloutPhase::Rolling if failed => {}
            other => self.violate(format!("it rests in phase {}", other.as_str())),
        }
        if rollout.phase == RolloutPhase::Reverted
            && let Some(from) = &rollout.from
            && qualities[from].is_good()
            && on(from) != hosts.len()
        {
            self.violate(format!("it is reverted, and only {} of {} hosts serve {from}", on(from), hosts.len()));
        }
        // A release that fails everywhere is tried on no more hosts than may fail, and one.
        let judged =
            state.keys.keys().filter(|k| matches!(k, FleetKey::Verdict(_, r, _) if *r == state.wanted)).count();
        if quality.fails_at_start.len() == hosts.len() && judged > self.allowed + self.parallelism {
            self.violate(format!("{judged} hosts have tried a release that fails everywhere"));
        }
    }
}

fn rollout(state: &State, app: &AppName) -> Option<Rollout> {
    let value = state.keys.get(&FleetKey::Rollout(app.clone()))?;
    serde_json::from_str(&value.text).ok()
}

fn command(state: &State, of: &ReleaseId) -> Option<CommandRun> {
    let found = state.keys.iter().find(|(key, _)| matches!(key, FleetKey::Command(_, release) if release == of));
    found.and_then(|(_, value)| serde_json::from_str(&value.text).ok())
}
