//! The required end of a history, once there are no more faults.

use std::{sync::atomic::Ordering, time::Duration};

use demae::{
    model::{
        name::AppName,
        observed::{Instance, ObservedApp, Verdict},
        policy::BUILT_IN,
        status::State,
    },
    store::Brake,
};

use crate::{
    history::{History, Kind},
    scene::{Behaviour, Engine, serving, version},
    store::MODE,
};

/// The exit code of a program that is killed.
const KILLED: i64 = 137;

impl History {
    /// Ends all faults. The host must then reach the intended state, and stay there.
    pub(super) async fn assert_ends_well(&mut self) {
        self.wait_out_stall().await;
        self.scene.record("the faults end", String::new);
        {
            let mut state = self.scene.state();
            (state.engine, state.unreliable, state.disk_full) = (Engine::Up, 0, false);
            state.policy = BUILT_IN.clone();
            (state.proxy.broken, state.proxy.ignores_reloads) = (false, false);
        }
        self.disk.full.store(false, Ordering::Relaxed);
        self.revive_settled();
        if !self.scene.state().proxy.runs {
            self.scene.state().proxy.runs = true;
            self.scene.serve_live(false);
        }
        self.store.set_up(true);
        self.store.set_stray(None);
        if self.running.as_ref().is_none_or(|r| r.agent.is_finished()) {
            self.start();
        }
        if self.disaster {
            self.give_identity();
        }
        for app in self.apps.clone() {
            let meant = self.meant(&app.name).expect("all are meant");
            self.store.delete(&format!("apps/{}/paused", app.name));
            if meant.present && !meant.special {
                self.place(&app);
            } else if !meant.present {
                self.store.delete(&format!("apps/{}/spec", app.name));
            } else {
                // These apps have no defined end state; they are removed.
                self.store.delete(&format!("apps/{}/spec", app.name));
                self.mean(&app.name, |m| m.present = false);
            }
        }
        self.store.put(MODE, "active");
        for app in self.apps.clone() {
            let revision = self.store.etcd().data.revision;
            self.mean(&app.name, |m| m.drain(false, revision));
        }
        self.scene.accepted.store(true, Ordering::Relaxed);
        let gone = self.apps.iter().filter(|a| self.meant(&a.name).is_none_or(|m| !m.present)).count();
        // A trusted store needs no acceptance.
        if self.disaster || gone > Brake::default().apps {
            let accept = self.store.accept(self.apps.iter().map(|a| a.name.clone()), None);
            *self.disk.accepted.lock().expect("one thread") = Some(accept);
        }
        let mut wrong = Vec::new();
        for _ in 0..90 {
            tokio::time::sleep(Duration::from_secs(60)).await;
            self.check_status().await;
            if !self.scene.state().violations.is_empty() {
                return;
            }
            wrong = self.differences();
            if wrong.is_empty() {
                break;
            }
        }
        if !wrong.is_empty() {
            let status = self.running.as_ref().map(|r| r.status.borrow().clone());
            let mut state = self.scene.state();
            state.violate(format!("90 minutes after the last fault: {wrong:?}"));
            for status in status.iter() {
                let summary = format!("status: store {:?} nginx {:?}", status.store, status.proxy);
                state.log.push(summary);
                let apps = status.apps.iter().map(|a| format!("status: {} {:?}: {}", a.app, a.state, a.reason));
                state.log.extend(apps);
            }
            return;
        }
        // At rest, no further step may follow.
        let at_rest: Vec<AppName> =
            self.apps.iter().filter(|a| self.can_converge(&a.name)).map(|a| a.name.clone()).collect();
        let effects = |history: &Self| history.scene.state().effects.clone();
        let before = effects(self);
        tokio::time::sleep(Duration::from_secs(600)).await;
        let after = effects(self);
        for app in at_rest.iter().filter(|a| before.get(*a) != after.get(*a)) {
            self.scene.state().violate(format!("{app} was as intended, and a step was run all the same"));
        }
    }

    /// True if a working version is wanted, or none.
    pub(super) fn can_converge(&self, app: &AppName) -> bool {
        let Some(meant) = self.meant(app) else { return true };
        let state = self.scene.state();
        // Candidates that are killed again and again give a verdict on any release; so does one that was in service
        // before, hangs, and is wanted again.
        let is_excused = |verdict: &Verdict| {
            verdict.exit_code == Some(KILLED) || state.hung.contains(&(app.clone(), verdict.release.clone()))
        };
        let has_excuse = |o: &ObservedApp| o.verdicts.values().any(is_excused);
        let works = matches!(state.behaviours[meant.version], Behaviour::Works | Behaviour::Slow)
            && !state.apps.get(app).is_some_and(has_excuse);
        drop(state);
        let shared = self.apps.iter().any(|a| a.name == *app && a.host == "shared.test");
        !meant.present || works && !shared
    }

    /// If an app's last version fails, the previous one must serve.
    pub(super) fn not_served(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        for app in self.apps.iter().filter(|a| !self.can_converge(&a.name) && a.host != "shared.test") {
            let state = self.scene.state();
            let Some(observed) = state.apps.get(&app.name) else { continue };
            let settled =
                observed.instances.iter().filter(|i| i.settled && observed.proven.as_ref() == Some(&i.key.release));
            let fine = |i: &&Instance| {
                // An instance that hangs cannot be recreated if its release is not wanted any more.
                let answers = app.kind == Kind::Worker || state.programs.get(&i.id).is_some_and(|p| p.answers);
                answers && matches!(state.behaviours[version(i)], Behaviour::Works | Behaviour::Slow)
            };
            let good = settled.filter(fine).count();
            let serves = match app.kind {
                Kind::Worker => observed.instances.iter().filter(|i| i.settled && i.is_running()).count(),
                _ => serving(&state, &app.name),
            };
            if good > 0 && serves == 0 {
                wrong.push(format!("{}: {good} instances of a working version exist, and none serves", app.name));
            }
        }
        wrong
    }

    pub(super) fn differences(&self) -> Vec<String> {
        let mut wrong = self.not_served();
        let status = self.running.as_ref().map(|r| r.status.borrow().clone());
        let shown_state =
            |name: &AppName| status.iter().flat_map(|s| &s.apps).find(|a| a.app == name.as_str()).map(|a| a.state);
        for app in self.apps.iter().filter(|a| self.can_converge(&a.name)) {
            let meant = self.meant(&app.name).expect("all are meant");
            let state = self.scene.state();
            let observed = state.apps.get(&app.name).cloned().unwrap_or_default();
            let name = &app.name;
            let mut report = |what: String| wrong.push(format!("{name}: {what}"));
            if !meant.present {
                if has_traces(&observed) || !observed.instances.is_empty() {
                    report(format!("it was removed, and left {observed:?}"));
                }
                let live = state.proxy.served.as_ref().is_some_and(|m| m.vhosts.contains_key(name));
                if live {
                    report("it was removed, and nginx serves it".into());
                }
                if let Some(state) = shown_state(name) {
                    report(format!("it was removed, and status says that it is {state:?}"));
                }
                continue;
            }
            if shown_state(name) != Some(State::Converged) {
                report(format!("status says that it is {:?}", shown_state(name)));
            }
            let image = format!("app:v{}", meant.version);
            let right = |i: &Instance| {
                i.is_running() && i.settled && i.requested_image.as_ref().is_some_and(|o| o.to_string() == image)
            };
            if observed.instances.len() != meant.replicas || !observed.instances.iter().all(right) {
                let found: Vec<_> = observed
                    .instances
                    .iter()
                    .map(|i| (i.requested_image.clone(), i.phase.clone(), i.settled))
                    .collect();
                report(format!("{} instances of {image} are intended, and there are {found:?}", meant.replicas));
            } else if app.kind != Kind::Worker && serving(&state, name) != meant.replicas {
                report(format!("{} instances serve, of {}", serving(&state, name), meant.replicas));
            }
            let sockets = if app.kind == Kind::Socket { meant.replicas } else { 0 };
            if observed.env_files.len() != 1
                || observed.socket_dirs.len() != sockets
                || !observed.verdicts.is_empty()
                || observed.proven.is_none()
            {
                let left = (&observed.env_files, &observed.socket_dirs, observed.verdicts.len(), &observed.proven);
                report(format!("its files are not as needed: {left:?}"));
            }
        }
        wrong
    }
}

pub fn has_traces(o: &ObservedApp) -> bool {
    o.has_routes()
        || !o.slot_addresses.is_empty()
        || !o.env_files.is_empty()
        || !o.socket_dirs.is_empty()
        || o.proven.is_some()
        || !o.verdicts.is_empty()
        || !o.instances.is_empty()
}
