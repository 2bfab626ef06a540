//! Logins at registries. They come from root's files and from credential helpers on this host, are asked for when an image
//! is pulled, and are written nowhere.

mod docker_config;
mod helper;

use std::{
    collections::HashMap,
    fmt,
    path::{Path, PathBuf},
    sync::Mutex,
    time::{Duration, Instant},
};

use crate::model::problem::chain;
use docker_config::{DockerConfig, Found};
pub(super) use helper::{PATH, shown};

/// How long the answer of a helper is used again: tokens that it hands out live for hours, and a helper takes a second.
const KEPT: Duration = Duration::from_secs(5 * 60);

/// How this host logs in at a registry, by its own file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registry {
    /// Its host, with the port if images name one.
    pub host: String,
    /// Where the login comes from.
    pub source: Source,
}

/// Where a login comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A program that speaks the protocol of `docker-credential-helpers`: the end of its name, or its path.
    Helper(String),
    /// A name, and a file with the password.
    Password {
        /// The name.
        username: String,
        /// The file; a line break at its end does not count.
        file: PathBuf,
    },
}

/// A login.
#[derive(Clone, PartialEq, Eq)]
pub enum Login {
    /// A name and a password.
    Password {
        /// The name.
        username: String,
        /// The password.
        password: String,
    },
    /// An identity token.
    Token(String),
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Login(…)")
    }
}

/// Why there is no login where one is configured.
#[derive(Debug, thiserror::Error)]
pub enum LoginError {
    /// A file cannot be read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Docker's configuration file is not one.
    #[error("`{}` is not a configuration file of Docker: {message}", path.display())]
    Config {
        /// Which.
        path: PathBuf,
        /// Why.
        message: String,
    },
    /// A helper failed.
    #[error("the credential helper `{helper}` {message}")]
    Helper {
        /// Which.
        helper: String,
        /// What it did.
        message: String,
    },
}

/// The logins of this host.
#[derive(Debug, Default)]
pub struct Logins {
    registries: Vec<Registry>,
    /// Docker's `config.json`, for registries that are not listed.
    file: Option<PathBuf>,
    /// What helpers answered, by registry.
    answers: Mutex<HashMap<String, (Instant, Option<Login>)>>,
}

impl Logins {
    /// By the agent's file, and by `config.json` for what it does not list.
    pub fn new(registries: Vec<Registry>, file: Option<PathBuf>) -> Self {
        Self { registries, file, answers: Mutex::default() }
    }

    /// The login at a registry; `None` if images are pulled without one. The files are read each time, so that a renewed
    /// login counts at once.
    ///
    /// # Errors
    /// If a login is configured and cannot be had.
    pub async fn at(&self, registry: &str) -> Result<Option<Login>, LoginError> {
        match self.source(registry)? {
            Found::Nothing => Ok(None),
            Found::Login(login) => Ok(Some(login)),
            Found::Helper { name, fallback } => Ok(self.ask(&name, registry).await?.or(fallback)),
        }
    }

    fn source(&self, registry: &str) -> Result<Found, LoginError> {
        let listed = self.registries.iter().find(|known| known.host == registry);
        match (listed.map(|known| &known.source), &self.file) {
            (Some(Source::Helper(name)), _) => Ok(Found::Helper { name: name.clone(), fallback: None }),
            (Some(Source::Password { username, file }), _) => {
                let password = read(file)?;
                let password = password.trim_end_matches(['\r', '\n']).to_owned();
                Ok(Found::Login(Login::Password { username: username.clone(), password }))
            }
            (None, Some(file)) if !is_missing(file) => Ok(DockerConfig::read(file)?.find(registry)),
            (None, _) => Ok(Found::Nothing),
        }
    }

    async fn ask(&self, helper: &str, registry: &str) -> Result<Option<Login>, LoginError> {
        let known = self.answers().get(registry).filter(|(at, _)| at.elapsed() < KEPT).map(|(_, login)| login.clone());
        if let Some(known) = known {
            return Ok(known);
        }
        let login = helper::ask(helper, registry).await?;
        self.answers().insert(registry.to_owned(), (Instant::now(), login.clone()));
        Ok(login)
    }

    /// Forgets what a helper answered, after the registry refused it. Returns whether there was an answer.
    pub fn forget(&self, registry: &str) -> bool {
        self.answers().remove(registry).is_some()
    }

    fn answers(&self) -> std::sync::MutexGuard<'_, HashMap<String, (Instant, Option<Login>)>> {
        self.answers.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// What is wrong with the logins that are configured, without asking a helper for one.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut helpers = Vec::new();
        for registry in &self.registries {
            match &registry.source {
                Source::Helper(name) => helpers.push(name.clone()),
                Source::Password { file, .. } => problems.extend(read(file).err().map(|e| chain(&e))),
            }
        }
        match self.file.as_deref().filter(|file| !is_missing(file)).map(DockerConfig::read) {
            Some(Ok(config)) => helpers.extend(config.helpers()),
            Some(Err(e)) => problems.push(chain(&e)),
            None => {}
        }
        helpers.sort();
        helpers.dedup();
        problems.extend(helpers.iter().filter_map(|name| helper::find(name).err()).map(|e| chain(&e)));
        problems
    }
}

/// Whether there is no such file. One that cannot be reached is not missing, nor is a link that leads nowhere.
fn is_missing(path: &Path) -> bool {
    path.symlink_metadata().is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound)
}

fn read(path: &Path) -> Result<String, LoginError> {
    std::fs::read_to_string(path).map_err(|source| LoginError::Read { path: path.to_owned(), source })
}

/// The registry of a reference: its first part, if that looks like a host.
pub fn registry_of(image: &str) -> &str {
    match image.split_once('/') {
        Some((host, _)) if host.contains('.') || host.contains(':') || host == "localhost" => host,
        _ => DOCKER_HUB,
    }
}

/// The registry of images that name none.
const DOCKER_HUB: &str = "docker.io";
/// What Docker writes for it in its files, and gives to helpers.
const DOCKER_HUB_URL: &str = "https://index.docker.io/v1/";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_registry_of_a_reference_is_its_host() {
        assert_eq!(registry_of("web:v1"), "docker.io");
        assert_eq!(registry_of("team/web"), "docker.io");
        assert_eq!(registry_of("registry.example.com/team/web:v1"), "registry.example.com");
        assert_eq!(registry_of("localhost:5000/web"), "localhost:5000");
    }
}
