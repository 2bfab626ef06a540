//! A host that exists only on paper: what each step leaves behind, if it succeeds.
//!
//! `demae plan` forecasts with it, and the property tests drive the planner through made-up histories on it.

use std::time::Duration;

use super::{
    AppInput, AppPlan, Cooling, ProxyView, VhostWish,
    app::plan_app,
    step::{Handle, Step},
};
use crate::model::{
    desired::DesiredApp,
    name::{AppName, ContainerId},
    observed::{Address, Health, Instance, ObservedApp, Phase},
    proxy::Vhost,
    spec::Endpoint,
    time::Timestamp,
};

/// One app on a host of paper.
#[derive(Debug, Clone)]
pub struct PaperHost {
    /// The app.
    pub app: AppName,
    /// What is there.
    pub observed: ObservedApp,
    /// What nginx serves of it.
    pub live: Option<Vhost>,
    /// When that last changed.
    pub live_changed: Timestamp,
    /// What time it is.
    pub now: Timestamp,
    containers: u64,
}

impl PaperHost {
    /// Begins with what is there.
    pub fn new(app: AppName, observed: ObservedApp, live: Option<Vhost>, now: Timestamp) -> Self {
        Self { app, observed, live, live_changed: now, now, containers: 0 }
    }

    /// What the planner decides here.
    pub fn plan(&self, desired: &DesiredApp, cooling: &Cooling) -> AppPlan {
        plan_app(&self.input(desired, cooling))
    }

    /// The planner's input here: nginx serves what it was last told.
    pub fn input<'a>(&'a self, desired: &'a DesiredApp, cooling: &'a Cooling) -> AppInput<'a> {
        let proxy =
            ProxyView { live: self.live.as_ref(), serving: true, changed: self.live_changed, ..ProxyView::default() };
        AppInput {
            app: &self.app,
            desired,
            observed: &self.observed,
            proxy,
            conflict: None,
            cooling,
            busy: None,
            now: self.now,
        }
    }

    /// Does what a step does when it succeeds.
    pub fn apply(&mut self, step: &Step) {
        let now = self.now;
        match step {
            Step::Pull(image) => {
                self.observed.image = Some(format!("sha256:{image}"));
                self.observed.pulled = true;
            }
            Step::WriteEnvFile(release) => {
                self.observed.env_files.insert(release.id.clone());
            }
            Step::Create { key, release, image, drain } => {
                self.containers += 1;
                let Ok(id) = ContainerId::try_from(format!("{:064x}", self.containers)) else { return };
                let address = release.endpoint.as_ref().map(|endpoint| match endpoint {
                    Endpoint::Socket(_) => Address::Socket(format!("{key}")),
                    Endpoint::Port(_) => {
                        Address::Port(u16::try_from(20_000 + self.containers % 10_000).unwrap_or(20_000))
                    }
                });
                if matches!(address, Some(Address::Socket(_))) {
                    self.observed.socket_dirs.insert(key.clone());
                }
                self.observed.instances.push(Instance {
                    key: key.clone(),
                    id,
                    image: image.clone(),
                    ordered: Some(release.image.clone()),
                    phase: Phase::Created,
                    health: Health::Unknown,
                    settled: false,
                    out_of_memory: false,
                    started: now,
                    address,
                    connections: Some(0),
                    check: release.health.clone(),
                    drain: *drain,
                    grace: release.container.stop_grace_period,
                    restarts: 0,
                    stale_socket: false,
                });
                self.observed.instances.sort_by(|a, b| a.key.cmp(&b.key));
            }
            Step::Start(handle) => self.change(handle, |i| {
                i.phase = Phase::Running;
                i.started = now;
                i.stale_socket = false;
                i.health = Health::Starting(String::new());
            }),
            Step::ClearSocket(handle) => self.change(handle, |i| i.stale_socket = false),
            Step::Switch(slots) => {
                self.observed.slots = slots.iter().map(|(slot, key)| (*slot, Some(key.clone()))).collect();
                self.observed.slots_changed = now;
            }
            Step::Prove { release, .. } => self.observed.proven = Some(release.clone()),
            Step::Settle(handle) => self.change(handle, |i| i.settled = true),
            Step::Stop { handle, .. } => self.change(handle, |i| i.phase = Phase::Exited(0)),
            Step::Remove(handle) | Step::Discard { handle, .. } => {
                self.observed.instances.retain(|i| i.id != handle.id);
                self.observed.socket_dirs.remove(&handle.key);
            }
            Step::RecordVerdict { handle, cause, exit_code, .. } => {
                let verdict = crate::model::observed::Verdict {
                    release: handle.key.release.clone(),
                    cause: cause.clone(),
                    exit_code: *exit_code,
                    log_tail: String::new(),
                    at: now,
                };
                self.observed.verdicts.insert(handle.key.release.clone(), verdict);
            }
            Step::CleanUp(left) => {
                self.observed.env_files.retain(|r| !left.everything && !left.env_files.contains(r));
                self.observed.socket_dirs.retain(|k| !left.everything && !left.socket_dirs.contains(k));
                self.observed.verdicts.retain(|r, _| !left.everything && !left.verdicts.contains(r));
                if left.everything {
                    self.observed.proven = None;
                }
            }
        }
    }

    fn change(&mut self, handle: &Handle, change: impl FnOnce(&mut Instance)) {
        if let Some(instance) = self.observed.instances.iter_mut().find(|i| i.id == handle.id) {
            change(instance);
        }
    }

    /// nginx serves what is wished.
    pub fn serve(&mut self, wish: &VhostWish) {
        let wanted = match wish {
            VhostWish::Keep => return,
            VhostWish::Set(vhost) => Some(vhost.clone()),
            VhostWish::Remove => None,
        };
        if self.live != wanted {
            self.live = wanted;
            self.live_changed = self.now;
        }
    }

    /// Time passes, and all goes well in it.
    pub fn pass(&mut self, duration: Duration) {
        self.now = self.now.plus(duration);
        for instance in self.observed.instances.iter_mut().filter(|i| i.phase == Phase::Running) {
            instance.health = Health::Healthy;
            instance.connections = Some(0);
        }
    }
}

/// The steps that lie ahead if all goes well, as lines, until nothing is left or a person must act.
pub fn forecast(mut host: PaperHost, desired: &DesiredApp) -> Vec<String> {
    let mut lines = Vec::new();
    let cooling = Cooling::new();
    for _ in 0..200 {
        let plan = host.plan(desired, &cooling);
        let live = host.live.clone();
        host.serve(&plan.vhost);
        if let Some(planned) = &plan.step {
            lines.push(planned.to_string());
            host.apply(&planned.step);
        } else if host.live != live {
            lines.push("publish the virtual host to nginx".to_owned());
        } else if plan.waits.is_empty() {
            break;
        } else {
            host.pass(Duration::from_secs(3600));
        }
    }
    lines
}
