//! Specs from what other tools run: Compose files, `docker run` lines, containers.
//!
//! All of them become services in Compose's form, and are translated by the same rules. What has another meaning here, or
//! none, is reported, and stands in the spec as a comment.

mod compose;
pub mod container;
pub mod export;
mod interpolate;
pub mod kamal;
mod merge;
pub mod run_line;
mod service;
mod tree;

use std::collections::BTreeMap;

pub use compose::{Options, Outcome, compose};
pub use interpolate::variables;
use tree::{list, map, scalar};

use crate::model::name::{AppName, EnvName};

/// An app that was made from a service.
#[derive(Debug, Clone, PartialEq)]
pub struct Imported {
    /// Its name.
    pub app: AppName,
    /// Its spec, as YAML.
    pub spec: String,
    /// Its variables, which go below `env/<app>/`.
    pub env: BTreeMap<EnvName, String>,
    /// What differs from the service.
    pub notes: Vec<Note>,
}

/// What became of a key of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// The line of the key, from 1; 0 where there is none.
    pub line: usize,
    /// The key, with its path below the service.
    pub key: String,
    /// What became of it.
    pub effect: Effect,
    /// Why, or what to do instead.
    pub message: String,
}

/// How far a spec is from its service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Effect {
    /// The same is said in other words.
    Changed,
    /// It is left out, and not needed.
    Dropped,
    /// It has no meaning here: without it the app is another one.
    Refused,
}

impl std::fmt::Display for Note {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let effect = match self.effect {
            Effect::Changed => "changed",
            Effect::Dropped => "dropped",
            Effect::Refused => "refused",
        };
        write!(f, "{}: {effect}: {}", self.key, self.message)
    }
}

/// Why nothing could be imported.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct ImportError(pub Vec<String>);

impl ImportError {
    fn one(message: impl Into<String>) -> Self {
        Self(vec![message.into()])
    }
}
