//! A release: all inputs of a container, and the id derived from them.

use std::collections::BTreeMap;

use hmac::{Hmac, Mac};
use serde::Serialize;
use sha2::Sha256;

use super::{
    env::Secret,
    name::{EnvName, ImageRef, ReleaseId},
    spec::{ContainerSpec, Endpoint, HealthCheck},
    text::json,
};

/// The key of the HMAC behind release ids. Ids are visible and environments hold guessable secrets, so a plain hash
/// would allow a dictionary attack.
#[derive(Clone, PartialEq, Eq)]
pub struct ReleaseKey(Vec<u8>);

impl ReleaseKey {
    /// Wraps a key from the store.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Self {
        Self(bytes.into())
    }

    /// Its bytes. Store them as safely as the store does.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl ReleaseKey {
    /// Eight hexadecimal digits that tell values of a variable apart, and say nothing about them without the key.
    pub fn digest(&self, name: &EnvName, value: &str) -> String {
        // Names have no NUL. HMAC takes keys of any length, so this cannot fail.
        let text = format!("variable\0{name}\0{value}");
        let tag = Hmac::<Sha256>::new_from_slice(&self.0).map(|mac| mac.chain_update(text).finalize().into_bytes());
        tag.iter().flat_map(|t| t.iter()).take(4).map(|b| format!("{b:02x}")).collect()
    }
}

impl std::fmt::Debug for ReleaseKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ReleaseKey(***)")
    }
}

/// All inputs of a container.
#[derive(Debug, Clone, PartialEq)]
pub struct Release {
    /// The identity: equal ids, equal containers.
    pub id: ReleaseId,
    /// The image, as requested.
    pub image: ImageRef,
    /// Mounts, limits and the rest.
    pub container: ContainerSpec,
    /// The whole environment, without the variables that demae injects.
    pub env: BTreeMap<EnvName, Secret>,
    /// When an instance counts as healthy.
    pub health: HealthCheck,
    /// Where the app listens.
    pub endpoint: Option<Endpoint>,
    /// Further endpoints.
    pub more_endpoints: Vec<Endpoint>,
}

/// The input of the id's hash. A golden test pins its format: a change here would replace every container of every
/// user.
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
    /// Creates a release and its id: the first 48 bits of HMAC-SHA-256 over the canonical JSON of all parts.
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

    /// The same, for an app with several endpoints.
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
        let text = json(&identity);
        // HMAC takes keys of any length, so this cannot fail; an empty tag would be refused as an id below.
        let tag = Hmac::<Sha256>::new_from_slice(&key.0).map(|mac| mac.chain_update(text).finalize().into_bytes());
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
    fn release_id_is_stable_across_versions() {
        assert_eq!(release("web:v1", &[("A", "1")], None).as_str(), "9dbb613e4a1a");
    }

    #[test]
    fn release_id_covers_all_container_inputs() {
        let base = release("web:v1", &[("A", "1")], None);
        assert_eq!(base, release("web:v1", &[("A", "1")], None));
        assert_ne!(base, release("web:v2", &[("A", "1")], None));
        assert_ne!(base, release("web:v1", &[("A", "2")], None));
        assert_ne!(base, release("web:v1", &[("A", "1"), ("B", "")], None));
        assert_ne!(base, release("web:v1", &[("A", "1")], Some("now")));
    }
}
