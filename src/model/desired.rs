//! The desired state of this host, resolved from the keys of the store.

use std::{collections::BTreeMap, sync::Arc};

use sha2::{Digest as _, Sha256};

use super::{
    env::{self, Secret},
    name::{AppName, EnvName, ImageRef, SetName},
    problem::{Problem, Problems, bounded, catch_panic},
    release::{Release, ReleaseKey},
    spec::{Endpoint, Ingress, Order, PullPolicy, Spec, Update},
    text::hex,
};

/// Largest reason of an operator, in bytes.
const MOST_REASON: usize = 500;

/// One consistent read.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Snapshot {
    /// The revision of the store.
    pub revision: i64,
    /// Whether this agent read it from the store, not only from the ledger of an earlier one.
    pub proven: bool,
    /// Whether this host takes apps.
    pub mode: HostMode,
    /// Labels of this host, merged.
    pub labels: BTreeMap<String, String>,
    /// Every app of the store.
    pub apps: BTreeMap<AppName, DesiredApp>,
    /// Unreadable keys that belong to no app.
    pub unreadable: Vec<Problem>,
}

impl Snapshot {
    /// True if both mean the same for this host: a change from one to the other starts, stops and replaces nothing here.
    /// The revisions at which keys were written do not count.
    pub fn has_same_effect(&self, other: &Self) -> bool {
        let placed = |snapshot: &Self| {
            let apps = snapshot.apps.iter().filter(|(_, desired)| !matches!(desired, DesiredApp::Absent(_)));
            apps.map(|(app, desired)| (app.clone(), desired.clone().without_revisions())).collect::<Vec<_>>()
        };
        (self.mode, &self.labels) == (other.mode, &other.labels) && placed(self) == placed(other)
    }
}

/// Whether a host takes apps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HostMode {
    /// It takes apps.
    #[default]
    Active,
    /// Running apps stay and are updated; no new app comes.
    Cordoned,
    /// Everything leaves.
    Drained,
}

impl HostMode {
    /// Its name, as written in the store.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Cordoned => "cordoned",
            Self::Drained => "drained",
        }
    }
}

/// The desired state of one app here.
#[derive(Debug, Clone, PartialEq)]
pub enum DesiredApp {
    /// It runs.
    Run(Target),
    /// It does not run here, for this reason.
    Absent(String),
    /// The spec is invalid; the last good target goes on, if this agent knows one.
    Invalid {
        /// All problems.
        problems: Problems,
        /// The last valid target.
        last_good: Option<Target>,
    },
    /// It is left as it is, for this reason.
    Paused(String),
    /// Unknown, for this reason, since the store has not been read; what serves is kept serving.
    Unknown(String),
}

impl DesiredApp {
    fn without_revisions(mut self) -> Self {
        if let Self::Run(target) | Self::Invalid { last_good: Some(target), .. } = &mut self {
            (target.created, target.modified) = (0, 0);
        }
        self
    }

    /// Whether both are the same but for the revision of the spec: another comment in it, or the same text put again.
    pub fn means_the_same(&self, other: &Self) -> bool {
        let plain = |desired: &Self| {
            let mut desired = desired.clone();
            if let Self::Run(target) | Self::Invalid { last_good: Some(target), .. } = &mut desired {
                target.modified = 0;
            }
            desired
        };
        plain(self) == plain(other)
    }

    /// The target, if there is one: also the last good target of an invalid app.
    pub fn target(&self) -> Option<&Target> {
        match self {
            Self::Run(target) | Self::Invalid { last_good: Some(target), .. } => Some(target),
            _ => None,
        }
    }
}

/// An app that runs here.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    /// What its containers are created from.
    pub release: Arc<Release>,
    /// How many instances.
    pub replicas: u16,
    /// How requests reach it.
    pub ingress: Option<Ingress>,
    /// Whether a replacement starts or stops first.
    pub order: Order,
    /// How a release goes over the hosts of a fleet.
    pub update: Update,
    /// When its image is pulled.
    pub pull_policy: PullPolicy,
    /// The create revision of its spec: the older of two claims to a virtual host wins.
    pub created: i64,
    /// The mod revision of its spec, which the status names: a wait for a change sees by it whether it is about this one.
    pub modified: i64,
    /// Whether the host is cordoned: it may stay, not come.
    pub cordoned: bool,
    /// The revision at which a person last asked for another try of a release that failed; 0 if never.
    pub retried: i64,
    /// Runs once for each release in the fleet, before the first host starts it.
    pub release_command: Option<Vec<String>>,
}

impl Target {
    /// For how many slots in the kernel's table it may need stable addresses.
    pub fn table_slots(&self) -> u16 {
        match &self.release.endpoint {
            Some(Endpoint::Port(_)) if self.release.more_endpoints.is_empty() => self.replicas,
            _ => 0,
        }
    }

    /// Digest of what a rollout depends on beside the release: order, replicas, ingress, and whether a person asked for
    /// another try. When it changes, earlier failures no longer count.
    pub fn conditions(&self) -> String {
        let mut text = format!("{:?} {} {:?}", self.order, self.replicas, self.ingress);
        if self.retried > 0 {
            text.push_str(&format!(" {}", self.retried));
        }
        hex(&Sha256::digest(text)[..6])
    }
}

/// The keys of one app, as read.
#[derive(Debug, Clone, Default)]
pub struct AppKeys {
    /// `apps/<app>/spec`.
    pub spec: Option<StoredSpec>,
    /// `apps/<app>/image`.
    pub image: Option<Vec<u8>>,
    /// `apps/<app>/restart`.
    pub restart: Option<Vec<u8>>,
    /// `apps/<app>/paused`.
    pub paused: Option<Vec<u8>>,
    /// The mod revision of `apps/<app>/retry`; 0 without it.
    pub retried: i64,
}

/// A spec as it is in the store.
#[derive(Debug, Clone)]
pub struct StoredSpec {
    /// The create revision of its key.
    pub created: i64,
    /// The mod revision of its key.
    pub modified: i64,
    /// The spec, or its problems.
    pub spec: Arc<Result<Spec, Problems>>,
}

/// All keys relevant to a host, as read.
#[derive(Debug, Clone, Default)]
pub struct Keys {
    /// By app.
    pub apps: BTreeMap<AppName, AppKeys>,
    /// By set and variable.
    pub env: BTreeMap<SetName, BTreeMap<EnvName, Vec<u8>>>,
    /// Whether the labels of this host in the store are unreadable, and always were.
    pub labels_unknown: bool,
    /// Bad variable names, by set.
    pub env_problems: BTreeMap<SetName, Problems>,
}

/// Resolves the desired state of one host.
///
/// `last_good` returns the last valid target of an app.
pub fn resolve(
    keys: &Keys,
    key: &ReleaseKey,
    mode: HostMode,
    labels: &BTreeMap<String, String>,
    last_good: impl Fn(&AppName) -> Option<Target>,
) -> BTreeMap<AppName, DesiredApp> {
    keys.apps
        .iter()
        .map(|(name, app)| {
            let desired = match catch_panic(|| resolve_app(name, app, keys, key, mode, labels)) {
                Ok(desired) => desired,
                Err(problems) => DesiredApp::Invalid { problems, last_good: last_good(name) },
            };
            (name.clone(), desired)
        })
        .collect()
}

fn resolve_app(
    name: &AppName,
    app: &AppKeys,
    keys: &Keys,
    key: &ReleaseKey,
    mode: HostMode,
    labels: &BTreeMap<String, String>,
) -> Result<DesiredApp, Problems> {
    if mode == HostMode::Drained {
        return Ok(DesiredApp::Absent("this host is drained".to_owned()));
    }
    if let Some(reason) = &app.paused {
        let reason = bounded(String::from_utf8_lossy(reason).trim(), MOST_REASON);
        return Ok(DesiredApp::Paused(if reason.is_empty() { "no reason given".to_owned() } else { reason }));
    }
    let Some(StoredSpec { spec, .. }) = &app.spec else {
        // Only a leftover image or restart key: an app exists if its spec does.
        return Ok(DesiredApp::Absent(format!("there is no `apps/{name}/spec`")));
    };
    let spec = spec.as_ref().as_ref().map_err(Clone::clone)?;
    if let Some(unmet) = spec.deploy.constraints.iter().find(|c| !c.holds(labels)) {
        if keys.labels_unknown {
            let problem = Problem::new("deploy.placement.constraints", format!("`{unmet}` cannot be decided"));
            return Err(problem.hint("put readable labels to `hosts/<host>/labels`").into());
        }
        return Ok(DesiredApp::Absent(format!("this host does not satisfy `{unmet}`")));
    }
    target(name, app, keys, key, mode == HostMode::Cordoned).map(DesiredApp::Run)
}

/// What an app runs wherever it is placed.
///
/// # Errors
/// All problems of its keys; one if it has no spec.
pub fn target(
    name: &AppName,
    app: &AppKeys,
    keys: &Keys,
    key: &ReleaseKey,
    cordoned: bool,
) -> Result<Target, Problems> {
    let missing = || Problem::new(format!("apps/{name}/spec"), "there is no spec");
    let stored = app.spec.as_ref().ok_or_else(missing)?;
    let spec = stored.spec.as_ref().as_ref().map_err(Clone::clone)?;
    let mut problems = Vec::new();
    let image = image(name, app, spec).map_err(|p| problems.push(p)).ok();
    let restart = text(&app.restart, || format!("apps/{name}/restart")).map_err(|p| problems.push(p)).ok().flatten();
    let env = environment(name, spec, keys).map_err(|p| problems.extend(p)).ok();
    let (Some(image), Some(env), true) = (image, env, problems.is_empty()) else {
        return Err(problems.into_iter().collect::<Problems>().bounded());
    };
    let endpoint = spec.ingress.as_ref().map(|i| i.endpoint.clone());
    let endpoints = (endpoint, spec.ingress.as_ref().map(Ingress::more_endpoints).unwrap_or_default());
    let (container, health) = (spec.container.clone(), spec.health.clone());
    let release = Release::with_endpoints(key, image, container, env, health, endpoints, restart.as_deref());
    Ok(Target {
        release: Arc::new(release),
        replicas: spec.deploy.replicas_per_host,
        ingress: spec.ingress.clone(),
        order: spec.deploy.order,
        update: spec.deploy.update.clone(),
        pull_policy: spec.pull_policy,
        created: stored.created,
        modified: stored.modified,
        cordoned,
        retried: app.retried,
        release_command: spec.release_command.clone(),
    })
}

fn text(value: &Option<Vec<u8>>, key: impl Fn() -> String) -> Result<Option<String>, Problem> {
    match value {
        None => Ok(None),
        Some(bytes) => match std::str::from_utf8(bytes) {
            Ok(text) => Ok(Some(text.to_owned())),
            Err(e) => Err(Problem::new(key(), format!("the value is not UTF-8 at byte {}", e.valid_up_to()))),
        },
    }
}

fn image(name: &AppName, app: &AppKeys, spec: &Spec) -> Result<ImageRef, Problem> {
    let key = || format!("apps/{name}/image");
    match text(&app.image, key)? {
        // `echo` and editors leave a line break at the end.
        Some(image) => ImageRef::try_from(image.trim()).map_err(|e| Problem::new(key(), e.to_string())),
        None => spec.image.clone().ok_or_else(|| {
            Problem::new(key(), "no image is named")
                .hint("put one there, such as `registry.example.com/web:v42`, or set `image` in the spec")
        }),
    }
}

/// `env_from` in order, then the spec, then the app's own set; later values win.
fn environment(name: &AppName, spec: &Spec, keys: &Keys) -> Result<BTreeMap<EnvName, Secret>, Vec<Problem>> {
    let mut problems = Vec::new();
    let mut env: BTreeMap<EnvName, Secret> = BTreeMap::new();
    let own = SetName::try_from(name.as_str()).ok();
    for set in &spec.env_from {
        if keys.env.contains_key(set) {
            env.extend(read_set(set, keys, &mut problems));
        } else {
            let problem = Problem::new("env_from", format!("there is no set `env/{set}/`"));
            problems.push(problem.hint("put its variables, or leave it out of `env_from`"));
        }
    }
    env.extend(spec.environment.clone());
    if let Some(own) = &own {
        env.extend(read_set(own, keys, &mut problems));
    }
    if let Err(e) = env::check_total(&env) {
        problems.push(Problem::new(format!("env/{name}/"), e));
    }
    if problems.is_empty() { Ok(env) } else { Err(problems) }
}

fn read_set(set: &SetName, keys: &Keys, problems: &mut Vec<Problem>) -> BTreeMap<EnvName, Secret> {
    let mut out = BTreeMap::new();
    problems.extend(keys.env_problems.get(set).into_iter().flat_map(Problems::iter).cloned());
    for (name, value) in keys.env.get(set).into_iter().flatten() {
        let key = || format!("env/{set}/{name}");
        match std::str::from_utf8(value) {
            Err(e) => problems.push(Problem::new(key(), format!("the value is not UTF-8 at byte {}", e.valid_up_to()))),
            Ok(text) => match env::check_value(name.as_str(), text) {
                Ok(()) => {
                    out.insert(name.clone(), Secret::new(text));
                }
                Err(e) => problems.push(Problem::new(key(), e)),
            },
        }
    }
    out
}
