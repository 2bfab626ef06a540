//! Reads a plan again, before it is believed. None of the planner's code is used here.
//!
//! It knows no way to do things, only what must never be done. The agent asks it before every step, and the property
//! tests ask it about every step of thousands of made-up histories.

use crate::model::{
    desired::DesiredApp,
    name::ContainerId,
    observed::{Address, Instance, Phase},
    proxy::Upstreams,
    spec::Order,
};

use super::{AppInput, AppPlan, step::Step};

/// How long an older worker of nginx may take to read a request before it sends it anywhere.
const UPLOAD: std::time::Duration = std::time::Duration::from_secs(600);

/// What a plan must never do, or must do and does not. Empty when it is fine.
pub fn violations(input: &AppInput<'_>, plan: &AppPlan) -> Vec<String> {
    let mut found = Vec::new();
    if let Some(planned) = &plan.step {
        check_step(input, &planned.step, &mut found);
    }
    if silent(input, plan) {
        found.push(
            "the app is not converged and the plan says neither what is done, nor waited for, nor in the way".into(),
        );
    }
    found
}

fn check_step(input: &AppInput<'_>, step: &Step, found: &mut Vec<String>) {
    if matches!(input.desired, DesiredApp::Paused(_)) {
        found.push(format!("`{step}` touches a paused app"));
    }
    if matches!(input.desired, DesiredApp::Kept(_)) && !matches!(step, Step::Switch(_)) {
        found.push(format!("`{step}` touches an app of which nobody knows whether it is wanted"));
    }
    if let Some(handle) = step.handle()
        && input.stopping.contains_key(&handle.id)
    {
        found.push(format!("`{step}` is done to an instance that was asked to end already"));
    }
    let keeps = matches!(step, Step::Switch(_) | Step::Start(_) | Step::ClearSocket(_));
    if matches!(input.desired, DesiredApp::Absent(_))
        && input.stays_until.is_some_and(|t| input.now < t)
        && !keeps
        && !input.observed.instances.is_empty()
    {
        found.push(format!("`{step}` touches an app that may be put back yet"));
    }
    if !input.observed.foreign.is_empty() && !keeps {
        found.push(format!("`{step}` touches an app of which another agent has containers"));
    }
    if input.busy.is_some() {
        found.push(format!("`{step}` would be a second step at once"));
    }
    match step {
        Step::Start(h) | Step::ClearSocket(h) | Step::Settle(h) | Step::RecordVerdict { handle: h, .. } => {
            known(input, &h.id, step, found);
        }
        Step::Stop { handle, .. } | Step::Remove(handle) | Step::Discard { handle, .. } => {
            if let Some(instance) = known(input, &handle.id, step, found) {
                check_ending(input, instance, step, found);
            }
        }
        Step::Create { key, release, .. } => {
            if input.nested.is_some() {
                found.push(format!("`{step}` mounts what another mount can replace"));
            }
            if input.observed.instances.iter().any(|i| i.key == *key) {
                found.push(format!("`{step}` would double an instance"));
            }
            if wanted_release(input).is_none_or(|w| w != release.id.as_str()) {
                found.push(format!("`{step}` makes an instance of a release that is not wanted"));
            }
        }
        Step::Switch(slots) => {
            for key in slots.values() {
                match input.observed.instances.iter().find(|i| i.key == *key) {
                    Some(i) if i.phase == Phase::Running && !i.health.is_unhealthy() => {}
                    _ => found.push(format!("`{step}` routes to {key}, which cannot answer")),
                }
            }
            let served = matches!(input.proxy.live.map(|v| &v.upstreams), Some(Upstreams::Slots(n)) if *n > 0);
            let wrong = |i: &Instance| i.wrong_socket && input.observed.slots.values().flatten().any(|k| *k == i.key);
            let leads_astray = input.observed.instances.iter().any(wrong);
            if slots.is_empty() && served && !leads_astray {
                found.push(format!("`{step}` takes the routes away while nginx uses them"));
            }
        }
        Step::Prove { release, .. } => {
            let healthy =
                |i: &&Instance| i.key.release == *release && i.phase == Phase::Running && i.health.is_healthy();
            if !input.observed.instances.iter().any(|i| healthy(&i)) {
                found.push(format!("`{step}` proves a release without a healthy instance"));
            }
        }
        Step::CleanUp(left) => {
            let used = |r: &crate::model::name::ReleaseId| input.observed.instances.iter().any(|i| i.key.release == *r);
            if left.env_files.iter().any(used) {
                found.push(format!("`{step}` removes the env-file of a release that has instances"));
            }
            if left.socket_dirs.iter().any(|k| input.observed.instances.iter().any(|i| i.key == *k)) {
                found.push(format!("`{step}` removes the socket of an instance"));
            }
            if left.everything && !matches!(input.desired, DesiredApp::Absent(_)) {
                found.push(format!("`{step}` removes all traces of an app that is wanted"));
            }
        }
        Step::Pull(_) | Step::WriteEnvFile(_) => {}
    }
}

/// A container may only end when no request goes to it, unless its order says so, and never as the last one that serves.
fn check_ending(input: &AppInput<'_>, instance: &Instance, step: &Step, found: &mut Vec<String>) {
    if matches!(step, Step::Remove(_)) && matches!(instance.phase, Phase::Running | Phase::Paused | Phase::Restarting) {
        found.push(format!("`{step}` removes a container that runs"));
    }
    // A gap is what a change by this order asks for, until the new release is proven.
    let changes_over = matches!(input.desired, DesiredApp::Run(t) | DesiredApp::Invalid { last_good: Some(t), .. }
        if t.order == Order::StopFirst && input.observed.proven.as_ref() != Some(&t.release.id));
    if changes_over {
        return;
    }
    if routed(input, instance) && instance.phase == Phase::Running {
        found.push(format!("`{step}` ends an instance that requests go to"));
    }
    let left = match &instance.address {
        // Nothing has left before nginx serves what it was told.
        Some(Address::Port(_)) if !input.proxy.serving => input.now,
        Some(Address::Port(_)) => input.proxy.changed,
        _ => input.observed.slots_changed,
    };
    if matches!(step, Step::Stop { .. })
        && instance.phase == Phase::Running
        && instance.address.is_some()
        && instance.connections != Some(0)
        && input.now < left.plus(instance.drain)
    {
        found.push(format!("`{step}` cuts connections before their time is over"));
    }
    // An older worker may hold a request whose body is still on its way, and send it here.
    let known = |port: &u16| instance.settled || input.proxy.left.is_none_or(|ports| ports.contains(port));
    if matches!(step, Step::Stop { .. })
        && instance.phase == Phase::Running
        && instance.connections == Some(0)
        && input.proxy.old_workers
        && matches!(&instance.address, Some(Address::Port(port)) if known(port))
        && input.now < left.plus(UPLOAD)
    {
        found.push(format!("`{step}` ends an instance that an older nginx worker may still send a request to"));
    }
    if matches!(input.desired, DesiredApp::Kept(_) | DesiredApp::Invalid { last_good: None, .. })
        || input.conflict.is_some()
    {
        found.push(format!("`{step}` ends an instance though it is not known what is wanted"));
    }
    let serves = |i: &Instance| i.phase == Phase::Running && i.health.is_healthy() && i.settled;
    if matches!(input.desired, DesiredApp::Run(_) | DesiredApp::Invalid { last_good: Some(_), .. })
        && serves(instance)
        && !input
            .observed
            .instances
            .iter()
            .filter(|i| !input.stopping.contains_key(&i.id))
            .any(|i| i.id != instance.id && i.phase == Phase::Running && i.health.is_healthy())
    {
        found.push(format!("`{step}` ends the last healthy instance"));
    }
}

fn routed(input: &AppInput<'_>, instance: &Instance) -> bool {
    match (&instance.address, input.proxy.live.map(|v| &v.upstreams)) {
        (Some(Address::Socket(_)), _) => input.observed.slots.values().any(|k| k.as_ref() == Some(&instance.key)),
        (Some(Address::Port(port)), Some(Upstreams::Ports(ports))) => ports.contains(port),
        _ => false,
    }
}

fn known<'a>(input: &AppInput<'a>, id: &ContainerId, step: &Step, found: &mut Vec<String>) -> Option<&'a Instance> {
    let instance = input.observed.instances.iter().find(|i| i.id == *id);
    if instance.is_none() {
        found.push(format!("`{step}` touches a container that is not demae's"));
    }
    instance
}

fn wanted_release<'a>(input: &AppInput<'a>) -> Option<&'a str> {
    match input.desired {
        DesiredApp::Run(t) | DesiredApp::Invalid { last_good: Some(t), .. } => Some(t.release.id.as_str()),
        _ => None,
    }
}

/// Not as wanted, and not a word about it.
fn silent(input: &AppInput<'_>, plan: &AppPlan) -> bool {
    if plan.step.is_some() || !plan.waits.is_empty() || !plan.blocks.is_empty() {
        return false;
    }
    let instances = &input.observed.instances;
    match input.desired {
        DesiredApp::Run(t) => {
            let healthy = |i: &&Instance| {
                i.key.release == t.release.id && i.phase == Phase::Running && i.health.is_healthy() && i.settled
            };
            let wanted = usize::from(t.replicas);
            instances.len() != wanted
                || instances.iter().filter(healthy).count() != wanted
                || (t.ingress.is_some() && !instances.iter().all(|i| routed(input, i)))
                || input.observed.proven.as_ref() != Some(&t.release.id)
        }
        DesiredApp::Absent(_) => {
            !instances.is_empty() || !input.observed.slots.is_empty() || input.proxy.live.is_some()
        }
        DesiredApp::Invalid { .. } | DesiredApp::Paused(_) => true,
        DesiredApp::Kept(_) => !instances.is_empty() || !input.observed.slots.is_empty(),
    }
}
