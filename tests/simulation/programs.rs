//! Programs in containers: they start, hang, lie, exit, and are restarted by Docker.

use std::{sync::Arc, time::Duration};

use demae::model::{
    name::{AppName, ContainerId},
    observed::{Address, Phase},
};
use tokio::time::Instant;

use crate::scene::{Behaviour, Engine, Scene, State, version};

impl Scene {
    pub fn start_program(self: &Arc<Self>, app: &AppName, id: &ContainerId) {
        let (life, behaviour) = {
            let mut state = self.state();
            let Some(version) = state.apps.get(app).and_then(|o| o.instances.iter().find(|i| i.id == *id)).map(version)
            else {
                return;
            };
            let behaviour = state.behaviours[version];
            let Some(program) = state.programs.get_mut(id) else { return };
            program.life += 1;
            (program.life, behaviour)
        };
        let (scene, app, id) = (self.clone(), app.clone(), id.clone());
        tokio::spawn(async move { scene.run_program(&app, &id, life, behaviour).await });
    }

    async fn run_program(self: Arc<Self>, app: &AppName, id: &ContainerId, life: u64, behaviour: Behaviour) {
        let soon = self.chance.millis(5, 2_000);
        match behaviour {
            Behaviour::NeverHealthy | Behaviour::Missing => return,
            Behaviour::Slow => tokio::time::sleep(soon + Duration::from_secs(20)).await,
            Behaviour::Exits => {
                tokio::time::sleep(soon).await;
                return self.die(app, id, Some(life), 3);
            }
            _ => tokio::time::sleep(soon).await,
        }
        {
            let mut state = self.state();
            let runs = state
                .apps
                .get(app)
                .is_some_and(|o| o.instances.iter().any(|i| i.id == *id && i.phase == Phase::Running));
            match state.programs.get_mut(id).filter(|p| p.life == life && runs) {
                // The agent may be running a step that was right before this.
                Some(program) => (program.answers, program.changed) = (true, Instant::now()),
                None => return,
            }
        }
        self.record("ready", || format!("{app}: {id}"));
        self.notify_health(app);
        if behaviour == Behaviour::Crashes {
            tokio::time::sleep(self.chance.millis(500, 90_000)).await;
            self.die(app, id, Some(life), 1);
        }
    }

    /// A process exits. Docker restarts it if it is to be kept running.
    pub fn die(self: &Arc<Self>, app: &AppName, id: &ContainerId, life: Option<u64>, code: i64) {
        let again = {
            let mut state = self.state();
            let State { apps, programs, died, .. } = &mut *state;
            let Some(program) = programs.get_mut(id).filter(|p| life.is_none_or(|l| l == p.life)) else { return };
            let Some(instance) =
                apps.get_mut(app).and_then(|o| o.instances.iter_mut().find(|i| i.id == *id && i.is_running()))
            else {
                return;
            };
            program.answers = false;
            program.changed = Instant::now();
            program.life += 1;
            died.insert(app.clone(), program.changed);
            instance.stale_socket = matches!(instance.address, Some(Address::Socket(_)));
            instance.phase = if instance.settled { Phase::Restarting } else { Phase::Exited(code) };
            instance.settled
        };
        self.record("death", || format!("{app}: {id} with code {code}"));
        self.emit_docker_event(app, true);
        self.notify_health(app);
        if again {
            let (scene, app, id) = (self.clone(), app.clone(), id.clone());
            tokio::spawn(async move {
                tokio::time::sleep(scene.chance.millis(100, 3_000)).await;
                scene.docker_restarts(&app, &id);
            });
        }
    }

    fn docker_restarts(self: &Arc<Self>, app: &AppName, id: &ContainerId) {
        let now = self.now();
        let started = {
            let mut state = self.state();
            let up = state.engine != Engine::Down;
            let instance = state.apps.get_mut(app).and_then(|o| o.instances.iter_mut().find(|i| i.id == *id));
            match instance.filter(|i| i.phase == Phase::Restarting) {
                // An engine that is down restarts it once it is up.
                Some(_) if !up => None,
                // A stale socket keeps the program from binding its own.
                Some(i) if i.stale_socket => None,
                Some(i) => {
                    (i.phase, i.started, i.restarts) = (Phase::Running, now, i.restarts + 1);
                    Some(true)
                }
                None => Some(false),
            }
        };
        match started {
            Some(true) => {
                self.record("restart", || format!("{app}: {id}"));
                self.start_program(app, id);
                self.emit_docker_event(app, false);
            }
            Some(false) => {}
            None => {
                let (scene, app, id) = (self.clone(), app.clone(), id.clone());
                tokio::spawn(async move {
                    tokio::time::sleep(scene.chance.millis(500, 10_000)).await;
                    scene.docker_restarts(&app, &id);
                });
            }
        }
    }

    pub fn stop_program(&self, id: &ContainerId) {
        if let Some(program) = self.state().programs.get_mut(id) {
            program.answers = false;
            program.life += 1;
        }
    }
}
