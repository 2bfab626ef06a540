//! Apps: leftovers of unwanted ones, and problems ahead of wanted ones.

use std::{collections::BTreeSet, fs, os::unix::fs::MetadataExt as _};

use super::{Context, Findings};
use crate::{
    host::docker::Lists,
    model::{
        desired::{DesiredApp, Snapshot},
        name::AppName,
        problem::chain,
        spec::VolumeSource,
    },
};

pub(super) async fn leftovers(context: &Context<'_>, snapshot: Option<&Snapshot>, found: &mut Findings) {
    let world = context.world;
    let mut here: BTreeSet<AppName> = match world.apps_on_disk() {
        Ok(apps) => apps,
        Err(e) => return found.warn("leftovers", chain(&e), "run this as the agent's user"),
    };
    let Some(snapshot) = snapshot else { return };
    match world.docker.list(None).await {
        Ok(listed) => here.extend(listed.into_iter().map(|c| c.app)),
        Err(e) => {
            let remedy = "get Docker to answer first: leftover containers are unknown";
            return found.warn("leftovers", chain(&e), remedy);
        }
    }
    let wanted = |app: &AppName| snapshot.apps.get(app).is_some_and(|d| !matches!(d, DesiredApp::Absent(_)));
    let left: Vec<&str> = here.iter().filter(|app| !wanted(app)).map(AppName::as_str).collect();
    if left.is_empty() {
        found.ok("leftovers", "no leftovers of apps that are not wanted here");
    } else {
        let remedy = "a running agent removes containers and files; `demae plan` shows how";
        found.warn("leftovers", format!("of apps that are not wanted here: {}", left.join(", ")), remedy);
    }
}

/// Containers of another agent with this host's name.
pub(super) async fn foreign(context: &Context<'_>, found: &mut Findings) {
    // If Docker does not answer, that is reported already.
    let Ok(Lists { foreign, .. }) = context.world.docker.list_all(None).await else { return };
    if let Some(first) = foreign.first() {
        found.fail(
            "foreign containers",
            format!(
                "{} containers with this host's name belong to another agent, `{}` among them: {}",
                foreign.len(),
                first.name,
                first.owner
            ),
            "stop one of the two agents, or give it another name (`host` in its file); to take its containers over, `demae adopt ID`",
        );
    }
}

/// Containers with demae's labels that demae did not create.
pub(super) async fn copies(context: &Context<'_>, found: &mut Findings) {
    // If Docker does not answer, that is reported already.
    let Ok(copies) = context.world.docker.copies().await else { return };
    if copies.is_empty() {
        found.ok("copies", "every container with the labels of this host was created by demae");
    } else {
        let text = format!("with the labels of this host, but not created by demae: {}", copies.join(", "));
        found.warn("copies", text, "demae leaves them alone; `docker rm` them when they are not needed any more");
    }
}

/// Checks that the user of each container may write to its host directories.
pub(super) async fn mounts(context: &Context<'_>, snapshot: &Snapshot, found: &mut Findings) {
    let before = found.0.len();
    let (mut fit, mut unknown, mut docker_answers) = (0, Vec::new(), context.docker_answers);
    for (app, desired) in &snapshot.apps {
        let DesiredApp::Run(target) = desired else { continue };
        let container = &target.release.container;
        for volume in &container.volumes {
            let VolumeSource::Host(path) = &volume.source else { continue };
            let meta = match fs::metadata(path) {
                Ok(meta) => meta,
                Err(e) => {
                    let remedy = format!("create it for the app's user: Docker refuses to start `{app}` without it");
                    found.fail("mounts", format!("app `{app}` mounts `{path}`: {e}"), remedy);
                    continue;
                }
            };
            let mode = meta.mode();
            if volume.read_only || mode & 0o002 != 0 {
                fit += 1;
                continue;
            }
            // Without `user` the image decides. A user name is only known inside of it.
            let mut user = container.user.clone();
            if user.is_none() && docker_answers {
                let image = target.release.image.tagged();
                match context.world.docker.image_user(&image).await {
                    Ok(of_image) => user = of_image,
                    // If Docker fails for one image, do not ask for others.
                    Err(_) => docker_answers = false,
                }
            }
            let Some((user, group)) = user.as_deref().and_then(ids) else {
                unknown.push(app.as_str());
                continue;
            };
            let may = user == 0
                || (meta.uid() == user && mode & 0o200 != 0)
                || (Some(meta.gid()) == group && mode & 0o020 != 0);
            if may {
                fit += 1;
            } else {
                let group = group.map_or(String::new(), |g| format!(":{g}"));
                found.warn(
                    "mounts",
                    format!("app `{app}` runs as user {user}{group}, and may not write to `{path}` (owner {}:{}, mode {:04o})", meta.uid(), meta.gid(), mode & 0o7777),
                    format!("`chown {user}{group} {path}`, or mount it with `:ro`"),
                );
            }
        }
    }
    unknown.dedup();
    if !unknown.is_empty() {
        let remedy = if docker_answers {
            "give `user` as numbers, or pull the image here: a user name is only known inside the image"
        } else {
            "get Docker to answer first: it knows the users of images"
        };
        found.warn("mounts", format!("the owner that directories need is unknown for: {}", unknown.join(", ")), remedy);
    }
    if fit > 0 && found.0.len() == before {
        found.ok("mounts", format!("{fit} directories of the host fit the users of their apps"));
    }
}

/// Parses `1000` or `1000:1000`; `None` for names other than root.
fn ids(user: &str) -> Option<(u32, Option<u32>)> {
    if matches!(user, "" | "root") {
        return Some((0, None));
    }
    let (user, group) = match user.split_once(':') {
        Some((user, group)) => (user, Some(group.parse().ok()?)),
        None => (user, None),
    };
    Some((user.parse().ok()?, group))
}
