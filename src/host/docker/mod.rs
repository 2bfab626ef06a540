//! The Docker engine: the only users of `bollard`.
//!
//! Only containers with our label *and* our host name are ever seen, so several agents can share one engine. Every call
//! has a deadline; after a timeout nothing is assumed, the next observation decides.

mod command;
mod create;
mod found;
mod image;
mod judged;
mod list;
mod meter;
mod network;
mod task;

use std::{
    collections::HashMap,
    fmt,
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use bollard::{
    Docker as Client,
    container::LogOutput,
    errors::Error,
    exec::StartExecResults,
    models::{ContainerUpdateBody, EventMessageTypeEnum, ExecConfig, RestartPolicy, RestartPolicyNameEnum},
    query_parameters::{
        EventsOptionsBuilder, KillContainerOptionsBuilder, LogsOptionsBuilder, RemoveContainerOptionsBuilder,
        RenameContainerOptionsBuilder, StopContainerOptionsBuilder,
    },
};
use futures_util::{Stream, StreamExt as _, stream};

pub use crate::model::observed::Foreign;
pub use command::{CommandContainer, CommandPhase};
pub use create::{CreateRequest, create_body, injected_env};
pub use found::Found;
use found::LEAVING_SUFFIX;
use judged::Own;
pub use list::{Instances, Listed, Lists};
pub use meter::{Failure, Meter, NoMeter, Operation};
pub use network::{BridgeNetwork, OwnAddress};
pub use task::{Printed, Task, Terminal};

use crate::host::{files, policy::PolicyFile, registry::Logins};
use crate::model::{
    fleet::Capacity,
    name::{AppName, ContainerId, HostName},
    problem::chain,
};

/// Something happened to a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerEvent {
    /// Its app.
    pub app: AppName,
    /// Whether it answers no more.
    pub is_end: bool,
}

/// Timeout of an ordinary call. A loaded engine takes a second or two to start a container.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

mod label {
    pub(super) const HOST: &str = "demae.host";
    pub(super) const APP: &str = "demae.app";
    pub(super) const RELEASE: &str = "demae.release";
    pub(super) const NUMBER: &str = "demae.replica";
    pub(super) const DRAIN: &str = "demae.drain-ms";
    pub(super) const ENDPOINT: &str = "demae.endpoint";
    pub(super) const PORT: &str = "demae.port";
    pub(super) const ADDRESS: &str = "demae.address";
    pub(super) const HEALTH: &str = "demae.healthcheck";
    pub(super) const IMAGE: &str = "demae.image";
    pub(super) const CHECK_HOST: &str = "demae.check-host";
    pub(super) const MORE_ENDPOINTS: &str = "demae.more-endpoints";
    pub(super) const MORE_PORTS: &str = "demae.more-ports";
    pub(super) const AGENT: &str = "demae.agent";
    pub(super) const REAL_PATHS: &str = "demae.real-paths";
}

/// Why there is no image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageFault {
    /// For a reason that may pass by itself.
    Temporary,
    /// For one that a person must see to: a login, a file.
    Person,
    /// The registry does not have it, or not for this platform.
    Absent,
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum DockerError {
    /// The engine cannot be reached, or did not answer in time: nothing is known.
    #[error("Docker does not answer ({operation}): {reason}")]
    Unreachable {
        /// The call.
        operation: Operation,
        /// Why.
        reason: String,
    },
    /// The engine refused.
    #[error("Docker cannot {operation}: {message}")]
    Refused {
        /// The call.
        operation: Operation,
        /// The HTTP status.
        status: u16,
        /// The engine's message.
        message: String,
    },
    /// The image does not exist, or access to it is denied.
    #[error("image `{image}` cannot be pulled: {message}")]
    Image {
        /// Which.
        image: String,
        /// The registry's message.
        message: String,
        /// What helps.
        fault: ImageFault,
    },
    /// The rules of this host do not allow it.
    #[error("this host does not allow the container: {0}")]
    NotAllowed(String),
    /// The container's labels do not parse.
    #[error("container {id} has labels that demae does not write: {what}")]
    Labels {
        /// Which.
        id: String,
        /// What is wrong.
        what: String,
    },
}

impl DockerError {
    fn of(operation: Operation) -> impl Fn(Error) -> Self {
        move |error| match error {
            Error::DockerResponseServerError { status_code, message } => {
                DockerError::Refused { operation, status: status_code, message: one_line(&message) }
            }
            other => DockerError::Unreachable { operation, reason: one_line_chain(&other) },
        }
    }

    fn is_status(&self, wanted: u16) -> bool {
        matches!(self, DockerError::Refused { status, .. } if *status == wanted)
    }

    /// Whether a container could not be created because its image is missing.
    pub fn is_image_gone(&self) -> bool {
        matches!(self, DockerError::Refused { operation: Operation::Create, status: 404, message }
            if message.to_lowercase().contains("no such image"))
    }

    /// Whether the requested port is in use by another program.
    pub fn is_port_taken(&self) -> bool {
        matches!(self, DockerError::Refused { message, .. }
            if message.contains("port is already allocated") || message.contains("address already in use"))
    }

    /// Whether the engine's disk is full. Only the message says so.
    pub fn is_full(&self) -> bool {
        matches!(self, DockerError::Refused { message, .. } | DockerError::Image { message, .. }
            if message.to_lowercase().contains("no space left on device"))
    }

    /// Whether a registry refused the login of this host.
    fn is_denied(&self) -> bool {
        matches!(self, DockerError::Image { message, .. } if image::is_refused_login(message))
    }

    /// Whether trying again can help without a person.
    pub fn is_temporary(&self) -> bool {
        matches!(self, DockerError::Image { fault: ImageFault::Temporary, .. })
            || !matches!(self, DockerError::Image { .. })
    }
}

type Result<T, E = DockerError> = std::result::Result<T, E>;

/// The engine of this machine, scoped to one host name.
#[derive(Clone)]
pub struct Docker {
    socket: String,
    client: OnceLock<Client>,
    host: HostName,
    meter: Arc<dyn Meter>,
    /// Timeout of an ordinary call.
    timeout: Duration,
    owner: Option<Arc<dyn Owner>>,
    /// How it logs in at registries.
    logins: Arc<Logins>,
    /// What containers may be created.
    policy: Arc<PolicyFile>,
}

/// Decides which containers of this host's name belong to this agent. Two agents may have one name by mistake, with a
/// store each.
pub trait Owner: Send + Sync {
    /// The agent id that is written to labels.
    fn id(&self) -> &str;
    /// Whether containers of the agent with this id were adopted.
    fn has_adopted(&self, id: &str) -> bool;
    /// Whether this agent's directories have traces of an app: for containers of older demae versions, which have no
    /// agent id.
    fn has_traces_of(&self, app: &AppName) -> bool;
}

impl fmt::Debug for Docker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Docker").field("host", &self.host).finish_non_exhaustive()
    }
}

impl Docker {
    /// The engine behind a unix socket. Neither engine nor socket need exist yet.
    pub fn behind(socket: &str, host: HostName) -> Self {
        let (client, meter) = (OnceLock::new(), Arc::new(NoMeter));
        let policy = Arc::new(PolicyFile::none(&host));
        Self {
            socket: socket.to_owned(),
            client,
            host,
            meter,
            timeout: CALL_TIMEOUT,
            owner: None,
            logins: Arc::default(),
            policy,
        }
    }

    /// bollard makes no client without a socket, so the client is created on first use.
    fn client(&self, operation: Operation) -> Result<&Client> {
        if let Some(client) = self.client.get() {
            return Ok(client);
        }
        match Client::connect_with_unix(&self.socket, CALL_TIMEOUT.as_secs(), bollard::API_DEFAULT_VERSION) {
            Ok(client) => Ok(self.client.get_or_init(|| client)),
            Err(e) => {
                if Operation::MEASURED.contains(&operation) {
                    self.meter.called(operation, Duration::ZERO, Some(Failure::Unreachable));
                }
                Err(DockerError::of(operation)(e))
            }
        }
    }

    /// Pulls images with these logins; otherwise with none.
    pub fn with_logins(self, logins: Arc<Logins>) -> Self {
        Self { logins, ..self }
    }

    /// What is wrong with its logins, without asking a helper.
    pub fn login_problems(&self) -> Vec<String> {
        self.logins.problems()
    }

    /// Reports the duration of every call to `meter`.
    pub fn with_meter(self, meter: Arc<dyn Meter>) -> Self {
        Self { meter, ..self }
    }

    /// Leaves containers of other agents with this host's name alone. Without an owner all of them are this agent's.
    pub fn with_owner(self, owner: Arc<dyn Owner>) -> Self {
        Self { owner: Some(owner), ..self }
    }

    /// Sets the timeout of ordinary calls: a person is waiting too.
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    async fn call<'d, T, C>(&'d self, operation: Operation, call: impl FnOnce(&'d Client) -> C) -> Result<T>
    where
        C: Future<Output = std::result::Result<T, Error>>,
    {
        self.within(self.timeout, operation, call(self.client(operation)?)).await
    }

    async fn within<T>(
        &self,
        limit: Duration,
        operation: Operation,
        call: impl Future<Output = std::result::Result<T, Error>>,
    ) -> Result<T> {
        let began = Instant::now();
        let (answer, failure) = match tokio::time::timeout(limit, call).await {
            Ok(Ok(answer)) => (Ok(answer), None),
            Ok(Err(e)) => {
                let e = DockerError::of(operation)(e);
                let failure = match &e {
                    DockerError::Unreachable { .. } => Some(Failure::Unreachable),
                    e if e.is_status(404) && operation.allows_not_found() => None,
                    _ => Some(Failure::Refused),
                };
                (Err(e), failure)
            }
            Err(_) => {
                let reason = format!("no answer within {} s", limit.as_secs());
                (Err(DockerError::Unreachable { operation, reason }), Some(Failure::Timeout))
            }
        };
        self.meter.called(operation, began.elapsed(), failure);
        answer
    }

    /// The engine's version and API version.
    ///
    /// # Errors
    /// If the engine does not answer.
    pub async fn version(&self) -> Result<(String, String)> {
        let version = self.call(Operation::Version, Client::version).await?;
        Ok((version.version.unwrap_or_default(), version.api_version.unwrap_or_default()))
    }

    /// The machine, as the engine sees it.
    ///
    /// # Errors
    /// If the engine does not answer.
    pub async fn capacity(&self) -> Result<Capacity> {
        let info = self.call(Operation::Info, Client::info).await?;
        let os = info.os_type.unwrap_or_default();
        // The engine says `x86_64`, and images say `amd64`.
        let architecture = match info.architecture.unwrap_or_default().as_str() {
            "x86_64" => "amd64".to_owned(),
            "aarch64" => "arm64".to_owned(),
            "armv6l" | "armv7l" | "armv8l" => "arm".to_owned(),
            "i386" | "i686" => "386".to_owned(),
            other => other.to_owned(),
        };
        let root = info.docker_root_dir.map(PathBuf::from).filter(|dir| dir.is_absolute());
        Ok(Capacity {
            disk_bytes: root.and_then(|root| files::space(&root).ok()).map(|(_, size)| size),
            memory_bytes: info.mem_total.and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or(0),
            cpus: info.ncpu.and_then(|cpus| u32::try_from(cpus).ok()).unwrap_or(0),
            platform: format!("{os}/{architecture}"),
            docker: info.server_version.unwrap_or_default(),
        })
    }

    /// The engine's data directory; `None` if it is on no disk of this machine.
    ///
    /// # Errors
    /// If the engine does not answer.
    pub async fn root_dir(&self) -> Result<Option<PathBuf>> {
        let info = self.call(Operation::Info, Client::info).await?;
        Ok(info.docker_root_dir.map(PathBuf::from).filter(|dir| dir.is_absolute()))
    }

    /// The numeric user that a container runs as; `None` if it is given by name.
    ///
    /// # Errors
    /// If the engine does not answer.
    pub async fn user_of(&self, id: &ContainerId) -> Result<Option<u32>> {
        let found = self.call(Operation::Inspect, |client| client.inspect_container(id.as_str(), None)).await?;
        let user = found.config.and_then(|c| c.user).unwrap_or_default();
        Ok(numeric_user(&user))
    }

    /// The address of a container in its network; `None` if it has none of its own.
    ///
    /// # Errors
    /// If the engine does not answer.
    pub async fn address_of(&self, id: &ContainerId) -> Result<Option<IpAddr>> {
        let found = self.call(Operation::Inspect, |client| client.inspect_container(id.as_str(), None)).await?;
        Ok(found::address(found.network_settings))
    }

    /// Starts or unpauses a container. No effect on a running one.
    ///
    /// # Errors
    /// If the engine cannot.
    pub async fn start(&self, id: &ContainerId) -> Result<()> {
        match self.call(Operation::Start, |client| client.start_container(id.as_str(), None)).await {
            Err(e) if matches!(&e, DockerError::Refused { message, .. } if message.contains("paused")) => {
                self.call(Operation::Start, |client| client.unpause_container(id.as_str())).await
            }
            other => other,
        }
    }

    /// Marks a container as being stopped. No effect if it is gone.
    ///
    /// # Errors
    /// If the engine cannot.
    pub async fn mark_leaving(&self, id: &ContainerId) -> Result<()> {
        let found = match self.call(Operation::Inspect, |client| client.inspect_container(id.as_str(), None)).await {
            Err(e) if e.is_status(404) => return Ok(()),
            found => found?,
        };
        let name = found.name.unwrap_or_default();
        let name = name.trim_start_matches('/');
        if name.ends_with(LEAVING_SUFFIX) {
            return Ok(());
        }
        // Another container may have that name.
        let names = (0..10)
            .map(|n| if n == 0 { format!("{name}{LEAVING_SUFFIX}") } else { format!("{name}.{n}{LEAVING_SUFFIX}") });
        let mut last = Ok(());
        for name in names {
            let options = RenameContainerOptionsBuilder::default().name(&name).build();
            last = self.call(Operation::Update, |client| client.rename_container(id.as_str(), options)).await;
            if !last.as_ref().is_err_and(|e| e.is_status(409)) {
                break;
            }
        }
        last
    }

    /// Stops a container, and kills it after its grace period. No effect if it has exited or is gone.
    ///
    /// # Errors
    /// If the engine cannot.
    pub async fn stop(&self, id: &ContainerId, grace: Duration) -> Result<()> {
        let seconds = i32::try_from(grace.as_secs()).unwrap_or(i32::MAX);
        let options = StopContainerOptionsBuilder::default().t(seconds).build();
        let client = self.client(Operation::Stop)?.clone().with_timeout(grace + Duration::from_secs(15));
        let stop = client.stop_container(id.as_str(), Some(options));
        match self.within(grace + Duration::from_secs(15), Operation::Stop, stop).await {
            Err(e) if e.is_status(404) => Ok(()),
            other => other,
        }
    }

    /// Removes a container. No effect if it is gone.
    ///
    /// # Errors
    /// If the engine cannot: the container still runs, or another removal is in progress and may fail.
    pub async fn remove(&self, id: &ContainerId) -> Result<()> {
        let options = RemoveContainerOptionsBuilder::default().v(true).build();
        match self.call(Operation::Remove, |client| client.remove_container(id.as_str(), Some(options))).await {
            Err(e) if e.is_status(404) => Ok(()),
            other => other,
        }
    }

    /// Sets the restart policy so that the engine keeps a container running without an agent.
    ///
    /// # Errors
    /// If the engine cannot.
    pub async fn settle(&self, id: &ContainerId) -> Result<()> {
        self.set_restart_policy(id, RestartPolicyNameEnum::UNLESS_STOPPED).await
    }

    /// Sets the restart policy of a container by its name in Docker's terms; an unknown one is `no`.
    ///
    /// # Errors
    /// If the engine cannot.
    pub async fn set_restart(&self, id: &ContainerId, policy: &str) -> Result<()> {
        let policy = policy.parse().unwrap_or(RestartPolicyNameEnum::NO);
        self.set_restart_policy(id, policy).await
    }

    async fn set_restart_policy(&self, id: &ContainerId, name: RestartPolicyNameEnum) -> Result<()> {
        let policy = RestartPolicy { name: Some(name), maximum_retry_count: None };
        let body = ContainerUpdateBody { restart_policy: Some(policy), ..Default::default() };
        self.call(Operation::Update, |client| client.update_container(id.as_str(), body)).await
    }

    /// The last lines of a container's log, as far as they come quickly. Lines are whole: secrets are redacted
    /// afterwards and must not be split.
    pub async fn log_tail(&self, id: &ContainerId) -> String {
        let options = LogsOptionsBuilder::default().stdout(true).stderr(true).tail("30").build();
        let Ok(client) = self.client(Operation::Inspect) else { return String::new() };
        let mut lines = client.logs(id.as_str(), Some(options));
        let mut text = String::new();
        let reading = async {
            while let Some(Ok(line)) = lines.next().await {
                text.push_str(&String::from_utf8_lossy(&line.into_bytes()));
            }
        };
        // If reading the log hangs, the verdict goes without it.
        let _ = tokio::time::timeout(Duration::from_secs(2), reading).await;
        text
    }

    /// What happens to containers. Ends when the engine does, or stays silent for good; the caller then relists everything
    /// and subscribes again.
    pub fn events(&self) -> impl Stream<Item = Result<ContainerEvent>> + use<> {
        let filters = HashMap::from([
            ("label", vec![format!("{}={}", label::HOST, self.host)]),
            ("type", vec!["container".to_owned()]),
        ]);
        let client = match self.client(Operation::Events) {
            Ok(client) => client.clone(),
            Err(e) => return stream::once(async { Err(e) }).left_stream(),
        };
        let options = EventsOptionsBuilder::default().filters(&filters).build();
        let apps = client.events(Some(options)).filter_map(async |event| match event {
            Err(e) => Some(Err(DockerError::of(Operation::Events)(e))),
            Ok(event) if event.typ == Some(EventMessageTypeEnum::CONTAINER) => {
                let action = event.action.as_deref().unwrap_or_default();
                // Health checks by exec would wake the agent twice a second and change nothing.
                if action.starts_with("exec_") {
                    return None;
                }
                let is_end = matches!(action, "die" | "oom" | "pause" | "destroy");
                let attributes = event.actor?.attributes?;
                let app = AppName::try_from(attributes.get(label::APP)?.as_str()).ok()?;
                Some(Ok(ContainerEvent { app, is_end }))
            }
            Ok(_) => None,
        });
        apps.right_stream()
    }

    /// The pid of a container, not necessarily demae's, if it runs.
    ///
    /// # Errors
    /// If there is no such container, or the engine does not answer.
    pub async fn pid_of(&self, container: &str) -> Result<Option<i32>> {
        let found = self.call(Operation::Inspect, |client| client.inspect_container(container, None)).await?;
        let pid = found.state.and_then(|s| s.pid).and_then(|p| i32::try_from(p).ok());
        Ok(pid.filter(|p| *p > 0))
    }

    /// Sends a signal to a container, not necessarily demae's.
    ///
    /// # Errors
    /// If the engine cannot.
    pub async fn signal(&self, container: &str, signal: &str) -> Result<()> {
        let options = KillContainerOptionsBuilder::default().signal(signal).build();
        self.call(Operation::Signal, |client| client.kill_container(container, Some(options))).await
    }

    /// Runs a command in a container, not necessarily demae's: its exit code and output.
    ///
    /// # Errors
    /// If the engine cannot.
    pub async fn exec(&self, container: &str, command: Vec<String>) -> Result<(i64, String)> {
        let config = ExecConfig {
            cmd: Some(command),
            attach_stdout: Some(true),
            attach_stderr: Some(true),
            ..Default::default()
        };
        let exec = self.call(Operation::Exec, |client| client.create_exec(container, config)).await?.id;
        let started = self.call(Operation::Exec, |client| client.start_exec(&exec, None)).await?;
        let mut text = String::new();
        if let StartExecResults::Attached { mut output, .. } = started {
            let reading = async {
                while let Some(Ok(line)) = output.next().await {
                    if let LogOutput::StdOut { message }
                    | LogOutput::StdErr { message }
                    | LogOutput::Console { message } = line
                    {
                        text.push_str(&String::from_utf8_lossy(&message));
                    }
                }
            };
            if tokio::time::timeout(CALL_TIMEOUT, reading).await.is_err() {
                return Err(DockerError::Unreachable {
                    operation: Operation::Exec,
                    reason: "the command does not exit".into(),
                });
            }
        }
        let inspected = self.call(Operation::Exec, |client| client.inspect_exec(&exec)).await?;
        Ok((inspected.exit_code.unwrap_or(-1), text))
    }
}

/// The user id of `user`, `user:group` or an empty string; `None` for a name.
fn numeric_user(user: &str) -> Option<u32> {
    match user.split(':').next() {
        None | Some("" | "root") => Some(0),
        Some(id) => id.parse().ok(),
    }
}

fn one_line(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    line.chars().take(400).collect()
}

fn one_line_chain(error: &dyn std::error::Error) -> String {
    one_line(&chain(error))
}
