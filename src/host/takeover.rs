//! Virtual hosts that apps take over from hand-written servers of this nginx, as root said on this host.
//!
//! nginx gives a host name to the first server that has it, and demae leaves a host that has another server alone. Which
//! traffic an app may take is not for the store to say, so this is a file beside the agent's others.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{
    files::{self, FileError},
    layout::Layout,
};
use crate::model::name::{AppName, VirtualHost};

/// What an app takes over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Takeover {
    /// Its virtual hosts that had another server.
    pub hosts: BTreeSet<VirtualHost>,
    /// The container that served them, by name.
    pub container: String,
    /// The restart policy that it had.
    pub restart: String,
    /// The port inside on which it took requests.
    pub port: u16,
}

/// Takeovers of this host, by app.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Takeovers(pub BTreeMap<AppName, Takeover>);

impl Takeovers {
    /// Those that were written here; none without a file.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn read(layout: &Layout) -> Result<Self, FileError> {
        let path = layout.takeovers();
        let Some(text) = files::read(&path)? else { return Ok(Self::default()) };
        let why = "; without it, apps leave hosts of hand-written servers alone";
        serde_json::from_slice(&text).map_err(|e| FileError::unreadable(&path, &e.to_string(), why))
    }

    /// Writes them.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, layout: &Layout) -> Result<(), FileError> {
        let path = layout.takeovers();
        let text = serde_json::to_vec_pretty(self).map_err(std::io::Error::other);
        files::write(&path, &text.map_err(|e| FileError::cannot_write(&path, e))?, 0o644)
    }

    /// The hosts that an app may take.
    pub fn hosts(&self, app: &AppName) -> impl Iterator<Item = &VirtualHost> {
        self.0.get(app).into_iter().flat_map(|takeover| &takeover.hosts)
    }

    /// A text that differs if other hosts may be taken; empty for none.
    pub fn fingerprint(&self) -> String {
        let all = self.0.iter().flat_map(|(app, takeover)| takeover.hosts.iter().map(move |host| (app, host)));
        all.map(|(app, host)| format!("+{app}:{host}")).collect()
    }
}
