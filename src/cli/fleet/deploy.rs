//! `demae deploy`

use std::{fs, path::PathBuf};

use super::{ChangeArgs, Decision, Fleet, no_app};
use crate::{
    cli::{Ended, Failed, print::Printer},
    model::name::{AppName, EnvName, SetName},
    rollout::takes_turns,
    store::{Edit, Everywhere, keys::Key},
};

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// A variable of the app, in the same release; more than once
    #[arg(long = "env", value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// A new spec, in the same release
    #[arg(long, value_name = "FILE")]
    spec: Option<PathBuf>,
    /// Its new image, such as `registry.example.com/web:v43`
    #[arg(value_name = "IMAGE", index = 2)]
    image: String,
    #[command(flatten)]
    change: ChangeArgs,
}

pub(in crate::cli) fn run(args: &Args, printer: &mut Printer) -> Ended {
    let app = AppName::try_from(args.change.app.as_str())?;
    let changes = args.changes(&app)?;
    args.change.run(printer, |fleet, app| decide(fleet, app, &changes))
}

impl Args {
    /// What is put, by the command line.
    fn changes(&self, app: &AppName) -> Result<Vec<(Key, Vec<u8>)>, Failed> {
        let mut changes = Vec::new();
        if let Some(path) = &self.spec {
            let text = fs::read(path).map_err(|e| Failed::because(format!("cannot read `{}`: {e}", path.display())))?;
            changes.push((Key::Spec(app.clone()), text));
        }
        changes.push((Key::Image(app.clone()), self.image.clone().into_bytes()));
        let set = SetName::try_from(app.as_str())?;
        for text in &self.env {
            let (name, value) =
                text.split_once('=').ok_or_else(|| Failed::usage("--env: write it like `NAME=VALUE`"))?;
            let name = EnvName::try_from(name)
                .map_err(|_| Failed::usage("--env: what is before the first `=` is not the name of a variable"))?;
            changes.push((Key::Env(set.clone(), name), value.as_bytes().to_vec()));
        }
        Ok(changes)
    }
}

/// Puts what differs. A pin would keep the release from being run, so it is taken away in the same transaction.
fn decide(fleet: &Fleet, app: &AppName, changes: &[(Key, Vec<u8>)]) -> Result<Decision, Failed> {
    let is_same = |key: &Key, value: &[u8]| fleet.contents.entry(key).is_some_and(|entry| entry.value() == value);
    let puts: Vec<_> = changes.iter().filter(|(key, value)| !is_same(key, value)).cloned().collect();
    let all: Vec<_> = changes.iter().map(|(key, value)| (key.clone(), Some(value.clone()))).collect();
    let everywhere = match fleet.contents.with(app, &all, &fleet.key) {
        Some(Ok(everywhere)) => everywhere,
        Some(Err(problems)) => return Err(Failed::because(format!("`{app}` would be invalid:\n{problems}"))),
        None => return Err(no_app(app)),
    };
    let Everywhere { target, .. } = &everywhere;
    if target.release_command.is_some() {
        let placed = fleet.contents.hosts.iter().filter(|(_, info)| !takes_turns(info));
        let mut placed = placed.filter(|(host, info)| fleet.contents.is_placed(app, &everywhere, host, info));
        if let Some((host, _)) = placed.next() {
            return Err(Failed::because(format!(
                "`release_command`: {host} takes no turns, and would run it by itself (`demae doctor` there says why)"
            )));
        }
    }
    let deletes: Vec<Key> =
        [Key::Pin(app.clone())].into_iter().filter(|key| fleet.contents.entry(key).is_some()).collect();
    let decided_from = [Key::Spec(app.clone()), Key::Image(app.clone()), Key::Restart(app.clone())];
    let read = decided_from.into_iter().chain(puts.iter().map(|(key, _)| key.clone())).chain(deletes.iter().cloned());
    let mut unchanged: Vec<(Key, i64)> = Vec::new();
    for key in read {
        if !unchanged.iter().any(|(known, _)| *known == key) {
            unchanged.push((key.clone(), fleet.modified(&key)));
        }
    }
    let edit = Edit { unchanged, puts, deletes, ..Edit::default() };
    let release = target.release.id.clone();
    // A change that makes no release opens no rollout.
    let waits_for_edit = fleet.opens_rollout(app, &release);
    Ok(Decision::new(edit, release, waits_for_edit))
}
