//! Simulated fleets: the real decisions of the leader and of hosts, on a model of etcd with its revisions, with views that
//! are old, transactions that arrive late, hosts that die, are suspended or cut off, and leaders that do not know that they
//! are none any more.
//!
//! `DEMAE_FLEETS=n` plays so many histories; `DEMAE_FLEET_SEED=n` plays one and prints it.

mod directed;
mod host;
mod oracle;
mod store;

use std::{
    cell::OnceCell,
    collections::{BTreeMap, BTreeSet},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use demae::{
    fleet::leader::{FleetView, Intent, LOST_AFTER, decide},
    model::{
        fleet::{CommandRun, CommandState, Condition, FleetKey, Leader, Transaction, TransactionKind, VERSION, Write},
        name::{AppName, HostName, ReleaseId},
        spec::{Amount, FailureAction, Update},
        time::Timestamp,
    },
};
use host::{Quality, SimHost};
use oracle::Oracle;
use store::{Omitted, State, Store, Value};

use crate::chance::Chance;

/// Events of a history before all faults end.
const EVENTS: usize = 400;
/// Rounds in which a fleet without faults must come to rest.
const ROUNDS: usize = 600;
/// Rounds without a write after which it is at rest: all times that it may wait for have passed in them.
const QUIET: usize = 45;

/// A process that may lead: one on each host.
#[derive(Default)]
struct Candidate {
    /// The term it believes in.
    term: Option<i64>,
    view: i64,
    gone: BTreeMap<HostName, Timestamp>,
}

/// A transaction on its way to the store.
struct Sent {
    transaction: Transaction,
    sender: usize,
    run: u64,
    is_leader: bool,
}

struct Fleet {
    chance: Chance,
    app: AppName,
    store: Store,
    hosts: Vec<SimHost>,
    candidates: Vec<Candidate>,
    qualities: BTreeMap<ReleaseId, Quality>,
    update: Update,
    now: Timestamp,
    runs: u64,
    sent: Vec<Sent>,
    oracle: Oracle,
    faults: bool,
    /// Transactions stay on their way.
    holds_back: bool,
    log: Vec<String>,
}

/// The result of a history.
struct Outcome {
    violations: Vec<String>,
    log: Vec<String>,
    events: usize,
}

fn release(n: u64) -> ReleaseId {
    ReleaseId::try_from(format!("{n:012x}")).expect("a release")
}

impl Fleet {
    fn new(seed: u64, omitted: Option<Omitted>) -> Self {
        let chance = Chance::new(seed);
        let app = AppName::try_from("web").expect("a name");
        let count = 2 + chance.below(5);
        let parallelism = 1 + chance.below(3);
        let first = State {
            revision: 1,
            keys: BTreeMap::new(),
            wanted: release(0),
            pin: None,
            parallelism,
            parsed: OnceCell::new(),
        };
        let mut store = Store::new(first, omitted);
        store.put(FleetKey::Spec(app.clone()), "{}".into(), None);
        let hosts = (0..count).map(|number| SimHost::new(number, &release(0), store.now())).collect::<Vec<_>>();
        let update = Update {
            parallelism: Amount::Hosts(u32::try_from(parallelism).expect("small")),
            monitor: None,
            // With 2 to 6 hosts: none, or one from 2 hosts on.
            max_failures: if chance.one_in(3) { 500 } else { 0 },
            on_failure: if chance.one_in(3) { FailureAction::Pause } else { FailureAction::Rollback },
            canary: if chance.one_in(3) { 1 } else { 0 },
            auto_promote_after: Some(Duration::from_secs(60)),
        };
        Self {
            candidates: (0..count).map(|_| Candidate::default()).collect(),
            oracle: Oracle::new(release(0), count),
            qualities: BTreeMap::from([(release(0), Quality::default())]),
            chance,
            app,
            store,
            hosts,
            update,
            now: Timestamp::default(),
            runs: 1,
            sent: Vec::new(),
            faults: true,
            holds_back: false,
            log: Vec::new(),
        }
    }

    fn note(&mut self, what: impl Into<String>) {
        self.log.push(format!("{:>5} {}", self.store.now().revision, what.into()));
    }

    /// Each host that reaches the store has its key there; that of one that does not is gone in time.
    fn keep_leases(&mut self, at_once: bool) {
        for n in 0..self.hosts.len() {
            let (key, reaches) = (FleetKey::Host(self.hosts[n].name.clone()), self.hosts[n].reaches_store());
            let held = self.store.now().keys.get(&key).and_then(|v| v.run);
            if reaches && held != Some(self.hosts[n].run) {
                self.runs += 1;
                self.hosts[n].run = self.runs;
                self.store.delete(&key);
                self.store.put(key, "{}".into(), Some(self.runs));
                let name = self.hosts[n].name.clone();
                self.note(format!("{name} registers"));
            } else if !reaches && held.is_some() && (at_once || self.chance.one_in(6)) {
                self.store.delete(&key);
                let (status, _) = self.hosts[n].status(&self.app);
                self.store.delete(&status);
                let name = self.hosts[n].name.clone();
                self.note(format!("{name} is gone"));
            }
        }
    }

    fn host_steps(&mut self, n: usize) {
        if !self.hosts[n].acts() {
            return;
        }
        if !self.hosts[n].cut_off {
            let (since, other) = (self.hosts[n].records.revision, self.hosts[n].intent.revision);
            let fresh = !self.faults;
            let (a, b) = (self.chance.below(1001), self.chance.below(1001));
            self.hosts[n].records = self.store.since(since, if fresh { 1000 } else { a });
            self.hosts[n].intent = self.store.since(other, if fresh { 1000 } else { b });
        }
        let monitored = self.chance.one_in(3);
        if self.chance.one_in(5) {
            self.hosts[n].confirmed = false;
        }
        let before = (self.hosts[n].routed.clone(), self.hosts[n].proven.clone());
        let transaction = self.hosts[n].step(&self.app, &self.update, &self.qualities, monitored);
        if before != (self.hosts[n].routed.clone(), self.hosts[n].proven.clone()) {
            let host = &self.hosts[n];
            let line = format!("{} routes to {:?}, has proven {:?}", host.name, host.routed, host.proven);
            self.note(line);
        }
        if !self.hosts[n].cut_off {
            let (key, text) = self.hosts[n].status(&self.app);
            if self.store.now().keys.get(&key).is_none_or(|v| v.text != text) {
                self.store.put(key, text, None);
            }
            if let Some(transaction) = transaction {
                // As the agent does: it may be made late, without an answer.
                self.hosts[n].confirmed &= transaction.kind != TransactionKind::GiveBack;
                let run = self.hosts[n].run;
                self.send(Sent { transaction, sender: n, run, is_leader: false });
            }
        }
    }

    /// Delivers a transaction now, or later.
    fn send(&mut self, sent: Sent) {
        if self.holds_back || self.faults && self.chance.one_in(8) {
            if sent.is_leader {
                // A write that is not answered ends the term: what it did is not known, and nothing follows it.
                self.candidates[sent.sender].term = None;
            }
            self.sent.push(sent);
        } else {
            self.deliver(&sent);
        }
    }

    fn deliver(&mut self, sent: &Sent) {
        let before = self.store.now().clone();
        let made = self.store.commit(&sent.transaction, sent.run);
        let kind = sent.transaction.kind;
        let writes: Vec<String> = sent.transaction.writes.iter().map(short).collect();
        let name = self.hosts[sent.sender].name.clone();
        self.note(format!(
            "{name} {} {}: {}",
            if made { "does" } else { "fails to" },
            kind.as_str(),
            writes.join(", ")
        ));
        if made {
            self.oracle.made(
                &before,
                &sent.transaction,
                (sent.run, sent.is_leader),
                &self.app,
                &self.update,
                &self.hosts,
            );
            // The answer may be lost.
            if kind == TransactionKind::Commit
                && !(self.faults && self.chance.one_in(6))
                && self.hosts[sent.sender].run == sent.run
            {
                self.hosts[sent.sender].confirmed = true;
            }
            if sent.is_leader {
                self.candidates[sent.sender].view = self.store.now().revision;
            }
        }
    }

    fn candidate_acts(&mut self, n: usize) {
        if !self.hosts[n].reaches_store() {
            return;
        }
        let now = self.store.now().clone();
        let Some(term) = self.candidates[n].term else {
            if !now.keys.contains_key(&FleetKey::Leader) {
                let leader =
                    Leader { version: VERSION, host: self.hosts[n].name.clone(), run: String::new(), since: self.now };
                let put = Write::record(FleetKey::Leader, &leader);
                let condition = Condition::Created(FleetKey::Leader, 0);
                let lead = Transaction { kind: TransactionKind::Open, conditions: vec![condition], writes: vec![put] };
                assert!(self.store.commit(&lead, 0), "nothing is in between");
                let term = self.store.now().revision;
                self.candidates[n] = Candidate { term: Some(term), view: term, gone: BTreeMap::new() };
                let name = self.hosts[n].name.clone();
                self.note(format!("{name} leads"));
            }
            return;
        };
        let part = if self.faults { self.chance.below(1001) } else { 1000 };
        let state = self.store.since(self.candidates[n].view, part);
        self.candidates[n].view = state.revision;
        let records = state.records();
        if records.leader.as_ref().is_none_or(|leader| leader.created != term) {
            self.candidates[n].term = None;
            return;
        }
        for host in &self.hosts {
            if records.hosts.contains_key(&host.name) {
                self.candidates[n].gone.remove(&host.name);
            } else {
                self.candidates[n].gone.entry(host.name.clone()).or_insert(self.now);
            }
        }
        let update = Update {
            parallelism: Amount::Hosts(u32::try_from(state.parallelism).expect("small")),
            ..self.update.clone()
        };
        let intent = Intent {
            release: state.wanted.clone(),
            update,
            hosts: records.hosts.keys().map(|host| (host.clone(), false)).collect(),
            pin: state.pin.clone(),
            promoted: None,
            made_from: None,
        };
        let intents = BTreeMap::from([(self.app.clone(), intent)]);
        let view = FleetView { term, intents: &intents, records, gone: &self.candidates[n].gone, now: self.now };
        for transaction in decide(&view) {
            if self.candidates[n].term.is_some() {
                self.send(Sent { transaction, sender: n, run: 0, is_leader: true });
            }
        }
    }

    fn deploy(&mut self) {
        let n = u64::try_from(self.qualities.len()).expect("small");
        let mut quality = Quality::default();
        let all: BTreeSet<usize> = (0..self.hosts.len()).collect();
        match self.chance.below(6) {
            0 => quality.fails_at_start = all,
            1 => quality.fails_in_service = all,
            2 => drop(quality.fails_at_start.insert(self.chance.below(self.hosts.len()))),
            3 => drop(quality.fails_in_service.insert(self.chance.below(self.hosts.len()))),
            _ => {}
        }
        if self.chance.one_in(3) {
            quality.command = Some(!self.chance.one_in(4));
            self.oracle.with_command.insert(release(n));
        }
        self.qualities.insert(release(n), quality.clone());
        self.want(&release(n));
        self.note(format!("deploy {} {quality:?}", release(n)));
    }

    /// By another image, or another spec.
    fn want(&mut self, wanted: &ReleaseId) {
        let app = self.app.clone();
        let key = if self.chance.one_in(2) { FleetKey::Image(app) } else { FleetKey::Spec(app) };
        self.store.change(|state| {
            state.wanted.clone_from(wanted);
            store::put(state, key, wanted.to_string(), None);
        });
    }

    fn event(&mut self) {
        let n = self.chance.below(self.hosts.len());
        match self.chance.below(100) {
            0..43 => self.host_steps(n),
            43..65 => self.candidate_acts(n),
            65..70 => {
                if !self.sent.is_empty() {
                    let sent = self.sent.remove(self.chance.below(self.sent.len()));
                    self.deliver(&sent);
                }
            }
            70..75 => self.keep_leases(false),
            75..78 => self.deploy(),
            78..80 => {
                // Back to an earlier one.
                let old = release(u64::try_from(self.chance.below(self.qualities.len())).expect("small"));
                self.note(format!("deploy {old} again"));
                self.want(&old);
            }
            80..82 => {
                self.note(format!("{} dies", self.hosts[n].name));
                self.hosts[n].crash();
            }
            82..84 => {
                self.note(format!("{} starts", self.hosts[n].name));
                if !self.hosts[n].up {
                    self.hosts[n].up = true;
                    self.hosts[n].run = 0;
                }
            }
            84 => self.hosts[n].suspended = true,
            85..87 => self.hosts[n].suspended = false,
            87 => self.hosts[n].cut_off = true,
            88..90 => self.hosts[n].cut_off = false,
            90 => {
                self.note("the leader's lease ends");
                self.store.delete(&FleetKey::Leader);
            }
            91 => {
                let frozen = self.store.now().keys.contains_key(&FleetKey::Freeze);
                if frozen {
                    self.store.delete(&FleetKey::Freeze);
                } else {
                    self.store.put(FleetKey::Freeze, "why".into(), None);
                }
            }
            92..94 => {
                let parallelism = 1 + self.chance.below(3);
                self.note(format!("parallelism {parallelism}"));
                let key = FleetKey::Spec(self.app.clone());
                self.store.change(|state| {
                    state.parallelism = parallelism;
                    store::put(state, key, "{}".into(), None);
                });
            }
            94 => {
                // A person takes the verdicts away.
                let has_ended = |text: &str| {
                    let run = serde_json::from_str::<CommandRun>(text).expect("a run");
                    matches!(run.state, CommandState::Failed | CommandState::Unknown)
                };
                let is_taken = |(key, value): &(&FleetKey, &Value)| match key {
                    FleetKey::Verdict(..) => true,
                    FleetKey::Command(..) => has_ended(&value.text),
                    _ => false,
                };
                let taken = self.store.now().keys.iter().filter(is_taken);
                let verdicts: Vec<FleetKey> = taken.map(|(key, _)| key.clone()).collect();
                self.note("retry");
                let retry = FleetKey::Retry(self.app.clone());
                self.store.change(|state| {
                    verdicts.iter().for_each(|key| drop(state.keys.remove(key)));
                    store::put(state, retry, String::new(), None);
                });
            }
            95..97 if self.hosts.iter().all(SimHost::reaches_store) => {
                while !self.sent.is_empty() {
                    let sent = self.sent.remove(0);
                    self.deliver(&sent);
                }
                self.note("state/ is deleted");
                self.store.change(|state| {
                    use FleetKey::{Freeze, Image, Retry, Spec};
                    state.keys.retain(|key, _| matches!(key, Spec(_) | Image(_) | Retry(_) | Freeze));
                });
                self.keep_leases(false);
            }
            _ => self.now = self.now.plus(self.chance.millis(1_000, 400_000)),
        }
        self.oracle.look(self.store.now(), &self.hosts, &self.app);
    }

    /// Ends all faults, and sees that the fleet comes to rest.
    fn settle(&mut self) {
        self.faults = false;
        self.note("all faults end");
        for host in &mut self.hosts {
            if !host.up {
                host.run = 0;
            }
            (host.up, host.suspended, host.cut_off) = (true, false, false);
        }
        while !self.sent.is_empty() {
            let sent = self.sent.remove(0);
            self.deliver(&sent);
        }
        self.store.delete(&FleetKey::Freeze);
        let (mut quiet, mut revision) = (0, 0);
        for round in 0..ROUNDS {
            quiet = if revision == self.store.now().revision { quiet + 1 } else { 0 };
            revision = self.store.now().revision;
            if quiet > QUIET {
                break;
            }
            self.keep_leases(true);
            if round == 0 {
                // Leases of leaders that do not act any more end.
                self.store.delete(&FleetKey::Leader);
            }
            // Only a person can say whether a command is to run once more.
            let is_unknown = |(_, value): &(&FleetKey, &Value)| {
                serde_json::from_str::<CommandRun>(&value.text).is_ok_and(|run| run.state == CommandState::Unknown)
            };
            let commands = self.store.now().clone();
            let commands = commands.keys.iter().filter(|(key, _)| matches!(key, FleetKey::Command(..)));
            for (key, _) in commands.filter(is_unknown) {
                self.store.delete(key);
            }
            for n in 0..self.hosts.len() {
                self.host_steps(n);
                self.candidate_acts(n);
                self.oracle.look(self.store.now(), &self.hosts, &self.app);
            }
            self.now = self.now.plus(LOST_AFTER / 20);
        }
        self.oracle.at_rest(self.store.now(), &self.hosts, &self.app, &self.qualities);
    }
}

fn short(write: &Write) -> String {
    match write {
        Write::Put(key, text) => format!("{key:?} = {text}"),
        Write::Delete(key) => format!("- {key:?}"),
    }
}

fn play(seed: u64, omitted: Option<Omitted>) -> Outcome {
    let mut fleet = Fleet::new(seed, omitted);
    fleet.keep_leases(false);
    let mut events = 0;
    while events < EVENTS && fleet.oracle.violations.is_empty() {
        fleet.event();
        events += 1;
    }
    if fleet.oracle.violations.is_empty() {
        fleet.settle();
    }
    Outcome { violations: fleet.oracle.violations, log: fleet.log, events }
}

fn describe(seed: u64, outcome: &Outcome) -> String {
    let last = outcome.log.len().saturating_sub(150);
    format!(
        "{}\nviolated in fleet {seed}: {:#?}\nplay it again: DEMAE_FLEET_SEED={seed} cargo test --all-features --test simulation fleets -- --nocapture",
        outcome.log[last..].join("\n"),
        outcome.violations
    )
}

#[test]
fn fleets_with_faults_keep_to_their_limits_and_come_to_rest() {
    if let Some(seed) = crate::number("DEMAE_FLEET_SEED") {
        let outcome = play(seed, None);
        println!("{}", describe(seed, &outcome));
        assert!(outcome.violations.is_empty());
        return;
    }
    let count = crate::number("DEMAE_FLEETS").unwrap_or(300);
    let first = crate::number("DEMAE_FIRST_SEED").unwrap_or(1);
    let mut events = 0;
    for seed in first..first + count {
        let outcome = play(seed, None);
        assert!(outcome.violations.is_empty(), "{}", describe(seed, &outcome));
        events += outcome.events;
    }
    println!("{count} fleets, {events} events");
    assert!(events > 0);
}

/// Conditions that histories miss if they are left out, each with a history in which that was seen. It changes with the
/// code: others are searched then. What takes a rarer order of events is in `directed`.
const CONDITIONS: &[(TransactionKind, &str, u64)] = &[
    (TransactionKind::Open, "leader", 10),
    (TransactionKind::Open, "spec", 3),
    (TransactionKind::Open, "image", 3),
    (TransactionKind::Open, "freeze", 10),
    (TransactionKind::Open, "host", 260),
    (TransactionKind::Grant, "leader", 55),
    (TransactionKind::Grant, "no-verdict-since", 854),
    (TransactionKind::Grant, "freeze", 60),
    (TransactionKind::Grant, "host", 1189),
    (TransactionKind::ChangePhase, "leader", 445),
    (TransactionKind::Withdraw, "leader", 122),
    (TransactionKind::Withdraw, "host", 379),
    (TransactionKind::DeclareLost, "leader", 502),
    (TransactionKind::Commit, "holds-name", 812),
    (TransactionKind::Commit, "permit", 2072),
    (TransactionKind::Commit, "rollout", 1351),
    (TransactionKind::Commit, "no-verdict-since", 148),
    (TransactionKind::Commit, "freeze", 12),
    (TransactionKind::Prove, "holds-name", 11),
    (TransactionKind::Judge, "holds-name", 429),
    (TransactionKind::Judge, "verdict", 43),
    (TransactionKind::Judge, "retry", 75),
    (TransactionKind::StartCommand, "holds-name", 242),
    (TransactionKind::StartCommand, "permit", 532),
    (TransactionKind::StartCommand, "rollout", 959),
    (TransactionKind::StartCommand, "freeze", 93),
    (TransactionKind::StartCommand, "command", 29),
    (TransactionKind::EndCommand, "holds-name", 232),
    (TransactionKind::EndCommand, "command", 157),
    (TransactionKind::GiveBack, "holds-name", 13),
];

#[test]
fn conditions_that_are_left_out_are_missed() {
    let most = crate::number("DEMAE_FLEETS").unwrap_or(3_000);
    let (next, survived) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                while let Some(&(kind, name, known)) = CONDITIONS.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let caught = std::iter::once(known).chain(1..=most).find_map(|seed| {
                        let violations = play(seed, Some((kind, name))).violations;
                        violations.into_iter().next().map(|violation| (seed, violation))
                    });
                    match caught {
                        Some((seed, violation)) => println!("{kind:?} without {name}: fleet {seed}: {violation}"),
                        None => survived.lock().expect("no thread panicked with it").push((kind, name)),
                    }
                }
            });
        }
    });
    let survived = survived.into_inner().expect("no thread panicked with it");
    assert!(survived.is_empty(), "no property misses these: {survived:#?}");
}
