//! A host that exists only on paper: what each step leaves behind, if it succeeds.
//!
//! `demae plan` forecasts with it, and the property tests drive the planner through made-up histories on it.

use std::time::Duration;

use super::{
    AppInput, AppPlan, Cooling, NONE_STOPPING, ProxyView, VhostWish,
    app::plan_app,
    step::{Handle, Step},
};
use crate::model::{
    desired::DesiredApp,
    name::{AppName, ContainerId},
    observed::{Address, Health, Instance, InstanceKey, ObservedApp, Phase, Verdict},
    proxy::Vhost,
    release::Release,
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
            nested: None,
            stays_until: None,
            busy: None,
            stopping: &NONE_STOPPING,
            now: self.now,
        }
    }

    /// Does what a step does when it succeeds.
    pub fn apply(&mut self, step: &Step) {
        if let Step::Create { key, release, .. } = step {
            self.containers += 1;
            let Ok(id) = ContainerId::try_from(format!("{:064x}", self.containers)) else { return };
            let port = 20_000 + u16::try_from(self.containers % 10_000).unwrap_or(0);
            let made = Made { id, address: address(key, release, port) };
            return leave_behind(&mut self.observed, step, Some(made), self.now);
        }
        leave_behind(&mut self.observed, step, None, self.now);
    }

    /// nginx serves what is wished.
    pub fn serve(&mut self, wish: &VhostWish) {
        let wanted = match wish {
            VhostWish::Keep => return,
            VhostWish::Set(vhost) | VhostWish::Announce(vhost) => Some(vhost.clone()),
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

/// What a new container gets that no plan decides.
#[derive(Debug, Clone)]
pub struct Made {
    /// Docker's id.
    pub id: ContainerId,
    /// Where it takes requests.
    pub address: Option<Address>,
}

/// Where an instance takes requests: at a socket named by its key, or at this port.
pub fn address(key: &InstanceKey, release: &Release, port: u16) -> Option<Address> {
    release.endpoint.as_ref().map(|endpoint| match endpoint {
        Endpoint::Socket(_) => Address::Socket(key.to_string()),
        Endpoint::Port(_) => Address::Port(port),
    })
}

/// The model of every step: what an app is seen to have once the step has succeeded.
pub fn leave_behind(observed: &mut ObservedApp, step: &Step, made: Option<Made>, now: Timestamp) {
    let proven = observed.proven.clone();
    let mut change = |handle: &Handle, change: &dyn Fn(&mut Instance)| {
        observed.instances.iter_mut().filter(|i| i.id == handle.id).for_each(change);
    };
    match step {
        Step::Pull(image) => {
            observed.image = Some(format!("sha256:{image}"));
            observed.pulled = true;
        }
        Step::WriteEnvFile(release) => {
            observed.env_files.insert(release.id.clone());
        }
        Step::Create { key, release, image, drain, .. } => {
            let Some(Made { id, address }) = made else { return };
            if matches!(address, Some(Address::Socket(_))) {
                observed.socket_dirs.insert(key.clone());
            }
            observed.instances.push(Instance {
                key: key.clone(),
                id,
                image: image.clone(),
                ordered: Some(release.image.clone()),
                phase: Phase::Created,
                health: Health::Unknown,
                settled: false,
                leaving: false,
                out_of_memory: false,
                started: now,
                address,
                more: Vec::new(),
                connections: Some(0),
                check: release.health.clone(),
                drain: *drain,
                grace: release.container.stop_grace_period,
                restarts: 0,
                stale_socket: false,
                wrong_socket: false,
                check_host: None,
                listens: release.endpoint.iter().cloned().collect(),
                port_taken: false,
            });
            observed.instances.sort_by(|a, b| a.key.cmp(&b.key));
        }
        Step::Start(handle) => {
            change(handle, &|i| {
                i.phase = Phase::Running;
                i.started = now;
                i.stale_socket = false;
                i.health = Health::Starting(String::new());
            });
            let started = observed.instances.iter().filter(|i| i.id == handle.id);
            let at_socket = started.filter(|i| matches!(i.address, Some(Address::Socket(_))));
            observed.socket_dirs.extend(at_socket.map(|i| i.key.clone()));
        }
        Step::ClearSocket(handle) => change(handle, &|i| i.stale_socket = false),
        Step::Switch(slots) => {
            observed.slots = slots.iter().map(|(slot, key)| (*slot, Some(key.clone()))).collect();
            observed.slots_changed = now;
        }
        Step::Prove { release, .. } => observed.proven = Some(release.clone()),
        Step::Settle(handle) => change(handle, &|i| (i.settled, i.leaving) = (true, false)),
        Step::Stop { handle, .. } => change(handle, &|i| {
            i.phase = Phase::Exited(0);
            i.leaving |= !i.settled && proven.as_ref() != Some(&i.key.release);
        }),
        Step::Remove(handle) | Step::Discard { handle, .. } => {
            observed.instances.retain(|i| i.id != handle.id);
            observed.socket_dirs.remove(&handle.key);
        }
        Step::RecordVerdict { handle, cause, exit_code, attempts, conditions, .. } => {
            let release = handle.key.release.clone();
            let (cause, exit_code, log_tail) = (cause.clone(), *exit_code, String::new());
            let (attempts, conditions) = (*attempts, conditions.clone());
            let verdict =
                Verdict { release: release.clone(), cause, exit_code, log_tail, at: now, attempts, conditions };
            observed.verdicts.insert(release, verdict);
        }
        Step::CleanUp(left) => {
            observed.env_files.retain(|r| !left.everything && !left.env_files.contains(r));
            observed.socket_dirs.retain(|k| !left.everything && !left.socket_dirs.contains(k));
            observed.verdicts.retain(|r, _| !left.everything && !left.verdicts.contains(r));
            if left.everything {
                observed.proven = None;
                observed.slots.clear();
            }
        }
    }
}

/// Where the model of a step and what is seen of a host after it contradict each other. What moves by itself may have
/// moved: a program may have ended, Docker may have started it again, a person may have removed a container.
pub fn contradiction(step: &Step, predicted: &ObservedApp, seen: &ObservedApp) -> Option<String> {
    fn differ<T: PartialEq + std::fmt::Debug>(what: &str, predicted: &T, seen: &T) -> Option<String> {
        (predicted != seen).then(|| format!("{what} should be {predicted:?}, and {seen:?} is seen"))
    }
    // Somebody may have removed another instance meanwhile.
    let subject = match step {
        Step::Create { key, .. } => Some(key),
        Step::Start(handle) | Step::Settle(handle) => Some(&handle.key),
        _ => None,
    };
    let find = |i: &&Instance| seen.instances.iter().find(|s| s.key == i.key);
    let gone = |i: &&Instance| find(i).is_none() && subject != Some(&i.key);
    let expected: Vec<&Instance> = predicted.instances.iter().filter(|i| !gone(i)).collect();
    let keys = |all: &[&Instance]| all.iter().map(|i| i.key.clone()).collect::<Vec<_>>();
    let found: Vec<&Instance> = seen.instances.iter().collect();
    let verdicts = |o: &ObservedApp| o.verdicts.keys().cloned().collect::<Vec<_>>();
    differ("the instances", &keys(&expected), &keys(&found))
        .or_else(|| differ("the routes", &predicted.slots, &seen.slots))
        .or_else(|| differ("the env-files", &predicted.env_files, &seen.env_files))
        .or_else(|| differ("the socket directories", &predicted.socket_dirs, &seen.socket_dirs))
        .or_else(|| differ("the proven release", &predicted.proven, &seen.proven))
        .or_else(|| differ("the verdicts", &verdicts(predicted), &verdicts(seen)))
        .or_else(|| expected.iter().zip(found).find_map(|(p, s)| instances_differ(p, s)))
}

fn instances_differ(predicted: &Instance, seen: &Instance) -> Option<String> {
    // Somebody else removes it.
    if seen.phase == Phase::Removing {
        return None;
    }
    let kind = |i: &Instance| i.address.as_ref().map(std::mem::discriminant);
    let same_phase = match (&predicted.phase, &seen.phase) {
        (Phase::Running | Phase::Restarting, Phase::Running | Phase::Restarting | Phase::Exited(_))
        | (Phase::Exited(_), Phase::Exited(_)) => true,
        (predicted, seen) => predicted == seen,
    };
    let same = same_phase
        && predicted.settled == seen.settled
        && predicted.leaving == seen.leaving
        && kind(predicted) == kind(seen)
        && predicted.drain == seen.drain
        && predicted.check == seen.check
        && predicted.ordered == seen.ordered;
    (!same).then(|| format!("{} should be {predicted:?}, and {seen:?} is seen", predicted.key))
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
