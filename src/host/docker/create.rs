//! From a release to the body of Docker's create call.

use std::collections::{BTreeMap, HashMap};

use bollard::{
    models::{
        ContainerCreateBody, DeviceMapping, HealthConfig, HostConfig, HostConfigLogConfig, Mount, MountType,
        PortBinding, ResourcesUlimits, RestartPolicy, RestartPolicyNameEnum,
    },
    query_parameters::CreateContainerOptionsBuilder,
};

use super::{Docker, DockerError, Operation, Own, OwnAddress, label, network::networking};
use crate::model::{
    name::{AppName, ContainerId, HostName},
    observed::InstanceKey,
    release::Release,
    spec::{Device, Endpoint, Probe, Ulimit, VolumeSource},
    text::json,
};

/// Everything that a container is created from.
#[derive(Debug)]
pub struct CreateRequest<'a> {
    /// The app.
    pub app: &'a AppName,
    /// Which instance.
    pub key: &'a InstanceKey,
    /// The release.
    pub release: &'a Release,
    /// The image id that the release resolved to.
    pub image: &'a str,
    /// The host directory for its socket.
    pub socket_dir: Option<&'a str>,
    /// The loopback port that its port is published on.
    pub port: Option<u16>,
    /// Its own address, in place of a published port.
    pub own_address: Option<&'a OwnAddress>,
    /// The network that it joins without an address of its own, unless its spec names one.
    pub shared_network: Option<&'a str>,
    /// What the paths of the host in its volumes lead to.
    pub real_paths: &'a BTreeMap<String, String>,
    /// Loopback ports that its other ports are published on, in their order.
    pub more_ports: &'a [u16],
    /// Its drain time.
    pub drain: std::time::Duration,
    /// The `Host` header of its health check, unless the check sets one.
    pub check_host: Option<&'a str>,
}

/// The owner of a container name that was refused as taken.
enum NameOwner {
    /// The requested container exists already.
    SameInstance,
    /// Another container.
    OtherContainer,
    /// No visible container.
    NotVisible,
}

impl Docker {
    /// Creates a container beside whatever runs. Returns `None` if there is one with the same labels already, whose ports may
    /// be others.
    ///
    /// # Errors
    /// If the engine cannot. If another container has the name, a different one is tried. A taken name without a
    /// visible container is an error: an earlier agent's create call may still be in flight under that name.
    pub async fn create(&self, request: &CreateRequest<'_>) -> Result<Option<ContainerId>, DockerError> {
        let body = ContainerCreateBody { labels: Some(self.labels(request)), ..Self::body(&self.host, request) };
        let network = network_of(request).filter(|n| request.release.container.network.as_deref() != Some(n));
        let (app, image) = (request.app, &request.release.image);
        self.judge(&body, Own { app, image, dir: request.socket_dir, network })?;
        let base = format!("demae.{}.{}.{}", self.host, request.app, request.key);
        for attempt in 0..10 {
            let name = if attempt == 0 { base.clone() } else { format!("{base}.{attempt}") };
            let options = CreateContainerOptionsBuilder::default().name(&name).build();
            match self.call(Operation::Create, |client| client.create_container(Some(options), body.clone())).await {
                Ok(created) => return id(&created.id).map(Some),
                Err(e) if e.is_status(409) => match self.owner(&name, request).await? {
                    NameOwner::SameInstance => return Ok(None),
                    NameOwner::NotVisible => return Err(e),
                    NameOwner::OtherContainer => {
                        tracing::warn!("container name `{name}` belongs to another container; trying the next one");
                    }
                },
                Err(e) => return Err(e),
            }
        }
        Err(DockerError::Refused {
            operation: Operation::Create,
            status: 409,
            message: format!("`{base}` and nine names after it belong to other containers"),
        })
    }

    /// The owner of this name, by the container's labels.
    async fn owner(&self, name: &str, request: &CreateRequest<'_>) -> Result<NameOwner, DockerError> {
        let found = match self.call(Operation::Inspect, |client| client.inspect_container(name, None)).await {
            Ok(found) => found,
            // The name is reserved before the container is visible, and still after its removal.
            Err(e) if e.is_status(404) => return Ok(NameOwner::NotVisible),
            Err(e) => return Err(e),
        };
        let labels = found.config.and_then(|c| c.labels).unwrap_or_default();
        // These may differ between two calls for the same instance.
        let varies = |name: &str| {
            [label::PORT, label::MORE_PORTS, label::ADDRESS, label::CHECK_HOST, label::REAL_PATHS].contains(&name)
        };
        let same = self.labels(request).iter().all(|(k, v)| varies(k) || labels.get(k) == Some(v));
        Ok(if same { NameOwner::SameInstance } else { NameOwner::OtherContainer })
    }

    fn labels(&self, r: &CreateRequest<'_>) -> HashMap<String, String> {
        let mut labels = Self::labels_of(&self.host, r);
        labels.extend(self.owner.iter().map(|owner| (label::AGENT.to_owned(), owner.id().to_owned())));
        labels
    }

    fn labels_of(host: &HostName, r: &CreateRequest<'_>) -> HashMap<String, String> {
        let mut labels: HashMap<String, String> =
            r.release.container.labels.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
        labels.extend([
            (label::HOST.to_owned(), host.to_string()),
            (label::APP.to_owned(), r.app.to_string()),
            (label::RELEASE.to_owned(), r.key.release.to_string()),
            (label::NUMBER.to_owned(), r.key.number.to_string()),
            (label::DRAIN.to_owned(), r.drain.as_millis().to_string()),
            (label::IMAGE.to_owned(), r.release.image.to_string()),
            (label::HEALTH.to_owned(), json(&r.release.health)),
        ]);
        if let Some(port) = r.port {
            labels.insert(label::PORT.to_owned(), port.to_string());
        }
        if let Some(own) = r.own_address {
            labels.insert(label::ADDRESS.to_owned(), own.ip.to_string());
        }
        if !r.more_ports.is_empty() {
            let ports: Vec<String> = r.more_ports.iter().map(u16::to_string).collect();
            labels.insert(label::MORE_PORTS.to_owned(), ports.join(","));
        }
        if !r.release.more_endpoints.is_empty() {
            let endpoints = json(&r.release.more_endpoints);
            labels.insert(label::MORE_ENDPOINTS.to_owned(), endpoints);
        }
        if !r.real_paths.is_empty() {
            labels.insert(label::REAL_PATHS.to_owned(), json(r.real_paths));
        }
        if let Some(host) = r.check_host {
            labels.insert(label::CHECK_HOST.to_owned(), host.to_owned());
        }
        if let Some(endpoint) = &r.release.endpoint {
            labels.insert(label::ENDPOINT.to_owned(), json(endpoint));
        }
        labels
    }

    pub(super) fn body(host: &HostName, r: &CreateRequest<'_>) -> ContainerCreateBody {
        let c = &r.release.container;
        let mut env: Vec<String> = r.release.env.iter().map(|(k, v)| format!("{k}={}", v.expose())).collect();
        env.extend(injected_env(r.app, r.key, host.as_str()).map(|(k, v)| format!("{k}={v}")));
        let mut mounts: Vec<Mount> = c
            .volumes
            .iter()
            .map(|v| {
                let (typ, source) = match &v.source {
                    VolumeSource::Host(path) => (MountType::BIND, path),
                    VolumeSource::Named(name) => (MountType::VOLUME, name),
                };
                mount(typ, source, &v.target, v.read_only)
            })
            .collect();
        let mut published = HashMap::new();
        let mut exposed = Vec::new();
        match (&r.release.endpoint, r.socket_dir, r.port) {
            (Some(Endpoint::Socket(path)), Some(dir), _) => {
                let inside = path.rsplit_once('/').map_or("/", |(dir, _)| dir);
                mounts.push(mount(MountType::BIND, dir, inside, false));
            }
            (Some(Endpoint::Port(inside)), _, Some(port)) => {
                let more = r.release.more_endpoints.iter().zip(r.more_ports).filter_map(|(e, port)| match e {
                    Endpoint::Port(inside) => Some((*inside, *port)),
                    Endpoint::Socket(_) => None,
                });
                for (inside, port) in std::iter::once((*inside, port)).chain(more) {
                    let binding = PortBinding { host_ip: Some("127.0.0.1".into()), host_port: Some(port.to_string()) };
                    published.insert(format!("{inside}/tcp"), Some(vec![binding]));
                    exposed.push(format!("{inside}/tcp"));
                }
            }
            _ => {}
        }
        let logging = c.logging.clone();
        let log_config = HostConfigLogConfig {
            typ: Some(logging.as_ref().map_or_else(|| "json-file".to_owned(), |l| l.driver.clone())),
            config: Some(match logging {
                Some(l) => l.options.into_iter().collect(),
                // Docker's own default has no limit.
                None => HashMap::from([("max-size".into(), "10m".into()), ("max-file".into(), "3".into())]),
            }),
        };
        let host_config = HostConfig {
            mounts: Some(mounts),
            port_bindings: Some(published),
            // No restarts of a candidate: its exit is evidence. The policy changes once the release is proven.
            restart_policy: Some(RestartPolicy { name: Some(RestartPolicyNameEnum::NO), maximum_retry_count: None }),
            log_config: Some(log_config),
            network_mode: network_of(r).map(str::to_owned).or_else(|| c.network.clone()),
            extra_hosts: none_if_empty(c.extra_hosts.clone()),
            dns: none_if_empty(c.dns.clone()),
            group_add: none_if_empty(c.group_add.clone()),
            security_opt: c.no_new_privileges.then(|| vec!["no-new-privileges".to_owned()]),
            shm_size: c.shm_size,
            ulimits: none_if_empty(c.ulimits.iter().map(ulimit).collect::<Vec<_>>()),
            cap_add: none_if_empty(c.cap_add.clone()),
            cap_drop: none_if_empty(c.cap_drop.clone()),
            devices: none_if_empty(c.devices.iter().map(device).collect::<Vec<_>>()),
            sysctls: none_if_empty(c.sysctls.iter().map(|(k, v)| (k.clone(), v.clone())).collect::<HashMap<_, _>>()),
            tmpfs: none_if_empty(c.tmpfs.iter().map(|t| (t.clone(), String::new())).collect::<HashMap<_, _>>()),
            readonly_rootfs: Some(c.read_only),
            init: Some(c.init),
            memory: c.memory,
            nano_cpus: c.nano_cpus,
            pids_limit: c.pids,
            ..Default::default()
        };
        ContainerCreateBody {
            image: Some(r.image.to_owned()),
            cmd: c.command.clone(),
            entrypoint: c.entrypoint.clone(),
            user: c.user.clone(),
            working_dir: c.working_dir.clone(),
            hostname: c.hostname.clone(),
            env: Some(env),
            labels: Some(Self::labels_of(host, r)),
            exposed_ports: none_if_empty(exposed),
            healthcheck: Some(health(r.release)),
            stop_signal: c.stop_signal.clone(),
            stop_timeout: i64::try_from(c.stop_grace_period.as_secs()).ok(),
            host_config: Some(host_config),
            networking_config: network_of(r).map(|name| networking(name, r.app, r.own_address)),
            ..Default::default()
        }
    }
}

/// The network of other containers that it joins: there it is found by the name of its app.
fn network_of<'a>(r: &'a CreateRequest<'_>) -> Option<&'a str> {
    let given = r.release.container.network.as_deref().filter(|n| !["none", "host"].contains(n));
    r.own_address.map(|own| own.network.as_str()).or(given).or_else(|| {
        let is_default = r.release.container.network.is_none();
        r.shared_network.filter(|_| is_default)
    })
}

fn device(device: &Device) -> DeviceMapping {
    DeviceMapping {
        path_on_host: Some(device.host.clone()),
        path_in_container: Some(device.container.clone()),
        cgroup_permissions: Some(device.permissions.clone()),
    }
}

fn ulimit((name, limit): (&String, &Ulimit)) -> ResourcesUlimits {
    ResourcesUlimits { name: Some(name.clone()), soft: Some(limit.soft), hard: Some(limit.hard) }
}

/// The body of the create call as sent to the engine: for tests of what a spec can ask for.
pub fn create_body(host: &HostName, request: &CreateRequest<'_>) -> serde_json::Value {
    serde_json::to_value(Docker::body(host, request)).expect("a body is JSON")
}

/// Variables that demae adds to the environment of every container.
pub fn injected_env<'a>(
    app: &AppName,
    key: &InstanceKey,
    host: &str,
) -> impl Iterator<Item = (&'a str, String)> + use<'a> {
    [
        ("DEMAE_APP", app.to_string()),
        ("DEMAE_RELEASE", key.release.to_string()),
        ("DEMAE_HOST", host.to_owned()),
        ("DEMAE_REPLICA", key.number.to_string()),
    ]
    .into_iter()
}

/// Docker's own check, or none: an image's check must not run beside demae's.
fn health(release: &Release) -> HealthConfig {
    let h = &release.health;
    let nanos = |d: std::time::Duration| i64::try_from(d.as_nanos()).ok();
    match &h.probe {
        Probe::Command(test) => HealthConfig {
            test: Some(test.clone()),
            interval: nanos(h.interval),
            timeout: nanos(h.timeout),
            retries: Some(i64::from(h.retries)),
            start_period: nanos(h.start_period),
            start_interval: None,
        },
        _ => HealthConfig { test: Some(vec!["NONE".into()]), ..Default::default() },
    }
}

fn mount(typ: MountType, source: &str, target: &str, read_only: bool) -> Mount {
    Mount {
        typ: Some(typ),
        source: Some(source.to_owned()),
        target: Some(target.to_owned()),
        read_only: Some(read_only),
        ..Default::default()
    }
}

/// `None` for an empty list, which some versions of the API take as an override.
fn none_if_empty<T: IntoIterator + Clone>(list: T) -> Option<T> {
    if list.clone().into_iter().next().is_some() { Some(list) } else { None }
}

pub(super) fn id(text: &str) -> Result<ContainerId, DockerError> {
    ContainerId::try_from(text).map_err(|e| DockerError::Labels { id: text.to_owned(), what: e.to_string() })
}
