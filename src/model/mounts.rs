//! Detects mounts of a host's apps that are not safe together.
//!
//! Docker resolves the source of a mount at each start, following symlinks. An app that may write to a directory can
//! replace anything below it by a symlink, and any app that mounts that gets the symlink's target.

use std::{collections::BTreeMap, path::Path};

use super::{
    desired::{DesiredApp, Snapshot},
    name::AppName,
    observed::Bind,
    spec::{ContainerSpec, VolumeSource},
};

/// A volume that is not safe together with a mount of an app here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NestedMount {
    /// The source of the volume.
    pub path: String,
    /// Where it lies.
    pub relation: Relation,
    /// The directory that is mounted above or below it.
    pub other: String,
    /// The app with that mount.
    pub owner: AppName,
}

/// Where a volume lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relation {
    /// Below a directory that is mounted writable, so what it leads to can be replaced.
    Below,
    /// Above what a container has mounted, and it is writable, so that could be replaced.
    Above,
}

/// The paths of the host that a container mounts.
pub fn binds(container: &ContainerSpec) -> Vec<Bind> {
    let binds = container.volumes.iter().filter_map(|volume| match &volume.source {
        VolumeSource::Host(path) => Some(Bind { source: path.clone(), read_only: volume.read_only, real: None }),
        VolumeSource::Named(_) => None,
    });
    binds.collect()
}

/// Apps that mount a host path below a writable mount of any app here, or a writable one above what a container has mounted,
/// themselves included; the first such volume of each. Of two apps the one that has its containers goes on.
///
/// Containers that an app has from before count as well: while both run, the old one could replace what the new one mounts,
/// and Docker follows that when it restarts the new one.
///
/// `present` are the mounts of containers that exist, by app.
pub fn nested(snapshot: &Snapshot, present: &BTreeMap<AppName, Vec<Bind>>) -> BTreeMap<AppName, NestedMount> {
    let apps = snapshot.apps.iter();
    let wanted: Vec<(&AppName, Vec<Bind>)> = apps
        .filter_map(|(app, desired): (&AppName, &DesiredApp)| Some((app, binds(&desired.target()?.release.container))))
        .collect();
    let there = || present.iter().flat_map(|(app, binds)| binds.iter().map(move |bind| (app, bind)));
    let mut found = BTreeMap::new();
    for (app, binds) in &wanted {
        // What its containers have already is no new way to another one's mount.
        let has =
            |path: &str| present.get(*app).is_some_and(|own| own.iter().any(|b| b.source == path && !b.read_only));
        let above = binds.iter().filter(|bind| !bind.read_only && !has(&bind.source)).find_map(
            |Bind { source: path, .. }| {
                let lies_below = |bind: &Bind| bind.source != *path && Path::new(&bind.source).starts_with(path);
                let (owner, bind) = there().find(|(_, bind)| lies_below(bind))?;
                Some(nested_mount(path, Relation::Above, &bind.source, owner))
            },
        );
        found.extend(above.map(|nested| ((*app).clone(), nested)));
    }
    // What is refused changes nothing for those that have their containers.
    let admitted = wanted.iter().filter(|(app, _)| !found.contains_key(*app));
    let admitted: Vec<(&AppName, &Bind)> =
        admitted.flat_map(|(app, binds)| binds.iter().map(move |bind| (*app, bind))).collect();
    for (app, binds) in &wanted {
        let below = binds.iter().find_map(|Bind { source: path, .. }| {
            let lies_above = |bind: &Bind| bind.source != *path && Path::new(path).starts_with(&bind.source);
            let mut all = there().chain(admitted.iter().copied()).filter(|(_, bind)| !bind.read_only);
            let (owner, bind) = all.find(|(_, bind)| lies_above(bind))?;
            Some(nested_mount(path, Relation::Below, &bind.source, owner))
        });
        if let Some(nested) = below {
            found.entry((*app).clone()).or_insert(nested);
        }
    }
    found
}

fn nested_mount(path: &str, relation: Relation, other: &str, owner: &AppName) -> NestedMount {
    NestedMount { path: path.to_owned(), relation, other: other.to_owned(), owner: owner.clone() }
}
