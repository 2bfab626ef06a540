//! Parses the engine's description of a container.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use bollard::models::{
    ContainerInspectResponse, ContainerStateStatusEnum, EndpointSettings, HealthStatusEnum, MountType, NetworkSettings,
    RestartPolicyNameEnum,
};

use super::{DockerError, Result, label};
use crate::host::clock::Clock;
use crate::model::{
    name::{AppName, ContainerId, ImageRef, ReleaseId},
    observed::{Bind, Health, InstanceKey, Phase},
    spec::{Endpoint, HealthCheck, Probe, SETTLE},
    time::Timestamp,
};

impl Found {
    /// Whether its process may exist.
    pub fn is_alive(&self) -> bool {
        matches!(self.phase, Phase::Running | Phase::Restarting | Phase::Paused)
    }
}

/// Suffix of the name of a container that is stopped before its release was proven, so that the next agent does not
/// count its exit as a failure of the release.
pub(super) const LEAVING_SUFFIX: &str = "-leaving";

/// A container of this host, as the engine describes it.
#[derive(Debug, Clone)]
pub struct Found {
    /// Which app.
    pub app: AppName,
    /// Which instance.
    pub key: InstanceKey,
    /// Docker's id.
    pub id: ContainerId,
    /// Docker's image id.
    pub image: String,
    /// The image as requested; `None` for containers of older demae versions.
    pub requested_image: Option<ImageRef>,
    /// Its state.
    pub phase: Phase,
    /// The result of Docker's own check, or of a `running` check; `None` if the agent must probe.
    pub health: Option<Health>,
    /// Whether Docker keeps it running.
    pub settled: bool,
    /// Whether it was OOM-killed.
    pub out_of_memory: bool,
    /// Whether it was stopped before its release was proven.
    pub leaving: bool,
    /// When it last started, or was created.
    pub started: Timestamp,
    /// Restart count of the engine.
    pub restarts: u32,
    /// Where the app listens inside the container.
    pub endpoint: Option<Endpoint>,
    /// The published port.
    pub port: Option<u16>,
    /// The fixed address that it was created with.
    pub fixed: Option<Ipv4Addr>,
    /// Further endpoints, each with its published port if it is one.
    pub more: Vec<(Endpoint, Option<u16>)>,
    /// Its IP address, while it runs in a network.
    pub ip: Option<IpAddr>,
    /// The `Host` header of its check, unless the check sets one.
    pub check_host: Option<String>,
    /// Its pid.
    pub pid: Option<i32>,
    /// Its check.
    pub check: HealthCheck,
    /// Its drain time.
    pub drain: Duration,
    /// Its stop grace period.
    pub grace: Duration,
    /// The paths of the host that it has mounted.
    pub binds: Vec<Bind>,
}

/// Parses a container from its labels and state.
pub(super) fn read(app: &AppName, id: &str, details: ContainerInspectResponse, clock: &Clock) -> Result<Found> {
    let bad = |what: &str| DockerError::Labels { id: id.get(..12).unwrap_or(id).to_owned(), what: what.to_owned() };
    let config = details.config.unwrap_or_default();
    let labels = config.labels.unwrap_or_default();
    let get = |name: &str| labels.get(name).map(String::as_str);
    let release = get(label::RELEASE).and_then(|r| ReleaseId::try_from(r).ok()).ok_or_else(|| bad(label::RELEASE))?;
    let number = get(label::NUMBER).and_then(|n| n.parse().ok()).ok_or_else(|| bad(label::NUMBER))?;
    let drain = get(label::DRAIN).and_then(|d| d.parse().ok()).ok_or_else(|| bad(label::DRAIN))?;
    let check: HealthCheck =
        get(label::HEALTH).and_then(|h| serde_json::from_str(h).ok()).ok_or_else(|| bad(label::HEALTH))?;
    let endpoint = match get(label::ENDPOINT) {
        None => None,
        Some(text) => Some(serde_json::from_str(text).map_err(|_| bad(label::ENDPOINT))?),
    };
    let fixed = match get(label::ADDRESS) {
        None => None,
        Some(text) => Some(text.parse().map_err(|_| bad(label::ADDRESS))?),
    };
    let state = details.state.unwrap_or_default();
    let to_monotonic = |stamp: Option<&str>| clock.to_monotonic(stamp.and_then(Timestamp::parse).unwrap_or_default());
    let started = to_monotonic(state.started_at.as_deref()).max(to_monotonic(details.created.as_deref()));
    let out_of_memory = state.oom_killed == Some(true);
    let phase = match state.status {
        Some(ContainerStateStatusEnum::CREATED) => Phase::Created,
        Some(ContainerStateStatusEnum::RUNNING | ContainerStateStatusEnum::STOPPING) => Phase::Running,
        Some(ContainerStateStatusEnum::PAUSED) => Phase::Paused,
        Some(ContainerStateStatusEnum::RESTARTING) => Phase::Restarting,
        // `dead`: removal failed half-way. It can only be removed again.
        Some(ContainerStateStatusEnum::EXITED | ContainerStateStatusEnum::DEAD) => {
            Phase::Exited(state.exit_code.unwrap_or(-1))
        }
        _ => Phase::Removing,
    };
    let dead = state.status == Some(ContainerStateStatusEnum::DEAD);
    let health = match &check.probe {
        Probe::Http(_) | Probe::Tcp => None,
        Probe::Command(_) => Some(docker_health(state.health.unwrap_or_default(), started, clock)),
        Probe::Running => Some(match phase {
            Phase::Running if clock.now() >= started.plus(SETTLE) => Health::Healthy,
            Phase::Restarting => Health::Unhealthy { since: started, answer: "it is in a restart loop".into() },
            _ => Health::Starting(String::new()),
        }),
    };
    let host_config = details.host_config.unwrap_or_default();
    let settled = host_config.restart_policy.and_then(|p| p.name) == Some(RestartPolicyNameEnum::UNLESS_STOPPED);
    // Of containers of older demae versions it is not known what their paths led to.
    let real: BTreeMap<String, String> =
        get(label::REAL_PATHS).and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    let mounts = host_config.mounts.unwrap_or_default().into_iter();
    let binds = mounts.filter(|mount| mount.typ == Some(MountType::BIND)).filter_map(|mount| {
        let source = mount.source?;
        let real = real.get(&source).cloned();
        Some(Bind { source, read_only: mount.read_only == Some(true), real })
    });
    let binds = binds.collect();
    let published: BTreeMap<String, u16> = host_config
        .port_bindings
        .into_iter()
        .flatten()
        .filter_map(|(inside, bindings)| Some((inside, bindings?.into_iter().find_map(|b| b.host_port?.parse().ok())?)))
        .collect();
    let port_of = |endpoint: &Endpoint| match endpoint {
        Endpoint::Port(inside) => published.get(&format!("{inside}/tcp")).copied(),
        Endpoint::Socket(_) => None,
    };
    let port = endpoint.as_ref().and_then(port_of);
    let more: Vec<Endpoint> = match get(label::MORE_ENDPOINTS) {
        None => Vec::new(),
        Some(text) => serde_json::from_str(text).map_err(|_| bad(label::MORE_ENDPOINTS))?,
    };
    let more = more.into_iter().map(|endpoint| (endpoint.clone(), port_of(&endpoint))).collect();
    Ok(Found {
        app: app.clone(),
        key: InstanceKey { release, number },
        id: ContainerId::try_from(id).map_err(|_| bad("id"))?,
        image: details.image.unwrap_or_default(),
        requested_image: get(label::IMAGE).and_then(|i| ImageRef::try_from(i).ok()),
        phase,
        health,
        settled,
        out_of_memory,
        leaving: dead || !settled && details.name.as_deref().is_some_and(|name| name.ends_with(LEAVING_SUFFIX)),
        started,
        restarts: details.restart_count.and_then(|n| u32::try_from(n).ok()).unwrap_or(0),
        endpoint,
        port,
        fixed,
        more,
        ip: address(details.network_settings),
        check_host: get(label::CHECK_HOST).map(str::to_owned),
        pid: state.pid.and_then(|p| i32::try_from(p).ok()).filter(|p| *p > 0),
        check,
        drain: Duration::from_millis(drain),
        binds,
        grace: Duration::from_secs(config.stop_timeout.and_then(|t| u64::try_from(t).ok()).unwrap_or(10)),
    })
}

/// The address of a container in one of its networks.
pub(super) fn address(settings: Option<NetworkSettings>) -> Option<IpAddr> {
    settings?.networks?.into_values().find_map(|network| own_address(&network))
}

/// The address of a container in one of its networks; IPv6 if it has no IPv4 address.
fn own_address(network: &EndpointSettings) -> Option<IpAddr> {
    let parsed = |address: &Option<String>| address.as_ref()?.parse().ok();
    parsed(&network.ip_address).or_else(|| parsed(&network.global_ipv6_address))
}

/// The result of Docker's own check.
fn docker_health(health: bollard::models::Health, started: Timestamp, clock: &Clock) -> Health {
    let log = health.log.unwrap_or_default();
    // The command's output may hold secrets; its exit code does not.
    let code = log.last().and_then(|l| l.exit_code);
    let answer = code.map(|c| format!("the check ended with exit code {c}")).unwrap_or_default();
    match health.status {
        Some(HealthStatusEnum::HEALTHY) => Health::Healthy,
        Some(HealthStatusEnum::UNHEALTHY) => {
            // The first of the consecutive failures, as far as Docker keeps them: five checks.
            let failures = log.iter().rev().take_while(|l| l.exit_code != Some(0));
            let since = failures.last().and_then(|l| l.start.as_deref()).and_then(Timestamp::parse);
            Health::Unhealthy { since: since.map_or(started, |at| clock.to_monotonic(at)), answer }
        }
        _ => Health::Starting(answer),
    }
}
