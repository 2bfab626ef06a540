//! The machine-written records of a fleet, parsed.

use std::collections::BTreeMap;

use serde::{Deserialize, de::DeserializeOwned};

use crate::model::{
    desired::Target,
    fleet::{
        CommandRun, FleetImage, FleetKey, HostVerdict, KeptRelease, Leader, Lost, Permit, Proof, ResolvedImage,
        Rollout, VERSION,
    },
    name::{AppName, HostName, ImageDigest, ReleaseId},
};

/// A record with the revisions of its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored<T> {
    /// `None` if the value cannot be read. The key is there all the same: it is never taken for missing.
    pub value: Option<T>,
    /// The create revision.
    pub created: i64,
    /// The mod revision.
    pub modified: i64,
}

/// Which image a release is in the fleet, by its record.
pub fn image_of(target: &Target, written: Option<&Stored<ResolvedImage>>) -> FleetImage {
    FleetImage::of(target, written.map(|stored| stored.value.as_ref().map(|resolved| &resolved.digest)))
}

/// A value as read, with the create and mod revisions of its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawRecord<'a> {
    /// The value.
    pub value: &'a [u8],
    /// The create revision.
    pub created: i64,
    /// The mod revision.
    pub modified: i64,
}

/// What a host serves of an app, by its status.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
pub struct Served {
    #[serde(default)]
    release: Option<ReleaseId>,
    #[serde(default)]
    serving: Option<ReleaseId>,
    #[serde(default)]
    healthy: u16,
}

impl Served {
    /// The release that healthy instances serve.
    pub fn release(&self) -> Option<&ReleaseId> {
        self.serving.as_ref().or(self.release.as_ref()).filter(|_| self.healthy > 0)
    }
}

/// Records by key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Records {
    /// The leader.
    pub leader: Option<Stored<Leader>>,
    /// The create revisions of the keys of hosts that are up.
    pub hosts: BTreeMap<HostName, i64>,
    /// Rollouts.
    pub rollouts: BTreeMap<AppName, Stored<Rollout>>,
    /// Permits.
    pub permits: BTreeMap<(AppName, HostName), Stored<Permit>>,
    /// Verdicts.
    pub verdicts: BTreeMap<(AppName, ReleaseId, HostName), Stored<HostVerdict>>,
    /// Hosts that went away in their turn.
    pub lost: BTreeMap<(AppName, HostName), Stored<Lost>>,
    /// What hosts have proven last.
    pub proofs: BTreeMap<(AppName, HostName), Stored<Proof>>,
    /// What hosts serve.
    pub served: BTreeMap<(AppName, HostName), Stored<Served>>,
    /// Kept releases.
    pub kept: BTreeMap<(AppName, ReleaseId), Stored<KeptRelease>>,
    /// Runs of the commands of releases.
    pub commands: BTreeMap<(AppName, ReleaseId), Stored<CommandRun>>,
    /// Which images releases are.
    pub digests: BTreeMap<(AppName, ReleaseId), Stored<ResolvedImage>>,
    /// The mod revisions of specs.
    pub specs: BTreeMap<AppName, i64>,
    /// The mod revisions of images.
    pub images: BTreeMap<AppName, i64>,
    /// The mod revision of the freeze, if there is one.
    pub freeze: Option<i64>,
}

impl Records {
    /// Takes a key as it is now; `None` if it is gone. Returns false if its value cannot be read.
    pub fn take(&mut self, key: FleetKey, raw: Option<RawRecord<'_>>) -> bool {
        match key {
            FleetKey::Leader => {
                self.leader = raw.map(parse);
                self.leader.as_ref().is_none_or(|leader| leader.value.is_some())
            }
            FleetKey::Host(host) => {
                match raw {
                    Some(raw) => drop(self.hosts.insert(host, raw.created)),
                    None => drop(self.hosts.remove(&host)),
                }
                true
            }
            FleetKey::Rollout(app) => put(&mut self.rollouts, app, raw),
            FleetKey::Permit(host, app) => put(&mut self.permits, (app, host), raw),
            FleetKey::Verdict(app, release, host) => put(&mut self.verdicts, (app, release, host), raw),
            FleetKey::Lost(app, host) => put(&mut self.lost, (app, host), raw),
            FleetKey::Proof(host, app) => put(&mut self.proofs, (app, host), raw),
            FleetKey::Status(host, app) => put(&mut self.served, (app, host), raw),
            FleetKey::Kept(app, release) => put(&mut self.kept, (app, release), raw),
            FleetKey::Command(app, release) => put(&mut self.commands, (app, release), raw),
            FleetKey::Digest(app, release) => put(&mut self.digests, (app, release), raw),
            FleetKey::KeptEnv(..) | FleetKey::Retry(_) => true,
            FleetKey::Spec(app) => note_revision(&mut self.specs, app, raw),
            FleetKey::Image(app) => note_revision(&mut self.images, app, raw),
            FleetKey::Freeze => {
                self.freeze = raw.map(|raw| raw.modified);
                true
            }
        }
    }

    /// The permits of an app, of all its releases.
    pub fn permits_of<'a>(&'a self, app: &'a AppName) -> impl Iterator<Item = (&'a HostName, &'a Stored<Permit>)> {
        self.permits.iter().filter(move |((of, _), _)| of == app).map(|((_, host), permit)| (host, permit))
    }

    /// The hosts on which a release failed, with the mod revision of the verdict.
    pub fn verdicts_of<'a>(
        &'a self,
        app: &'a AppName,
        release: &'a ReleaseId,
    ) -> impl Iterator<Item = (&'a HostName, &'a Stored<HostVerdict>)> {
        let of =
            move |((a, r, _), _): &(&(AppName, ReleaseId, HostName), &Stored<HostVerdict>)| a == app && r == release;
        self.verdicts.iter().filter(of).map(|((_, _, host), verdict)| (host, verdict))
    }

    /// Which image a release is on every host, if that is written and can be read.
    pub fn digest(&self, app: &AppName, release: &ReleaseId) -> Option<&ImageDigest> {
        Some(&self.digests.get(&(app.clone(), release.clone()))?.value.as_ref()?.digest)
    }

    /// The release that a host has proven last.
    pub fn proven(&self, app: &AppName, host: &HostName) -> Option<&ReleaseId> {
        self.proofs.get(&(app.clone(), host.clone()))?.value.as_ref()?.release.as_ref()
    }
}

fn note_revision(map: &mut BTreeMap<AppName, i64>, app: AppName, raw: Option<RawRecord<'_>>) -> bool {
    match raw {
        Some(raw) => drop(map.insert(app, raw.modified)),
        None => drop(map.remove(&app)),
    }
    true
}

fn parse<T: DeserializeOwned>(raw: RawRecord<'_>) -> Stored<T> {
    let value = serde_json::from_slice::<serde_json::Value>(raw.value).ok();
    // A later version may mean something else by the same fields.
    let known =
        value.filter(|v| v.get("version").and_then(serde_json::Value::as_u64).unwrap_or(1) <= u64::from(VERSION));
    Stored { value: known.and_then(|v| serde_json::from_value(v).ok()), created: raw.created, modified: raw.modified }
}

fn put<K: Ord, T: DeserializeOwned>(map: &mut BTreeMap<K, Stored<T>>, key: K, raw: Option<RawRecord<'_>>) -> bool {
    let Some(raw) = raw else {
        map.remove(&key);
        return true;
    };
    // What this agent wrote itself is known before the watch brings what came before it.
    if map.get(&key).is_some_and(|known| known.modified > raw.modified) {
        return true;
    }
    let stored = parse(raw);
    let is_read = stored.value.is_some();
    map.insert(key, stored);
    is_read
}
