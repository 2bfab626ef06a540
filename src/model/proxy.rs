//! What nginx is asked to serve: values only. Text is made of them elsewhere.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{
    name::{AppName, TemplateName, UrlPath, VirtualHost},
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
    /// Largest headers of an answer, in bytes.
    #[serde(default = "default_response_header_size")]
    pub response_header_size: u64,
    /// Whether nginx reads the whole body of a request before the app sees any of it.
    #[serde(default = "yes")]
    pub request_buffering: bool,
    /// The path below which it is served; the whole host unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<UrlPath>,
    /// Whether the app gets the path without that.
    #[serde(default)]
    pub strip_path: bool,
    /// Which of the places where the app listens requests go to, if there are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<Endpoint>,
    /// What else is served of the app. None of these has more.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub more: Vec<Vhost>,
}

/// Largest headers of an answer unless the spec says otherwise: a browser keeps 50 cookies of 4 KiB for a site at most, and
/// apps set a few at a time.
pub const RESPONSE_HEADER_SIZE: u64 = 32 * 1024;

/// Sets of an earlier demae do not say. nginx was left to its own then, which makes the text another one; the value is
/// what it is rendered with now.
fn default_response_header_size() -> u64 {
    RESPONSE_HEADER_SIZE
}

fn yes() -> bool {
    true
}

impl Vhost {
    /// All of these as one; nothing if there are none.
    pub fn of_ways(ways: impl IntoIterator<Item = Self>) -> Option<Self> {
        let mut ways = ways.into_iter();
        let first = ways.next()?;
        Some(Self { more: ways.collect(), ..first })
    }

    /// Each way into the app by itself.
    pub fn ways(&self) -> impl Iterator<Item = Self> {
        self.all().map(|v| Self { more: Vec::new(), ..v.clone() })
    }

    /// Whether requests go anywhere: nginx refuses an upstream without servers.
    pub fn leads_somewhere(&self) -> bool {
        !matches!(&self.upstreams, Upstreams::Ports(ports) if ports.is_empty())
    }

    /// Everything that is served of the app, this first.
    pub fn all(&self) -> impl Iterator<Item = &Self> {
        std::iter::once(self).chain(&self.more)
    }

    /// The loopback ports that requests go to; none where they go by routes.
    pub fn ports(&self) -> &[u16] {
        match &self.upstreams {
            Upstreams::Ports(ports) => ports,
            Upstreams::Slots(_) => &[],
        }
    }
}

/// Where the requests of an app go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Upstreams {
    /// To the route symlinks 1 to n: fixed paths, whose targets change without nginx knowing.
    Slots(u16),
    /// To these loopback ports.
    Ports(Vec<u16>),
}

/// A set of vhosts that was made live, as the directory it lives in tells.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Manifest {
    /// Counts up with each set.
    pub generation: u64,
    /// What is served.
    pub vhosts: BTreeMap<AppName, Vhost>,
    /// What nginx refused, so that it is not offered again and again.
    pub rejected: BTreeMap<AppName, Rejected>,
    /// Stands for the templates and the profile the text was made with.
    pub templates: String,
    /// Templates of the host's own that its texts were made with. One that is gone is not taken for one that was never
    /// there.
    #[serde(default)]
    pub own_templates: BTreeSet<String>,
    /// When the vhost of an app last changed, or went.
    #[serde(default)]
    pub changed: BTreeMap<AppName, Timestamp>,
    /// Apps that changed since a worker last served a set of demae's: until one serves this, requests go where they went.
    #[serde(default)]
    pub fresh: BTreeSet<AppName>,
    /// Ports that requests of an app went to in earlier sets, the last one last.
    #[serde(default)]
    pub left: BTreeMap<AppName, Vec<u16>>,
}

/// How many ports of earlier sets are remembered of an app: more than it leaves while nginx is away.
const LEFT: usize = 256;

/// How long it is remembered when the vhost of an app went: longer than anything drains.
const REMEMBERED: Duration = Duration::from_secs(24 * 3600);

impl Manifest {
    /// Apps whose vhosts are others in this set than among these.
    pub fn changes(&self, vhosts: &BTreeMap<AppName, Vhost>) -> BTreeSet<AppName> {
        let all = self.vhosts.keys().chain(vhosts.keys());
        all.filter(|app| self.vhosts.get(*app) != vhosts.get(*app)).cloned().collect()
    }

    /// Takes over from the live set, made before this one, when each app changed, and what of that no worker has served
    /// yet. `served_since` is since when workers serve the live set, if they do. All times are those of the wall clock.
    pub fn follow(&mut self, old: &Self, served_since: Option<Timestamp>, now: Timestamp) {
        self.changed.clone_from(&old.changed);
        self.changed.retain(|app, at| self.vhosts.contains_key(app) || now.since(*at) < REMEMBERED);
        let changes = self.changes(&old.vhosts);
        self.fresh.clone_from(&changes);
        match served_since {
            // What changed in that set did so for requests when it was served, not when it was written. That is later, even
            // if the clock was set back since and says otherwise.
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
            left.drain(..left.len().saturating_sub(LEFT));
        }
        self.changed.extend(changes.into_iter().map(|app| (app, now)));
        self.left.retain(|app, left| !left.is_empty() && self.changed.contains_key(app));
    }
}

/// A vhost that nginx, or its template, refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rejected {
    /// What was offered.
    pub vhost: Vhost,
    /// Why it was refused.
    pub error: String,
    /// When.
    #[serde(default)]
    pub at: Timestamp,
}

/// What is known of nginx.
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
    /// Whether there is a live set that cannot be read: then nothing of it is known.
    pub unreadable: bool,
    /// Whether files of the live set are not as they were written.
    pub drifted: bool,
    /// Stands for the templates and the profile of this agent.
    pub templates: String,
    /// Workers that serve, or may serve, an older set; `None` where they cannot be counted, which is not none.
    pub old_workers: Option<usize>,
    /// Since when there are workers that take new requests.
    pub workers_since: Timestamp,
    /// Whether nginx is being changed since: then this is what was.
    pub changing: bool,
}

impl ObservedProxy {
    /// Whether the live set is the one that is served, as far as that can be told now.
    pub fn is_serving_live(&self) -> bool {
        !self.changing && self.live.as_ref().is_some_and(|m| self.serving == Some(m.generation))
    }

    /// How many apps are served otherwise by another set of vhosts.
    pub fn changes_to(&self, wanted: &BTreeMap<AppName, Vhost>) -> usize {
        self.live.as_ref().map_or(wanted.len(), |live| live.changes(wanted).len())
    }

    /// The live vhost of an app.
    pub fn vhost(&self, app: &AppName) -> Option<&Vhost> {
        self.live.as_ref()?.vhosts.get(app)
    }

    /// When the vhost of an app last changed, or went, for the workers that take requests; whoever left it then began to
    /// drain. Means nothing while the live set is not served.
    pub fn changed(&self, app: &AppName) -> Timestamp {
        let made = self.live.as_ref().and_then(|m| m.changed.get(app)).copied().unwrap_or(self.published);
        let fresh = self.live.as_ref().is_some_and(|m| m.fresh.contains(app));
        if fresh { made.max(self.workers_since) } else { made }
    }

    /// Ports that requests of an app went to in earlier sets. `None` where that is not known: a set that is being made may
    /// lead anywhere.
    pub fn left(&self, app: &AppName) -> Option<&[u16]> {
        let live = self.live.as_ref().filter(|_| !self.changing)?;
        Some(live.left.get(app).map(Vec::as_slice).unwrap_or_default())
    }

    /// Why the last vhost of an app was refused.
    pub fn rejected(&self, app: &AppName) -> Option<&Rejected> {
        self.live.as_ref()?.rejected.get(app)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_left_a_set_that_was_served_late_began_to_drain_then_whatever_the_clock_says() {
        let app = AppName::try_from("web").expect("a name");
        let at = Timestamp::from_millis;
        let vhost = |port| Vhost {
            hosts: Vec::new(),
            upstreams: Upstreams::Ports(vec![port]),
            template: None,
            max_body_size: 0,
            read_timeout: 60,
            response_header_size: RESPONSE_HEADER_SIZE,
            request_buffering: true,
            path: None,
            strip_path: false,
            endpoint: None,
            more: Vec::new(),
        };
        let set = |port| Manifest { vhosts: [(app.clone(), vhost(port))].into(), ..Manifest::default() };
        let (mut first, mut second, mut third) = (set(1), set(2), set(2));
        first.follow(&Manifest::default(), None, at(1_000));
        second.follow(&first, Some(at(1_000)), at(9_000));
        assert_eq!((second.changed[&app], second.fresh.contains(&app)), (at(9_000), true));
        // The clock was set back by 5 s, and a worker serves it only now.
        third.follow(&second, Some(at(6_000)), at(7_000));
        assert_eq!((third.changed[&app], third.fresh.contains(&app)), (at(6_000), false));
        assert_eq!(third.left[&app], [1], "nothing has left since");
        let mut unserved = set(2);
        unserved.follow(&second, None, at(7_000));
        assert_eq!((unserved.changed[&app], unserved.fresh.contains(&app)), (at(9_000), true));
    }
}
