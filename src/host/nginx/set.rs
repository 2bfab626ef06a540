//! A set of nginx files in the making: which texts nginx takes, and how that is found out.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use super::{
    MANIFEST, Nginx, NginxError,
    render::{Neighbours, Renderer, file_of},
    stage::{self, Tree},
};
use crate::{
    host::files::{self, FileError},
    model::{
        name::{AppName, TemplateName, VirtualHost},
        problem::bounded,
        proxy::{Manifest, Rejected, Vhost},
        time::Timestamp,
    },
};

/// The file of a set that all apps share.
pub(super) const SHARED: &str = "00-demae.conf";
/// Most bytes of a refusal that are kept and shown.
const MOST_REASON: usize = 1000;

/// How many apps of one template are refused one by one, with one error, before what else is new of it is refused too.
const MOST_OF_TEMPLATE: usize = 8;

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

/// What nginx serves of one app: the value, and the files that were made of it, by name.
#[derive(Clone, PartialEq)]
pub(super) struct Part {
    pub(super) vhost: Vhost,
    pub(super) files: BTreeMap<String, Vec<u8>>,
}

/// The parts of a set by app.
pub(super) type Parts = BTreeMap<AppName, Part>;

/// A set that nginx takes, and the parts that it does not take.
pub(super) struct Chosen {
    pub(super) parts: Parts,
    pub(super) rejected: BTreeMap<AppName, Rejected>,
    /// The text of [`SHARED`], for this generation and for the live one.
    pub(super) shared: [String; 2],
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
    /// The texts of the live one, as they were written. Each was taken by nginx once.
    pub(super) last_good: &'a Parts,
    /// Where nginx's paths begin on this machine.
    pub(super) root: &'a Path,
    /// nginx's own files.
    pub(super) tree: &'a Tree,
    /// Templates of this host that the live texts were made with, and that are gone.
    pub(super) lost: &'a BTreeSet<String>,
}

/// Files in a directory that is not live: what was written to each.
#[derive(Default)]
struct Written(BTreeMap<String, Vec<u8>>);

impl Set<'_> {
    /// What nginx takes of the wanted vhosts. Nothing of it is written where nginx would load it.
    ///
    /// An app that is refused keeps its last good text, whatever changed: its value, its template, or what either
    /// refers to.
    pub(super) async fn choose(&self, wanted: &BTreeMap<AppName, Vhost>) -> Result<Chosen, NginxError> {
        let chosen = self.try_all(wanted).await;
        files::remove_dir(&self.nginx.layout.nginx_trial())?;
        chosen
    }

    async fn try_all(&self, wanted: &BTreeMap<AppName, Vhost>) -> Result<Chosen, NginxError> {
        let dir = self.nginx.layout.nginx_trial();
        files::remove_dir(&dir)?;
        files::make_dir(&dir, 0o755)?;
        let (parts, rejected, written) = (Parts::new(), BTreeMap::new(), Written::default());
        let mut trial = Trial { set: self, dir, parts, rejected, of_template: BTreeMap::new(), written };
        let around = Neighbours::of(wanted.values());
        for (app, vhost) in wanted {
            match self.render(app, vhost, &around) {
                Ok(files) => {
                    trial.parts.insert(app.clone(), Part { vhost: vhost.clone(), files });
                }
                Err(error) => trial.refuse(app, vhost.clone(), error),
            }
        }
        trial.settle().await?;
        // What was refused in another form stays refused in that form, unless the texts are made in another way now.
        let same_basis = self.old.templates == self.nginx.basis(self.renderer, self.tree);
        for (app, earlier) in self.old.rejected.iter().filter(|_| same_basis) {
            let is_served = trial.parts.get(app).is_some_and(|part| part.vhost == earlier.vhost);
            if !is_served {
                trial.rejected.entry(app.clone()).or_insert_with(|| earlier.clone());
            }
        }
        let shared = [self.generation, self.old.generation].map(|generation| self.shared(generation, &trial.parts));
        let [new, old] = shared;
        Ok(Chosen { shared: [new?, old?], parts: trial.parts, rejected: trial.rejected })
    }

    fn render(&self, app: &AppName, vhost: &Vhost, around: &Neighbours) -> Result<BTreeMap<String, Vec<u8>>, String> {
        if let Some(lost) = vhost.all().map(Renderer::template_of).find(|template| self.lost.contains(*template)) {
            return Err(self.renderer.lost(lost));
        }
        self.renderer.app(app, vhost, around, &self.nginx.layout)
    }

    fn shared(&self, generation: u64, parts: &Parts) -> Result<String, NginxError> {
        let vhosts: Vec<&Vhost> = parts.values().map(|part| &part.vhost).collect();
        let layout = &self.nginx.layout;
        self.renderer.host(generation, &vhosts, &self.tree.settings, layout).map_err(NginxError::Template)
    }

    /// The last good text of an app, unless it is the one that was refused.
    fn last_good(&self, app: &AppName, refused: Option<&Part>) -> Option<Part> {
        self.last_good.get(app).filter(|last| refused.is_none_or(|refused| refused.files != last.files)).cloned()
    }

    fn is_new(&self, app: &AppName, part: &Part) -> bool {
        self.last_good.get(app).is_none_or(|last| last.files != part.files)
    }

    /// Writes a set, with its manifest, so that it can be made live: durably, in one pass.
    pub(super) fn write(
        &self,
        chosen: &Chosen,
        mut manifest: Manifest,
        old_served_since: Option<Timestamp>,
    ) -> Result<(), NginxError> {
        let dir = self.nginx.layout.nginx_generation(self.generation);
        let write = || {
            let published = Timestamp::now();
            manifest.follow(self.old, old_served_since, published);
            let saved = Saved { manifest, published, files: chosen.digests() };
            let json = serde_json::to_vec_pretty(&saved).map_err(|e| NginxError::Template(e.to_string()))?;
            files::make_dir(&dir, 0o755)?;
            let shared = (MANIFEST, json.as_slice());
            for (name, text) in chosen.files().chain([(SHARED, chosen.shared[0].as_bytes()), shared]) {
                files::write_quickly(&dir.join(name), text, 0o644)?;
            }
            Ok(files::sync_dir(&dir)?)
        };
        write().inspect_err(|_| {
            // What is left of it is swept with the next set; nothing leads to it.
            let _ = files::remove_dir(&dir);
        })
    }
}

impl Chosen {
    fn files(&self) -> impl Iterator<Item = (&str, &[u8])> {
        let files = self.parts.values().flat_map(|part| &part.files);
        files.map(|(name, text)| (name.as_str(), text.as_slice()))
    }

    /// What the files of the set hold, by name.
    pub(super) fn digests(&self) -> BTreeMap<String, String> {
        let shared = (SHARED, self.shared[0].as_bytes());
        self.files().chain([shared]).map(|(name, text)| (name.to_owned(), digest_of(text))).collect()
    }

    /// Whether a set with these files holds the same text, but for its generation.
    pub(super) fn is_as_in(&self, files: &BTreeMap<String, String>) -> bool {
        let mut digests = self.digests();
        digests.insert(SHARED.to_owned(), digest_of(self.shared[1].as_bytes()));
        digests == *files
    }

    /// What is served by it.
    pub(super) fn vhosts(&self) -> BTreeMap<AppName, Vhost> {
        self.parts.iter().map(|(app, part)| (app.clone(), part.vhost.clone())).collect()
    }
}

/// The search for the parts that nginx takes.
struct Trial<'a, 'b> {
    set: &'a Set<'b>,
    /// Where it is tested.
    dir: PathBuf,
    parts: Parts,
    rejected: BTreeMap<AppName, Rejected>,
    /// How many apps of each template are refused with the same error.
    of_template: BTreeMap<(Option<TemplateName>, String), usize>,
    written: Written,
}

impl Trial<'_, '_> {
    /// Puts an app back to its last good text, or leaves it out if it has none.
    fn refuse(&mut self, app: &AppName, vhost: Vhost, error: String) {
        tracing::debug!(app = %app, "nginx does not get this part: {error}");
        let rejected = Rejected { vhost, error: bounded(error, MOST_REASON), at: Timestamp::now() };
        self.rejected.insert(app.clone(), rejected);
        match self.set.last_good(app, self.parts.get(app)) {
            Some(last) => self.parts.insert(app.clone(), last),
            None => self.parts.remove(app),
        };
    }

    /// Offers all parts to nginx until it takes what is left. `[emerg]` names the file of most mistakes; where it names
    /// none of ours, the culprits are searched for by halves.
    async fn settle(&mut self) -> Result<(), NginxError> {
        loop {
            let error = match self.offer().await? {
                Ok(warnings) => {
                    if self.refuse_taken(&warnings) {
                        continue;
                    }
                    return Ok(());
                }
                Err(error) => error,
            };
            let culprit = self.named(&error);
            tracing::warn!(app = culprit.as_ref().map(AppName::as_str), "nginx refuses the new configuration: {error}");
            match culprit {
                Some(app) if self.goes_without_paths(&app, &error).await? => {}
                Some(app) => self.refuse_with_likes(&app, &error),
                None => return self.search(error).await,
            }
        }
    }

    fn refuse_part(&mut self, app: &AppName, error: String) {
        if let Some(part) = self.parts.get(app) {
            let vhost = part.vhost.clone();
            self.refuse(app, vhost, self.set.explained(error));
        }
    }

    /// Refuses what is new below the hosts of an app, if nginx takes the app without it: it is named for the servers, and
    /// what others have in them must not cost it anything.
    async fn goes_without_paths(&mut self, app: &AppName, error: &str) -> Result<bool, NginxError> {
        let Some(part) = self.parts.get(app) else { return Ok(false) };
        let hosts: BTreeSet<&VirtualHost> = part.vhost.all().flat_map(|v| &v.hosts).collect();
        let is_below = |v: &Vhost| v.path.is_some() && v.hosts.iter().any(|host| hosts.contains(host));
        let others = self.parts.iter().filter(|(other, part)| *other != app && self.set.is_new(other, part));
        let below = others.filter(|(_, part)| part.vhost.all().any(is_below));
        let below: Vec<(AppName, Vhost)> = below.map(|(app, part)| (app.clone(), part.vhost.clone())).collect();
        if below.is_empty() {
            return Ok(false);
        }
        let before = (self.parts.clone(), self.rejected.clone());
        for (other, vhost) in below.clone() {
            self.refuse(&other, vhost, format!("it does not go with what app `{app}` has there: {error}"));
        }
        if !self.goes_with(app).await? {
            (self.parts, self.rejected) = before;
            return Ok(false);
        }
        // Not all of them need be at fault.
        for (other, _) in below {
            let without = (self.parts.clone(), self.rejected.clone());
            self.parts.extend(before.0.get(&other).map(|part| (other.clone(), part.clone())));
            self.rejected.remove(&other);
            if !self.goes_with(app).await? {
                (self.parts, self.rejected) = without;
            }
        }
        Ok(true)
    }

    /// Whether nginx takes the parts as they are, or names another new one than this.
    async fn goes_with(&mut self, app: &AppName) -> Result<bool, NginxError> {
        let goes = self.offer().await?.err().map(|error| self.named(&error));
        Ok(goes.is_none_or(|named| named.is_some_and(|named| named != *app)))
    }

    /// Refuses an app, and with the last of many also what else is new of their template: a mistake in a template is one
    /// of all its apps, and nginx takes a while to read their files for each.
    fn refuse_with_likes(&mut self, app: &AppName, error: &str) {
        let Some(part) = self.parts.get(app) else { return };
        let template = part.vhost.template.clone();
        // An error that is another one for each app, as for a file that some lack, says nothing of the next.
        let alike = error.replace(&file_of(app), "");
        let refused = self.of_template.entry((template.clone(), alike)).or_default();
        *refused += 1;
        let is_last = *refused >= MOST_OF_TEMPLATE;
        self.refuse_part(app, error.to_owned());
        if !is_last {
            return;
        }
        let is_like = |part: &Part| part.vhost.all().all(|v| v.template == template);
        let likes = self.parts.iter().filter(|(app, part)| is_like(part) && self.set.is_new(app, part));
        for app in likes.map(|(app, _)| app.clone()).collect::<Vec<_>>() {
            self.refuse_part(
                &app,
                format!("{MOST_OF_TEMPLATE} apps of the same template are refused, so this one is not tried: {error}"),
            );
        }
    }

    /// The app whose new text nginx names as the place of an error.
    fn named(&self, error: &str) -> Option<AppName> {
        let rest = error.split(&format!("{}/", self.dir.display())).nth(1)?;
        let file = rest.split(':').next()?;
        let (app, part) = self.parts.iter().find(|(_, part)| part.files.contains_key(file))?;
        self.set.is_new(app, part).then(|| app.clone())
    }

    /// Begins with what was taken before, and adds what is new by halves.
    async fn search(&mut self, error: String) -> Result<(), NginxError> {
        let wanted = self.parts.clone();
        let new: Vec<AppName> =
            wanted.iter().filter(|(app, part)| self.set.is_new(app, part)).map(|(app, _)| app.clone()).collect();
        for app in &new {
            match self.set.last_good(app, wanted.get(app)) {
                Some(last) => self.parts.insert(app.clone(), last),
                None => self.parts.remove(app),
            };
        }
        if new.is_empty() {
            return Err(NginxError::Broken(error));
        }
        // It is not for anything new that it is refused.
        if let Err(error) = self.offer().await? {
            return Err(NginxError::Broken(error));
        }
        let mut groups = vec![new];
        while let Some(group) = groups.pop() {
            let before = self.parts.clone();
            let add = |app: &AppName| wanted.get(app).map(|part| (app.clone(), part.clone()));
            self.parts.extend(group.iter().filter_map(add));
            let Err(error) = self.offer().await? else { continue };
            let culprit = self.named(&error).filter(|app| group.contains(app));
            match (culprit, group.as_slice()) {
                (Some(app), _) => {
                    self.refuse_part(&app, error);
                    let rest: Vec<AppName> = group.into_iter().filter(|other| *other != app).collect();
                    let kept = self.parts.get(&app).cloned();
                    self.parts = before;
                    self.parts.extend(kept.map(|part| (app, part)));
                    if !rest.is_empty() {
                        groups.push(rest);
                    }
                }
                (None, [app]) => {
                    let app = app.clone();
                    self.refuse_part(&app, error);
                }
                (None, group) => {
                    let (left, right) = group.split_at(group.len() / 2);
                    groups.extend([right.to_vec(), left.to_vec()]);
                    self.parts = before;
                }
            }
        }
        match self.offer().await? {
            Ok(warnings) if self.refuse_taken(&warnings) => match self.offer().await? {
                Ok(_) => Ok(()),
                Err(error) => Err(NginxError::Broken(error)),
            },
            Ok(_) => Ok(()),
            Err(error) => Err(NginxError::Broken(error)),
        }
    }

    /// Refuses apps that name a virtual host of a hand-written server. nginx only warns of it, and the first of the two in
    /// its files gets all requests. One that is served already stays, and is reported. True if anything else is to be
    /// offered now.
    fn refuse_taken(&mut self, warnings: &[String]) -> bool {
        let mut changed = false;
        for name in warnings.iter().filter_map(|line| conflicting_name(line)) {
            // `.a.test` stands for `a.test` and `*.a.test`.
            let is_it = |host: &str| match name.strip_prefix('.') {
                Some(rest) => host.strip_prefix("*.").unwrap_or(host) == rest,
                None => host == name,
            };
            let has = |v: &Vhost| v.hosts.iter().any(|host| is_it(host.as_str()));
            let holds = |part: &Part| part.vhost.all().any(has);
            let has_server = |part: &Part| part.vhost.all().any(|v| v.path.is_none() && has(v));
            let mut servers = self.parts.iter().filter(|(_, part)| has_server(part));
            let holder = match (servers.next(), servers.next()) {
                // Of two of our own neither is a hand-written one.
                (Some(_), Some(_)) => continue,
                (Some(one), None) => Some(one),
                (None, _) => self.parts.iter().find(|(_, part)| holds(part)),
            };
            let Some((app, part)) = holder else { continue };
            let (app, vhost) = (app.clone(), part.vhost.clone());
            let place = match self.set.tree.server_names.get(name) {
                Some(file) => format!("a hand-written server in `{}`", file.display()),
                None => "a hand-written server of this nginx".to_owned(),
            };
            let error =
                format!("virtual host `{name}` belongs to {place}; take it out of that file, or out of the spec");
            let is_new = self.set.is_new(&app, part);
            let served_already = self.set.last_good.get(&app).is_some_and(holds);
            if !is_new || served_already {
                let error = bounded(error, MOST_REASON);
                self.rejected.insert(app, Rejected { vhost, error, at: Timestamp::now() });
            } else {
                self.refuse(&app, vhost, error);
                changed = true;
            }
        }
        changed
    }

    /// Has nginx test the parts, as part of its own tree: its warnings, or why it refuses them. What would be included from
    /// the live set is included from the one under test.
    async fn offer(&mut self) -> Result<Result<Vec<String>, String>, NginxError> {
        let shared = self.set.shared(self.set.generation, &self.parts)?;
        let (live, here) = (self.set.nginx.layout.nginx_live(), &self.dir);
        let (live, here) = (format!("{}/", live.display()), format!("{}/", here.display()));
        let moved = |text: &[u8]| replaced(text, live.as_bytes(), here.as_bytes());
        let files = self.parts.values().flat_map(|part| &part.files).map(|(name, text)| (name.clone(), moved(text)));
        let files = files.chain([(SHARED.to_owned(), moved(shared.as_bytes()))]).collect();
        self.written.become_(&self.dir, files)?;
        self.set.nginx.test(self.set.root, &self.dir).await
    }
}

fn replaced(text: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.windows(from.len()).position(|window| window == from) {
        out.extend_from_slice(&rest[..at]);
        out.extend_from_slice(to);
        rest = &rest[at + from.len()..];
    }
    out.extend_from_slice(rest);
    out
}

impl Written {
    /// Brings the directory to these files. Only what differs is written, and nothing is synced: a set that is not taken
    /// need not outlive a crash.
    fn become_(&mut self, dir: &Path, files: BTreeMap<String, Vec<u8>>) -> Result<(), FileError> {
        for name in self.0.keys().filter(|name| !files.contains_key(*name)) {
            files::remove_file(&dir.join(name))?;
        }
        for (name, text) in &files {
            if self.0.get(name) != Some(text) {
                files::write_quickly(&dir.join(name), text, 0o644)?;
            }
        }
        self.0 = files;
        Ok(())
    }
}

impl Set<'_> {
    /// Adds which file of the host stands in the way, where that is known.
    fn explained(&self, error: String) -> String {
        let setting = self.tree.settings.iter().find(|(name, _)| error.contains(name.as_str()));
        match setting {
            Some((name, (file, value))) => {
                format!("{error} (`{}` sets `{name} {value}`: raise it there)", file.display())
            }
            None => error,
        }
    }
}

/// The parts of a live set, by the files that lie on disk. One that somebody changed is not among them.
pub(super) fn parts_of(dir: &Path, saved: &Saved) -> Result<Parts, FileError> {
    let mut parts = Parts::new();
    for (app, vhost) in &saved.manifest.vhosts {
        let own = |name: &&String| **name == file_of(app) || name.ends_with(&format!("@{app}.loc"));
        let mut files = BTreeMap::new();
        for name in saved.files.keys().filter(own) {
            let text = files::read(&dir.join(name))?;
            let is_whole = |text: &Vec<u8>| saved.files.get(name) == Some(&digest_of(text));
            files.extend(text.filter(is_whole).map(|text| (name.clone(), text)));
        }
        if files.len() == saved.files.keys().filter(own).count() && files.contains_key(&file_of(app)) {
            parts.insert(app.clone(), Part { vhost: vhost.clone(), files });
        }
    }
    Ok(parts)
}

/// Reads nginx's own files, and what demae needs to know of them.
pub(super) fn survey(nginx: &Nginx, root: &Path) -> Result<Tree, NginxError> {
    Ok(stage::survey(root, &nginx.config.conf, &nginx.layout.nginx_live())?.1)
}

/// `conflicting server name "a.test" on 0.0.0.0:80, ignored`, `ngx_http_add_server_names` in src/http/ngx_http.c.
fn conflicting_name(line: &str) -> Option<&str> {
    line.split("conflicting server name \"").nth(1)?.split('"').next()
}

pub(super) fn digest_of(text: &[u8]) -> String {
    use sha2::{Digest as _, Sha256};
    crate::model::text::hex(&Sha256::digest(text)[..8])
}
