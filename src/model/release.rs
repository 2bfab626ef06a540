//! A release: everything a container is created from, and the name that follows from it.

use std::collections::BTreeMap;

use hmac::{Hmac, Mac};
use serde::Serialize;
use sha2::Sha256;

use super::{
    env::Secret,
    name::{EnvName, ImageRef, ReleaseId},
    spec::{ContainerSpec, Endpoint, HealthCheck},
};

/// The key that release ids are made with. Ids are visible and environments hold guessable secrets, so a plain hash
/// would let anyone who sees an id search for them.
#[derive(Clone, PartialEq, Eq)]
pub struct ReleaseKey(Vec<u8>);

impl ReleaseKey {
    /// Takes a key from the store.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Self {
        Self(bytes.into())
    }

    /// Its bytes, for whoever keeps them as safe as the store does.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl std::fmt::Debug for ReleaseKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ReleaseKey(***)")
    }
}

/// What a container is created from.
#[derive(Debug, Clone, PartialEq)]
pub struct Release {
    /// The identity: equal ids, equal containers.
    pub id: ReleaseId,
    /// The image, as it was ordered.
    pub image: ImageRef,
    /// Mounts, limits and the rest.
    pub container: ContainerSpec,
    /// The whole environment, without the facts that demae adds.
    pub env: BTreeMap<EnvName, Secret>,
    /// When an instance counts as healthy.
    pub health: HealthCheck,
    /// Where the app listens.
    pub endpoint: Option<Endpoint>,
    /// Where it listens beside that.
    pub more_endpoints: Vec<Endpoint>,
}

/// What the id is made over. A golden test holds its form: a change here would replace every container of every user.
#[derive(Serialize)]
struct Identity<'a> {
    v: u8,
    image: &'a str,
    container: &'a ContainerSpec,
    env: BTreeMap<&'a str, &'a str>,
    health: &'a HealthCheck,
    endpoint: &'a Option<Endpoint>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    more_endpoints: &'a [Endpoint],
    restart: Option<&'a str>,
}

impl Release {
    /// Makes a release and its id: the first 48 bits of HMAC-SHA-256 over the canonical JSON of all parts.
    pub fn new(
        key: &ReleaseKey,
        image: ImageRef,
        container: ContainerSpec,
        env: BTreeMap<EnvName, Secret>,
        health: HealthCheck,
        endpoint: Option<Endpoint>,
        restart: Option<&str>,
    ) -> Self {
        Self::with_endpoints(key, image, container, env, health, (endpoint, Vec::new()), restart)
    }

    /// The same, of an app that listens in several places.
    pub fn with_endpoints(
        key: &ReleaseKey,
        image: ImageRef,
        container: ContainerSpec,
        env: BTreeMap<EnvName, Secret>,
        health: HealthCheck,
        (endpoint, more_endpoints): (Option<Endpoint>, Vec<Endpoint>),
        restart: Option<&str>,
    ) -> Self {
        let identity = Identity {
            v: 1,
            image: image.as_str(),
            container: &container,
            env: env.iter().map(|(k, v)| (k.as_str(), v.expose())).collect(),
            health: &health,
            endpoint: &endpoint,
            more_endpoints: &more_endpoints,
            restart,
        };
        let text = serde_json::to_vec(&identity).unwrap_or_default();
        // HMAC takes keys of any length, so this cannot fail; an empty tag would be refused as an id below.
        let tag = Hmac::<Sha256>::new_from_slice(&key.0).map(|mac| mac.chain_update(&text).finalize().into_bytes());
        let hex: String = tag.iter().flat_map(|t| t.iter()).take(6).map(|b| format!("{b:02x}")).collect();
        #[expect(clippy::expect_used, reason = "six bytes in hexadecimal are a release id")]
        let id = ReleaseId::try_from(hex).expect("twelve hexadecimal digits");
        Self { id, image, container, env, health, endpoint, more_endpoints }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn release(image: &str, env: &[(&str, &str)], restart: Option<&str>) -> ReleaseId {
        let env = env.iter().map(|(k, v)| (EnvName::try_from(*k).expect("a name"), Secret::new(*v))).collect();
        let image = ImageRef::try_from(image).expect("an image");
        let key = ReleaseKey::new("k");
        Release::new(&key, image, ContainerSpec::default(), env, HealthCheck::default(), None, restart).id
    }

    #[test]
    fn an_id_never_changes_between_versions_of_demae() {
        assert_eq!(release("web:v1", &[("A", "1")], None).as_str(), "9dbb613e4a1a");
    }

    #[test]
    fn everything_a_container_is_made_from_is_in_the_id() {
        let base = release("web:v1", &[("A", "1")], None);
        assert_eq!(base, release("web:v1", &[("A", "1")], None));
        assert_ne!(base, release("web:v2", &[("A", "1")], None));
        assert_ne!(base, release("web:v1", &[("A", "2")], None));
        assert_ne!(base, release("web:v1", &[("A", "1"), ("B", "")], None));
        assert_ne!(base, release("web:v1", &[("A", "1")], Some("now")));
    }
}
