//! What the leader decides for a fleet at rest, and what a host does: single decisions. Whole histories are simulated.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use demae::{
    fleet::{
        leader::{FleetView, Intent, decide},
        records::{RawRecord, Records, Stored},
        turn::{Directive, HostFacts, HostRecords, directive, next_write},
    },
    model::{
        fleet::{
            CommandEnd, CommandRun, CommandState, EndedCommand, FleetKey, HostVerdict, Permit, PermitPhase, Proof,
            ResolvedImage, Rollout, RolloutPhase, SCHEME, Transaction, TransactionKind, Turn, VERSION, Write,
        },
        name::{AppName, HostName, ImageDigest, ReleaseId},
        spec::{Amount, Update},
        time::Timestamp,
    },
};

fn app() -> AppName {
    AppName::try_from("web").expect("a name")
}

fn host(n: usize) -> HostName {
    HostName::try_from(format!("host{n:03}")).expect("a name")
}

fn release(n: u8) -> ReleaseId {
    ReleaseId::try_from(format!("{n:012x}")).expect("a release")
}

fn rollout(to: u8, phase: RolloutPhase) -> Rollout {
    Rollout {
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
    }
}

/// A fleet that serves release 0, of which release 1 is wanted.
struct Fleet {
    records: Records,
    intent: Intent,
    revision: i64,
}

impl Fleet {
    fn new(hosts: usize, update: Update) -> Self {
        let intent = Intent {
            release: release(1),
            update,
            hosts: (0..hosts).map(|n| (host(n), false)).collect(),
            pin: None,
            promoted: None,
            made_from: None,
        };
        let mut fleet = Self { records: Records::default(), intent, revision: 10 };
        for n in 0..hosts {
            fleet.put(FleetKey::Host(host(n)), "{}");
            fleet.proves(n, 0);
            fleet.serves(n, Some(0));
        }
        fleet.roll(&rollout(1, RolloutPhase::Rolling));
        fleet
    }

    fn put(&mut self, key: FleetKey, text: &str) {
        self.revision += 1;
        let raw = RawRecord { value: text.as_bytes(), created: self.revision, modified: self.revision };
        self.records.take(key, Some(raw));
    }

    fn record(&mut self, key: FleetKey, record: &impl serde::Serialize) {
        self.put(key, &serde_json::to_string(record).expect("JSON"));
    }

    fn roll(&mut self, rollout: &Rollout) {
        self.record(FleetKey::Rollout(app()), rollout);
    }

    fn proves(&mut self, n: usize, of: u8) {
        self.record(FleetKey::Proof(host(n), app()), &Proof { version: VERSION, release: Some(release(of)) });
    }

    fn serves(&mut self, n: usize, of: Option<u8>) {
        let text = match of {
            Some(of) => format!("{{\"release\": \"{}\", \"healthy\": 1}}", release(of)),
            None => "{\"healthy\": 0}".to_owned(),
        };
        self.put(FleetKey::Status(host(n), app()), &text);
    }

    fn decide(&self) -> Vec<Transaction> {
        let intents = BTreeMap::from([(app(), self.intent.clone())]);
        decide(&FleetView {
            term: 1,
            intents: &intents,
            records: &self.records,
            gone: &BTreeMap::new(),
            now: Timestamp::default(),
        })
    }

    /// The hosts that get a turn next.
    fn granted(&self) -> Vec<HostName> {
        let puts = |write: &Write| match write {
            Write::Put(FleetKey::Permit(host, _), _) => Some(host.clone()),
            _ => None,
        };
        self.decide().iter().flat_map(|t| t.writes.iter().filter_map(puts).collect::<Vec<_>>()).collect()
    }
}

#[test]
fn first_turn_is_one_host_alone_then_a_quarter_of_the_fleet() {
    let mut fleet = Fleet::new(12, Update::default());
    assert_eq!(fleet.granted(), [host(0)]);
    fleet.proves(0, 1);
    assert_eq!(fleet.granted(), [host(1), host(2), host(3)]);
    fleet.intent.update.parallelism = Amount::Hosts(500);
    // One host that serves is left out of the turn.
    assert_eq!(fleet.granted().len(), 11);
    fleet.serves(0, None);
    assert_eq!(fleet.granted().len(), 10);
}

#[test]
fn order_is_broken_then_left_over_then_canary_then_name() {
    let mut fleet = Fleet::new(6, Update::default());
    let mut order = Vec::new();
    fleet.serves(4, None);
    fleet.serves(3, Some(9));
    fleet.intent.hosts.insert(host(5), true);
    for _ in 0..6 {
        let next = fleet.granted();
        let n: usize = next[0].as_str()[4..].parse().expect("a number");
        order.push(n);
        fleet.proves(n, 1);
        fleet.serves(n, Some(1));
    }
    assert_eq!(order, [4, 3, 5, 0, 1, 2]);
    assert_eq!(fleet.decide()[0].kind, TransactionKind::ChangePhase, "all hosts have proven it");
}

#[test]
fn releases_that_fail_meet_the_same_first_host() {
    let firsts: BTreeSet<HostName> = (1..40)
        .map(|n| {
            let mut fleet = Fleet::new(5, Update::default());
            fleet.intent.release = release(n);
            fleet.roll(&rollout(n, RolloutPhase::Rolling));
            fleet.granted()[0].clone()
        })
        .collect();
    assert_eq!(firsts.len(), 1);
}

#[test]
fn last_host_that_serves_gets_no_turn() {
    let mut fleet = Fleet::new(2, Update::default());
    fleet.serves(1, None);
    // The broken one goes first; then the other one may.
    assert_eq!(fleet.granted(), [host(1)]);
    fleet.proves(1, 1);
    assert!(fleet.granted().is_empty());
    fleet.serves(1, Some(1));
    assert_eq!(fleet.granted(), [host(0)]);
}

#[test]
fn freeze_and_unreadable_rollout_grant_nothing() {
    let mut fleet = Fleet::new(3, Update::default());
    fleet.put(FleetKey::Freeze, "a sale");
    assert!(fleet.decide().is_empty());
    let mut fleet = Fleet::new(3, Update::default());
    fleet.put(FleetKey::Rollout(app()), "{\"version\": 2, \"release\": \"000000000001\"}");
    assert!(fleet.decide().is_empty(), "a later version may mean anything");
    fleet.put(FleetKey::Rollout(app()), "rubbish");
    assert!(fleet.decide().is_empty());
}

#[test]
fn permit_that_cannot_be_read_still_counts() {
    let mut fleet = Fleet::new(3, Update::default());
    fleet.put(FleetKey::Permit(host(2), app()), "rubbish");
    assert!(fleet.granted().is_empty());
}

#[test]
fn rollout_is_not_opened_before_each_host_has_said_what_it_runs() {
    let mut fleet = Fleet::new(3, Update::default());
    fleet.records.rollouts.clear();
    let proof = fleet.records.proofs.remove(&(app(), host(1))).expect("a proof");
    assert!(fleet.decide().is_empty());
    fleet.records.proofs.insert((app(), host(1)), proof);
    let opened = fleet.decide();
    assert_eq!(opened.iter().map(|t| t.kind).collect::<Vec<_>>(), [TransactionKind::Open]);
}

#[test]
fn pin_of_a_release_that_was_never_proven_is_not_followed() {
    let mut fleet = Fleet::new(3, Update::default());
    fleet.intent.pin = Some(release(7));
    assert!(fleet.decide().is_empty());
    let kept = "{\"spec\": \"\", \"opened\": \"2026-01-01T00:00:00Z\", \"proven\": \"2026-01-01T00:10:00Z\"}";
    fleet.put(FleetKey::Kept(app(), release(7)), kept);
    let opened = fleet.decide();
    let Write::Put(_, text) = &opened[0].writes[0] else { panic!("a rollout is put") };
    let rollout: Rollout = serde_json::from_str(text).expect("a rollout");
    assert_eq!((rollout.phase, rollout.pinned, rollout.release), (RolloutPhase::Restored, true, release(7)));
}

struct OneHost {
    proven: Option<ReleaseId>,
    routed: BTreeSet<ReleaseId>,
    records: HostRecords,
    has_command: bool,
    command_end: Option<EndedCommand>,
    /// An image that is here, and waits for its digest to be written.
    pulled: Option<(ReleaseId, ImageDigest)>,
    /// Whether the app is to run here.
    is_wanted: bool,
    /// Whether the release has failed here.
    has_failed: bool,
}

impl OneHost {
    fn new(phase: RolloutPhase, permit: Option<PermitPhase>) -> Self {
        let permit = permit.map(|phase| Permit {
            version: VERSION,
            release: release(1),
            epoch: 50,
            phase,
            granted: Timestamp::default(),
            seen: 0,
            strict: true,
            first: false,
        });
        let stored = |modified| move |value| Stored { value: Some(value), created: modified, modified };
        let proof = Proof { version: VERSION, release: Some(release(0)) };
        let records = HostRecords {
            rollout: Some(stored(50)(rollout(1, phase))),
            permit: permit.map(|value| Stored { value: Some(value), created: 51, modified: 51 }),
            proof: Some(Stored { value: Some(proof), created: 9, modified: 9 }),
            ..HostRecords::default()
        };
        Self {
            proven: Some(release(0)),
            routed: [release(0)].into(),
            records,
            has_command: false,
            command_end: None,
            pulled: None,
            is_wanted: true,
            has_failed: false,
        }
    }

    fn ask(&self, is_ready: bool) -> (Directive, Option<TransactionKind>) {
        let (directive, write) = self.decide(is_ready);
        (directive, write.map(|t| t.kind))
    }

    fn write(&self, is_ready: bool) -> Option<Transaction> {
        self.decide(is_ready).1
    }

    fn decide(&self, is_ready: bool) -> (Directive, Option<Transaction>) {
        let (app, host, wanted, update) = (app(), host(0), release(1), Update::default());
        let evidence = HostVerdict {
            version: VERSION,
            cause: "it exited".into(),
            exit_code: None,
            log_tail: String::new(),
            at: Timestamp::default(),
        };
        let verdicts: Vec<_> = self.has_failed.then(|| (release(1), evidence)).into_iter().collect();
        let facts = HostFacts {
            app: &app,
            host: &host,
            wanted: self.is_wanted.then_some(&wanted),
            retried: 0,
            has_command: self.has_command,
            command_end: self.command_end.as_ref(),
            command_trouble: None,
            pulled: self.pulled.as_ref().map(|(release, digest)| (release, digest)),
            run: "run",
            update: &update,
            detection: Duration::ZERO,
            proven: self.proven.as_ref(),
            routed: &self.routed,
            serving: self.routed.first(),
            verdicts: &verdicts,
            confirmed: false,
        };
        let write = next_write(&facts, &self.records, is_ready, Timestamp::default());
        (directive(&facts, &self.records), write)
    }
}

#[test]
fn failure_of_a_first_release_ends_nothing_and_others_do() {
    let first = |permit: Option<bool>| {
        let mut host = OneHost::new(RolloutPhase::Rolling, permit.map(|_| PermitPhase::Try));
        (host.proven, host.routed, host.has_failed) = (None, BTreeSet::new(), true);
        host.records.proof =
            Some(Stored { value: Some(Proof { version: VERSION, release: None }), created: 9, modified: 9 });
        host.records.rollout.as_mut().expect("one").value.as_mut().expect("one").from = None;
        if let (Some(stored), Some(first)) = (&mut host.records.permit, permit) {
            stored.value.as_mut().expect("one").first = first;
        }
        host
    };
    // It keeps its turn, and tries again; once it is healthy, it goes on.
    assert_eq!(first(Some(true)).ask(false), (Directive::Wanted(Turn::Try), None));
    assert_eq!(first(Some(true)).ask(true).1, Some(TransactionKind::Commit));
    // A host that has lost its turn, by a restart or a pause, says nothing against the release.
    assert_eq!(first(None).ask(false).1, None);
    let paused = OneHost { is_wanted: false, ..first(Some(true)) };
    assert_eq!(paused.ask(false).1, Some(TransactionKind::GiveBack));
    // Once another host has proven it, a failure is one.
    assert_eq!(first(Some(false)).ask(false).1, Some(TransactionKind::Judge));
    let mut later = OneHost::new(RolloutPhase::Rolling, Some(PermitPhase::Try));
    later.has_failed = true;
    assert_eq!(later.ask(false).1, Some(TransactionKind::Judge));
}

#[test]
fn host_moves_requests_only_after_its_record_says_so() {
    let host = OneHost::new(RolloutPhase::Rolling, None);
    // Meanwhile it runs what is proven, and so heals.
    assert!(matches!(host.ask(true), (Directive::Kept(kept, _), None) if kept == release(0)));
    let host = OneHost::new(RolloutPhase::Rolling, Some(PermitPhase::Try));
    assert_eq!(host.ask(false), (Directive::Wanted(Turn::Try), None));
    assert_eq!(host.ask(true).1, Some(TransactionKind::Commit));
    // A record from before a restart is confirmed once more.
    let host = OneHost::new(RolloutPhase::Rolling, Some(PermitPhase::Switch));
    let (directive, write) = host.ask(true);
    assert!(matches!(directive, Directive::Wanted(turn) if !turn.may_switch()));
    assert_eq!(write, Some(TransactionKind::Commit));
}

#[test]
fn permit_of_another_epoch_is_given_back() {
    let mut host = OneHost::new(RolloutPhase::Rolling, Some(PermitPhase::Try));
    if let Some(stored) = &mut host.records.rollout {
        stored.modified = 60;
    }
    let (directive, write) = host.ask(true);
    assert!(matches!(directive, Directive::Kept(kept, _) if kept == release(0)));
    assert_eq!(write, Some(TransactionKind::GiveBack));
}

#[test]
fn host_with_requests_on_an_unproven_release_is_held_as_it_is() {
    let mut host = OneHost::new(RolloutPhase::Rolling, None);
    // The leader has not seen yet that another release is wanted than the one of this turn.
    if let Some(rollout) = host.records.rollout.as_mut().and_then(|stored| stored.value.as_mut()) {
        rollout.release = release(2);
    }
    host.routed = [release(0), release(2)].into();
    assert!(matches!(host.ask(false).0, Directive::Wanted(Turn::Held(_))));
}

#[test]
fn deleted_permit_of_a_turn_is_put_back_and_the_turn_goes_on() {
    let mut host = OneHost::new(RolloutPhase::Rolling, None);
    host.routed = [release(1)].into();
    let (directive, write) = host.ask(false);
    assert!(matches!(directive, Directive::Wanted(turn) if turn.may_switch()));
    assert_eq!(write, Some(TransactionKind::Restore));
}

#[test]
fn host_goes_back_to_what_was_proven_when_a_rollout_reverts() {
    let mut host = OneHost::new(RolloutPhase::Reverting, Some(PermitPhase::Switch));
    host.routed = [release(1)].into();
    assert!(matches!(host.ask(false), (Directive::Kept(kept, _), None) if kept == release(0)));
    host.routed = [release(0)].into();
    assert_eq!(host.ask(false).1, Some(TransactionKind::GiveBack));
}

#[test]
fn host_that_serves_nothing_takes_what_the_fleet_has_proven() {
    let mut host = OneHost::new(RolloutPhase::Rolling, None);
    (host.proven, host.routed) = (None, BTreeSet::new());
    assert!(matches!(host.ask(false).0, Directive::Kept(kept, _) if kept == release(0)));
    let mut host = OneHost::new(RolloutPhase::Done, None);
    (host.proven, host.routed) = (None, BTreeSet::new());
    assert_eq!(host.ask(false).0, Directive::Wanted(Turn::Free));
}

#[test]
fn command_of_a_release_runs_once_before_it_starts() {
    let command = |state, host_number| Stored {
        value: Some(CommandRun {
            version: VERSION,
            host: host(host_number),
            run: "run".into(),
            state,
            started: Timestamp::default(),
            cause: String::new(),
        }),
        created: 60,
        modified: 60,
    };
    let with = |found: Option<Stored<CommandRun>>, end: Option<CommandEnd>| {
        let mut host = OneHost::new(RolloutPhase::Rolling, Some(PermitPhase::Try));
        host.has_command = true;
        host.records.commands = found.into_iter().map(|run| (release(1), run)).collect();
        host.command_end =
            end.map(|end| EndedCommand { release: release(1), started: Timestamp::default(), end, digest: None });
        host.ask(true)
    };
    let is_held = |directive: &Directive| matches!(directive, Directive::Kept(kept, _) if *kept == release(0));
    // Its start is written before it starts.
    let (directive, write) = with(None, None);
    assert!(is_held(&directive) && write == Some(TransactionKind::StartCommand), "{directive:?} {write:?}");
    // While it runs here, or there, nothing is written and the release is not started.
    for number in [0, 1] {
        let (directive, write) = with(Some(command(CommandState::Started, number)), None);
        assert!(is_held(&directive) && write.is_none(), "{directive:?} {write:?}");
    }
    let failed = CommandEnd::Failed(HostVerdict {
        version: VERSION,
        cause: "it ended with exit code 1".into(),
        exit_code: Some(1),
        log_tail: String::new(),
        at: Timestamp::default(),
    });
    for end in [CommandEnd::Done, failed, CommandEnd::Unknown("its container is gone".into())] {
        let (directive, write) = with(Some(command(CommandState::Started, 0)), Some(end));
        assert!(is_held(&directive) && write == Some(TransactionKind::EndCommand), "{directive:?} {write:?}");
    }
    // Only once it is done, the release starts, wherever it ran.
    for state in [CommandState::Failed, CommandState::Unknown] {
        let (directive, write) = with(Some(command(state, 1)), None);
        assert!(is_held(&directive) && write.is_none(), "{directive:?} {write:?}");
    }
    let (directive, write) = with(Some(command(CommandState::Done, 1)), None);
    assert_eq!((directive, write), (Directive::Wanted(Turn::Try), Some(TransactionKind::Commit)));
}

#[test]
fn first_host_says_which_image_a_release_is() {
    let digest = |n: usize| ImageDigest::try_from(format!("sha256:{n:064x}")).expect("a digest");
    let stored = |value| Stored { value, created: 70, modified: 70 };
    let written = ResolvedImage { version: VERSION, digest: digest(2), host: host(1) };
    let mut host = OneHost::new(RolloutPhase::Rolling, Some(PermitPhase::Try));
    host.pulled = Some((release(1), digest(1)));
    // Before the instances are ready, and before requests move.
    for is_ready in [false, true] {
        assert_eq!(host.ask(is_ready).1, Some(TransactionKind::WriteDigest));
    }
    // Nothing is written over what another host wrote, even if it cannot be read.
    for found in [Some(written), None] {
        host.records.digests = [(release(1), stored(found))].into();
        assert_eq!(host.ask(false).1, None);
    }
    host.records.digests = [(release(2), stored(None))].into();
    assert_eq!(host.ask(false).1, Some(TransactionKind::WriteDigest), "that is of another release");

    // A command says it with its end, and only if it has succeeded.
    let mut host = OneHost::new(RolloutPhase::Rolling, Some(PermitPhase::Try));
    host.has_command = true;
    let run = CommandRun {
        version: VERSION,
        host: self::host(0),
        run: "run".into(),
        state: CommandState::Started,
        started: Timestamp::default(),
        cause: String::new(),
    };
    host.records.commands = [(release(1), stored_run(run))].into();
    for (end, expected) in [(CommandEnd::Done, 2), (CommandEnd::Unknown("its container is gone".into()), 1)] {
        let (release, started) = (release(1), Timestamp::default());
        host.command_end = Some(EndedCommand { release, started, end, digest: Some(digest(1)) });
        let write = host.write(true).expect("its end is written");
        assert_eq!((write.kind, write.writes.len()), (TransactionKind::EndCommand, expected));
    }
}

fn stored_run(run: CommandRun) -> Stored<CommandRun> {
    Stored { value: Some(run), created: 60, modified: 60 }
}
