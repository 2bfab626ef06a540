//! Builds the parts of an agent from its configuration.

use std::sync::Arc;

use tokio::sync::mpsc::UnboundedSender;

use super::Failed;
use crate::{
    config::Config,
    host::{
        clock::Clock,
        docker::{Docker, Meter, Owner},
        files,
        health::Prober,
        images::Images,
        layout::{Layout, MAX_SOCKET_PATH},
        nginx::{Contained, Local, Nginx, NginxConfig, Server},
        policy::PolicyFile,
        ports::Ports,
        registry::Logins,
        tcp_routes::TcpRoutes,
    },
    host_gauges::Watched,
    model::{
        name::{AppName, MAX_NAME},
        problem::chain,
    },
    store::{Claim, StateStore, Viewer},
    world::World,
};

/// Timeout of a one-off command for Docker.
const DOCKER_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);

/// The world of a host; with `changes` it runs health checks and reports them there.
pub(super) fn world(
    config: &Config,
    changes: Option<UnboundedSender<AppName>>,
    meter: Arc<dyn Meter>,
) -> Result<World, Failed> {
    let layout = Layout::new(&config.state_dir, &config.run_dir);
    // The longest socket path: the kernel truncates none, it refuses it.
    let longest = layout.state().as_os_str().len() + "/routes/".len() + MAX_NAME + "/100.sock".len();
    if longest > MAX_SOCKET_PATH {
        return Err(Failed::because(format!(
            "`{}` is too long for a state directory: paths of sockets below it would have {longest} bytes, and the kernel takes {MAX_SOCKET_PATH}",
            layout.state().display()
        )));
    }
    let docker = Docker::behind(&config.docker_socket, config.host.clone()).with_meter(meter);
    let docker = docker.with_logins(Arc::new(Logins::new(config.registries.clone(), config.docker_config.clone())));
    let docker = docker.with_policy(Arc::new(PolicyFile::at(&config.policy, &config.host)));
    let docker = match agent_id(&layout)? {
        Some(id) => docker.with_owner(Arc::new(DirectoryOwner { id, layout: layout.clone() })),
        // No agent ever ran here, so no container is this agent's.
        None => docker.with_owner(Arc::new(DirectoryOwner { id: String::new(), layout: layout.clone() })),
    };
    // Without health checks this is a one-off command.
    let docker = if changes.is_none() { docker.with_timeout(DOCKER_TIMEOUT) } else { docker };
    let n = &config.nginx;
    let server: Box<dyn Server> = match &n.container {
        None => Box::new(Local { binary: n.binary.clone() }),
        Some(container) => {
            Box::new(Contained { docker: docker.clone(), container: container.clone(), binary: n.binary.clone() })
        }
    };
    let nginx = NginxConfig {
        conf: n.conf.clone(),
        pid: n.pid.clone(),
        address: n.address.clone(),
        group: n.group,
        settings: n.settings.clone(),
    };
    let clock = Arc::new(Clock::default());
    Ok(World {
        counters: std::sync::Mutex::default(),
        commands: std::sync::Mutex::default(),
        host: config.host.clone(),
        images: Images::new(docker.clone(), layout.clone(), config.images, config.fetchers.clone()),
        docker: docker.clone(),
        nginx: Nginx::new(server, nginx, layout.clone(), clock.clone()),
        ports: Ports::new(config.ports.clone()),
        tcp_routes: TcpRoutes::new(config.tcp_routes.clone(), &config.host, layout.clone(), docker.clone()),
        prober: changes.map(|changes| Prober::new(changes, clock.clone())),
        clock,
        layout,
    })
}

/// Ownership of containers by the files in an agent's directories.
struct DirectoryOwner {
    id: String,
    layout: Layout,
}

impl Owner for DirectoryOwner {
    fn id(&self) -> &str {
        &self.id
    }

    fn has_adopted(&self, id: &str) -> bool {
        // Unreadable means not adopted: containers of unknown owners are left alone.
        adopted(&self.layout).is_ok_and(|ids| ids.iter().any(|adopted| adopted == id))
    }

    fn has_traces_of(&self, app: &AppName) -> bool {
        let layout = &self.layout;
        let traces = [layout.proven(app), layout.app_sockets(app), layout.app_env(app), layout.tcp_route(app)];
        traces.iter().any(|path| path.exists())
    }
}

/// The ids of adopted agents.
pub(super) fn adopted(layout: &Layout) -> Result<Vec<String>, files::FileError> {
    let text = files::read(&layout.adopted())?.unwrap_or_default();
    Ok(String::from_utf8_lossy(&text).lines().map(str::trim).filter(|l| !l.is_empty()).map(str::to_owned).collect())
}

/// Disks and certificates to watch on this host.
pub(super) async fn places(config: &Config, world: &World) -> Watched {
    let layout = Layout::new(&config.state_dir, &config.run_dir);
    let mut certificates = config.nginx.certificates.clone();
    certificates.extend(config.etcd.cacert.clone());
    certificates.extend(config.etcd.cert.as_ref().map(|(cert, _)| cert.clone()));
    let mut dirs = vec![("state", layout.state().to_owned()), ("run", layout.run().to_owned())];
    // Docker reports its directory only while it answers.
    let reported = tokio::time::timeout(FIRST_LIST_TIMEOUT, world.docker.root_dir()).await;
    let images = match reported {
        Ok(Ok(dir)) => dir,
        _ => Some(DOCKER_ROOT.into()),
    };
    dirs.extend(images.map(|dir| ("docker", dir)));
    Watched { dirs, certificates, nginx: layout.nginx_live() }
}

/// Docker's default data directory.
const DOCKER_ROOT: &str = "/var/lib/docker";
/// Timeout of the first list of containers: a hung engine must not keep an agent from its store.
const FIRST_LIST_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);

/// The identity of the reader of the store, and what the store is checked against.
pub(super) async fn viewer(config: &Config, world: &World) -> Result<Viewer, Failed> {
    let mut traces = world.apps_on_disk()?;
    // Containers of an engine that does not answer now are found once it does.
    let listed = tokio::time::timeout(FIRST_LIST_TIMEOUT, world.docker.list(None)).await;
    traces.extend(listed.ok().and_then(Result::ok).unwrap_or_default().into_iter().map(|c| c.app));
    Ok(Viewer {
        host: config.host.clone(),
        labels: config.labels.clone(),
        resync: config.resync,
        brake: config.brake,
        traces,
    })
}

/// The state store on this host's disk.
pub(super) struct Disk(pub(super) Layout);

impl StateStore for Disk {
    fn ledger(&self) -> Result<Option<Vec<u8>>, String> {
        files::read(&self.0.ledger()).map_err(|e| chain(&e))
    }

    fn write_ledger(&self, text: &[u8]) -> Result<(), String> {
        files::write(&self.0.ledger(), text, 0o600).map_err(|e| chain(&e))
    }

    fn head(&self) -> Option<Vec<u8>> {
        files::read(&self.0.ledger_head()).ok().flatten()
    }

    fn write_head(&self, text: &[u8]) {
        if let Err(e) = files::replace(&self.0.ledger_head(), text, 0o600) {
            tracing::debug!("{}", chain(&e));
        }
    }

    fn acceptance(&self) -> Option<Vec<u8>> {
        files::read(&self.0.accepted()).ok().flatten()
    }

    fn clear_acceptance(&self) {
        if let Err(e) = files::remove_file(&self.0.accepted()) {
            tracing::warn!("{}", chain(&e));
        }
    }
}

/// The agent id of these directories; `None` if no agent ever ran.
pub(super) fn agent_id(layout: &Layout) -> Result<Option<String>, Failed> {
    let text = files::read(&layout.agent_id())?;
    let id = text.map(|text| String::from_utf8_lossy(&text).trim().to_owned());
    Ok(id.filter(|id| !id.is_empty()))
}

/// The claim of this run on the host's name. Only the holder of the lock may make one.
pub(super) fn claim(config: &Config) -> Result<Claim, Failed> {
    let layout = Layout::new(&config.state_dir, &config.run_dir);
    let id = match agent_id(&layout)? {
        Some(id) => id,
        None => {
            let id = Claim::fresh_id()?;
            files::write(&layout.agent_id(), format!("{id}\n").as_bytes(), 0o644)?;
            id
        }
    };
    Ok(Claim::new(config.host.clone(), id)?)
}

/// Creates the directories of an agent, and locks them.
pub(super) fn directories(config: &Config) -> Result<files::Lock, Failed> {
    let layout = Layout::new(&config.state_dir, &config.run_dir);
    // nginx must traverse these to reach sockets and routes; secrets are protected further below.
    files::make_dir(layout.state(), 0o755)?;
    files::make_dir(&layout.nginx(), 0o755)?;
    files::make_dir(&layout.routes(), 0o755)?;
    files::make_dir(layout.run(), 0o755)?;
    Ok(files::lock(&layout.lock())?)
}
