//! nginx as a whole: one set of vhosts for all apps, changed atomically and rarely.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::Duration,
};

use super::{Backoff, VhostWish};
use crate::model::{
    desired::{DesiredApp, Snapshot},
    name::{AppName, UrlPath, VirtualHost},
    proxy::{Manifest, ObservedProxy, Vhost},
    spec::Ingress,
    time::Timestamp,
};

/// Minimum time between two reloads. Each one starts new workers beside the old ones, so changes are batched.
pub const RELOAD_GAP: Duration = Duration::from_secs(1);

/// Reason for publishing unchanged vhosts again.
pub const CHANGED_BY_HAND: &str = "nginx files of demae were changed by hand";
/// Reason for a reload without a new set.
pub const NOT_LIVE: &str = "nginx does not answer with the live configuration";

/// Time after which a rejected vhost is retried: a file that it refers to may exist by then.
pub const REJECTED_RETRY: Duration = Duration::from_secs(60);

/// How long a change of nginx waits for the first probe of running instances: most answer in milliseconds, and a slow
/// one must not block the others.
pub const FIRST_HEALTH_TIMEOUT: Duration = Duration::from_secs(1);

/// All inputs of a plan for nginx.
#[derive(Debug)]
pub struct ProxyInput<'a> {
    /// The wish of each app.
    pub wishes: &'a BTreeMap<AppName, VhostWish>,
    /// Observed state of nginx.
    pub observed: &'a ObservedProxy,
    /// Backoff after the last failure, if any.
    pub backoff: Option<&'a Backoff>,
    /// Since when an app has running instances of unknown health: the latest of all apps. Its wish may change in a
    /// moment, when its health is known.
    pub health_unknown_since: Option<Timestamp>,
    /// Since when a step is held back for that.
    pub held_since: Option<Timestamp>,
    /// Whether a step is in flight.
    pub busy: bool,
    /// Now.
    pub now: Timestamp,
}

/// A step for nginx.
#[derive(Debug, Clone, PartialEq)]
pub enum ProxyStep {
    /// Render this set, test it, make it live, reload, and wait until a worker answers with it.
    Publish(BTreeMap<AppName, Vhost>),
    /// Reload the live set, and wait until a worker answers with it.
    Reload,
}

impl fmt::Display for ProxyStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProxyStep::Publish(vhosts) => write!(f, "publish a configuration of {} apps to nginx", vhosts.len()),
            ProxyStep::Reload => f.write_str("reload nginx"),
        }
    }
}

/// The plan for nginx.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ProxyPlan {
    /// The next step, and its reason.
    pub step: Option<(ProxyStep, &'static str)>,
    /// When to plan again.
    pub wake: Option<Timestamp>,
    /// Since when a step is held back until health is known.
    pub held_since: Option<Timestamp>,
    /// Why nginx cannot be changed, for the status of every app that waits for it.
    pub trouble: Option<String>,
}

/// Plans nginx.
pub fn plan_proxy(input: &ProxyInput<'_>) -> ProxyPlan {
    let mut plan = ProxyPlan::default();
    let observed = input.observed;
    // An unreadable set cannot be kept: an app that is to stay as it is would be lost.
    let keeps = input.wishes.values().any(|w| matches!(w, VhostWish::Keep));
    if observed.unreadable && keeps {
        plan.trouble.clone_from(&observed.error);
        return plan;
    }
    if let (None, Some(served), true) = (&observed.live, observed.serving, keeps) {
        plan.trouble = Some(format!(
            "the link `live` of demae's nginx files is gone, and apps that are to stay as they are were served by it; make it lead to `{served}.set` again"
        ));
        return plan;
    }
    let wanted = wanted(input);
    let step = match &observed.live {
        None => Some((ProxyStep::Publish(wanted), "there is no configuration of demae yet")),
        Some(live) if live.vhosts != wanted => Some((ProxyStep::Publish(wanted), "virtual hosts changed")),
        Some(live) if live.templates != observed.templates => {
            Some((ProxyStep::Publish(wanted), "the templates changed"))
        }
        Some(live) if is_retry_due(input, live) => Some((ProxyStep::Publish(wanted), "retrying what nginx refused")),
        Some(_) if observed.drifted => Some((ProxyStep::Publish(wanted), CHANGED_BY_HAND)),
        Some(_) if !observed.is_serving_live() => Some((ProxyStep::Reload, NOT_LIVE)),
        Some(_) => None,
    };
    let Some(step) = step else { return plan };
    if let Some(backoff) = input.backoff {
        plan.trouble = Some(backoff.error.clone());
        if backoff.until > input.now {
            plan.wake = Some(backoff.until);
            return plan;
        }
    }
    if let Some(health_unknown_since) = input.health_unknown_since {
        // Cap the total wait: new instances keep appearing.
        let held_since = input.held_since.unwrap_or(input.now);
        let until = health_unknown_since.min(held_since).plus(FIRST_HEALTH_TIMEOUT);
        if input.now < until {
            (plan.held_since, plan.wake) = (Some(held_since), Some(until));
            return plan;
        }
    }
    let due = observed.published.plus(RELOAD_GAP);
    if input.busy {
        return plan;
    }
    if due > input.now && observed.live.is_some() && input.backoff.is_none() {
        plan.wake = Some(due);
        return plan;
    }
    plan.step = Some(step);
    plan
}

/// Whether a rejected vhost is due for a retry: the app is served by its last good text, and its template, or a file
/// that this refers to, may have been fixed.
fn is_retry_due(input: &ProxyInput<'_>, live: &Manifest) -> bool {
    input.wishes.iter().any(|(app, wish)| match (wish, input.observed.rejected(app)) {
        (VhostWish::Set(vhost), Some(rejected)) => {
            rejected.vhost == *vhost
                && live.vhosts.get(app) == Some(vhost)
                && input.now >= rejected.at.plus(REJECTED_RETRY)
        }
        _ => false,
    })
}

/// The live set with all wishes applied, except rejected ones.
fn wanted(input: &ProxyInput<'_>) -> BTreeMap<AppName, Vhost> {
    let observed = input.observed;
    let mut wanted = observed.live.as_ref().map(|m| m.vhosts.clone()).unwrap_or_default();
    for (app, wish) in input.wishes {
        match wish {
            VhostWish::Keep => {}
            VhostWish::Remove => {
                wanted.remove(app);
            }
            VhostWish::Announce(vhost) if is_served_elsewhere(input, app, vhost) => {}
            VhostWish::Set(vhost) | VhostWish::Announce(vhost) => {
                let same_templates = observed.live.as_ref().is_some_and(|m| m.templates == observed.templates);
                let refused = same_templates
                    && observed
                        .rejected(app)
                        .is_some_and(|r| r.vhost == *vhost && input.now < r.at.plus(REJECTED_RETRY));
                if !refused {
                    wanted.insert(app.clone(), vhost.clone());
                }
            }
        }
    }
    hand_over(input, &mut wanted);
    wanted
}

/// Whether another app is served by any of these hosts, and keeps it.
fn is_served_elsewhere(input: &ProxyInput<'_>, app: &AppName, vhost: &Vhost) -> bool {
    let claims: BTreeSet<_> = vhost.all().flat_map(claims).collect();
    let live = input.observed.live.iter().flat_map(|live| &live.vhosts);
    let mut kept = live.filter(|(other, _)| {
        *other != app && matches!(input.wishes.get(*other), None | Some(VhostWish::Keep | VhostWish::Announce(_)))
    });
    kept.any(|(_, v)| v.all().flat_map(self::claims).any(|claim| claims.contains(&claim)))
}

/// The hosts of a vhost, each with its path.
fn claims(vhost: &Vhost) -> Vec<(VirtualHost, Option<UrlPath>)> {
    vhost.hosts.iter().map(|host| (host.clone(), vhost.path.clone())).collect()
}

/// An app whose vhost is kept loses the hosts that another app now sets: an app that is leaving, or whose own new hosts
/// have no instance yet, must not hold back one that wants them now.
fn hand_over(input: &ProxyInput<'_>, wanted: &mut BTreeMap<AppName, Vhost>) {
    let is_set = |app: &AppName| matches!(input.wishes.get(app), Some(VhostWish::Set(_)));
    let (kept, given): (Vec<_>, Vec<_>) = wanted.iter().partition(|(app, _)| !is_set(app));
    let given: BTreeSet<_> = given.into_iter().flat_map(|(_, v)| v.all().flat_map(claims)).collect();
    let is_given = |v: &Vhost| claims(v).iter().any(|claim| given.contains(claim));
    let kept: Vec<AppName> =
        kept.into_iter().filter(|(_, v)| v.all().any(is_given)).map(|(app, _)| app.clone()).collect();
    for app in kept {
        let Some(vhost) = wanted.remove(&app) else { continue };
        let left = vhost.ways().filter_map(|way| {
            let is_free = |host: &&VirtualHost| !given.contains(&((*host).clone(), way.path.clone()));
            let hosts: Vec<VirtualHost> = way.hosts.iter().filter(is_free).cloned().collect();
            (!hosts.is_empty()).then_some(Vhost { hosts, ..way })
        });
        let left = Vhost::of_ways(left);
        // If rejected, it is served by its last good text, with all of its hosts.
        let is_refused = |v: &Vhost| input.observed.rejected(&app).is_some_and(|r| r.vhost == *v);
        match left {
            Some(left) if is_refused(&left) => drop(wanted.insert(app, vhost)),
            Some(left) => drop(wanted.insert(app, left)),
            None => {}
        }
    }
}

/// A virtual host that another app holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    /// The host.
    pub host: VirtualHost,
    /// The path below it, if only that is claimed.
    pub path: Option<UrlPath>,
    /// The app that holds it.
    pub owner: AppName,
}

/// A host, or a path below it.
type Claim<'a> = (&'a VirtualHost, Option<&'a UrlPath>);

/// Apps that want a virtual host of another app. An app that is served keeps it; else the older app gets it. The
/// loser's traffic goes on unchanged.
pub fn conflicts(snapshot: &Snapshot, proxy: &ObservedProxy) -> BTreeMap<AppName, Conflict> {
    let mut owners: BTreeMap<Claim<'_>, &AppName> = BTreeMap::new();
    let mut claims: Vec<(i64, &AppName, Vec<Claim<'_>>)> = Vec::new();
    for (app, desired) in &snapshot.apps {
        let served = || {
            proxy
                .vhost(app)
                .into_iter()
                .flat_map(|v| v.all().flat_map(|v| v.hosts.iter().map(|h| (h, v.path.as_ref()))))
        };
        let (wanted, created): (Vec<Claim<'_>>, i64) = match desired {
            DesiredApp::Run(target) | DesiredApp::Invalid { last_good: Some(target), .. } => {
                let ingress = target.ingress.iter().flat_map(Ingress::all);
                (ingress.flat_map(|i| i.hosts.iter().map(|h| (h, i.path.as_ref()))).collect(), target.created)
            }
            // An app that is left as it is keeps its virtual hosts too.
            DesiredApp::Paused(_) | DesiredApp::Unknown(_) | DesiredApp::Invalid { last_good: None, .. } => {
                (served().collect(), i64::MIN)
            }
            DesiredApp::Absent(_) => continue,
        };
        for host in served().filter(|h| wanted.contains(h)) {
            owners.entry(host).or_insert(app);
        }
        claims.push((created, app, wanted));
    }
    claims.sort();
    let mut conflicts = BTreeMap::new();
    for (_, app, wanted) in claims {
        // An app that loses a claim takes no other host: it is not served, so it must not block others.
        match wanted.iter().find_map(|h| owners.get(h).filter(|o| **o != app).map(|o| (*h, *o))) {
            Some(((host, path), owner)) => {
                let path = path.cloned();
                conflicts.insert(app.clone(), Conflict { host: host.clone(), path, owner: owner.clone() });
            }
            None => owners.extend(wanted.into_iter().map(|host| (host, app))),
        }
    }
    conflicts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::desired::Target;

    fn target(created: i64, hosts: &[&str]) -> DesiredApp {
        let text = format!("image: a\ningress: {{hosts: [{}], port: 80}}\n", hosts.join(", "));
        let spec = crate::model::spec::Spec::parse(text.as_bytes()).expect("a spec");
        let key = crate::model::release::ReleaseKey::new("k");
        let image = spec.image.clone().expect("an image");
        let release = crate::model::release::Release::new(
            &key,
            image,
            spec.container.clone(),
            BTreeMap::new(),
            spec.health.clone(),
            None,
            None,
        );
        DesiredApp::Run(Target {
            release: std::sync::Arc::new(release),
            replicas: 1,
            ingress: spec.ingress,
            order: spec.deploy.order,
            update: crate::model::spec::Update::default(),
            pull_policy: spec.pull_policy,
            created,
            modified: created,
            cordoned: false,
            retried: 0,
            release_command: None,
        })
    }

    fn served(hosts: &[&str]) -> Vhost {
        let hosts = hosts.iter().map(|host| VirtualHost::try_from(*host).expect("a host")).collect();
        Vhost::plain(hosts, crate::model::proxy::Upstreams::Ports(vec![20_001]))
    }

    #[test]
    fn virtual_host_of_leaving_app_is_handed_over_at_once() {
        let name = |n: &str| AppName::try_from(n).expect("a name");
        let vhosts = [(name("y"), served(&["y.test", "x.test"])), (name("z"), served(&["z.test"]))];
        let live = Manifest { vhosts: vhosts.into(), ..Manifest::default() };
        let observed = ObservedProxy { live: Some(live), serving: Some(0), ..ObservedProxy::default() };
        let taker = served(&["x.test", "z.test"]);
        let wishes =
            [(name("b"), VhostWish::Set(taker.clone())), (name("y"), VhostWish::Keep), (name("z"), VhostWish::Keep)];
        let wishes = BTreeMap::from(wishes);
        let now = Timestamp::from_millis(1_000_000);
        let input = ProxyInput {
            wishes: &wishes,
            observed: &observed,
            backoff: None,
            health_unknown_since: None,
            held_since: None,
            busy: false,
            now,
        };
        let Some((ProxyStep::Publish(next), _)) = plan_proxy(&input).step else { panic!("a set is published") };
        assert_eq!(next, BTreeMap::from([(name("b"), taker), (name("y"), served(&["y.test"]))]));
    }

    #[test]
    fn app_that_loses_a_claim_does_not_block_other_claims() {
        let name = |n: &str| AppName::try_from(n).expect("a name");
        let apps = [
            (name("a"), target(1, &["x.test", "y.test"])),
            (name("c"), target(2, &["y.test", "z.test"])),
            (name("d"), target(3, &["z.test"])),
        ];
        let snapshot = Snapshot { apps: apps.into(), ..Snapshot::default() };
        let found = conflicts(&snapshot, &ObservedProxy::default());
        assert_eq!(found.keys().collect::<Vec<_>>(), [&name("c")]);
        assert_eq!(found[&name("c")].owner, name("a"));
    }
}
