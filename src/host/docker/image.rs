//! Images: inspects and pulls them.

use std::{
    collections::{BTreeSet, HashMap},
    time::{Duration, Instant},
};

use bollard::{
    auth::DockerCredentials,
    errors::Error,
    models::ImageInspect,
    query_parameters::{
        CreateImageOptionsBuilder, ImportImageOptionsBuilder, ListContainersOptionsBuilder, RemoveImageOptions,
        TagImageOptionsBuilder,
    },
};
use futures_util::{StreamExt as _, stream};
use hyper::body::Bytes;
use tokio::sync::mpsc;

use super::{Docker, DockerError, Failure, ImageFault, Operation, Result, one_line};
use crate::{
    host::registry::{Login, registry_of},
    model::{
        name::{ImageDigest, ImageRef},
        problem::chain,
    },
};

/// Idle timeout of a pull: a registry that hangs in the middle of a layer stays silent for ever.
const IDLE_TIMEOUT: Duration = Duration::from_secs(120);
/// Total timeout of a pull.
const TOTAL_TIMEOUT: Duration = Duration::from_secs(30 * 60);

impl Docker {
    /// The local id of an image, if it is present.
    ///
    /// # Errors
    /// If the engine does not answer.
    pub async fn image(&self, reference: &str) -> Result<Option<String>> {
        Ok(self.inspect_image(reference).await?.and_then(|image| image.id))
    }

    /// The user that an image sets, empty for root; `None` if the image is not present.
    ///
    /// # Errors
    /// If the engine does not answer.
    pub async fn image_user(&self, reference: &str) -> Result<Option<String>> {
        let found = self.inspect_image(reference).await?;
        Ok(found.map(|image| image.config.and_then(|c| c.user).unwrap_or_default()))
    }

    /// What the engine says of a container, and of its image: as `docker inspect` prints them.
    ///
    /// # Errors
    /// If there is no such container, or the engine does not answer.
    pub async fn inspect_with_image(&self, container: &str) -> Result<(serde_json::Value, serde_json::Value)> {
        let found = self.call(Operation::Inspect, |client| client.inspect_container(container, None)).await?;
        let image = match &found.image {
            Some(id) => self.inspect_image(id).await?,
            None => None,
        };
        let json = |value: Result<serde_json::Value, serde_json::Error>| value.expect("the engine's answers are JSON");
        Ok((json(serde_json::to_value(found)), json(serde_json::to_value(image))))
    }

    /// The labels that an image gives to its containers; `None` if it is not present.
    pub(super) async fn image_labels(&self, reference: &str) -> Result<Option<HashMap<String, String>>> {
        let found = self.inspect_image(reference).await?;
        Ok(found.map(|image| image.config.and_then(|c| c.labels).unwrap_or_default()))
    }

    async fn inspect_image(&self, reference: &str) -> Result<Option<ImageInspect>> {
        match self.call(Operation::InspectImage, |client| client.inspect_image(reference)).await {
            // 400: not a valid reference to Docker; the pull reports why.
            Err(e) if e.is_status(404) || e.is_status(400) => Ok(None),
            found => found.map(Some),
        }
    }

    /// Ids of the images of all containers of the engine, also of others.
    ///
    /// # Errors
    /// If the engine does not answer.
    pub async fn images_in_use(&self) -> Result<BTreeSet<String>> {
        let options = ListContainersOptionsBuilder::default().all(true).build();
        let all = self.call(Operation::List, |client| client.list_containers(Some(options.clone()))).await?;
        Ok(all.into_iter().filter_map(|container| container.image_id).collect())
    }

    /// The id of an image, and its names; `None` if it is not present.
    ///
    /// # Errors
    /// If the engine does not answer.
    pub async fn image_and_names(&self, reference: &str) -> Result<Option<(String, Vec<String>)>> {
        let found = self.inspect_image(reference).await?;
        Ok(found.and_then(|image| Some((image.id?, image.repo_tags.unwrap_or_default()))))
    }

    /// The size of an image with all its layers, in bytes; `None` if it is not present.
    ///
    /// # Errors
    /// If the engine does not answer.
    pub async fn image_size(&self, reference: &str) -> Result<Option<i64>> {
        Ok(self.inspect_image(reference).await?.and_then(|image| image.size))
    }

    /// Removes one name of an image, and its layers if no other name is left. The engine refuses it while a container has
    /// the image. No effect if it is gone.
    ///
    /// # Errors
    /// If the engine refuses, or does not answer.
    pub async fn remove_image(&self, reference: &str) -> Result<()> {
        let none = None::<RemoveImageOptions>;
        match self.call(Operation::RemoveImage, |client| client.remove_image(reference, none.clone(), None)).await {
            Err(e) if e.is_status(404) => Ok(()),
            Ok(_) => {
                self.meter.removed_image();
                Ok(())
            }
            Err(e) => Err(e),
        }
    }

    /// Pulls an image, with the login of this host at its registry. A token of a helper that the registry refuses is asked
    /// for once more. Returns what the registry calls it, if the engine says so.
    ///
    /// # Errors
    /// If the pull fails; the error says whether a retry can help.
    pub async fn pull(&self, image: &ImageRef) -> Result<Option<ImageDigest>> {
        match self.pull_once(image).await {
            Err(e) if e.is_denied() && self.logins.forget(registry_of(image.as_str())) => self.pull_once(image).await,
            ended => ended,
        }
    }

    /// Gives an image that is here the name and the tag of another reference.
    ///
    /// # Errors
    /// If the engine cannot.
    pub async fn tag(&self, image: &ImageRef, name: &ImageRef) -> Result<()> {
        let tagged = name.tagged();
        let (repository, tag) = tagged.rsplit_once(':').unwrap_or((&tagged, "latest"));
        let options = TagImageOptionsBuilder::default().repo(repository).tag(tag).build();
        self.call(Operation::Pull, |client| client.tag_image(image.as_str(), Some(options))).await
    }

    /// Loads a file of the form of `docker save`, whose pieces come from `pieces`.
    ///
    /// # Errors
    /// If the engine refuses it, or does not answer.
    pub async fn load(&self, image: &ImageRef, mut pieces: mpsc::Receiver<Bytes>) -> Result<()> {
        let body = stream::poll_fn(move |context| pieces.poll_recv(context).map(|piece| piece.map(Ok)));
        let options = ImportImageOptionsBuilder::default().quiet(true).build();
        let began = Instant::now();
        let mut progress = self.client(Operation::Pull)?.import_image(options, bollard::body_try_stream(body), None);
        let failed = |message: String, fault: ImageFault| {
            let message = format!("the engine does not load it: {}", one_line(&message));
            DockerError::Image { image: image.to_string(), fault, message }
        };
        let loading = async {
            while let Some(next) = progress.next().await {
                match next {
                    Ok(info) => {
                        if let Some(message) = info.error_detail.and_then(|e| e.message) {
                            return Err(failed(message, ImageFault::Person));
                        }
                    }
                    Err(Error::DockerStreamError { error }) => return Err(failed(error, ImageFault::Person)),
                    Err(Error::DockerResponseServerError { message, .. }) => {
                        return Err(failed(message, ImageFault::Person));
                    }
                    Err(e) => return Err(failed(super::one_line_chain(&e), ImageFault::Temporary)),
                }
            }
            Ok(())
        };
        let late = |_| {
            Err(failed(format!("not complete after {} minutes", TOTAL_TIMEOUT.as_secs() / 60), ImageFault::Temporary))
        };
        let ended = tokio::time::timeout(TOTAL_TIMEOUT, loading).await.unwrap_or_else(late);
        let failure = ended.is_err().then_some(Failure::Refused);
        self.meter.called(Operation::Pull, began.elapsed(), failure);
        ended
    }

    async fn pull_once(&self, image: &ImageRef) -> Result<Option<ImageDigest>> {
        let registry = registry_of(image.as_str());
        let login = self.logins.at(registry).await.map_err(|e| {
            // A person mends it, or the network comes back: it is asked again.
            let message = format!("there is no login at {registry}: {}", chain(&e));
            DockerError::Image { image: image.to_string(), fault: ImageFault::Temporary, message }
        })?;
        let options = CreateImageOptionsBuilder::default().from_image(&image.tagged()).build();
        let login = login.map(|login| credentials(login, registry));
        let mut progress = self.client(Operation::Pull)?.create_image(Some(options), None, login);
        let failed = |message: String| {
            let message = one_line(&message);
            DockerError::Image { image: image.to_string(), fault: fault(&message), message }
        };
        // Bytes downloaded, by layer: Docker reports the progress of each.
        let mut layers: HashMap<String, u64> = HashMap::new();
        let mut digest = None;
        let began = Instant::now();
        let pulling = async {
            loop {
                match tokio::time::timeout(IDLE_TIMEOUT, progress.next()).await {
                    Err(_) => {
                        return Err(failed(format!("no data from the registry for {} s", IDLE_TIMEOUT.as_secs())));
                    }
                    Ok(None) => return Ok(digest),
                    Ok(Some(Ok(info))) => {
                        if let Some(message) = info.error_detail.and_then(|e| e.message) {
                            return Err(failed(message));
                        }
                        let named = info.status.as_deref().and_then(|status| status.strip_prefix("Digest: "));
                        digest = named.and_then(|text| ImageDigest::try_from(text.trim()).ok()).or(digest);
                        if info.status.as_deref() == Some("Downloading")
                            && let (Some(layer), Some(bytes)) = (info.id, info.progress_detail.and_then(|p| p.current))
                        {
                            let known = layers.entry(layer).or_default();
                            *known = (*known).max(u64::try_from(bytes).unwrap_or(0));
                        }
                    }
                    Ok(Some(Err(Error::DockerResponseServerError { message, .. }))) => return Err(failed(message)),
                    Ok(Some(Err(e))) => return Err(failed(super::one_line_chain(&e))),
                }
            }
        };
        let (ended, failure) = match tokio::time::timeout(TOTAL_TIMEOUT, pulling).await {
            Ok(ended) => {
                let failure = ended.is_err().then_some(Failure::Refused);
                (ended, failure)
            }
            Err(_) => {
                let timed_out = failed(format!("not complete after {} minutes", TOTAL_TIMEOUT.as_secs() / 60));
                (Err(timed_out), Some(Failure::Timeout))
            }
        };
        self.meter.called(Operation::Pull, began.elapsed(), failure);
        if ended.is_ok() {
            self.meter.pulled(layers.values().sum(), began.elapsed());
        }
        ended
    }
}

/// Docker answers 500 to every registry failure; only the message says what helps. Unknown messages count as temporary.
fn fault(message: &str) -> ImageFault {
    let message = message.to_lowercase();
    // Whole forms: of what the engine itself does not find it says `not found`, too.
    let of_reference = message.contains("manifest for") || message.contains("failed to resolve reference");
    let absent = [
        "manifest unknown",
        "no matching manifest",
        "no match for platform",
        "name unknown",
        "repository name not known",
    ];
    let is_absent = absent.iter().any(|words| message.contains(words)) || of_reference && message.contains("not found");
    // Where tokens come from may be broken, too.
    let is_of_token =
        ["failed to authorize", "unexpected status", "anonymous token"].iter().any(|w| message.contains(w));
    // Some say of what may not be read that it may not exist.
    if is_refused_login(&message) || message.contains("invalid reference") {
        ImageFault::Person
    } else if is_absent && !is_of_token {
        ImageFault::Absent
    } else {
        ImageFault::Temporary
    }
}

/// Whether a registry refused the login, by the engine's message.
pub(super) fn is_refused_login(message: &str) -> bool {
    let message = message.to_lowercase();
    // Some say no more than that; the engine's own files have permissions.
    let is_denied = message.ends_with("denied") && !message.ends_with("permission denied");
    is_denied || REFUSALS.iter().any(|words| message.contains(words))
}

/// What registries say to a login that does not suffice, or to none.
const REFUSALS: [&str; 7] = [
    "unauthorized",
    "authentication required",
    "access denied",
    "access to the resource is denied",
    "forbidden",
    "no basic auth credentials",
    "authorization token has expired",
];

/// What the engine passes on to the registry.
fn credentials(login: Login, registry: &str) -> DockerCredentials {
    let serveraddress = Some(registry.to_owned());
    match login {
        Login::Password { username, password } => DockerCredentials {
            username: Some(username),
            password: Some(password),
            serveraddress,
            ..DockerCredentials::default()
        },
        Login::Token(token) => {
            DockerCredentials { identitytoken: Some(token), serveraddress, ..DockerCredentials::default() }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_helps_against_an_error_of_a_registry_is_read_from_its_message() {
        for (message, expected) in [
            ("manifest for web:v9 not found: manifest unknown", ImageFault::Absent),
            ("no matching manifest for linux/amd64 in the manifest list entries", ImageFault::Absent),
            (
                "failed to resolve reference \"localhost:5000/web:v9\": localhost:5000/web:v9: not found",
                ImageFault::Absent,
            ),
            (
                "failed to prepare extraction snapshot \"x\": parent snapshot sha256:0 does not exist: not found",
                ImageFault::Temporary,
            ),
            ("lease \"x\": not found", ImageFault::Temporary),
            (
                "failed to resolve reference \"a.test/web:v1\": failed to authorize: failed to fetch anonymous token: unexpected status: 404 Not Found",
                ImageFault::Temporary,
            ),
            ("error parsing HTTP 404 response body: 404 page not found", ImageFault::Temporary),
            ("pull access denied for web, repository does not exist or may require 'docker login'", ImageFault::Person),
            ("denied", ImageFault::Person),
            ("mkdir /var/lib/docker/tmp: permission denied", ImageFault::Temporary),
            (
                "Get \"http://localhost:5000/v2/\": dial tcp 127.0.0.1:5000: connect: connection refused",
                ImageFault::Temporary,
            ),
            ("toomanyrequests: You have reached your pull rate limit", ImageFault::Temporary),
        ] {
            assert_eq!(fault(message), expected, "{message}");
        }
    }
}
