//! Parses root's file of rules, and keeps the line of each.

use std::collections::BTreeMap;

use glob::Pattern;
use serde::Deserialize;
use toml::Spanned;

use super::{At, MountRule, Patterns, Policy, Rules, Volumes, capability};
use crate::model::{name::AppName, text};

/// Why a file of rules cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PolicyError(String);

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    mounts: MountsFile,
    images: ImagesFile,
    containers: ContainersFile,
    ingress: IngressFile,
    apps: BTreeMap<String, AppFile>,
}

/// Rules of one app.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct AppFile {
    mounts: MountsFile,
    images: ImagesFile,
    containers: ContainersFile,
    ingress: IngressFile,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct MountsFile {
    allow: Option<Spanned<Vec<MountFile>>>,
    volumes: Option<Spanned<VolumesFile>>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum VolumesFile {
    None,
    Own,
    Any,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct MountFile {
    path: String,
    mode: ModeFile,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ModeFile {
    Ro,
    Rw,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ImagesFile {
    registries: Option<Spanned<Vec<String>>>,
    archives: Option<Spanned<Vec<String>>>,
    require_digest: Option<Spanned<bool>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ContainersFile {
    users: Option<Spanned<Vec<String>>>,
    cap_add: Option<Spanned<Vec<String>>>,
    cap_drop: Option<Spanned<Vec<String>>>,
    no_new_privileges: Option<Spanned<bool>>,
    read_only: Option<Spanned<bool>>,
    devices: Option<Spanned<Vec<String>>>,
    sysctls: Option<Spanned<Vec<String>>>,
    networks: Option<Spanned<Vec<String>>>,
    log_drivers: Option<Spanned<Vec<String>>>,
    max_memory: Option<Spanned<String>>,
    max_cpus: Option<Spanned<f64>>,
    max_pids: Option<Spanned<i64>>,
    env_deny: Option<Spanned<Vec<String>>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct IngressFile {
    hosts: Option<Spanned<Vec<String>>>,
}

pub(super) fn policy(host: &str, name: &str, text: &str) -> Result<Policy, PolicyError> {
    let file: File = toml::from_str(text).map_err(|e| PolicyError(e.to_string().trim_end().to_owned()))?;
    let reader = Reader { name, text };
    let general = reader.rules(file.mounts, file.images, file.containers, file.ingress)?;
    let mut apps = BTreeMap::new();
    for (app, part) in file.apps {
        let name = AppName::try_from(app).map_err(|e| PolicyError(format!("{name}: `apps`: {e}")))?;
        apps.insert(name, reader.rules(part.mounts, part.images, part.containers, part.ingress)?);
    }
    Ok(Policy { general, apps, ..Policy::built_in(host, name) })
}

struct Reader<'a> {
    name: &'a str,
    text: &'a str,
}

impl Reader<'_> {
    fn rules(
        &self,
        mounts: MountsFile,
        images: ImagesFile,
        containers: ContainersFile,
        ingress: IngressFile,
    ) -> Result<Rules, PolicyError> {
        let upper = |caps: Vec<String>| Ok::<_, String>(caps.iter().map(|cap| capability(cap)).collect());
        let same = |value: Vec<String>| Ok::<_, String>(value);
        Ok(Rules {
            mounts: self.at("mounts.allow", mounts.allow, |all| all.into_iter().map(mount).collect())?,
            volumes: self.at("mounts.volumes", mounts.volumes, |volumes| {
                Ok(match volumes {
                    VolumesFile::None => Volumes::None,
                    VolumesFile::Own => Volumes::Own,
                    VolumesFile::Any => Volumes::Any,
                })
            })?,
            registries: self.at("images.registries", images.registries, |texts| places(texts, ""))?,
            archives: self.at("images.archives", images.archives, |texts| places(texts, "://"))?,
            require_digest: self.at("images.require_digest", images.require_digest, Ok)?,
            users: self.at("containers.users", containers.users, |all| all.iter().map(|t| range(t)).collect())?,
            cap_add: self.at("containers.cap_add", containers.cap_add, upper)?,
            cap_drop: self.at("containers.cap_drop", containers.cap_drop, upper)?,
            no_new_privileges: self.at("containers.no_new_privileges", containers.no_new_privileges, Ok)?,
            read_only: self.at("containers.read_only", containers.read_only, Ok)?,
            devices: self.at("containers.devices", containers.devices, patterns)?,
            sysctls: self.at("containers.sysctls", containers.sysctls, patterns)?,
            networks: self.at("containers.networks", containers.networks, patterns)?,
            log_drivers: self.at("containers.log_drivers", containers.log_drivers, same)?,
            memory: self.at("containers.max_memory", containers.max_memory, |text| bytes(&text))?,
            nano_cpus: self.at("containers.max_cpus", containers.max_cpus, cores)?,
            pids: self.at("containers.max_pids", containers.max_pids, |n| match n {
                1.. => Ok(n),
                _ => Err(format!("{n} processes are none")),
            })?,
            env_deny: self.at("containers.env_deny", containers.env_deny, patterns)?,
            hosts: self.at("ingress.hosts", ingress.hosts, patterns)?,
        })
    }

    fn at<F, T>(
        &self,
        key: &str,
        found: Option<Spanned<F>>,
        read: impl FnOnce(F) -> Result<T, String>,
    ) -> Result<Option<At<T>>, PolicyError> {
        let Some(found) = found else { return Ok(None) };
        let line = self.text[..found.span().start.min(self.text.len())].matches('\n').count() + 1;
        match read(found.into_inner()) {
            Ok(value) => Ok(Some(At { value, line })),
            Err(e) => Err(PolicyError(format!("{}:{line}: `{key}`: {e}", self.name))),
        }
    }
}

#[expect(clippy::needless_pass_by_value, reason = "it is one of several readers of values")]
fn patterns(texts: Vec<String>) -> Result<Patterns, String> {
    texts.iter().map(|text| Pattern::new(text).map_err(|e| format!("`{text}` is not a pattern: {e}"))).collect()
}

/// Patterns of places, each with a server at the front: after `before`, if that is there.
fn places(texts: Vec<String>, before: &str) -> Result<Patterns, String> {
    for text in &texts {
        let rest = text.split_once(before).map_or("", |(_, rest)| if before.is_empty() { text.as_str() } else { rest });
        let (server, path) = rest.split_once('/').unwrap_or((rest, ""));
        // It would also match another server, and then the path there.
        if server.contains(['*', '?', '[']) && !(server == "*" && path.is_empty()) {
            return Err(format!("`{text}`: a `*` matches slashes, so it cannot stand in the name of a server"));
        }
    }
    patterns(texts)
}

fn mount(file: MountFile) -> Result<MountRule, String> {
    let MountFile { path, mode } = file;
    let is_plain = path.starts_with('/')
        && (path.len() == 1 || !path.ends_with('/'))
        && path[1..].split('/').all(|part| !matches!(part, "." | "..") && (!part.is_empty() || path.len() == 1));
    // What looks like a pattern and is none would allow less than it says.
    if !is_plain || path.replace("{app}", "").contains(['*', '?', '[', '{', '}']) {
        return Err(format!(
            "`{path}` is not a plain absolute path; `{{app}}` may stand in it for the name of the app"
        ));
    }
    Ok(MountRule { path, read_only: mode == ModeFile::Ro })
}

fn range(text: &str) -> Result<(u32, u32), String> {
    let (from, to) = text.split_once('-').unwrap_or((text, text));
    match (from.trim().parse(), to.trim().parse()) {
        (Ok(from), Ok(to)) if from <= to => Ok((from, to)),
        _ => Err(format!("`{text}` is not a number of a user, nor a range such as `1000-59999`")),
    }
}

fn bytes(text: &str) -> Result<i64, String> {
    text::size(text).and_then(|bytes| i64::try_from(bytes).map_err(|_| "this is too much".to_owned()))
}

fn cores(number: f64) -> Result<i64, String> {
    #[expect(clippy::cast_possible_truncation, reason = "checked to be in range by the guard")]
    match number {
        n if (0.01..=1024.0).contains(&n) => Ok((n * 1e9).round() as i64),
        n => Err(format!("`{n}` is not a number of cores such as `1.5`")),
    }
}
