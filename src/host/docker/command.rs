//! Containers that run the command of a release, once. They are no instances: they have none of the labels by which those
//! are listed.

use std::collections::{BTreeMap, HashMap};

use bollard::{
    models::{ContainerCreateBody, ContainerStateStatusEnum, HealthConfig},
    query_parameters::{CreateContainerOptionsBuilder, ListContainersOptionsBuilder},
};

use super::{Docker, DockerError, Operation, Own, create::CreateRequest, create::id};
use crate::model::{
    name::{AppName, ContainerId, ImageRef, ReleaseId},
    observed::InstanceKey,
    release::Release,
};

/// The label that names the run of the command: app, release, and when it was started.
const COMMAND: &str = "demae.command";
/// The label that names the host.
const COMMAND_HOST: &str = "demae.command-host";

/// The container of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandContainer {
    /// Its id.
    pub id: ContainerId,
    /// Which run of the command it is of.
    pub run: String,
    /// How far it is.
    pub phase: CommandPhase,
    /// The id of its image.
    pub image: String,
}

/// How far the container of a command is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CommandPhase {
    /// It was never started.
    Created,
    /// It runs, or is paused.
    Running,
    /// It has ended, with this exit code, and whether it ran out of memory.
    Exited(i64, bool),
}

impl Docker {
    fn command_name(&self, app: &AppName, release: &ReleaseId) -> String {
        format!("demae.{}.{app}.{release}.command", self.host)
    }

    /// The container of a command; `None` if there is none.
    ///
    /// # Errors
    /// If the engine cannot say.
    pub async fn command(&self, app: &AppName, release: &ReleaseId) -> Result<Option<CommandContainer>, DockerError> {
        let name = self.command_name(app, release);
        let found = match self.call(Operation::Inspect, |client| client.inspect_container(&name, None)).await {
            Err(e) if e.is_status(404) => return Ok(None),
            found => found?,
        };
        let state = found.state.unwrap_or_default();
        let phase = match state.status {
            Some(ContainerStateStatusEnum::CREATED) => CommandPhase::Created,
            Some(ContainerStateStatusEnum::EXITED | ContainerStateStatusEnum::DEAD) => {
                CommandPhase::Exited(state.exit_code.unwrap_or(-1), state.oom_killed.unwrap_or(false))
            }
            _ => CommandPhase::Running,
        };
        let labels = found.config.and_then(|config| config.labels).unwrap_or_default();
        let run = labels.get(COMMAND).cloned().unwrap_or_default();
        let image = found.image.unwrap_or_default();
        Ok(Some(CommandContainer { id: id(&found.id.unwrap_or_default())?, run, phase, image }))
    }

    /// All containers of commands of this host.
    ///
    /// # Errors
    /// If the engine does not answer.
    pub async fn commands(&self) -> Result<Vec<ContainerId>, DockerError> {
        let filters = HashMap::from([("label", vec![format!("{COMMAND_HOST}={}", self.host)])]);
        let options = ListContainersOptionsBuilder::default().all(true).filters(&filters).build();
        let found = self.call(Operation::List, |client| client.list_containers(Some(options.clone()))).await?;
        found.into_iter().filter_map(|container| container.id).map(|text| id(&text)).collect()
    }

    /// The container of an instance of a release that runs another command, without a way in and without a health check; it
    /// has no labels yet.
    pub(super) fn body_beside(
        &self,
        app: &AppName,
        (release, image): (&Release, &ImageRef),
        command: &[String],
        network: Option<&str>,
    ) -> ContainerCreateBody {
        let key = InstanceKey { release: release.id.clone(), number: 0 };
        let image = image.tagged();
        let request = CreateRequest {
            app,
            key: &key,
            release,
            image: &image,
            socket_dir: None,
            port: None,
            own_address: None,
            shared_network: network,
            real_paths: &BTreeMap::new(),
            more_ports: &[],
            drain: std::time::Duration::ZERO,
            check_host: None,
        };
        ContainerCreateBody {
            cmd: Some(command.to_vec()),
            labels: None,
            // Without this the image's own check would run.
            healthcheck: Some(HealthConfig { test: Some(vec!["NONE".to_owned()]), ..HealthConfig::default() }),
            // It does not answer for its app.
            networking_config: None,
            ..Self::body(&self.host, &request)
        }
    }

    /// The second reading of the rules, over the request for such a container.
    pub(super) fn judge_beside(
        &self,
        body: &ContainerCreateBody,
        app: &AppName,
        release: &Release,
        network: Option<&str>,
    ) -> Result<(), DockerError> {
        let network = network.filter(|_| release.container.network.is_none());
        self.judge(body, Own { app, image: &release.image, dir: None, network })
    }

    /// Creates the container of a command: that of an instance of its release, without a way in and without a health check,
    /// from the image of this reference.
    ///
    /// # Errors
    /// If the engine cannot.
    pub async fn create_command(
        &self,
        app: &AppName,
        (release, image): (&Release, &ImageRef),
        command: &[String],
        run: &str,
        network: Option<&str>,
    ) -> Result<ContainerId, DockerError> {
        let labels =
            HashMap::from([(COMMAND.to_owned(), run.to_owned()), (COMMAND_HOST.to_owned(), self.host.to_string())]);
        let body =
            ContainerCreateBody { labels: Some(labels), ..self.body_beside(app, (release, image), command, network) };
        self.judge_beside(&body, app, release, network)?;
        let options = CreateContainerOptionsBuilder::default().name(&self.command_name(app, &release.id)).build();
        let created =
            self.call(Operation::Create, |client| client.create_container(Some(options), body.clone())).await?;
        id(&created.id)
    }
}
