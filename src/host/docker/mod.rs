//! The Docker engine: the only users of `bollard`.
//!
//! Only containers with our label *and* our host name are ever seen, so several agents can share one engine. Every call
//! has a deadline; after a timeout nothing is assumed, the next observation decides.

mod command;
mod control;
mod create;
mod engine;
mod error;
mod found;
mod image;
mod judged;
mod list;
mod meter;
mod network;
mod task;

use std::{
    fmt,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use bollard::{Docker as Client, errors::Error};

pub use crate::model::observed::Foreign;
pub use command::{CommandContainer, CommandPhase};
pub use create::{CreateRequest, create_body, injected_env};
pub use engine::ContainerEvent;
pub use error::{DockerError, ImageFault};
use error::{one_line, one_line_chain};
pub use found::Found;
use judged::Own;
pub use list::{Instances, Listed, Lists};
pub use meter::{Failure, Meter, NoMeter, Operation};
pub use network::{BridgeNetwork, OwnAddress};
pub use task::{Printed, Task, Terminal};

use crate::{
    host::{policy::PolicyFile, registry::Logins},
    model::name::{AppName, HostName},
};

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
}
