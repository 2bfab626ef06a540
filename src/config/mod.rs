//! Configuration of an agent: flags override the environment, which overrides the file, which overrides defaults. And the
//! stores that people work with from elsewhere.

mod context;
mod etcd;
mod registries;

pub use context::{Context, context};
pub use etcd::EtcdFlags;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;

use crate::{
    host::{
        archive::Fetchers,
        images::Limits,
        nginx::{Profile, Settings},
        registry::Registry,
        tcp_routes,
    },
    model::{env::Secret, event::What, name::HostName, text},
    store::{Brake, client::EtcdConfig},
    webhook::WebhookConfig,
};

/// Path of the file, unless `--config` names another.
pub const FILE: &str = "/etc/demae/agent.toml";
/// Default listen address. Outside of 9100-9999, which belong to exporters.
pub const LISTEN: &str = "127.0.0.1:7330";

/// The configuration file. Every key is optional.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct File {
    host: Option<String>,
    labels: BTreeMap<String, String>,
    state_dir: Option<PathBuf>,
    run_dir: Option<PathBuf>,
    listen: Option<SocketAddr>,
    log: Option<String>,
    policy: Option<PathBuf>,
    resync: Option<String>,
    delete_grace: Option<String>,
    parallel: Option<usize>,
    etcd: etcd::EtcdFile,
    docker: DockerFile,
    registry: Vec<registries::RegistryFile>,
    images: registries::ImagesFile,
    fetch: Fetchers,
    nginx: NginxFile,
    ports: PortsFile,
    tcp_routes: TcpRoutesFile,
    rollouts: RolloutsFile,
    webhook: Option<WebhookFile>,
    brake: BrakeFile,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct BrakeFile {
    apps: Option<usize>,
    percent: Option<usize>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WebhookFile {
    url: String,
    secret_file: Option<PathBuf>,
    events: Option<Vec<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct DockerFile {
    socket: Option<String>,
    config: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct NginxFile {
    binary: Option<String>,
    conf: Option<PathBuf>,
    pid: Option<PathBuf>,
    container: Option<String>,
    address: Option<String>,
    listen: Option<Vec<String>>,
    default_server: Option<bool>,
    profile: Option<Profile>,
    templates: Option<PathBuf>,
    group: Option<u32>,
    certificates: Vec<PathBuf>,
    trusted_proxies: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct PortsFile {
    range: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct TcpRoutesFile {
    enabled: Option<bool>,
    network: Option<String>,
    bridge: Option<String>,
    subnet: Option<String>,
    range: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RolloutsFile {
    enabled: Option<bool>,
    lead: Option<bool>,
}

/// Flags and environment variables, which override the file.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Agent")]
pub struct Flags {
    /// The agent's configuration file
    #[arg(long, env = "DEMAE_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Name of this host; the first label of its host name unless given
    #[arg(long, env = "DEMAE_HOST", value_name = "NAME")]
    pub host: Option<String>,
    /// A label of this host; overrides the file
    #[arg(long = "label", value_name = "NAME=VALUE")]
    pub labels: Vec<String>,
    /// Directory of routes, sockets and nginx files
    #[arg(long, env = "DEMAE_STATE_DIR", value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Directory of env-files
    #[arg(long, env = "DEMAE_RUN_DIR", value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// Listen address for metrics, health and status
    #[arg(long, alias = "web.listen-address", env = "DEMAE_LISTEN", value_name = "ADDRESS")]
    pub listen: Option<SocketAddr>,
    /// What is logged: `info`, `debug`, `info,demae::store=debug`
    #[arg(long, env = "DEMAE_LOG", value_name = "FILTER")]
    pub log: Option<String>,
    /// The connection to etcd.
    #[command(flatten)]
    pub etcd: EtcdFlags,
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file cannot be read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is invalid.
    #[error("`{}`: {message}", path.display())]
    Parse {
        /// Which.
        path: PathBuf,
        /// Where and why.
        message: String,
    },
    /// A value is invalid.
    #[error("`{name}`: {message}")]
    Value {
        /// Which.
        name: &'static str,
        /// Why.
        message: String,
    },
}

fn bad(name: &'static str) -> impl Fn(String) -> ConfigError {
    move |message| ConfigError::Value { name, message }
}

/// An agent's configuration, checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// This host.
    pub host: HostName,
    /// Its own labels.
    pub labels: BTreeMap<String, String>,
    /// Routes, sockets, nginx files.
    pub state_dir: PathBuf,
    /// Env-files.
    pub run_dir: PathBuf,
    /// Metrics, health, status.
    pub listen: SocketAddr,
    /// What is logged.
    pub log: String,
    /// Interval of a full resync.
    pub resync: Duration,
    /// How long an app is kept after it was deleted from the store.
    pub delete_grace: Duration,
    /// Maximum steps in parallel.
    pub parallel: usize,
    /// The connection to etcd.
    pub etcd: EtcdConfig,
    /// Docker's socket.
    pub docker_socket: String,
    /// The file with the rules for what may run here.
    pub policy: PathBuf,
    /// When images are removed.
    pub images: Limits,
    /// Programs that fetch archives.
    pub fetchers: Fetchers,
    /// How it logs in at registries.
    pub registries: Vec<Registry>,
    /// Docker's `config.json`, for registries that are not in that list; `None` if this user has no home.
    pub docker_config: Option<PathBuf>,
    /// The nginx of this host.
    pub nginx: NginxSetup,
    /// Loopback ports for apps.
    pub ports: RangeInclusive<u16>,
    /// Routes to TCP apps by a table of the kernel.
    pub tcp_routes: tcp_routes::Settings,
    /// How this host takes part in rollouts; `None` if it converges by itself.
    pub rollouts: Option<Rollouts>,
    /// Receiver of events.
    pub webhook: Option<WebhookConfig>,
    /// Limit for mass removals.
    pub brake: Brake,
}

/// The nginx of this host.
#[derive(Debug, Clone)]
pub struct NginxSetup {
    /// The binary.
    pub binary: String,
    /// Its container, if it runs in one.
    pub container: Option<String>,
    /// Its main file.
    pub conf: PathBuf,
    /// Its pid file, unless the main file names one.
    pub pid: PathBuf,
    /// The address at which the agent reaches it.
    pub address: String,
    /// The group of its workers, if it cannot be detected.
    pub group: Option<u32>,
    /// What its configuration contains.
    pub settings: Settings,
    /// Certificates that it serves, besides those in demae's own files.
    pub certificates: Vec<PathBuf>,
}

impl Config {
    /// Loads the file, if there is one, and applies flags and environment.
    ///
    /// # Errors
    /// What is wrong, and where.
    pub fn load(flags: &Flags) -> Result<Self, ConfigError> {
        let file = match &flags.config {
            Some(path) => read(path)?,
            None if Path::new(FILE).exists() => read(Path::new(FILE))?,
            None => File::default(),
        };
        let host = match flags.host.clone().or(file.host) {
            Some(name) => name,
            None => own_name()?,
        };
        let mut labels = file.labels;
        for label in &flags.labels {
            let (name, value) = label
                .split_once('=')
                .ok_or_else(|| bad("label")(format!("`{label}` has no `=`; write it like `role=web`")))?;
            labels.insert(name.to_owned(), value.to_owned());
        }
        let n = file.nginx;
        let listen_on = n.listen.unwrap_or_else(|| vec!["80".to_owned()]);
        for value in &listen_on {
            if value.is_empty() || !value.bytes().all(|b| b.is_ascii_alphanumeric() || b".:[]_- =/".contains(&b)) {
                return Err(bad("nginx.listen")(format!("`{value}` is not a value of nginx's `listen`")));
            }
        }
        let resync = duration("resync", file.resync.as_deref())?.unwrap_or(etcd::RESYNC);
        if resync < Duration::from_secs(1) {
            return Err(bad("resync")("at least `1s` is needed".to_owned()));
        }
        Ok(Self {
            host: HostName::try_from(host).map_err(|e| bad("host")(e.to_string()))?,
            labels,
            state_dir: absolute("state_dir", flags.state_dir.clone().or(file.state_dir), "/var/lib/demae")?,
            run_dir: absolute("run_dir", flags.run_dir.clone().or(file.run_dir), "/run/demae")?,
            listen: flags.listen.or(file.listen).unwrap_or(([127, 0, 0, 1], 7330).into()),
            log: flags.log.clone().or(file.log).unwrap_or_else(|| "info".to_owned()),
            resync,
            delete_grace: duration("delete_grace", file.delete_grace.as_deref())?.unwrap_or(Duration::from_secs(3)),
            parallel: file.parallel.unwrap_or(crate::agent::PARALLEL_STEPS).max(1),
            etcd: EtcdConfig { resync, ..etcd::config(&flags.etcd, file.etcd)? },
            docker_socket: docker_socket(file.docker.socket)?,
            policy: absolute("policy", file.policy, "/etc/demae/policy.toml")?,
            images: registries::images(&file.images)?,
            fetchers: registries::fetchers(file.fetch)?,
            registries: registries::registries(file.registry)?,
            docker_config: registries::docker_config(file.docker.config)?,
            nginx: NginxSetup {
                binary: n.binary.unwrap_or_else(|| "nginx".to_owned()),
                container: n.container,
                conf: absolute("nginx.conf", n.conf, "/etc/nginx/nginx.conf")?,
                pid: absolute("nginx.pid", n.pid, "/run/nginx.pid")?,
                address: n.address.unwrap_or_else(|| "127.0.0.1:80".to_owned()),
                group: n.group,
                certificates: n.certificates,
                settings: Settings {
                    listen: listen_on,
                    default_server: n.default_server.unwrap_or(true),
                    profile: n.profile.unwrap_or_default(),
                    templates: Some(n.templates.unwrap_or_else(|| "/etc/demae/templates".into())),
                    trusted: networks("nginx.trusted_proxies", n.trusted_proxies)?,
                },
            },
            webhook: file.webhook.map(webhook).transpose()?,
            brake: brake(&file.brake)?,
            tcp_routes: tcp_routes(file.tcp_routes)?,
            rollouts: rollouts(&file.rollouts),
            ports: port_range(file.ports.range.as_deref().unwrap_or("20000-29999"))?,
        })
    }
}

fn read(path: &Path) -> Result<File, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    toml::from_str(&text)
        .map_err(|e| ConfigError::Parse { path: path.to_owned(), message: e.to_string().trim_end().to_owned() })
}

/// How a host takes part in rollouts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rollouts {
    /// Whether its agent may be elected as the leader.
    pub may_lead: bool,
    /// Whether it waits if the rights of its etcd role do not suffice; otherwise it then converges by itself.
    pub required: bool,
}

/// The connection to etcd, for commands that need nothing else.
///
/// # Errors
/// What is wrong, and where.
pub fn etcd_only(flags: &Flags) -> Result<EtcdConfig, ConfigError> {
    let file = match &flags.config {
        Some(path) => read(path)?,
        None if Path::new(FILE).exists() => read(Path::new(FILE))?,
        None => File::default(),
    };
    etcd::config(&flags.etcd, file.etcd)
}

fn brake(file: &BrakeFile) -> Result<Brake, ConfigError> {
    let default = Brake::default();
    let brake = Brake { apps: file.apps.unwrap_or(default.apps), percent: file.percent.unwrap_or(default.percent) };
    if brake.percent > 100 {
        return Err(bad("brake.percent")(format!("`{}` is not a percentage; use 0 to 100", brake.percent)));
    }
    Ok(brake)
}

/// Default events of a webhook: those that people want to know, not each step.
const WEBHOOK_EVENTS: [&str; 4] = ["verdict", "block", "unblock", "converged"];

fn webhook(file: WebhookFile) -> Result<WebhookConfig, ConfigError> {
    let url: axum::http::Uri = file.url.parse().map_err(|e| bad("webhook.url")(format!("`{}`: {e}", file.url)))?;
    if !matches!(url.scheme_str(), Some("http" | "https")) || url.host().is_none() {
        return Err(bad("webhook.url")(format!(
            "`{}` is not a URL of http or https, such as `https://hooks.example.com/demae`",
            file.url
        )));
    }
    let events = file.events.unwrap_or_else(|| WEBHOOK_EVENTS.map(str::to_owned).to_vec());
    if let Some(unknown) = events.iter().find(|e| !What::TYPES.contains(&e.as_str())) {
        return Err(bad("webhook.events")(format!(
            "`{unknown}` is not a type of event; there are `{}`",
            What::TYPES.join("`, `")
        )));
    }
    let secret = match file.secret_file {
        None => None,
        Some(path) => {
            let text =
                std::fs::read_to_string(&path).map_err(|source| ConfigError::Read { path: path.clone(), source })?;
            let text = text.trim_end_matches(['\n', '\r']);
            if text.is_empty() {
                return Err(bad("webhook.secret_file")(format!("`{}` is empty", path.display())));
            }
            Some(Secret::new(text))
        }
    };
    Ok(WebhookConfig { url, secret, events })
}

/// The path of the engine's socket: the configured one, that of `DOCKER_HOST`, or Docker's own.
///
/// # Errors
/// If it is no unix socket: the agent mounts directories and reads `/proc` of the same machine.
pub fn docker_socket(configured: Option<String>) -> Result<String, ConfigError> {
    let chosen = configured.or_else(|| std::env::var("DOCKER_HOST").ok().filter(|h| !h.is_empty()));
    match chosen {
        None => Ok("/var/run/docker.sock".to_owned()),
        Some(host) => match host.strip_prefix("unix://").unwrap_or(&host) {
            path if path.starts_with('/') => Ok(path.to_owned()),
            _ => Err(bad("docker.socket")(format!(
                "`{host}` is not a unix socket; an agent works with the engine of its own machine, such as `/var/run/docker.sock`"
            ))),
        },
    }
}

fn own_name() -> Result<String, ConfigError> {
    let node = rustix::system::uname();
    let name = node.nodename().to_string_lossy().to_lowercase();
    let first = name.split('.').next().unwrap_or_default().to_owned();
    if HostName::try_from(first.as_str()).is_err() {
        return Err(bad("host")(format!("the name of this machine, `{name}`, cannot name a host; set `host`")));
    }
    Ok(first)
}

fn absolute(name: &'static str, given: Option<PathBuf>, default: &str) -> Result<PathBuf, ConfigError> {
    let path = given.unwrap_or_else(|| default.into());
    let text = path.to_string_lossy();
    if !path.is_absolute() || text.chars().any(|c| c.is_whitespace() || c.is_control() || "\"';{}$*?[".contains(c)) {
        return Err(bad(name)(format!("`{text}` must be an absolute path without blanks and special characters")));
    }
    Ok(path)
}

fn duration(name: &'static str, text: Option<&str>) -> Result<Option<Duration>, ConfigError> {
    text.map(|t| text::duration(t).map_err(bad(name))).transpose()
}

/// Checks addresses and networks for nginx's `set_real_ip_from` and `geo`.
fn networks(name: &'static str, given: Vec<String>) -> Result<Vec<String>, ConfigError> {
    for text in &given {
        let (address, bits) = text.split_once('/').map_or((text.as_str(), None), |(a, b)| (a, Some(b)));
        let most = address.parse::<std::net::IpAddr>().map(|a| if a.is_ipv4() { 32 } else { 128 });
        let fine = most.is_ok_and(|most| bits.is_none_or(|bits| bits.parse::<u8>().is_ok_and(|bits| bits <= most)));
        if !fine {
            return Err(bad(name)(format!("`{text}` is not an address or a network such as `10.0.0.0/8`")));
        }
    }
    Ok(given)
}

fn rollouts(file: &RolloutsFile) -> Option<Rollouts> {
    let may_lead = file.lead.unwrap_or(true);
    file.enabled.unwrap_or(true).then_some(Rollouts { may_lead, required: file.enabled.is_some() })
}

fn tcp_routes(file: TcpRoutesFile) -> Result<tcp_routes::Settings, ConfigError> {
    let net = |name: &'static str, given: Option<String>, default: &str| {
        let text = given.unwrap_or_else(|| default.to_owned());
        let net: ipnet::Ipv4Net =
            text.parse().map_err(|_| bad(name)(format!("`{text}` is not an IPv4 network such as `{default}`")))?;
        if net.prefix_len() > 28 || net.trunc() != net {
            let first = net.trunc();
            return Err(bad(name)(format!(
                "`{text}` must have at least 16 addresses, and begin with its first: {first}"
            )));
        }
        Ok(net)
    };
    let word = |name: &'static str, given: Option<String>, default: &str, longest: usize| {
        let text = given.unwrap_or_else(|| default.to_owned());
        let fits = |c: u8| c.is_ascii_alphanumeric() || b"-_".contains(&c);
        let is_fine =
            text.len() <= longest && text.bytes().all(fits) && text.starts_with(|c: char| c.is_ascii_alphabetic());
        if is_fine {
            Ok(text)
        } else {
            Err(bad(name)(format!(
                "`{text}` must have a letter first, then letters, digits, `-` and `_`, at most {longest} in all"
            )))
        }
    };
    Ok(tcp_routes::Settings {
        enabled: file.enabled.unwrap_or(true),
        network: word("tcp_routes.network", file.network, "demae", 60)?,
        // IFNAMSIZ of linux/if.h, without the final NUL.
        bridge: word("tcp_routes.bridge", file.bridge, "demae0", 15)?,
        subnet: net("tcp_routes.subnet", file.subnet, "172.30.0.0/16")?,
        range: net("tcp_routes.range", file.range, "198.18.0.0/16")?,
    })
}

fn port_range(text: &str) -> Result<RangeInclusive<u16>, ConfigError> {
    let parsed = text.split_once('-').and_then(|(from, to)| Some((from.trim().parse().ok()?, to.trim().parse().ok()?)));
    match parsed {
        Some((from, to)) if from >= 1024 && from < to => Ok(from..=to),
        _ => Err(bad("ports.range")(format!("`{text}` is not a range of ports; write it like `20000-29999`"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::disallowed_methods, reason = "a test writes its own file")]
    fn shipped_file_is_valid_and_flags_override_it() {
        let shipped = include_str!("../../deploy/agent.toml");
        let plain: String = shipped
            .lines()
            .map(|l| l.strip_prefix("# ").filter(|r| r.contains(" = ") || r.starts_with('[')).unwrap_or(l))
            .map(|l| format!("{l}\n"))
            .collect();
        let file: File = toml::from_str(&plain).expect("every commented option is a real one");
        assert_eq!(file.parallel, Some(crate::agent::PARALLEL_STEPS));
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("agent.toml");
        std::fs::write(&path, "host = \"a\"\nstate_dir = \"/a\"\n[etcd]\nendpoints = [\"a:1\"]\n").expect("a file");
        let mut flags = Flags { config: Some(path), host: Some("b".into()), ..Flags::default() };
        flags.etcd.endpoints = vec!["b:2".into()];
        let config = Config::load(&flags).expect("it is fine");
        assert_eq!((config.host.as_str(), config.etcd.endpoints), ("b", vec!["b:2".to_owned()]));
        assert_eq!(config.state_dir, Path::new("/a"));
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "a test writes its own file")]
    fn unknown_key_is_reported_with_its_line() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("agent.toml");
        std::fs::write(&path, "host = \"a\"\n[nginx]\nprofil = \"strict\"\n").expect("a file");
        let error =
            Config::load(&Flags { config: Some(path), ..Flags::default() }).expect_err("it is wrong").to_string();
        assert!(error.contains("line 3") && error.contains("profil"), "{error}");
    }
}
