//! Apps: what is left of those that are not wanted, and what those that are wanted may trip over.

use std::{collections::BTreeSet, fs, os::unix::fs::MetadataExt as _};

use super::{Findings, Patient};
use crate::model::{
    desired::{DesiredApp, Snapshot},
    name::AppName,
    problem::chain,
    spec::VolumeSource,
};

pub(super) async fn leftovers(patient: &Patient<'_>, snapshot: Option<&Snapshot>, found: &mut Findings) {
    let world = patient.world;
    let mut here: BTreeSet<AppName> = match world.apps_on_disk() {
        Ok(apps) => apps,
        Err(e) => return found.warn("leftovers", chain(&e), "run this as the agent's user"),
    };
    // Docker was asked above, and whether it answers told.
    here.extend(world.docker.list(None).await.unwrap_or_default().into_iter().map(|c| c.app));
    let Some(snapshot) = snapshot else { return };
    let wanted = |app: &AppName| snapshot.apps.get(app).is_some_and(|d| !matches!(d, DesiredApp::Absent(_)));
    let left: Vec<&str> = here.iter().filter(|app| !wanted(app)).map(AppName::as_str).collect();
    if left.is_empty() {
        found.ok("leftovers", "nothing is left of apps that are not wanted here");
    } else {
        let remedy = "a running agent takes it away, containers and files; `demae plan` shows how";
        found.warn("leftovers", format!("of apps that are not wanted here: {}", left.join(", ")), remedy);
    }
}

/// Whether the user of each container may write to what is mounted from the host.
pub(super) fn mounts(snapshot: &Snapshot, found: &mut Findings) {
    let before = found.0.len();
    let mut looked_at = 0;
    for (app, desired) in &snapshot.apps {
        let DesiredApp::Run(target) = desired else { continue };
        let container = &target.release.container;
        for volume in &container.volumes {
            let VolumeSource::Host(path) = &volume.source else { continue };
            looked_at += 1;
            let meta = match fs::metadata(path) {
                Ok(meta) => meta,
                Err(e) => {
                    let remedy = format!("make it, for the app's user: Docker refuses to start `{app}` without it");
                    found.fail("mounts", format!("app `{app}` mounts `{path}`: {e}"), remedy);
                    continue;
                }
            };
            // A name is only known inside the image; without `user` the image decides, and most mean root.
            let Some((user, group)) = container.user.as_deref().and_then(ids) else { continue };
            let mode = meta.mode();
            let may = user == 0
                || (meta.uid() == user && mode & 0o200 != 0)
                || (Some(meta.gid()) == group && mode & 0o020 != 0)
                || mode & 0o002 != 0;
            if !may && !volume.read_only {
                let group = group.map_or(String::new(), |g| format!(":{g}"));
                found.warn(
                    "mounts",
                    format!("app `{app}` runs as user {user}{group}, and may not write to `{path}` (owner {}:{}, mode {:04o})", meta.uid(), meta.gid(), mode & 0o7777),
                    format!("`chown {user}{group} {path}`, or mount it with `:ro`"),
                );
            }
        }
    }
    if looked_at > 0 && found.0.len() == before {
        found.ok("mounts", format!("{looked_at} directories of the host fit the users of their apps"));
    }
}

/// `1000` or `1000:1000`; nothing for names.
fn ids(user: &str) -> Option<(u32, Option<u32>)> {
    let (user, group) = match user.split_once(':') {
        Some((user, group)) => (user, Some(group.parse().ok()?)),
        None => (user, None),
    };
    Some((user.parse().ok()?, group))
}
