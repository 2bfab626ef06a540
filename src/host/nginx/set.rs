//! Builds a set of nginx files: finds out which texts nginx accepts.

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
    host::{
        files::{self, FileError},
        takeover::Takeovers,
    },
    model::{
        name::{AppName, TemplateName, VirtualHost},
        problem::bounded,
        proxy::{Manifest, Rejected, Vhost},
        time::Timestamp,
    },
};

/// The shared file of a set.
pub(super) const SHARED: &str = "00-demae.conf";
/// Longest error of a refusal that is kept, in bytes.
const MAX_REASON: usize = 1000;

/// How many apps of one template are refused one by one with the same error before all other new ones of it are refused
/// too.
const MAX_PER_TEMPLATE: usize = 8;

/// The manifest file of a set.
#[derive(serde::Serialize, serde::Deserialize)]
pub(super) struct Saved {
    /// The manifest.
    #[serde(flatten)]
    pub(super) manifest: Manifest,
    /// When it was published.
    pub(super) published: Timestamp,
    /// Its files, with the digest of each.
    pub(super) files: BTreeMap<String, String>,
}

/// What nginx serves of one app: the vhost, and its rendered files by name.
#[derive(Clone, PartialEq)]
pub(super) struct Part {
    pub(super) vhost: Vhost,
    pub(super) files: BTreeMap<String, Vec<u8>>,
}

/// The parts of a set by app.
pub(super) type Parts = BTreeMap<AppName, Part>;

/// A set that nginx accepts, and the parts that it refuses.
pub(super) struct Accepted {
    pub(super) parts: Parts,
    pub(super) rejected: BTreeMap<AppName, Rejected>,
    /// The text of [`SHARED`], for this generation and for the live one.
    pub(super) shared: [String; 2],
}

/// The inputs of a new set.
pub(super) struct Set<'a> {
    /// The nginx that will load it.
    pub(super) nginx: &'a Nginx,
    /// Renders its text.
    pub(super) renderer: &'a Renderer,
    /// Its generation.
    pub(super) generation: u64,
    /// The live set.
    pub(super) old: &'a Manifest,
    /// The parts of the live set as written. nginx accepted each of them.
    pub(super) last_good: &'a Parts,
    /// The root of nginx's paths on this machine.
    pub(super) root: &'a Path,
    /// What nginx's own files contain.
    pub(super) tree: &'a Tree,
    /// Hosts of hand-written servers that apps may take.
    pub(super) takeovers: &'a Takeovers,
    /// Templates of this host that the live texts were rendered with, and that are gone.
    pub(super) lost_templates: &'a BTreeSet<String>,
}

/// Files in the trial directory, by name.
#[derive(Default)]
struct Written(BTreeMap<String, Vec<u8>>);

impl Set<'_> {
    /// The parts of the wanted vhosts that nginx accepts. Writes nothing where nginx would load it.
    ///
    /// A refused app keeps its last good text, whether its vhost changed, its template, or a file that either refers
    /// to.
    pub(super) async fn select(&self, wanted: &BTreeMap<AppName, Vhost>) -> Result<Accepted, NginxError> {
        let accepted = self.run_trial(wanted).await;
        files::remove_dir(&self.nginx.layout.nginx_trial())?;
        accepted
    }

    async fn run_trial(&self, wanted: &BTreeMap<AppName, Vhost>) -> Result<Accepted, NginxError> {
        let dir = self.nginx.layout.nginx_trial();
        files::remove_dir(&dir)?;
        files::make_dir(&dir, 0o755)?;
        let (parts, rejected, written) = (Parts::new(), BTreeMap::new(), Written::default());
        let mut trial = Trial { set: self, dir, parts, rejected, refused_by_template: BTreeMap::new(), written };
        let neighbours = Neighbours::of(wanted.values());
        for (app, vhost) in wanted {
            match self.render(app, vhost, &neighbours) {
                Ok(files) => {
                    trial.parts.insert(app.clone(), Part { vhost: vhost.clone(), files });
                }
                Err(error) => trial.refuse(app, vhost.clone(), error),
            }
        }
        trial.find_accepted().await?;
        // An earlier refusal of another vhost stays recorded, unless the basis of the texts changed.
        let same_basis = self.old.templates == self.nginx.basis(self.renderer, self.tree, self.takeovers);
        for (app, earlier) in self.old.rejected.iter().filter(|_| same_basis) {
            let is_served = trial.parts.get(app).is_some_and(|part| part.vhost == earlier.vhost);
            if !is_served {
                trial.rejected.entry(app.clone()).or_insert_with(|| earlier.clone());
            }
        }
        let shared = [self.generation, self.old.generation].map(|generation| self.shared(generation, &trial.parts));
        let [new, old] = shared;
        Ok(Accepted { shared: [new?, old?], parts: trial.parts, rejected: trial.rejected })
    }

    fn render(
        &self,
        app: &AppName,
        vhost: &Vhost,
        neighbours: &Neighbours,
    ) -> Result<BTreeMap<String, Vec<u8>>, String> {
        if let Some(lost) =
            vhost.all().map(Renderer::template_of).find(|template| self.lost_templates.contains(*template))
        {
            return Err(self.renderer.lost_error(lost));
        }
        self.renderer.app(app, vhost, neighbours, &self.nginx.layout)
    }

    fn shared(&self, generation: u64, parts: &Parts) -> Result<String, NginxError> {
        let vhosts: Vec<&Vhost> = parts.values().map(|part| &part.vhost).collect();
        let layout = &self.nginx.layout;
        self.renderer.host(generation, &vhosts, &self.tree.settings, layout).map_err(NginxError::Template)
    }

    /// The last good part of an app, unless its text is the refused one.
    fn last_good(&self, app: &AppName, refused: Option<&Part>) -> Option<Part> {
        self.last_good.get(app).filter(|last| refused.is_none_or(|refused| refused.files != last.files)).cloned()
    }

    fn is_new(&self, app: &AppName, part: &Part) -> bool {
        self.last_good.get(app).is_none_or(|last| last.files != part.files)
    }

    /// Writes a set with its manifest, durably in one pass, ready to go live.
    pub(super) fn write(
        &self,
        accepted: &Accepted,
        mut manifest: Manifest,
        old_served_since: Option<Timestamp>,
    ) -> Result<(), NginxError> {
        let dir = self.nginx.layout.nginx_generation(self.generation);
        let write = || {
            let published = Timestamp::now();
            manifest.inherit(self.old, old_served_since, published);
            let saved = Saved { manifest, published, files: accepted.digests() };
            let json = serde_json::to_vec_pretty(&saved).map_err(|e| NginxError::Template(e.to_string()))?;
            files::make_dir(&dir, 0o755)?;
            let shared = (MANIFEST, json.as_slice());
            for (name, text) in accepted.files().chain([(SHARED, accepted.shared[0].as_bytes()), shared]) {
                files::write_unsynced(&dir.join(name), text, 0o644)?;
            }
            Ok(files::sync_dir(&dir)?)
        };
        write().inspect_err(|_| {
            // Leftovers are swept with the next set; nothing leads to them.
            let _ = files::remove_dir(&dir);
        })
    }
}

impl Accepted {
    fn files(&self) -> impl Iterator<Item = (&str, &[u8])> {
        let files = self.parts.values().flat_map(|part| &part.files);
        files.map(|(name, text)| (name.as_str(), text.as_slice()))
    }

    /// Digests of the files of the set, by name.
    pub(super) fn digests(&self) -> BTreeMap<String, String> {
        let shared = (SHARED, self.shared[0].as_bytes());
        self.files().chain([shared]).map(|(name, text)| (name.to_owned(), digest_of(text))).collect()
    }

    /// Whether a set with these digests has the same text, apart from its generation.
    pub(super) fn matches_digests(&self, files: &BTreeMap<String, String>) -> bool {
        let mut digests = self.digests();
        digests.insert(SHARED.to_owned(), digest_of(self.shared[1].as_bytes()));
        digests == *files
    }

    /// The vhosts that it serves.
    pub(super) fn vhosts(&self) -> BTreeMap<AppName, Vhost> {
        self.parts.iter().map(|(app, part)| (app.clone(), part.vhost.clone())).collect()
    }
}

/// The search for the parts that nginx accepts.
struct Trial<'a, 'b> {
    set: &'a Set<'b>,
    /// Where they are tested.
    dir: PathBuf,
    parts: Parts,
    rejected: BTreeMap<AppName, Rejected>,
    /// Counts refused apps by template and error.
    refused_by_template: BTreeMap<(Option<TemplateName>, String), usize>,
    written: Written,
}

impl Trial<'_, '_> {
    /// Restores an app's last good text, or leaves the app out if it has none.
    fn refuse(&mut self, app: &AppName, vhost: Vhost, error: String) {
        tracing::debug!(app = %app, "nginx does not get this part: {error}");
        let rejected = Rejected { vhost, error: bounded(error, MAX_REASON), at: Timestamp::now() };
        self.rejected.insert(app.clone(), rejected);
        match self.set.last_good(app, self.parts.get(app)) {
            Some(last) => self.parts.insert(app.clone(), last),
            None => self.parts.remove(app),
        };
    }

    /// Tests all parts until nginx accepts the rest. `[emerg]` names the file of most errors; if it names none of
    /// demae's new ones, the culprits are found by bisection.
    async fn find_accepted(&mut self) -> Result<(), NginxError> {
        loop {
            let error = match self.test().await? {
                Ok(warnings) => {
                    if self.refuse_host_conflicts(&warnings) {
                        continue;
                    }
                    return Ok(());
                }
                Err(error) => error,
            };
            let culprit = self.blamed_app(&error);
            tracing::warn!(app = culprit.as_ref().map(AppName::as_str), "nginx refuses the new configuration: {error}");
            match culprit {
                Some(app) if self.refuse_paths_below(&app, &error).await? => {}
                Some(app) => self.refuse_with_template(&app, &error),
                None => return self.bisect(error).await,
            }
        }
    }

    fn refuse_part(&mut self, app: &AppName, error: String) {
        if let Some(part) = self.parts.get(app) {
            let vhost = part.vhost.clone();
            self.refuse(app, vhost, self.set.with_conflicting_file(error));
        }
    }

    /// Refuses new parts below the hosts of an app, if nginx accepts the app without them: the error names the app's
    /// server, but the cause may be what others have in it.
    async fn refuse_paths_below(&mut self, app: &AppName, error: &str) -> Result<bool, NginxError> {
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
            self.refuse(&other, vhost, format!("nginx refuses it together with app `{app}`: {error}"));
        }
        if !self.is_not_blamed(app).await? {
            (self.parts, self.rejected) = before;
            return Ok(false);
        }
        // Restore those that are not at fault.
        for (other, _) in below {
            let without = (self.parts.clone(), self.rejected.clone());
            self.parts.extend(before.0.get(&other).map(|part| (other.clone(), part.clone())));
            self.rejected.remove(&other);
            if !self.is_not_blamed(app).await? {
                (self.parts, self.rejected) = without;
            }
        }
        Ok(true)
    }

    /// Whether nginx accepts the parts, or names another new one than this.
    async fn is_not_blamed(&mut self, app: &AppName) -> Result<bool, NginxError> {
        let blamed = self.test().await?.err().map(|error| self.blamed_app(&error));
        Ok(blamed.is_none_or(|blamed| blamed.is_some_and(|blamed| blamed != *app)))
    }

    /// Refuses an app, and after many of the same template all its other new parts: a template error concerns all its
    /// apps, and each test of nginx takes a while.
    fn refuse_with_template(&mut self, app: &AppName, error: &str) {
        let Some(part) = self.parts.get(app) else { return };
        let template = part.vhost.template.clone();
        // An error that differs between apps, such as a missing file, says nothing about the next.
        let normalized = error.replace(&file_of(app), "");
        let refused = self.refused_by_template.entry((template.clone(), normalized)).or_default();
        *refused += 1;
        let is_last = *refused >= MAX_PER_TEMPLATE;
        self.refuse_part(app, error.to_owned());
        if !is_last {
            return;
        }
        let has_template = |part: &Part| part.vhost.all().all(|v| v.template == template);
        let same_template = self.parts.iter().filter(|(app, part)| has_template(part) && self.set.is_new(app, part));
        for app in same_template.map(|(app, _)| app.clone()).collect::<Vec<_>>() {
            self.refuse_part(
                &app,
                format!("{MAX_PER_TEMPLATE} apps of the same template are refused, so this one is not tried: {error}"),
            );
        }
    }

    /// The app whose new text nginx names in an error.
    fn blamed_app(&self, error: &str) -> Option<AppName> {
        let rest = error.split(&format!("{}/", self.dir.display())).nth(1)?;
        let file = rest.split(':').next()?;
        let (app, part) = self.parts.iter().find(|(_, part)| part.files.contains_key(file))?;
        self.set.is_new(app, part).then(|| app.clone())
    }

    /// Bisects: starts with the accepted parts, and adds the new ones by halves.
    async fn bisect(&mut self, error: String) -> Result<(), NginxError> {
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
        // Refused without any new part.
        if let Err(error) = self.test().await? {
            return Err(NginxError::Broken(error));
        }
        let mut groups = vec![new];
        while let Some(group) = groups.pop() {
            let before = self.parts.clone();
            let add = |app: &AppName| wanted.get(app).map(|part| (app.clone(), part.clone()));
            self.parts.extend(group.iter().filter_map(add));
            let Err(error) = self.test().await? else { continue };
            let culprit = self.blamed_app(&error).filter(|app| group.contains(app));
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
        match self.test().await? {
            Ok(warnings) if self.refuse_host_conflicts(&warnings) => match self.test().await? {
                Ok(_) => Ok(()),
                Err(error) => Err(NginxError::Broken(error)),
            },
            Ok(_) => Ok(()),
            Err(error) => Err(NginxError::Broken(error)),
        }
    }

    /// Refuses apps with a virtual host of a hand-written server. nginx only warns, and the first server in its files
    /// gets all requests. An app that is served already stays, and is reported. True if the parts changed and need
    /// another test.
    fn refuse_host_conflicts(&mut self, warnings: &[String]) -> bool {
        let mut changed = false;
        for name in warnings.iter().filter_map(|line| conflicting_name(line)) {
            // `.a.test` stands for `a.test` and `*.a.test`.
            let matches = |host: &str| match name.strip_prefix('.') {
                Some(rest) => host.strip_prefix("*.").unwrap_or(host) == rest,
                None => host == name,
            };
            let has = |v: &Vhost| v.hosts.iter().any(|host| matches(host.as_str()));
            let holds = |part: &Part| part.vhost.all().any(has);
            let has_server = |part: &Part| part.vhost.all().any(|v| v.path.is_none() && has(v));
            let mut servers = self.parts.iter().filter(|(_, part)| has_server(part));
            let holder = match (servers.next(), servers.next()) {
                // With two of demae's own, neither is hand-written.
                (Some(_), Some(_)) => continue,
                (Some(one), None) => Some(one),
                (None, _) => self.parts.iter().find(|(_, part)| holds(part)),
            };
            let Some((app, part)) = holder else { continue };
            let (app, vhost) = (app.clone(), part.vhost.clone());
            let is_taken_over = self.set.takeovers.hosts(&app).any(|host| matches(host.as_str()));
            let is_first = self.set.tree.earlier_names.contains(name);
            if is_taken_over && !is_first {
                continue;
            }
            let place = match self.set.tree.server_names.get(name) {
                Some(file) => format!("a hand-written server in `{}`", file.display()),
                None => "a hand-written server of this nginx".to_owned(),
            };
            let remedy = if is_taken_over {
                "nginx reads it before demae's files, and gives the host to the first: include demae's files before it"
            } else {
                "take it out of that file, or out of the spec (`demae takeover` moves its requests to the app)"
            };
            let error = format!("virtual host `{name}` belongs to {place}; {remedy}");
            let is_new = self.set.is_new(&app, part);
            let served_already = self.set.last_good.get(&app).is_some_and(holds);
            if !is_new || served_already {
                let error = bounded(error, MAX_REASON);
                self.rejected.insert(app, Rejected { vhost, error, at: Timestamp::now() });
            } else {
                self.refuse(&app, vhost, error);
                changed = true;
            }
        }
        changed
    }

    /// Tests the parts within nginx's own tree: returns its warnings, or its error. Includes from the live set are
    /// replaced by those of the trial directory.
    async fn test(&mut self) -> Result<Result<Vec<String>, String>, NginxError> {
        let shared = self.set.shared(self.set.generation, &self.parts)?;
        let (live, here) = (self.set.nginx.layout.nginx_live(), &self.dir);
        let (live, here) = (format!("{}/", live.display()), format!("{}/", here.display()));
        let moved = |text: &[u8]| replaced(text, live.as_bytes(), here.as_bytes());
        let files = self.parts.values().flat_map(|part| &part.files).map(|(name, text)| (name.clone(), moved(text)));
        let files = files.chain([(SHARED.to_owned(), moved(shared.as_bytes()))]).collect();
        self.written.sync_to(&self.dir, files)?;
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
    /// Updates the directory to these files. Only differences are written, and nothing is synced: a refused set need
    /// not survive a crash.
    fn sync_to(&mut self, dir: &Path, files: BTreeMap<String, Vec<u8>>) -> Result<(), FileError> {
        for name in self.0.keys().filter(|name| !files.contains_key(*name)) {
            files::remove_file(&dir.join(name))?;
        }
        for (name, text) in &files {
            if self.0.get(name) != Some(text) {
                files::write_unsynced(&dir.join(name), text, 0o644)?;
            }
        }
        self.0 = files;
        Ok(())
    }
}

impl Set<'_> {
    /// Adds which file of the host sets a conflicting directive, if one does.
    fn with_conflicting_file(&self, error: String) -> String {
        let setting = self.tree.settings.iter().find(|(name, _)| error.contains(name.as_str()));
        match setting {
            Some((name, (file, value))) => {
                format!("{error} (`{}` sets `{name} {value}`: raise it there)", file.display())
            }
            None => error,
        }
    }
}

/// The parts of a live set, from its files on disk. A part with a modified file is left out.
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

/// Reads what demae needs to know of nginx's own files.
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
