//! The last valid keys of apps that are invalid or paused now.
//!
//! An agent that restarts must be able to repair such an app, and the store no longer holds the keys to do so.

use std::collections::{BTreeMap, BTreeSet};

use super::contents::{Contents, Entries};
use crate::model::{
    desired::{DesiredApp, Snapshot},
    name::AppName,
    spec::Spec,
};

/// The last valid keys of each app that is invalid or paused.
#[derive(Debug, Clone, Default)]
pub(super) struct LastGood {
    kept: BTreeMap<AppName, Entries>,
    /// Apps that were valid in the last snapshot.
    good: BTreeSet<AppName>,
}

impl LastGood {
    /// What an earlier agent kept, with the snapshot it had accepted.
    pub(super) fn recalled(kept: BTreeMap<AppName, Entries>, snapshot: &Snapshot) -> Self {
        let mut last_good = Self { kept, good: BTreeSet::new() };
        last_good.follow(&Contents::default(), snapshot);
        last_good
    }

    /// Records that a snapshot followed these contents.
    pub(super) fn follow(&mut self, before: &Contents, after: &Snapshot) {
        self.kept.retain(|app, _| after.apps.contains_key(app));
        for (app, desired) in &after.apps {
            match desired {
                // What was wanted before it left is no reason to come back.
                DesiredApp::Run(_) | DesiredApp::Absent(_) => {
                    self.kept.remove(app);
                }
                DesiredApp::Invalid { .. } | DesiredApp::Paused(_) | DesiredApp::Unknown(_) => {
                    if self.good.contains(app) && !self.kept.contains_key(app) {
                        self.kept.insert(app.clone(), entries(app, before));
                    }
                }
            }
        }
        let is_good = |(_, desired): &(&AppName, &DesiredApp)| matches!(desired, DesiredApp::Run(_));
        self.good = after.apps.iter().filter(is_good).map(|(app, _)| app.clone()).collect();
    }

    /// For the ledger.
    pub(super) fn kept(&self) -> &BTreeMap<AppName, Entries> {
        &self.kept
    }
}

/// All keys that an app is made from: its own, its own set of variables, and the sets that its spec names.
fn entries(app: &AppName, contents: &Contents) -> Entries {
    let own = format!("apps/{app}/");
    let spec = contents.entries.get(format!("{own}spec").as_bytes()).and_then(|e| Spec::parse(e.value()).ok());
    let named = spec.iter().flat_map(|spec| &spec.env_from).map(|set| format!("env/{set}/"));
    let below: Vec<String> = [own, format!("env/{app}/")].into_iter().chain(named).collect();
    let is_part = |key: &[u8]| below.iter().any(|dir| key.starts_with(dir.as_bytes()));
    contents.entries.iter().filter(|(key, _)| is_part(key)).map(|(k, e)| (k.clone(), e.clone())).collect()
}
