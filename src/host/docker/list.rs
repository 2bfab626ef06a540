//! Lists containers.

use std::{collections::HashMap, net::Ipv4Addr};

use bollard::{models::ContainerSummary, query_parameters::ListContainersOptionsBuilder};
use futures_util::future::join_all;

use super::{
    Docker, DockerError, Operation, Result,
    found::{Found, read},
    label,
};
use crate::{
    host::clock::Clock,
    model::{name::AppName, observed::Foreign},
};

/// The containers of one app.
#[derive(Debug, Default)]
pub struct Instances {
    /// This agent's containers.
    pub own: Vec<Found>,
    /// Containers of another agent with this host's name.
    pub foreign: Vec<Foreign>,
}

/// Containers with this host's labels: this agent's, another agent's, and those that demae did not create.
#[derive(Default)]
struct Labelled {
    own: Vec<ContainerSummary>,
    foreign: Vec<Foreign>,
    copies: Vec<ContainerSummary>,
    /// Whether the owner of some is unknown, since their image cannot be inspected.
    has_unknown: bool,
}

/// Containers of this host, without details.
#[derive(Debug, Default)]
pub struct Lists {
    /// This agent's.
    pub listed: Vec<Listed>,
    /// Those of another agent with this host's name.
    pub foreign: Vec<Foreign>,
    /// Whether these are all: the owner of a container is unknown while its image cannot be inspected.
    pub is_complete: bool,
}

/// The agent id of containers without one.
const NO_AGENT_ID: &str = "none";

/// A listed container: enough to detect changes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Listed {
    /// Which app.
    pub app: AppName,
    /// Docker's id.
    pub id: String,
    /// Its state, as Docker names it.
    pub state: String,
    /// Its published ports.
    pub ports: Vec<u16>,
    /// The fixed address it was created with, if it has one.
    pub address: Option<Ipv4Addr>,
}

impl Docker {
    /// All containers of this host, or of one of its apps, without details.
    ///
    /// # Errors
    /// If the engine does not answer.
    pub async fn list(&self, app: Option<&AppName>) -> Result<Vec<Listed>> {
        Ok(self.list_all(app).await?.listed)
    }

    /// The same, and containers of another agent with this host's name.
    ///
    /// # Errors
    /// If the engine does not answer.
    pub async fn list_all(&self, app: Option<&AppName>) -> Result<Lists> {
        let found = self.labelled(app).await?;
        let mut listed: Vec<Listed> = found.own.iter().filter_map(listing).collect();
        listed.sort();
        Ok(Lists { listed, foreign: found.foreign, is_complete: !found.has_unknown })
    }

    /// Names of containers with this host's labels that demae did not create.
    ///
    /// # Errors
    /// If the engine does not answer.
    pub async fn copies(&self) -> Result<Vec<String>> {
        Ok(self.labelled(None).await?.copies.iter().map(|container| name(container).to_owned()).collect())
    }

    /// The containers of an app, with details. If the ids of this agent's are known from a list that was just made, and
    /// no other agent has any here, that list need not be made again.
    ///
    /// # Errors
    /// If the engine does not answer, or a container has labels that make no sense.
    pub async fn instances(&self, app: &AppName, listed: Option<Vec<String>>, clock: &Clock) -> Result<Instances> {
        let (listed, foreign) = match listed {
            Some(listed) => (listed, Vec::new()),
            None => {
                let Lists { listed, foreign, .. } = self.list_all(Some(app)).await?;
                (listed.into_iter().map(|l| l.id).collect(), foreign)
            }
        };
        let inspect = |id: String| async move {
            let details = self.call(Operation::Inspect, |client| client.inspect_container(&id, None)).await;
            (id, details)
        };
        let mut instances = Vec::new();
        for (id, details) in join_all(listed.into_iter().map(inspect)).await {
            match details {
                Ok(details) => instances.push(read(app, &id, details, clock)?),
                // Gone since the list.
                Err(e) if e.is_status(404) => {}
                Err(e) => return Err(e),
            }
        }
        instances.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(Instances { own: instances, foreign })
    }

    /// Containers with the labels of this host, or of one of its apps, by owner.
    async fn labelled(&self, app: Option<&AppName>) -> Result<Labelled> {
        let mut labels = vec![format!("{}={}", label::HOST, self.host)];
        labels.extend(app.map(|app| format!("{}={app}", label::APP)));
        let options =
            ListContainersOptionsBuilder::default().all(true).filters(&HashMap::from([("label", labels)])).build();
        let labelled = self.call(Operation::List, |client| client.list_containers(Some(options))).await?;
        let checked = labelled.into_iter().map(|container| async { (self.is_made_here(&container).await, container) });
        let mut found = Labelled::default();
        for (is_made_here, container) in join_all(checked).await {
            match is_made_here {
                Ok(true) => match self.other_owner(&container) {
                    None => found.own.push(container),
                    Some(owner) => found.foreign.push(Foreign { name: name(&container).to_owned(), owner }),
                },
                Ok(false) => found.copies.push(container),
                // Ownership is unknown here; the per-app inspect decides, and fails until the image can be inspected.
                // Other containers are not held up.
                Err(DockerError::Refused { .. }) if app.is_none() => found.has_unknown = true,
                Err(e) => return Err(e),
            }
        }
        found.foreign.sort();
        Ok(found)
    }

    /// The owner of a container, if it is not this agent.
    fn other_owner(&self, container: &ContainerSummary) -> Option<String> {
        let owner = self.owner.as_ref()?;
        let labels = container.labels.as_ref()?;
        match labels.get(label::AGENT) {
            Some(id) if id == owner.id() || owner.has_adopted(id) => None,
            Some(id) => Some(format!("agent {id}")),
            None => {
                let app = AppName::try_from(labels.get(label::APP)?.as_str()).ok()?;
                let is_ours = owner.has_traces_of(&app) || owner.has_adopted(NO_AGENT_ID);
                (!is_ours).then(|| {
                    format!(
                        "the container has no agent id (`{NO_AGENT_ID}`), and this agent has no files of app `{app}`"
                    )
                })
            }
        }
    }

    /// Labels alone prove little: an image committed from a container has its labels, and so has every container run
    /// from it. Containers of demae are named after their instance; for a renamed one the image tells where the labels
    /// are from. One whose image is gone is left alone.
    async fn is_made_here(&self, container: &ContainerSummary) -> Result<bool> {
        if name(container).starts_with(&format!("demae.{}.", self.host)) {
            return Ok(true);
        }
        let labels = self.image_labels(container.image_id.as_deref().unwrap_or_default()).await?;
        Ok(labels.is_some_and(|labels| !labels.contains_key(label::HOST)))
    }
}

fn name(container: &ContainerSummary) -> &str {
    // Names prefixed with that of another container are links to it.
    let names = container.names.iter().flatten().map(|name| name.trim_start_matches('/'));
    names.min_by_key(|name| name.matches('/').count()).unwrap_or_default()
}

fn listing(container: &ContainerSummary) -> Option<Listed> {
    let labels = container.labels.as_ref()?;
    let app = AppName::try_from(labels.get(label::APP)?.as_str()).ok()?;
    let ports = [label::PORT, label::MORE_PORTS].into_iter().filter_map(|name| labels.get(name));
    let ports = ports.flat_map(|ports| ports.split(',')).filter_map(|p| p.parse().ok()).collect();
    let state = container.state.map(|s| s.to_string()).unwrap_or_default();
    let address = labels.get(label::ADDRESS).and_then(|address| address.parse().ok());
    Some(Listed { app, id: container.id.clone()?, state, ports, address })
}
