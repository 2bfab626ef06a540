//! What an operator writes about an app: the checked form of `apps/<app>/spec`.
//!
//! A [`Spec`] only comes out of [`Spec::parse`], which reports every problem of a text, not the first.

mod fields;
mod read;
mod values;
pub use values::MOUNTABLE;

use std::{collections::BTreeMap, time::Duration};

use serde::Serialize;

use super::{
    env::Secret,
    name::{EnvName, ImageRef, SetName, TemplateName, UrlPath, VirtualHost},
    problem::Problems,
};

/// The JSON Schema (draft 2020-12) of a spec. A test holds it and the reader to the same keys.
pub const SCHEMA: &str = include_str!("spec.schema.json");

/// An app as its operator wants it.
#[derive(Debug, Clone, PartialEq)]
pub struct Spec {
    /// The image, unless `apps/<app>/image` names another.
    pub image: Option<ImageRef>,
    /// What containers are made from.
    pub container: ContainerSpec,
    /// Values written in the spec itself.
    pub environment: BTreeMap<EnvName, Secret>,
    /// Sets whose variables the app takes, in order; a later one wins.
    pub env_from: Vec<SetName>,
    /// When an instance counts as healthy.
    pub health: HealthCheck,
    /// How requests reach it; a worker has none.
    pub ingress: Option<Ingress>,
    /// When the image is asked for at its registry.
    pub pull_policy: PullPolicy,
    /// Where it runs, how many, and in what order it is replaced.
    pub deploy: Deploy,
}

impl Spec {
    /// Reads and checks a YAML or JSON text.
    ///
    /// # Errors
    /// Every problem found, in the order of the text.
    pub fn parse(text: &[u8]) -> Result<Self, Problems> {
        read::spec(text)
    }
}

/// The part of a spec that a container is created from, in Docker's terms. All of it is in the identity of a release.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct ContainerSpec {
    /// Replaces the command of the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command: Option<Vec<String>>,
    /// Replaces the entry point of the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    /// `user`, `user:group` or their numbers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Working directory inside the container.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub working_dir: Option<String>,
    /// Mounts.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<Volume>,
    /// Paths inside the container that are kept in memory.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tmpfs: Vec<String>,
    /// `bridge` unless given: `none`, or a network that exists.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// Lines for `/etc/hosts`, `name:address`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub extra_hosts: Vec<String>,
    /// Labels of the container, beside demae's own.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Capabilities taken away.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cap_drop: Vec<String>,
    /// Whether the root file system is read-only.
    pub read_only: bool,
    /// Whether Docker's small init process is PID 1. True unless said otherwise: most programs ignore TERM as PID 1.
    pub init: bool,
    /// Most memory, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<i64>,
    /// Most CPU, in billionths of a core.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nano_cpus: Option<i64>,
    /// Most processes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pids: Option<i64>,
    /// The logging driver and its options; json-file with rotation unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logging: Option<Logging>,
    /// The signal that asks the app to end; TERM unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<String>,
    /// How long it may take to end before it is killed.
    pub stop_grace_period: Duration,
}

/// A mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Volume {
    /// A path on the host, or the name of a Docker volume.
    pub source: VolumeSource,
    /// An absolute path inside the container.
    pub target: String,
    /// Whether the container may only read it.
    pub read_only: bool,
}

/// Where a mount comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum VolumeSource {
    /// An absolute path on the host. It must exist: demae creates no directories it cannot own.
    Host(String),
    /// A named Docker volume.
    Named(String),
}

/// A logging driver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Logging {
    /// Its name.
    pub driver: String,
    /// Its options.
    pub options: BTreeMap<String, String>,
}

/// How an instance is asked whether it is well. Compose's names; the defaults are shorter, for a deploy.
#[derive(Debug, Clone, PartialEq, Serialize, serde::Deserialize)]
pub struct HealthCheck {
    /// What is asked.
    pub probe: Probe,
    /// Between two checks of an instance that is in service.
    pub interval: Duration,
    /// How long one answer may take.
    pub timeout: Duration,
    /// This many failures in a row make an instance unhealthy.
    pub retries: u32,
    /// Failures in this time after the start do not count.
    pub start_period: Duration,
    /// Between two checks of an instance that has not been healthy yet.
    pub start_interval: Duration,
    /// This many successes in a row make an instance healthy.
    pub successes: u32,
    /// The host that `http` asks for, in place of the app's first virtual host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
}

impl Default for HealthCheck {
    fn default() -> Self {
        Self {
            probe: Probe::Running,
            interval: Duration::from_secs(5),
            timeout: Duration::from_secs(2),
            retries: 3,
            start_period: Duration::from_secs(30),
            start_interval: Duration::from_millis(20),
            successes: 2,
            host: None,
        }
    }
}

impl HealthCheck {
    /// How long after its start an instance may take to become healthy: the start period, then the failures that are
    /// forgiven. There is always such a deadline.
    pub fn deadline(&self) -> Duration {
        // What a label of a container says was not read by this demae.
        self.start_period.saturating_add(self.interval.saturating_mul(self.retries))
    }
}

/// What is asked to learn whether an instance is well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Probe {
    /// `GET` of this path over the instance's socket or port; any 2xx or 3xx answer is a success.
    Http(String),
    /// That the socket or port takes a connection.
    Tcp,
    /// Docker's own check: a command inside the container, as Compose's `test`.
    Command(Vec<String>),
    /// That the container runs, and has run for [`SETTLE`].
    Running,
}

/// How long a container without any check must have run to count as healthy. Long enough to see a program that ends
/// at once, which is what the wait is for.
pub const SETTLE: Duration = Duration::from_secs(2);

/// How requests reach an app.
#[derive(Debug, Clone, PartialEq)]
pub struct Ingress {
    /// The host names it answers to.
    pub hosts: Vec<VirtualHost>,
    /// Where it listens.
    pub endpoint: Endpoint,
    /// Longest wait for requests that are under way when an instance leaves.
    pub drain: Duration,
    /// A template of this host, in place of the default one.
    pub template: Option<TemplateName>,
    /// Largest request body in bytes; 0 for no limit.
    pub max_body_size: u64,
    /// Longest time between two reads from the app.
    pub read_timeout: Duration,
    /// Largest headers of an answer, in bytes.
    pub response_header_size: u64,
    /// Whether nginx reads the whole body of a request before the app sees any of it.
    pub request_buffering: bool,
    /// The path below which it is served; the whole host unless given.
    pub path: Option<UrlPath>,
    /// Whether the app gets the path without that.
    pub strip_path: bool,
    /// Further ways in, each with hosts and an endpoint of its own. None of them has more.
    pub more: Vec<Ingress>,
}

impl Ingress {
    /// Every way in, this one first.
    pub fn all(&self) -> impl Iterator<Item = &Self> + Clone {
        std::iter::once(self).chain(&self.more)
    }

    /// Where else the app listens, each endpoint once.
    pub fn more_endpoints(&self) -> Vec<Endpoint> {
        let mut found: Vec<Endpoint> = Vec::new();
        for ingress in &self.more {
            if ingress.endpoint != self.endpoint && !found.contains(&ingress.endpoint) {
                found.push(ingress.endpoint.clone());
            }
        }
        found
    }

    /// Everywhere the app listens, each endpoint once.
    pub fn endpoints(&self) -> Vec<Endpoint> {
        std::iter::once(self.endpoint.clone()).chain(self.more_endpoints()).collect()
    }

    /// The longest time that requests may take to leave an instance.
    pub fn longest_drain(&self) -> Duration {
        self.all().map(|i| i.drain).max().unwrap_or_default()
    }

    /// A host that it answers to; one for all other hosts only if there is no other.
    pub fn example_host(&self) -> Option<String> {
        let host = self.hosts.iter().find(|h| !h.is_catch_all()).or(self.hosts.first());
        host.map(VirtualHost::example)
    }
}

/// Where an app listens, inside its container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Endpoint {
    /// A unix socket at this absolute path.
    Socket(String),
    /// A TCP port.
    Port(u16),
}

/// When the image is asked for at its registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PullPolicy {
    /// If it is not on the host.
    #[default]
    Missing,
    /// At each new release.
    Always,
    /// Never: it is loaded by other means.
    Never,
}

/// Where an app runs, how many, and in what order it is replaced.
#[derive(Debug, Clone, PartialEq)]
pub struct Deploy {
    /// Instances on each host.
    pub replicas_per_host: u16,
    /// All must hold for a host to run the app.
    pub constraints: Vec<Constraint>,
    /// Whether the new instance starts beside the old one.
    pub order: Order,
}

impl Default for Deploy {
    fn default() -> Self {
        Self { replicas_per_host: 1, constraints: Vec::new(), order: Order::StartFirst }
    }
}

/// Which comes first when an instance is replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// The new one starts beside the old one. No request is lost.
    StartFirst,
    /// The old one stops, then the new one starts: for apps of which two must not run.
    StopFirst,
}

/// A condition on the labels of a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Constraint {
    /// The label.
    pub label: String,
    /// The value it is compared with.
    pub value: String,
    /// Whether it must be equal (`==`) or must not (`!=`).
    pub equal: bool,
}

impl Constraint {
    /// Whether a host with these labels satisfies it. A label that is not there is equal to nothing.
    pub fn holds(&self, labels: &BTreeMap<String, String>) -> bool {
        (labels.get(&self.label) == Some(&self.value)) == self.equal
    }
}

impl std::fmt::Display for Constraint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {}", self.label, if self.equal { "==" } else { "!=" }, self.value)
    }
}
