//! What is done to a container that is there, and asked of it.

use std::{net::IpAddr, time::Duration};

use bollard::{
    container::LogOutput,
    exec::StartExecResults,
    models::{ContainerUpdateBody, ExecConfig, RestartPolicy, RestartPolicyNameEnum},
    query_parameters::{
        KillContainerOptionsBuilder, LogsOptionsBuilder, RemoveContainerOptionsBuilder, RenameContainerOptionsBuilder,
        StopContainerOptionsBuilder,
    },
};
use futures_util::StreamExt as _;

use super::{CALL_TIMEOUT, Docker, DockerError, Operation, Result, found, found::LEAVING_SUFFIX};
use crate::model::name::ContainerId;

impl Docker {
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
