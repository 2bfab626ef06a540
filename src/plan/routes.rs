//! Routing: the slots of an app, and the vhost that nginx should serve.

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
    observed::{Address, Health, Instance, InstanceKey, Via},
    proxy::{Upstreams, Vhost},
    spec::{Endpoint, Ingress},
};

/// Points the routes at the active release. Returns true when requests go where they should.
pub(super) fn route(draft: &mut Draft<'_>, target: &Target, active: Option<&ReleaseId>, group: &Group<'_>) -> bool {
    let Some(ingress) = &target.ingress else {
        // A worker has no routes; remove those of an earlier spec.
        draft.plan.vhost = VhostWish::Remove;
        let unknown_to_nginx = draft.input.proxy.live.is_none();
        if unknown_to_nginx || draft.wait_for_vhost() {
            remove_all(draft, None, "the app no longer takes requests");
        }
        return true;
    };
    let is_target = active == Some(&target.release.id);
    let mut pool = pool(draft, active, is_target.then_some(group));
    let Some(first) = pool.first().copied() else {
        // No instance can answer. Existing routes stay: a failing instance is better than none.
        if !draft.observed().has_routes() && draft.input.proxy.live.is_none() {
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
    // All instances of a release are of one kind, unless what the host can do changed in between.
    let kind = |i: &Instance| i.address.as_ref().map(std::mem::discriminant);
    pool.retain(|i| kind(i) == kind(first));
    let via = first.address.as_ref().and_then(Address::via);
    let met = match (&first.address, via) {
        (Some(Address::Port(_)), _) => {
            let ports = |endpoint: Option<&Endpoint>| {
                let ports = pool.iter().filter_map(|i| match i.address_of(endpoint) {
                    Some(Address::Port(port)) => Some(*port),
                    _ => None,
                });
                Upstreams::Ports(ports.collect())
            };
            draft.plan.vhost = served(&ports);
            draft.wait_for_vhost()
        }
        (_, Some(via)) => {
            let slots = if is_target { target.replicas } else { slot_count(draft, via).max(1) };
            let addresses = &draft.observed().slot_addresses;
            let upstreams = |slots: u16| match via {
                Via::Symlinks => Upstreams::Slots(slots),
                Via::Table => Upstreams::Addresses((1..=slots).filter_map(|n| addresses.get(&n).copied()).collect()),
            };
            switch(draft, via, &pool, slots, &|slots| served(&|_| upstreams(slots)))
        }
        _ => false,
    };
    if met {
        let why = if via.is_none() { "the app is routed by port now" } else { "the app is routed in another way now" };
        remove_all(draft, via, why);
    }
    met
}

/// Removes all slots, except those of one kind.
pub(super) fn remove_all(draft: &mut Draft<'_>, except: Option<Via>, why: &'static str) {
    for via in Via::ALL {
        if Some(via) != except && !draft.observed().routes(via).is_empty() {
            draft.step(Step::Switch(via, BTreeMap::new()), why);
        }
    }
}

/// Unroutes instances whose socket path is not a socket, since nginx would follow whatever it is; and what the kernel's
/// table leads to where nobody answers: unlike at a dead socket, each connection would wait for its timeout there, and
/// another container may get the address. A healthy sibling takes over, if there is one.
pub(super) fn unroute_wrong_addresses(draft: &mut Draft<'_>) {
    let observed = draft.observed();
    for via in Via::ALL {
        let is_wrong = |key: &Option<InstanceKey>| match key
            .as_ref()
            .and_then(|key| observed.instances.iter().find(|i| i.key == *key))
        {
            Some(instance) => instance.wrong_address || via == Via::Table && !instance.is_alive(),
            None => via == Via::Table,
        };
        let routes = observed.routes(via);
        let Some(wrong) = routes.values().find(|key| is_wrong(key)) else { continue };
        let release = wrong.as_ref().map(|key| key.release.clone());
        let mut pool = pool(draft, release.as_ref(), None);
        pool.retain(|i| is_via(i, via));
        let slots = if pool.is_empty() {
            let fine = routes.iter().filter(|(_, key)| !is_wrong(key));
            fine.filter_map(|(slot, key)| Some((*slot, key.clone()?))).collect()
        } else {
            assign(draft, via, &pool, highest_slot(draft, via))
        };
        draft.step(Step::Switch(via, slots), "a route leads to what does not answer as this app");
    }
}

fn is_via(instance: &Instance, via: Via) -> bool {
    instance.address.as_ref().and_then(Address::via) == Some(via)
}

/// For an app whose desired state is unknown: replaces an unhealthy instance in its routes by a healthy sibling.
pub(super) fn keep_serving(draft: &mut Draft<'_>, release: &ReleaseId) {
    for via in Via::ALL {
        let slots = slot_count(draft, via);
        let mut pool = pool(draft, Some(release), None);
        pool.retain(|i| is_via(i, via));
        if slots > 0 && !pool.is_empty() {
            let wanted = assign(draft, via, &pool, slots);
            if differs(draft, via, &wanted) {
                draft.step(Step::Switch(via, wanted), "a routed instance is unhealthy");
            }
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
        |i: &&&Instance| i.is_running() && i.address.is_some() && !i.wrong_address && !draft.input.is_stopping(i);
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

fn highest_slot(draft: &Draft<'_>, via: Via) -> u16 {
    draft.observed().routes(via).keys().next_back().copied().unwrap_or(0)
}

/// The number of slots that lead somewhere, or should: an entry of the table is taken away while its instance is dead.
fn slot_count(draft: &Draft<'_>, via: Via) -> u16 {
    let served = draft.input.proxy.live.filter(|_| via == Via::Table).map_or(0, |live| live.upstreams.slots(via));
    highest_slot(draft, via).max(served)
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

/// Routes by slots: to grow, slots come first, then nginx; to shrink, the other way round.
fn switch(draft: &mut Draft<'_>, via: Via, pool: &[&Instance], slots: u16, vhost: &dyn Fn(u16) -> VhostWish) -> bool {
    let routed = highest_slot(draft, via);
    let served = draft.input.proxy.live.map_or(0, |live| live.upstreams.slots(via));
    // Slots that nginx workers still know must lead to an instance.
    let workers_are_current = draft.input.proxy.serving && !draft.input.proxy.old_workers;
    let known = slots.max(served);
    let needed = if workers_are_current { known } else { known.max(routed) };
    let wanted = assign(draft, via, pool, needed);
    let switched = !differs(draft, via, &wanted);
    if !switched {
        draft.step(Step::Switch(via, wanted), "routes do not lead to the healthy instances of the release");
    }
    // Requests stay where they are until the slots lead somewhere.
    if !switched && served == 0 && draft.input.proxy.live.is_some() {
        return false;
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
fn assign(draft: &Draft<'_>, via: Via, pool: &[&Instance], slots: u16) -> BTreeMap<u16, InstanceKey> {
    let mut wanted: BTreeMap<u16, InstanceKey> = BTreeMap::new();
    for slot in 1..=slots {
        if let Some(Some(now)) = draft.observed().routes(via).get(&slot)
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

fn differs(draft: &Draft<'_>, via: Via, wanted: &BTreeMap<u16, InstanceKey>) -> bool {
    let observed = draft.observed().routes(via);
    observed.len() != wanted.len() || wanted.iter().any(|(slot, key)| observed.get(slot) != Some(&Some(key.clone())))
}
