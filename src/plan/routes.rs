//! Which instances requests go to: the route symlinks of an app, and what nginx is asked to serve of it.

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

/// Points the routes at the active release. True when requests go where they should.
pub(super) fn route(draft: &mut Draft<'_>, target: &Target, active: Option<&ReleaseId>, group: &Group<'_>) -> bool {
    let Some(ingress) = &target.ingress else {
        // A worker: nothing to route, and whatever an earlier spec routed goes.
        draft.plan.vhost = VhostWish::Remove;
        let unknown_to_nginx = draft.input.proxy.live.is_none();
        if (unknown_to_nginx || draft.report()) && !draft.observed().slots.is_empty() {
            draft.step(Step::Switch(BTreeMap::new()), "the app takes no requests any more");
        }
        return true;
    };
    let is_target = active == Some(&target.release.id);
    let pool = pool(draft, active, is_target.then_some(group));
    let Some(first) = pool.first() else {
        // Nobody can answer. What is routed stays routed: a failing instance is better than none.
        if draft.observed().slots.is_empty() && draft.input.proxy.live.is_none() {
            announce(draft, target, ingress);
        }
        return false;
    };
    // Whoever answers stays until it is known that others do: a new agent has asked nobody yet. It waits for their health
    // already.
    let would_leave = |i: &&Instance| i.is_running() && is_routed(draft.input, i) && !pool.iter().any(|p| p.id == i.id);
    if pool.iter().any(|i| i.health == Health::Unknown) && draft.observed().instances.iter().any(|i| would_leave(&i)) {
        return false;
    }
    let endpoints = ingress.endpoints();
    // A release before this one may listen elsewhere, or in more places: what of this one is asked of it would lead to
    // another place than is meant. With one place on both sides, that one is meant.
    let other = |i: &Instance| i.listens != endpoints && (endpoints.len() > 1 || !i.more.is_empty());
    let live = draft.input.proxy.live.filter(|_| !is_target && pool.iter().any(|i| other(i)));
    let served = |upstreams: &dyn Fn(Option<&Endpoint>) -> Upstreams| match live {
        Some(live) => still(live, upstreams),
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
            let met = draft.report();
            if met && !draft.observed().slots.is_empty() {
                draft.step(Step::Switch(BTreeMap::new()), "the app is routed by port now");
            }
            met
        }
        Some(Address::Socket(_)) => {
            let slots = if is_target { target.replicas } else { highest_slot(draft).max(1) };
            switch(draft, &pool, slots, &|told| served(&|_| Upstreams::Slots(told)))
        }
        None => false,
    }
}

/// Takes requests away from instances with something else than a socket in its place: whoever serves would be asked whatever
/// that leads to. A healthy sibling gets them, if there is one.
pub(super) fn leave_wrong_sockets(draft: &mut Draft<'_>) {
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
    draft.step(Step::Switch(slots), "something else than a socket lies where requests go");
}

/// For an app whose wish is not known: replaces an unhealthy instance in its routes by a healthy sibling.
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

/// The instances of a release that may be routed to, in order of number.
fn pool<'a>(draft: &Draft<'a>, active: Option<&ReleaseId>, group: Option<&Group<'a>>) -> Vec<&'a Instance> {
    let Some(active) = active else { return Vec::new() };
    let of_release: Vec<&Instance> = match group {
        Some(group) => group.good.clone(),
        None => draft.observed().instances.iter().filter(|i| i.key.release == *active).collect(),
    };
    let routable =
        |i: &&&Instance| i.is_running() && i.address.is_some() && !i.wrong_socket && !draft.input.is_stopping(i);
    let known: Vec<&Instance> = of_release.iter().filter(routable).filter(|i| i.health.is_healthy()).copied().collect();
    // One that has not been asked yet stays where it is, and is not brought in.
    let unasked = of_release
        .iter()
        .filter(routable)
        .filter(|i| i.health == Health::Unknown && is_routed(draft.input, i))
        .copied();
    let mut pool: Vec<&Instance> = known.into_iter().chain(unasked).collect();
    pool.sort_by_key(|i| i.key.number);
    pool
}

fn highest_slot(draft: &Draft<'_>) -> u16 {
    draft.observed().slots.keys().next_back().copied().unwrap_or(0)
}

/// What nginx serves of an app, with the upstreams of each of its endpoints.
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

/// What leads nowhere is left out: nginx would refuse it, and the rest of the app with it.
fn wish_of(ways: impl Iterator<Item = Vhost>) -> VhostWish {
    Vhost::of_ways(ways.filter(Vhost::leads_somewhere)).map_or(VhostWish::Keep, VhostWish::Set)
}

/// What nginx serves already, with other upstreams.
fn still(live: &Vhost, upstreams: &dyn Fn(Option<&Endpoint>) -> Upstreams) -> VhostWish {
    let one = |v: Vhost| Vhost { upstreams: upstreams(v.endpoint.as_ref()), ..v };
    wish_of(live.ways().map(one))
}

/// Before the first instance is up: nginx can learn of the app while its container starts, so that many new apps cost
/// one reload and the first switch costs none.
fn announce(draft: &mut Draft<'_>, target: &Target, ingress: &Ingress) {
    if matches!(ingress.endpoint, Endpoint::Socket(_)) {
        draft.plan.vhost = match vhost(ingress, &|_| Upstreams::Slots(target.replicas)) {
            VhostWish::Set(vhost) => VhostWish::Announce(vhost),
            other => other,
        };
        draft.report();
    }
}

/// Socket mode: symlinks first, then nginx learns of more slots; fewer the other way round.
fn switch(draft: &mut Draft<'_>, pool: &[&Instance], slots: u16, vhost: &dyn Fn(u16) -> VhostWish) -> bool {
    let there = highest_slot(draft);
    let served = match draft.input.proxy.live.map(|v| &v.upstreams) {
        Some(Upstreams::Slots(n)) => *n,
        _ => 0,
    };
    // Slots that nginx still knows must lead somewhere until no worker knows them.
    let settled = draft.input.proxy.serving && !draft.input.proxy.old_workers;
    let known = slots.max(served);
    let needed = if settled { known } else { known.max(there) };
    let wanted = assign(draft, pool, needed);
    let switched = !differs(draft, &wanted);
    if !switched {
        draft.step(Step::Switch(wanted), "routes do not lead to the healthy instances of the release");
    }
    let told = if there == 0 || there >= slots { slots } else { there };
    // Fewer or more only once all of them lead to who is well.
    let told = if switched || served == 0 { told } else { told.clamp(served.min(there), served) };
    draft.plan.vhost = vhost(told);
    let met = draft.report();
    if met && !settled && there > known {
        draft.wait(Wait::Proxy("old nginx workers may still know a route that is going".to_owned()));
    }
    switched && met && told == slots
}

/// Which slot leads where: what is right stays, the rest is spread evenly.
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
