//! The operator's actions, and the state that they intend.

use demae::model::name::AppName;

use crate::{
    history::{App, History, Kind},
    scene::{Meant, VERSIONS},
    store::MODE,
};

impl History {
    pub(super) fn meant(&self, app: &AppName) -> Option<Meant> {
        self.scene.state().meant.get(app).cloned()
    }

    pub(super) fn mean(&self, app: &AppName, change: impl FnOnce(&mut Meant)) {
        let mut state = self.scene.state();
        let meant = state.meant.entry(app.clone()).or_insert(Meant {
            present: false,
            drained: false,
            absent_until: 0,
            version: 0,
            replicas: 1,
            special: false,
        });
        change(meant);
    }

    pub(super) fn spec(app: &App, meant: &Meant) -> String {
        let way = match app.kind {
            Kind::Socket => "socket: /run/app/app.sock",
            Kind::Port => "port: 8080",
            Kind::Worker => "",
        };
        let template = if app.bad_template { ", template: broken" } else { "" };
        let ingress = match app.kind {
            Kind::Worker => String::new(),
            _ => format!("ingress: {{hosts: [{}], {way}, drain: 10s{template}}}\n", app.host),
        };
        let order = if app.stop_first { "stop-first" } else { "start-first" };
        format!(
            "image: app:v0\n{ingress}deploy: {{replicas_per_host: {}, update_config: {{order: {order}}}}}\n",
            meant.replicas
        )
    }

    /// Puts all keys of an app that belongs on this host.
    pub(super) fn place(&self, app: &App) {
        // Both keys are written before the watch can deliver either.
        let revision = self.store.etcd().data.revision + 2;
        self.mean(&app.name, |m| {
            if !m.present {
                m.absent_until = m.absent_until.max(revision);
            }
            m.present = true;
        });
        let meant = self.meant(&app.name).expect("it is meant");
        self.store.put(&format!("apps/{}/spec", app.name), &Self::spec(app, &meant));
        self.store.put(&format!("apps/{}/image", app.name), &format!("app:v{}", meant.version));
    }

    pub(super) fn operator_acts(&mut self) {
        if !self.store.etcd().up {
            return;
        }
        let chance = &self.scene.chance;
        let at = chance.below(self.apps.len());
        let name = self.apps[at].name.clone();
        let present = self.meant(&name).is_some_and(|m| m.present);
        let act = chance.below(20);
        let what = match act {
            0..=8 if present => {
                let version = chance.below(VERSIONS);
                self.mean(&name, |m| m.version = version);
                self.store.put(&format!("apps/{name}/image"), &format!("app:v{version}"));
                format!("deploys v{version} ({:?})", self.scene.state().behaviours[version])
            }
            9 | 10 if present => {
                let replicas = 1 + chance.below(3);
                self.mean(&name, |m| m.replicas = replicas);
                self.place(&self.apps[at].clone());
                format!("wants {replicas} replicas")
            }
            11 if present => {
                self.store.delete(&format!("apps/{name}/spec"));
                if chance.one_in(2) {
                    self.store.delete(&format!("apps/{name}/image"));
                }
                self.mean(&name, |m| m.present = false);
                "removes it".into()
            }
            12 if present => {
                self.apps[at].stop_first ^= true;
                self.place(&self.apps[at].clone());
                "changes its order".into()
            }
            13 if present => {
                self.store.put(&format!("apps/{name}/spec"), "image: [");
                self.mean(&name, |m| m.special = true);
                "breaks its spec".into()
            }
            14 if present => {
                self.store.put(&format!("apps/{name}/paused"), "for a test");
                self.mean(&name, |m| m.special = true);
                "pauses it".into()
            }
            15 if present && self.apps[at].kind != Kind::Worker => {
                self.apps[at].bad_template ^= true;
                let bad = self.apps[at].bad_template;
                self.mean(&name, |m| m.special |= bad);
                self.place(&self.apps[at].clone());
                "changes its template".into()
            }
            16 if present => {
                self.store.put(&format!("apps/{name}/restart"), &format!("{}", chance.below(1_000)));
                "restarts it".into()
            }
            17 => {
                self.mode = *chance.pick(&["active", "active", "cordoned", "drained"]).expect("some");
                let drained = self.mode == "drained";
                for app in self.apps.clone() {
                    let revision = self.store.etcd().data.revision + 1;
                    self.mean(&app.name, |m| m.drain(drained, revision));
                }
                self.store.put(MODE, self.mode);
                format!("sets the mode {}", self.mode)
            }
            _ => {
                self.store.delete(&format!("apps/{name}/paused"));
                self.apps[at].bad_template = false;
                self.mean(&name, |m| m.special = false);
                self.place(&self.apps[at].clone());
                "repairs it".into()
            }
        };
        self.scene.record("operator", || format!("{name}: {what}"));
    }
}
