//! Where everything of demae lies on a host.
//!
//! What serves lies in the state directory, which outlives a reboot: routes, sockets, nginx files. What holds secrets
//! in clear, the env-files, lies in the run directory, which is memory.

use std::path::{Path, PathBuf};

use crate::model::{
    name::{AppName, ReleaseId},
    observed::InstanceKey,
    spec::Endpoint,
};

/// Longest path of a unix socket that the kernel takes, without the final NUL.
pub const MAX_SOCKET_PATH: usize = 107;

/// The directories of one agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    state: PathBuf,
    run: PathBuf,
}

impl Layout {
    /// In these two directories.
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

    /// Held by the one agent of these directories.
    pub fn lock(&self) -> PathBuf {
        self.state.join("agent.lock")
    }

    /// By which id the agent is known to the store, over all of its runs.
    pub fn agent_id(&self) -> PathBuf {
        self.state.join("agent.id")
    }

    /// Ids of agents whose containers were taken over, one a line.
    pub fn adopted(&self) -> PathBuf {
        self.state.join("agent.adopted")
    }

    /// What the store last said, for an agent that starts without it.
    pub fn ledger(&self) -> PathBuf {
        self.state.join("ledger")
    }

    /// What a person accepted of a store that was not believed.
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

    /// One route symlink: the path nginx knows.
    pub fn route(&self, app: &AppName, slot: u16) -> PathBuf {
        self.app_routes(app).join(format!("{slot}.sock"))
    }

    /// The route of a slot to one of several sockets of an app, by the name that the socket has: another order of them
    /// in another release leads nobody astray. The only one has the path of the slot.
    pub fn route_to(&self, app: &AppName, slot: u16, endpoint: Option<&Endpoint>) -> PathBuf {
        match endpoint {
            Some(Endpoint::Socket(path)) => self.route_named(app, slot, Path::new(path)),
            _ => self.route(app, slot),
        }
    }

    /// The route of a slot to the socket with the name that this one has.
    pub fn route_named(&self, app: &AppName, slot: u16, socket: &Path) -> PathBuf {
        let name = socket.file_name().unwrap_or_default().to_string_lossy();
        self.app_routes(app).join(format!("{slot}@{name}"))
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

    /// Everything for nginx.
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

    /// A set that is not made yet, while it is found out what nginx takes of it.
    pub fn nginx_trial(&self) -> PathBuf {
        self.nginx().join("trial")
    }

    /// A copy of nginx's own tree in which a set is tested.
    pub fn nginx_test(&self) -> PathBuf {
        self.nginx().join("test")
    }

    /// The release of an app last proven.
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
    pub fn by_app(&self) -> [PathBuf; 5] {
        [self.routes(), self.sockets(), self.state.join("proven"), self.state.join("verdicts"), self.run.join("env")]
    }
}
