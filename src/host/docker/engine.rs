//! The engine itself: its version, its machine, and what it tells of containers as it happens.

use std::{collections::HashMap, path::PathBuf};

use bollard::{Docker as Client, models::EventMessageTypeEnum, query_parameters::EventsOptionsBuilder};
use futures_util::{Stream, StreamExt as _, stream};

use super::{Docker, DockerError, Operation, Result, label};
use crate::{
    host::files,
    model::{fleet::Capacity, name::AppName},
};

/// Something happened to a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerEvent {
    /// Its app.
    pub app: AppName,
    /// Whether it answers no more.
    pub is_end: bool,
}

impl Docker {
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
}
