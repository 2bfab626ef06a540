//! What people and agents wrote, as the leader and the command line read it.

use std::collections::BTreeMap;

use crate::{
    fleet::records::{RawRecord, Records},
    model::{
        desired::HostMode,
        fleet::FleetKey,
        name::{AppName, HostName, NameError, ReleaseId},
        problem::Problems,
        release::ReleaseKey,
    },
    store::{Contents, Entry, Everywhere, HostInfo, Interpreter, ROLLOUTS, keys::Key, parse_fleet},
};

/// All that is about the fleet, as of one revision.
pub struct FleetContents {
    /// Hosts that are up.
    pub hosts: BTreeMap<HostName, HostInfo>,
    /// What machines wrote.
    pub records: Records,
    entries: BTreeMap<Vec<u8>, Entry>,
    interpreter: Interpreter,
    apps: BTreeMap<AppName, Result<Everywhere, Problems>>,
    /// Whether `apps` is of other entries.
    is_stale: bool,
}

impl FleetContents {
    /// Nothing yet, read by this host.
    pub fn new(host: HostName) -> Self {
        Self {
            hosts: BTreeMap::new(),
            records: Records::default(),
            entries: BTreeMap::new(),
            interpreter: Interpreter::new(host, BTreeMap::new()),
            apps: BTreeMap::new(),
            is_stale: true,
        }
    }

    /// Takes a key, without the prefix, as it is now; `None` if it is gone.
    pub fn take(&mut self, key: Vec<u8>, entry: Option<Entry>) {
        if let Some(fleet_key) = parse_fleet(&key) {
            if let FleetKey::Host(host) = &fleet_key {
                let info = entry.as_ref().and_then(|entry| serde_json::from_slice(entry.value()).ok());
                match info {
                    Some(info) => drop(self.hosts.insert(host.clone(), info)),
                    None => drop(self.hosts.remove(host)),
                }
            }
            let raw = entry.as_ref().map(|entry| RawRecord {
                value: entry.value(),
                created: entry.created(),
                modified: entry.modified(),
            });
            self.records.take(fleet_key, raw);
        }
        if !key.starts_with(b"state/") && !key.starts_with(b"secret/") {
            self.is_stale = true;
            match entry {
                Some(entry) => drop(self.entries.insert(key, entry)),
                None => drop(self.entries.remove(&key)),
            }
        }
    }

    /// A key that people write.
    pub fn entry(&self, key: &Key) -> Option<&Entry> {
        self.entries.get(key.to_string().as_bytes())
    }

    /// Brings [`apps`](Self::apps) up to date.
    pub fn resolve(&mut self, key: &ReleaseKey) {
        if std::mem::take(&mut self.is_stale) {
            self.apps = self.interpreter.everywhere(&Contents::new(self.entries.clone(), 0), key);
        }
    }

    /// Every app, wherever it is placed, or what is wrong with it, as last resolved.
    pub fn apps(&self) -> &BTreeMap<AppName, Result<Everywhere, Problems>> {
        &self.apps
    }

    /// What an app would be with other values of some keys; `None` if it would not exist.
    pub fn with(
        &self,
        app: &AppName,
        changes: &[(Key, Option<Vec<u8>>)],
        key: &ReleaseKey,
    ) -> Option<Result<Everywhere, Problems>> {
        let mut entries = self.entries.clone();
        for (changed, value) in changes {
            let text = changed.to_string().into_bytes();
            match value {
                Some(value) => drop(entries.insert(text, Entry::new(value.clone(), 0, 0))),
                None => drop(entries.remove(&text)),
            }
        }
        self.interpreter.clone().everywhere(&Contents::new(entries, 0), key).remove(app)
    }

    /// The kept release that a person has pinned.
    ///
    /// # Errors
    /// If what the pin says is no release.
    pub fn pin(&self, app: &AppName) -> Result<Option<ReleaseId>, NameError> {
        self.release_in(&Key::Pin(app.clone()))
    }

    /// The release that a person has promoted.
    ///
    /// # Errors
    /// If what the key says is no release.
    pub fn promoted(&self, app: &AppName) -> Result<Option<ReleaseId>, NameError> {
        self.release_in(&Key::Promote(app.clone()))
    }

    fn release_in(&self, key: &Key) -> Result<Option<ReleaseId>, NameError> {
        let Some(entry) = self.entry(key) else { return Ok(None) };
        let text = String::from_utf8_lossy(entry.value());
        ReleaseId::try_from(text.trim()).inspect_err(|e| tracing::debug!("`{key}`: {e}")).map(Some)
    }

    /// Whether a host is to run an app.
    pub fn is_placed(&self, app: &AppName, everywhere: &Everywhere, host: &HostName, info: &HostInfo) -> bool {
        everywhere.constraints.iter().all(|constraint| constraint.holds(&info.labels))
            && match info.mode {
                HostMode::Active => true,
                HostMode::Cordoned => self.records.proven(app, host).is_some(),
                HostMode::Drained => false,
            }
    }
}

/// Whether a host takes turns in rollouts.
pub fn takes_turns(info: &HostInfo) -> bool {
    info.features.iter().any(|feature| feature == ROLLOUTS)
}
