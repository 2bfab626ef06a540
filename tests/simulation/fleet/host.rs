//! A simulated host: what its agent does in a turn, without containers.

use std::{
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
    time::Duration,
};

use demae::{
    fleet::{
        records::Records,
        turn::{Directive, HostFacts, HostRecords, directive, next_write},
    },
    model::{
        fleet::{CommandEnd, CommandState, EndedCommand, FleetKey, HostVerdict, Transaction, Turn, VERSION},
        name::{AppName, HostName, ImageDigest, ReleaseId},
        spec::Update,
        time::Timestamp,
    },
};

use super::store::State;

/// How a release fares.
#[derive(Debug, Clone, Default)]
pub struct Quality {
    /// Hosts on which it never becomes healthy.
    pub fails_at_start: BTreeSet<usize>,
    /// Hosts on which it fails once it serves.
    pub fails_in_service: BTreeSet<usize>,
    /// Whether its command succeeds, if it has one.
    pub command: Option<bool>,
}

impl Quality {
    pub fn is_good(&self) -> bool {
        self.fails_at_start.is_empty() && self.fails_in_service.is_empty() && self.command != Some(false)
    }
}

/// A host. What survives a crash: containers, routes, what is proven, verdicts.
pub struct SimHost {
    pub name: HostName,
    pub number: usize,
    /// Whether the agent runs, is suspended, and reaches the store.
    pub up: bool,
    pub suspended: bool,
    pub cut_off: bool,
    /// This run of the agent: the lease of its name.
    pub run: u64,
    /// Its view of what people want, and of the records; both may be old.
    pub intent: Rc<State>,
    pub records: Rc<State>,
    pub proven: Option<ReleaseId>,
    /// With the revision of the last `retry` that was known then.
    pub verdicts: BTreeMap<ReleaseId, i64>,
    pub running: BTreeSet<ReleaseId>,
    pub routed: Option<ReleaseId>,
    /// A move of requests that was decided and is not done yet.
    pub moving: Option<ReleaseId>,
    /// The permit was confirmed, and nothing was moved since.
    pub confirmed: bool,
    /// Containers of commands, by the create revision of the record that they were started for. They survive a crash.
    pub commands: BTreeMap<ReleaseId, i64>,
    /// Commands that were started, with that revision.
    pub started: Vec<(ReleaseId, i64)>,
    /// How a command ended, and is to be written.
    pub command_end: Option<EndedCommand>,
    /// An image that it has pulled, and what its tag meant then.
    pub pulled: Option<(ReleaseId, ImageDigest)>,
    /// The digest of the image that its command has run from.
    pub ran_from: Option<ImageDigest>,
    run_text: String,
}

impl SimHost {
    pub fn acts(&self) -> bool {
        self.up && !self.suspended
    }

    pub fn reaches_store(&self) -> bool {
        self.acts() && !self.cut_off
    }

    /// The agent ends; what it had not done yet is forgotten.
    pub fn crash(&mut self) {
        self.up = false;
        self.moving = None;
        self.confirmed = false;
        self.command_end = None;
    }

    fn own_records(&self, records: &Records, app: &AppName) -> HostRecords {
        let key = (app.clone(), self.name.clone());
        HostRecords {
            rollout: records.rollouts.get(app).cloned(),
            permit: records.permits.get(&key).cloned(),
            lost: records.lost.get(&key).cloned(),
            proof: records.proofs.get(&key).cloned(),
            commands: records.commands.iter().map(|((_, r), run)| (r.clone(), run.clone())).collect(),
            verdicts: records
                .verdicts
                .iter()
                .filter(|((_, _, h), _)| *h == self.name)
                .map(|((_, r, _), verdict)| (r.clone(), verdict.value.clone()))
                .collect(),
            digests: records.digests.iter().map(|((_, r), image)| (r.clone(), image.clone())).collect(),
        }
    }

    /// One step of the agent. Returns what it writes about its turn.
    pub fn step(
        &mut self,
        app: &AppName,
        update: &Update,
        qualities: &BTreeMap<ReleaseId, Quality>,
        monitored: bool,
    ) -> Option<Transaction> {
        if let Some(release) = self.moving.take() {
            self.routed = Some(release);
            return None;
        }
        let records = self.own_records(self.records.records(), app);
        let wanted = self.intent.wanted.clone();
        let retried = self.retried(app);
        self.run_text = self.run.to_string();
        self.run_command(&records, qualities);
        let has_command = qualities[&wanted].command.is_some();
        self.verdicts.retain(|_, of| *of == retried);
        let given = (self.routed_set(), self.judged());
        let decided = directive(&self.facts(app, update, (&wanted, has_command), &given), &records);
        let (target, turn) = match decided {
            Directive::Wanted(turn) => (wanted.clone(), turn),
            Directive::Kept(release, _) | Directive::Pinned(release) => (release, Turn::Free),
        };
        let is_ready = self.converge(&target, &turn, &qualities[&target], monitored, retried);
        if self.moving.is_some() {
            return None;
        }
        let given = (self.routed_set(), self.judged());
        let facts = self.facts(app, update, (&wanted, has_command), &given);
        // Another one at each revision, as the time is.
        let now = Timestamp::default().plus(Duration::from_millis(self.records.revision.unsigned_abs()));
        next_write(&facts, &records, is_ready, now)
    }

    /// Starts a command whose record says that this host does, once, and learns how it ended.
    fn run_command(&mut self, records: &HostRecords, qualities: &BTreeMap<ReleaseId, Quality>) {
        for (release, stored) in &records.commands {
            let run = stored.value.as_ref().expect("it can be read");
            if run.state != CommandState::Started || run.host != self.name {
                continue;
            }
            let end = if self.commands.get(release) == Some(&stored.created) {
                match qualities[release].command {
                    Some(true) => CommandEnd::Done,
                    _ => CommandEnd::Failed(self.evidence()),
                }
            } else if run.run == self.run_text {
                self.commands.insert(release.clone(), stored.created);
                self.started.push((release.clone(), stored.created));
                continue;
            } else {
                CommandEnd::Unknown("its container is gone".into())
            };
            self.command_end = Some(EndedCommand {
                release: release.clone(),
                started: run.started,
                end,
                digest: self.ran_from.clone(),
            });
        }
    }

    fn facts<'a>(
        &'a self,
        app: &'a AppName,
        update: &'a Update,
        (wanted, has_command): (&'a ReleaseId, bool),
        (routed, verdicts): &'a (BTreeSet<ReleaseId>, Vec<(ReleaseId, HostVerdict)>),
    ) -> HostFacts<'a> {
        HostFacts {
            app,
            host: &self.name,
            wanted: Some(wanted),
            retried: self.retried(app),
            has_command,
            command_end: self.command_end.as_ref(),
            command_trouble: None,
            pulled: self.pulled.as_ref().map(|(release, digest)| (release, digest)),
            run: &self.run_text,
            update,
            detection: Duration::ZERO,
            proven: self.proven.as_ref(),
            routed,
            serving: self.routed.as_ref(),
            verdicts,
            confirmed: self.confirmed,
        }
    }

    fn retried(&self, app: &AppName) -> i64 {
        self.intent.keys.get(&FleetKey::Retry(app.clone())).map_or(0, |value| value.modified)
    }

    fn routed_set(&self) -> BTreeSet<ReleaseId> {
        self.routed.iter().cloned().collect()
    }

    fn judged(&self) -> Vec<(ReleaseId, HostVerdict)> {
        self.verdicts.keys().map(|release| (release.clone(), self.evidence())).collect()
    }

    fn evidence(&self) -> HostVerdict {
        HostVerdict {
            version: VERSION,
            cause: format!("it exited on {}", self.name),
            exit_code: Some(1),
            log_tail: String::new(),
            at: Timestamp::default(),
        }
    }

    /// A host that has served a release since always.
    pub fn new(number: usize, serves: &ReleaseId, state: &Rc<State>) -> Self {
        Self {
            name: HostName::try_from(format!("host{number}")).expect("a name"),
            number,
            up: true,
            suspended: false,
            cut_off: false,
            run: 0,
            intent: state.clone(),
            records: state.clone(),
            proven: Some(serves.clone()),
            verdicts: BTreeMap::new(),
            running: [serves.clone()].into(),
            routed: Some(serves.clone()),
            moving: None,
            confirmed: false,
            commands: BTreeMap::new(),
            started: Vec::new(),
            command_end: None,
            pulled: None,
            ran_from: None,
            run_text: String::new(),
        }
    }

    /// What the planner does by its turn. Returns true if only the permit keeps it from moving requests.
    fn converge(&mut self, target: &ReleaseId, turn: &Turn, quality: &Quality, monitored: bool, retried: i64) -> bool {
        let is_proven = self.proven.as_ref() == Some(target);
        if is_proven {
            self.routed = Some(target.clone());
            self.running.retain(|r| r == target);
            self.running.insert(target.clone());
            return false;
        }
        if matches!(turn, Turn::Held(_)) || self.verdicts.contains_key(target) {
            if self.proven.is_some() {
                self.routed.clone_from(&self.proven);
            }
            return false;
        }
        if !self.running.contains(target) {
            if quality.fails_at_start.contains(&self.number) {
                self.verdicts.insert(target.clone(), retried);
            } else {
                self.running.insert(target.clone());
            }
            return false;
        }
        if self.routed.as_ref() == Some(target) {
            if !monitored {
                return false;
            }
            if quality.fails_in_service.contains(&self.number) {
                self.verdicts.insert(target.clone(), retried);
            } else {
                self.proven = Some(target.clone());
            }
            return false;
        }
        if turn.may_switch() {
            self.moving = Some(target.clone());
            self.confirmed = false;
            return false;
        }
        true
    }

    /// The key of its status.
    pub fn status(&self, app: &AppName) -> (FleetKey, String) {
        let healthy = u16::from(self.routed.as_ref().is_some_and(|r| !self.verdicts.contains_key(r)));
        let release = self.routed.as_ref().map(ToString::to_string);
        let text = serde_json::json!({ "release": release, "healthy": healthy }).to_string();
        (FleetKey::Status(self.name.clone(), app.clone()), text)
    }
}
