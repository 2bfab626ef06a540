//! What goes wrong around an agent: stores that are wiped, engines and proxies that fail, hands that meddle, reboots.

use demae::model::{
    name::{AppName, ContainerId},
    observed::{Instance, Phase},
};
use tokio::time::Instant;

use crate::{
    history::History,
    scene::{Engine, Meant, State},
    store::Data,
};

impl History {
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
                    (true, _) => (None, "leads where it should"),
                    // It cannot be told from a store that was restored, so a person has to say which is the right one.
                    (false, Some(copy)) => {
                        self.disaster = true;
                        (Some(copy), "leads to a copy from an earlier day")
                    }
                    (false, None) => (Some(Data::new(data.etcd + 100)), "leads to another etcd"),
                };
                self.store.set_stray(stray);
                self.scene.happens("member", || what.into());
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
            // What the store said last may still be on its way to an agent that gets no time.
            let absent = |m: &&mut Meant| !m.present || m.drained;
            let mut state = self.scene.state();
            for meant in state.meant.values_mut().filter(absent) {
                meant.absent_until = meant.absent_until.max(data.revision);
            }
        }
        self.scene.happens("disaster", || what.into());
    }

    /// A person puts everything back, or takes the store as it is; or accepts it first, and puts everything back before
    /// anybody has looked.
    pub(super) fn mend_store(&mut self) {
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
            self.scene.state().consented = leaving.iter().cloned().collect();
            let accept = self.store.accept(leaving.into_iter(), block.map(|b| b.kind));
            *self.disk.accepted.lock().expect("one thread") = Some(accept);
            // It may be an older one.
            self.scene.state().newest = 0;
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
        }
        self.scene.happens("mended", || format!("accepted: {accepts}, put back: {puts_back}"));
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
                // Without live-restore the containers go with it.
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
        self.scene.happens("engine", || what);
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
                    "somebody edits nginx's own files"
                }
                2 => {
                    proxy.deaf ^= true;
                    "reloads change nothing, or do again"
                }
                3 => {
                    proxy.drifted = proxy.live.is_some();
                    "somebody edits demae's files"
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
        self.scene.happens("nginx", || what.into());
    }

    /// A person, or chance, does something to a container or a file.
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
            // One that stays from an earlier time of its release is a candidate again, and Docker starts it again all the
            // same. That is a verdict too, whoever ended it.
            0 | 1 | 8 if settled && !proven => return,
            // That a candidate ends or hangs is a verdict on its release, and rightly so.
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
                "stopped by hand"
            }
            3 => {
                self.touch(&app, &id, |i| {
                    if i.is_running() {
                        i.phase = Phase::Paused;
                    }
                });
                "paused by hand"
            }
            4 => {
                let mut state = self.scene.state();
                if let Some(observed) = state.apps.get_mut(&app) {
                    observed.instances.retain(|i| i.id != id);
                }
                state.meddled.insert(app.clone(), Instant::now());
                state.programs.remove(&id);
                "removed by hand"
            }
            5 => {
                let mut state = self.scene.state();
                // No engine gives up an image that a living container has.
                let used = |image: &String| {
                    let mut all = state.apps.values().flat_map(|o| &o.instances);
                    all.any(|i| i.is_alive() && i.ordered.as_ref().is_some_and(|o| o.to_string() == *image))
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
                "somebody runs a container of their own"
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
                if let Some(program) = self.scene.state().programs.get_mut(&id) {
                    program.answers = false;
                }
                self.scene.health_tells(&app);
                "it hangs"
            }
        };
        self.scene.happens("mishap", || format!("{app}: {id} {what}"));
        self.scene.docker_tells(&app);
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

    /// An engine that comes up starts what it is to keep running.
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
            self.scene.begin_life(&app, &id);
        }
    }

    pub(super) async fn reboot(&mut self) {
        self.let_clock_settle().await;
        self.scene.happens("reboot", String::new);
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
