//! What an app said when it last made sense, for as long as it does not.
//!
//! An agent that is started anew must be able to repair such an app too, and what the store says now does not tell how.

use std::collections::{BTreeMap, BTreeSet};

use super::read::{Contents, Entry};
use crate::model::{
    desired::{DesiredApp, Snapshot},
    name::AppName,
    spec::Spec,
};

/// Keys and values, as they were read.
pub(super) type Entries = BTreeMap<Vec<u8>, Entry>;

/// Of each app that is broken or paused, what it said before.
#[derive(Debug, Clone, Default)]
pub(super) struct LastGood {
    kept: BTreeMap<AppName, Entries>,
    /// Apps that made sense in the last snapshot.
    good: BTreeSet<AppName>,
}

impl LastGood {
    /// What an earlier agent kept, with what it believed.
    pub(super) fn recalled(kept: BTreeMap<AppName, Entries>, snapshot: &Snapshot) -> Self {
        let mut last_good = Self { kept, good: BTreeSet::new() };
        last_good.follow(&Contents::default(), snapshot);
        last_good
    }

    /// Takes that a snapshot came after these contents.
    pub(super) fn follow(&mut self, before: &Contents, after: &Snapshot) {
        self.kept.retain(|app, _| after.apps.contains_key(app));
        for (app, desired) in &after.apps {
            match desired {
                // What was wanted before it left is no reason to come back.
                DesiredApp::Run(_) | DesiredApp::Absent(_) => {
                    self.kept.remove(app);
                }
                DesiredApp::Invalid { .. } | DesiredApp::Paused(_) | DesiredApp::Kept(_) => {
                    if self.good.contains(app) && !self.kept.contains_key(app) {
                        self.kept.insert(app.clone(), entries(app, before));
                    }
                }
            }
        }
        let is_good = |(_, desired): &(&AppName, &DesiredApp)| matches!(desired, DesiredApp::Run(_));
        self.good = after.apps.iter().filter(is_good).map(|(app, _)| app.clone()).collect();
    }

    /// To be kept on disk.
    pub(super) fn kept(&self) -> &BTreeMap<AppName, Entries> {
        &self.kept
    }
}

/// All that an app is made from: its keys, its own set, and those that its spec names.
fn entries(app: &AppName, contents: &Contents) -> Entries {
    let own = format!("apps/{app}/");
    let spec = contents.entries.get(format!("{own}spec").as_bytes()).and_then(|e| Spec::parse(e.value()).ok());
    let named = spec.iter().flat_map(|spec| &spec.env_from).map(|set| format!("env/{set}/"));
    let below: Vec<String> = [own, format!("env/{app}/")].into_iter().chain(named).collect();
    let is_part = |key: &[u8]| below.iter().any(|dir| key.starts_with(dir.as_bytes()));
    contents.entries.iter().filter(|(key, _)| is_part(key)).map(|(k, e)| (k.clone(), e.clone())).collect()
}
