//! Publishes a set of virtual hosts: written beside the live one, made live by one rename, loaded and proven.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    time::{Duration, Instant},
};

use super::{
    MANIFEST, Nginx, NginxError, PROOF_TIMEOUT, Renderer, server,
    set::{self, Parts, Saved, Set},
};
use crate::{
    failpoint,
    host::{
        files::{self, FileError},
        takeover::Takeovers,
    },
    model::{
        name::AppName,
        proxy::{Manifest, Vhost},
    },
};

/// Poll interval while waiting for nginx.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// What a publication did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// The new set.
    pub generation: u64,
    /// Whether nginx had to load it.
    pub reloaded: bool,
    /// What nginx refused.
    pub rejected: BTreeMap<AppName, String>,
}

impl Nginx {
    /// Publishes a set of vhosts, as far as nginx accepts it, and proves it. A refused vhost is left out, or keeps its
    /// last good text; all others go on.
    ///
    /// # Errors
    /// If nothing could be published, or no worker answers with it.
    pub async fn publish(&self, wanted: &BTreeMap<AppName, Vhost>) -> Result<Published, NginxError> {
        let mut cached = self.renderer.lock().await;
        self.load_renderer(&mut cached).await?;
        let Some((_, renderer)) = cached.as_ref() else { return Err(NginxError::Template("no templates".into())) };
        let live = self.live_set()?;
        let unchanged = live.as_ref().is_some_and(|(_, drifted)| !drifted);
        let saved = live.map(|(saved, _)| saved);
        let old = saved.as_ref().map(|saved| saved.manifest.clone()).unwrap_or_default();
        let last_good = match &saved {
            Some(saved) => set::parts_of(&self.layout.nginx_live(), saved)?,
            None => Parts::new(),
        };
        let served = self.serving().await.ok();
        // Never reuse a number: workers of another set would answer with it.
        let used = self.generations()?.into_iter().chain(served).max().unwrap_or(0);
        let generation = old.generation.max(used) + 1;
        let published = saved.as_ref().map(|saved| self.clock.to_monotonic(saved.published)).unwrap_or_default();
        let is_served = served == Some(old.generation);
        let old_served_since = is_served.then(|| self.clock.wall(self.workers_since(published)));
        let root = self.server.root().await?;
        let tree = set::survey(self, &root)?;
        let takeovers = Takeovers::read(&self.layout)?;
        let lost: BTreeSet<String> = old.own_templates.difference(renderer.present()).cloned().collect();
        let set = Set {
            nginx: self,
            renderer,
            generation,
            old: &old,
            last_good: &last_good,
            root: &root,
            tree: &tree,
            takeovers: &takeovers,
            lost_templates: &lost,
        };
        let selected = set.select(wanted).await?;
        let refusals: BTreeMap<AppName, String> =
            selected.rejected.iter().map(|(app, r)| (app.clone(), r.error.clone())).collect();
        let vhosts = selected.vhosts();
        // A lost template is recorded for as long as an app is served with it.
        let in_use = |name: &String| vhosts.values().flat_map(Vhost::all).any(|v| Renderer::template_of(v) == name);
        let lost = lost.iter().filter(|name| in_use(name)).cloned();
        let manifest = Manifest {
            generation,
            rejected: selected.rejected.clone(),
            templates: self.basis(renderer, &tree, &takeovers),
            own_templates: renderer.own().iter().cloned().chain(lost).collect(),
            vhosts,
            ..Manifest::default()
        };
        if let Some(saved) = saved
            && unchanged
            && selected.matches_digests(&saved.files)
            && manifest.vhosts == old.vhosts
        {
            // Only the refusals or the basis changed: nothing for nginx to load.
            let Manifest { rejected, templates, own_templates, .. } = manifest;
            let manifest = Manifest { rejected, templates, own_templates, ..saved.manifest.clone() };
            self.rewrite_manifest(&Saved { manifest, ..saved })?;
            return Ok(Published { generation: old.generation, reloaded: false, rejected: refusals });
        }
        set.write(&selected, manifest, old_served_since)?;
        files::symlink(&PathBuf::from(format!("{generation}.set")), &self.layout.nginx_live())?;
        self.sweep(generation);
        self.reload_and_prove(generation).await?;
        Ok(Published { generation, reloaded: true, rejected: refusals })
    }

    /// Reloads nginx with the live set, and proves it.
    ///
    /// # Errors
    /// If nginx does not run, or no worker answers with the live set.
    pub async fn reload(&self) -> Result<u64, NginxError> {
        let Some(saved) = self.read_manifest()? else {
            return Err(NginxError::NotRunning("there is no live configuration".into()));
        };
        let generation = saved.manifest.generation;
        let root = self.server.root().await?;
        self.test(&root, &self.layout.nginx_generation(generation)).await?.map_err(NginxError::Broken)?;
        self.reload_and_prove(generation).await?;
        Ok(generation)
    }

    async fn reload_and_prove(&self, generation: u64) -> Result<(), NginxError> {
        let master = self.master().await?;
        let before = server::workers(master)?;
        self.server.reload(master).await?;
        failpoint::boundary("reloaded");
        self.prove(generation).await?;
        // Old workers accept connections for another 100 ms. After this wait every request reaches new ones.
        let until = Instant::now() + PROOF_TIMEOUT;
        while Instant::now() < until && server::workers(master)?.iter().any(|pid| before.contains(pid)) {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        Ok(())
    }

    /// Old workers accept connections for a moment after a reload: a response of an old one proves nothing, one of a
    /// new one is proof.
    async fn prove(&self, generation: u64) -> Result<(), NginxError> {
        let until = Instant::now() + PROOF_TIMEOUT;
        loop {
            let last = match self.serving().await {
                Ok(found) if found == generation => return Ok(()),
                Ok(found) => format!("it answers with generation {found}"),
                Err(e) => e,
            };
            if Instant::now() >= until {
                return Err(NginxError::NotProven { generation, last });
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// Rewrites the manifest of the live set. Its other files stay as they are.
    fn rewrite_manifest(&self, saved: &Saved) -> Result<(), NginxError> {
        let json = serde_json::to_vec_pretty(saved).map_err(|e| NginxError::Template(e.to_string()))?;
        Ok(files::write(&self.layout.nginx_live().join(MANIFEST), &json, 0o644)?)
    }

    /// The generations of all sets on disk.
    fn generations(&self) -> Result<Vec<u64>, FileError> {
        let names = files::list(&self.layout.nginx())?;
        Ok(names.iter().filter_map(|name| name.strip_suffix(".set")?.parse().ok()).collect())
    }

    /// Removes all sets except the live and the previous one.
    fn sweep(&self, generation: u64) {
        // What is left behind is swept the next time.
        for name in files::list(&self.layout.nginx()).into_iter().flatten() {
            let number = name.strip_suffix(".set").and_then(|n| n.parse::<u64>().ok());
            if number.is_some_and(|n| n + 1 < generation || n > generation)
                && let Err(e) = files::remove_dir(&self.layout.nginx().join(&name))
            {
                tracing::warn!("{e}");
            }
        }
    }
}
