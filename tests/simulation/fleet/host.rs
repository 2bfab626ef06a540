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
        fleet::{FleetKey, HostVerdict, Transaction, Turn, VERSION},
        name::{AppName, HostName, ReleaseId},
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
}

impl Quality {
    pub fn is_good(&self) -> bool {
        self.fails_at_start.is_empty() && self.fails_in_service.is_empty()
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
    }

    fn own_records(&self, records: &Records, app: &AppName) -> HostRecords {
        let key = (app.clone(), self.name.clone());
        HostRecords {
            rollout: records.rollouts.get(app).cloned(),
            permit: records.permits.get(&key).cloned(),
            lost: records.lost.get(&key).cloned(),
            proof: records.proofs.get(&key).cloned(),
            verdicts: records.verdicts.keys().filter(|(_, _, h)| *h == self.name).map(|(_, r, _)| r.clone()).collect(),
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
        self.verdicts.retain(|_, of| *of == retried);
        let decided = directive(&self.facts(app, update, &wanted, &self.routed_set(), &self.judged()), &records);
        let (target, turn) = match decided {
            Directive::Wanted(turn) => (wanted.clone(), turn),
            Directive::Kept(release, _) | Directive::Pinned(release) => (release, Turn::Free),
        };
        let is_ready = self.converge(&target, &turn, &qualities[&target], monitored, retried);
        if self.moving.is_some() {
            return None;
        }
        let (routed, verdicts) = (self.routed_set(), self.judged());
        next_write(&self.facts(app, update, &wanted, &routed, &verdicts), &records, is_ready, Timestamp::default())
    }

    fn facts<'a>(
        &'a self,
        app: &'a AppName,
        update: &'a Update,
        wanted: &'a ReleaseId,
        routed: &'a BTreeSet<ReleaseId>,
        verdicts: &'a [(ReleaseId, HostVerdict)],
    ) -> HostFacts<'a> {
        HostFacts {
            app,
            host: &self.name,
            wanted: Some(wanted),
            retried: self.retried(app),
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
        let verdict = HostVerdict {
            version: VERSION,
            cause: "it exited".into(),
            exit_code: Some(1),
            log_tail: String::new(),
            at: Timestamp::default(),
        };
        self.verdicts.keys().map(|release| (release.clone(), verdict.clone())).collect()
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
