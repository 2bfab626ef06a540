//! What a full list of containers means for one app.

use super::app::AppState;
use crate::model::{name::ReleaseId, observed::ObservedApp};

impl AppState {
    /// Whether a list of containers, or the files on disk, differ from the last observation.
    pub(super) fn differs(&self, listed: &[(String, String)], traces: &ObservedApp) -> bool {
        // Until it is observed for the first time, the list that it is being observed with is what is known.
        let Some(observed) = &self.observed else {
            return self.listed.as_ref().is_none_or(|(_, known)| known.as_slice() != listed);
        };
        let on_disk = |o: &ObservedApp| {
            let verdicts: Vec<ReleaseId> = o.verdicts.keys().cloned().collect();
            (o.slots.clone(), o.env_files.clone(), o.socket_dirs.clone(), o.proven.clone(), verdicts)
        };
        if on_disk(observed) != on_disk(traces) {
            return true;
        }
        let mut known: Vec<(&str, &str)> =
            observed.instances.iter().map(|i| (i.id.as_str(), i.phase.as_str())).collect();
        known.sort_unstable();
        let mut found: Vec<(&str, &str)> = listed.iter().map(|(id, state)| (id.as_str(), state.as_str())).collect();
        found.sort_unstable();
        known != found
    }

    /// The app is to be observed, with these containers: a full list has just named them.
    pub(super) fn on_listed(&mut self, containers: Option<Vec<(String, String)>>) {
        self.fresh.hint();
        self.listed = containers.map(|containers| (self.fresh.observe_due(), containers));
    }

    /// The ids of its containers, unless anything has happened since they were listed.
    pub(super) fn listed(&self) -> Option<Vec<String>> {
        let listed = self.listed.as_ref().filter(|(cause, _)| *cause == self.fresh.observe_due());
        listed.map(|(_, containers)| containers.iter().map(|(id, _)| id.clone()).collect())
    }
}
