//! The spec of an app: the checked form of `apps/<app>/spec`.
//!
//! A [`Spec`] is only created by [`Spec::parse`], which reports every problem of a text, not the first.

mod compose;
mod edit;
mod fields;
mod read;
mod update;
mod values;
pub use edit::with_replicas;
pub use update::{Amount, FailureAction, MONITOR, Update};
pub use values::MOUNTABLE;

use std::{collections::BTreeMap, time::Duration};

use serde::Serialize;

use super::{
    env::Secret,
    name::{EnvName, ImageRef, SetName, TemplateName, UrlPath, VirtualHost},
    problem::Problems,
};

/// The JSON Schema (draft 2020-12) of a spec. A test ensures that it has the same keys as the reader.
pub const SCHEMA: &str = include_str!("spec.schema.json");

/// The spec of an app.
#[derive(Debug, Clone, PartialEq)]
pub struct Spec {
    /// The image, unless `apps/<app>/image` names another.
    pub image: Option<ImageRef>,
    /// Settings of its containers.
    pub container: ContainerSpec,
    /// Variables in the spec itself.
    pub environment: BTreeMap<EnvName, Secret>,
    /// Sets of variables, in order; later values win.
    pub env_from: Vec<SetName>,
    /// When an instance counts as healthy.
    pub health: HealthCheck,
    /// How requests reach it; a worker has none.
    pub ingress: Option<Ingress>,
    /// When the image is pulled.
    pub pull_policy: PullPolicy,
    /// Runs once for each release in the fleet, before the first host starts it.
    pub release_command: Option<Vec<String>>,
    /// Where it runs, how many, and in what order it is replaced.
    pub deploy: Deploy,
}

impl Spec {
    /// Parses and checks a YAML or JSON text.
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
    /// `bridge` unless given: `none`, a network that exists, or `host`, which a host allows only by its policy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// Lines for `/etc/hosts`, `name:address`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub extra_hosts: Vec<String>,
    /// Labels of the container, beside demae's own.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Dropped capabilities.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cap_drop: Vec<String>,
    /// Whether the root file system is read-only.
    pub read_only: bool,
    /// Whether Docker's init process is PID 1. True by default: most programs ignore TERM as PID 1.
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
    /// The signal that asks the app to exit; TERM unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<String>,
    /// Time to exit before it is killed.
    pub stop_grace_period: Duration,
    /// Its own host name; Docker's unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// Addresses of name servers; Docker's unless given.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub dns: Vec<String>,
    /// Further groups of its user.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub group_add: Vec<String>,
    /// Whether no process may get more rights than it was started with.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub no_new_privileges: bool,
    /// Size of `/dev/shm`, in bytes; Docker's 64 MiB unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shm_size: Option<i64>,
    /// Limits of its processes, by Docker's names.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub ulimits: BTreeMap<String, Ulimit>,
    /// Added capabilities, in upper case and without `CAP_`. A host allows none, unless its policy does.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cap_add: Vec<String>,
    /// Devices of the host. It allows none, unless its policy does.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<Device>,
    /// Settings of the kernel for its namespaces. A host allows none, unless its policy does.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub sysctls: BTreeMap<String, String>,
}

/// A device of the host in a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Device {
    /// Its path on the host, below `/dev`.
    pub host: String,
    /// Its path inside the container.
    pub container: String,
    /// Of `r`, `w` and `m`.
    pub permissions: String,
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}:{}", self.host, self.container, self.permissions)
    }
}

/// A limit of a process, as setrlimit(2) has it; -1 for none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Ulimit {
    /// What a process gets.
    pub soft: i64,
    /// Up to where it may raise that.
    pub hard: i64,
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
    /// An absolute path on the host. It must exist: demae creates no directories that it does not own.
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

/// The health check of an instance. Names are Compose's; the defaults are shorter, for a deploy.
#[derive(Debug, Clone, PartialEq, Serialize, serde::Deserialize)]
pub struct HealthCheck {
    /// The kind of probe.
    pub probe: Probe,
    /// Interval between two checks of an instance in service.
    pub interval: Duration,
    /// Timeout of one probe.
    pub timeout: Duration,
    /// Consecutive failures that make an instance unhealthy.
    pub retries: u32,
    /// Failures in this time after the start do not count.
    pub start_period: Duration,
    /// Interval between two checks of an instance that has not been healthy yet.
    pub start_interval: Duration,
    /// Consecutive successes that make an instance healthy.
    pub successes: u32,
    /// The `Host` of an `http` check, in place of the app's first virtual host.
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
    /// Time from its start until an instance must be healthy: the start period, then the tolerated failures. There is
    /// always such a deadline.
    pub fn deadline(&self) -> Duration {
        // A label of a container may be from another version and hold any value.
        self.start_period.saturating_add(self.interval.saturating_mul(self.retries))
    }
}

/// A kind of probe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Probe {
    /// `GET` of this path over the instance's socket or port; any 2xx or 3xx answer is a success.
    Http(String),
    /// The socket or port accepts a connection.
    Tcp,
    /// Docker's own check: a command inside the container, as Compose's `test`.
    Command(Vec<String>),
    /// The container has been running for [`SETTLE`].
    Running,
}

/// How long a container without a check must run to count as healthy: long enough to notice a program that exits at
/// once.
pub const SETTLE: Duration = Duration::from_secs(2);

/// How requests reach an app.
#[derive(Debug, Clone, PartialEq)]
pub struct Ingress {
    /// Its host names.
    pub hosts: Vec<VirtualHost>,
    /// Where it listens.
    pub endpoint: Endpoint,
    /// Longest wait for requests in flight when an instance is retired.
    pub drain: Duration,
    /// A template of this host, in place of the default one.
    pub template: Option<TemplateName>,
    /// Largest request body in bytes; 0 for no limit.
    pub max_body_size: u64,
    /// Longest time between two reads from the app.
    pub read_timeout: Duration,
    /// Largest response header, in bytes.
    pub response_header_size: u64,
    /// Whether nginx buffers the whole body of a request before it forwards it.
    pub request_buffering: bool,
    /// The path below which it is served; the whole host unless given.
    pub path: Option<UrlPath>,
    /// Whether that path is stripped before the request is forwarded.
    pub strip_path: bool,
    /// Further ingresses, each with its own hosts and endpoint. None of them has more.
    pub more: Vec<Ingress>,
}

impl Ingress {
    /// All ingresses, this one first.
    pub fn all(&self) -> impl Iterator<Item = &Self> + Clone {
        std::iter::once(self).chain(&self.more)
    }

    /// The further endpoints of the app, each once.
    pub fn more_endpoints(&self) -> Vec<Endpoint> {
        let mut found: Vec<Endpoint> = Vec::new();
        for ingress in &self.more {
            if ingress.endpoint != self.endpoint && !found.contains(&ingress.endpoint) {
                found.push(ingress.endpoint.clone());
            }
        }
        found
    }

    /// All endpoints of the app, each once.
    pub fn endpoints(&self) -> Vec<Endpoint> {
        std::iter::once(self.endpoint.clone()).chain(self.more_endpoints()).collect()
    }

    /// The longest drain time of its ingresses.
    pub fn longest_drain(&self) -> Duration {
        self.all().map(|i| i.drain).max().unwrap_or_default()
    }

    /// One of its hosts; that of a catch-all only if there is no other.
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

/// When the image is pulled.
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
    /// A host runs the app only if all of them hold.
    pub constraints: Vec<Constraint>,
    /// Whether a replacement starts or stops first.
    pub order: Order,
    /// How a release goes over the hosts of a fleet.
    pub update: Update,
}

impl Default for Deploy {
    fn default() -> Self {
        Self { replicas_per_host: 1, constraints: Vec::new(), order: Order::StartFirst, update: Update::default() }
    }
}

/// The order of a replacement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// The new one starts beside the old one. No request is lost.
    StartFirst,
    /// The old one stops, then the new one starts: for apps that must not run twice.
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
    /// Whether a host with these labels satisfies it. A missing label equals nothing.
    pub fn holds(&self, labels: &BTreeMap<String, String>) -> bool {
        (labels.get(&self.label) == Some(&self.value)) == self.equal
    }
}

impl std::fmt::Display for Constraint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {}", self.label, if self.equal { "==" } else { "!=" }, self.value)
    }
}
