//! Creates containers: what each of them gets of this host.

use std::{
    collections::{BTreeMap, HashSet},
    net::SocketAddrV4,
    os::unix::fs::FileTypeExt as _,
    path::Path,
    time::Duration,
};

use super::StepError;
use crate::{
    failpoint,
    host::{
        docker::CreateRequest,
        files::{self, FileError},
        policy::real_path,
        tcp_routes::TcpRouteError,
    },
    model::{
        name::AppName,
        observed::{Address, Bind, InstanceKey, ObservedApp},
        release::Release,
        spec::{ContainerSpec, Endpoint, VolumeSource},
    },
    plan::simulate::NewContainer,
    world::World,
};

impl World {
    pub(super) async fn create(
        &self,
        app: &AppName,
        key: &InstanceKey,
        release: &Release,
        image: &str,
        (drain, check_host): (Duration, Option<&str>),
        observed: &ObservedApp,
    ) -> Result<Option<NewContainer>, StepError> {
        let (mut socket_dir, mut port, mut more_ports, mut own_address) = (None, None, Vec::new(), None);
        match &release.endpoint {
            Some(Endpoint::Socket(_)) => {
                let dir = self.layout.socket_dir(app, key);
                self.make_socket_dir(app, &dir)?;
                socket_dir = Some(dir.to_string_lossy().into_owned());
            }
            Some(Endpoint::Port(_)) if self.has_own_address(release, observed).await? => {
                own_address = Some(self.tcp_routes.allocate().await?);
            }
            Some(Endpoint::Port(_)) => {
                let taken: HashSet<u16> = self.docker.list(None).await?.into_iter().flat_map(|l| l.ports).collect();
                let allocate =
                    |number: usize| self.ports.allocate(&format!("{}.{app}.{key}.{number}", self.host), &taken);
                port = Some(allocate(0)?);
                for number in 1..=release.more_endpoints.len() {
                    more_ports.push(allocate(number)?);
                }
            }
            None => {}
        }
        let real_paths = self.check_mounts(app, &release.container)?;
        failpoint::boundary("prepared");
        let socket_dir = socket_dir.as_deref();
        let more_ports = more_ports.as_slice();
        let own_address = own_address.as_ref();
        let shared_network = self.shared_network(release).await;
        let request = CreateRequest {
            app,
            key,
            release,
            image,
            socket_dir,
            port,
            own_address,
            shared_network,
            real_paths: &real_paths,
            more_ports,
            drain,
            check_host,
        };
        let Some(id) = self.docker.create(&request).await? else { return Ok(None) };
        let address = match &release.endpoint {
            Some(Endpoint::Socket(path)) => Some(self.socket_address(app, key, path)),
            Some(Endpoint::Port(inside)) => own_address
                .map(|own| Address::Own(SocketAddrV4::new(own.ip, *inside)))
                .or_else(|| port.map(Address::Port)),
            None => None,
        };
        Ok(Some(NewContainer { id, address }))
    }

    /// Whether a new container of a release gets an address of its own, in place of published ports. All instances of a
    /// release are reached in the same way.
    async fn has_own_address(&self, release: &Release, observed: &ObservedApp) -> Result<bool, StepError> {
        let has_one = release.more_endpoints.is_empty() && !observed.slot_addresses.is_empty();
        if !has_one || release.container.network.is_some() {
            return Ok(false);
        }
        let why_not = self.tcp_routes.why_unusable().await;
        let siblings = observed.instances.iter().filter(|i| i.key.release == release.id);
        match (siblings.filter_map(|i| i.address.as_ref()).next(), why_not) {
            (Some(Address::Own(_)), Some(why)) => Err(TcpRouteError::Unusable(why).into()),
            (Some(address), _) => Ok(matches!(address, Address::Own(_))),
            (None, why_not) => Ok(why_not.is_none()),
        }
    }

    /// The network where apps of this host find each other. Those that are reached by a socket stay out of it: Docker
    /// sets up a resolver in each container there, which takes as long as the rest of its start.
    pub(crate) async fn shared_network(&self, release: &Release) -> Option<&str> {
        if matches!(release.endpoint, Some(Endpoint::Socket(_))) || release.container.network.is_some() {
            return None;
        }
        self.tcp_routes.why_unusable().await.is_none().then(|| self.tcp_routes.network())
    }

    /// Docker follows symlinks, and an app may create one below a mounted directory: what a path leads to must be allowed as
    /// well. Returns that, by path.
    pub(crate) fn check_mounts(
        &self,
        app: &AppName,
        container: &ContainerSpec,
    ) -> Result<BTreeMap<String, String>, StepError> {
        let mut found = BTreeMap::new();
        for volume in &container.volumes {
            let VolumeSource::Host(path) = &volume.source else { continue };
            // Docker refuses a missing path.
            let Ok(real) = std::fs::canonicalize(path) else { continue };
            let real = real.to_string_lossy().into_owned();
            if !self.admits_real_path(app, &real, volume.read_only) {
                return Err(StepError::Mount { path: path.clone(), real });
            }
            found.insert(path.clone(), real);
        }
        Ok(found)
    }

    fn admits_real_path(&self, app: &AppName, real: &str, read_only: bool) -> bool {
        // Its user has the rights of who listens there, whatever it is called.
        let is_socket = std::fs::metadata(real).is_ok_and(|found| found.file_type().is_socket());
        self.docker.policy().admits_real_path(app, real, (read_only, is_socket), &real_path)
    }

    /// Before a container is started again: its paths still lead to where they led when it was created, or to what the app
    /// may mount now.
    pub(super) fn check_binds(&self, app: &AppName, binds: &[Bind]) -> Result<(), StepError> {
        for Bind { source, read_only, real: before } in binds {
            let Ok(real) = std::fs::canonicalize(source) else { continue };
            let real = real.to_string_lossy().into_owned();
            // Older demae versions did not write it down, and let no path be a link out of its place.
            let is_same = before.as_ref().unwrap_or(source) == &real;
            if !is_same && !self.admits_real_path(app, &real, *read_only) {
                return Err(StepError::Mount { path: source.clone(), real });
            }
        }
        Ok(())
    }

    /// Creates the directory of a socket, closed, in directories that a group may be let into. Existing ones are left
    /// as they are: requests to other instances pass through, and closing them for a moment is enough to lose one.
    pub(super) fn make_socket_dir(&self, app: &AppName, dir: &Path) -> Result<(), FileError> {
        for dir in [&*self.layout.sockets(), &*self.layout.app_sockets(app), dir] {
            // A crash that loses it loses the container as well, or the container is made anew.
            if !dir.is_dir() {
                files::make_dir_unsynced(dir, 0o700)?;
            }
        }
        Ok(())
    }
}
