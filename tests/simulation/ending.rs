//! How a history must end once nothing goes wrong any more.

use std::{sync::atomic::Ordering, time::Duration};

use demae::{
    model::{name::AppName, observed::Instance, status::State},
    store::Brake,
};

use crate::{
    history::{History, Kind},
    scene::{Behaviour, Engine, serving, version},
};

impl History {
    /// Everything is put right. Then it must come to what was meant, and stay there.
    pub(super) async fn ends_well(&mut self) {
        self.until_given_time().await;
        self.scene.happens("the faults end", String::new);
        {
            let mut state = self.scene.state();
            (state.engine, state.unreliable, state.disk_full) = (Engine::Up, 0, false);
            (state.proxy.broken, state.proxy.deaf) = (false, false);
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
                // Nobody says how it ends with these; they go.
                self.store.delete(&format!("apps/{}/spec", app.name));
                self.mean(&app.name, |m| m.present = false);
            }
        }
        self.store.put("hosts/host1/mode", "active");
        for app in self.apps.clone() {
            let revision = self.store.etcd().data.revision;
            self.mean(&app.name, |m| m.drain(false, revision));
        }
        self.scene.accepted.store(true, Ordering::Relaxed);
        let gone = self.apps.iter().filter(|a| self.meant(&a.name).is_none_or(|m| !m.present)).count();
        // What nobody doubts needs nobody's word.
        if self.disaster || gone > Brake::default().apps {
            let accept = self.store.accept(self.apps.iter().map(|a| a.name.clone()), None);
            *self.disk.accepted.lock().expect("one thread") = Some(accept);
        }
        let mut wrong = Vec::new();
        for _ in 0..90 {
            tokio::time::sleep(Duration::from_secs(60)).await;
            self.look().await;
            if !self.scene.state().violations.is_empty() {
                return;
            }
            wrong = self.not_as_meant();
            if wrong.is_empty() {
                break;
            }
        }
        if !wrong.is_empty() {
            let status = self.running.as_ref().map(|r| r.status.borrow().clone());
            let mut state = self.scene.state();
            state.violate(format!("90 minutes after the last fault: {wrong:?}"));
            for status in status.iter() {
                let told = format!("status: store {:?} nginx {:?}", status.store, status.proxy);
                state.log.push(told);
                let apps = status.apps.iter().map(|a| format!("status: {} {:?}: {}", a.app, a.state, a.reason));
                state.log.extend(apps);
            }
            return;
        }
        // At rest means at rest.
        let at_rest: Vec<AppName> = self.apps.iter().filter(|a| self.rests(&a.name)).map(|a| a.name.clone()).collect();
        let effects = |history: &Self| history.scene.state().effects.clone();
        let before = effects(self);
        tokio::time::sleep(Duration::from_secs(600)).await;
        let after = effects(self);
        for app in at_rest.iter().filter(|a| before.get(*a) != after.get(*a)) {
            self.scene.state().violate(format!("{app} was as meant, and something was done to it all the same"));
        }
    }

    /// Whether a version that works is wanted, or nothing.
    pub(super) fn rests(&self, app: &AppName) -> bool {
        let Some(meant) = self.meant(app) else { return true };
        let works = matches!(self.scene.state().behaviours[meant.version], Behaviour::Works | Behaviour::Slow);
        let shared = self.apps.iter().any(|a| a.name == *app && a.host == "shared.test");
        !meant.present || works && !shared
    }

    /// Of an app whose last version fails, the one before must serve.
    pub(super) fn not_served(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        for app in self.apps.iter().filter(|a| !self.rests(&a.name) && a.host != "shared.test") {
            let state = self.scene.state();
            let Some(observed) = state.apps.get(&app.name) else { continue };
            let settled =
                observed.instances.iter().filter(|i| i.settled && observed.proven.as_ref() == Some(&i.key.release));
            let fine = |i: &&Instance| {
                // One that hangs, of a release that is not wanted any more, cannot be made anew.
                let answers = app.kind == Kind::Worker || state.programs.get(&i.id).is_some_and(|p| p.answers);
                answers && matches!(state.behaviours[version(i)], Behaviour::Works | Behaviour::Slow)
            };
            let good = settled.filter(fine).count();
            let serves = match app.kind {
                Kind::Worker => observed.instances.iter().filter(|i| i.settled && i.is_running()).count(),
                _ => serving(&state, &app.name),
            };
            if good > 0 && serves == 0 {
                wrong
                    .push(format!("{}: {good} instances of a version that works are there, and none serves", app.name));
            }
        }
        wrong
    }

    pub(super) fn not_as_meant(&self) -> Vec<String> {
        let mut wrong = self.not_served();
        let status = self.running.as_ref().map(|r| r.status.borrow().clone());
        let told =
            |name: &AppName| status.iter().flat_map(|s| &s.apps).find(|a| a.app == name.as_str()).map(|a| a.state);
        for app in self.apps.iter().filter(|a| self.rests(&a.name)) {
            let meant = self.meant(&app.name).expect("all are meant");
            let state = self.scene.state();
            let observed = state.apps.get(&app.name).cloned().unwrap_or_default();
            let name = &app.name;
            let mut say = |what: String| wrong.push(format!("{name}: {what}"));
            if !meant.present {
                if has_traces(&observed) || !observed.instances.is_empty() {
                    say(format!("it was removed, and has left {observed:?}"));
                }
                let live = state.proxy.served.as_ref().is_some_and(|m| m.vhosts.contains_key(name));
                if live {
                    say("it was removed, and nginx serves it".into());
                }
                if let Some(state) = told(name) {
                    say(format!("it was removed, and status says that it is {state:?}"));
                }
                continue;
            }
            if told(name) != Some(State::Converged) {
                say(format!("status says that it is {:?}", told(name)));
            }
            let image = format!("app:v{}", meant.version);
            let right = |i: &Instance| {
                i.is_running() && i.settled && i.ordered.as_ref().is_some_and(|o| o.to_string() == image)
            };
            if observed.instances.len() != meant.replicas || !observed.instances.iter().all(right) {
                let found: Vec<_> =
                    observed.instances.iter().map(|i| (i.ordered.clone(), i.phase.clone(), i.settled)).collect();
                say(format!("{} instances of {image} are meant, and there are {found:?}", meant.replicas));
            } else if app.kind != Kind::Worker && serving(&state, name) != meant.replicas {
                say(format!("{} instances serve, of {}", serving(&state, name), meant.replicas));
            }
            let sockets = if app.kind == Kind::Socket { meant.replicas } else { 0 };
            if observed.env_files.len() != 1
                || observed.socket_dirs.len() != sockets
                || !observed.verdicts.is_empty()
                || observed.proven.is_none()
            {
                let left = (&observed.env_files, &observed.socket_dirs, observed.verdicts.len(), &observed.proven);
                say(format!("its files are not what it needs: {left:?}"));
            }
        }
        wrong
    }
}

pub fn has_traces(o: &demae::model::observed::ObservedApp) -> bool {
    !o.slots.is_empty()
        || !o.env_files.is_empty()
        || !o.socket_dirs.is_empty()
        || o.proven.is_some()
        || !o.verdicts.is_empty()
        || !o.instances.is_empty()
}
