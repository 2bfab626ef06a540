//! The kind of a change between two desired states of an app.

use super::desired::{DesiredApp, Target};

/// The kind of a change: a bounded set, for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// The app came to this host.
    New,
    /// Another image.
    Image,
    /// Other variables.
    Environment,
    /// Another value in `apps/<app>/restart`.
    Restart,
    /// Another input of the container.
    Spec,
    /// Virtual hosts, or how requests reach it.
    Ingress,
    /// How many instances.
    Replicas,
    /// The app left this host.
    Removed,
    /// Anything else, or several of these before the first had converged.
    Other,
}

impl Change {
    /// Every kind.
    pub const ALL: [Self; 9] = [
        Self::New,
        Self::Image,
        Self::Environment,
        Self::Restart,
        Self::Spec,
        Self::Ingress,
        Self::Replicas,
        Self::Removed,
        Self::Other,
    ];

    /// Its name in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Image => "image",
            Self::Environment => "environment",
            Self::Restart => "restart",
            Self::Spec => "spec",
            Self::Ingress => "ingress",
            Self::Replicas => "replicas",
            Self::Removed => "removed",
            Self::Other => "other",
        }
    }

    /// The kind of the change from `before` to `after`. If several things changed at once, the most significant: an
    /// image that brings its variables along is an image.
    pub fn between(before: &DesiredApp, after: &DesiredApp) -> Self {
        match (before.target(), after.target()) {
            (Some(before), Some(after)) => Self::of_targets(before, after),
            (None, Some(_)) if matches!(before, DesiredApp::Absent(_)) => Self::New,
            (_, None) if matches!(after, DesiredApp::Absent(_)) => Self::Removed,
            _ => Self::Other,
        }
    }

    fn of_targets(before: &Target, after: &Target) -> Self {
        let (old, new) = (&before.release, &after.release);
        if old.image != new.image {
            Self::Image
        } else if old.container != new.container
            || old.health != new.health
            || old.endpoint != new.endpoint
            || old.more_endpoints != new.more_endpoints
        {
            Self::Spec
        } else if old.env != new.env {
            Self::Environment
        } else if old.id != new.id {
            // `restart` is the only other input of the id.
            Self::Restart
        } else if before.ingress != after.ingress {
            Self::Ingress
        } else if before.replicas != after.replicas {
            Self::Replicas
        } else {
            Self::Other
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, sync::Arc};

    use super::*;
    use crate::model::{
        env::Secret,
        name::EnvName,
        release::{Release, ReleaseKey},
        spec::Spec,
    };

    fn run(spec: &str, env: &str, restart: Option<&str>) -> DesiredApp {
        let spec = Spec::parse(spec.as_bytes()).expect("a spec");
        let env = BTreeMap::from([(EnvName::try_from("A").expect("a name"), Secret::new(env))]);
        let image = spec.image.clone().expect("an image");
        let key = ReleaseKey::new("k");
        let endpoint = spec.ingress.as_ref().map(|i| i.endpoint.clone());
        let release = Release::new(&key, image, spec.container.clone(), env, spec.health.clone(), endpoint, restart);
        DesiredApp::Run(Target {
            release: Arc::new(release),
            replicas: spec.deploy.replicas_per_host,
            ingress: spec.ingress,
            order: spec.deploy.order,
            update: crate::model::spec::Update::default(),
            pull_policy: spec.pull_policy,
            created: 1,
            modified: 1,
            cordoned: false,
            retried: 0,
            release_command: None,
        })
    }

    #[test]
    fn change_kind_names_what_changed() {
        let web = "image: web:v1\ningress: {hosts: [a.test], port: 80}\n";
        let base = run(web, "1", None);
        let absent = DesiredApp::Absent(String::new());
        for (before, after, wanted) in [
            (absent.clone(), base.clone(), Change::New),
            (base.clone(), absent.clone(), Change::Removed),
            (base.clone(), run(&web.replace("v1", "v2"), "1", None), Change::Image),
            (base.clone(), run(&web.replace("v1", "v2"), "2", None), Change::Image),
            (base.clone(), run(web, "2", None), Change::Environment),
            (base.clone(), run(web, "1", Some("now")), Change::Restart),
            (base.clone(), run(&format!("{web}command: [a]\n"), "1", None), Change::Spec),
            (base.clone(), run(&web.replace("a.test", "b.test"), "1", None), Change::Ingress),
            (base.clone(), run(&format!("{web}deploy: {{replicas_per_host: 2}}\n"), "1", None), Change::Replicas),
            (DesiredApp::Paused(String::new()), base.clone(), Change::Other),
        ] {
            assert_eq!(Change::between(&before, &after), wanted);
        }
    }
}
