//! Whether a store is trusted: whether it is the accepted one in its latest state, and whether it takes away more than a
//! person is likely to have meant.
//!
//! These decide, in this order: the identity of the store (`cluster`, etcd's cluster id, revision, release key), the fence
//! of this host, a release key that went with apps, the quarantine of an earlier refusal, and the brake on mass removals.

mod acceptance;
mod brake;
mod fence;
mod identity;
mod ledger;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use tokio::time::Instant;

pub use acceptance::{Acceptance, FLEET_ACCEPTANCE_VERSION, FleetAcceptance};
pub use brake::Brake;
pub use fence::{Fence, FenceMatch, FenceRecord, Nonce, SharedFence};
pub use identity::Identity;
pub use ledger::{Head, Ledger, LedgerError, StateStore};

use super::contents::Contents;
use crate::model::{
    desired::{DesiredApp, HostMode, Snapshot},
    name::AppName,
    status::StoreBlock,
    time::Timestamp,
};

/// The kind of the brake's block.
const MASS_REMOVAL: &str = "mass_removal";
/// The kind of a block for a store that is not the accepted one.
const OTHER_STORE: &str = "other_store";

/// What was accepted so far, and what the next read is compared with.
#[derive(Debug, Clone, Default)]
pub struct StoreTrust {
    /// The accepted store; `None` before the first one.
    pub identity: Option<Identity>,
    /// Apps that are placed on this host; before the first read, those that have left traces here.
    pub placed_apps: BTreeSet<AppName>,
    /// Why the last read was refused. It holds until no placed app would leave, so that a store that is restored key by
    /// key is not taken half-way.
    pub quarantine: Option<StoreBlock>,
    /// True if nothing may leave without acceptance: what an earlier agent accepted is lost.
    pub ledger_lost: bool,
    /// Apps that left lately, and when: many deletions one after the other count as one mass removal.
    pub removed_recently: BTreeMap<AppName, Instant>,
    /// The id of the last acceptance for the fleet that this host has taken.
    pub fleet_acceptance: Option<String>,
}

/// Within this time removals are counted together.
const REMOVALS_COUNT_TOGETHER: Duration = Duration::from_secs(300);

/// What speaks for the contents of a read being the accepted store in its latest state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Continuity {
    /// They came by a watch of an accepted read, on the same connection.
    Watched,
    /// They were read; this is what the fence says.
    Read {
        /// The store's fence, compared with that of this host.
        fence: FenceMatch,
        /// True if the history of the store contains the newest write that was accepted.
        has_newest: bool,
        /// True if they mean for this host what was accepted last, so that taking them changes nothing here.
        is_unchanged: bool,
    },
}

/// A read that is to be judged.
#[derive(Debug, Clone, Copy)]
pub struct Found<'a> {
    /// The identity of the store.
    pub identity: &'a Identity,
    /// The desired range.
    pub contents: &'a Contents,
    /// What it means for this host.
    pub snapshot: &'a Snapshot,
    /// What speaks for it.
    pub continuity: Continuity,
}

/// What people have accepted.
#[derive(Debug, Clone, Default)]
pub struct Acceptances {
    /// On this host.
    pub host: Acceptance,
    /// For the fleet, in the store that is judged.
    pub fleet: Option<FleetAcceptance>,
}

impl StoreTrust {
    /// True if a read is trusted only because a person accepted it. `known` is what was accepted last.
    ///
    /// # Errors
    /// Why it is not trusted.
    pub fn judge(
        &self,
        found: Found<'_>,
        known: &Contents,
        brake: Brake,
        accepted: &Acceptances,
    ) -> Result<bool, StoreBlock> {
        let leaving = self.leaving(found.snapshot);
        let mismatch = self.identity_mismatch(found.identity).or_else(|| self.fence_mismatch(found));
        let mass = self.mass_removal(found.snapshot, &leaving, brake);
        // Stay quarantined until every placed app is back. A mass removal never overrides a graver reason.
        let quarantine = self.quarantine.clone().filter(|_| !leaving.is_empty());
        let (graver, same) = (quarantine.clone().filter(|q| q.kind != MASS_REMOVAL), quarantine);
        let wrong = mismatch.or_else(|| self.lost_release_key(found, known, &leaving)).or(graver).or(mass).or(same);
        let Some(block) = wrong else { return Ok(false) };
        // A ledger of another host or prefix is a mistake of this host: it is accepted here.
        let fleet = accepted.fleet.as_ref().filter(|_| self.identity.is_some());
        let once = (self.fleet_acceptance.as_deref(), Timestamp::now());
        let by_fleet = fleet.is_some_and(|fleet| fleet.covers(&block, found.identity, &leaving, once));
        if by_fleet || accepted.host.covers(&block, found.identity, &leaving) { Ok(true) } else { Err(block) }
    }

    fn identity_mismatch(&self, found: &Identity) -> Option<StoreBlock> {
        // A ledger of another host or prefix is a reason until a person has looked.
        if let Some(quarantine) = self.quarantine.as_ref().filter(|q| self.identity.is_none() && q.kind == OTHER_STORE)
        {
            return Some(quarantine.clone());
        }
        self.identity.as_ref()?.contradicts(found)
    }

    fn fence_mismatch(&self, found: Found<'_>) -> Option<StoreBlock> {
        let Continuity::Read { fence, has_newest, is_unchanged } = found.continuity else { return None };
        let missing = match fence {
            FenceMatch::Current => return None,
            _ if is_unchanged => return None,
            // The write of the fence, or the key, was lost, and the history has what was accepted last. A store that was
            // refused before must show more than that: its keys may be coming back one by one.
            FenceMatch::Unacknowledged | FenceMatch::Missing if has_newest => {
                return self.quarantine.clone().filter(|q| q.kind != MASS_REMOVAL);
            }
            FenceMatch::Unacknowledged => "lacks the last change that this host took",
            FenceMatch::Missing => "has no fence of this host any more, and lacks the last change that it took",
            FenceMatch::Older => "holds an older fence of this host, or another one",
        };
        let message = format!("the store {missing}: it was restored from a backup");
        Some(block("older_revision", message))
    }

    /// Why a store without its release key is not trusted if apps went with it. Agents put the key back if nothing else is
    /// missing. Nothing deletes it in ordinary use, so it is a second sentinel for a store without a `cluster` key.
    fn lost_release_key(&self, found: Found<'_>, known: &Contents, leaving: &BTreeSet<AppName>) -> Option<StoreBlock> {
        let had_key = self.identity.as_ref()?.key.is_some();
        let went = |key: &Vec<u8>| key.starts_with(b"apps/") && !found.contents.entries.contains_key(key);
        let apps_went = !leaving.is_empty() || known.entries.keys().any(went);
        (had_key && found.identity.key.is_none() && apps_went).then(|| {
            let message = format!(
                "the store has no `secret/release-key` any more, and apps went with it, {} of them from this host: it was wiped, or is another one",
                leaving.len()
            );
            block("sentinel_missing", message)
        })
    }

    /// Why a snapshot is held back, if it takes away more apps at once than is likely to be meant.
    fn mass_removal(&self, new: &Snapshot, leaving: &BTreeSet<AppName>, brake: Brake) -> Option<StoreBlock> {
        // Draining a host is one key, and says that all apps are to leave.
        if new.mode == HostMode::Drained {
            return None;
        }
        // One that has been put back does not count.
        let is_recent = |(app, at): &(&AppName, &Instant)| {
            at.elapsed() < REMOVALS_COUNT_TOGETHER && !leaving.contains(*app) && !stays(new, app)
        };
        let lately = self.removed_recently.iter().filter(is_recent).count();
        let (count, of) = (leaving.len() + lately, self.placed_apps.len() + lately);
        let many = !leaving.is_empty() && brake.is_exceeded(count, of);
        if !(many || self.ledger_lost && !leaving.is_empty()) {
            return None;
        }
        let names: Vec<&str> = leaving.iter().take(5).map(AppName::as_str).collect();
        let more = if leaving.len() > names.len() { " …" } else { "" };
        Some(StoreBlock {
            kind: MASS_REMOVAL.to_owned(),
            message: if lately == 0 {
                format!("{count} of the {of} apps of this host would leave at once: {}{more}", names.join(", "))
            } else {
                format!(
                    "{count} of the {of} apps of this host would leave within {} minutes, {lately} of them have: {}{more}",
                    REMOVALS_COUNT_TOGETHER.as_secs() / 60,
                    names.join(", ")
                )
            },
            remedy: "put the keys back, or let them leave with `demae confirm`; nothing changes until then".to_owned(),
        })
    }

    /// Placed apps that a snapshot does not want here.
    pub fn leaving(&self, new: &Snapshot) -> BTreeSet<AppName> {
        self.placed_apps.iter().filter(|app| !stays(new, app)).cloned().collect()
    }

    /// Records that a store was accepted with this meaning for this host.
    pub fn accept(&mut self, identity: Identity, snapshot: &Snapshot) {
        // Whether a paused or invalid app is placed here shows in the last snapshot in which it was neither.
        let before = std::mem::take(&mut self.placed_apps);
        let is_placed = |app: &AppName, desired: &DesiredApp| match desired {
            DesiredApp::Run(target) => !target.cordoned || before.contains(app),
            DesiredApp::Invalid { last_good: Some(_), .. } => true,
            DesiredApp::Absent(_) => false,
            _ => before.contains(app),
        };
        self.placed_apps =
            snapshot.apps.iter().filter(|(app, d)| is_placed(app, d)).map(|(app, _)| app.clone()).collect();
        self.removed_recently
            .retain(|app, at| at.elapsed() < REMOVALS_COUNT_TOGETHER && !self.placed_apps.contains(app));
        // That a host is drained is one decision.
        if snapshot.mode != HostMode::Drained {
            let gone = before.difference(&self.placed_apps).map(|app| (app.clone(), Instant::now()));
            self.removed_recently.extend(gone);
        }
        self.identity = Some(identity);
        self.quarantine = None;
        self.ledger_lost = false;
    }

    /// Records that the ledger cannot be used: whatever is read now may be the mistake.
    pub fn distrust(&mut self, why: &LedgerError) {
        match why {
            LedgerError::Foreign { .. } | LedgerError::Version(_) => {
                self.quarantine = Some(block(OTHER_STORE, why.to_string()));
            }
            LedgerError::Read(_) | LedgerError::Damaged(_) => self.ledger_lost = true,
        }
    }
}

fn stays(new: &Snapshot, app: &AppName) -> bool {
    new.apps.get(app).is_some_and(|desired| !matches!(desired, DesiredApp::Absent(_)))
}

fn block(kind: &str, message: String) -> StoreBlock {
    let remedy = "`demae store accept` shows what would change, and takes this store from now on".to_owned();
    StoreBlock { kind: kind.to_owned(), message, remedy }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::contents::Entry;

    const READ: Continuity = Continuity::Read { fence: FenceMatch::Current, has_newest: true, is_unchanged: false };

    fn identity(cluster: Option<&str>, etcd: u64, revision: i64) -> Identity {
        Identity { cluster: cluster.map(str::to_owned), etcd, revision, key: Some("k".into()) }
    }

    fn app(n: usize) -> AppName {
        AppName::try_from(format!("app-{n}")).expect("a name")
    }

    fn snapshot(wanted: std::ops::Range<usize>) -> Snapshot {
        let apps = wanted.map(|n| (app(n), DesiredApp::Paused(String::new()))).collect();
        Snapshot { apps, ..Snapshot::default() }
    }

    fn judged(trust: &StoreTrust, found: &Identity, wanted: std::ops::Range<usize>, accepted: &Acceptance) -> String {
        let (contents, snapshot) = (Contents::default(), snapshot(wanted));
        let found = Found { identity: found, contents: &contents, snapshot: &snapshot, continuity: READ };
        let accepted = Acceptances { host: accepted.clone(), fleet: None };
        outcome(trust.judge(found, &Contents::default(), Brake::default(), &accepted))
    }

    fn outcome(judged: Result<bool, StoreBlock>) -> String {
        match judged {
            Ok(false) => "trusted".into(),
            Ok(true) => "accepted".into(),
            Err(block) => block.kind,
        }
    }

    #[test]
    fn a_store_with_another_identity_is_not_trusted() {
        let known = StoreTrust { identity: Some(identity(Some("a"), 1, 10)), ..StoreTrust::default() };
        let kind = |found: &Identity| judged(&known, found, 0..0, &Acceptance::default());
        assert_eq!(kind(&identity(Some("a"), 1, 10)), "trusted");
        assert_eq!(kind(&identity(Some("a"), 1, 99)), "trusted");
        assert_eq!(kind(&identity(None, 1, 99)), "sentinel_missing");
        assert_eq!(kind(&identity(Some("b"), 1, 99)), "other_store");
        assert_eq!(kind(&identity(Some("a"), 2, 99)), "other_store");
        assert_eq!(kind(&Identity { key: Some("x".into()), ..identity(Some("a"), 1, 99) }), "other_store");
        assert_eq!(
            kind(&Identity { key: None, ..identity(Some("a"), 1, 99) }),
            "trusted",
            "it gets the one that is known"
        );
        assert_eq!(kind(&identity(Some("a"), 1, 9)), "older_revision");
        // A store that never had the key may get it; a first store is taken as it is.
        let bare = StoreTrust { identity: Some(identity(None, 1, 10)), ..StoreTrust::default() };
        assert_eq!(judged(&bare, &identity(Some("a"), 1, 11), 0..0, &Acceptance::default()), "trusted");
        assert_eq!(judged(&StoreTrust::default(), &identity(None, 5, 1), 0..0, &Acceptance::default()), "trusted");
    }

    #[test]
    fn the_fence_decides_unless_nothing_would_change() {
        use FenceMatch::{Current, Missing, Older, Unacknowledged};
        let same = identity(Some("a"), 1, 10);
        let known = StoreTrust { identity: Some(same.clone()), ..StoreTrust::default() };
        let quarantined = StoreTrust { quarantine: Some(block("sentinel_missing", String::new())), ..known.clone() };
        let (contents, wanted) = (Contents::default(), snapshot(0..0));
        let kind = |trust: &StoreTrust, fence, has_newest, is_unchanged| {
            let continuity = Continuity::Read { fence, has_newest, is_unchanged };
            let found = Found { identity: &same, contents: &contents, snapshot: &wanted, continuity };
            outcome(trust.judge(found, &contents, Brake::default(), &Acceptances::default()))
        };
        for (fence, has_newest, is_unchanged, at_rest, in_quarantine) in [
            (Current, false, false, "trusted", "trusted"),
            (Unacknowledged, true, false, "trusted", "sentinel_missing"),
            (Unacknowledged, false, false, "older_revision", "older_revision"),
            (Unacknowledged, false, true, "trusted", "trusted"),
            (Missing, true, false, "trusted", "sentinel_missing"),
            (Missing, false, false, "older_revision", "older_revision"),
            (Missing, false, true, "trusted", "trusted"),
            (Older, true, false, "older_revision", "older_revision"),
            (Older, false, true, "trusted", "trusted"),
        ] {
            let case = format!("{fence:?}, newest in history: {has_newest}, unchanged: {is_unchanged}");
            assert_eq!(kind(&known, fence, has_newest, is_unchanged), at_rest, "{case}");
            assert_eq!(kind(&quarantined, fence, has_newest, is_unchanged), in_quarantine, "quarantined, {case}");
        }
    }

    #[test]
    fn an_acceptance_is_of_one_store_and_of_what_leaves_with_it() {
        let placed_apps: BTreeSet<AppName> = (0..2).map(app).collect();
        let known = StoreTrust { identity: Some(identity(Some("a"), 1, 10)), placed_apps, ..StoreTrust::default() };
        let accepted =
            Acceptance { identity: Some(identity(Some("b"), 2, 4)), leaving: [app(0)].into(), ..Acceptance::default() };
        let kind = |found: &Identity, wanted| judged(&known, found, wanted, &accepted);
        assert_eq!(kind(&identity(Some("b"), 2, 6), 1..2), "accepted");
        assert_eq!(kind(&identity(Some("b"), 2, 6), 0..0), "other_store", "more would leave than was shown");
        assert_eq!(kind(&identity(Some("b"), 2, 3), 1..2), "other_store", "older than the one that was shown");
        assert_eq!(kind(&identity(Some("b"), 3, 6), 1..2), "other_store");
        assert_eq!(kind(&identity(None, 2, 6), 1..2), "sentinel_missing");
        assert_eq!(kind(&identity(Some("a"), 1, 11), 0..2), "trusted", "it was not needed");
    }

    #[test]
    fn an_acceptance_for_the_fleet_is_taken_once_and_for_a_day() {
        let known = StoreTrust { identity: Some(identity(Some("a"), 1, 10)), ..StoreTrust::default() };
        let now = Timestamp::now();
        let of = |identity: Identity, hours: i64| FleetAcceptance {
            id: "x".into(),
            identity,
            leaving: [app(0)].into(),
            at: Timestamp::from_millis(now.as_millis() - hours * 3_600_000),
            version: 1,
        };
        let (contents, wanted) = (Contents::default(), snapshot(0..0));
        let kind = |trust: &StoreTrust, found: Identity, fleet: FleetAcceptance| {
            let found = Found { identity: &found, contents: &contents, snapshot: &wanted, continuity: READ };
            let accepted = Acceptances { fleet: Some(fleet), ..Acceptances::default() };
            outcome(trust.judge(found, &contents, Brake::default(), &accepted))
        };
        let other = || identity(Some("b"), 2, 6);
        assert_eq!(kind(&known, other(), of(other(), 23)), "accepted");
        assert_eq!(kind(&known, other(), of(other(), 25)), "other_store", "it is too old");
        assert_eq!(kind(&known, other(), of(identity(Some("c"), 2, 6), 0)), "other_store", "it is of another store");
        let with_apps = |n: usize| StoreTrust { placed_apps: (0..n).map(app).collect(), ..known.clone() };
        assert_eq!(kind(&with_apps(1), other(), of(other(), 0)), "accepted", "what leaves was shown");
        assert_eq!(kind(&with_apps(2), other(), of(other(), 0)), "other_store", "more would leave");
        let same = || identity(Some("a"), 1, 12);
        assert_eq!(kind(&with_apps(4), same(), of(same(), 0)), "mass_removal", "that is of each host");
        let taken = StoreTrust { fleet_acceptance: Some("x".into()), ..known };
        assert_eq!(kind(&taken, other(), of(other(), 0)), "other_store", "it was taken before");
    }

    #[test]
    fn a_wipe_is_noticed_though_none_of_its_apps_was_placed_here() {
        let known = StoreTrust { identity: Some(identity(None, 1, 10)), ..StoreTrust::default() };
        let wiped = Identity { key: None, ..identity(None, 1, 11) };
        let entries = [(b"apps/web/spec".to_vec(), Entry::new(b"image: a".to_vec(), 5, 5))].into();
        let (before, after) = (Contents::new(entries, 10), Contents::default());
        let found = Found { identity: &wiped, contents: &after, snapshot: &snapshot(0..0), continuity: READ };
        let judged = known.judge(found, &before, Brake::default(), &Acceptances::default());
        assert_eq!(judged.map_err(|block| block.kind), Err("sentinel_missing".into()));
    }

    #[test]
    fn most_apps_do_not_leave_at_once_nor_while_they_are_restored() {
        let placed_apps: BTreeSet<AppName> = (0..8).map(app).collect();
        let mut known = StoreTrust { identity: Some(identity(None, 1, 1)), placed_apps, ..StoreTrust::default() };
        let found = identity(None, 1, 2);
        let nothing = Acceptance::default();
        assert_eq!(judged(&known, &found, 0..4, &nothing), "trusted", "half may leave");
        assert_eq!(judged(&known, &found, 0..3, &nothing), "mass_removal");
        let some = Acceptance {
            identity: Some(identity(None, 1, 2)),
            leaving: (3..8).map(app).collect(),
            ..Acceptance::default()
        };
        assert_eq!(judged(&known, &found, 0..3, &some), "accepted");
        assert_eq!(judged(&known, &found, 0..2, &some), "mass_removal", "one more was not accepted");
        // Once quarantined, half of them back is not enough.
        known.quarantine = Some(block("mass_removal", String::new()));
        assert_eq!(judged(&known, &found, 0..7, &nothing), "mass_removal");
        assert_eq!(judged(&known, &found, 0..8, &nothing), "trusted");
        // A wiped store is no less wiped for the apps that leave with it.
        known.quarantine = Some(block("sentinel_missing", String::new()));
        assert_eq!(judged(&known, &found, 0..3, &nothing), "sentinel_missing");
        known.quarantine = None;
        let drained = Snapshot { mode: HostMode::Drained, ..snapshot(0..0) };
        let contents = Contents::default();
        let drained = Found { identity: &found, contents: &contents, snapshot: &drained, continuity: READ };
        let judgement = known.judge(drained, &contents, Brake::default(), &Acceptances::default());
        assert_eq!(judgement, Ok(false), "draining is one decision");
        known.placed_apps = (0..3).map(app).collect();
        assert_eq!(judged(&known, &found, 0..0, &nothing), "trusted", "three are few");
        known.removed_recently = [(app(3), Instant::now())].into();
        assert_eq!(judged(&known, &found, 0..0, &nothing), "mass_removal", "four, one after the other");
        assert_eq!(judged(&known, &found, 3..4, &nothing), "trusted", "the first one is back");
        known.removed_recently.clear();
        known.ledger_lost = true;
        assert_eq!(judged(&known, &found, 1..3, &nothing), "mass_removal", "what was accepted is lost");
    }

    #[test]
    fn an_acceptance_ends_with_the_read_that_it_was_asked_for() {
        let of = |kind: &str| Acceptance {
            identity: Some(identity(Some("a"), 1, 10)),
            kind: Some(kind.to_owned()),
            ..Acceptance::default()
        };
        let ends = |found: &Identity| of(MASS_REMOVAL).is_settled_by(found);
        assert!(ends(&identity(Some("a"), 1, 12)) && ends(&identity(None, 1, 10)));
        assert!(!ends(&identity(Some("a"), 1, 8)), "that read came before the question");
        assert!(!ends(&identity(Some("a"), 2, 12)), "of another etcd");
        assert!(of("sentinel_missing").is_settled_by(&identity(Some("a"), 1, 43)), "it was put back");
        let at = |seconds: i64| Timestamp::from_millis(seconds * 1000);
        let given = Acceptance { at: Some(at(0)), ..of(MASS_REMOVAL) };
        assert!(given.is_valid(at(3600)) && !given.is_valid(at(3601)) && of(MASS_REMOVAL).is_valid(at(9999)));
        assert!(given.is_valid(at(-60)), "the clock was set back");
        // It does not cover a block of another kind.
        let known = StoreTrust { identity: Some(identity(Some("a"), 1, 20)), ..StoreTrust::default() };
        let back = identity(Some("a"), 1, 15);
        assert_eq!(judged(&known, &back, 0..0, &of(MASS_REMOVAL)), "older_revision");
        assert_eq!(judged(&known, &back, 0..0, &of("older_revision")), "accepted");
    }

    #[test]
    fn a_ledger_of_others_is_a_reason_to_ask() {
        let mut trust = StoreTrust::default();
        trust.distrust(&LedgerError::Foreign { host: "a".into(), prefix: "/b".into() });
        let found = identity(Some("a"), 1, 5);
        assert_eq!(judged(&trust, &found, 0..0, &Acceptance::default()), "other_store");
        let accepted = Acceptance { identity: Some(found.clone()), ..Acceptance::default() };
        assert_eq!(judged(&trust, &found, 0..0, &accepted), "accepted");
    }
}
