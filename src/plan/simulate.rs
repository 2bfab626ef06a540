//! A simulated host: the effect of each step, if it succeeds.
//!
//! The agent plans the next step of a deploy on it, so it must be exact. `demae plan` uses it for its forecast, the property
//! tests to drive the planner through generated histories.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddrV4},
    time::Duration,
};

use super::{
    AppInput, AppPlan, Backoffs, NONE_STOPPING, ProxyView, VhostWish,
    app::plan_app,
    step::{Handle, Step},
};
use crate::model::{
    desired::DesiredApp,
    fleet::{FleetImage, Turn},
    mounts,
    name::{AppName, ContainerId},
    observed::{Address, Health, Instance, InstanceKey, ObservedApp, Phase, Verdict, Via},
    policy::BUILT_IN,
    proxy::{ObservedProxy, Vhost},
    release::Release,
    spec::Endpoint,
    time::Timestamp,
};

/// Where the stable addresses of a simulated host begin, 198.18.0.0, and those of its instances, 172.30.0.0.
const STABLE: u32 = 0xC612_0000;
const OWN: u32 = 0xAC1E_0000;
/// More slots than any generated app has.
const MAX_SLOTS: u16 = 100;

/// One app on a simulated host.
#[derive(Debug, Clone)]
pub struct SimHost {
    /// The app.
    pub app: AppName,
    /// Observed state.
    pub observed: ObservedApp,
    /// What nginx serves of it.
    pub live: Option<Vhost>,
    /// When that last changed.
    pub live_changed: Timestamp,
    /// What it may do about a release that is not proven on it.
    pub turn: Turn,
    /// The current time.
    pub now: Timestamp,
    containers: u64,
    has_table: bool,
}

impl SimHost {
    /// A host with this observed state.
    pub fn new(app: AppName, observed: ObservedApp, live: Option<Vhost>, now: Timestamp) -> Self {
        Self { app, observed, live, live_changed: now, turn: Turn::Free, now, containers: 0, has_table: false }
    }

    /// The same host, where new TCP apps are routed by the kernel's table.
    pub fn with_table(self) -> Self {
        Self { has_table: true, ..self }
    }

    /// The plan for this host.
    pub fn plan(&self, desired: &DesiredApp, backoffs: &Backoffs) -> AppPlan {
        plan_app(&self.input(desired, backoffs))
    }

    /// The planner's input for this host: nginx serves the last published vhost.
    pub fn input<'a>(&'a self, desired: &'a DesiredApp, backoffs: &'a Backoffs) -> AppInput<'a> {
        let proxy =
            ProxyView { live: self.live.as_ref(), serving: true, changed: self.live_changed, ..ProxyView::default() };
        AppInput {
            app: &self.app,
            desired,
            turn: &self.turn,
            image: &FleetImage::AsNamed,
            observed: &self.observed,
            proxy,
            conflict: None,
            backoffs,
            nested: None,
            policy: &BUILT_IN,
            stays_until: None,
            busy: None,
            stopping: &NONE_STOPPING,
            now: self.now,
        }
    }

    /// Applies a successful step.
    pub fn apply(&mut self, step: &Step) {
        if let Step::Create { key, release, .. } = step {
            self.containers += 1;
            let Ok(id) = ContainerId::try_from(format!("{:064x}", self.containers)) else { return };
            let port = 20_000 + u16::try_from(self.containers % 10_000).unwrap_or(0);
            let own = self.has_table.then(|| own_address(release, self.containers)).flatten();
            if own.is_some() {
                let stable = (1..=MAX_SLOTS).map(|slot| (slot, Ipv4Addr::from(STABLE + u32::from(slot))));
                self.observed.slot_addresses.extend(stable);
            }
            let created = NewContainer { id, address: own.or_else(|| address(key, release, port)) };
            return apply_step(&mut self.observed, step, Some(created), self.now);
        }
        apply_step(&mut self.observed, step, None, self.now);
    }

    /// Makes nginx serve the wished vhost.
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

    /// Advances time; running instances become healthy and lose their connections.
    pub fn advance(&mut self, duration: Duration) {
        self.now = self.now.plus(duration);
        for instance in self.observed.instances.iter_mut().filter(|i| i.phase == Phase::Running) {
            instance.health = Health::Healthy;
            instance.connections = Some(0);
        }
    }
}

/// Properties of a new container that no plan decides.
#[derive(Debug, Clone)]
pub struct NewContainer {
    /// Docker's id.
    pub id: ContainerId,
    /// Where it takes requests.
    pub address: Option<Address>,
}

/// Address of an instance: a socket named by its key, or this port.
pub fn address(key: &InstanceKey, release: &Release, port: u16) -> Option<Address> {
    release.endpoint.as_ref().map(|endpoint| match endpoint {
        Endpoint::Socket(_) => Address::Socket(key.to_string()),
        Endpoint::Port(_) => Address::Port(port),
    })
}

/// An address of its own for an instance that listens on one port, different for each number.
pub fn own_address(release: &Release, number: u64) -> Option<Address> {
    let ip = OWN + u32::try_from(number % 10_000).unwrap_or(0);
    match release.endpoint {
        Some(Endpoint::Port(inside)) if release.more_endpoints.is_empty() && release.container.network.is_none() => {
            Some(Address::Own(SocketAddrV4::new(Ipv4Addr::from(ip), inside)))
        }
        _ => None,
    }
}

/// The model of every step: updates the observed state as if the step had succeeded.
pub fn apply_step(observed: &mut ObservedApp, step: &Step, created: Option<NewContainer>, now: Timestamp) {
    let proven = observed.proven.clone();
    let mut change = |handle: &Handle, change: &dyn Fn(&mut Instance)| {
        observed.instances.iter_mut().filter(|i| i.id == handle.id).for_each(change);
    };
    match step {
        Step::Pull { image, digest } => {
            observed.image = Some(format!("sha256:{image}"));
            observed.image_digest.clone_from(digest);
            observed.pulled = true;
        }
        Step::WriteEnvFile(release) => {
            observed.env_files.insert(release.id.clone());
        }
        Step::Create { key, release, image, drain, host } => {
            let Some(NewContainer { id, address }) = created else { return };
            if matches!(address, Some(Address::Socket(_))) {
                observed.socket_dirs.insert(key.clone());
            }
            observed.instances.push(Instance {
                key: key.clone(),
                id,
                image: image.clone(),
                requested_image: Some(release.image.clone()),
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
                wrong_address: false,
                check_host: host.clone(),
                listens: release.endpoint.iter().cloned().collect(),
                port_taken: false,
                idle_at: None,
                binds: mounts::binds(&release.container),
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
        Step::Switch(via, slots) => {
            let routes = slots.iter().map(|(slot, key)| (*slot, Some(key.clone()))).collect();
            match via {
                Via::Symlinks => observed.slots = routes,
                Via::Table => observed.mapped = routes,
            }
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
        Step::RecordVerdict { release, cause, exit_code, attempts, conditions, .. } => {
            let release = release.id.clone();
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
                observed.mapped.clear();
                observed.slot_addresses.clear();
            }
        }
    }
}

/// The first contradiction between a prediction and an observation, if any. What changes by itself may have changed: a
/// program may have exited, Docker may have restarted it, an operator may have removed a container.
pub fn contradiction(step: &Step, predicted: &ObservedApp, seen: &ObservedApp) -> Option<String> {
    fn differ<T: PartialEq + std::fmt::Debug>(what: &str, predicted: &T, seen: &T) -> Option<String> {
        (predicted != seen).then(|| format!("{what} should be {predicted:?}, and {seen:?} is seen"))
    }
    // Another instance may have been removed meanwhile.
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
        .or_else(|| differ("the entries of the table", &predicted.mapped, &seen.mapped))
        .or_else(|| differ("the env-files", &predicted.env_files, &seen.env_files))
        .or_else(|| differ("the socket directories", &predicted.socket_dirs, &seen.socket_dirs))
        .or_else(|| differ("the proven release", &predicted.proven, &seen.proven))
        .or_else(|| differ("the verdicts", &verdicts(predicted), &verdicts(seen)))
        .or_else(|| expected.iter().zip(found).find_map(|(p, s)| instances_differ(p, s)))
}

/// The model of a set that was published: how what is seen of nginx contradicts it, if it does. Apps that nginx refused
/// keep their last good part, whatever that is; a set that was changed by hand says nothing.
pub fn proxy_contradiction(
    generation: u64,
    wanted: &BTreeMap<AppName, Vhost>,
    rejected: &BTreeSet<AppName>,
    seen: &ObservedProxy,
) -> Option<String> {
    let live = seen.live.as_ref().filter(|_| !seen.drifted && !seen.unreadable)?;
    if live.generation != generation {
        return Some(format!("the live set should be {generation}, and is {}", live.generation));
    }
    let apps: BTreeSet<&AppName> = wanted.keys().chain(live.vhosts.keys()).collect();
    let differs = |app: &&&AppName| !rejected.contains(**app) && wanted.get(**app) != live.vhosts.get(**app);
    apps.iter().find(differs).map(|app| {
        format!("nginx should serve {:?} of `{app}`, and serves {:?}", wanted.get(*app), live.vhosts.get(*app))
    })
}

fn instances_differ(predicted: &Instance, seen: &Instance) -> Option<String> {
    // It is being removed from outside.
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
        && predicted.check_host == seen.check_host
        && predicted.requested_image == seen.requested_image;
    (!same).then(|| format!("{} should be {predicted:?}, and {seen:?} is seen", predicted.key))
}

/// The steps ahead if all goes well, as lines, until nothing is left or an operator must act.
pub fn forecast(mut host: SimHost, desired: &DesiredApp) -> Vec<String> {
    let mut lines = Vec::new();
    let backoffs = Backoffs::new();
    for _ in 0..200 {
        let plan = host.plan(desired, &backoffs);
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
            host.advance(Duration::from_secs(3600));
        }
    }
    lines
}
