//! Checks of plans for nginx as a whole.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    model::{
        name::{AppName, UrlPath, VirtualHost},
        proxy::Vhost,
    },
    plan::{
        VhostWish,
        proxy::{ProxyInput, ProxyPlan, ProxyStep},
    },
};

type Claims = BTreeSet<(VirtualHost, Option<UrlPath>)>;

/// Violations of a plan for nginx. Empty if it is fine.
pub fn proxy_violations(input: &ProxyInput<'_>, plan: &ProxyPlan) -> Vec<String> {
    let Some((step, _)) = &plan.step else { return Vec::new() };
    let mut found = Vec::new();
    if input.busy {
        found.push(format!("`{step}` would be a second step at once"));
    }
    match step {
        ProxyStep::Reload if input.observed.live.is_none() => {
            found.push(format!("`{step}` has no set that it could load"));
        }
        ProxyStep::Reload => {}
        ProxyStep::Publish(next) => check_set(input, next, &mut found),
    }
    found
}

fn check_set(input: &ProxyInput<'_>, next: &BTreeMap<AppName, Vhost>, found: &mut Vec<String>) {
    let none = BTreeMap::new();
    let live = input.observed.live.as_ref().map_or(&none, |live| &live.vhosts);
    let stays = |app: &AppName| matches!(input.wishes.get(app), None | Some(VhostWish::Keep));
    let is_unknown = input.observed.unreadable || input.observed.live.is_none() && input.observed.serving.is_some();
    if is_unknown && input.wishes.values().any(|wish| matches!(wish, VhostWish::Keep)) {
        found.push("it replaces a set that cannot be read, and apps of it are to stay".to_owned());
    }
    let given: Claims = next.iter().filter(|(app, _)| !stays(app)).flat_map(|(_, vhost)| claims(vhost)).collect();
    for (app, vhost) in live.iter().filter(|(app, _)| stays(app)) {
        let kept = next.get(app).map(claims).unwrap_or_default();
        if let Some((host, _)) = claims(vhost).iter().find(|claim| !kept.contains(*claim) && !given.contains(*claim)) {
            found.push(format!("it takes `{host}` from app `{app}`, which is to stay as it is"));
        }
    }
    for (app, vhost) in next {
        let is_as_before = live.get(app).is_some_and(|live| ways(live).is_superset(&ways_without(vhost, &given)));
        let is_right = match input.wishes.get(app) {
            None | Some(VhostWish::Keep) => is_as_before,
            Some(VhostWish::Remove) => false,
            Some(VhostWish::Set(wish)) => {
                let is_rejected = input.observed.rejected(app).is_some_and(|rejected| rejected.vhost == *wish);
                vhost == wish || is_rejected && is_as_before
            }
            // Its hosts may be given to apps that have instances already.
            Some(VhostWish::Announce(wish)) => is_as_before || ways(wish).is_superset(&ways_without(vhost, &given)),
        };
        if !is_right {
            found.push(format!("it serves of app `{app}` what was not asked for"));
        }
    }
    for (app, wish) in input.wishes {
        if let VhostWish::Set(vhost) = wish
            && !next.contains_key(app)
            && input.observed.rejected(app).is_none_or(|rejected| rejected.vhost != *vhost)
        {
            found.push(format!("it leaves out app `{app}`, which is to be served"));
        }
    }
    // nginx takes the first of two servers with one name. While an app serves by its last good text, or by an earlier
    // release, that can be what is left to do.
    let held = |app: &AppName, claim: &(VirtualHost, Option<UrlPath>)| {
        live.get(app).is_some_and(|vhost| claims(vhost).contains(claim))
    };
    let mut owners: BTreeMap<(VirtualHost, Option<UrlPath>), &AppName> = BTreeMap::new();
    for (app, vhost) in next {
        for claim in claims(vhost) {
            let other = owners.insert(claim.clone(), app).filter(|other| *other != app);
            if let Some(other) = other.filter(|other| !held(other, &claim) && !held(app, &claim)) {
                found.push(format!("it gives `{}` to the apps `{other}` and `{app}`", claim.0));
            }
        }
    }
}

fn claims(vhost: &Vhost) -> Claims {
    vhost.all().flat_map(|way| way.hosts.iter().map(|host| (host.clone(), way.path.clone()))).collect()
}

/// One way in for each host, as text: hosts may be handed over one by one, and nothing else may change.
fn ways(vhost: &Vhost) -> BTreeSet<String> {
    ways_without(vhost, &Claims::new())
}

fn ways_without(vhost: &Vhost, given: &Claims) -> BTreeSet<String> {
    let of_host = |way: Vhost, host: &VirtualHost| {
        let hosts = vec![host.clone()];
        format!("{:?}", Vhost { hosts, more: Vec::new(), ..way })
    };
    let one = |way: Vhost| {
        let free = |host: &&VirtualHost| !given.contains(&((*host).clone(), way.path.clone()));
        way.hosts.iter().filter(free).map(|host| of_host(way.clone(), host)).collect::<Vec<_>>()
    };
    vhost.ways().flat_map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{
        proxy::{Manifest, ObservedProxy, Upstreams},
        time::Timestamp,
    };

    fn name(text: &str) -> AppName {
        AppName::try_from(text).expect("a name")
    }

    fn vhost(hosts: &[&str], port: u16) -> Vhost {
        let hosts = hosts.iter().map(|host| VirtualHost::try_from(*host).expect("a host")).collect();
        Vhost::plain(hosts, Upstreams::Ports(vec![port]))
    }

    #[test]
    fn a_set_serves_what_was_asked_for_and_nothing_else() {
        let (web, api) = (vhost(&["web.test", "www.test"], 1), vhost(&["api.test"], 2));
        let live =
            Manifest { vhosts: [(name("web"), web.clone()), (name("api"), api.clone())].into(), ..Manifest::default() };
        let observed = ObservedProxy { live: Some(live), serving: Some(0), ..ObservedProxy::default() };
        let next = vhost(&["api.test"], 3);
        let taker = vhost(&["www.test"], 4);
        let wishes = BTreeMap::from([
            (name("web"), VhostWish::Keep),
            (name("api"), VhostWish::Set(next.clone())),
            (name("taker"), VhostWish::Set(taker.clone())),
        ]);
        let input = |observed| ProxyInput {
            wishes: &wishes,
            observed,
            backoff: None,
            health_unknown_since: None,
            held_since: None,
            busy: false,
            now: Timestamp::from_millis(0),
        };
        let verdict = |observed, set: &[(&str, &Vhost)]| {
            let set = set.iter().map(|(app, vhost)| (name(app), (*vhost).clone())).collect();
            let plan = ProxyPlan { step: Some((ProxyStep::Publish(set), "a test")), ..ProxyPlan::default() };
            proxy_violations(&input(observed), &plan).into_iter().next().unwrap_or_default()
        };
        let left = vhost(&["web.test"], 1);
        let right = [("web", &left), ("api", &next), ("taker", &taker)];
        assert_eq!(verdict(&observed, &right), "");
        for (set, violation) in [
            (vec![("api", &next), ("taker", &taker)], "it takes `web.test` from app `web`, which is to stay as it is"),
            (
                vec![("web", &vhost(&["web.test"], 9)), right[1], right[2]],
                "it serves of app `web` what was not asked for",
            ),
            (vec![right[0], ("api", &api), right[2]], "it serves of app `api` what was not asked for"),
            (vec![right[0], right[2]], "it leaves out app `api`, which is to be served"),
            (vec![right[0], right[1], right[2], ("x", &left)], "it serves of app `x` what was not asked for"),
        ] {
            assert_eq!(verdict(&observed, &set), violation);
        }
        // What an app serves already may stay beside a new claim, and two new claims may not.
        assert_eq!(verdict(&observed, &[("web", &web), right[1], right[2]]), "");
        let both = BTreeMap::from([
            (name("a"), VhostWish::Set(vhost(&["new.test"], 1))),
            (name("b"), VhostWish::Set(vhost(&["new.test"], 2))),
        ]);
        let (a, b) = (vhost(&["new.test"], 1), vhost(&["new.test"], 2));
        let step = ProxyStep::Publish([(name("a"), a), (name("b"), b)].into());
        let plan = ProxyPlan { step: Some((step, "a test")), ..ProxyPlan::default() };
        let nothing = ObservedProxy::default();
        let found = proxy_violations(&ProxyInput { wishes: &both, ..input(&nothing) }, &plan);
        assert_eq!(found, ["it gives `new.test` to the apps `a` and `b`"]);
        let unreadable = ObservedProxy { unreadable: true, ..observed.clone() };
        assert_eq!(verdict(&unreadable, &right), "it replaces a set that cannot be read, and apps of it are to stay");
    }
}
