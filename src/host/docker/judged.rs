//! What containers may be created: the second reading of the rules of this host.

use std::sync::Arc;

use bollard::models::ContainerCreateBody;

use super::{Docker, DockerError, Result};
use crate::{
    host::policy::PolicyFile,
    model::{
        name::{AppName, ImageRef},
        policy::{self, Policy},
    },
};

/// What a request holds that is not of a spec.
#[derive(Clone, Copy)]
pub(super) struct Own<'a> {
    pub(super) app: &'a AppName,
    pub(super) image: &'a ImageRef,
    /// The directory of its socket.
    pub(super) dir: Option<&'a str>,
    /// The network that it joins without having named it.
    pub(super) network: Option<&'a str>,
}

impl Docker {
    /// Creates only what these rules allow; otherwise, what built-in ones do.
    pub fn with_policy(self, policy: Arc<PolicyFile>) -> Self {
        Self { policy, ..self }
    }

    /// The rules for what is created, as they are now.
    pub fn policy(&self) -> Arc<Policy> {
        self.policy.current()
    }

    /// The second reading of the rules, over a request as the engine gets it.
    pub(super) fn judge(&self, body: &ContainerCreateBody, own: Own<'_>) -> Result<()> {
        let unreadable = |e: serde_json::Error| DockerError::NotAllowed(e.to_string());
        let body = serde_json::to_value(body).map_err(unreadable)?;
        let Own { app, image, dir: own_dir, network: own_network } = own;
        let request = policy::Request { app, image: image.as_str(), body: &body, own_dir, own_network };
        let found = policy::judge(&self.policy(), request);
        if found.is_empty() { Ok(()) } else { Err(DockerError::NotAllowed(found.join(", "))) }
    }
}
