//! Which containers there are.

use std::collections::HashMap;

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
    /// Those of this agent.
    pub own: Vec<Found>,
    /// Those of another one with this host's name.
    pub foreign: Vec<Foreign>,
}

/// Containers with the labels of this host's: those of this agent, those of another one, and those that demae did not
/// make.
#[derive(Default)]
struct Labelled {
    own: Vec<ContainerSummary>,
    foreign: Vec<Foreign>,
    copies: Vec<ContainerSummary>,
}

/// What stands for the id of an agent that wrote none on its containers.
const NO_ID: &str = "none";

/// One line of a list: enough to see whether anything changed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Listed {
    /// Which app.
    pub app: AppName,
    /// Docker's id.
    pub id: String,
    /// Its state in Docker's words.
    pub state: String,
    /// Its published ports.
    pub ports: Vec<u16>,
}

impl Docker {
    /// All containers of this host, or of one of its apps, without details.
    ///
    /// # Errors
    /// If the engine does not answer.
    pub async fn list(&self, app: Option<&AppName>) -> Result<Vec<Listed>> {
        Ok(self.list_all(app).await?.0)
    }

    /// The same, and the containers of another agent with this host's name.
    ///
    /// # Errors
    /// If the engine does not answer.
    pub async fn list_all(&self, app: Option<&AppName>) -> Result<(Vec<Listed>, Vec<Foreign>)> {
        let found = self.told_apart(app).await?;
        let mut listed: Vec<Listed> = found.own.iter().filter_map(listing).collect();
        listed.sort();
        Ok((listed, found.foreign))
    }

    /// Names of containers with the labels of this host's that demae did not make.
    ///
    /// # Errors
    /// If the engine does not answer.
    pub async fn copies(&self) -> Result<Vec<String>> {
        Ok(self.told_apart(None).await?.copies.iter().map(|container| name(container).to_owned()).collect())
    }

    /// The containers of an app, with details.
    ///
    /// # Errors
    /// If the engine does not answer, or a container has labels that make no sense.
    pub async fn instances(&self, app: &AppName, clock: &Clock) -> Result<Instances> {
        let (listed, foreign) = self.list_all(Some(app)).await?;
        let inspect = |id: String| async move {
            let details = self.call(Operation::Inspect, |client| client.inspect_container(&id, None)).await;
            (id, details)
        };
        let mut instances = Vec::new();
        for (id, details) in join_all(listed.into_iter().map(|l| inspect(l.id))).await {
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

    /// Containers with the labels of this host's, or of one of its apps: those that demae made, and all others.
    async fn told_apart(&self, app: Option<&AppName>) -> Result<Labelled> {
        let mut labels = vec![format!("{}={}", label::HOST, self.host)];
        labels.extend(app.map(|app| format!("{}={app}", label::APP)));
        let options =
            ListContainersOptionsBuilder::default().all(true).filters(&HashMap::from([("label", labels)])).build();
        let labelled = self.call(Operation::List, |client| client.list_containers(Some(options))).await?;
        let told = labelled.into_iter().map(|container| async { (self.is_made_here(&container).await, container) });
        let mut found = Labelled::default();
        for (is_made_here, container) in join_all(told).await {
            match is_made_here {
                Ok(true) => match self.other_owner(&container) {
                    None => found.own.push(container),
                    Some(owner) => found.foreign.push(Foreign { name: name(&container).to_owned(), owner }),
                },
                Ok(false) => found.copies.push(container),
                // Whose it is shows when its app is looked at, which waits for that. All others are not held up.
                Err(DockerError::Refused { .. }) if app.is_none() => {}
                Err(e) => return Err(e),
            }
        }
        found.foreign.sort();
        Ok(found)
    }

    /// Whose a container is, if it is not this agent's.
    fn other_owner(&self, container: &ContainerSummary) -> Option<String> {
        let owner = self.owner.as_ref()?;
        let labels = container.labels.as_ref()?;
        match labels.get(label::AGENT) {
            Some(id) if id == owner.id() || owner.has_adopted(id) => None,
            Some(id) => Some(format!("the one with the id {id}")),
            None => {
                let app = AppName::try_from(labels.get(label::APP)?.as_str()).ok()?;
                let is_ours = owner.knows(&app) || owner.has_adopted(NO_ID);
                (!is_ours).then(|| {
                    format!("this one's directories know nothing of app `{app}`, and the container names no agent (id `{NO_ID}`)")
                })
            }
        }
    }

    /// Labels alone say little: an image that somebody commits from a container has its labels, and so has whatever is run
    /// from it. What demae makes is named after its instance; a person may have renamed it, and then its image tells whose
    /// the labels are. One whose image is gone is left alone.
    async fn is_made_here(&self, container: &ContainerSummary) -> Result<bool> {
        if name(container).starts_with(&format!("demae.{}.", self.host)) {
            return Ok(true);
        }
        let labels = self.image_labels(container.image_id.as_deref().unwrap_or_default()).await?;
        Ok(labels.is_some_and(|labels| !labels.contains_key(label::HOST)))
    }
}

fn name(container: &ContainerSummary) -> &str {
    // Names that begin with those of other containers are links to it.
    let names = container.names.iter().flatten().map(|name| name.trim_start_matches('/'));
    names.min_by_key(|name| name.matches('/').count()).unwrap_or_default()
}

fn listing(container: &ContainerSummary) -> Option<Listed> {
    let labels = container.labels.as_ref()?;
    let app = AppName::try_from(labels.get(label::APP)?.as_str()).ok()?;
    let ports = [label::PORT, label::MORE_PORTS].into_iter().filter_map(|name| labels.get(name));
    let ports = ports.flat_map(|ports| ports.split(',')).filter_map(|p| p.parse().ok()).collect();
    let state = container.state.map(|s| s.to_string()).unwrap_or_default();
    Some(Listed { app, id: container.id.clone()?, state, ports })
}
