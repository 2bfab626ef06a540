//! Routing: the route symlinks of an app, and the vhost that nginx should serve.

use std::collections::BTreeMap;

use super::{
    VhostWish,
    draft::Draft,
    group::{Group, is_routed},
    step::Step,
    wait::Wait,
};
use crate::model::{
    desired::Target,
    name::ReleaseId,
    observed::{Address, Health, Instance, InstanceKey},
    proxy::{Upstreams, Vhost},
    spec::{Endpoint, Ingress},
};

/// Points the routes at the active release. Returns true when requests go where they should.
pub(super) fn route(draft: &mut Draft<'_>, target: &Target, active: Option<&ReleaseId>, group: &Group<'_>) -> bool {
    let Some(ingress) = &target.ingress else {
        // A worker has no routes; remove those of an earlier spec.
        draft.plan.vhost = VhostWish::Remove;
        let unknown_to_nginx = draft.input.proxy.live.is_none();
        if (unknown_to_nginx || draft.wait_for_vhost()) && !draft.observed().slots.is_empty() {
            draft.step(Step::Switch(BTreeMap::new()), "the app no longer takes requests");
        }
        return true;
    };
    let is_target = active == Some(&target.release.id);
    let pool = pool(draft, active, is_target.then_some(group));
    let Some(first) = pool.first() else {
        // No instance can answer. Existing routes stay: a failing instance is better than none.
        if draft.observed().slots.is_empty() && draft.input.proxy.live.is_none() {
            announce(draft, target, ingress);
        }
        return false;
    };
    // A routed instance stays until the health of the others is known: a new agent has not probed any yet. The plan
    // already waits for that.
    let would_lose_route =
        |i: &&Instance| i.is_running() && is_routed(draft.input, i) && !pool.iter().any(|p| p.id == i.id);
    if pool.iter().any(|i| i.health == Health::Unknown)
        && draft.observed().instances.iter().any(|i| would_lose_route(&i))
    {
        return false;
    }
    let endpoints = ingress.endpoints();
    // An earlier release may listen at other endpoints, or at more of them: this spec's ingress would lead to the wrong
    // ones. With one endpoint on both sides, that one is meant.
    let other = |i: &Instance| i.listens != endpoints && (endpoints.len() > 1 || !i.more.is_empty());
    let live = draft.input.proxy.live.filter(|_| !is_target && pool.iter().any(|i| other(i)));
    let served = |upstreams: &dyn Fn(Option<&Endpoint>) -> Upstreams| match live {
        Some(live) => live_with_upstreams(live, upstreams),
        None => vhost(ingress, upstreams),
    };
    match &first.address {
        Some(Address::Port(_)) => {
            let ports = |endpoint: Option<&Endpoint>| {
                let ports = pool.iter().filter_map(|i| match i.address_of(endpoint) {
                    Some(Address::Port(port)) => Some(*port),
                    _ => None,
                });
                Upstreams::Ports(ports.collect())
            };
            draft.plan.vhost = served(&ports);
            let met = draft.wait_for_vhost();
            if met && !draft.observed().slots.is_empty() {
                draft.step(Step::Switch(BTreeMap::new()), "the app is routed by port now");
            }
            met
        }
        Some(Address::Socket(_)) => {
            let slots = if is_target { target.replicas } else { highest_slot(draft).max(1) };
            switch(draft, &pool, slots, &|slot_count| served(&|_| Upstreams::Slots(slot_count)))
        }
        None => false,
    }
}

/// Unroutes instances whose socket path is not a socket, since nginx would follow whatever it is. A healthy sibling
/// takes over, if there is one.
pub(super) fn unroute_wrong_sockets(draft: &mut Draft<'_>) {
    let observed = draft.observed();
    let find = |key: &InstanceKey| observed.instances.iter().find(|i| i.key == *key);
    let is_wrong = |key: &Option<InstanceKey>| key.as_ref().and_then(find).is_some_and(|i| i.wrong_socket);
    let Some(wrong) = observed.slots.values().find(|key| is_wrong(key)) else { return };
    let release = wrong.as_ref().map(|key| key.release.clone());
    let pool = pool(draft, release.as_ref(), None);
    let slots = if pool.is_empty() {
        let fine = observed.slots.iter().filter(|(_, key)| !is_wrong(key));
        fine.filter_map(|(slot, key)| Some((*slot, key.clone()?))).collect()
    } else {
        assign(draft, &pool, highest_slot(draft))
    };
    draft.step(Step::Switch(slots), "a routed socket path is not a socket");
}

/// For an app whose desired state is unknown: replaces an unhealthy instance in its routes by a healthy sibling.
pub(super) fn keep_serving(draft: &mut Draft<'_>, release: &ReleaseId) {
    let slots = highest_slot(draft);
    let pool = pool(draft, Some(release), None);
    if slots > 0 && !pool.is_empty() {
        let wanted = assign(draft, &pool, slots);
        if differs(draft, &wanted) {
            draft.step(Step::Switch(wanted), "a routed instance is unhealthy");
        }
    }
}

/// The routable instances of a release, by number.
fn pool<'a>(draft: &Draft<'a>, active: Option<&ReleaseId>, group: Option<&Group<'a>>) -> Vec<&'a Instance> {
    let Some(active) = active else { return Vec::new() };
    let of_release: Vec<&Instance> = match group {
        Some(group) => group.selected.clone(),
        None => draft.observed().instances.iter().filter(|i| i.key.release == *active).collect(),
    };
    let routable =
        |i: &&&Instance| i.is_running() && i.address.is_some() && !i.wrong_socket && !draft.input.is_stopping(i);
    let healthy: Vec<&Instance> =
        of_release.iter().filter(routable).filter(|i| i.health.is_healthy()).copied().collect();
    // An instance of unknown health keeps its route, but gets no new one.
    let unknown = of_release
        .iter()
        .filter(routable)
        .filter(|i| i.health == Health::Unknown && is_routed(draft.input, i))
        .copied();
    let mut pool: Vec<&Instance> = healthy.into_iter().chain(unknown).collect();
    pool.sort_by_key(|i| i.key.number);
    pool
}

fn highest_slot(draft: &Draft<'_>) -> u16 {
    draft.observed().slots.keys().next_back().copied().unwrap_or(0)
}

/// The vhost of an app, with the upstreams of each endpoint.
fn vhost(ingress: &Ingress, upstreams: &dyn Fn(Option<&Endpoint>) -> Upstreams) -> VhostWish {
    let several = !ingress.more_endpoints().is_empty();
    let one = |way: &Ingress| {
        let endpoint = several.then(|| way.endpoint.clone());
        Vhost {
            hosts: way.hosts.clone(),
            upstreams: upstreams(endpoint.as_ref()),
            template: way.template.clone(),
            max_body_size: way.max_body_size,
            read_timeout: way.read_timeout.as_secs(),
            response_header_size: way.response_header_size,
            request_buffering: way.request_buffering,
            path: way.path.clone(),
            strip_path: way.strip_path,
            endpoint,
            more: Vec::new(),
        }
    };
    wish_of(ingress.all().map(one))
}

/// Leaves out vhosts without upstreams: nginx would refuse them, and the rest of the app too.
fn wish_of(ways: impl Iterator<Item = Vhost>) -> VhostWish {
    Vhost::of_ways(ways.filter(Vhost::leads_somewhere)).map_or(VhostWish::Keep, VhostWish::Set)
}

/// The live vhost with new upstreams.
fn live_with_upstreams(live: &Vhost, upstreams: &dyn Fn(Option<&Endpoint>) -> Upstreams) -> VhostWish {
    let one = |v: Vhost| Vhost { upstreams: upstreams(v.endpoint.as_ref()), ..v };
    wish_of(live.ways().map(one))
}

/// Announces a new app to nginx while its first container starts, so many new apps cost one reload and the first switch
/// costs none.
fn announce(draft: &mut Draft<'_>, target: &Target, ingress: &Ingress) {
    if matches!(ingress.endpoint, Endpoint::Socket(_)) {
        draft.plan.vhost = match vhost(ingress, &|_| Upstreams::Slots(target.replicas)) {
            VhostWish::Set(vhost) => VhostWish::Announce(vhost),
            other => other,
        };
        draft.wait_for_vhost();
    }
}

/// Socket mode: to grow, symlinks come first, then nginx; to shrink, the other way round.
fn switch(draft: &mut Draft<'_>, pool: &[&Instance], slots: u16, vhost: &dyn Fn(u16) -> VhostWish) -> bool {
    let routed = highest_slot(draft);
    let served = match draft.input.proxy.live.map(|v| &v.upstreams) {
        Some(Upstreams::Slots(n)) => *n,
        _ => 0,
    };
    // Slots that nginx workers still know must lead to an instance.
    let workers_are_current = draft.input.proxy.serving && !draft.input.proxy.old_workers;
    let known = slots.max(served);
    let needed = if workers_are_current { known } else { known.max(routed) };
    let wanted = assign(draft, pool, needed);
    let switched = !differs(draft, &wanted);
    if !switched {
        draft.step(Step::Switch(wanted), "routes do not lead to the healthy instances of the release");
    }
    let slot_count = if routed == 0 || routed >= slots { slots } else { routed };
    // Change the number only once all slots lead to healthy instances.
    let slot_count = if switched || served == 0 { slot_count } else { slot_count.clamp(served.min(routed), served) };
    draft.plan.vhost = vhost(slot_count);
    let met = draft.wait_for_vhost();
    if met && !workers_are_current && routed > known {
        draft.wait(Wait::Proxy("old nginx workers may still know a route that is going".to_owned()));
    }
    switched && met && slot_count == slots
}

/// Assigns slots to instances: valid routes stay, the rest is spread evenly.
fn assign(draft: &Draft<'_>, pool: &[&Instance], slots: u16) -> BTreeMap<u16, InstanceKey> {
    let mut wanted: BTreeMap<u16, InstanceKey> = BTreeMap::new();
    for slot in 1..=slots {
        if let Some(Some(now)) = draft.observed().slots.get(&slot)
            && pool.iter().any(|i| i.key == *now)
            && !wanted.values().any(|k| k == now)
        {
            wanted.insert(slot, now.clone());
        }
    }
    for slot in 1..=slots {
        if !wanted.contains_key(&slot) {
            let uses = |i: &&&Instance| wanted.values().filter(|k| **k == i.key).count();
            if let Some(least) = pool.iter().min_by_key(|i| (uses(i), i.key.number)) {
                wanted.insert(slot, least.key.clone());
            }
        }
    }
    wanted
}

fn differs(draft: &Draft<'_>, wanted: &BTreeMap<u16, InstanceKey>) -> bool {
    let observed = &draft.observed().slots;
    observed.len() != wanted.len() || wanted.iter().any(|(slot, key)| observed.get(slot) != Some(&Some(key.clone())))
}
