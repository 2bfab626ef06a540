//! nginx as a whole: one set of vhosts for all apps, changed as one, seldom.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::Duration,
};

use super::{Cooled, VhostWish};
use crate::model::{
    desired::{DesiredApp, Snapshot},
    name::{AppName, UrlPath, VirtualHost},
    proxy::{Manifest, ObservedProxy, Vhost},
    spec::Ingress,
    time::Timestamp,
};

/// Shortest time between two reloads. Each one starts new workers beside the old ones, so changes are gathered.
pub const RELOAD_GAP: Duration = Duration::from_secs(1);

/// Why nginx is given the same files again.
pub const CHANGED_BY_HAND: &str = "somebody changed the files of demae";
/// Why nginx is reloaded though nothing is new.
pub const NOT_LIVE: &str = "nginx does not answer with the live configuration";

/// How long a vhost that nginx refused is not offered again: what it refers to may have been put there meanwhile.
pub const OFFER_AGAIN: Duration = Duration::from_secs(60);

/// How long nginx waits for the first word of an instance's health: most answer in milliseconds, and one that takes its
/// time holds up nobody else.
pub const ASKED_WITHIN: Duration = Duration::from_secs(1);

/// Everything a decision about nginx is made from.
#[derive(Debug)]
pub struct ProxyInput<'a> {
    /// What each app wishes.
    pub wishes: &'a BTreeMap<AppName, VhostWish>,
    /// What nginx does.
    pub observed: &'a ObservedProxy,
    /// The last failure, if there is one.
    pub cooling: Option<&'a Cooled>,
    /// Since when an app has running instances that nobody has asked for their health yet: the last such app. What it wishes
    /// may be another thing in a moment, when it is known who is well.
    pub unasked: Option<Timestamp>,
    /// Since when a step has been held back for that.
    pub held: Option<Timestamp>,
    /// Whether a step is under way.
    pub busy: bool,
    /// Now.
    pub now: Timestamp,
}

/// Something to do to nginx.
#[derive(Debug, Clone, PartialEq)]
pub enum ProxyStep {
    /// Render this set, test it, make it live, reload, and see a worker answer with it.
    Publish(BTreeMap<AppName, Vhost>),
    /// Reload the live set, and see a worker answer with it.
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

/// The decision about nginx.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ProxyPlan {
    /// What to do.
    pub step: Option<(ProxyStep, &'static str)>,
    /// When to look again.
    pub wake: Option<Timestamp>,
    /// Since when a step is held back, since it is not known who is well.
    pub held: Option<Timestamp>,
    /// What is in the way, for the status of every app that waits for nginx.
    pub trouble: Option<String>,
}

/// Decides about nginx.
pub fn plan_proxy(input: &ProxyInput<'_>) -> ProxyPlan {
    let mut plan = ProxyPlan::default();
    let observed = input.observed;
    // What is not known cannot be kept: an app that is to stay as it is would be lost.
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
        Some(live) if is_offered_again(input, live) => {
            Some((ProxyStep::Publish(wanted), "what nginx refused may be right by now"))
        }
        Some(_) if observed.drifted => Some((ProxyStep::Publish(wanted), CHANGED_BY_HAND)),
        Some(_) if !observed.is_serving_live() => Some((ProxyStep::Reload, NOT_LIVE)),
        Some(_) => None,
    };
    let Some(step) = step else { return plan };
    if let Some(cooled) = input.cooling {
        plan.trouble = Some(cooled.error.clone());
        if cooled.until > input.now {
            plan.wake = Some(cooled.until);
            return plan;
        }
    }
    if let Some(unasked) = input.unasked {
        // Others may begin to run all the time.
        let held = input.held.unwrap_or(input.now);
        let until = unasked.min(held).plus(ASKED_WITHIN);
        if input.now < until {
            (plan.held, plan.wake) = (Some(held), Some(until));
            return plan;
        }
    }
    let due = observed.published.plus(RELOAD_GAP);
    if input.busy {
        return plan;
    }
    if due > input.now && observed.live.is_some() && input.cooling.is_none() {
        plan.wake = Some(due);
        return plan;
    }
    plan.step = Some(step);
    plan
}

/// Whether an app is served by its last good text though its value is the same, for so long that it is tried again: its
/// template, or a file that this refers to, may have been put right.
fn is_offered_again(input: &ProxyInput<'_>, live: &Manifest) -> bool {
    input.wishes.iter().any(|(app, wish)| match (wish, input.observed.rejected(app)) {
        (VhostWish::Set(vhost), Some(rejected)) => {
            rejected.vhost == *vhost
                && live.vhosts.get(app) == Some(vhost)
                && input.now >= rejected.at.plus(OFFER_AGAIN)
        }
        _ => false,
    })
}

/// The live set with all wishes in it, less those that nginx has refused.
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
                    && observed.rejected(app).is_some_and(|r| r.vhost == *vhost && input.now < r.at.plus(OFFER_AGAIN));
                if !refused {
                    wanted.insert(app.clone(), vhost.clone());
                }
            }
        }
    }
    hand_over(input, &mut wanted);
    wanted
}

/// Whether another app is served by any of these hosts, and neither gives it up now.
fn is_served_elsewhere(input: &ProxyInput<'_>, app: &AppName, vhost: &Vhost) -> bool {
    let claims: BTreeSet<_> = vhost.all().flat_map(claims).collect();
    let live = input.observed.live.iter().flat_map(|live| &live.vhosts);
    let mut kept = live.filter(|(other, _)| {
        *other != app && matches!(input.wishes.get(*other), None | Some(VhostWish::Keep | VhostWish::Announce(_)))
    });
    kept.any(|(_, v)| v.all().flat_map(self::claims).any(|claim| claims.contains(&claim)))
}

/// The hosts of a vhost, each with the path below it.
fn claims(vhost: &Vhost) -> Vec<(VirtualHost, Option<UrlPath>)> {
    vhost.hosts.iter().map(|host| (host.clone(), vhost.path.clone())).collect()
}

/// Whoever stays as it is keeps only what no other app was given: an app that is going, or that wants other hosts and has
/// nobody yet to serve them, is not served in the place of one that wants them now.
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
            let is_left = |host: &&VirtualHost| !given.contains(&((*host).clone(), way.path.clone()));
            let hosts: Vec<VirtualHost> = way.hosts.iter().filter(is_left).cloned().collect();
            (!hosts.is_empty()).then_some(Vhost { hosts, ..way })
        });
        let left = Vhost::of_ways(left);
        // It is served by its last good text then, with all of its hosts.
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
    /// Which.
    pub host: VirtualHost,
    /// The path below it, if that is all that is claimed.
    pub path: Option<UrlPath>,
    /// By whom.
    pub owner: AppName,
}

/// A host, or a path below it.
type Claim<'a> = (&'a VirtualHost, Option<&'a UrlPath>);

/// Which apps want a virtual host that belongs to another. Whoever is served keeps it; else the older app has it. The
/// loser's traffic goes on as it is.
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
            // What is kept as it is keeps its virtual hosts too.
            DesiredApp::Paused(_) | DesiredApp::Kept(_) | DesiredApp::Invalid { last_good: None, .. } => {
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
        // Whoever loses one takes no other: it is not served, so it must not keep others from being.
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
            pull_policy: spec.pull_policy,
            created,
            cordoned: false,
        })
    }

    fn served(hosts: &[&str]) -> Vhost {
        let hosts = hosts.iter().map(|host| VirtualHost::try_from(*host).expect("a host")).collect();
        Vhost {
            hosts,
            upstreams: crate::model::proxy::Upstreams::Ports(vec![20_001]),
            template: None,
            max_body_size: 0,
            read_timeout: 60,
            response_header_size: 0,
            request_buffering: true,
            path: None,
            strip_path: false,
            endpoint: None,
            more: Vec::new(),
        }
    }

    #[test]
    fn a_virtual_host_of_an_app_that_is_going_is_handed_over_at_once() {
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
            cooling: None,
            unasked: None,
            held: None,
            busy: false,
            now,
        };
        let Some((ProxyStep::Publish(next), _)) = plan_proxy(&input).step else { panic!("a set is published") };
        assert_eq!(next, BTreeMap::from([(name("b"), taker), (name("y"), served(&["y.test"]))]));
    }

    #[test]
    fn who_loses_a_virtual_host_keeps_nobody_else_from_one() {
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
