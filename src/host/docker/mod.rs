//! The Docker engine: the only users of `bollard`.
//!
//! Only containers with our label *and* our host name are ever seen, so several agents can share one engine. Every call
//! has a deadline; after one has passed nothing is assumed, the next look tells.

mod create;
mod found;
mod image;
mod list;
mod meter;

use std::{
    collections::HashMap,
    fmt,
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
pub use create::{CreateRequest, create_body, facts};
pub use found::Found;
use found::LEAVING;
pub use list::{Instances, Listed};
pub use meter::{Failure, Meter, NoMeter, Operation};

use crate::model::{
    name::{AppName, ContainerId, HostName},
    problem::chain,
};

/// Longest time for an ordinary call. A loaded engine takes a second or two to start a container.
const CALL: Duration = Duration::from_secs(60);

mod label {
    pub(super) const HOST: &str = "demae.host";
    pub(super) const APP: &str = "demae.app";
    pub(super) const RELEASE: &str = "demae.release";
    pub(super) const NUMBER: &str = "demae.replica";
    pub(super) const DRAIN: &str = "demae.drain-ms";
    pub(super) const ENDPOINT: &str = "demae.endpoint";
    pub(super) const PORT: &str = "demae.port";
    pub(super) const HEALTH: &str = "demae.healthcheck";
    pub(super) const IMAGE: &str = "demae.image";
    pub(super) const CHECK_HOST: &str = "demae.check-host";
    pub(super) const MORE_ENDPOINTS: &str = "demae.more-endpoints";
    pub(super) const MORE_PORTS: &str = "demae.more-ports";
    pub(super) const AGENT: &str = "demae.agent";
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum DockerError {
    /// The engine is not there, or did not answer in time: nothing is known.
    #[error("Docker does not answer ({operation}): {reason}")]
    Unreachable {
        /// What was asked.
        operation: Operation,
        /// Why.
        reason: String,
    },
    /// The engine refused.
    #[error("Docker cannot {operation}: {message}")]
    Refused {
        /// What was asked.
        operation: Operation,
        /// The HTTP status.
        status: u16,
        /// In its own words.
        message: String,
    },
    /// The image is nowhere to be had, or may not be.
    #[error("image `{image}` cannot be pulled: {message}")]
    Image {
        /// Which.
        image: String,
        /// In the registry's words.
        message: String,
        /// Whether trying again can help without a person.
        temporary: bool,
    },
    /// The container is in the way of its own labels.
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
            other => DockerError::Unreachable { operation, reason: causes(&other) },
        }
    }

    fn is_status(&self, wanted: u16) -> bool {
        matches!(self, DockerError::Refused { status, .. } if *status == wanted)
    }

    /// Whether a container could not be made since its image is gone.
    pub fn is_image_gone(&self) -> bool {
        matches!(self, DockerError::Refused { operation: Operation::Create, status: 404, message }
            if message.to_lowercase().contains("no such image"))
    }

    /// Whether another program holds the port that was asked for.
    pub fn is_port_taken(&self) -> bool {
        matches!(self, DockerError::Refused { message, .. }
            if message.contains("port is already allocated") || message.contains("address already in use"))
    }

    /// Whether the engine found no space where it keeps images and containers. It tells in words only.
    pub fn is_full(&self) -> bool {
        matches!(self, DockerError::Refused { message, .. } | DockerError::Image { message, .. }
            if message.to_lowercase().contains("no space left on device"))
    }

    /// Whether trying again can help without a person.
    pub fn is_temporary(&self) -> bool {
        !matches!(self, DockerError::Image { temporary: false, .. })
    }
}

type Result<T, E = DockerError> = std::result::Result<T, E>;

/// The engine of this machine, seen by one host.
#[derive(Clone)]
pub struct Docker {
    socket: String,
    client: OnceLock<Client>,
    host: HostName,
    meter: Arc<dyn Meter>,
    /// Longest time for an ordinary call.
    longest: Duration,
    owner: Option<Arc<dyn Owner>>,
}

/// Which containers of this host's name belong to this agent. Two agents may have one name by mistake, with a store each.
pub trait Owner: Send + Sync {
    /// The id that is written on what this agent makes.
    fn id(&self) -> &str;
    /// Whether containers of the agent with this id were taken over.
    fn has_adopted(&self, id: &str) -> bool;
    /// Whether this agent's directories know an app: for containers that an older demae made, which names no agent.
    fn knows(&self, app: &AppName) -> bool;
}

impl fmt::Debug for Docker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Docker").field("host", &self.host).finish_non_exhaustive()
    }
}

impl Docker {
    /// The engine behind a unix socket. It need not run, nor need the socket be there yet.
    pub fn behind(socket: &str, host: HostName) -> Self {
        let (client, meter) = (OnceLock::new(), Arc::new(NoMeter));
        Self { socket: socket.to_owned(), client, host, meter, longest: CALL, owner: None }
    }

    /// bollard makes no client without a socket, so it is made when it is first needed and can be.
    fn client(&self, operation: Operation) -> Result<&Client> {
        if let Some(client) = self.client.get() {
            return Ok(client);
        }
        match Client::connect_with_unix(&self.socket, CALL.as_secs(), bollard::API_DEFAULT_VERSION) {
            Ok(client) => Ok(self.client.get_or_init(|| client)),
            Err(e) => {
                if Operation::MEASURED.contains(&operation) {
                    self.meter.called(operation, Duration::ZERO, Some(Failure::Unreachable));
                }
                Err(DockerError::of(operation)(e))
            }
        }
    }

    /// Lets somebody hear how long calls take.
    pub fn metered(self, meter: Arc<dyn Meter>) -> Self {
        Self { meter, ..self }
    }

    /// Leaves alone what another agent of this host's name made. Without it, all of this host's name is this agent's.
    pub fn owned(self, owner: Arc<dyn Owner>) -> Self {
        Self { owner: Some(owner), ..self }
    }

    /// Waits no longer than this for the answer to an ordinary call: a person is waiting too.
    pub fn impatient(self, longest: Duration) -> Self {
        Self { longest, ..self }
    }

    async fn call<'d, T, C>(&'d self, operation: Operation, call: impl FnOnce(&'d Client) -> C) -> Result<T>
    where
        C: Future<Output = std::result::Result<T, Error>>,
    {
        self.within(self.longest, operation, call(self.client(operation)?)).await
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
                    e if e.is_status(404) && operation.may_find_nothing() => None,
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

    /// Where the engine keeps images and containers; nothing if it is on no disk of this machine.
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

    /// Starts a container, or unpauses it. One that runs is left alone.
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

    /// Marks a container as one that is being ended. One that is gone is done.
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
        if name.ends_with(LEAVING) {
            return Ok(());
        }
        // Somebody else may have that name.
        let names = (0..10).map(|n| if n == 0 { format!("{name}{LEAVING}") } else { format!("{name}.{n}{LEAVING}") });
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

    /// Asks a container to end, and kills it after its grace. One that has ended, or is gone, is done.
    ///
    /// # Errors
    /// If the engine cannot.
    pub async fn stop(&self, id: &ContainerId, grace: Duration) -> Result<()> {
        let seconds = i32::try_from(grace.as_secs()).unwrap_or(i32::MAX);
        let options = StopContainerOptionsBuilder::default().t(seconds).build();
        let patient = self.client(Operation::Stop)?.clone().with_timeout(grace + Duration::from_secs(15));
        let stop = patient.stop_container(id.as_str(), Some(options));
        match self.within(grace + Duration::from_secs(15), Operation::Stop, stop).await {
            Err(e) if e.is_status(404) => Ok(()),
            other => other,
        }
    }

    /// Removes a container. One that is gone is done.
    ///
    /// # Errors
    /// If the engine cannot, for one because it still runs, or somebody else is about to remove it and may fail.
    pub async fn remove(&self, id: &ContainerId) -> Result<()> {
        let options = RemoveContainerOptionsBuilder::default().v(true).build();
        match self.call(Operation::Remove, |client| client.remove_container(id.as_str(), Some(options))).await {
            Err(e) if e.is_status(404) => Ok(()),
            other => other,
        }
    }

    /// Lets the engine keep a container running, also when no agent is there.
    ///
    /// # Errors
    /// If the engine cannot.
    pub async fn settle(&self, id: &ContainerId) -> Result<()> {
        let policy = RestartPolicy { name: Some(RestartPolicyNameEnum::UNLESS_STOPPED), maximum_retry_count: None };
        let body = ContainerUpdateBody { restart_policy: Some(policy), ..Default::default() };
        self.call(Operation::Update, |client| client.update_container(id.as_str(), body)).await
    }

    /// The last lines of a container's log, as far as they come quickly; whole, since whoever takes secrets out must
    /// see them whole.
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
        // A log that hangs is evidence that does not come; the verdict stands without it.
        let _ = tokio::time::timeout(Duration::from_secs(2), reading).await;
        text
    }

    /// The apps whose containers something happens to. Ends when the engine does, or goes silent for good; whoever
    /// listens looks at everything and asks again.
    pub fn events(&self) -> impl Stream<Item = Result<AppName>> + use<> {
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
                // Checks run by exec would wake us twice a second and change nothing.
                if event.action.as_deref().is_some_and(|a| a.starts_with("exec_")) {
                    return None;
                }
                let attributes = event.actor?.attributes?;
                AppName::try_from(attributes.get(label::APP)?.as_str()).ok().map(Ok)
            }
            Ok(_) => None,
        });
        apps.right_stream()
    }

    /// The process of a container that need not be ours, if it runs.
    ///
    /// # Errors
    /// If there is no such container, or the engine does not answer.
    pub async fn pid_of(&self, container: &str) -> Result<Option<i32>> {
        let found = self.call(Operation::Inspect, |client| client.inspect_container(container, None)).await?;
        let pid = found.state.and_then(|s| s.pid).and_then(|p| i32::try_from(p).ok());
        Ok(pid.filter(|p| *p > 0))
    }

    /// Sends a signal to a container that need not be ours.
    ///
    /// # Errors
    /// If the engine cannot.
    pub async fn signal(&self, container: &str, signal: &str) -> Result<()> {
        let options = KillContainerOptionsBuilder::default().signal(signal).build();
        self.call(Operation::Signal, |client| client.kill_container(container, Some(options))).await
    }

    /// Runs a command in a container that need not be ours: its exit code and what it printed.
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
            if tokio::time::timeout(CALL, reading).await.is_err() {
                return Err(DockerError::Unreachable { operation: Operation::Exec, reason: "it does not end".into() });
            }
        }
        let inspected = self.call(Operation::Exec, |client| client.inspect_exec(&exec)).await?;
        Ok((inspected.exit_code.unwrap_or(-1), text))
    }
}

/// The user id of `user`, `user:group` or nothing; `None` for a name.
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

fn causes(error: &dyn std::error::Error) -> String {
    one_line(&chain(error))
}
