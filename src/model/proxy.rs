//! What nginx serves, as values; they are rendered to text elsewhere.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{
    name::{AppName, TemplateName, UrlPath, VirtualHost},
    observed::Via,
    spec::Endpoint,
    time::Timestamp,
};

/// One app, as nginx serves it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vhost {
    /// The host names.
    pub hosts: Vec<VirtualHost>,
    /// Where requests go.
    pub upstreams: Upstreams,
    /// A template of this host, in place of the default one.
    pub template: Option<TemplateName>,
    /// Largest request body in bytes; 0 for no limit.
    pub max_body_size: u64,
    /// Longest time between two reads from the app, in seconds.
    pub read_timeout: u64,
    /// Largest response header, in bytes.
    #[serde(default = "default_response_header_size")]
    pub response_header_size: u64,
    /// Whether nginx buffers the whole body of a request before it forwards it.
    #[serde(default = "yes")]
    pub request_buffering: bool,
    /// The path below which it is served; the whole host unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<UrlPath>,
    /// Whether that path is stripped before the request is forwarded.
    #[serde(default)]
    pub strip_path: bool,
    /// The endpoint that requests go to, if the app has several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<Endpoint>,
    /// Further vhosts of the app. None of these has more.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub more: Vec<Vhost>,
}

/// Default limit of a response header: a browser keeps at most 50 cookies of 4 KiB per site, and apps set a few at a
/// time.
pub const RESPONSE_HEADER_SIZE: u64 = 32 * 1024;

/// Sets of an earlier demae lack the field and were rendered without it; the text changes once it is rendered with this
/// value.
fn default_response_header_size() -> u64 {
    RESPONSE_HEADER_SIZE
}

fn yes() -> bool {
    true
}

impl Vhost {
    /// A vhost of these hosts with every option at its default.
    pub fn plain(hosts: Vec<VirtualHost>, upstreams: Upstreams) -> Self {
        Self {
            hosts,
            upstreams,
            template: None,
            max_body_size: 0,
            read_timeout: 60,
            response_header_size: RESPONSE_HEADER_SIZE,
            request_buffering: true,
            path: None,
            strip_path: false,
            endpoint: None,
            more: Vec::new(),
        }
    }

    /// Combines vhosts into one; `None` if there are none.
    pub fn of_ways(ways: impl IntoIterator<Item = Self>) -> Option<Self> {
        let mut ways = ways.into_iter();
        let first = ways.next()?;
        Some(Self { more: ways.collect(), ..first })
    }

    /// Each vhost of the app by itself.
    pub fn ways(&self) -> impl Iterator<Item = Self> {
        self.all().map(|v| Self { more: Vec::new(), ..v.clone() })
    }

    /// Whether it has upstreams: nginx refuses an upstream without servers.
    pub fn leads_somewhere(&self) -> bool {
        match &self.upstreams {
            Upstreams::Slots(_) => true,
            Upstreams::Ports(ports) => !ports.is_empty(),
            Upstreams::Addresses(addresses) => !addresses.is_empty(),
        }
    }

    /// All vhosts of the app, this one first.
    pub fn all(&self) -> impl Iterator<Item = &Self> {
        std::iter::once(self).chain(&self.more)
    }

    /// The virtual hosts of all of them.
    pub fn hosts(&self) -> impl Iterator<Item = &VirtualHost> {
        self.all().flat_map(|vhost| &vhost.hosts)
    }

    /// The loopback ports of its upstreams; empty if it is routed by slots.
    pub fn ports(&self) -> &[u16] {
        match &self.upstreams {
            Upstreams::Ports(ports) => ports,
            Upstreams::Slots(_) | Upstreams::Addresses(_) => &[],
        }
    }
}

/// Where the requests of an app go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Upstreams {
    /// The route symlinks 1 to n: fixed paths, whose targets change without nginx knowing.
    Slots(u16),
    /// These loopback ports.
    Ports(Vec<u16>),
    /// The stable addresses of the slots 1 to n in the kernel's table, whose targets change without nginx knowing.
    Addresses(Vec<Ipv4Addr>),
}

impl Upstreams {
    /// The number of slots of a kind.
    pub fn slots(&self, via: Via) -> u16 {
        match (self, via) {
            (Self::Slots(n), Via::Symlinks) => *n,
            (Self::Addresses(addresses), Via::Table) => u16::try_from(addresses.len()).unwrap_or(u16::MAX),
            _ => 0,
        }
    }
}

/// A set of vhosts that was made live, as stored in its directory.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Manifest {
    /// Counts up with each set.
    pub generation: u64,
    /// The vhosts.
    pub vhosts: BTreeMap<AppName, Vhost>,
    /// Rejected vhosts, so they are not retried all the time.
    pub rejected: BTreeMap<AppName, Rejected>,
    /// Digest of the templates and the profile that it was rendered with.
    pub templates: String,
    /// The host's own templates that it was rendered with: one that is gone must be noticed.
    #[serde(default)]
    pub own_templates: BTreeSet<String>,
    /// When the vhost of each app last changed or was removed.
    #[serde(default)]
    pub changed: BTreeMap<AppName, Timestamp>,
    /// Apps that changed since a worker last served a set of demae's: until a worker serves this set, their requests go
    /// to the old upstreams.
    #[serde(default)]
    pub fresh: BTreeSet<AppName>,
    /// Ports that requests of each app went to in earlier sets, newest last.
    #[serde(default)]
    pub left: BTreeMap<AppName, Vec<u16>>,
}

/// Most ports of earlier sets kept per app: more than it leaves while nginx is down.
const MAX_PREVIOUS_PORTS: usize = 256;

/// How long the removal of a vhost is remembered: longer than any drain.
const REMEMBERED: Duration = Duration::from_secs(24 * 3600);

impl Manifest {
    /// Apps whose vhosts differ between this set and these.
    pub fn changes(&self, vhosts: &BTreeMap<AppName, Vhost>) -> BTreeSet<AppName> {
        let all = self.vhosts.keys().chain(vhosts.keys());
        all.filter(|app| self.vhosts.get(*app) != vhosts.get(*app)).cloned().collect()
    }

    /// Inherits from the previous live set when each app changed, and which changes no worker has served yet.
    /// `served_since` is since when workers serve that set, if they do. All times are those of the wall clock.
    pub fn inherit(&mut self, old: &Self, served_since: Option<Timestamp>, now: Timestamp) {
        self.changed.clone_from(&old.changed);
        self.changed.retain(|app, at| self.vhosts.contains_key(app) || now.since(*at) < REMEMBERED);
        let changes = self.changes(&old.vhosts);
        self.fresh.clone_from(&changes);
        match served_since {
            // A change takes effect for requests when the set is served, not when it is written. That is later, even if
            // the clock was set back since and says otherwise.
            Some(since) => {
                for app in &old.fresh {
                    self.changed.entry(app.clone()).and_modify(|at| *at = since);
                }
            }
            None => self.fresh.extend(old.fresh.iter().cloned()),
        }
        self.left.clone_from(&old.left);
        for app in &changes {
            let ports = |set: &Self| set.vhosts.get(app).map(Vhost::ports).unwrap_or_default().to_vec();
            let (old, new) = (ports(old), ports(self));
            let left = self.left.entry(app.clone()).or_default();
            left.retain(|port| !old.contains(port));
            left.extend(old.into_iter().filter(|port| !new.contains(port)));
            left.drain(..left.len().saturating_sub(MAX_PREVIOUS_PORTS));
        }
        self.changed.extend(changes.into_iter().map(|app| (app, now)));
        self.left.retain(|app, left| !left.is_empty() && self.changed.contains_key(app));
    }
}

/// A vhost that nginx or its template rejected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rejected {
    /// The rejected vhost.
    pub vhost: Vhost,
    /// The error.
    pub error: String,
    /// When it was rejected.
    #[serde(default)]
    pub at: Timestamp,
}

/// The observed state of nginx.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ObservedProxy {
    /// The live set, if there is one.
    pub live: Option<Manifest>,
    /// When it was made live.
    pub published: Timestamp,
    /// The generation that a worker last answered with.
    pub serving: Option<u64>,
    /// Why no worker answered.
    pub error: Option<String>,
    /// Whether the live set exists and is unreadable: then nothing is known about it.
    pub unreadable: bool,
    /// Whether files of the live set were changed by hand.
    pub drifted: bool,
    /// Digest of the templates and the profile of this agent.
    pub templates: String,
    /// Number of workers that serve, or may serve, an older set; `None` if unknown, which is not zero.
    pub old_workers: Option<usize>,
    /// Since when the current workers take requests.
    pub workers_since: Timestamp,
    /// Whether a change of nginx began since: then this is the state before it.
    pub changing: bool,
}

impl ObservedProxy {
    /// Whether the live set is the one being served, as far as known.
    pub fn is_serving_live(&self) -> bool {
        !self.changing && self.live.as_ref().is_some_and(|m| self.serving == Some(m.generation))
    }

    /// The generation of the live set, unless it is being changed.
    pub fn generation(&self) -> Option<u64> {
        self.live.as_ref().filter(|_| !self.changing).map(|m| m.generation)
    }

    /// Number of apps that another set of vhosts would change.
    pub fn changes_to(&self, wanted: &BTreeMap<AppName, Vhost>) -> usize {
        self.live.as_ref().map_or(wanted.len(), |live| live.changes(wanted).len())
    }

    /// The live vhost of an app.
    pub fn vhost(&self, app: &AppName) -> Option<&Vhost> {
        self.live.as_ref()?.vhosts.get(app)
    }

    /// When the vhost of an app last changed or was removed for the workers that take requests: drains count from then.
    /// Meaningless while the live set is not served.
    pub fn changed(&self, app: &AppName) -> Timestamp {
        let made = self.live.as_ref().and_then(|m| m.changed.get(app)).copied().unwrap_or(self.published);
        let fresh = self.live.as_ref().is_some_and(|m| m.fresh.contains(app));
        if fresh { made.max(self.workers_since) } else { made }
    }

    /// Ports that requests of an app went to in earlier sets. `None` if unknown: a set that is being published may use
    /// any.
    pub fn previous_ports(&self, app: &AppName) -> Option<&[u16]> {
        let live = self.live.as_ref().filter(|_| !self.changing)?;
        Some(live.left.get(app).map(Vec::as_slice).unwrap_or_default())
    }

    /// The rejection of the last vhost of an app.
    pub fn rejected(&self, app: &AppName) -> Option<&Rejected> {
        self.live.as_ref()?.rejected.get(app)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drain_starts_when_late_set_is_served_even_if_clock_was_set_back() {
        let app = AppName::try_from("web").expect("a name");
        let at = Timestamp::from_millis;
        let vhost = |port| Vhost::plain(Vec::new(), Upstreams::Ports(vec![port]));
        let set = |port| Manifest { vhosts: [(app.clone(), vhost(port))].into(), ..Manifest::default() };
        let (mut first, mut second, mut third) = (set(1), set(2), set(2));
        first.inherit(&Manifest::default(), None, at(1_000));
        second.inherit(&first, Some(at(1_000)), at(9_000));
        assert_eq!((second.changed[&app], second.fresh.contains(&app)), (at(9_000), true));
        // The clock was set back by 5 s, and a worker serves it only now.
        third.inherit(&second, Some(at(6_000)), at(7_000));
        assert_eq!((third.changed[&app], third.fresh.contains(&app)), (at(6_000), false));
        assert_eq!(third.left[&app], [1], "nothing has left since");
        let mut unserved = set(2);
        unserved.inherit(&second, None, at(7_000));
        assert_eq!((unserved.changed[&app], unserved.fresh.contains(&app)), (at(9_000), true));
    }
}
