//! A set of nginx files in the making: which vhosts nginx takes, and how that is found out.

use std::{collections::BTreeMap, path::Path};

use super::{MANIFEST, Nginx, NginxError, render::Renderer, stage};
use crate::{
    host::files::{self, FileError},
    model::{
        name::AppName,
        proxy::{Manifest, Rejected, Vhost},
        time::Timestamp,
    },
};

/// What lies in the directory of a set.
#[derive(serde::Serialize, serde::Deserialize)]
pub(super) struct Saved {
    /// What it is.
    #[serde(flatten)]
    pub(super) manifest: Manifest,
    /// When it was made.
    pub(super) published: Timestamp,
    /// Its files, and what was written to each.
    pub(super) files: BTreeMap<String, String>,
}

/// A set in the making.
pub(super) struct Set<'a> {
    /// For whom.
    pub(super) nginx: &'a Nginx,
    /// Makes its text.
    pub(super) renderer: &'a Renderer,
    /// Its number.
    pub(super) generation: u64,
    /// The live one.
    pub(super) old: &'a Manifest,
    /// Since when workers serve that, if they do.
    pub(super) old_served_since: Option<Timestamp>,
}

impl Set<'_> {
    /// Writes what nginx takes of the wanted vhosts, or leaves nothing: each attempt would leave a set, for as long as somebody
    /// else's file is broken.
    pub(super) async fn make(&self, wanted: &BTreeMap<AppName, Vhost>, root: &Path) -> Result<Manifest, NginxError> {
        let chosen = self.choose(wanted, root).await;
        if chosen.is_err() {
            files::remove_dir(&self.nginx.layout.nginx_generation(self.generation))?;
        }
        chosen
    }

    /// All at once if nginx takes all, else one after the other.
    async fn choose(&self, wanted: &BTreeMap<AppName, Vhost>, root: &Path) -> Result<Manifest, NginxError> {
        let mut rejected = BTreeMap::new();
        let mut texts = BTreeMap::new();
        let mut rendered = BTreeMap::new();
        for (app, vhost) in wanted {
            match self.renderer.app(app, vhost, &self.nginx.layout) {
                Ok(text) => {
                    texts.insert(app.clone(), text);
                    rendered.insert(app.clone(), vhost.clone());
                }
                Err(error) => self.refuse(app, vhost, error, &mut rendered, &mut texts, &mut rejected),
            }
        }
        // What was refused and is still wanted in another form stays refused in the old one.
        let manifest = |vhosts: BTreeMap<AppName, Vhost>, rejected: BTreeMap<AppName, Rejected>| Manifest {
            generation: self.generation,
            vhosts,
            rejected,
            templates: self.renderer.fingerprint().to_owned(),
            ..Manifest::default()
        };
        let earlier =
            self.old.rejected.clone().into_iter().filter(|_| self.old.templates == self.renderer.fingerprint());
        let kept: BTreeMap<AppName, Rejected> = earlier.chain(rejected.clone()).collect();
        let all = manifest(rendered.clone(), kept.clone());
        let Err(error) = self.try_set(&all, &texts, root).await? else { return Ok(all) };
        tracing::warn!("nginx refuses the new configuration; looking for the app that is the cause: {error}");

        let same = |app: &AppName, vhost: &Vhost| self.old.vhosts.get(app) == Some(vhost);
        let mut good: BTreeMap<AppName, Vhost> =
            rendered.iter().filter(|(a, v)| same(a, v)).map(|(a, v)| (a.clone(), v.clone())).collect();
        if let Err(error) = self.try_set(&manifest(good.clone(), kept.clone()), &texts, root).await? {
            // With new templates even what was fine may be refused; else it is not ours to mend.
            if self.old.templates == self.renderer.fingerprint() || good.is_empty() {
                return Err(NginxError::Broken(error));
            }
            good.clear();
        }
        let mut rejected = kept;
        for (app, vhost) in &rendered {
            if good.contains_key(app) {
                continue;
            }
            good.insert(app.clone(), vhost.clone());
            if let Err(error) = self.try_set(&manifest(good.clone(), rejected.clone()), &texts, root).await? {
                good.remove(app);
                self.refuse(app, vhost, error, &mut good, &mut texts, &mut rejected);
            }
        }
        let chosen = manifest(good, rejected);
        match self.try_set(&chosen, &texts, root).await? {
            Ok(()) => Ok(chosen),
            Err(error) => Err(NginxError::Broken(error)),
        }
    }

    /// Puts an app back to its last good vhost, if it has one.
    fn refuse(
        &self,
        app: &AppName,
        vhost: &Vhost,
        error: String,
        vhosts: &mut BTreeMap<AppName, Vhost>,
        texts: &mut BTreeMap<AppName, String>,
        rejected: &mut BTreeMap<AppName, Rejected>,
    ) {
        rejected.insert(app.clone(), Rejected { vhost: vhost.clone(), error, at: Timestamp::now() });
        texts.remove(app);
        if let Some(last) = self.old.vhosts.get(app).filter(|last| *last != vhost)
            && let Ok(text) = self.renderer.app(app, last, &self.nginx.layout)
        {
            vhosts.insert(app.clone(), last.clone());
            texts.insert(app.clone(), text);
        }
    }

    async fn try_set(
        &self,
        manifest: &Manifest,
        texts: &BTreeMap<AppName, String>,
        root: &Path,
    ) -> Result<Result<(), String>, NginxError> {
        let dir = self.nginx.layout.nginx_generation(self.generation);
        files::remove_dir(&dir)?;
        files::make_dir(&dir, 0o755)?;
        let survey = stage::survey(root, &self.nginx.config.conf, &self.nginx.layout.nginx_live())?.1;
        let host =
            self.renderer.host(self.generation, &manifest.vhosts, &survey.directives).map_err(NginxError::Template)?;
        let mut digests = BTreeMap::new();
        let mut put = |name: String, text: &str| -> Result<(), FileError> {
            files::write(&dir.join(&name), text.as_bytes(), 0o644)?;
            digests.insert(name, digest_of(text.as_bytes()));
            Ok(())
        };
        put("00-demae.conf".to_owned(), &host)?;
        for app in manifest.vhosts.keys() {
            if let Some(text) = texts.get(app) {
                put(format!("app-{app}.conf"), text)?;
            }
        }
        let (mut manifest, published) = (manifest.clone(), Timestamp::now());
        manifest.follow(self.old, self.old_served_since, published);
        let saved = Saved { manifest, published, files: digests };
        let json = serde_json::to_vec_pretty(&saved).map_err(|e| NginxError::Template(e.to_string()))?;
        files::write(&dir.join(MANIFEST), &json, 0o644)?;
        self.nginx.test(root, &dir).await
    }
}

pub(super) fn digest_of(text: &[u8]) -> String {
    use sha2::{Digest as _, Sha256};
    crate::model::text::hex(&Sha256::digest(text)[..8])
}
