//! `demae env set`, `unset` and `import`

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use super::{ChangeArgs, Decision, Fleet, no_app};
use crate::{
    cli::{
        Ended, Failed,
        input::{read_file_or_stdin, read_variables},
        print::Printer,
    },
    model::{
        dotenv,
        name::{AppName, EnvName, SetName},
    },
    store::{Edit, keys::Key},
};

/// The text itself is not told: it may be a secret that was written without its name.
const NO_NAME: &str =
    "a variable is written like `NAME=VALUE`, and what is before the first `=` is not the name of one";

/// Most variables in one command: etcd takes 128 operations in a transaction, and each of these has a comparison.
const MOST: usize = 100;

#[derive(Debug, clap::Args)]
pub(super) struct SetArgs {
    /// Variables; `NAME=@FILE` takes the value from a file, `NAME=-` from standard input
    #[arg(value_name = "NAME=VALUE", required = true, index = 2)]
    variables: Vec<String>,
    #[command(flatten)]
    target: TargetArgs,
}

#[derive(Debug, clap::Args)]
pub(super) struct UnsetArgs {
    /// Variables
    #[arg(value_name = "NAME", required = true, index = 2)]
    names: Vec<String>,
    #[command(flatten)]
    target: TargetArgs,
}

#[derive(Debug, clap::Args)]
pub(super) struct ImportArgs {
    /// The file; `-` for standard input
    #[arg(value_name = "FILE", default_value = "-", index = 2)]
    file: PathBuf,
    /// How it is written
    #[arg(long, value_enum, default_value = "dotenv")]
    format: FileFormat,
    #[command(flatten)]
    target: TargetArgs,
}

/// How a file of variables is written.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum FileFormat {
    /// As `.env` files: quotes, `export`, comments after values
    Dotenv,
    /// As `docker run --env-file` reads it: all after `=` is the value
    Docker,
}

impl From<FileFormat> for dotenv::Format {
    fn from(format: FileFormat) -> Self {
        match format {
            FileFormat::Dotenv => Self::Dotenv,
            FileFormat::Docker => Self::Docker,
        }
    }
}

#[derive(Debug, clap::Args)]
struct TargetArgs {
    /// A set that the app shares with others by `env_from`, instead of its own
    #[arg(long, value_name = "SET")]
    set: Option<String>,
    #[command(flatten)]
    change: ChangeArgs,
}

pub(super) fn set(args: &SetArgs, printer: &mut Printer) -> Ended {
    let mut values = BTreeMap::new();
    for text in &args.variables {
        let (name, value) = text
            .split_once('=')
            .ok_or_else(|| Failed::usage("a variable is written like `NAME=VALUE`, `NAME=@FILE` or `NAME=-`"))?;
        let name = EnvName::try_from(name).map_err(|_| Failed::usage(NO_NAME))?;
        if values.insert(name.clone(), Some(value_of(&name, value)?)).is_some() {
            return Err(Failed::usage(format!("{name} is given twice")));
        }
    }
    args.target.run(printer, &values)
}

/// A value that is given, or the text of a file without the line break at its end.
fn value_of(name: &EnvName, value: &str) -> Result<Vec<u8>, Failed> {
    let mut text = match (value, value.strip_prefix('@')) {
        ("-", _) => read_file_or_stdin(Path::new("-"))?,
        // What is taken for a file may be the value itself.
        (_, Some(file)) => fs::read(file).map_err(|e| {
            Failed::because(format!(
                "{name}: the file that is named after `@` cannot be read: {e}; a value that begins with `@` is given by `{name}=-`"
            ))
        })?,
        _ => return Ok(value.as_bytes().to_vec()),
    };
    if text.last() == Some(&b'\n') {
        text.pop();
    }
    Ok(text)
}

pub(super) fn unset(args: &UnsetArgs, printer: &mut Printer) -> Ended {
    let names = args.names.iter().map(|name| EnvName::try_from(name.as_str()).map(|name| (name, None)));
    let names: BTreeMap<EnvName, _> = names.collect::<Result<_, _>>().map_err(|_| Failed::usage(NO_NAME))?;
    args.target.run(printer, &names)
}

pub(super) fn import(args: &ImportArgs, printer: &mut Printer) -> Ended {
    let values = read_variables(&args.file, args.format.into())?;
    let values = values.into_iter().map(|(name, value)| (name, Some(value.into_bytes()))).collect();
    args.target.run(printer, &values)
}

impl TargetArgs {
    fn run(&self, printer: &mut Printer, values: &BTreeMap<EnvName, Option<Vec<u8>>>) -> Ended {
        check_count(values.len())?;
        let set = self.set.as_deref().map(SetName::try_from).transpose()?;
        let is_detached = self.change.wait.detach;
        self.change.run(printer, |fleet, app| decide(fleet, app, set.as_ref(), values, is_detached))
    }
}

/// Refuses more variables than one transaction takes.
pub(in crate::cli::fleet) fn check_count(count: usize) -> Result<(), Failed> {
    if count <= MOST {
        return Ok(());
    }
    Err(Failed::because(format!("these are {count} variables; etcd takes {MOST} in one change, so give them in parts")))
}

/// Puts and deletes what differs, in one transaction.
fn decide(
    fleet: &Fleet,
    app: &AppName,
    set: Option<&SetName>,
    values: &BTreeMap<EnvName, Option<Vec<u8>>>,
    is_detached: bool,
) -> Result<Decision, Failed> {
    let own = SetName::try_from(app.as_str())?;
    let set = set.unwrap_or(&own);
    let users = users(fleet, set);
    if *set != own && !users.contains(&app) {
        fleet.app(app)?;
        return Err(Failed::because(format!(
            "{app} does not use the set `{set}` (`env_from` in its spec names those it uses)"
        )));
    }
    let pin = Key::Pin(app.clone());
    if let Some(pinned) = fleet.text(&pin).filter(|_| !is_detached) {
        return Err(Failed::because(format!(
            "{app} is pinned to {pinned}, so a change of a variable would wait (`--detach` writes it all the same; `demae deploy {app} IMAGE` ends the pin)"
        )));
    }
    let (mut puts, mut deletes, mut all) = (Vec::new(), Vec::new(), Vec::new());
    for (name, value) in values {
        let key = Key::Env(set.clone(), name.clone());
        match (value, fleet.contents.entry(&key)) {
            (None, None) => return Err(Failed::because(format!("there is no `{key}`{}", elsewhere(fleet, app, name)))),
            (None, Some(_)) => deletes.push(key.clone()),
            (Some(value), Some(entry)) if entry.value() == value => {}
            (Some(value), _) => puts.push((key.clone(), value.clone())),
        }
        all.push((key, value.clone()));
    }
    let mut release = None;
    for user in users.iter().copied().chain([app]) {
        match fleet.contents.with(user, &all, &fleet.key) {
            Some(Ok(everywhere)) if user == app => release = Some(everywhere.target.release.id.clone()),
            Some(Ok(_)) => {}
            // It is already, without this change.
            Some(Err(_)) if user != app && fleet.app(user).is_err() => {}
            Some(Err(problems)) => return Err(Failed::because(format!("`{user}` would be invalid:\n{problems}"))),
            None => return Err(no_app(user)),
        }
    }
    let release = release.ok_or_else(|| no_app(app))?;
    let decided_from = [Key::Spec(app.clone()), Key::Image(app.clone()), Key::Restart(app.clone()), pin];
    let written = puts.iter().map(|(key, _)| key).chain(&deletes).cloned();
    let unchanged = decided_from.into_iter().chain(written).map(|key| (key.clone(), fleet.modified(&key))).collect();
    let others: Vec<&str> = users.iter().filter(|user| **user != app).map(|user| user.as_str()).collect();
    let waits_for_edit = fleet.opens_rollout(app, &release);
    let decision = Decision::new(Edit { unchanged, puts, deletes, ..Edit::default() }, release, waits_for_edit);
    Ok(match others.is_empty() {
        true => decision,
        false => decision.with_note(format!("`env/{set}/` is also used by {}: they change, too", others.join(", "))),
    })
}

/// The apps that use a set.
pub(in crate::cli::fleet) fn users<'f>(fleet: &'f Fleet, set: &SetName) -> Vec<&'f AppName> {
    let uses = |app: &AppName| match fleet.contents.apps().get(app) {
        Some(Ok(everywhere)) => everywhere.made_from.env.contains_key(set),
        _ => app.as_str() == set.as_str(),
    };
    fleet.contents.apps().keys().filter(|app| uses(app)).collect()
}

/// Where a variable comes from that is not in the set.
fn elsewhere(fleet: &Fleet, app: &AppName, name: &EnvName) -> String {
    let Some(Ok(everywhere)) = fleet.contents.apps().get(app) else { return String::new() };
    let sets = everywhere.made_from.env.iter().filter(|(_, values)| values.contains_key(name));
    let found = sets.map(|(set, _)| format!("env/{set}/")).next();
    match found {
        Some(set) => format!("; {app} has {name} from `{set}`"),
        None if everywhere.target.release.env.contains_key(name) => format!("; {app} has {name} from its spec"),
        None => format!("; {app} has no variable {name}"),
    }
}
