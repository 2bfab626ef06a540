//! Checks of plans for one app.

use std::collections::BTreeMap;

use crate::model::{
    desired::{DesiredApp, Target},
    fleet::{FleetImage, Turn},
    name::{ContainerId, VirtualHost},
    observed::{Address, Instance, InstanceKey, Phase, Via},
    proxy::{Upstreams, Vhost},
    spec::Order,
};

use crate::plan::{
    AppInput, AppPlan, VhostWish,
    step::{Step, StepKind},
};

/// How long an older nginx worker may take to read a request before it forwards it.
const UPLOAD: std::time::Duration = std::time::Duration::from_secs(600);

/// Violations of a plan: what it must not do, or fails to do. Empty if it is fine.
pub fn violations(input: &AppInput<'_>, plan: &AppPlan) -> Vec<String> {
    let mut found = Vec::new();
    if let Some(planned) = &plan.step {
        check_step(input, &planned.step, &mut found);
    }
    check_vhost(input, &plan.vhost, &mut found);
    check_hosts(input, &plan.vhost, &mut found);
    check_turn(input, plan, &mut found);
    check_image(input, plan, &mut found);
    if leads_to_the_dead(input, plan) {
        found.push("it leaves requests with a container that has ended".into());
    }
    if silent(input, plan) {
        found.push("the app is not converged, and the plan has no step, wait or block".into());
    }
    found
}

/// The first instance of a release here is of the image that all hosts run it from.
fn check_image(input: &AppInput<'_>, plan: &AppPlan, found: &mut Vec<String>) {
    let Some(Step::Create { release, .. }) = plan.step.as_ref().map(|planned| &planned.step) else { return };
    let is_first = !input.observed.instances.iter().any(|i| i.key.release == release.id);
    if !is_first || input.observed.proven.as_ref() == Some(&release.id) {
        return;
    }
    match (input.image, &input.observed.image_digest) {
        (FleetImage::Unreadable, _) => {
            found.push("it creates a container, and which image it is cannot be read".into());
        }
        (FleetImage::Unwritten, Some(_)) => found.push("it creates a container before its digest is written".into()),
        (FleetImage::Written(written), here) if here.as_ref() != Some(written) => {
            found.push("it creates a container from another image than other hosts have".into());
        }
        _ => {}
    }
}

/// Without a turn nothing of another release is touched for the wanted one; with a turn that is only a trial, nothing that
/// serves is.
fn check_turn(input: &AppInput<'_>, plan: &AppPlan, found: &mut Vec<String>) {
    let Some(wanted) = wanted_release(input) else { return };
    let is_proven = input.observed.proven.as_ref().is_some_and(|proven| proven.as_str() == wanted);
    let moves = match input.turn {
        Turn::Free => true,
        Turn::Switch { confirmed, .. } => *confirmed,
        Turn::Held(_) | Turn::Try => false,
    };
    if is_proven || moves {
        return;
    }
    let is_wanted = |key: &InstanceKey| key.release.as_str() == wanted;
    let now_routed = |i: &&Instance| is_wanted(&i.key) && routed(input, i);
    let slots = input.observed.slots.values().chain(input.observed.mapped.values());
    if slots.flatten().any(is_wanted) || input.observed.instances.iter().any(|i| now_routed(&i)) {
        // Requests were moved in an earlier turn, or before there were turns: a sibling may take them over.
        return;
    }
    match plan.step.as_ref().map(|planned| &planned.step) {
        Some(Step::Switch(_, slots)) if slots.values().any(is_wanted) => {
            found.push("it moves requests to the wanted release before its turn".into());
        }
        Some(Step::Prove { .. }) => found.push("it proves the wanted release before its turn".into()),
        Some(Step::Create { .. } | Step::Pull { .. }) if matches!(input.turn, Turn::Held(_)) => {
            found.push("it rolls out the wanted release, and is not in its turn".into());
        }
        Some(Step::Stop { handle, .. }) if input.observed.proven.as_ref() == Some(&handle.key.release) => {
            found.push("it stops what serves before its turn".into());
        }
        _ => {}
    }
    let ports = |vhost: &Vhost| match &vhost.upstreams {
        Upstreams::Ports(ports) => ports.clone(),
        Upstreams::Slots(_) | Upstreams::Addresses(_) => Vec::new(),
    };
    if let VhostWish::Set(vhost) | VhostWish::Announce(vhost) = &plan.vhost {
        let wished = ports(vhost);
        let is_wished = |i: &&Instance| {
            is_wanted(&i.key) && i.addresses().any(|a| matches!(a, Address::Port(port) if wished.contains(port)))
        };
        if input.observed.instances.iter().any(|i| is_wished(&i)) {
            found.push("it leads requests to the wanted release before its turn".into());
        }
    }
}

/// What nginx is to serve never takes requests away from an app that is wanted, nor leads them from a healthy instance to
/// none.
fn check_vhost(input: &AppInput<'_>, wish: &VhostWish, found: &mut Vec<String>) {
    let Some(live) = input.proxy.live else { return };
    let takes_requests = match input.desired {
        DesiredApp::Run(t) | DesiredApp::Invalid { last_good: Some(t), .. } => t.ingress.is_some(),
        DesiredApp::Absent(_) => false,
        DesiredApp::Paused(_) | DesiredApp::Unknown(_) | DesiredApp::Invalid { last_good: None, .. } => {
            if *wish != VhostWish::Keep {
                found.push("it changes the virtual host of an app that is to stay as it is".into());
            }
            return;
        }
    };
    let answers = |port: &u16| {
        input.observed.instances.iter().any(|i| {
            i.phase == Phase::Running && i.health.is_healthy() && i.addresses().any(|a| *a == Address::Port(*port))
        })
    };
    let is_mapped = |slot: u16| {
        let key = input.observed.mapped.get(&slot).and_then(Option::as_ref);
        input.observed.instances.iter().any(|i| Some(&i.key) == key && i.phase == Phase::Running)
    };
    let leads_to_healthy = |vhost: &Vhost| {
        vhost.all().any(|way| match &way.upstreams {
            Upstreams::Ports(ports) => ports.iter().any(answers),
            Upstreams::Addresses(_) => (1..=way.upstreams.slots(Via::Table)).any(is_mapped),
            Upstreams::Slots(_) => false,
        })
    };
    match wish {
        VhostWish::Remove if takes_requests => {
            found.push("it removes the virtual host of an app that is wanted".into());
        }
        VhostWish::Set(vhost) | VhostWish::Announce(vhost)
            if !matches!(vhost.upstreams, Upstreams::Slots(_))
                && leads_to_healthy(live)
                && !leads_to_healthy(vhost) =>
        {
            found.push("it leads requests from a healthy instance to none".into());
        }
        _ => {}
    }
}

/// No virtual host is added that the policy does not let the app have.
fn check_hosts(input: &AppInput<'_>, wish: &VhostWish, found: &mut Vec<String>) {
    let (VhostWish::Set(vhost) | VhostWish::Announce(vhost), Some(target)) = (wish, input.desired.target()) else {
        return;
    };
    let refused = input.policy.refused_hosts(input.app, target.ingress.as_ref());
    let is_served = |host: &VirtualHost| input.proxy.live.is_some_and(|live| live.hosts().any(|h| h == host));
    for host in vhost.hosts().filter(|host| !is_served(host)) {
        if let Some((_, refusal)) = refused.iter().find(|(refused, _)| *refused == host) {
            found.push(format!("it serves a virtual host that is not allowed: {refusal}"));
        }
    }
}

fn check_step(input: &AppInput<'_>, step: &Step, found: &mut Vec<String>) {
    if matches!(input.desired, DesiredApp::Paused(_)) {
        found.push(format!("`{step}` touches a paused app"));
    }
    if matches!(input.desired, DesiredApp::Unknown(_)) && !matches!(step, Step::Switch(..)) {
        found.push(format!("`{step}` touches an app whose desired state is unknown"));
    }
    if let Some(handle) = step.handle()
        && input.stopping.contains_key(&handle.id)
    {
        found.push(format!("`{step}` acts on an instance that is already being stopped"));
    }
    let keeps = matches!(step, Step::Switch(..) | Step::Start(_) | Step::ClearSocket(_));
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
        Step::Start(h) | Step::ClearSocket(h) | Step::Settle(h) | Step::RecordVerdict { handle: Some(h), .. } => {
            known(input, &h.id, step, found);
        }
        Step::RecordVerdict { handle: None, release, .. } => {
            if input.observed.instances.iter().any(|i| i.key.release == release.id) {
                found.push(format!("`{step}` says that it has no image, and it has instances"));
            }
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
            let asked = |t: &Target| input.policy.refusals(input.app, release, t.ingress.as_ref()).into_iter().next();
            if let Some(refusal) = input.desired.target().and_then(asked) {
                found.push(format!("`{step}` is not allowed: {refusal}"));
            }
            if input.observed.instances.iter().any(|i| i.key == *key) {
                found.push(format!("`{step}` would duplicate an instance"));
            }
            if wanted_release(input).is_none_or(|w| w != release.id.as_str()) {
                found.push(format!("`{step}` creates an instance of a release that is not wanted"));
            }
        }
        Step::Switch(via, slots) => check_switch(input, *via, slots, step, found),
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
        Step::Pull { .. } | Step::WriteEnvFile(_) => {}
    }
}

/// Slots lead to instances that can answer, and not to nobody while nginx uses them.
fn check_switch(
    input: &AppInput<'_>,
    via: Via,
    slots: &BTreeMap<u16, InstanceKey>,
    step: &Step,
    found: &mut Vec<String>,
) {
    for (slot, key) in slots {
        // What fails may keep its route while another one is taken away.
        let is_kept = input.observed.routes(via).get(slot).is_some_and(|now| now.as_ref() == Some(key));
        let can_answer = |i: &Instance| match is_kept {
            true => !is_over(i),
            false => i.phase == Phase::Running && !i.health.is_unhealthy(),
        };
        match input.observed.instances.iter().find(|i| i.key == *key) {
            Some(i) if can_answer(i) && !i.wrong_address => {
                if !i.addresses().all(|a| by(a) == Some(via)) {
                    found.push(format!("`{step}` routes to {key}, which is not reached this way"));
                }
            }
            _ => found.push(format!("`{step}` routes to {key}, which cannot answer")),
        }
    }
    if !slots.is_empty() || input.proxy.live.is_none_or(|live| live.upstreams.slots(via) == 0) {
        return;
    }
    let routed = |i: &&Instance| input.observed.routes(via).values().flatten().any(|key| *key == i.key);
    let mut routed = input.observed.instances.iter().filter(routed);
    let leads_astray = match via {
        Via::Symlinks => routed.any(|i| i.wrong_address),
        Via::Table => routed.all(|i| i.wrong_address || is_over(i)),
    };
    if !leads_astray {
        found.push(format!("`{step}` removes the routes while nginx uses them"));
    }
}

/// How a slot leads to an address.
fn by(address: &Address) -> Option<Via> {
    match address {
        Address::Socket(_) => Some(Via::Symlinks),
        Address::Own(_) => Some(Via::Table),
        Address::Port(_) => None,
    }
}

/// Whether its process is gone.
fn is_over(instance: &Instance) -> bool {
    matches!(instance.phase, Phase::Created | Phase::Exited(_) | Phase::Removing)
}

/// Whether the plan leaves the table leading to a container that has ended, whose address another may get.
fn leads_to_the_dead(input: &AppInput<'_>, plan: &AppPlan) -> bool {
    let can_switch = input.busy.is_none() && !input.backoffs.contains_key(&StepKind::Switch);
    let is_left = |i: &Instance| is_over(i) && input.observed.mapped.values().flatten().any(|key| *key == i.key);
    can_switch
        && input.observed.foreign.is_empty()
        && !matches!(input.desired, DesiredApp::Paused(_))
        && input.observed.instances.iter().any(is_left)
        && !plan.step.as_ref().is_some_and(|planned| matches!(planned.step, Step::Switch(..)))
}

/// A container may only be ended when no request goes to it, unless its order is stop-first, and never the last healthy
/// one.
fn check_ending(input: &AppInput<'_>, instance: &Instance, step: &Step, found: &mut Vec<String>) {
    if matches!(step, Step::Remove(_)) && matches!(instance.phase, Phase::Running | Phase::Paused | Phase::Restarting) {
        found.push(format!("`{step}` removes a container that runs"));
    }
    // A stop-first change has a gap until the new release is proven.
    let changes_over = matches!(input.desired, DesiredApp::Run(t) | DesiredApp::Invalid { last_good: Some(t), .. }
        if t.order == Order::StopFirst && input.observed.proven.as_ref() != Some(&t.release.id));
    if changes_over {
        return;
    }
    if routed(input, instance) && instance.phase == Phase::Running {
        found.push(format!("`{step}` ends an instance that requests go to"));
    }
    let left = match &instance.address {
        // No drain has begun before nginx serves the live set.
        Some(Address::Port(_)) if !input.proxy.serving => input.now,
        Some(Address::Port(_)) => input.proxy.changed,
        _ => input.observed.slots_changed,
    };
    if matches!(step, Step::Stop { .. })
        && instance.phase == Phase::Running
        && instance.address.is_some()
        && instance.connections != Some(0)
        && input.now < instance.idle_at.map_or(left, |idle| idle.max(left)).plus(instance.drain)
    {
        found.push(format!("`{step}` cuts connections before their time is over"));
    }
    // An older worker may hold a request whose body is still being uploaded, and forward it here.
    let known = |port: &u16| instance.settled || input.proxy.previous_ports.is_none_or(|ports| ports.contains(port));
    if matches!(step, Step::Stop { .. })
        && instance.phase == Phase::Running
        && instance.connections == Some(0)
        && input.proxy.old_workers
        && matches!(&instance.address, Some(Address::Port(port)) if known(port))
        && input.now < left.plus(UPLOAD)
    {
        found.push(format!("`{step}` ends an instance that an older nginx worker may still send a request to"));
    }
    if matches!(input.desired, DesiredApp::Unknown(_) | DesiredApp::Invalid { last_good: None, .. })
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
        (Some(Address::Own(_)), _) => input.observed.mapped.values().any(|k| k.as_ref() == Some(&instance.key)),
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

/// Whether the app is not converged, and the plan gives no reason.
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
        DesiredApp::Absent(_) => !instances.is_empty() || input.observed.has_routes() || input.proxy.live.is_some(),
        DesiredApp::Invalid { .. } | DesiredApp::Paused(_) => true,
        DesiredApp::Unknown(_) => !instances.is_empty() || input.observed.has_routes(),
    }
}
