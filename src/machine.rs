//! The seam to the host: all that the loop sees of its host, and does to it. In service that is [`World`]; histories that no
//! real host would live through in an afternoon are played on a model of one.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use futures_util::Stream;

use crate::{
    execute::StepError,
    host::{
        docker::{DockerError, Foreign, Listed},
        nginx::{NginxError, Published},
    },
    model::{
        name::{AppName, HostName},
        observed::{ObservedApp, Wanted},
        proxy::{ObservedProxy, Vhost},
        time::Timestamp,
    },
    plan::step::Step,
    retry,
    world::{ObserveError, World},
};

/// Every container of demae's on a host, and what apps have left on disk.
#[derive(Debug, Default)]
pub struct Inventory {
    /// Containers of this agent.
    pub containers: Vec<Listed>,
    /// Containers with this host's name that another agent made.
    pub foreign: Vec<Foreign>,
    /// What apps have left on disk; `None` where that cannot be read, which concerns that app alone.
    pub traces: BTreeMap<AppName, Option<ObservedApp>>,
}

/// A host, its clock and its chance.
pub trait Machine: Send + Sync + 'static {
    /// Its name.
    fn host(&self) -> &HostName;

    /// Now, by a clock that nobody sets. All that is observed is timed by it.
    fn now(&self) -> Timestamp;

    /// A time of that clock as people's clocks show it.
    fn wall(&self, at: Timestamp) -> Timestamp;

    /// A duration, give or take a little, so that many hosts do not act at once.
    fn jittered(&self, duration: Duration) -> Duration {
        retry::jittered(duration)
    }

    /// Forgets what instances last answered, and asks them again at once: nobody could ask them for a while.
    fn forget_health(&self);

    /// Everything, in little detail.
    ///
    /// # Errors
    /// If a part of it cannot be seen.
    fn list(&self) -> impl Future<Output = Result<Inventory, ObserveError>> + Send;

    /// Everything of one app; its image too, if no instance tells it.
    ///
    /// # Errors
    /// If a part of it cannot be seen.
    fn observe_app(
        &self,
        app: &AppName,
        wanted: Option<&Wanted>,
    ) -> impl Future<Output = Result<ObservedApp, ObserveError>> + Send;

    /// nginx.
    fn observe_proxy(&self) -> impl Future<Output = ObservedProxy> + Send;

    /// How many of nginx's workers still finish requests of an older configuration; `None` if they cannot be counted.
    fn old_workers(&self) -> impl Future<Output = Option<usize>> + Send;

    /// Whether nginx runs, as far as was seen last.
    fn has_nginx(&self) -> bool;

    /// Hints that something happened to an app, until they break off.
    fn events(&self) -> impl Stream<Item = Result<AppName, DockerError>> + Send;

    /// Does one step for an app, on what was observed of it.
    ///
    /// # Errors
    /// If it could not be done; it may be tried again.
    fn perform(
        &self,
        app: &AppName,
        step: &Step,
        observed: &ObservedApp,
    ) -> impl Future<Output = Result<(), StepError>> + Send;

    /// Makes a set of virtual hosts the one that nginx serves.
    ///
    /// # Errors
    /// If it does not get to serve it.
    fn publish(&self, vhosts: &BTreeMap<AppName, Vhost>) -> impl Future<Output = Result<Published, NginxError>> + Send;

    /// Makes nginx serve the live set.
    ///
    /// # Errors
    /// If it does not get to serve it.
    fn reload(&self) -> impl Future<Output = Result<(), NginxError>> + Send;

    /// How many loopback ports are in use, and how many there are.
    fn ports(&self, used: &BTreeSet<u16>) -> (usize, usize);
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

    fn forget_health(&self) {
        if let Some(prober) = &self.prober {
            prober.forget();
        }
    }

    async fn list(&self) -> Result<Inventory, ObserveError> {
        let (containers, foreign) = self.docker.list_all(None).await?;
        Ok(Inventory { containers, foreign, traces: self.all_traces()? })
    }

    async fn observe_app(&self, app: &AppName, wanted: Option<&Wanted>) -> Result<ObservedApp, ObserveError> {
        self.observe_app(app, wanted).await
    }

    async fn observe_proxy(&self) -> ObservedProxy {
        self.nginx.observe().await
    }

    async fn old_workers(&self) -> Option<usize> {
        self.nginx.old_workers().await.ok()
    }

    fn has_nginx(&self) -> bool {
        self.nginx.known_master().is_some()
    }

    fn events(&self) -> impl Stream<Item = Result<AppName, DockerError>> + Send {
        self.docker.events()
    }

    async fn perform(&self, app: &AppName, step: &Step, observed: &ObservedApp) -> Result<(), StepError> {
        self.perform(app, step, observed).await
    }

    async fn publish(&self, vhosts: &BTreeMap<AppName, Vhost>) -> Result<Published, NginxError> {
        self.nginx.publish(vhosts).await
    }

    async fn reload(&self) -> Result<(), NginxError> {
        self.nginx.reload().await.map(|_| ())
    }

    fn ports(&self, used: &BTreeSet<u16>) -> (usize, usize) {
        self.ports.usage(used)
    }
}
