//! What leaves: instances that are neither wanted nor routed, and files that nothing needs.

use std::{collections::BTreeMap, time::Duration};

use super::{
    AppInput, VhostWish,
    draft::Draft,
    group::{Group, handle, is_established, is_routed},
    step::{Leftovers, Step, TIME_IS_OVER},
    wait::Wait,
};
use crate::model::{
    desired::Target,
    name::ReleaseId,
    observed::{Address, Instance, Phase},
    time::Timestamp,
};

/// How soon the connections of a draining instance are counted again, at first and at last.
const MEASURE_SOON: Duration = Duration::from_millis(15);
const MEASURE_LATE: Duration = Duration::from_millis(500);
/// How long nginx may take to read a request before an instance sees any of it: nginx reads whole bodies first, and its
/// older workers know only the port of the instance from before.
pub(super) const LONGEST_UPLOAD: Duration = Duration::from_secs(600);
/// Within this time after the end of a drain it is noticed.
const NOTICED: Duration = Duration::from_secs(2);

/// Retires every instance that is not kept: those of the wanted group, of the release that serves until the wanted one
/// is proven, and all that requests are routed to.
pub(super) fn retire(
    draft: &mut Draft<'_>,
    target: &Target,
    group: Option<&Group<'_>>,
    serving: Option<&ReleaseId>,
    proven: bool,
) {
    let (input, instances) = (draft.input, &draft.observed().instances);
    let is_wanted = |i: &Instance| group.is_some() && i.key.release == target.release.id;
    let is_kept = |i: &Instance| {
        group.is_some_and(|g| g.good.iter().any(|good| good.id == i.id))
            || serving == Some(&i.key.release)
            || is_routed(input, i)
    };
    // While nobody who stays is healthy, whoever is, or was in service, is better than none.
    let is_well = |i: &Instance| i.is_running() && i.health.is_healthy() && !input.is_stopping(i);
    let anyone = instances.iter().any(|i| is_kept(i) && is_well(i));
    let is_spare = |i: &Instance| !anyone && (is_well(i) || proven && is_wanted(i) && is_established(input, i));
    for instance in instances {
        if !(is_kept(instance) || is_spare(instance)) || instance.phase == Phase::Removing {
            end(draft, instance, "it is neither wanted nor routed");
        }
    }
}

/// Ends candidates of releases that are not wanted any more, before more are made, once there are as many as instances
/// are wanted: else they would pile up for as long as minds change faster than containers are made.
pub(super) fn strays(draft: &mut Draft<'_>, target: &Target, serving: Option<&ReleaseId>) {
    let input = draft.input;
    let is_stray = |i: &&Instance| {
        i.key.release != target.release.id
            && serving != Some(&i.key.release)
            && !is_established(input, i)
            && !(i.is_running() && i.health.is_healthy() && serving.is_none())
    };
    let strays: Vec<&Instance> = draft.observed().instances.iter().filter(is_stray).collect();
    if strays.len() >= usize::from(target.replicas) {
        for instance in strays {
            end(draft, instance, "it is a candidate of a release that is not wanted any more");
        }
    }
}

/// Everything of an app that does not belong here goes: route, connections, containers, files, in this order.
pub(super) fn leave(draft: &mut Draft<'_>) {
    draft.plan.vhost = VhostWish::Remove;
    let observed = draft.observed();
    let known_to_nginx = draft.input.proxy.live.is_some() || !(observed.slots.is_empty() || draft.input.proxy.serving);
    if known_to_nginx && !draft.report() {
        return;
    }
    if !observed.slots.is_empty() {
        draft.step(Step::Switch(BTreeMap::new()), "the app does not belong here");
        return;
    }
    for instance in &observed.instances {
        end(draft, instance, "the app does not belong here");
    }
    if observed.instances.is_empty() {
        clean_up(draft, None);
    }
}

/// Drain, stop, remove: the next of the three that is due.
fn end(draft: &mut Draft<'_>, instance: &Instance, reason: &'static str) {
    match &instance.phase {
        Phase::Removing => draft.wait(Wait::Removal(instance.key.clone())),
        Phase::Created | Phase::Exited(_) => draft.step(Step::Remove(handle(instance)), reason),
        Phase::Running | Phase::Paused | Phase::Restarting => {
            let left = match &instance.address {
                // Until nginx serves the live set, requests go where they went, and nothing has begun to drain.
                Some(Address::Port(_)) if !draft.input.proxy.serving => draft.input.now,
                Some(Address::Port(_)) => draft.input.proxy.changed,
                _ => draft.observed().slots_changed,
            };
            let until = left.plus(instance.drain);
            let (until, is_over) = match uploads_until(draft.input, instance, left) {
                Some(longest) if draft.input.now < longest => {
                    let late = draft.input.now >= until.plus(NOTICED);
                    // Whoever was connected when the drain was over is cut then; who comes later was not.
                    (longest, draft.input.now >= until && !late && instance.connections != Some(0))
                }
                _ => (until, draft.input.now >= until),
            };
            let stop = Step::Stop { handle: handle(instance), grace: instance.grace };
            if is_drained(draft, instance) {
                draft.step(stop, reason);
            } else if is_over {
                draft.step(stop, if instance.connections == Some(0) { reason } else { TIME_IS_OVER });
            } else {
                // Measured often while it is young, seldom once it has taken long: most drains take milliseconds.
                let pause = (draft.input.now.since(left) / 10).clamp(MEASURE_SOON, MEASURE_LATE);
                let again = draft.input.now.plus(pause).min(until);
                let (key, connections) = (instance.key.clone(), instance.connections);
                draft.wait(Wait::Drain { key, connections, until, again });
            }
        }
    }
}

/// Until when an older worker of nginx may still send an instance a request that it has not sent yet, since the client is
/// still sending it. Nothing where there is no such worker, or it knows no way to the instance.
fn uploads_until(input: &AppInput<'_>, instance: &Instance, left: Timestamp) -> Option<Timestamp> {
    match &instance.address {
        Some(Address::Port(port)) if input.proxy.old_workers && !was_never_routed(input, instance, *port) => {
            Some(left.plus(instance.drain.max(LONGEST_UPLOAD)))
        }
        _ => None,
    }
}

/// Whether no request can be under way to an instance any more.
fn is_drained(draft: &Draft<'_>, instance: &Instance) -> bool {
    match &instance.address {
        None => true,
        _ if !instance.is_running() => true,
        Some(Address::Socket(_)) => instance.connections == Some(0),
        // An older worker may still send a request to the port it knows.
        Some(Address::Port(port)) => {
            let proxy = &draft.input.proxy;
            let forgotten = proxy.serving && !proxy.old_workers;
            instance.connections == Some(0) && (forgotten || was_never_routed(draft.input, instance, *port))
        }
    }
}

/// Whether no set of nginx leads to an instance, or did lately. While nginx is away nothing else tells that a candidate may
/// go, and one deploy after the other would add more. A port that was another's before counts as one that was routed.
fn was_never_routed(input: &AppInput<'_>, instance: &Instance, port: u16) -> bool {
    let is_new = |left: &[u16]| !left.contains(&port);
    !instance.settled && !is_routed(input, instance) && input.proxy.left.is_some_and(is_new)
}

/// Removes files that nothing needs, once nothing else is to be done.
pub(super) fn clean_up(draft: &mut Draft<'_>, wanted: Option<&ReleaseId>) {
    let observed = draft.observed();
    let in_use =
        |release: &ReleaseId| Some(release) == wanted || observed.instances.iter().any(|i| i.key.release == *release);
    let left = Leftovers {
        env_files: observed.env_files.iter().filter(|r| !in_use(r)).cloned().collect(),
        socket_dirs: observed
            .socket_dirs
            .iter()
            .filter(|k| !observed.instances.iter().any(|i| i.key == **k))
            .cloned()
            .collect(),
        verdicts: observed
            .verdicts
            .keys()
            .filter(|r| Some(*r) != wanted || observed.proven.as_ref() == Some(r))
            .cloned()
            .collect(),
        everything: wanted.is_none() && has_traces(draft),
    };
    if !left.is_empty() {
        draft.step(Step::CleanUp(left), "nothing needs these files");
    }
}

fn has_traces(draft: &Draft<'_>) -> bool {
    let o = draft.observed();
    o.proven.is_some() || !o.env_files.is_empty() || !o.socket_dirs.is_empty() || !o.verdicts.is_empty()
}
