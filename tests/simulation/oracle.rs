//! What must hold at each effect of the agent, judged by what the host really is. None of demae's decisions is used here.

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
use crate::scene::{Program, Scene, State, Upstreamed, believed, changes_over, is_routed, leaves, serving, upstreamed};

/// Most containers of an app: three that serve, three that come, and up to as many that nobody wants any more, while one
/// more is being made. Those that served and have left the routes are not counted: they stay until their requests end.
const MOST: usize = 10;

impl Scene {
    /// Something that the agent does to an app: done, counted, and judged.
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
        self.happens("step", || format!("{app}: {what}"));
        result
    }

    /// Notes which instances requests stopped going to.
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

    /// Takes notice of what the agent believes now, and judges it.
    pub fn note_belief(&self) {
        let mut state = self.state();
        let Some(updates) = &state.updates else { return };
        let new = updates.borrow().snapshot.clone();
        let Some(new) = new.filter(|n| !state.believed.as_ref().is_some_and(|b| std::sync::Arc::ptr_eq(b, n))) else {
            return;
        };
        let now = Instant::now();
        let nothing = Snapshot::default();
        let old = state.believed.clone();
        let old = old.as_deref().unwrap_or(&nothing);
        let apps: Vec<AppName> = old.apps.keys().chain(new.apps.keys()).chain(state.apps.keys()).cloned().collect();
        for app in apps {
            if old.apps.get(&app) != new.apps.get(&app) || old.proven != new.proven {
                state.believed_changed.insert(app.clone(), now);
            }
            let goes = new.proven && matches!(new.apps.get(&app), None | Some(DesiredApp::Absent(_)));
            // News that was lost is no new belief: the next full read tells.
            let gone = old.proven && matches!(old.apps.get(&app), None | Some(DesiredApp::Absent(_)));
            let is_here = state.apps.get(&app).is_some_and(|o| !o.instances.is_empty());
            // Once let go, it is gone until an agent is told to have it again.
            if goes && state.consented.contains(&app) {
                state.let_go.insert(app.clone());
            } else if !goes && new.proven {
                state.let_go.remove(&app);
            }
            let meant = state.meant.get(&app);
            let is_meant = state.let_go.contains(&app)
                || meant.is_none_or(|m| !m.present || m.drained || new.revision <= m.absent_until);
            if goes && !gone && is_here && !is_meant {
                state.violate(format!("{app} is believed to be unwanted, and nobody meant that"));
            }
        }
        if new.proven && !self.accepted.load(Ordering::Relaxed) {
            if new.revision < state.newest {
                let newest = state.newest;
                state.violate(format!("revision {} is believed after {newest}", new.revision));
            }
            state.newest = new.revision;
        }
        state.believed = Some(new);
    }

    /// What a step may not touch, and may not cut.
    pub fn judge_step(&self, app: &AppName, step: &Step) {
        let mut state = self.state();
        let handle = match step {
            Step::Start(h) | Step::ClearSocket(h) | Step::Settle(h) | Step::RecordVerdict { handle: h, .. } => h,
            Step::Stop { handle, .. } | Step::Remove(handle) | Step::Discard { handle, .. } => handle,
            _ => return,
        };
        if state.foreign.contains(&handle.id) {
            let wrong = format!("`{step}` for {app} touches a container of somebody else");
            state.violate(wrong);
        }
        let Some(instance) = find(&state, app, &handle.id) else { return };
        let ends = matches!(step, Step::Stop { .. } | Step::Discard { .. });
        if !ends || instance.phase != Phase::Running || changes_over(&state, app) {
            return;
        }
        // It was decided for another wish, perhaps one whose order asks for a gap.
        let looked = state.looked.get(app).copied().unwrap_or(state.woke);
        if state.believed_changed.get(app).is_some_and(|at| *at > looked) {
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

    /// What got worse by an effect.
    pub fn judge(&self, state: &State, app: &AppName, seen: Option<&ObservedApp>) -> Option<String> {
        let now = upstreamed(state, app);
        let serving = serving(state, app);
        let mut looked = state.looked.get(app).copied().unwrap_or(state.looked_at_proxy);
        let mut begun = state.begun.get(app).copied().unwrap_or(state.woke);
        if seen.is_none() {
            looked = looked.min(state.changing_since);
            begun = state.changing_since;
        }
        // Nothing is begun on what was seen before a standstill.
        if begun >= state.woke {
            looked = looked.max(state.woke);
        }
        // What changed after the agent looked, it could not know.
        // Nor that an instance is well until a check of it was answered.
        let known = |p: &Program| if p.answers { p.changed + Duration::from_millis(SLOWEST_CHECK) } else { p.changed };
        let moved = |id: &ContainerId| state.programs.get(id).is_some_and(|p| known(p) > looked);
        let unseen = |o: &ObservedApp| o.instances.iter().any(|i| find(state, app, &i.id).is_none());
        let excused = changes_over(state, app)
            || seen.is_none()
                && now.dead < now.all
                && self.upstreamed.all < now.all
                && is_broken_since(state, app, &now.behind)
            || now.behind.iter().any(moved)
            || seen.is_some_and(unseen)
            || state.apps.get(app).is_some_and(|o| o.instances.iter().any(|i| moved(&i.id)))
            || state.died.get(app).is_some_and(|at| *at > looked)
            || state.meddled.get(app).is_some_and(|at| *at > looked)
            || state.believed_changed.get(app).is_some_and(|at| *at > looked);
        if excused {
            return None;
        }
        // An app that nginx did not know had nothing to lose.
        let before = &self.upstreamed;
        if before.all > 0 && now.dead * before.all > before.dead * now.all {
            let (dead, all) = (now.dead, now.all);
            return Some(format!(
                "{dead} of {all} upstreams lead nowhere, and {} of {} before",
                before.dead, before.all
            ));
        }
        // A reload makes workers old, with all that they know.
        if now.old_dead > before.old_dead && seen.is_some() {
            return Some(format!(
                "{} upstreams of old workers lead nowhere, and {} before",
                now.old_dead, before.old_dead
            ));
        }
        let left = seen.is_none() && state.leaving.contains(app);
        if serving == 0 && self.serving > 0 && !leaves(state, app) && !left {
            return Some("the last instance that served does not any more".to_owned());
        }
        None
    }
}

/// Whether an upstream broke after the app's part of nginx's set was written, and rightly stands in it all the same. A
/// paused app is left as it is. Slots are only counted there, and whom they lead to is not the set's business. If
/// workers take such a set over late, nginx passes over whoever does not answer.
fn is_broken_since(state: &State, app: &AppName, behind: &[ContainerId]) -> bool {
    let by_slots = state.proxy.live.as_ref().and_then(|m| m.vhosts.get(app));
    let by_slots = by_slots.is_some_and(|v| matches!(v.upstreams, Upstreams::Slots(_)));
    let is_paused = matches!(believed(state, app), Some(DesiredApp::Paused(_)));
    let since_written = |at: &Instant| state.proxy.written.get(app).is_some_and(|written| at > written);
    let mut programs = behind.iter().filter_map(|id| state.programs.get(id));
    (by_slots || is_paused)
        && (programs.any(|p| since_written(&p.changed)) || state.meddled.get(app).is_some_and(since_written))
}

fn find<'a>(state: &'a State, app: &AppName, id: &ContainerId) -> Option<&'a Instance> {
    state.apps.get(app)?.instances.iter().find(|i| i.id == *id)
}
