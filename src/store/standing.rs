//! Whether a store is to be believed: whether it is the one that was read before, and whether it takes away more than a
//! person is likely to have meant.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::{
    landmark::Landmark,
    ledger::LedgerError,
    read::{Contents, Entry},
};
use crate::model::{
    desired::{DesiredApp, HostMode, Snapshot},
    name::AppName,
    status::StoreBlock,
    time::Timestamp,
};

/// What tells one store from another, and now from before.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Identity {
    /// What `cluster` says; nothing if `demae init` was never run.
    pub cluster: Option<String>,
    /// etcd's own id of its cluster.
    pub etcd: u64,
    /// The highest revision seen.
    pub revision: i64,
    /// The revision of the last full read. What the watch told of since may be less than what there was.
    #[serde(default, skip_serializing_if = "is_none_yet")]
    pub whole: i64,
    /// Stands for the key that release ids are made with; nothing if the store has none.
    #[serde(default)]
    pub key: Option<String>,
}

/// A ledger of an agent that did not keep it says nothing, and is kept as it was.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks by reference")]
fn is_none_yet(revision: &i64) -> bool {
    *revision == 0
}

impl Identity {
    /// Whether this is the same store, then or before: what a person looked at.
    pub(super) fn is_earlier_than(&self, found: &Self) -> bool {
        (&self.cluster, self.etcd) == (&found.cluster, found.etcd) && self.revision <= found.revision
    }
}

/// How much may leave at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Brake {
    /// More apps than this …
    pub apps: usize,
    /// … and more than this share of those that are here, in percent.
    pub percent: usize,
}

impl Default for Brake {
    fn default() -> Self {
        Self { apps: 3, percent: 50 }
    }
}

/// What a person accepted: one store, and that these apps leave.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Acceptance {
    /// The store that is to be believed, as it was when the person looked.
    pub identity: Option<Identity>,
    /// Apps that may leave.
    pub leaving: BTreeSet<AppName>,
    /// The kind of the block that was shown, if it is known.
    #[serde(default)]
    pub kind: Option<String>,
    /// When; nothing from a demae that did not say so.
    #[serde(default)]
    pub at: Option<Timestamp>,
}

/// How long what a person accepted is good for. An agent takes it within seconds; one that could not is asked about anew.
const ACCEPTED_FOR: Duration = Duration::from_secs(3600);

/// What was believed so far.
#[derive(Debug, Clone, Default)]
pub struct Standing {
    /// The store; nothing before the first one.
    pub identity: Option<Identity>,
    /// Apps that are wanted here; before the first read, those that have left traces here.
    pub here: BTreeSet<AppName>,
    /// Why the last read was not believed. It holds until nothing of what is here would leave, so that a store that is
    /// put back key by key is not taken half-way.
    pub held: Option<StoreBlock>,
    /// Whether nothing may leave unseen: what an earlier agent believed is lost.
    pub strict: bool,
    /// Apps that left lately, and when: many deletions one after the other are as many as at once.
    pub left: BTreeMap<AppName, Instant>,
}

/// Within this time what leaves is counted together.
const TOGETHER: Duration = Duration::from_secs(300);

/// What was read, to be judged.
#[derive(Debug, Clone, Copy)]
pub struct Found<'a> {
    /// Which store it was.
    pub identity: &'a Identity,
    /// All of it.
    pub contents: &'a Contents,
    /// What it means for this host.
    pub snapshot: &'a Snapshot,
    /// What was read of it before, and is not in its history.
    pub forgotten: Option<&'a Landmark>,
}

impl Acceptance {
    /// Whether a read answers the question that the person was asked: the same etcd, as far on or further.
    pub fn is_settled_by(&self, found: &Identity) -> bool {
        self.identity.as_ref().is_some_and(|a| a.etcd == found.etcd && a.revision <= found.revision)
    }

    /// Whether it is as good as when it was given.
    pub(super) fn holds(&self, now: Timestamp) -> bool {
        self.at.is_none_or(|at| now.since(at) <= ACCEPTED_FOR)
    }

    /// Whether it may be meant for a block: who only let apps leave has not taken another store.
    fn is_for(&self, block: &StoreBlock) -> bool {
        self.kind.as_deref() != Some(MASS_REMOVAL) || block.kind == MASS_REMOVAL
    }
}

impl Standing {
    /// Whether what was read is taken; true if only since a person accepted it. `known` is what was believed last.
    ///
    /// # Errors
    /// Why it is not.
    pub fn judge(
        &self,
        found: Found<'_>,
        known: &Contents,
        brake: Brake,
        accepted: &Acceptance,
    ) -> Result<bool, StoreBlock> {
        let leaving = self.leaving(found.snapshot);
        let doubt = self
            .doubt(found.identity)
            .or_else(|| self.other_history(found.contents, known))
            .or_else(|| forgets(found, known));
        let mass = self.brake(found.snapshot, &leaving, brake);
        // What was wrong is mended in part. That many apps leave says nothing new of a store that is not the one from before.
        let held = self.held.clone().filter(|held| !leaving.is_empty() || misses(held, known, found.contents));
        let (graver, same) = (held.clone().filter(|held| held.kind != MASS_REMOVAL), held);
        let wrong = doubt.or_else(|| self.lost_key(found, known, &leaving)).or(graver).or(mass).or(same);
        let Some(block) = wrong else { return Ok(false) };
        let shown = accepted.identity.as_ref().is_some_and(|a| a.is_earlier_than(found.identity));
        if shown && accepted.is_for(&block) && leaving.is_subset(&accepted.leaving) { Ok(true) } else { Err(block) }
    }

    /// Whether a store is the one that was read before.
    fn doubt(&self, found: &Identity) -> Option<StoreBlock> {
        // A ledger of others is a reason until a person has looked.
        if let Some(held) = self.held.as_ref().filter(|h| self.identity.is_none() && h.kind == OTHER) {
            return Some(held.clone());
        }
        let known = self.identity.as_ref()?;
        match (&known.cluster, &found.cluster) {
            (Some(known), None) => {
                let message = format!(
                    "the store has no `cluster` key, and had one that said `{known}`: it was wiped, or is another one"
                );
                return Some(block("sentinel_missing", message));
            }
            (Some(known), Some(found)) if known != found => {
                let message = format!(
                    "the store's `cluster` key says `{found}`, and said `{known}` before: this is another store"
                );
                return Some(block(OTHER, message));
            }
            _ => {}
        }
        if known.etcd != found.etcd {
            let message = format!(
                "etcd's cluster id is {:x}, and was {:x} before: this is another etcd, or one that was restored",
                found.etcd, known.etcd
            );
            return Some(block(OTHER, message));
        }
        if let (Some(known), Some(found)) = (&known.key, &found.key)
            && known != found
        {
            let message =
                "the store's `secret/release-key` is another one: every container would be replaced".to_owned();
            let remedy = "if a new host made it in a store that had been wiped: stop the agent there and delete the key, and an agent from before puts its own back; else `demae store accept`".to_owned();
            return Some(StoreBlock { remedy, ..block(OTHER, message) });
        }
        if found.revision < known.revision {
            let message = format!(
                "the store is at revision {}, and was at {} before: it was restored from a backup",
                found.revision, known.revision
            );
            return Some(block("older_revision", message));
        }
        None
    }

    /// Whether the key that release ids are made with went, and apps with it, be they wanted here or not. Agents put it back
    /// if it is all that is missing; nobody deletes it on an ordinary day, so it is a second sentinel for a store that was
    /// never given one.
    fn lost_key(&self, found: Found<'_>, known: &Contents, leaving: &BTreeSet<AppName>) -> Option<StoreBlock> {
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

    /// Whether something that was read before reads otherwise now, with the revision of then. Revisions alone do not
    /// tell: a backup that was restored counts on from where it was made, and is past what was seen some day.
    fn other_history(&self, contents: &Contents, known: &Contents) -> Option<StoreBlock> {
        let whole = self.identity.as_ref()?.whole;
        let differs = |(key, entry): &(&Vec<u8>, &Entry)| {
            let known = known.entries.get(*key);
            let is_old = entry.modified() <= whole || known.is_some_and(|k| entry.modified() <= k.modified());
            // What says the same again was put back.
            is_old && known.is_none_or(|k| k.value() != entry.value())
        };
        let (key, entry) = contents.entries.iter().find(differs)?;
        let message = format!(
            "`{}` is said to be as it was written at revision {}, and was read otherwise after that: the store was restored from a backup",
            String::from_utf8_lossy(key).escape_debug(),
            entry.modified()
        );
        Some(block("older_revision", message))
    }

    /// Why a snapshot is held back, if it takes away more apps at once than is likely to be meant.
    fn brake(&self, new: &Snapshot, leaving: &BTreeSet<AppName>, brake: Brake) -> Option<StoreBlock> {
        // Draining a host is one key, and says that all apps are to leave.
        if new.mode == HostMode::Drained {
            return None;
        }
        let lately = self.left.iter().filter(|(app, at)| at.elapsed() < TOGETHER && !leaving.contains(*app)).count();
        let (count, of) = (leaving.len() + lately, self.here.len() + lately);
        let many = !leaving.is_empty() && count > brake.apps && count * 100 > of * brake.percent;
        if !(many || self.strict && !leaving.is_empty()) {
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
                    TOGETHER.as_secs() / 60,
                    names.join(", ")
                )
            },
            remedy: "put the keys back, or let them leave with `demae confirm`; nothing changes until then".to_owned(),
        })
    }

    /// Apps that are here, and that a snapshot does not want here.
    pub fn leaving(&self, new: &Snapshot) -> BTreeSet<AppName> {
        let stays = |app: &AppName| new.apps.get(app).is_some_and(|d| !matches!(d, DesiredApp::Absent(_)));
        self.here.iter().filter(|app| !stays(app)).cloned().collect()
    }

    /// Takes a store and what it says.
    pub fn believe(&mut self, identity: Identity, snapshot: &Snapshot) {
        // Whether a paused or broken app belongs here is not known from it alone, but from when it was neither.
        let before = std::mem::take(&mut self.here);
        let is_here = |app: &AppName, desired: &DesiredApp| match desired {
            DesiredApp::Run(target) => !target.cordoned || before.contains(app),
            DesiredApp::Invalid { last_good: Some(_), .. } => true,
            DesiredApp::Absent(_) => false,
            _ => before.contains(app),
        };
        self.here = snapshot.apps.iter().filter(|(app, d)| is_here(app, d)).map(|(app, _)| app.clone()).collect();
        self.left.retain(|app, at| at.elapsed() < TOGETHER && !self.here.contains(app));
        // That a host is drained is one decision.
        if snapshot.mode != HostMode::Drained {
            let gone = before.difference(&self.here).map(|app| (app.clone(), Instant::now()));
            self.left.extend(gone);
        }
        self.identity = Some(identity);
        self.held = None;
        self.strict = false;
    }

    /// What an earlier agent kept is of another host, of other keys, or of a form that is not known: whatever is read
    /// now may be the mistake.
    pub fn distrust(&mut self, why: &LedgerError) {
        match why {
            LedgerError::Foreign { .. } | LedgerError::Version(_) => self.held = Some(block(OTHER, why.to_string())),
            LedgerError::Read(_) | LedgerError::Damaged(_) => self.strict = true,
        }
    }
}

/// Whether a store lacks something, or has it as it was before, and knows nothing of what it said last. If it lacks
/// nothing, somebody has put all of it back.
fn forgets(found: Found<'_>, known: &Contents) -> Option<StoreBlock> {
    let landmark = found.forgotten?;
    let lacks = |(key, entry): (&Vec<u8>, &Entry)| {
        let now = found.contents.entries.get(key);
        now.is_none_or(|now| now.modified() < entry.modified() && now.value() != entry.value())
    };
    known.entries.iter().any(lacks).then(|| {
        let message = format!(
            "`{}` was written at revision {}, and the store knows nothing of that: it was restored from a backup",
            String::from_utf8_lossy(&landmark.key).escape_debug(),
            landmark.revision
        );
        block("older_revision", message)
    })
}

/// Whether a store that was another one, or an older one, still lacks keys that were read before. A backup that others
/// write to is past every revision some day, and what it lacks looks as if it had been deleted.
fn misses(held: &StoreBlock, known: &Contents, found: &Contents) -> bool {
    held.kind != MASS_REMOVAL && known.entries.keys().any(|key| !found.entries.contains_key(key))
}

/// The kind of the brake's block.
const MASS_REMOVAL: &str = "mass_removal";
/// The kind of a block for a store that is not the one from before.
const OTHER: &str = "other_store";

fn block(kind: &str, message: String) -> StoreBlock {
    let remedy = "`demae store accept` shows what would change, and takes this store from now on".to_owned();
    StoreBlock { kind: kind.to_owned(), message, remedy }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(cluster: Option<&str>, etcd: u64, revision: i64) -> Identity {
        Identity { cluster: cluster.map(str::to_owned), etcd, revision, whole: revision, key: Some("k".into()) }
    }

    fn app(n: usize) -> AppName {
        AppName::try_from(format!("app-{n}")).expect("a name")
    }

    fn snapshot(wanted: std::ops::Range<usize>) -> Snapshot {
        let apps = wanted.map(|n| (app(n), DesiredApp::Paused(String::new()))).collect();
        Snapshot { apps, ..Snapshot::default() }
    }

    fn judged(standing: &Standing, found: &Identity, wanted: std::ops::Range<usize>, accepted: &Acceptance) -> String {
        let (contents, snapshot) = (Contents::default(), snapshot(wanted));
        let found = Found { identity: found, contents: &contents, snapshot: &snapshot, forgotten: None };
        match standing.judge(found, &Contents::default(), Brake::default(), accepted) {
            Ok(false) => "taken".into(),
            Ok(true) => "accepted".into(),
            Err(block) => block.kind,
        }
    }

    #[test]
    fn a_store_that_is_not_the_one_from_before_is_not_believed() {
        let known = Standing { identity: Some(identity(Some("a"), 1, 10)), ..Standing::default() };
        let kind = |found: &Identity| judged(&known, found, 0..0, &Acceptance::default());
        assert_eq!(kind(&identity(Some("a"), 1, 10)), "taken");
        assert_eq!(kind(&identity(Some("a"), 1, 99)), "taken");
        assert_eq!(kind(&identity(None, 1, 99)), "sentinel_missing");
        assert_eq!(kind(&identity(Some("b"), 1, 99)), "other_store");
        assert_eq!(kind(&identity(Some("a"), 2, 99)), "other_store");
        assert_eq!(kind(&Identity { key: Some("x".into()), ..identity(Some("a"), 1, 99) }), "other_store");
        assert_eq!(
            kind(&Identity { key: None, ..identity(Some("a"), 1, 99) }),
            "taken",
            "it gets the one that is known"
        );
        assert_eq!(kind(&identity(Some("a"), 1, 9)), "older_revision");
        // A store that never had the key may get it; a first store is taken as it is.
        let bare = Standing { identity: Some(identity(None, 1, 10)), ..Standing::default() };
        assert_eq!(judged(&bare, &identity(Some("a"), 1, 11), 0..0, &Acceptance::default()), "taken");
        assert_eq!(judged(&Standing::default(), &identity(None, 5, 1), 0..0, &Acceptance::default()), "taken");
    }

    #[test]
    fn what_was_accepted_is_that_one_store_with_what_leaves_it() {
        let here: BTreeSet<AppName> = (0..2).map(app).collect();
        let known = Standing { identity: Some(identity(Some("a"), 1, 10)), here, ..Standing::default() };
        let accepted =
            Acceptance { identity: Some(identity(Some("b"), 2, 4)), leaving: [app(0)].into(), ..Acceptance::default() };
        let kind = |found: &Identity, wanted| judged(&known, found, wanted, &accepted);
        assert_eq!(kind(&identity(Some("b"), 2, 6), 1..2), "accepted");
        assert_eq!(kind(&identity(Some("b"), 2, 6), 0..0), "other_store", "more would leave than was shown");
        assert_eq!(kind(&identity(Some("b"), 2, 3), 1..2), "other_store", "older than what was looked at");
        assert_eq!(kind(&identity(Some("b"), 3, 6), 1..2), "other_store");
        assert_eq!(kind(&identity(None, 2, 6), 1..2), "sentinel_missing");
        assert_eq!(kind(&identity(Some("a"), 1, 11), 0..2), "taken", "it was not needed");
    }

    #[test]
    fn a_wipe_is_known_though_nothing_of_it_was_wanted_here() {
        let known = Standing { identity: Some(identity(None, 1, 10)), ..Standing::default() };
        let wiped = Identity { key: None, ..identity(None, 1, 11) };
        let entries = [(b"apps/web/spec".to_vec(), Entry::new(b"image: a".to_vec(), 5, 5))].into();
        let (before, after) = (Contents { entries, revision: 10 }, Contents::default());
        let found = Found { identity: &wiped, contents: &after, snapshot: &snapshot(0..0), forgotten: None };
        let judged = known.judge(found, &before, Brake::default(), &Acceptance::default());
        assert_eq!(judged.map_err(|block| block.kind), Err("sentinel_missing".into()));
    }

    #[test]
    fn most_apps_do_not_leave_at_once_nor_while_they_are_put_back() {
        let here: BTreeSet<AppName> = (0..8).map(app).collect();
        let mut known = Standing { identity: Some(identity(None, 1, 1)), here, ..Standing::default() };
        let found = identity(None, 1, 2);
        let nothing = Acceptance::default();
        assert_eq!(judged(&known, &found, 0..4, &nothing), "taken", "half may leave");
        assert_eq!(judged(&known, &found, 0..3, &nothing), "mass_removal");
        let some = Acceptance {
            identity: Some(identity(None, 1, 2)),
            leaving: (3..8).map(app).collect(),
            ..Acceptance::default()
        };
        assert_eq!(judged(&known, &found, 0..3, &some), "accepted");
        assert_eq!(judged(&known, &found, 0..2, &some), "mass_removal", "one more was not accepted");
        // Once held, half of them back is not enough.
        let held = StoreBlock { kind: "mass_removal".into(), message: String::new(), remedy: String::new() };
        known.held = Some(held);
        assert_eq!(judged(&known, &found, 0..7, &nothing), "mass_removal");
        assert_eq!(judged(&known, &found, 0..8, &nothing), "taken");
        // A store that was wiped is no less so for what leaves with it.
        known.held = Some(block("sentinel_missing", String::new()));
        assert_eq!(judged(&known, &found, 0..3, &nothing), "sentinel_missing");
        known.held = None;
        let drained = Snapshot { mode: HostMode::Drained, ..snapshot(0..0) };
        let contents = Contents::default();
        let drained = Found { identity: &found, contents: &contents, snapshot: &drained, forgotten: None };
        assert_eq!(known.judge(drained, &contents, Brake::default(), &nothing), Ok(false), "a person said so");
        known.here = (0..3).map(app).collect();
        assert_eq!(judged(&known, &found, 0..0, &nothing), "taken", "three are few");
        known.strict = true;
        assert_eq!(judged(&known, &found, 1..3, &nothing), "mass_removal", "what was believed is lost");
    }

    #[test]
    fn a_backup_is_known_though_it_has_counted_on() {
        let at = |entries: &[(&str, &str, i64)], revision| Contents {
            entries: entries
                .iter()
                .map(|(k, v, modified)| (k.as_bytes().to_vec(), Entry::new(v.as_bytes().to_vec(), 1, *modified)))
                .collect(),
            revision,
        };
        let known = at(&[("a", "2", 9), ("b", "1", 3)], 10);
        let standing = Standing { identity: Some(identity(None, 1, 10)), ..Standing::default() };
        let kind = |now: &Contents| standing.other_history(now, &known).map(|b| b.kind);
        assert_eq!(kind(&at(&[("a", "2", 9), ("b", "1", 3)], 50)), None);
        assert_eq!(kind(&at(&[("a", "3", 12)], 50)), None, "written and deleted since");
        assert_eq!(kind(&at(&[("a", "1", 5), ("b", "1", 3)], 50)).as_deref(), Some("older_revision"), "an older value");
        assert_eq!(kind(&at(&[("c", "1", 5)], 50)).as_deref(), Some("older_revision"), "one that was deleted before");
        // What was written after the last full read may have been missed: a watch may lose news.
        let seen_less =
            Standing { identity: Some(Identity { whole: 4, ..identity(None, 1, 10) }), ..Standing::default() };
        let kind = |now: &Contents| seen_less.other_history(now, &known).map(|b| b.kind);
        assert_eq!(kind(&at(&[("a", "2", 9), ("b", "1", 3), ("c", "1", 8)], 50)), None, "a change that was missed");
        assert_eq!(
            kind(&at(&[("a", "1", 3), ("b", "1", 3)], 50)).as_deref(),
            Some("older_revision"),
            "older all the same"
        );
    }

    #[test]
    fn a_store_without_what_it_said_last_may_only_lack_nothing() {
        let at = |entries: &[(&str, i64)]| {
            let entry = |(k, modified): &(&str, i64)| {
                (k.as_bytes().to_vec(), Entry::new(modified.to_string().into_bytes(), 1, *modified))
            };
            Contents { entries: entries.iter().map(entry).collect(), revision: 50 }
        };
        let known = at(&[("a", 3), ("b", 9)]);
        let landmark = Landmark::newest(&known, 50, Duration::ZERO).expect("one");
        assert_eq!((landmark.key.as_slice(), landmark.revision), (&b"b"[..], 9));
        assert_eq!(Landmark::newest(&Contents::default(), 50, Duration::ZERO), None);
        let (identity, snapshot) = (identity(None, 1, 50), snapshot(0..0));
        let forgets = |now: &Contents| {
            let found = Found { identity: &identity, contents: now, snapshot: &snapshot, forgotten: Some(&landmark) };
            super::forgets(found, &known).map(|b| b.kind)
        };
        assert_eq!(forgets(&at(&[("a", 3)])).as_deref(), Some("older_revision"), "one is missing");
        assert_eq!(forgets(&at(&[("a", 3), ("b", 2)])).as_deref(), Some("older_revision"), "one is as it was");
        assert_eq!(forgets(&at(&[("a", 3), ("b", 20)])), None, "all of it was put again");
    }

    #[test]
    fn consent_ends_with_the_read_that_it_was_asked_for() {
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
        assert!(given.holds(at(3600)) && !given.holds(at(3601)) && of(MASS_REMOVAL).holds(at(9999)));
        assert!(given.holds(at(-60)), "the clock was set back");
        // It is none to a block of another kind.
        let known = Standing { identity: Some(identity(Some("a"), 1, 20)), ..Standing::default() };
        let back = identity(Some("a"), 1, 15);
        assert_eq!(judged(&known, &back, 0..0, &of(MASS_REMOVAL)), "older_revision");
        assert_eq!(judged(&known, &back, 0..0, &of("older_revision")), "accepted");
    }

    #[test]
    fn a_ledger_of_others_is_a_reason_to_ask() {
        let mut standing = Standing::default();
        standing.distrust(&LedgerError::Foreign { host: "a".into(), prefix: "/b".into() });
        let found = identity(Some("a"), 1, 5);
        assert_eq!(judged(&standing, &found, 0..0, &Acceptance::default()), "other_store");
        let accepted = Acceptance { identity: Some(found.clone()), ..Acceptance::default() };
        assert_eq!(judged(&standing, &found, 0..0, &accepted), "accepted");
    }
}
