//! Observes nginx: which set is live on disk, which one its workers serve, and how many older ones there are.

use std::time::Duration;

use super::{
    MANIFEST, Nginx, NginxError,
    render::PROBE_HOST,
    server,
    set::{self, Saved, digest_of},
};
use crate::{
    host::{
        files::{self, FileError},
        probe,
        takeover::Takeovers,
    },
    model::{
        problem::chain,
        proxy::{Manifest, ObservedProxy},
        time::Timestamp,
    },
};

impl Nginx {
    /// What nginx serves, and what is live on disk.
    pub async fn observe(&self) -> ObservedProxy {
        let (live, published, drifted) = match self.live_set() {
            Ok(Some((saved, drifted))) => {
                (Some(self.with_monotonic_times(saved.manifest)), self.clock.to_monotonic(saved.published), drifted)
            }
            Ok(None) => (None, Timestamp::default(), false),
            Err(e) => {
                return ObservedProxy { error: Some(chain(&e)), unreadable: true, ..ObservedProxy::default() };
            }
        };
        let serving = self.serving().await;
        let (templates, trouble) = match self.read_basis().await {
            Ok(basis) => (basis, None),
            // The basis of the texts is unknown now, so the live set stays.
            Err(e) => (live.as_ref().map(|m| m.templates.clone()).unwrap_or_default(), Some(e.to_string())),
        };
        ObservedProxy {
            live,
            published,
            serving: serving.as_ref().ok().copied(),
            error: trouble.or(serving.err()),
            drifted,
            unreadable: false,
            templates,
            old_workers: self.old_workers().await.ok(),
            workers_since: self.workers_since(published),
            changing: false,
        }
    }

    /// The current basis of all texts, apart from the apps.
    async fn read_basis(&self) -> Result<String, NginxError> {
        let root = self.server.root().await?;
        let tree = set::survey(self, &root)?;
        let takeovers = Takeovers::read(&self.layout)?;
        self.with_renderer(|renderer| self.basis(renderer, &tree, &takeovers)).await
    }

    /// A manifest with its times on the monotonic clock.
    fn with_monotonic_times(&self, mut manifest: Manifest) -> Manifest {
        let changed = manifest.changed.values_mut();
        let refused = manifest.rejected.values_mut().map(|r| &mut r.at);
        changed.chain(refused).for_each(|at| *at = self.clock.to_monotonic(*at));
        manifest
    }

    /// Counts workers that serve, or may serve, an older set than the live one.
    ///
    /// # Errors
    /// If nginx does not run.
    pub async fn old_workers(&self) -> Result<usize, NginxError> {
        let published = self.read_manifest()?.map(|saved| saved.published).unwrap_or_default();
        let age = self.clock.now().since(self.clock.to_monotonic(published));
        Ok(server::old_workers(self.master().await?, age)?)
    }

    /// Since when workers serve the set published at that time, if they do: the start of the oldest such worker, or of
    /// the oldest of all; now if there is none.
    pub(super) fn workers_since(&self, published: Timestamp) -> Timestamp {
        let now = self.clock.now();
        let oldest = |master| server::oldest_worker(master, now.since(published));
        let age = self.known_master().and_then(oldest).unwrap_or_default();
        Timestamp::from_millis(now.as_millis() - i64::try_from(age.as_millis()).unwrap_or(0))
    }

    /// The generation that a worker answers with.
    pub(super) async fn serving(&self) -> Result<u64, String> {
        let answer = probe::get_tcp(&self.config.address, PROBE_HOST, "/", Duration::from_secs(2)).await;
        let answer = answer.map_err(|e| format!("nginx at {}: {e}", self.config.address))?;
        let number = answer.body.strip_prefix("generation ").and_then(|n| n.trim().parse().ok());
        number.ok_or_else(|| format!("nginx at {} does not serve demae's files", self.config.address))
    }

    /// The manifest of the live set.
    pub(super) fn read_manifest(&self) -> Result<Option<Saved>, FileError> {
        let path = self.layout.nginx_live().join(MANIFEST);
        let Some(text) = files::read(&path)? else { return Ok(None) };
        serde_json::from_slice(&text).map(Some).map_err(|e| FileError::not_ours(&path, e.into()))
    }

    /// The manifest of the live set, and whether its files drifted.
    pub(super) fn live_set(&self) -> Result<Option<(Saved, bool)>, FileError> {
        let live = self.layout.nginx_live();
        let Some(saved) = self.read_manifest()? else { return Ok(None) };
        let mut drifted = false;
        for (file, digest) in &saved.files {
            drifted |= files::read(&live.join(file))?.map(|t| digest_of(&t)).as_ref() != Some(digest);
        }
        let expected = saved.files.keys().cloned().chain([MANIFEST.to_owned()]).count();
        drifted |= files::list(&live)?.len() != expected;
        Ok(Some((saved, drifted)))
    }
}
