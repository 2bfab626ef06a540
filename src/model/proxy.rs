//! What nginx is asked to serve: values only. Text is made of them elsewhere.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{
    name::{AppName, TemplateName, VirtualHost},
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
    /// When the vhost of an app last changed, or went.
    #[serde(default)]
    pub changed: BTreeMap<AppName, Timestamp>,
    /// Apps that changed since a worker last served a set of demae's: until one serves this, requests go where they went.
    #[serde(default)]
    pub fresh: BTreeSet<AppName>,
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
    /// Workers that serve, or may serve, an older set.
    pub old_workers: usize,
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
        let nothing = BTreeMap::new();
        let live = self.live.as_ref().map_or(&nothing, |m| &m.vhosts);
        let changed = wanted.iter().filter(|(app, vhost)| live.get(*app) != Some(vhost)).count();
        changed + live.keys().filter(|app| !wanted.contains_key(*app)).count()
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

    /// Why the last vhost of an app was refused.
    pub fn rejected(&self, app: &AppName) -> Option<&Rejected> {
        self.live.as_ref()?.rejected.get(app)
    }
}
