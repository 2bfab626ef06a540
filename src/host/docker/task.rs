//! Commands that a person runs: in a container of an app, or in one of their own. Input and output are the person's.

use std::{collections::HashMap, pin::Pin};

use bollard::{
    container::LogOutput,
    errors::Error,
    exec::StartExecResults,
    models::{ContainerCreateBody, ExecConfig},
    query_parameters::{
        AttachContainerOptionsBuilder, CreateContainerOptionsBuilder, LogsOptionsBuilder,
        ResizeContainerTTYOptionsBuilder, ResizeExecOptionsBuilder, WaitContainerOptionsBuilder,
    },
};
use futures_util::{Stream, StreamExt as _};
use tokio::io::AsyncWrite;

use super::{Docker, DockerError, Operation, Result, create::id};
use crate::model::{
    name::{AppName, ContainerId, ImageRef},
    release::Release,
};

/// The label of a container of a task: the app. It has none of the labels of an instance.
const TASK: &str = "demae.task";
/// The label that names the host.
const TASK_HOST: &str = "demae.task-host";

/// How a command is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terminal {
    /// Whether it gets standard input.
    pub input: bool,
    /// Whether it has a terminal.
    pub tty: bool,
}

/// A piece of what a command prints.
#[derive(Debug)]
pub struct Printed {
    /// Whether it is of its standard error.
    pub is_error: bool,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// A command that runs.
pub struct Task {
    /// What it prints.
    pub output: Output,
    /// What it reads.
    pub input: Pin<Box<dyn AsyncWrite + Send>>,
    what: What,
}

/// What a command prints.
pub struct Output(Pin<Box<dyn Stream<Item = std::result::Result<LogOutput, Error>> + Send>>);

/// What is waited for.
enum What {
    Container(ContainerId),
    Exec(String),
}

impl Output {
    /// The next piece; `None` at its end. Cancel-safe.
    ///
    /// # Errors
    /// If the connection is lost.
    pub async fn next(&mut self) -> Option<Result<Printed>> {
        let printed = |is_error, message: &[u8]| Printed { is_error, bytes: message.to_vec() };
        Some(match self.0.next().await? {
            Ok(LogOutput::StdErr { message }) => Ok(printed(true, &message)),
            Ok(LogOutput::StdOut { message } | LogOutput::StdIn { message } | LogOutput::Console { message }) => {
                Ok(printed(false, &message))
            }
            Err(e) => Err(DockerError::of(Operation::Exec)(e)),
        })
    }
}

impl Docker {
    /// Creates the container of a task: that of an instance of a release, without a way in and without a health check, from
    /// the image of this reference. The caller removes it.
    ///
    /// # Errors
    /// If the engine cannot.
    pub async fn create_task(
        &self,
        app: &AppName,
        (release, image): (&Release, &ImageRef),
        command: &[String],
        terminal: Terminal,
        network: Option<&str>,
    ) -> Result<ContainerId> {
        let body = self.body_beside(app, (release, image), command, network);
        let mut host_config = body.host_config.unwrap_or_default();
        host_config.restart_policy = None;
        let body = ContainerCreateBody {
            labels: Some(HashMap::from([
                (TASK.to_owned(), app.to_string()),
                (TASK_HOST.to_owned(), self.host.to_string()),
            ])),
            host_config: Some(host_config),
            tty: Some(terminal.tty),
            open_stdin: Some(terminal.input),
            stdin_once: Some(terminal.input),
            attach_stdin: Some(terminal.input),
            attach_stdout: Some(true),
            attach_stderr: Some(true),
            ..body
        };
        self.judge_beside(&body, app, release, network)?;
        let number = std::process::id();
        let name = format!("demae.{}.{app}.{}.task-{number}", self.host, release.id);
        let options = CreateContainerOptionsBuilder::default().name(&name).build();
        let created =
            self.call(Operation::Create, |client| client.create_container(Some(options), body.clone())).await?;
        id(&created.id)
    }

    /// Attaches to a container that was not started yet, so that nothing of its output is lost.
    ///
    /// # Errors
    /// If the engine cannot.
    pub async fn attach(&self, container: &ContainerId, terminal: Terminal) -> Result<Task> {
        let options = AttachContainerOptionsBuilder::default().stream(true).stdin(terminal.input).stdout(true);
        let options = options.stderr(true).build();
        let name = container.as_str();
        let attached =
            self.call(Operation::Exec, |client| client.attach_container(name, Some(options.clone()))).await?;
        Ok(Task { output: Output(attached.output), input: attached.input, what: What::Container(container.clone()) })
    }

    /// The exit code of a container that was started, once it has ended.
    ///
    /// # Errors
    /// If the engine does not say.
    pub async fn exit_code(&self, container: &ContainerId) -> Result<i64> {
        let options = WaitContainerOptionsBuilder::default().condition("not-running").build();
        let mut waiting = self.client(Operation::Inspect)?.wait_container(container.as_str(), Some(options));
        match waiting.next().await {
            Some(Ok(ended)) => Ok(ended.status_code),
            Some(Err(Error::DockerContainerWaitError { code, .. })) => Ok(code),
            Some(Err(e)) => Err(DockerError::of(Operation::Inspect)(e)),
            None => Ok(-1),
        }
    }

    /// Runs a command in a container that runs.
    ///
    /// # Errors
    /// If the engine cannot.
    pub async fn exec_task(&self, container: &ContainerId, command: &[String], terminal: Terminal) -> Result<Task> {
        let config = ExecConfig {
            attach_stdin: Some(terminal.input),
            attach_stdout: Some(true),
            attach_stderr: Some(true),
            tty: Some(terminal.tty),
            cmd: Some(command.to_vec()),
            ..ExecConfig::default()
        };
        let name = container.as_str();
        let exec = self.call(Operation::Exec, |client| client.create_exec(name, config)).await?.id;
        match self.call(Operation::Exec, |client| client.start_exec(&exec, None)).await? {
            StartExecResults::Attached { output, input } => {
                Ok(Task { output: Output(output), input, what: What::Exec(exec) })
            }
            StartExecResults::Detached => Err(DockerError::Refused {
                operation: Operation::Exec,
                status: 500,
                message: "it is not attached".to_owned(),
            }),
        }
    }

    /// The exit code of a command in a container, once its output has ended; `None` if it still runs.
    ///
    /// # Errors
    /// If the engine does not answer.
    pub async fn exec_code(&self, task: &Task) -> Result<Option<i64>> {
        let What::Exec(exec) = &task.what else { return Ok(None) };
        Ok(self.call(Operation::Exec, |client| client.inspect_exec(exec)).await?.exit_code)
    }

    /// What a container prints, a line each: so many from before, and with `follow` what comes. Ends with the container, and
    /// without a word if the engine cannot read its log.
    ///
    /// # Errors
    /// If the engine cannot be reached.
    pub fn log_lines(
        &self,
        container: &ContainerId,
        lines: u32,
        follow: bool,
        timestamps: bool,
    ) -> Result<impl Stream<Item = String> + Send + use<>> {
        let options = LogsOptionsBuilder::default().stdout(true).stderr(true).tail(&lines.to_string());
        let options = options.follow(follow).timestamps(timestamps).build();
        let log = self.client(Operation::Inspect)?.logs(container.as_str(), Some(options));
        let texts = log.take_while(|piece| std::future::ready(piece.is_ok())).filter_map(|piece| async move {
            piece.ok().map(|piece| String::from_utf8_lossy(&piece.into_bytes()).into_owned())
        });
        let split = |text: String| text.lines().map(str::to_owned).collect::<Vec<_>>();
        Ok(texts.map(split).flat_map(futures_util::stream::iter))
    }

    /// Says how large the terminal of a task is.
    ///
    /// # Errors
    /// If the engine cannot, for example since the task has ended.
    pub async fn resize(&self, task: &Task, columns: u16, rows: u16) -> Result<()> {
        let (w, h) = (i32::from(columns), i32::from(rows));
        match &task.what {
            What::Container(container) => {
                let options = ResizeContainerTTYOptionsBuilder::default().w(w).h(h).build();
                let name = container.as_str();
                self.call(Operation::Exec, |client| client.resize_container_tty(name, options)).await
            }
            What::Exec(exec) => {
                let options = ResizeExecOptionsBuilder::default().w(w).h(h).build();
                self.call(Operation::Exec, |client| client.resize_exec(exec, options)).await
            }
        }
    }
}
