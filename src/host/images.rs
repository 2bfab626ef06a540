//! The images that this agent has pulled, in a file of its own, and room for more: once the disk is full, those are removed
//! that nothing needs. Images that others have pulled, built or loaded are never touched.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Mutex, OnceLock, PoisonError},
    time::Duration,
};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    archive::{Archives, Fetchers},
    docker::{Docker, DockerError, ImageFault},
    files,
    layout::Layout,
};
use crate::model::{
    images::{Needs, Pulled, PulledImages, Reason},
    name::{AppName, ImageDigest, ImageRef},
    problem::chain,
    status::{HostStatus, State},
    time::Timestamp,
};

/// Between two looks at the disk.
const INTERVAL: Duration = Duration::from_secs(60);
/// Between two looks at it while an image is pulled.
const LOOK: Duration = Duration::from_millis(200);
/// That an app has converged on an image is written down this often, so that a file is not written at each look.
const NOTED: Duration = Duration::from_secs(30 * 60);

/// When images are removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Above this share of the disk, in percent, images are removed.
    pub clean_above: u8,
    /// Until it is down to this.
    pub clean_to: u8,
    /// Above this share nothing is pulled: a disk that is full to the end stops everything on it.
    pub refuse_above: u8,
    /// How long an image stays at least after it was used.
    pub keep_for: Duration,
}

impl Default for Limits {
    /// As the kubelet has them: <https://kubernetes.io/docs/concepts/architecture/garbage-collection/#container-image-lifecycle>.
    fn default() -> Self {
        Self { clean_above: 85, clean_to: 80, refuse_above: 95, keep_for: Duration::from_secs(3600) }
    }
}

/// The images of this host.
pub struct Images {
    docker: Docker,
    archives: Archives,
    layout: Layout,
    limits: Limits,
    state: Mutex<Noted>,
    /// Held by the one that removes.
    removing: tokio::sync::Mutex<()>,
    /// Where Docker keeps its data, once it has said so.
    root: OnceLock<PathBuf>,
}

#[derive(Default)]
struct Noted {
    /// What the file says; `None` before it was read. An unreadable file is not an empty one.
    known: Option<PulledImages>,
    /// What the apps of this host want, by reference; `None` before the agent has read everything.
    wanted: Option<BTreeMap<AppName, Option<String>>>,
    pulling: BTreeSet<String>,
    /// What the registry called images that this run of the agent has pulled, also those whose name others gave before: by
    /// reference, with their ids.
    digests: BTreeMap<String, (String, ImageDigest)>,
}

/// One image, for people.
#[derive(Debug)]
pub struct Listed {
    /// Its reference.
    pub reference: String,
    /// What is known of it.
    pub image: Pulled,
    /// Its size with all layers, in bytes; `None` if it is not there any more.
    pub size: Option<i64>,
    /// Why it stays; `None` if it may be removed.
    pub reason: Option<Reason>,
}

/// Takes a reference out of what is being pulled, also if the pull is cancelled.
struct Pulling<'i>(&'i Images, String);

impl Drop for Pulling<'_> {
    fn drop(&mut self) {
        self.0.state().pulling.remove(&self.1);
    }
}

impl Images {
    /// Of this engine, with its file in the state directory.
    pub fn new(docker: Docker, layout: Layout, limits: Limits, fetchers: Fetchers) -> Self {
        Self {
            archives: Archives::new(docker.clone(), layout.clone(), fetchers),
            docker,
            layout,
            limits,
            state: Mutex::default(),
            removing: tokio::sync::Mutex::default(),
            root: OnceLock::new(),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, Noted> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pulls an image for an app, and notes that it was this agent. Makes room before, if the disk is nearly full. With a
    /// digest it is that image, whatever its tag means by now, and gets the tag on this host.
    ///
    /// # Errors
    /// If the pull fails, or the disk is too full for any.
    pub async fn pull(&self, app: &AppName, image: &ImageRef, digest: Option<&ImageDigest>) -> Result<(), DockerError> {
        let reference = image.tagged();
        self.state().pulling.insert(reference.clone());
        let _pulling = Pulling(self, reference.clone());
        if let Err(e) = self.make_room().await {
            tracing::debug!("images cannot be removed: {}", chain(&e));
        }
        let full = |why: &str| {
            // The words by which a full disk is known.
            let message = format!("no space left on device for it: {why}");
            DockerError::Image { image: image.to_string(), message, fault: ImageFault::Temporary }
        };
        if let Some(used) = self.used().await.filter(|used| *used > self.limits.refuse_above) {
            return Err(full(&format!(
                "the disk of Docker's images is {used} % full, more than `images.refuse_above`, and no image that demae has pulled can be removed (`demae images`)"
            )));
        }
        let before = self.docker.image(&reference).await?;
        // A name that others gave stays with their image.
        let is_free = before.as_ref().is_none_or(|id| self.has_pulled(&reference, id));
        let reference = match digest {
            Some(digest) if !is_free => image.at(digest).tagged(),
            _ => reference,
        };
        let digest = tokio::select! {
            fetched = self.fetch(app, image, digest, is_free) => fetched?,
            // The engine gives up what it has of it.
            used = self.overfull() => return Err(full(&format!(
                "when a part of it was there, the disk of Docker's images was {used} % full, more than `images.refuse_above`"
            ))),
        };
        // Another pull may have moved the tag meanwhile.
        let named = digest.as_ref().map_or_else(|| reference.clone(), |digest| image.at(digest).tagged());
        if let Some(id) = self.docker.image(&named).await? {
            let now = Timestamp::now();
            match digest.clone() {
                Some(digest) => drop(self.state().digests.insert(reference.clone(), (id.clone(), digest))),
                None => drop(self.state().digests.remove(&reference)),
            }
            self.change(|images| {
                match images.get(&reference).cloned() {
                    // The name was there, and from others.
                    None if before.is_some() => return false,
                    // The tag has moved: the image before is still here, without a name.
                    Some(old) if old.id != id && before.as_ref() == Some(&old.id) => {
                        drop(images.insert(old.id.clone(), old));
                    }
                    _ => {}
                }
                let known = images.entry(reference).or_insert_with(|| Pulled {
                    id: String::new(),
                    digest: None,
                    pulled: now,
                    apps: BTreeMap::new(),
                });
                (known.id, known.digest, known.pulled) = (id, digest, now);
                known.apps.entry(app.clone()).or_default();
                true
            });
        }
        Ok(())
    }

    /// Whether this agent has given a reference to the image with this id.
    fn has_pulled(&self, reference: &str, id: &str) -> bool {
        self.read_once();
        let state = self.state();
        let noted = state.known.as_ref().and_then(|known| known.get(reference));
        noted.is_some_and(|known| known.id == id) || state.digests.get(reference).is_some_and(|(known, _)| known == id)
    }

    /// Pulls an image, or loads it from its archive, and notes nothing. One that is pulled by its digest gets the tag as well,
    /// if `names` says so. Returns what the registry calls it.
    ///
    /// # Errors
    /// If that fails.
    pub async fn fetch(
        &self,
        app: &AppName,
        image: &ImageRef,
        digest: Option<&ImageDigest>,
        names: bool,
    ) -> Result<Option<ImageDigest>, DockerError> {
        match (image.archive(), digest) {
            (Some(archive), _) => self.archives.load(app, image, archive).await.map(|()| None),
            (None, None) => self.docker.pull(image).await,
            (None, Some(digest)) => {
                let fixed = image.at(digest);
                self.docker.pull(&fixed).await?;
                // By its name people find it, and so does an agent that cannot read which image it is.
                if names {
                    self.docker.tag(&fixed, image).await?;
                }
                Ok(Some(digest.clone()))
            }
        }
    }

    /// What the registry called an image when this agent pulled it last; `None` of others.
    pub fn digest(&self, image: &ImageRef, id: &str) -> Option<ImageDigest> {
        self.read_once();
        let reference = image.tagged();
        let state = self.state();
        let pulled = state.digests.get(&reference).filter(|(known, _)| known == id).map(|(_, digest)| digest);
        let noted = || state.known.as_ref()?.get(&reference).filter(|known| known.id == id)?.digest.as_ref();
        pulled.or_else(noted).cloned()
    }

    /// Watches what apps want, and the disk, until the end.
    pub async fn keep_room(
        &self,
        mut statuses: watch::Receiver<HostStatus>,
        mut ready: watch::Receiver<bool>,
        end: CancellationToken,
    ) {
        let work = async {
            // Before that, an app that is not in the status may be wanted all the same.
            if ready.wait_for(|ready| *ready).await.is_err() {
                return;
            }
            loop {
                self.note(&statuses.borrow_and_update());
                if let Err(e) = self.make_room().await {
                    tracing::warn!("images cannot be removed: {}", chain(&e));
                }
                let next = tokio::time::sleep(INTERVAL);
                tokio::pin!(next);
                loop {
                    tokio::select! {
                        () = &mut next => break,
                        changed = statuses.changed() => {
                            if changed.is_err() {
                                return;
                            }
                            self.note(&statuses.borrow_and_update());
                        }
                    }
                }
            }
        };
        tokio::select! {
            () = end.cancelled() => {}
            () = work => {}
        }
    }

    /// Notes what apps want, and what they have converged on.
    fn note(&self, status: &HostStatus) {
        self.state().wanted = Some(wanted(status));
        let converged: Vec<(AppName, String)> = status
            .apps
            .iter()
            .filter(|app| app.state == State::Converged)
            .filter_map(|app| Some((AppName::try_from(app.app.as_str()).ok()?, reference(app.image.as_ref()?)?)))
            .collect();
        let now = Timestamp::now();
        let is_due = |images: &PulledImages| {
            let last = |(app, reference): &(AppName, String)| images.get(reference)?.apps.get(app).copied();
            converged.iter().filter_map(last).any(|last| last.is_none_or(|last| now.since(last) >= NOTED))
        };
        if self.state().known.as_ref().is_some_and(|known| !is_due(known)) {
            return;
        }
        self.change(|images| {
            if !is_due(images) {
                return false;
            }
            for (app, reference) in converged.iter().cloned() {
                if let Some(image) = images.get_mut(&reference) {
                    image.apps.insert(app, Some(now));
                }
            }
            true
        });
    }

    /// Reads what is known, unless that was done before. That it cannot be read is said elsewhere.
    fn read_once(&self) {
        let mut state = self.state();
        if state.known.is_none() {
            state.known = read(&self.layout.images()).ok();
        }
    }

    /// Changes what is known, and writes it if that is wanted. What cannot be read is left as it is.
    fn change(&self, change: impl FnOnce(&mut PulledImages) -> bool) {
        let mut state = self.state();
        let known = match state.known.take() {
            Some(known) => Ok(known),
            None => read(&self.layout.images()),
        };
        let mut known = match known {
            Ok(known) => known,
            Err(e) => {
                tracing::warn!("{e}; images that are pulled now are never removed");
                return;
            }
        };
        if change(&mut known) {
            let text = serde_json::to_vec_pretty(&known).map_err(std::io::Error::other);
            let path = self.layout.images();
            let written = text.map_err(|e| e.to_string());
            let written = written.and_then(|text| files::write(&path, &text, 0o644).map_err(|e| chain(&e)));
            if let Err(e) = written {
                // What is only in the memory is lost with this agent, and then never removed.
                tracing::warn!("the images of this host cannot be noted: {e}");
            }
        }
        state.known = Some(known);
    }

    /// How full the disk of Docker's images is, in percent; `None` if that cannot be seen from here.
    async fn used(&self) -> Option<u8> {
        if self.root.get().is_none() {
            let root = self.docker.root_dir().await.ok()??;
            let _ = self.root.set(root);
        }
        used_of(self.root.get()?)
    }

    /// Ends once the disk is fuller than it may be, with how full it is: an image may be larger than what is left.
    async fn overfull(&self) -> u8 {
        loop {
            tokio::time::sleep(LOOK).await;
            if let Some(used) = self.used().await.filter(|used| *used > self.limits.refuse_above) {
                return used;
            }
        }
    }

    /// Removes what nothing needs if the disk is too full, until it is not.
    ///
    /// # Errors
    /// If Docker does not answer.
    async fn make_room(&self) -> Result<(), DockerError> {
        let _one = self.removing.lock().await;
        if self.used().await.is_none_or(|used| used <= self.limits.clean_above) {
            return Ok(());
        }
        self.read_once();
        let containers = self.docker.images_in_use().await?;
        for reference in self.removable(&containers) {
            if self.used().await.is_none_or(|used| used <= self.limits.clean_to) {
                break;
            }
            // A name that leads to another image now was given by others, and so was any name of one that had lost its own.
            let found = self.docker.image_and_names(&reference).await?;
            let known =
                self.state().known.as_ref().and_then(|known| known.get(&reference)).map(|image| image.id.clone());
            let is_ours =
                found.is_some_and(|(id, names)| Some(&id) == known.as_ref() && (reference != id || names.is_empty()));
            // An app may have come to want it meanwhile.
            if !self.removable(&containers).contains(&reference) {
                continue;
            }
            match if is_ours { self.docker.remove_image(&reference).await } else { Ok(()) } {
                Ok(()) => {
                    if is_ours {
                        tracing::info!(image = reference, "remove an image that nothing needs, to make room");
                    }
                    self.change(|images| images.remove(&reference).is_some());
                }
                Err(e) => tracing::debug!("{}", chain(&e)),
            }
        }
        Ok(())
    }

    fn removable(&self, containers: &BTreeSet<String>) -> Vec<String> {
        let state = self.state();
        let (Some(known), Some(wanted)) = (&state.known, &state.wanted) else { return Vec::new() };
        let needs = self.needs(containers, wanted, &state.pulling);
        needs.removable(known).into_iter().map(str::to_owned).collect()
    }

    fn needs<'n>(
        &self,
        containers: &'n BTreeSet<String>,
        wanted: &'n BTreeMap<AppName, Option<String>>,
        pulling: &'n BTreeSet<String>,
    ) -> Needs<'n> {
        Needs { containers, wanted, pulling, now: Timestamp::now(), keep_for: self.limits.keep_for }
    }

    /// What this agent has pulled, and why it stays, given the status of this host.
    ///
    /// # Errors
    /// If the file cannot be read, or Docker does not answer.
    pub async fn list(&self, status: &HostStatus) -> Result<Vec<Listed>, String> {
        let known = read(&self.layout.images())?;
        let containers = self.docker.images_in_use().await.map_err(|e| chain(&e))?;
        let (wanted, pulling) = (wanted(status), BTreeSet::new());
        let mut listed = Vec::new();
        for (reference, image) in &known {
            let size = self.docker.image_size(reference).await.map_err(|e| chain(&e))?;
            let reason = self.needs(&containers, &wanted, &pulling).reason(&known, reference);
            listed.push(Listed { reference: reference.clone(), image: image.clone(), size, reason });
        }
        listed.sort_by_key(|listed| std::cmp::Reverse(listed.image.used()));
        Ok(listed)
    }
}

fn used_of(root: &std::path::Path) -> Option<u8> {
    let (free, size) = files::space(root).ok()?;
    let used = size.saturating_sub(free).saturating_mul(100).checked_div(size)?;
    u8::try_from(used.min(100)).ok()
}

/// The reference of an image in a status, with its tag.
fn reference(image: &str) -> Option<String> {
    ImageRef::try_from(image).ok().map(|image| image.tagged())
}

/// What the apps of a host want, by reference.
fn wanted(status: &HostStatus) -> BTreeMap<AppName, Option<String>> {
    let apps = status
        .apps
        .iter()
        .filter_map(|app| Some((AppName::try_from(app.app.as_str()).ok()?, app.image.as_deref().and_then(reference))));
    apps.collect()
}

fn read(path: &std::path::Path) -> Result<PulledImages, String> {
    match files::read(path).map_err(|e| chain(&e))? {
        None => Ok(PulledImages::new()),
        Some(text) => serde_json::from_slice(&text).map_err(|e| format!("cannot read `{}`: {e}", path.display())),
    }
}
