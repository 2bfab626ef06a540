//! What may not be created on this host: by its policy, and by mounts that are there.

use std::sync::Arc;

use super::Agent;
use crate::{
    machine::Machine,
    model::{
        desired::{DesiredApp, Snapshot},
        mounts,
        name::AppName,
        observed::Bind,
    },
};

/// What an app that was not observed yet may have mounted.
fn wanted_binds(snapshot: &Snapshot, app: &AppName) -> Vec<Bind> {
    let target = snapshot.apps.get(app).and_then(DesiredApp::target);
    target.map_or_else(Vec::new, |target| mounts::binds(&target.release.container))
}

impl<M: Machine> Agent<M> {
    /// Plans everything again if other rules hold than before.
    pub(super) fn look_at_policy(&mut self) {
        let policy = self.machine.policy();
        if !Arc::ptr_eq(&policy, &self.policy) {
            match policy.why_unusable() {
                Some(why) => tracing::error!("nothing is created on this host: {why}"),
                None => tracing::info!("the policy of this host has changed"),
            }
            self.policy = policy;
            self.apps.values_mut().for_each(|state| state.fresh.hint());
        }
    }

    /// Finds apps whose mounts are not safe together with those that are there.
    pub(super) fn compare_mounts(&mut self) {
        let Some(snapshot) = &self.snapshot else { return };
        let present = self
            .apps
            .iter()
            .map(|(app, state)| (app.clone(), state.binds().unwrap_or_else(|| wanted_binds(snapshot, app))));
        let nested = mounts::nested(snapshot, &present.collect());
        for (app, state) in &mut self.apps {
            if nested.get(app) != self.nested.get(app) {
                state.fresh.hint();
            }
        }
        self.nested = nested;
    }
}
