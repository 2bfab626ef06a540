//! The interface to the host: everything that the loop observes of it and does to it. In production that is [`World`];
//! the simulation implements it by a model.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures_util::Stream;

use crate::{
    execute::StepError,
    host::{
        docker::{ContainerEvent, DockerError, Foreign, Listed, Lists},
        nginx::{NginxError, Published},
    },
    model::{
        desired::Target,
        fleet::{CommandRun, EndedCommand, FleetImage},
        name::{AppName, ContainerId, HostName, ReleaseId},
        observed::{Health, ObservedApp, Wanted},
        policy::{BUILT_IN, Policy},
        proxy::{ObservedProxy, Vhost},
        time::Timestamp,
    },
    plan::{simulate::NewContainer, step::Step},
    retry,
    world::{ObserveError, World},
};

/// All containers and files of demae on a host.
#[derive(Debug, Default)]
pub struct Inventory {
    /// This agent's containers.
    pub containers: Vec<Listed>,
    /// Containers of another agent with this host's name.
    pub foreign: Vec<Foreign>,
    /// Whether these are all: of a container whose image cannot be inspected it is unknown whether it is demae's.
    pub is_complete: bool,
    /// Files of apps; `None` where they cannot be read, which concerns that app alone.
    pub traces: BTreeMap<AppName, Option<ObservedApp>>,
}

/// A host, its clock and its source of randomness.
pub trait Machine: Send + Sync + 'static {
    /// Its name.
    fn host(&self) -> &HostName;

    /// Now, by the monotonic clock. All observations are timed by it.
    fn now(&self) -> Timestamp;

    /// A time of that clock as wall-clock time.
    fn wall(&self, at: Timestamp) -> Timestamp;

    /// A duration with jitter, so that many hosts do not act at once.
    fn jittered(&self, duration: Duration) -> Duration {
        retry::jittered(duration)
    }

    /// Discards all health results and probes every instance again at once.
    fn reset_health(&self);

    /// Lists everything, without details.
    ///
    /// # Errors
    /// If any part cannot be observed.
    fn list(&self) -> impl Future<Output = Result<Inventory, ObserveError>> + Send;

    /// Everything of one app; its image too, if no instance tells it. `listed` are its containers, if a list has just named
    /// them and no other agent has any on this host.
    ///
    /// # Errors
    /// If any part cannot be observed.
    fn observe_app(
        &self,
        app: &AppName,
        wanted: Option<&Wanted>,
        listed: Option<Vec<String>>,
    ) -> impl Future<Output = Result<ObservedApp, ObserveError>> + Send;

    /// The state of nginx.
    fn observe_proxy(&self) -> impl Future<Output = ObservedProxy> + Send;

    /// How many of nginx's workers still finish requests of an older configuration; `None` if they cannot be counted.
    fn old_workers(&self) -> impl Future<Output = Option<usize>> + Send;

    /// The connections of instances that were counted at the last observation of the app; `None` for one that cannot be
    /// counted.
    fn recount(
        &self,
        app: &AppName,
        ids: &[ContainerId],
    ) -> impl Future<Output = Vec<(ContainerId, Option<usize>)>> + Send;

    /// Whether nginx ran at the last observation.
    fn has_nginx(&self) -> bool;

    /// Streams what happens to containers, until the stream breaks off.
    fn events(&self) -> impl Stream<Item = Result<ContainerEvent, DockerError>> + Send;

    /// The last result of the probes of an instance, if it is probed. Asks nothing.
    fn probed(&self, app: &AppName, id: &ContainerId) -> Option<Health>;

    /// Performs one step for an app, on its last observation. Returns the container that it created.
    ///
    /// # Errors
    /// If it failed; it may be retried.
    fn perform(
        &self,
        app: &AppName,
        step: &Step,
        observed: &ObservedApp,
    ) -> impl Future<Output = Result<Option<NewContainer>, StepError>> + Send;

    /// Runs the command of a release, from its image in the fleet, or waits for the end of one that was started. The flag says
    /// that this agent has written the start of it.
    ///
    /// # Errors
    /// If nothing can be said about it now; it is tried again.
    fn run_command(
        &self,
        app: &AppName,
        release: &ReleaseId,
        target: Option<&Target>,
        image: &FleetImage,
        run: (&CommandRun, bool),
    ) -> impl Future<Output = Result<EndedCommand, StepError>> + Send;

    /// Removes what a command whose end is known has left.
    ///
    /// # Errors
    /// If it cannot be removed.
    fn remove_command(&self, app: &AppName, release: &ReleaseId) -> impl Future<Output = Result<(), StepError>> + Send;

    /// Publishes a set of virtual hosts and reloads nginx.
    ///
    /// # Errors
    /// If nginx does not serve it in the end.
    fn publish(&self, vhosts: &BTreeMap<AppName, Vhost>) -> impl Future<Output = Result<Published, NginxError>> + Send;

    /// Reloads nginx, so that it serves the live set.
    ///
    /// # Errors
    /// If nginx does not serve it in the end.
    fn reload(&self) -> impl Future<Output = Result<(), NginxError>> + Send;

    /// What may run on it, by its rules of now: the same value as long as they are the same.
    fn policy(&self) -> Arc<Policy> {
        BUILT_IN.clone()
    }

    /// How many loopback ports are in use, and how many there are.
    fn ports(&self, used: &BTreeSet<u16>) -> (usize, usize);

    /// Whether new TCP apps are routed by the kernel's table.
    fn has_tcp_routes(&self) -> bool {
        false
    }

    /// Why TCP apps get published ports, if it is not by this host's settings.
    fn tcp_routes_trouble(&self) -> Option<String> {
        None
    }
}

impl Machine for World {
    fn host(&self) -> &HostName {
        &self.host
    }

    fn now(&self) -> Timestamp {
        self.clock.now()
    }

    fn wall(&self, at: Timestamp) -> Timestamp {
        self.clock.wall(at)
    }

    fn reset_health(&self) {
        if let Some(prober) = &self.prober {
            prober.reset();
        }
    }

    async fn list(&self) -> Result<Inventory, ObserveError> {
        let Lists { listed: containers, foreign, is_complete } = self.docker.list_all(None).await?;
        Ok(Inventory { containers, foreign, is_complete, traces: self.all_traces()? })
    }

    async fn observe_app(
        &self,
        app: &AppName,
        wanted: Option<&Wanted>,
        listed: Option<Vec<String>>,
    ) -> Result<ObservedApp, ObserveError> {
        self.observe_app(app, wanted, listed).await
    }

    async fn observe_proxy(&self) -> ObservedProxy {
        self.nginx.observe().await
    }

    async fn old_workers(&self) -> Option<usize> {
        self.nginx.old_workers().await.ok()
    }

    async fn recount(&self, app: &AppName, ids: &[ContainerId]) -> Vec<(ContainerId, Option<usize>)> {
        self.recount(app, ids)
    }

    fn has_nginx(&self) -> bool {
        self.nginx.known_master().is_some()
    }

    fn events(&self) -> impl Stream<Item = Result<ContainerEvent, DockerError>> + Send {
        self.docker.events()
    }

    fn probed(&self, app: &AppName, id: &ContainerId) -> Option<Health> {
        self.prober.as_ref()?.health(app, id)
    }

    async fn perform(
        &self,
        app: &AppName,
        step: &Step,
        observed: &ObservedApp,
    ) -> Result<Option<NewContainer>, StepError> {
        self.perform(app, step, observed).await
    }

    async fn run_command(
        &self,
        app: &AppName,
        release: &ReleaseId,
        target: Option<&Target>,
        image: &FleetImage,
        run: (&CommandRun, bool),
    ) -> Result<EndedCommand, StepError> {
        self.run_command(app, release, target, image, run).await
    }

    async fn remove_command(&self, app: &AppName, release: &ReleaseId) -> Result<(), StepError> {
        self.remove_command(app, release).await
    }

    async fn publish(&self, vhosts: &BTreeMap<AppName, Vhost>) -> Result<Published, NginxError> {
        self.nginx.publish(vhosts).await
    }

    async fn reload(&self) -> Result<(), NginxError> {
        self.nginx.reload().await.map(|_| ())
    }

    fn policy(&self) -> Arc<Policy> {
        self.docker.policy()
    }

    fn has_tcp_routes(&self) -> bool {
        self.tcp_routes.is_usable()
    }

    fn tcp_routes_trouble(&self) -> Option<String> {
        self.tcp_routes.trouble()
    }

    fn ports(&self, used: &BTreeSet<u16>) -> (usize, usize) {
        self.ports.usage(used)
    }
}
