//! From a configuration to the parts of an agent.

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
        layout::{Layout, MAX_SOCKET_PATH},
        nginx::{Contained, Local, Nginx, NginxConfig, Server},
        ports::Ports,
    },
    model::{
        name::{AppName, MAX_NAME},
        problem::chain,
    },
    store::{Claim, Shelf, Viewer},
    vitals::Places,
    world::World,
};

/// Longest wait of a command for an answer of Docker's.
const ANSWER: std::time::Duration = std::time::Duration::from_secs(10);

/// The world of a host; with `news` it asks instances how they are.
pub(super) fn world(
    config: &Config,
    news: Option<UnboundedSender<AppName>>,
    meter: Arc<dyn Meter>,
) -> Result<World, Failed> {
    let layout = Layout::new(&config.state_dir, &config.run_dir);
    // The longest path that nginx will be given: the kernel cuts no path, it refuses it.
    let longest = layout.state().as_os_str().len() + "/routes/".len() + MAX_NAME + "/100.sock".len();
    if longest > MAX_SOCKET_PATH {
        return Err(Failed::because(format!(
            "`{}` is too long for a state directory: paths of sockets below it would have {longest} bytes, and the kernel takes {MAX_SOCKET_PATH}",
            layout.state().display()
        )));
    }
    let docker = Docker::behind(&config.docker_socket, config.host.clone()).metered(meter);
    let docker = match agent_id(&layout)? {
        Some(id) => docker.owned(Arc::new(Directories { id, layout: layout.clone() })),
        // No agent was ever started here, so none of the containers is its.
        None => docker.owned(Arc::new(Directories { id: String::new(), layout: layout.clone() })),
    };
    // Who asks nobody how they are is a command that looks once.
    let docker = if news.is_none() { docker.impatient(ANSWER) } else { docker };
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
        host: config.host.clone(),
        docker,
        nginx: Nginx::new(server, nginx, layout.clone(), clock.clone()),
        ports: Ports::new(config.ports.clone()),
        prober: news.map(|news| Prober::new(news, clock.clone())),
        clock,
        layout,
    })
}

/// What the directories of an agent say of whose a container is.
struct Directories {
    id: String,
    layout: Layout,
}

impl Owner for Directories {
    fn id(&self) -> &str {
        &self.id
    }

    fn has_adopted(&self, id: &str) -> bool {
        // Unreadable is not adopted: what is not known to be ours is left alone.
        adopted(&self.layout).is_ok_and(|ids| ids.iter().any(|adopted| adopted == id))
    }

    fn knows(&self, app: &AppName) -> bool {
        let traces = [self.layout.proven(app), self.layout.app_sockets(app), self.layout.app_env(app)];
        traces.iter().any(|path| path.exists())
    }
}

/// The agents whose containers were taken over.
pub(super) fn adopted(layout: &Layout) -> Result<Vec<String>, files::FileError> {
    let text = files::read(&layout.adopted())?.unwrap_or_default();
    Ok(String::from_utf8_lossy(&text).lines().map(str::trim).filter(|l| !l.is_empty()).map(str::to_owned).collect())
}

/// What comes to its end by itself on this host.
pub(super) async fn places(config: &Config, world: &World) -> Places {
    let layout = Layout::new(&config.state_dir, &config.run_dir);
    let mut certificates = config.nginx.certificates.clone();
    certificates.extend(config.etcd.cacert.clone());
    certificates.extend(config.etcd.cert.as_ref().map(|(cert, _)| cert.clone()));
    let mut dirs = vec![("state", layout.state().to_owned()), ("run", layout.run().to_owned())];
    // Where Docker's own is can be asked only while it answers.
    let asked = tokio::time::timeout(FIRST_LIST, world.docker.root_dir()).await;
    let images = match asked {
        Ok(Ok(dir)) => dir,
        _ => Some(DOCKER_ROOT.into()),
    };
    dirs.extend(images.map(|dir| ("docker", dir)));
    Places { dirs, certificates, nginx: layout.nginx_live() }
}

/// Where Docker keeps images and containers unless it is told otherwise.
const DOCKER_ROOT: &str = "/var/lib/docker";
/// Longest wait for the first list of containers: an engine that hangs must not keep an agent from its store.
const FIRST_LIST: std::time::Duration = std::time::Duration::from_secs(5);

/// Who reads the store, and what it is held against.
pub(super) async fn viewer(config: &Config, world: &World) -> Result<Viewer, Failed> {
    let mut traces = world.apps_on_disk()?;
    // An engine that does not answer now has its containers all the same; those are found when it does.
    let listed = tokio::time::timeout(FIRST_LIST, world.docker.list(None)).await;
    traces.extend(listed.ok().and_then(Result::ok).unwrap_or_default().into_iter().map(|c| c.app));
    Ok(Viewer {
        host: config.host.clone(),
        labels: config.labels.clone(),
        resync: config.resync,
        brake: config.brake,
        traces,
    })
}

/// The ledger on this host's disk.
pub(super) struct Disk(pub(super) Layout);

impl Shelf for Disk {
    fn ledger(&self) -> Result<Option<Vec<u8>>, String> {
        files::read(&self.0.ledger()).map_err(|e| chain(&e))
    }

    fn keep(&self, text: &[u8]) -> Result<(), String> {
        files::write(&self.0.ledger(), text, 0o600).map_err(|e| chain(&e))
    }

    fn acceptance(&self) -> Option<Vec<u8>> {
        files::read(&self.0.accepted()).ok().flatten()
    }

    fn use_up(&self) {
        if let Err(e) = files::remove_file(&self.0.accepted()) {
            tracing::warn!("{}", chain(&e));
        }
    }
}

/// The id of the agent of these directories; nothing if it was never started.
pub(super) fn agent_id(layout: &Layout) -> Result<Option<String>, Failed> {
    let text = files::read(&layout.agent_id())?;
    let id = text.map(|text| String::from_utf8_lossy(&text).trim().to_owned());
    Ok(id.filter(|id| !id.is_empty()))
}

/// What this run of the agent says of the name of its host. Only the one that holds the lock may ask.
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

/// Makes the directories of an agent, and takes its lock.
pub(super) fn directories(config: &Config) -> Result<files::Lock, Failed> {
    let layout = Layout::new(&config.state_dir, &config.run_dir);
    // nginx passes through these on its way to sockets and routes; what is secret is closed further below.
    files::make_dir(layout.state(), 0o755)?;
    files::make_dir(&layout.nginx(), 0o755)?;
    files::make_dir(&layout.routes(), 0o755)?;
    files::make_dir(layout.run(), 0o755)?;
    Ok(files::lock(&layout.lock())?)
}
