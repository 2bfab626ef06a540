//! Whether a store is to be believed: whether it is the one that was read before, and whether it takes away more than a
//! person is likely to have meant.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::model::{
    desired::{DesiredApp, HostMode, Snapshot},
    name::AppName,
    status::StoreBlock,
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
    /// The store that is to be believed, as it was when the person looked; `None` if it was never in doubt.
    pub identity: Option<Identity>,
    /// Apps that may leave.
    pub leaving: BTreeSet<AppName>,
}

/// What was believed so far.
#[derive(Debug, Clone, Default)]
pub struct Standing {
    /// The store; nothing before the first one.
    pub identity: Option<Identity>,
    /// Apps that are wanted here; before the first read, those that have left traces here.
    pub here: BTreeSet<AppName>,
}

impl Standing {
    /// Why a store is not believed, if it is not the one that was read before.
    pub fn doubt(&self, found: &Identity, accepted: &Acceptance) -> Option<StoreBlock> {
        let known = self.identity.as_ref()?;
        if let Some(accepted) = &accepted.identity
            && (&accepted.cluster, accepted.etcd) == (&found.cluster, found.etcd)
            && accepted.revision <= found.revision
        {
            return None;
        }
        let block = |kind: &str, message: String| {
            let remedy = "`demae store accept` shows what would change, and takes this store from now on".to_owned();
            Some(StoreBlock { kind: kind.to_owned(), message, remedy })
        };
        match (&known.cluster, &found.cluster) {
            (Some(known), None) => {
                return block(
                    "sentinel_missing",
                    format!(
                        "the store has no `cluster` key, and had one that said `{known}`: it was wiped, or is another one"
                    ),
                );
            }
            (Some(known), Some(found)) if known != found => {
                return block(
                    "other_store",
                    format!(
                        "the store's `cluster` key says `{found}`, and said `{known}` before: this is another store"
                    ),
                );
            }
            _ => {}
        }
        if known.etcd != found.etcd {
            return block(
                "other_store",
                format!(
                    "etcd's cluster id is {:x}, and was {:x} before: this is another etcd, or one that was restored",
                    found.etcd, known.etcd
                ),
            );
        }
        if found.revision < known.revision {
            return block(
                "older_revision",
                format!(
                    "the store is at revision {}, and was at {} before: it was restored from a backup",
                    found.revision, known.revision
                ),
            );
        }
        None
    }

    /// Why a snapshot is held back, if it takes away more apps at once than is likely to be meant.
    pub fn brake(&self, new: &Snapshot, brake: Brake, accepted: &Acceptance) -> Option<StoreBlock> {
        // Draining a host is one key, and says that all apps are to leave.
        if new.mode == HostMode::Drained {
            return None;
        }
        let leaving = self.leaving(new);
        let many = leaving.len() > brake.apps && leaving.len() * 100 > self.here.len() * brake.percent;
        if !many || leaving.is_subset(&accepted.leaving) {
            return None;
        }
        let names: Vec<&str> = leaving.iter().take(5).map(AppName::as_str).collect();
        let more = if leaving.len() > names.len() { " …" } else { "" };
        Some(StoreBlock {
            kind: "mass_removal".to_owned(),
            message: format!(
                "{} of the {} apps of this host would leave at once: {}{more}",
                leaving.len(),
                self.here.len(),
                names.join(", ")
            ),
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
        let wanted = snapshot.apps.iter().filter(|(_, d)| !matches!(d, DesiredApp::Absent(_)));
        self.here = wanted.map(|(app, _)| app.clone()).collect();
        self.identity = Some(identity);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(cluster: Option<&str>, etcd: u64, revision: i64) -> Identity {
        Identity { cluster: cluster.map(str::to_owned), etcd, revision }
    }

    fn app(n: usize) -> AppName {
        AppName::try_from(format!("app-{n}")).expect("a name")
    }

    fn snapshot(wanted: std::ops::Range<usize>) -> Snapshot {
        let apps = wanted.map(|n| (app(n), DesiredApp::Paused(String::new()))).collect();
        Snapshot { apps, ..Snapshot::default() }
    }

    #[test]
    fn a_store_that_is_not_the_one_from_before_is_not_believed() {
        let nothing = Acceptance::default();
        let known = Standing { identity: Some(identity(Some("a"), 1, 10)), ..Standing::default() };
        let kind = |found: &Identity| known.doubt(found, &nothing).map(|b| b.kind);
        assert_eq!(kind(&identity(Some("a"), 1, 10)), None);
        assert_eq!(kind(&identity(Some("a"), 1, 99)), None);
        assert_eq!(kind(&identity(None, 1, 99)).as_deref(), Some("sentinel_missing"));
        assert_eq!(kind(&identity(Some("b"), 1, 99)).as_deref(), Some("other_store"));
        assert_eq!(kind(&identity(Some("a"), 2, 99)).as_deref(), Some("other_store"));
        assert_eq!(kind(&identity(Some("a"), 1, 9)).as_deref(), Some("older_revision"));
        // A store that never had the key may get it; a first store is taken as it is.
        let bare = Standing { identity: Some(identity(None, 1, 10)), ..Standing::default() };
        assert_eq!(bare.doubt(&identity(Some("a"), 1, 11), &nothing), None);
        assert_eq!(Standing::default().doubt(&identity(None, 5, 1), &nothing), None);
    }

    #[test]
    fn what_was_accepted_is_that_one_store() {
        let known = Standing { identity: Some(identity(Some("a"), 1, 10)), ..Standing::default() };
        let accepted = Acceptance { identity: Some(identity(Some("b"), 2, 4)), ..Acceptance::default() };
        assert_eq!(known.doubt(&identity(Some("b"), 2, 6), &accepted), None);
        assert!(known.doubt(&identity(Some("b"), 2, 3), &accepted).is_some(), "older than what was looked at");
        assert!(known.doubt(&identity(Some("b"), 3, 6), &accepted).is_some());
        assert!(known.doubt(&identity(None, 2, 6), &accepted).is_some());
    }

    #[test]
    fn most_apps_do_not_leave_at_once() {
        let brake = Brake::default();
        let mut known = Standing::default();
        known.believe(identity(None, 1, 1), &snapshot(0..8));
        let held = |wanted, accepted: &Acceptance| known.brake(&snapshot(wanted), brake, accepted).is_some();
        let nothing = Acceptance::default();
        assert!(!held(0..8, &nothing) && !held(0..4, &nothing), "half may leave");
        assert!(held(0..3, &nothing) && held(0..0, &nothing));
        let some = Acceptance { leaving: (3..8).map(app).collect(), ..Acceptance::default() };
        assert!(!held(0..3, &some), "these were accepted");
        assert!(held(0..2, &some), "one more was not");
        known.believe(identity(None, 1, 1), &snapshot(0..3));
        assert!(known.brake(&snapshot(0..0), brake, &nothing).is_none(), "three are few");
        let drained = Snapshot { mode: HostMode::Drained, ..snapshot(0..0) };
        known.believe(identity(None, 1, 1), &snapshot(0..8));
        assert!(known.brake(&drained, brake, &nothing).is_none(), "a person said so");
    }
}
