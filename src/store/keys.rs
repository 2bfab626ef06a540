//! Every key, its form and its meaning, in one place.

use crate::model::{
    name::{AppName, EnvName, HostName, SetName},
    problem::Problem,
};

/// What all keys begin with, `/demae` unless configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prefix(String);

impl Prefix {
    /// Takes a prefix; a slash at the end is dropped.
    ///
    /// # Errors
    /// If it does not begin with a slash, or is empty.
    pub fn new(text: &str) -> Result<Self, String> {
        let trimmed = text.trim_end_matches('/');
        if !trimmed.starts_with('/') || trimmed.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return Err(format!("`{}` is not a prefix of keys; write it like `/demae`", text.escape_debug()));
        }
        Ok(Self(trimmed.to_owned()))
    }

    /// The prefix itself.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// A key below it.
    pub fn key(&self, rest: &str) -> String {
        format!("{}/{rest}", self.0)
    }

    /// The range of all that people write: `apps/`, `cluster`, `env/` and `hosts/` are neighbours, so one read and one
    /// watch see them at one revision, and never what agents write.
    pub fn intent(&self) -> (Vec<u8>, Vec<u8>) {
        (self.key("apps/").into_bytes(), self.key("hosts0").into_bytes())
    }

    /// The key that release ids are made with.
    pub fn release_key(&self) -> String {
        self.key("secret/release-key")
    }

    /// What an agent tells of its host.
    pub fn host_state(&self, host: &HostName) -> String {
        self.key(&format!("state/hosts/{host}"))
    }

    /// What an agent tells of an app.
    pub fn app_state(&self, app: &str, host: &HostName) -> String {
        self.key(&format!("state/apps/{app}/{host}"))
    }

    /// All that agents tell of apps.
    pub fn app_states(&self) -> String {
        self.key("state/apps/")
    }

    /// What is below the prefix.
    pub fn strip<'k>(&self, key: &'k [u8]) -> Option<&'k [u8]> {
        key.strip_prefix(self.0.as_bytes())?.strip_prefix(b"/")
    }
}

/// What a key of the intent means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Key {
    /// `apps/<app>/spec`
    Spec(AppName),
    /// `apps/<app>/image`
    Image(AppName),
    /// `apps/<app>/restart`
    Restart(AppName),
    /// `apps/<app>/paused`
    Paused(AppName),
    /// `env/<set>/<NAME>`
    Env(SetName, EnvName),
    /// `hosts/<host>/labels`
    HostLabels(HostName),
    /// `hosts/<host>/mode`
    HostMode(HostName),
    /// `cluster`
    Cluster,
}

/// A key that means nothing, and whose it might be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BadKey {
    /// Something unknown below a good app.
    App(AppName, Problem),
    /// A bad variable in a good set.
    Set(SetName, Problem),
    /// Nobody's.
    Nobody(Problem),
}

impl Key {
    /// Reads a key, without the prefix.
    ///
    /// # Errors
    /// One sentence, and whose key it might be.
    pub fn parse(rest: &[u8]) -> Result<Self, BadKey> {
        let shown = String::from_utf8_lossy(rest).escape_debug().to_string();
        let nobody = |message: String| BadKey::Nobody(Problem::new(shown.clone(), message));
        let text = std::str::from_utf8(rest).map_err(|_| nobody("the key is not UTF-8".into()))?;
        if text == "cluster" {
            return Ok(Self::Cluster);
        }
        let Some((kind, rest)) = text.split_once('/') else {
            return Err(nobody("demae knows no such key".into()));
        };
        match kind {
            "apps" => {
                let (app, what) =
                    rest.rsplit_once('/').ok_or_else(|| nobody("write `apps/<app>/spec` and the like".into()))?;
                let app = AppName::try_from(app).map_err(|e| nobody(e.to_string()))?;
                match what {
                    "spec" => Ok(Self::Spec(app)),
                    "image" => Ok(Self::Image(app)),
                    "restart" => Ok(Self::Restart(app)),
                    "paused" => Ok(Self::Paused(app)),
                    _ => {
                        let problem = Problem::new(shown, "demae knows no such key");
                        Err(BadKey::App(app, problem.hint("an app has `spec`, `image`, `restart` and `paused`")))
                    }
                }
            }
            "env" => {
                let (set, name) = rest.split_once('/').ok_or_else(|| nobody("write `env/<set>/<NAME>`".into()))?;
                let set = SetName::try_from(set).map_err(|e| nobody(e.to_string()))?;
                match EnvName::try_from(name) {
                    Ok(name) => Ok(Self::Env(set, name)),
                    Err(e) => {
                        let problem = Problem::new(shown, e.to_string());
                        Err(BadKey::Set(
                            set,
                            problem.hint("a name cannot be put right: delete this key, and put the value to another"),
                        ))
                    }
                }
            }
            "hosts" => {
                let (host, what) = rest
                    .rsplit_once('/')
                    .ok_or_else(|| nobody("write `hosts/<host>/labels` or `hosts/<host>/mode`".into()))?;
                let host = HostName::try_from(host).map_err(|e| nobody(e.to_string()))?;
                match what {
                    "labels" => Ok(Self::HostLabels(host)),
                    "mode" => Ok(Self::HostMode(host)),
                    _ => Err(nobody("a host has `labels` and `mode`".into())),
                }
            }
            _ => Err(nobody("demae knows no such key".into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_and_hostile_ones_are_nobodys() {
        let web = AppName::try_from("web").expect("a name");
        assert_eq!(Key::parse(b"apps/web/image"), Ok(Key::Image(web.clone())));
        assert_eq!(Key::parse(b"cluster"), Ok(Key::Cluster));
        assert!(matches!(Key::parse(b"apps/web/imagee"), Err(BadKey::App(app, _)) if app == web));
        for bad in
            ["apps/../x/spec", "apps/WEB/spec", "apps/spec", "apps//spec", "env/web", "hosts/a/b/c", "clusters", "x"]
        {
            assert!(matches!(Key::parse(bad.as_bytes()), Err(BadKey::Nobody(_))), "{bad} was taken");
        }
        assert!(matches!(Key::parse(b"env/web/A=B"), Err(BadKey::Set(..))));
        assert!(matches!(Key::parse(b"apps/\xff/spec"), Err(BadKey::Nobody(_))));
    }

    #[test]
    fn the_intent_is_one_range_without_state_and_secrets() {
        let prefix = Prefix::new("/demae/").expect("a prefix");
        let (from, to) = prefix.intent();
        let inside = |k: &str| (from.as_slice()..to.as_slice()).contains(&prefix.key(k).as_bytes());
        assert!(["apps/web/spec", "cluster", "env/web/A", "hosts/web1/mode"].iter().all(|k| inside(k)));
        assert!(!["secret/release-key", "state/apps/web/web1", "aa"].iter().any(|k| inside(k)));
    }
}
