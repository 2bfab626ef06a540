//! Retires instances that are neither wanted nor routed, and removes files that nothing needs.

use std::time::Duration;

use super::{
    AppInput, VhostWish,
    draft::Draft,
    group::{Group, handle, is_established, is_routed},
    routes,
    step::{Leftovers, Step, TIME_IS_OVER},
    wait::Wait,
};
use crate::model::{
    desired::Target,
    name::ReleaseId,
    observed::{Address, Instance, Phase},
    time::Timestamp,
};

/// Shortest and longest interval between two counts of a draining instance's connections.
const MEASURE_MIN: Duration = Duration::from_millis(15);
const MEASURE_MAX: Duration = Duration::from_millis(500);
/// How long nginx may take to read a request before an instance sees any of it: it buffers whole bodies, and older
/// workers know only the instance's previous port.
pub(super) const LONGEST_UPLOAD: Duration = Duration::from_secs(600);

/// Retires every instance that is not kept. Kept are those of the wanted group, those of the serving release until the
/// wanted one is proven, and all that are routed.
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
        group.is_some_and(|g| g.selected.iter().any(|selected| selected.id == i.id))
            || serving == Some(&i.key.release)
            || is_routed(input, i)
    };
    // While no kept instance is healthy, keep the others that are healthy, or were in service.
    let is_healthy = |i: &Instance| i.is_running() && i.health.is_healthy() && !input.is_stopping(i);
    let keeps_healthy = instances.iter().any(|i| is_kept(i) && is_healthy(i));
    let is_spare =
        |i: &Instance| !keeps_healthy && (is_healthy(i) || proven && is_wanted(i) && is_established(input, i));
    for instance in instances {
        if !(is_kept(instance) || is_spare(instance)) || instance.phase == Phase::Removing {
            end(draft, instance, "it is neither wanted nor routed");
        }
    }
}

/// Ends candidates of superseded releases before more are created, once there are as many as wanted instances: else
/// they pile up while releases change faster than containers start.
pub(super) fn end_abandoned_candidates(draft: &mut Draft<'_>, target: &Target, serving: Option<&ReleaseId>) {
    let input = draft.input;
    let is_abandoned = |i: &&Instance| {
        i.key.release != target.release.id
            && serving != Some(&i.key.release)
            && !is_established(input, i)
            && !(i.is_running() && i.health.is_healthy() && serving.is_none())
    };
    let abandoned: Vec<&Instance> = draft.observed().instances.iter().filter(is_abandoned).collect();
    if abandoned.len() >= usize::from(target.replicas) {
        for instance in abandoned {
            end(draft, instance, "its release is no longer wanted");
        }
    }
}

/// Removes everything of an app that does not belong here: route, connections, containers, files, in this order.
pub(super) fn leave_host(draft: &mut Draft<'_>) {
    draft.plan.vhost = VhostWish::Remove;
    let observed = draft.observed();
    let known_to_nginx = draft.input.proxy.live.is_some() || (observed.has_routes() && !draft.input.proxy.serving);
    if known_to_nginx && !draft.wait_for_vhost() {
        return;
    }
    if observed.has_routes() {
        routes::remove_all(draft, None, "the app does not belong here");
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
                // Until nginx serves the live set, requests still go to the old set, and no drain has begun.
                Some(Address::Port(_)) if !draft.input.proxy.serving => draft.input.now,
                Some(Address::Port(_)) => draft.input.proxy.changed,
                _ => draft.observed().slots_changed,
            };
            // A request that an older worker forwards late has the whole drain time, too.
            let busy_since =
                instance.idle_at.filter(|_| instance.connections != Some(0)).map_or(left, |at| at.max(left));
            let until = busy_since.plus(instance.drain);
            let (until, is_over) = match uploads_until(draft.input, instance, left) {
                Some(longest) if draft.input.now < longest && instance.connections == Some(0) => (longest, false),
                _ => (until, draft.input.now >= until),
            };
            let stop = Step::Stop { handle: handle(instance), grace: instance.grace };
            if is_drained(draft, instance) {
                draft.step(stop, reason);
            } else if is_over {
                draft.step(stop, if instance.connections == Some(0) { reason } else { TIME_IS_OVER });
            } else {
                // Count often at first, rarely later: most drains take milliseconds.
                let pause = (draft.input.now.since(left) / 10).clamp(MEASURE_MIN, MEASURE_MAX);
                let again = draft.input.now.plus(pause).min(until);
                let (key, connections) = (instance.key.clone(), instance.connections);
                draft.wait(Wait::Drain { key, connections, until, again });
            }
        }
    }
}

/// Until when an older nginx worker may still forward a request whose body is being uploaded. `None` if there is no
/// such worker, or it has no route to the instance.
fn uploads_until(input: &AppInput<'_>, instance: &Instance, left: Timestamp) -> Option<Timestamp> {
    match &instance.address {
        Some(Address::Port(port)) if input.proxy.old_workers && !was_never_routed(input, instance, *port) => {
            Some(left.plus(instance.drain.max(LONGEST_UPLOAD)))
        }
        _ => None,
    }
}

/// Whether no request can be in flight to an instance.
fn is_drained(draft: &Draft<'_>, instance: &Instance) -> bool {
    match &instance.address {
        None => true,
        _ if !instance.is_running() => true,
        Some(Address::Socket(_) | Address::Own(_)) => instance.connections == Some(0),
        // An older worker may still send a request to the previous port.
        Some(Address::Port(port)) => {
            let proxy = &draft.input.proxy;
            let forgotten = proxy.serving && !proxy.old_workers;
            instance.connections == Some(0) && (forgotten || was_never_routed(draft.input, instance, *port))
        }
    }
}

/// Whether no set of nginx routes to an instance, now or recently. While nginx is down only this shows that a candidate
/// may be removed, and each deploy would add more. A port that another instance had before counts as routed.
fn was_never_routed(input: &AppInput<'_>, instance: &Instance, port: u16) -> bool {
    let is_new = |left: &[u16]| !left.contains(&port);
    !instance.settled && !is_routed(input, instance) && input.proxy.previous_ports.is_some_and(is_new)
}

/// Removes files that nothing needs, once there is no other step.
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
    let has_files = !o.env_files.is_empty() || !o.socket_dirs.is_empty() || !o.verdicts.is_empty();
    has_files || o.proven.is_some() || !o.slot_addresses.is_empty()
}
