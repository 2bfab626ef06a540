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

    /// The range of the desired state, which people write: `apps/`, `cluster`, `env/` and `hosts/` are neighbours, so one
    /// read and one watch see them at one revision, and never what agents write.
    pub fn desired_range(&self) -> (Vec<u8>, Vec<u8>) {
        (self.key("apps/").into_bytes(), self.key("hosts0").into_bytes())
    }

    /// The key that release ids are made with.
    pub fn release_key(&self) -> String {
        self.key("secret/release-key")
    }

    /// The last writes of the agent of a host; on no lease.
    pub fn fence(&self, host: &HostName) -> String {
        self.key(&format!("state/fence/{host}"))
    }

    /// What a person accepted for the whole fleet.
    pub fn fleet_acceptance(&self) -> String {
        self.key("state/accept")
    }

    /// The status of a host, on the lease of its agent.
    pub fn host_state(&self, host: &HostName) -> String {
        self.key(&format!("state/hosts/{host}"))
    }

    /// The status of an app on a host, on the lease of its agent.
    pub fn app_state(&self, host: &HostName, app: &str) -> String {
        self.key(&format!("state/apps/{host}/{app}"))
    }

    /// The statuses of all apps on all hosts.
    pub fn app_states(&self) -> String {
        self.key("state/apps/")
    }

    /// A key without the prefix; `None` if it is not below it.
    pub fn strip<'k>(&self, key: &'k [u8]) -> Option<&'k [u8]> {
        key.strip_prefix(self.0.as_bytes())?.strip_prefix(b"/")
    }
}

/// A key of the desired range.
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

/// A key without a meaning, by what it might belong to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BadKey {
    /// An unknown key below a valid app name.
    App(AppName, Problem),
    /// An invalid variable name in a valid set.
    Set(SetName, Problem),
    /// Neither.
    Unowned(Problem),
}

impl Key {
    /// Reads a key, without the prefix.
    ///
    /// # Errors
    /// One sentence, and what the key might belong to.
    pub fn parse(rest: &[u8]) -> Result<Self, BadKey> {
        let shown = String::from_utf8_lossy(rest).escape_debug().to_string();
        let unowned = |message: String| BadKey::Unowned(Problem::new(shown.clone(), message));
        let text = std::str::from_utf8(rest).map_err(|_| unowned("the key is not UTF-8".into()))?;
        if text == "cluster" {
            return Ok(Self::Cluster);
        }
        let Some((kind, rest)) = text.split_once('/') else {
            return Err(unowned("demae knows no such key".into()));
        };
        match kind {
            "apps" => {
                let (app, what) =
                    rest.rsplit_once('/').ok_or_else(|| unowned("write `apps/<app>/spec` and the like".into()))?;
                let app = AppName::try_from(app).map_err(|e| unowned(e.to_string()))?;
                match what {
                    "spec" => Ok(Self::Spec(app)),
                    "image" => Ok(Self::Image(app)),
                    "restart" => Ok(Self::Restart(app)),
                    "paused" => Ok(Self::Paused(app)),
                    _ => {
                        let problem = Problem::new(shown, "demae knows no such key, and ignores it");
                        Err(BadKey::App(app, problem.hint("an app has `spec`, `image`, `restart` and `paused`")))
                    }
                }
            }
            "env" => {
                let (set, name) = rest.split_once('/').ok_or_else(|| unowned("write `env/<set>/<NAME>`".into()))?;
                let set = SetName::try_from(set).map_err(|e| unowned(e.to_string()))?;
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
                    .ok_or_else(|| unowned("write `hosts/<host>/labels` or `hosts/<host>/mode`".into()))?;
                let host = HostName::try_from(host).map_err(|e| unowned(e.to_string()))?;
                match what {
                    "labels" => Ok(Self::HostLabels(host)),
                    "mode" => Ok(Self::HostMode(host)),
                    _ => Err(unowned("a host has `labels` and `mode`".into())),
                }
            }
            _ => Err(unowned("demae knows no such key".into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_parsed_and_hostile_ones_belong_to_nothing() {
        let web = AppName::try_from("web").expect("a name");
        assert_eq!(Key::parse(b"apps/web/image"), Ok(Key::Image(web.clone())));
        assert_eq!(Key::parse(b"cluster"), Ok(Key::Cluster));
        assert!(matches!(Key::parse(b"apps/web/imagee"), Err(BadKey::App(app, _)) if app == web));
        for bad in
            ["apps/../x/spec", "apps/WEB/spec", "apps/spec", "apps//spec", "env/web", "hosts/a/b/c", "clusters", "x"]
        {
            assert!(matches!(Key::parse(bad.as_bytes()), Err(BadKey::Unowned(_))), "{bad} was taken");
        }
        assert!(matches!(Key::parse(b"env/web/A=B"), Err(BadKey::Set(..))));
        assert!(matches!(Key::parse(b"apps/\xff/spec"), Err(BadKey::Unowned(_))));
    }

    #[test]
    fn the_desired_range_has_neither_state_nor_secrets() {
        let prefix = Prefix::new("/demae/").expect("a prefix");
        let (from, to) = prefix.desired_range();
        let inside = |k: &str| (from.as_slice()..to.as_slice()).contains(&prefix.key(k).as_bytes());
        assert!(["apps/web/spec", "cluster", "env/web/A", "hosts/web1/mode"].iter().all(|k| inside(k)));
        assert!(
            !["secret/release-key", "state/apps/web1/web", "state/fence/web1", "state/accept", "aa"]
                .iter()
                .any(|k| inside(k))
        );
    }
}
