//! What the desired range means for one host.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use super::{
    contents::{Contents, Entries, Entry},
    keys::{BadKey, Key},
};
use crate::model::{
    desired::{self, DesiredApp, HostMode, Snapshot, StoredSpec, Target},
    name::{AppName, EnvName, HostName, SetName},
    problem::{Problem, Problems, catch_panic},
    release::ReleaseKey,
    spec::{Constraint, Spec},
    yaml::{self, Value},
};

/// Most bytes of a host's labels.
const MOST_LABELS: usize = 64 * 1024;

/// A spec, or its problems.
type ReadSpec = Arc<Result<Spec, Problems>>;

/// Makes snapshots of contents. Caches parsed specs, so that one changed key costs one parse.
#[derive(Clone)]
pub struct Interpreter {
    host: HostName,
    labels: BTreeMap<String, String>,
    /// By app, with the text that was parsed.
    specs: HashMap<AppName, (Vec<u8>, ReadSpec)>,
    last_good: BTreeMap<AppName, Target>,
    /// The last valid mode of this host; `None` before the first one.
    mode: Option<HostMode>,
    /// The last valid labels of this host in the store; `None` before the first ones.
    host_labels: Option<BTreeMap<String, String>>,
}

impl Interpreter {
    /// For a host with these labels in its own configuration.
    pub fn new(host: HostName, labels: BTreeMap<String, String>) -> Self {
        Self { host, labels, specs: HashMap::new(), last_good: BTreeMap::new(), mode: None, host_labels: None }
    }

    /// Records the last valid keys of an app, and the keys of this host from then.
    pub(super) fn remember(&mut self, app: &AppName, entries: &Entries, hosts: &Entries, key: &ReleaseKey) {
        let entries = entries.iter().chain(hosts).map(|(k, e)| (k.clone(), e.clone())).collect();
        let mut then = Self::new(self.host.clone(), self.labels.clone());
        then.snapshot(&Contents { entries, revision: 0 }, key);
        self.last_good.extend(then.last_good.remove_entry(app));
    }

    /// What the contents mean for this host.
    pub fn snapshot(&mut self, contents: &Contents, key: &ReleaseKey) -> Snapshot {
        let mut unreadable = Vec::new();
        let (keys, mode, labels) = self.sort_out(contents, &mut unreadable);
        let last_good = &self.last_good;
        let apps = desired::resolve(&keys, key, mode, &labels, |app| last_good.get(app).cloned());
        for (app, desired) in &apps {
            match desired {
                DesiredApp::Run(target) => {
                    self.last_good.insert(app.clone(), target.clone());
                }
                // The target from before it left is no reason to come back.
                DesiredApp::Absent(_) => {
                    self.last_good.remove(app);
                }
                DesiredApp::Invalid { .. } | DesiredApp::Paused(_) | DesiredApp::Unknown(_) => {}
            }
        }
        self.last_good.retain(|app, _| apps.contains_key(app));
        Snapshot { revision: contents.revision, proven: true, mode, labels, apps, unreadable }
    }

    /// What each app runs wherever it is placed, and where it is; or what is wrong with its keys. An app exists if its spec
    /// does.
    pub fn everywhere(
        &mut self,
        contents: &Contents,
        key: &ReleaseKey,
    ) -> BTreeMap<AppName, Result<Everywhere, Problems>> {
        let (keys, ..) = self.sort_out(contents, &mut Vec::new());
        let one = |name: &AppName, app: &desired::AppKeys, spec: &ReadSpec| {
            let target = catch_panic(|| desired::target(name, app, &keys, key, false))?;
            let spec = spec.as_ref().as_ref().map_err(Clone::clone)?;
            let sets = [name.as_str()].into_iter().chain(spec.env_from.iter().map(SetName::as_str));
            let text = |value: &Option<Vec<u8>>| value.as_ref().map(|v| String::from_utf8_lossy(v).into_owned());
            let values = |set: &SetName| {
                let values = keys.env.get(set).into_iter().flatten();
                values.map(|(name, value)| (name.clone(), String::from_utf8_lossy(value).into_owned())).collect()
            };
            let sets = sets.filter_map(|set| SetName::try_from(set).ok()).map(|set| (set.clone(), values(&set)));
            let spec_text = contents.entries.get(format!("apps/{name}/spec").as_bytes()).map_or(&[][..], Entry::value);
            let made_from = MadeFrom {
                spec: String::from_utf8_lossy(spec_text).into_owned(),
                image: text(&app.image),
                restart: text(&app.restart),
                env: sets.collect(),
            };
            let paused = text(&app.paused);
            let by = changed_by(contents, name, made_from.env.keys());
            Ok(Everywhere { target, constraints: spec.deploy.constraints.clone(), made_from, paused, by })
        };
        let apps = keys.apps.iter().filter_map(|(name, app)| Some((name, app, &app.spec.as_ref()?.spec)));
        apps.map(|(name, app, spec)| (name.clone(), one(name, app, spec))).collect()
    }

    fn sort_out(
        &mut self,
        contents: &Contents,
        unreadable: &mut Vec<Problem>,
    ) -> (desired::Keys, HostMode, BTreeMap<String, String>) {
        let mut keys = desired::Keys::default();
        let mut mode = Some(HostMode::Active);
        let mut given_labels = Some(BTreeMap::new());
        for (rest, entry) in &contents.entries {
            let value = || Some(entry.value().to_vec());
            match Key::parse(rest) {
                Ok(Key::Spec(app)) => {
                    let spec = self.spec(&app, entry);
                    let stored = StoredSpec { created: entry.created(), modified: entry.modified(), spec };
                    keys.apps.entry(app).or_default().spec = Some(stored);
                }
                Ok(Key::Image(app)) => keys.apps.entry(app).or_default().image = value(),
                Ok(Key::Restart(app)) => keys.apps.entry(app).or_default().restart = value(),
                Ok(Key::Paused(app)) => keys.apps.entry(app).or_default().paused = value(),
                Ok(Key::Retry(app)) => keys.apps.entry(app).or_default().retried = entry.modified(),
                Ok(Key::Env(set, name)) => {
                    keys.env.entry(set).or_default().insert(name, entry.value().to_vec());
                }
                Ok(Key::HostLabels(host)) if host == self.host => match host_labels(entry.value()) {
                    Ok(labels) => given_labels = Some(labels),
                    Err(mut problem) => {
                        // Unreadable labels are not other labels.
                        given_labels = self.host_labels.clone();
                        problem.key = format!("hosts/{host}/labels");
                        unreadable.push(problem);
                    }
                },
                Ok(Key::HostMode(host)) if host == self.host => match host_mode(entry.value()) {
                    Some(found) => mode = Some(found),
                    None => {
                        // An unreadable mode is not a new mode.
                        mode = self.mode;
                        let problem = Problem::new(format!("hosts/{host}/mode"), "this is not a mode");
                        unreadable.push(problem.hint("use `active`, `cordoned` or `drained`"));
                    }
                },
                Ok(
                    Key::HostLabels(_)
                    | Key::HostMode(_)
                    | Key::Cluster
                    | Key::Freeze
                    | Key::Pin(_)
                    | Key::Promote(_)
                    | Key::By(_),
                ) => {}
                Err(BadKey::Set(set, problem)) => keys.env_problems.entry(set).or_default().push(problem),
                // An unknown key below an app may be of a newer version: the app is not invalid for it.
                Err(BadKey::App(_, problem) | BadKey::Unowned(problem)) => unreadable.push(problem),
            }
        }
        for problems in keys.env_problems.values_mut() {
            *problems = std::mem::take(problems).bounded();
        }
        let all: Problems = std::mem::take(unreadable).into_iter().collect();
        unreadable.extend(all.bounded().iter().cloned());
        keys.labels_unknown = given_labels.is_none();
        let mut labels = self.labels.clone();
        labels.extend(given_labels.iter().flatten().map(|(k, v)| (k.clone(), v.clone())));
        self.host_labels = given_labels;
        self.mode = mode;
        // Cordoned is safe either way: a drained host starts nothing, and an active one stops nothing.
        let mode = mode.unwrap_or(HostMode::Cordoned);
        self.specs.retain(|app, _| keys.apps.contains_key(app));
        (keys, mode, labels)
    }

    fn spec(&mut self, app: &AppName, entry: &Entry) -> Arc<Result<Spec, Problems>> {
        match self.specs.get(app) {
            Some((text, spec)) if text == entry.value() => spec.clone(),
            _ => {
                let spec = Arc::new(catch_panic(|| Spec::parse(entry.value())));
                self.specs.insert(app.clone(), (entry.value().to_vec(), spec.clone()));
                spec
            }
        }
    }
}

/// Most characters of who made a change, and why.
const MOST_BY: usize = 200;

/// Who changed an app last. It counts only if nothing of what makes its release was written after it; what is deleted
/// leaves no trace.
fn changed_by<'a>(contents: &Contents, app: &AppName, sets: impl Iterator<Item = &'a SetName>) -> Option<By> {
    let by = contents.entries.get(Key::By(app.clone()).to_string().as_bytes())?;
    let own = [Key::Spec(app.clone()), Key::Image(app.clone()), Key::Restart(app.clone())];
    let own = own.iter().filter_map(|key| contents.entries.get(key.to_string().as_bytes()));
    let of_sets = sets.flat_map(|set| {
        // `0` follows `/`.
        let (from, to) = (format!("env/{set}/").into_bytes(), format!("env/{set}0").into_bytes());
        contents.entries.range(from..to).map(|(_, entry)| entry)
    });
    let last = own.chain(of_sets).map(Entry::modified).max()?;
    let text = String::from_utf8_lossy(by.value());
    let text = text.trim().chars().filter(|c| !c.is_control()).take(MOST_BY).collect();
    Some(By { text, revision: by.modified() }).filter(|by| by.revision >= last)
}

/// An app, wherever it is placed.
#[derive(Debug, Clone, PartialEq)]
pub struct Everywhere {
    /// What it runs.
    pub target: Target,
    /// Which hosts it is placed on.
    pub constraints: Vec<Constraint>,
    /// The texts that its release is made from.
    pub made_from: MadeFrom,
    /// Why a person paused it.
    pub paused: Option<String>,
    /// Who made the last change of it, and why, if that was written with it.
    pub by: Option<By>,
}

/// Who changed an app, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct By {
    /// As it was written.
    pub text: String,
    /// When: its mod revision.
    pub revision: i64,
}

/// The texts that a release is made from.
#[derive(Clone, PartialEq, Eq)]
pub struct MadeFrom {
    /// `apps/<app>/spec`.
    pub spec: String,
    /// `apps/<app>/image`.
    pub image: Option<String>,
    /// `apps/<app>/restart`.
    pub restart: Option<String>,
    /// The variables of its sets.
    pub env: BTreeMap<SetName, BTreeMap<EnvName, String>>,
}

impl std::fmt::Debug for MadeFrom {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MadeFrom").field("image", &self.image).finish_non_exhaustive()
    }
}

impl MadeFrom {
    /// What an app runs if it is made from these texts, on any host.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn target(&self, app: &AppName, key: &ReleaseKey) -> Result<Target, Problems> {
        let spec = catch_panic(|| Spec::parse(self.spec.as_bytes()));
        let bytes = |text: &Option<String>| text.as_ref().map(|text| text.clone().into_bytes());
        let own = desired::AppKeys {
            spec: Some(StoredSpec { created: 0, modified: 0, spec: Arc::new(spec) }),
            image: bytes(&self.image),
            restart: bytes(&self.restart),
            ..desired::AppKeys::default()
        };
        let values = |set: &BTreeMap<EnvName, String>| {
            set.iter().map(|(name, value)| (name.clone(), value.clone().into_bytes())).collect()
        };
        // An empty set is no set for `env_from`.
        let env = self.env.iter().filter(|(_, set)| !set.is_empty()).map(|(set, v)| (set.clone(), values(v))).collect();
        let keys = desired::Keys { env, ..desired::Keys::default() };
        catch_panic(|| desired::target(app, &own, &keys, key, false))
    }
}

fn host_mode(value: &[u8]) -> Option<HostMode> {
    match std::str::from_utf8(value).ok()?.trim() {
        "active" => Some(HostMode::Active),
        "cordoned" => Some(HostMode::Cordoned),
        "drained" => Some(HostMode::Drained),
        _ => None,
    }
}

fn host_labels(value: &[u8]) -> Result<BTreeMap<String, String>, Problem> {
    let node = yaml::parse(value)?;
    let Value::Map(entries) = node.value else {
        return Err(Problem::new("", "write a mapping such as `role: web`").at(node.line, node.column));
    };
    // They are published with the host, and a store takes requests of 1.5 MiB.
    if value.len() > MOST_LABELS {
        let message = format!("{} bytes of labels are more than {MOST_LABELS}", value.len());
        return Err(Problem::new("", message).at(node.line, node.column));
    }
    let mut labels = BTreeMap::new();
    for (key, node) in entries {
        let Value::Scalar { text, .. } = node.value else {
            return Err(Problem::new(key.name, "a label has a single value").at(node.line, node.column));
        };
        labels.insert(key.name, text);
    }
    Ok(labels)
}
