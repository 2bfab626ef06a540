//! Paths of all files of demae on a host.
//!
//! What serves is in the state directory, which survives a reboot: routes, sockets, nginx files. Plain-text secrets,
//! the env-files, are in the run directory, on tmpfs.

use std::path::{Path, PathBuf};

use crate::model::{
    name::{AppName, ReleaseId},
    observed::InstanceKey,
    spec::Endpoint,
};

/// Longest path of a unix socket, without the final NUL.
pub const MAX_SOCKET_PATH: usize = 107;

/// The directories of one agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    state: PathBuf,
    run: PathBuf,
}

impl Layout {
    /// The layout below these two directories.
    pub fn new(state: impl Into<PathBuf>, run: impl Into<PathBuf>) -> Self {
        Self { state: state.into(), run: run.into() }
    }

    /// The state directory.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// The run directory.
    pub fn run(&self) -> &Path {
        &self.run
    }

    /// The lock file of the agent.
    pub fn lock(&self) -> PathBuf {
        self.state.join("agent.lock")
    }

    /// The id of the agent, the same for all of its runs.
    pub fn agent_id(&self) -> PathBuf {
        self.state.join("agent.id")
    }

    /// Ids of adopted agents, one a line.
    pub fn adopted(&self) -> PathBuf {
        self.state.join("agent.adopted")
    }

    /// Virtual hosts that apps take over from hand-written servers.
    pub fn takeovers(&self) -> PathBuf {
        self.state.join("takeovers.json")
    }

    /// The last accepted state of the store, for a start without it.
    pub fn ledger(&self) -> PathBuf {
        self.state.join("ledger")
    }

    /// How far the store has been read since the ledger was written.
    pub fn ledger_head(&self) -> PathBuf {
        self.state.join("ledger.head")
    }

    /// Images that the agent has pulled.
    pub fn images(&self) -> PathBuf {
        self.state.join("images.json")
    }

    /// Where archives are unpacked; it is there only meanwhile.
    pub fn spool(&self) -> PathBuf {
        self.state.join("spool")
    }

    /// The acceptance of a distrusted store by a person.
    pub fn accepted(&self) -> PathBuf {
        self.state.join("accepted.json")
    }

    /// All route symlinks.
    pub fn routes(&self) -> PathBuf {
        self.state.join("routes")
    }

    /// The route symlinks of an app.
    pub fn app_routes(&self, app: &AppName) -> PathBuf {
        self.routes().join(app.as_str())
    }

    /// One route symlink: the path in nginx's upstreams.
    pub fn route(&self, app: &AppName, slot: u16) -> PathBuf {
        self.app_routes(app).join(format!("{slot}.sock"))
    }

    /// The route of a slot to one of several sockets of an app, by the socket's file name: a new order in another
    /// release changes no route. A single socket has the path of the slot.
    pub fn route_to(&self, app: &AppName, slot: u16, endpoint: Option<&Endpoint>) -> PathBuf {
        match endpoint {
            Some(Endpoint::Socket(path)) => self.route_named(app, slot, Path::new(path)),
            _ => self.route(app, slot),
        }
    }

    /// The route of a slot to the socket with this file name.
    pub fn route_named(&self, app: &AppName, slot: u16, socket: &Path) -> PathBuf {
        let name = socket.file_name().unwrap_or_default().to_string_lossy();
        self.app_routes(app).join(format!("{slot}@{name}"))
    }

    /// The slots of all apps in the kernel's table, a file per app.
    pub fn tcp_routes(&self) -> PathBuf {
        self.state.join("tcp-routes")
    }

    /// The slots of an app in the kernel's table.
    pub fn tcp_route(&self, app: &AppName) -> PathBuf {
        self.tcp_routes().join(app.as_str())
    }

    /// Where the search for the next address of a container begins.
    pub fn address_cursor(&self) -> PathBuf {
        self.state.join("address-cursor")
    }

    /// All socket directories.
    pub fn sockets(&self) -> PathBuf {
        self.state.join("sockets")
    }

    /// The socket directories of an app.
    pub fn app_sockets(&self, app: &AppName) -> PathBuf {
        self.sockets().join(app.as_str())
    }

    /// The directory that is mounted into one instance.
    pub fn socket_dir(&self, app: &AppName, key: &InstanceKey) -> PathBuf {
        self.app_sockets(app).join(key.to_string())
    }

    /// The instance whose socket a route leads to.
    pub fn instance_of(target: &Path) -> Option<InstanceKey> {
        Self::parse_key(target.parent()?.file_name()?.to_str()?)
    }

    /// An instance from the name of its socket directory.
    pub fn parse_key(name: &str) -> Option<InstanceKey> {
        let (release, number) = name.split_once('.')?;
        Some(InstanceKey { release: ReleaseId::try_from(release).ok()?, number: number.parse().ok()? })
    }

    /// The directory of nginx's sets.
    pub fn nginx(&self) -> PathBuf {
        self.state.join("nginx")
    }

    /// The symlink to the live set.
    pub fn nginx_live(&self) -> PathBuf {
        self.nginx().join("live")
    }

    /// One set.
    pub fn nginx_generation(&self, generation: u64) -> PathBuf {
        self.nginx().join(format!("{generation}.set"))
    }

    /// Trial files, while it is tested which of them nginx accepts.
    pub fn nginx_trial(&self) -> PathBuf {
        self.nginx().join("trial")
    }

    /// A copy of nginx's own tree in which a set is tested.
    pub fn nginx_test(&self) -> PathBuf {
        self.nginx().join("test")
    }

    /// The last proven release of an app.
    pub fn proven(&self, app: &AppName) -> PathBuf {
        self.state.join("proven").join(app.as_str())
    }

    /// Verdicts on releases of an app.
    pub fn verdicts(&self, app: &AppName) -> PathBuf {
        self.state.join("verdicts").join(app.as_str())
    }

    /// One verdict.
    pub fn verdict(&self, app: &AppName, release: &ReleaseId) -> PathBuf {
        self.verdicts(app).join(format!("{release}.json"))
    }

    /// Env-files of an app.
    pub fn app_env(&self, app: &AppName) -> PathBuf {
        self.run.join("env").join(app.as_str())
    }

    /// The env-file of a release.
    pub fn env_file(&self, app: &AppName, release: &ReleaseId) -> PathBuf {
        self.app_env(app).join(release.as_str()).join("env")
    }

    /// Every directory whose entries are apps.
    pub fn by_app(&self) -> [PathBuf; 6] {
        let (proven, verdicts) = (self.state.join("proven"), self.state.join("verdicts"));
        [self.routes(), self.tcp_routes(), self.sockets(), proven, verdicts, self.run.join("env")]
    }
}
