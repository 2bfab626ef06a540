//! Faults around an agent: wiped stores, failing engines and proxies, manual changes, reboots.

use std::sync::Arc;

use demae::model::{
    name::{AppName, ContainerId},
    observed::{Instance, ObservedApp, Phase},
    policy::{BUILT_IN, Policy},
};
use tokio::time::Instant;

use crate::{
    history::History,
    scene::{Engine, Meant, State},
    store::{Data, MODE},
};

impl History {
    /// Root of the host narrows what may run there, breaks the file, or takes it away.
    pub(super) fn other_policy(&mut self) {
        let policy = match self.scene.policies.below(4) {
            0 => Policy::unusable("host", "policy.toml", "it is broken"),
            1 => Policy::parse("host", "policy.toml", "[containers]\nread_only = true\n").expect("it is valid"),
            2 => Policy::parse("host", "policy.toml", "[apps.app0.ingress]\nhosts = []\n").expect("it is valid"),
            _ => BUILT_IN.as_ref().clone(),
        };
        self.scene.record("policy", || format!("another one: {:?}", policy.why_unusable()));
        self.scene.state().policy = Arc::new(policy);
    }

    pub(super) fn disaster(&mut self) {
        let chance = &self.scene.chance;
        if !self.store.etcd().up {
            return;
        }
        let data = self.store.etcd().data.clone();
        let backup = self.store.etcd().backup.clone().filter(|b| b.revision < data.revision);
        let what = match chance.below(8) {
            7 => {
                let copy = backup.filter(|_| chance.one_in(2));
                let (stray, what) = match (self.store.etcd().stray.is_some(), copy) {
                    (true, _) => (None, "is the right one again"),
                    // It is indistinguishable from a restored store, so a person has to accept the right one.
                    (false, Some(copy)) => {
                        self.disaster = true;
                        (Some(copy), "serves a copy from an earlier day")
                    }
                    (false, None) => (Some(Data::new(data.etcd + 100)), "belongs to another etcd"),
                };
                self.store.set_stray(stray);
                self.scene.record("member", || what.into());
                return;
            }
            0 | 1 => {
                self.store.etcd().backup = Some(data.clone());
                "a backup is made"
            }
            2 => {
                self.store.replace(Data::new(data.etcd));
                "the store is wiped"
            }
            3 => {
                self.store.replace(Data::new(data.etcd + 1));
                "another etcd answers"
            }
            4 => {
                self.store.delete_all();
                "all keys are deleted"
            }
            5 => {
                let Some(backup) = backup else { return };
                self.store.replace(backup);
                "a backup is restored"
            }
            _ => {
                let Some(mut backup) = backup else { return };
                backup.revision += 1_000_000_000;
                backup.compacted = backup.revision;
                self.store.replace(backup);
                "a backup is restored, with a bumped revision"
            }
        };
        if what != "a backup is made" {
            (self.disaster, self.wrecked) = (true, true);
            // The last read may still be in flight to a stalled agent.
            let absent = |m: &&mut Meant| !m.present || m.drained;
            let mut state = self.scene.state();
            for meant in state.meant.values_mut().filter(absent) {
                meant.absent_until = meant.absent_until.max(data.revision);
            }
        }
        self.scene.record("disaster", || what.into());
    }

    /// A person puts everything back, or accepts the store as it is; or accepts it and then puts everything back before
    /// any agent has read it.
    pub(super) fn repair_store(&mut self) {
        if !self.store.etcd().up {
            return;
        }
        self.wrecked = false;
        let (accepts, puts_back) =
            *self.scene.chance.pick(&[(true, false), (false, true), (true, true)]).expect("some");
        if accepts {
            let block = self.running.as_ref().and_then(|r| r.status.borrow().store.block.clone());
            let leaving: Vec<AppName> =
                self.apps.iter().map(|a| a.name.clone()).filter(|app| !self.store.has(app)).collect();
            self.scene.state().accepted_removals = leaving.iter().cloned().collect();
            if self.scene.chance.one_in(3) {
                self.store.accept_for_fleet(leaving.into_iter().collect());
            } else {
                let accept = self.store.accept(leaving.into_iter(), block.map(|b| b.kind));
                *self.disk.accepted.lock().expect("one thread") = Some(accept);
            }
            // It may be an older one.
            self.scene.state().newest_revision = 0;
        }
        for app in self.apps.clone() {
            if !puts_back && !self.store.has(&app.name) {
                self.mean(&app.name, |m| m.present = false);
            }
            if self.meant(&app.name).is_some_and(|m| m.present) {
                self.place(&app);
            } else {
                self.store.delete(&format!("apps/{}/spec", app.name));
            }
        }
        if puts_back {
            self.give_identity();
            self.store.put(MODE, self.mode);
        } else {
            // What was accepted may hold the mode of an earlier day.
            let revision = self.store.etcd().data.revision;
            for app in self.apps.clone() {
                self.mean(&app.name, |m| m.drain(self.store.is_drained(), revision));
            }
        }
        self.scene.record("repaired", || format!("accepted: {accepts}, put back: {puts_back}"));
    }

    pub(super) fn engine_trouble(&self) {
        let chance = &self.scene.chance;
        let engine = self.scene.state().engine;
        let what = match engine {
            Engine::Up if chance.one_in(3) => {
                let unreliable = *chance.pick(&[0, 3, 10]).expect("some");
                self.scene.state().unreliable = unreliable;
                format!("one call in {unreliable} fails")
            }
            Engine::Up => {
                self.scene.cut_events();
                let next = *chance.pick(&[Engine::Down, Engine::Hangs]).expect("some");
                self.scene.state().engine = next;
                // Without live-restore the containers stop too.
                if next == Engine::Down && chance.one_in(2) {
                    self.kill_containers();
                }
                format!("{next:?}")
            }
            _ => {
                self.scene.state().engine = Engine::Up;
                self.revive_settled();
                "Up".into()
            }
        };
        self.scene.record("engine", || what);
    }

    pub(super) fn nginx_trouble(&self) {
        let what = {
            let mut state = self.scene.state();
            let proxy = &mut state.proxy;
            match self.scene.chance.below(5) {
                0 => {
                    (proxy.runs, proxy.served) = (false, None);
                    proxy.old.clear();
                    "nginx is stopped"
                }
                1 => {
                    proxy.broken ^= true;
                    "nginx's own files are edited"
                }
                2 => {
                    proxy.ignores_reloads ^= true;
                    "reloads stop or start having an effect"
                }
                3 => {
                    proxy.drifted = proxy.live.is_some();
                    "demae's files are edited"
                }
                _ => {
                    proxy.runs = true;
                    "nginx is started"
                }
            }
        };
        if what == "nginx is started" && !self.scene.state().proxy.broken {
            self.scene.serve_live(false);
        }
        self.scene.record("nginx", || what.into());
    }

    /// A manual change or an accident to a container or a file.
    pub(super) fn mishap(&self) {
        let chance = &self.scene.chance;
        let all: Vec<(AppName, ContainerId)> = {
            let state = self.scene.state();
            let of_app = |(app, o): (&AppName, &demae::model::observed::ObservedApp)| {
                o.instances.iter().map(|i| (app.clone(), i.id.clone())).collect::<Vec<_>>()
            };
            state.apps.iter().flat_map(of_app).collect()
        };
        let Some((app, id)) = chance.pick(&all).cloned() else { return };
        let find = |state: &State| {
            let observed = state.apps.get(&app)?;
            let instance = observed.instances.iter().find(|i| i.id == id)?;
            Some((instance.settled, observed.proven.as_ref() == Some(&instance.key.release)))
        };
        let (settled, proven) = find(&self.scene.state()).unwrap_or_default();
        let kind = match chance.below(9) {
            // One kept from an earlier deploy of its release is a candidate again, and Docker restarts it all the same.
            // That counts as a verdict too.
            0 | 1 | 8 if settled && !proven => return,
            // A candidate that exits or hangs gives a verdict on its release, correctly.
            1 | 8 if !settled => 0,
            kind => kind,
        };
        let what = match kind {
            0 => {
                self.scene.die(&app, &id, None, 137);
                return;
            }
            1 => {
                self.scene.die(&app, &id, None, 1);
                return;
            }
            2 => {
                self.touch(&app, &id, |i| i.phase = Phase::Exited(137));
                "stopped manually"
            }
            3 => {
                self.touch(&app, &id, |i| {
                    if i.is_running() {
                        i.phase = Phase::Paused;
                    }
                });
                "paused manually"
            }
            4 => {
                let mut state = self.scene.state();
                if let Some(observed) = state.apps.get_mut(&app) {
                    observed.instances.retain(|i| i.id != id);
                }
                state.meddled.insert(app.clone(), Instant::now());
                state.programs.remove(&id);
                "removed manually"
            }
            5 => {
                let mut state = self.scene.state();
                // No engine removes an image that a living container uses.
                let used = |image: &String| {
                    let mut all = state.apps.values().flat_map(|o| &o.instances);
                    all.any(|i| i.is_alive() && i.requested_image.as_ref().is_some_and(|o| o.to_string() == *image))
                };
                let kept = state.images.iter().filter(|i| used(i)).cloned().collect();
                state.images = kept;
                "the images are pruned"
            }
            6 => {
                let mut state = self.scene.state();
                state.made += 1;
                let foreign = ContainerId::try_from(format!("{:064x}", state.made)).expect("an id");
                state.foreign.insert(foreign);
                "a foreign container is created"
            }
            7 => {
                let mut state = self.scene.state();
                if let Some(observed) = state.apps.get_mut(&app) {
                    observed.env_files.clear();
                }
                "its env-files are deleted"
            }
            _ => {
                self.touch(&app, &id, |_| {});
                let mut state = self.scene.state();
                if let Some(program) = state.programs.get_mut(&id) {
                    program.answers = false;
                }
                let release = state.apps.get(&app).and_then(|o| o.instances.iter().find(|i| i.id == id));
                let release = release.map(|i| i.key.release.clone());
                state.hung.extend(release.map(|release| (app.clone(), release)));
                drop(state);
                self.scene.notify_health(&app);
                "it hangs"
            }
        };
        self.scene.record("mishap", || format!("{app}: {id} {what}"));
        let runs = |o: &ObservedApp| o.instances.iter().any(|i| i.id == id && i.is_running());
        let is_end = !self.scene.state().apps.get(&app).is_some_and(runs);
        self.scene.emit_docker_event(&app, is_end);
    }

    pub(super) fn touch(&self, app: &AppName, id: &ContainerId, change: impl FnOnce(&mut Instance)) {
        let mut state = self.scene.state();
        let State { apps, programs, .. } = &mut *state;
        if let Some(instance) = apps.get_mut(app).and_then(|o| o.instances.iter_mut().find(|i| i.id == *id)) {
            change(instance);
            if let Some(program) = programs.get_mut(id) {
                program.changed = Instant::now();
                if !instance.is_running() {
                    program.answers = false;
                    program.life += 1;
                }
            }
        }
    }

    pub(super) fn kill_containers(&self) {
        let mut state = self.scene.state();
        let State { apps, programs, .. } = &mut *state;
        for instance in apps.values_mut().flat_map(|o| &mut o.instances).filter(|i| i.is_alive()) {
            instance.stale_socket = instance.address.is_some();
            instance.phase = Phase::Exited(137);
            if let Some(program) = programs.get_mut(&instance.id) {
                (program.answers, program.changed) = (false, Instant::now());
                program.life += 1;
            }
        }
    }

    /// An engine that starts restarts the containers that it is to keep running.
    pub(super) fn revive_settled(&self) {
        let now = self.scene.now();
        let mut revived = Vec::new();
        {
            let mut state = self.scene.state();
            for (app, observed) in &mut state.apps {
                for i in observed.instances.iter_mut().filter(|i| i.settled && matches!(i.phase, Phase::Exited(137))) {
                    (i.phase, i.started, i.stale_socket) = (Phase::Running, now, false);
                    revived.push((app.clone(), i.id.clone()));
                }
            }
        }
        for (app, id) in revived {
            self.scene.start_program(&app, &id);
        }
    }

    pub(super) async fn reboot(&mut self) {
        self.let_clock_settle().await;
        self.scene.record("reboot", String::new);
        self.crash().await;
        self.kill_containers();
        {
            let mut state = self.scene.state();
            for observed in state.apps.values_mut() {
                observed.env_files.clear();
            }
            state.engine = Engine::Up;
            state.proxy.old.clear();
            state.proxy.runs = !state.proxy.broken;
            state.proxy.served = None;
        }
        if self.scene.state().proxy.runs {
            self.scene.serve_live(false);
        }
        self.revive_settled();
        self.start();
    }
}
