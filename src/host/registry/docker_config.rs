//! Docker's `config.json`, as far as it is about logins: `credHelpers` before `credsStore` before `auths`, as in Docker's
//! own command line (<https://docs.docker.com/reference/cli/docker/login/#credential-stores>).

use std::{collections::BTreeMap, path::Path};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::Deserialize;

use super::{DOCKER_HUB, DOCKER_HUB_URL, Login, LoginError, read};

/// Where the login at a registry comes from.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// There is none.
    Nothing,
    /// It is in the file.
    Login(Login),
    /// A helper has it, or else this one counts.
    Helper { name: String, fallback: Option<Login> },
}

/// The parts of the file.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct DockerConfig {
    #[serde(default)]
    auths: BTreeMap<String, Auth>,
    #[serde(default)]
    cred_helpers: BTreeMap<String, String>,
    #[serde(default)]
    creds_store: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Auth {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
}

impl DockerConfig {
    pub(super) fn read(path: &Path) -> Result<Self, LoginError> {
        Self::parse(&read(path)?).map_err(|message| LoginError::Config { path: path.to_owned(), message })
    }

    fn parse(text: &str) -> Result<Self, String> {
        // The message of serde has no value of the file in it but the place.
        serde_json::from_str(text).map_err(|e| format!("line {}, column {}", e.line(), e.column()))
    }

    pub(super) fn find(&self, registry: &str) -> Found {
        let auth = of_registry(&self.auths, registry).and_then(Auth::login);
        let own = of_registry(&self.cred_helpers, registry).filter(|name| !name.is_empty());
        match (own, self.creds_store.as_ref().filter(|name| !name.is_empty()), auth) {
            (Some(name), _, _) => Found::Helper { name: name.clone(), fallback: None },
            (None, Some(name), fallback) => Found::Helper { name: name.clone(), fallback },
            (None, None, Some(login)) => Found::Login(login),
            (None, None, None) => Found::Nothing,
        }
    }

    /// The helpers that it names.
    pub(super) fn helpers(self) -> impl Iterator<Item = String> {
        self.cred_helpers.into_values().chain(self.creds_store).filter(|name| !name.is_empty())
    }
}

impl Auth {
    fn login(&self) -> Option<Login> {
        if let Some(token) = self.identitytoken.as_ref().filter(|token| !token.is_empty()) {
            return Some(Login::Token(token.clone()));
        }
        if let (Some(username), Some(password)) = (&self.username, &self.password) {
            return Some(Login::Password { username: username.clone(), password: password.clone() });
        }
        let decoded = STANDARD.decode(self.auth.as_deref()?).ok()?;
        let decoded = String::from_utf8(decoded).ok()?;
        let (username, password) = decoded.split_once(':')?;
        let password = password.trim_end_matches('\0').to_owned();
        Some(Login::Password { username: username.to_owned(), password })
    }
}

/// The entry of a registry. Docker writes hosts and URLs.
fn of_registry<'e, T>(entries: &'e BTreeMap<String, T>, registry: &str) -> Option<&'e T> {
    let host = |name: &str| {
        let rest = name.trim_start_matches("https://").trim_start_matches("http://");
        rest.split('/').next().unwrap_or(rest).to_owned()
    };
    let is_it = |name: &str| {
        let host = host(name);
        host == registry || registry == DOCKER_HUB && (name == DOCKER_HUB_URL || host == "index.docker.io")
    };
    entries.iter().find(|(name, _)| is_it(name)).map(|(_, entry)| entry)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn password(username: &str, password: &str) -> Login {
        Login::Password { username: username.to_owned(), password: password.to_owned() }
    }

    #[test]
    fn helpers_come_before_the_store_and_the_store_before_the_file() {
        let config = DockerConfig::parse(
            r#"{"auths": {"https://index.docker.io/v1/": {"auth": "YTpi"}, "one.example": {"auth": "Yzpk"},
                          "two.example": {"identitytoken": "t"}, "old.example": {}},
                "credHelpers": {"ecr.example": "ecr-login", "one.example": ""}, "credsStore": "",
                "HttpHeaders": {"a": "b"}}"#,
        )
        .expect("a file");
        assert_eq!(config.find("docker.io"), Found::Login(password("a", "b")));
        assert_eq!(config.find("one.example"), Found::Login(password("c", "d")));
        assert_eq!(config.find("two.example"), Found::Login(Login::Token("t".to_owned())));
        assert_eq!(config.find("ecr.example"), Found::Helper { name: "ecr-login".to_owned(), fallback: None });
        assert_eq!(config.find("old.example"), Found::Nothing);
        assert_eq!(config.find("one.example:5000"), Found::Nothing, "another port is another registry");
        let config = DockerConfig::parse(r#"{"auths": {"one.example": {"auth": "Yzpk"}}, "credsStore": "pass"}"#);
        let fallback = Some(password("c", "d"));
        assert_eq!(config.expect("a file").find("one.example"), Found::Helper { name: "pass".to_owned(), fallback });
        assert_eq!(DockerConfig::parse("{\n \"auths\": 7}").err().as_deref(), Some("line 2, column 11"));
    }
}
