//! Invariants at each effect of the agent, judged by the true state of the host, without any of demae's decisions.

use std::{sync::atomic::Ordering, time::Duration};

use demae::{
    model::{
        desired::{DesiredApp, Snapshot},
        name::{AppName, ContainerId},
        observed::{Instance, ObservedApp, Phase},
        proxy::Upstreams,
    },
    plan::step::Step,
};
use tokio::time::Instant;

use crate::chance::SLOWEST_CHECK;
use crate::scene::{
    Program, Scene, State, Upstreamed, allows_gap, desired_of, is_leaving, is_routed, serving, upstreamed,
};

/// Most containers of an app: three serving, three starting, up to as many superseded, and one being created. Instances
/// that left the routes are not counted: they stay until their requests end.
const MOST: usize = 10;

impl Scene {
    /// An effect of the agent on an app: applied, counted, and judged.
    pub fn effect<T>(
        &self,
        app: &AppName,
        what: &str,
        seen: Option<&ObservedApp>,
        change: impl FnOnce(&mut State) -> T,
    ) -> T {
        let mut state = self.state();
        let before = Before::of(&state, app);
        let result = change(&mut state);
        self.routes_changed(&mut state, app);
        if let Some(wrong) = before.judge(&state, app, seen) {
            state.violate(format!("`{what}` for {app}: {wrong}"));
        }
        let ends = |i: &&Instance| state.programs.get(&i.id).is_some_and(|p| p.left.is_some());
        let count = state.apps.get(app).map_or(0, |o| o.instances.iter().filter(|i| !ends(i)).count());
        if count > MOST {
            state.violate(format!("{app} has {count} containers"));
        }
        *state.effects.entry(app.clone()).or_default() += 1;
        drop(state);
        self.record("step", || format!("{app}: {what}"));
        result
    }

    /// Records which instances lost their routes.
    pub fn routes_changed(&self, state: &mut State, app: &AppName) {
        let now = Instant::now();
        let Some(observed) = state.apps.get(app) else { return };
        let routed: Vec<(ContainerId, bool)> =
            observed.instances.iter().map(|i| (i.id.clone(), is_routed(&state.proxy, app, observed, i))).collect();
        for (id, routed) in routed {
            let lingers = self.chance.millis(0, 12_000);
            if let Some(program) = state.programs.get_mut(&id) {
                if routed {
                    program.left = None;
                    program.settled_by = Some(now);
                } else if program.settled_by.is_some() && program.left.is_none() {
                    program.left = Some(now);
                    program.lingers = lingers;
                }
            }
        }
    }

    /// Records the agent's current snapshot, and judges it.
    pub fn note_snapshot(&self) {
        let mut state = self.state();
        let Some(updates) = &state.updates else { return };
        let new = updates.borrow().snapshot.clone();
        let Some(new) = new.filter(|n| !state.snapshot.as_ref().is_some_and(|b| std::sync::Arc::ptr_eq(b, n))) else {
            return;
        };
        let now = Instant::now();
        let nothing = Snapshot::default();
        let old = state.snapshot.clone();
        let old = old.as_deref().unwrap_or(&nothing);
        let apps: Vec<AppName> = old.apps.keys().chain(new.apps.keys()).chain(state.apps.keys()).cloned().collect();
        for app in apps {
            if old.apps.get(&app) != new.apps.get(&app) || old.proven != new.proven {
                state.snapshot_changed.insert(app.clone(), now);
            }
            let goes = new.proven && matches!(new.apps.get(&app), None | Some(DesiredApp::Absent(_)));
            // A lost event changes no snapshot: the next full read does.
            let gone = old.proven && matches!(old.apps.get(&app), None | Some(DesiredApp::Absent(_)));
            let is_here = state.apps.get(&app).is_some_and(|o| !o.instances.is_empty());
            // Once removed by an acceptance, it stays removed until an agent wants it again.
            if goes && state.accepted_removals.contains(&app) {
                state.removed_by_acceptance.insert(app.clone());
            } else if !goes && new.proven {
                state.removed_by_acceptance.remove(&app);
            }
            let meant = state.meant.get(&app);
            let is_meant = state.removed_by_acceptance.contains(&app)
                || meant.is_none_or(|m| !m.present || m.drained || new.revision <= m.absent_until);
            if goes && !gone && is_here && !is_meant {
                state.violate(format!("{app} is unwanted in the snapshot, and was not meant to be"));
            }
        }
        if new.proven && !self.accepted.load(Ordering::Relaxed) {
            if new.revision < state.newest_revision {
                let newest_revision = state.newest_revision;
                state.violate(format!("revision {} is trusted after {newest_revision}", new.revision));
            }
            state.newest_revision = new.revision;
        }
        state.snapshot = Some(new);
    }

    /// Containers that a step may not touch, and requests that it may not cut.
    pub fn judge_step(&self, app: &AppName, step: &Step) {
        let mut state = self.state();
        let handle = match step {
            Step::Start(h) | Step::ClearSocket(h) | Step::Settle(h) | Step::RecordVerdict { handle: Some(h), .. } => h,
            Step::Stop { handle, .. } | Step::Remove(handle) | Step::Discard { handle, .. } => handle,
            _ => return,
        };
        if state.foreign.contains(&handle.id) {
            let wrong = format!("`{step}` for {app} touches a foreign container");
            state.violate(wrong);
        }
        let Some(instance) = find(&state, app, &handle.id) else { return };
        let ends = matches!(step, Step::Stop { .. } | Step::Discard { .. });
        if !ends || instance.phase != Phase::Running || allows_gap(&state, app) {
            return;
        }
        // The desired state changed since, perhaps from one whose order allows a gap.
        let observed_at = state.observed_at.get(app).copied().unwrap_or(state.resumed);
        if state.snapshot_changed.get(app).is_some_and(|at| *at > observed_at) {
            return;
        }
        let Some(program) = state.programs.get(&instance.id) else { return };
        let now = Instant::now();
        if let Some(left) = program.left
            && program.answers
            && now < left + program.lingers.min(instance.drain)
        {
            let over = (left + program.lingers.min(instance.drain)).duration_since(now);
            let wrong = format!("`{step}` for {app} cuts requests {} ms before their end", over.as_millis());
            state.violate(wrong);
        }
    }
}

/// An app before an effect.
pub struct Before {
    upstreamed: Upstreamed,
    serving: usize,
}

impl Before {
    pub fn of(state: &State, app: &AppName) -> Self {
        Self { upstreamed: upstreamed(state, app), serving: serving(state, app) }
    }

    /// What an effect made worse.
    pub fn judge(&self, state: &State, app: &AppName, seen: Option<&ObservedApp>) -> Option<String> {
        let now = upstreamed(state, app);
        let serving = serving(state, app);
        let mut observed_at = state.observed_at.get(app).copied().unwrap_or(state.proxy_observed_at);
        let mut begun = state.begun.get(app).copied().unwrap_or(state.resumed);
        if seen.is_none() {
            // A set is decided on what had been observed by then.
            observed_at = state.observed_at_change.get(app).copied().unwrap_or(state.proxy_observed_at);
            observed_at = observed_at.min(state.changing_since);
            begun = state.changing_since;
        }
        // No step starts from observations made before a standstill.
        if begun >= state.resumed {
            observed_at = observed_at.max(state.resumed);
        }
        // The agent cannot know changes after its observation, nor that an instance is healthy before a probe
        // has returned.
        let known = |p: &Program| if p.answers { p.changed + Duration::from_millis(SLOWEST_CHECK) } else { p.changed };
        let changed_since = |id: &ContainerId| state.programs.get(id).is_some_and(|p| known(p) > observed_at);
        let unseen = |o: &ObservedApp| o.instances.iter().any(|i| find(state, app, &i.id).is_none());
        let excused = allows_gap(state, app)
            || seen.is_none()
                && now.dead < now.all
                && self.upstreamed.all < now.all
                && is_broken_since(state, app, &now.behind)
            || now.behind.iter().any(changed_since)
            || seen.is_some_and(unseen)
            || state.apps.get(app).is_some_and(|o| o.instances.iter().any(|i| changed_since(&i.id)))
            || state.died.get(app).is_some_and(|at| *at > observed_at)
            || state.meddled.get(app).is_some_and(|at| *at > observed_at)
            || state.snapshot_changed.get(app).is_some_and(|at| *at > observed_at);
        if excused {
            return None;
        }
        // An app without a virtual host had nothing to lose.
        let before = &self.upstreamed;
        if before.all > 0 && now.dead * before.all > before.dead * now.all {
            let (dead, all) = (now.dead, now.all);
            return Some(format!("{dead} of {all} upstreams are dead, and {} of {} before", before.dead, before.all));
        }
        // A reload makes workers old, with their upstreams.
        if now.old_dead > before.old_dead && seen.is_some() {
            return Some(format!("{} upstreams of old workers are dead, and {} before", now.old_dead, before.old_dead));
        }
        let left = seen.is_none() && state.leaving.contains(app);
        if serving == 0 && self.serving > 0 && !is_leaving(state, app) && !left {
            return Some("the last serving instance does not serve any more".to_owned());
        }
        None
    }
}

/// True if an upstream broke after the app's part of the nginx set was written, and may stay in it: a paused app is not
/// changed, and a set counts slots without knowing their instances. If workers load such a set late, nginx skips dead
/// upstreams.
fn is_broken_since(state: &State, app: &AppName, behind: &[ContainerId]) -> bool {
    let by_slots = state.proxy.live.as_ref().and_then(|m| m.vhosts.get(app));
    let by_slots = by_slots.is_some_and(|v| matches!(v.upstreams, Upstreams::Slots(_) | Upstreams::Addresses(_)));
    let is_paused = matches!(desired_of(state, app), Some(DesiredApp::Paused(_)));
    let since_written = |at: &Instant| state.proxy.written.get(app).is_some_and(|written| at > written);
    let mut programs = behind.iter().filter_map(|id| state.programs.get(id));
    (by_slots || is_paused)
        && (programs.any(|p| since_written(&p.changed)) || state.meddled.get(app).is_some_and(since_written))
}

fn find<'a>(state: &'a State, app: &AppName, id: &ContainerId) -> Option<&'a Instance> {
    state.apps.get(app)?.instances.iter().find(|i| i.id == *id)
}
