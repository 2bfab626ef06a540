//! A model of etcd as rollouts use it: one history of revisions, compared and written by transactions.

use std::{cell::OnceCell, collections::BTreeMap, rc::Rc};

use demae::{
    fleet::records::{RawRecord, Records},
    model::{
        fleet::{Condition, FleetKey, Transaction, TransactionKind, Write},
        name::ReleaseId,
    },
};

/// A value with its revisions, and the run of the agent on whose lease it is.
#[derive(Debug, Clone)]
pub struct Value {
    pub text: String,
    pub created: i64,
    pub modified: i64,
    pub run: Option<u64>,
}

/// The store at one revision.
#[derive(Debug, Clone)]
pub struct State {
    pub revision: i64,
    pub keys: BTreeMap<FleetKey, Value>,
    /// What people want, and on how many hosts at a time.
    pub wanted: ReleaseId,
    pub pin: Option<ReleaseId>,
    pub parallelism: usize,
    pub parsed: OnceCell<Records>,
}

impl State {
    pub fn records(&self) -> &Records {
        self.parsed.get_or_init(|| {
            let mut records = Records::default();
            for (key, value) in &self.keys {
                let raw = RawRecord { value: value.text.as_bytes(), created: value.created, modified: value.modified };
                assert!(records.take(key.clone(), Some(raw)), "every record can be read: {key:?} {}", value.text);
            }
            records
        })
    }
}

/// A condition that a mutant leaves out: of which transactions, and its name.
pub type Omitted = (TransactionKind, &'static str);

/// The name of a condition.
pub fn name(condition: &Condition) -> &'static str {
    match condition {
        Condition::HoldsName(_) => "holds-name",
        Condition::NoVerdictSince(..) => "no-verdict-since",
        Condition::Created(key, _) | Condition::Modified(key, _) => match key {
            FleetKey::Leader => "leader",
            FleetKey::Host(_) => "host",
            FleetKey::Rollout(_) => "rollout",
            FleetKey::Permit(..) => "permit",
            FleetKey::Verdict(..) => "verdict",
            FleetKey::Lost(..) => "lost",
            FleetKey::Proof(..) => "proof",
            FleetKey::Spec(_) => "spec",
            FleetKey::Image(_) => "image",
            FleetKey::Command(..) => "command",
            FleetKey::Digest(..) => "digest",
            FleetKey::Retry(_) => "retry",
            FleetKey::Freeze => "freeze",
            FleetKey::Status(..) | FleetKey::Kept(..) | FleetKey::KeptEnv(..) => "other",
        },
    }
}

/// The history of the store.
pub struct Store {
    history: Vec<Rc<State>>,
    omitted: Option<Omitted>,
}

impl Store {
    pub fn new(first: State, omitted: Option<Omitted>) -> Self {
        Self { history: vec![Rc::new(first)], omitted }
    }

    pub fn now(&self) -> &Rc<State> {
        self.history.last().expect("a state")
    }

    /// A state that is not older than a revision: `ahead` says how far on, as a part of 1,000.
    pub fn since(&self, revision: i64, ahead: usize) -> Rc<State> {
        let first = self.history.partition_point(|state| state.revision < revision);
        let rest = self.history.len() - 1 - first.min(self.history.len() - 1);
        self.history[(self.history.len() - 1 - rest) + (rest * ahead).div_ceil(1000)].clone()
    }

    pub fn change(&mut self, edit: impl FnOnce(&mut State)) {
        let mut next = (**self.now()).clone();
        next.revision += 1;
        next.parsed = OnceCell::new();
        edit(&mut next);
        self.history.push(Rc::new(next));
    }

    pub fn put(&mut self, key: FleetKey, text: String, run: Option<u64>) {
        self.change(|state| put(state, key, text, run));
    }

    pub fn delete(&mut self, key: &FleetKey) {
        self.change(|state| drop(state.keys.remove(key)));
    }

    /// Makes a transaction for a run of an agent, if its conditions hold.
    pub fn commit(&mut self, transaction: &Transaction, run: u64) -> bool {
        let now = self.now().clone();
        let is_checked =
            |c: &&Condition| self.omitted.is_none_or(|(kind, of)| kind != transaction.kind || of != name(c));
        if !transaction.conditions.iter().filter(is_checked).all(|c| holds(&now, c, run)) {
            return false;
        }
        self.change(|state| {
            for write in &transaction.writes {
                match write {
                    Write::Put(key, text) => put(state, key.clone(), text.clone(), None),
                    Write::Delete(key) => drop(state.keys.remove(key)),
                }
            }
        });
        true
    }
}

pub fn put(state: &mut State, key: FleetKey, text: String, run: Option<u64>) {
    let created = state.keys.get(&key).map_or(state.revision, |value| value.created);
    state.keys.insert(key, Value { text, created, modified: state.revision, run });
}

/// Whether a condition holds, as etcd compares.
pub fn holds(state: &State, condition: &Condition, run: u64) -> bool {
    let of = |key: &FleetKey| state.keys.get(key);
    match condition {
        Condition::Created(key, revision) => of(key).map_or(0, |v| v.created) == *revision,
        Condition::Modified(key, revision) => of(key).map_or(0, |v| v.modified) == *revision,
        Condition::HoldsName(host) => of(&FleetKey::Host(host.clone())).is_some_and(|v| v.run == Some(run)),
        Condition::NoVerdictSince(app, release, revision) => state.keys.iter().all(|(key, value)| match key {
            FleetKey::Verdict(a, r, _) => a != app || r != release || value.modified <= *revision,
            _ => true,
        }),
    }
}
