//! Conditions of transactions that take a rare order of events to be needed: that order, played on purpose.

use demae::{
    fleet::leader::LOST_AFTER,
    model::{
        fleet::{
            CommandRun, CommandState, FleetKey, HostVerdict, Permit, PermitPhase, Proof, ResolvedImage, Rollout,
            RolloutPhase, SCHEME, Transaction, TransactionKind, VERSION,
        },
        name::{HostName, ImageDigest},
        spec::Update,
        time::Timestamp,
    },
};

use super::{Fleet, Omitted, Sent, release, store};

/// What happens, and what is missed then.
struct Case {
    condition: Omitted,
    /// The fleet from which a transaction is decided.
    before: fn(&mut Fleet),
    /// What happens until it arrives at the store.
    meanwhile: fn(&mut Fleet),
    missed: &'static str,
}

fn host(n: usize) -> HostName {
    HostName::try_from(format!("host{n}")).expect("a name")
}

fn permit(fleet: &mut Fleet, of: u64, phase: PermitPhase) {
    let permit = Permit {
        version: VERSION,
        release: release(of),
        epoch: 1,
        phase,
        granted: Timestamp::default(),
        seen: 0,
        strict: true,
        first: false,
    };
    let key = FleetKey::Permit(host(0), fleet.app.clone());
    fleet.store.put(key, serde_json::to_string(&permit).expect("JSON"), None);
}

fn roll(fleet: &mut Fleet, to: u64, phase: RolloutPhase) {
    let rollout = Rollout {
        version: VERSION,
        release: release(to),
        from: Some(release(0)),
        phase,
        scheme: SCHEME,
        hosts: 3,
        pinned: false,
        opened: Timestamp::default(),
        changed: Timestamp::default(),
        reason: String::new(),
    };
    let key = FleetKey::Rollout(fleet.app.clone());
    fleet.store.put(key, serde_json::to_string(&rollout).expect("JSON"), None);
}

fn verdict(fleet: &mut Fleet, of: u64, on: usize) {
    let at = Timestamp::default();
    let verdict =
        HostVerdict { version: VERSION, cause: "it exited".into(), exit_code: None, log_tail: String::new(), at };
    let key = FleetKey::Verdict(fleet.app.clone(), release(of), host(on));
    fleet.store.put(key, serde_json::to_string(&verdict).expect("JSON"), None);
}

fn proves(fleet: &mut Fleet, n: usize, of: u64) {
    let proof = Proof { version: VERSION, release: Some(release(of)) };
    let key = FleetKey::Proof(host(n), fleet.app.clone());
    fleet.store.put(key, serde_json::to_string(&proof).expect("JSON"), None);
    fleet.hosts[n].proven = Some(release(of));
    fleet.hosts[n].routed = Some(release(of));
}

/// Five hosts that serve release 0, and a leader.
fn fleet(omitted: Option<Omitted>) -> Fleet {
    let seed = (1..).find(|seed| Fleet::new(*seed, None).hosts.len() == 5).expect("a fleet of five");
    let mut fleet = Fleet::new(seed, omitted);
    fleet.update = Update::default();
    fleet.faults = false;
    fleet.keep_leases(true);
    for n in 0..5 {
        proves(&mut fleet, n, 0);
        let (key, text) = fleet.hosts[n].status(&fleet.app);
        fleet.store.put(key, text, None);
    }
    roll(&mut fleet, 0, RolloutPhase::Done);
    fleet.store.change(|state| state.parallelism = 3);
    fleet.candidate_acts(4);
    fleet
}

/// What the leader or the first host would write now.
fn decided(fleet: &mut Fleet, kind: TransactionKind) -> Sent {
    fleet.holds_back = true;
    for _ in 0..4 {
        fleet.candidate_acts(4);
        fleet.host_steps(0);
    }
    let is_it = |sent: &Sent| sent.transaction.kind == kind;
    let at = fleet.sent.iter().position(is_it).unwrap_or_else(|| panic!("no {kind:?}: {:#?}", kinds(&fleet.sent)));
    let sent = fleet.sent.remove(at);
    fleet.sent.clear();
    fleet.holds_back = false;
    sent
}

fn kinds(sent: &[Sent]) -> Vec<&Transaction> {
    sent.iter().map(|sent| &sent.transaction).collect()
}

fn wants_the_next(fleet: &mut Fleet) {
    fleet.qualities.insert(release(1), super::Quality::default());
    fleet.want(&release(1));
}

fn is_under_way(fleet: &mut Fleet) {
    wants_the_next(fleet);
    roll(fleet, 1, RolloutPhase::Rolling);
}

fn serves_the_next(fleet: &mut Fleet) {
    is_under_way(fleet);
    fleet.hosts[0].running.insert(release(1));
    fleet.hosts[0].routed = Some(release(1));
}

/// The first host goes away in its turn, for long.
fn goes_away_in_its_turn(fleet: &mut Fleet) {
    is_under_way(fleet);
    permit(fleet, 1, PermitPhase::Switch);
    fleet.hosts[0].crash();
    fleet.keep_leases(true);
    fleet.candidate_acts(4);
    fleet.now = fleet.now.plus(LOST_AFTER);
}

/// The command of the next release has failed on the first host, and its end is not written yet.
fn fails_in_its_command(fleet: &mut Fleet) {
    is_under_way(fleet);
    fleet.qualities.insert(release(1), super::Quality { command: Some(false), ..super::Quality::default() });
    let run = CommandRun {
        version: VERSION,
        host: host(0),
        run: String::new(),
        state: CommandState::Started,
        started: Timestamp::default(),
        cause: String::new(),
    };
    let key = FleetKey::Command(fleet.app.clone(), release(1));
    fleet.store.put(key, serde_json::to_string(&run).expect("JSON"), None);
    let created = fleet.store.now().revision;
    fleet.hosts[0].commands.insert(release(1), created);
}

/// What the tag of the next release means, by turns.
fn digest(n: usize) -> ImageDigest {
    ImageDigest::try_from(format!("sha256:{n:064x}")).expect("a digest")
}

/// Another host has pulled the next release before, and its tag meant another image then.
fn is_pulled_elsewhere(fleet: &mut Fleet) {
    let image = ResolvedImage { version: VERSION, digest: digest(2), host: host(1) };
    let key = FleetKey::Digest(fleet.app.clone(), release(1));
    fleet.store.put(key, serde_json::to_string(&image).expect("JSON"), None);
}

const CASES: &[Case] = &[
    Case {
        condition: (TransactionKind::WriteDigest, "digest"),
        before: |fleet| {
            is_under_way(fleet);
            fleet.hosts[0].pulled = Some((release(1), digest(1)));
        },
        meanwhile: is_pulled_elsewhere,
        missed: "is another image on the hosts that come later",
    },
    Case {
        condition: (TransactionKind::EndCommand, "digest"),
        before: |fleet| {
            fails_in_its_command(fleet);
            fleet.qualities.insert(release(1), super::Quality { command: Some(true), ..super::Quality::default() });
            fleet.hosts[0].ran_from = Some(digest(1));
        },
        meanwhile: is_pulled_elsewhere,
        missed: "is another image on the hosts that come later",
    },
    Case {
        condition: (TransactionKind::Prove, "proof"),
        before: |fleet| {
            is_under_way(fleet);
            permit(fleet, 1, PermitPhase::Switch);
            fleet.hosts[0].proven = Some(release(1));
            fleet.hosts[0].routed = Some(release(1));
        },
        meanwhile: |fleet| proves(fleet, 0, 2),
        missed: "host0 has proven",
    },
    Case {
        condition: (TransactionKind::Open, "no-verdict-since"),
        before: wants_the_next,
        meanwhile: |fleet| verdict(fleet, 1, 1),
        missed: "which failed",
    },
    Case {
        condition: (TransactionKind::Open, "permit"),
        before: wants_the_next,
        meanwhile: |fleet| permit(fleet, 9, PermitPhase::Switch),
        missed: "has a turn, and gets another",
    },
    Case {
        condition: (TransactionKind::Open, "rollout"),
        before: wants_the_next,
        meanwhile: |fleet| roll(fleet, 1, RolloutPhase::Rolling),
        missed: "is opened twice",
    },
    Case {
        condition: (TransactionKind::ChangePhase, "rollout"),
        before: |fleet| {
            is_under_way(fleet);
            (0..5).for_each(|n| proves(fleet, n, 1));
        },
        meanwhile: |fleet| roll(fleet, 2, RolloutPhase::Rolling),
        missed: "is written over that of",
    },
    Case {
        condition: (TransactionKind::Withdraw, "permit"),
        before: |fleet| {
            is_under_way(fleet);
            permit(fleet, 1, PermitPhase::Try);
            fleet.hosts[0].crash();
            fleet.keep_leases(true);
        },
        // It came back for a moment.
        meanwhile: |fleet| permit(fleet, 1, PermitPhase::Switch),
        missed: "is taken in phase",
    },
    Case {
        condition: (TransactionKind::Grant, "permit"),
        before: is_under_way,
        meanwhile: |fleet| permit(fleet, 1, PermitPhase::Switch),
        missed: "has a turn, and gets another",
    },
    Case {
        condition: (TransactionKind::Grant, "rollout"),
        before: is_under_way,
        meanwhile: |fleet| roll(fleet, 1, RolloutPhase::Halted),
        missed: "a turn of an older rollout",
    },
    Case {
        condition: (TransactionKind::Grant, "spec"),
        before: |fleet| {
            is_under_way(fleet);
            proves(fleet, 1, 1);
        },
        meanwhile: |fleet| {
            let key = FleetKey::Spec(fleet.app.clone());
            fleet.store.change(|state| {
                state.parallelism = 1;
                store::put(state, key, "{}".into(), None);
            });
        },
        missed: "more get one, of 1",
    },
    Case {
        condition: (TransactionKind::DeclareLost, "permit"),
        before: goes_away_in_its_turn,
        meanwhile: |fleet| permit(fleet, 2, PermitPhase::Try),
        missed: "is taken in phase",
    },
    Case {
        condition: (TransactionKind::DeclareLost, "host"),
        before: goes_away_in_its_turn,
        meanwhile: |fleet| {
            fleet.hosts[0].up = true;
            fleet.keep_leases(true);
        },
        missed: "is there, and its turn is taken",
    },
    Case {
        condition: (TransactionKind::GiveBack, "permit"),
        before: |fleet| {
            is_under_way(fleet);
            permit(fleet, 1, PermitPhase::Try);
        },
        meanwhile: |fleet| {
            permit(fleet, 1, PermitPhase::Switch);
            fleet.hosts[0].routed = Some(release(1));
        },
        missed: "gives back its turn with requests on the release",
    },
    Case {
        condition: (TransactionKind::EndCommand, "verdict"),
        before: fails_in_its_command,
        meanwhile: |fleet| verdict(fleet, 1, 0),
        missed: "the first evidence of host0 is replaced",
    },
    Case {
        condition: (TransactionKind::Prove, "permit"),
        before: |fleet| {
            is_under_way(fleet);
            permit(fleet, 1, PermitPhase::Switch);
            fleet.hosts[0].proven = Some(release(1));
            fleet.hosts[0].routed = Some(release(1));
        },
        meanwhile: |fleet| permit(fleet, 2, PermitPhase::Try),
        missed: "ends the turn of another release",
    },
    Case {
        condition: (TransactionKind::Restore, "permit"),
        before: serves_the_next,
        meanwhile: |fleet| permit(fleet, 1, PermitPhase::Try),
        missed: "has a turn, and puts back another",
    },
    Case {
        condition: (TransactionKind::Restore, "holds-name"),
        before: serves_the_next,
        meanwhile: |fleet| {
            let key = FleetKey::Host(host(0));
            fleet.store.delete(&key);
            fleet.store.put(key, "{}".into(), Some(u64::MAX));
        },
        missed: "another run of host0 wrote",
    },
];

#[test]
fn conditions_that_are_rarely_needed_are_missed_too() {
    for case in CASES {
        for omitted in [None, Some(case.condition)] {
            let mut fleet = fleet(omitted);
            (case.before)(&mut fleet);
            let sent = decided(&mut fleet, case.condition.0);
            fleet.oracle.look(fleet.store.now(), &fleet.hosts, &fleet.app);
            assert!(fleet.oracle.violations.is_empty(), "{:?}: {:?}", case.condition, fleet.oracle.violations);
            (case.meanwhile)(&mut fleet);
            fleet.deliver(&sent);
            let found = &fleet.oracle.violations;
            match omitted {
                None => assert!(found.is_empty(), "{:?}: {found:?}", case.condition),
                Some(_) => assert!(found.iter().any(|v| v.contains(case.missed)), "{:?}: {found:?}", case.condition),
            }
        }
    }
}
