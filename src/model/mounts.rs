//! Detects mounts of a host's apps that are not safe together.
//!
//! Docker resolves the source of a mount at each start, following symlinks. An app that may write to a directory can
//! replace anything below it by a symlink, and any app that mounts that gets the symlink's target.

use std::{collections::BTreeMap, path::Path};

use super::{
    desired::{DesiredApp, Snapshot},
    name::AppName,
    spec::VolumeSource,
};

/// A volume whose source another mount can replace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NestedMount {
    /// The source of the volume.
    pub path: String,
    /// The directory above it that is mounted writable.
    pub above: String,
    /// The app with that mount.
    pub owner: AppName,
}

/// Apps that mount a host path below a writable mount of any app here, themselves included; the first such volume of
/// each.
pub fn nested(snapshot: &Snapshot) -> BTreeMap<AppName, NestedMount> {
    let mounts = || {
        let targets = snapshot.apps.iter().filter_map(|(app, desired): (&AppName, &DesiredApp)| {
            Some((app, &desired.target()?.release.container.volumes))
        });
        targets.flat_map(|(app, volumes)| {
            volumes.iter().filter_map(move |volume| match &volume.source {
                VolumeSource::Host(path) => Some((app, path.as_str(), volume.read_only)),
                VolumeSource::Named(_) => None,
            })
        })
    };
    let writable: BTreeMap<&Path, &AppName> =
        mounts().filter(|(.., read_only)| !read_only).map(|(app, path, _)| (Path::new(path), app)).collect();
    let mut found = BTreeMap::new();
    for (app, path, _) in mounts() {
        let above = Path::new(path).ancestors().skip(1).find_map(|dir| writable.get_key_value(dir));
        if let Some((above, owner)) = above {
            let (above, owner) = (above.display().to_string(), (*owner).clone());
            found.entry(app.clone()).or_insert_with(|| NestedMount { path: path.to_owned(), above, owner });
        }
    }
    found
}
