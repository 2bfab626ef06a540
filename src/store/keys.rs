//! Every key, its form and its meaning, in one place.

use crate::model::{
    fleet::FleetKey,
    name::{AppName, EnvName, HostName, ReleaseId, SetName},
    problem::Problem,
};

/// A range of keys, from the first one up to and without the second.
pub type KeyRange = (Vec<u8>, Vec<u8>);

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

    /// A key of a rollout.
    pub fn fleet(&self, key: &FleetKey) -> String {
        let rest = match key {
            FleetKey::Leader => "state/leader".to_owned(),
            FleetKey::Host(host) => format!("state/hosts/{host}"),
            FleetKey::Rollout(app) => format!("state/rollouts/{app}"),
            FleetKey::Permit(host, app) => format!("state/permits/{host}/{app}"),
            FleetKey::Verdict(app, release, host) => format!("state/verdicts/{app}/{release}/{host}"),
            FleetKey::Lost(app, host) => format!("state/lost/{app}/{host}"),
            FleetKey::Proof(host, app) => format!("state/proven/{host}/{app}"),
            FleetKey::Status(host, app) => format!("state/apps/{host}/{app}"),
            FleetKey::Kept(app, release) => format!("state/releases/{app}/{release}"),
            FleetKey::KeptEnv(app, release) => format!("secret/releases/{app}/{release}"),
            FleetKey::Command(app, release) => format!("state/commands/{app}/{release}"),
            FleetKey::Digest(app, release) => format!("state/digests/{app}/{release}"),
            FleetKey::Spec(app) => format!("apps/{app}/spec"),
            FleetKey::Image(app) => format!("apps/{app}/image"),
            FleetKey::Retry(app) => format!("apps/{app}/retry"),
            FleetKey::Freeze => "freeze".to_owned(),
        };
        self.key(&rest)
    }

    /// The verdicts of a release, on all hosts: a prefix.
    pub fn verdicts(&self, app: &AppName, release: &ReleaseId) -> String {
        self.key(&format!("state/verdicts/{app}/{release}/"))
    }

    /// All that a leader reads: what people write, kept environments, and what machines write.
    pub fn leader_range(&self) -> (Vec<u8>, Vec<u8>) {
        (self.key("apps/").into_bytes(), self.key("state0").into_bytes())
    }

    /// Where the records of an app's releases are, each with what is below it.
    pub fn records_of(&self, app: &AppName) -> [String; 6] {
        ["state/releases", "state/verdicts", "state/commands", "state/digests", "state/lost", "secret/releases"]
            .map(|place| self.key(&format!("{place}/{app}/")))
    }

    /// The variables of kept releases.
    pub fn kept_variables(&self) -> (Vec<u8>, Vec<u8>) {
        (self.key("secret/releases/").into_bytes(), self.key("secret/releases0").into_bytes())
    }

    /// What agents write about hosts, apps and rollouts; no secrets.
    pub fn state_range(&self) -> (Vec<u8>, Vec<u8>) {
        (self.key("state/").into_bytes(), self.key("state0").into_bytes())
    }

    /// A key without the prefix; `None` if it is not below it.
    pub fn strip<'k>(&self, key: &'k [u8]) -> Option<&'k [u8]> {
        key.strip_prefix(self.0.as_bytes())?.strip_prefix(b"/")
    }
}

/// Reads a key of a rollout, without the prefix; `None` if it is another one.
pub fn parse_fleet(rest: &[u8]) -> Option<FleetKey> {
    let text = std::str::from_utf8(rest).ok()?;
    let app = |text: &str| AppName::try_from(text).ok();
    let host = |text: &str| HostName::try_from(text).ok();
    let release = |text: &str| ReleaseId::try_from(text).ok();
    let words: Vec<&str> = text.split('/').collect();
    Some(match words[..] {
        ["freeze"] => FleetKey::Freeze,
        ["apps", a, "spec"] => FleetKey::Spec(app(a)?),
        ["apps", a, "image"] => FleetKey::Image(app(a)?),
        ["apps", a, "retry"] => FleetKey::Retry(app(a)?),
        ["state", "leader"] => FleetKey::Leader,
        ["state", "hosts", h] => FleetKey::Host(host(h)?),
        ["state", "rollouts", a] => FleetKey::Rollout(app(a)?),
        ["state", "permits", h, a] => FleetKey::Permit(host(h)?, app(a)?),
        ["state", "verdicts", a, r, h] => FleetKey::Verdict(app(a)?, release(r)?, host(h)?),
        ["state", "commands", a, r] => FleetKey::Command(app(a)?, release(r)?),
        ["state", "digests", a, r] => FleetKey::Digest(app(a)?, release(r)?),
        ["state", "lost", a, h] => FleetKey::Lost(app(a)?, host(h)?),
        ["state", "proven", h, a] => FleetKey::Proof(host(h)?, app(a)?),
        ["state", "apps", h, a] => FleetKey::Status(host(h)?, app(a)?),
        ["state", "releases", a, r] => FleetKey::Kept(app(a)?, release(r)?),
        ["secret", "releases", a, r] => FleetKey::KeptEnv(app(a)?, release(r)?),
        _ => return None,
    })
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
    /// `freeze`
    Freeze,
    /// `apps/<app>/release`
    Pin(AppName),
    /// `apps/<app>/promote`
    Promote(AppName),
    /// `apps/<app>/retry`
    Retry(AppName),
    /// `apps/<app>/by`
    By(AppName),
}

impl std::fmt::Display for Key {
    /// The key, without the prefix.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Spec(app) => write!(f, "apps/{app}/spec"),
            Self::Image(app) => write!(f, "apps/{app}/image"),
            Self::Restart(app) => write!(f, "apps/{app}/restart"),
            Self::Paused(app) => write!(f, "apps/{app}/paused"),
            Self::Pin(app) => write!(f, "apps/{app}/release"),
            Self::Promote(app) => write!(f, "apps/{app}/promote"),
            Self::Retry(app) => write!(f, "apps/{app}/retry"),
            Self::By(app) => write!(f, "apps/{app}/by"),
            Self::Env(set, name) => write!(f, "env/{set}/{name}"),
            Self::HostLabels(host) => write!(f, "hosts/{host}/labels"),
            Self::HostMode(host) => write!(f, "hosts/{host}/mode"),
            Self::Cluster => f.write_str("cluster"),
            Self::Freeze => f.write_str("freeze"),
        }
    }
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
        match text {
            "cluster" => return Ok(Self::Cluster),
            "freeze" => return Ok(Self::Freeze),
            _ => {}
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
                    "release" => Ok(Self::Pin(app)),
                    "promote" => Ok(Self::Promote(app)),
                    "retry" => Ok(Self::Retry(app)),
                    "by" => Ok(Self::By(app)),
                    _ => {
                        let problem = Problem::new(shown, "demae knows no such key, and ignores it");
                        Err(BadKey::App(
                            app,
                            problem.hint(
                                "an app has `spec`, `image`, `restart`, `paused`, `release`, `promote`, `retry` and `by`",
                            ),
                        ))
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
        for key in [
            "apps/web/spec",
            "apps/web/image",
            "apps/web/restart",
            "apps/web/paused",
            "apps/web/release",
            "apps/web/promote",
            "apps/web/retry",
            "apps/web/by",
            "env/web/A",
            "hosts/web1/labels",
            "hosts/web1/mode",
            "cluster",
            "freeze",
        ] {
            assert_eq!(Key::parse(key.as_bytes()).map(|parsed| parsed.to_string()), Ok(key.to_owned()));
        }
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
    fn keys_of_rollouts_are_read_as_they_are_written() {
        let prefix = Prefix::new("/demae").expect("a prefix");
        let (app, host) = (AppName::try_from("web").expect("a name"), HostName::try_from("web1").expect("a name"));
        let release = ReleaseId::try_from("0123456789ab").expect("a release");
        for key in [
            FleetKey::Leader,
            FleetKey::Host(host.clone()),
            FleetKey::Rollout(app.clone()),
            FleetKey::Permit(host.clone(), app.clone()),
            FleetKey::Verdict(app.clone(), release.clone(), host.clone()),
            FleetKey::Lost(app.clone(), host.clone()),
            FleetKey::Proof(host.clone(), app.clone()),
            FleetKey::Status(host.clone(), app.clone()),
            FleetKey::Kept(app.clone(), release.clone()),
            FleetKey::KeptEnv(app.clone(), release.clone()),
            FleetKey::Command(app.clone(), release.clone()),
            FleetKey::Digest(app.clone(), release.clone()),
            FleetKey::Spec(app.clone()),
            FleetKey::Image(app.clone()),
            FleetKey::Retry(app.clone()),
            FleetKey::Freeze,
        ] {
            let text = prefix.fleet(&key);
            assert_eq!(prefix.strip(text.as_bytes()).and_then(parse_fleet), Some(key.clone()), "{text}");
            let (from, to) = prefix.leader_range();
            assert!((from.as_slice()..to.as_slice()).contains(&text.as_bytes()), "a leader reads {text}");
            assert!(text.starts_with(&prefix.verdicts(&app, &release)) == matches!(key, FleetKey::Verdict(..)));
        }
        assert_eq!(parse_fleet(b"state/permits/../web"), None);
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
