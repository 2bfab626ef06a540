//! `demae apply`

use std::{
    collections::BTreeMap,
    fs,
    io::{IsTerminal as _, stdin},
    path::{Path, PathBuf},
};

use tokio::time::Instant;

use super::{
    Decision, Fleet, StoreArgs, Written, author, commit, delete,
    diff::{Made, compare},
    env::check_count,
    wait::{WaitArgs, follow_until},
    write,
};
use crate::{
    cli::{
        Ended, Exit, Failed, Format,
        input::{read_file_or_stdin, read_variables},
        print::Printer,
        runtime,
    },
    model::{
        dotenv,
        name::{AppName, SetName},
    },
    store::{Edit, Everywhere, keys::Key},
};

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// A spec, or a directory of specs: `web.yaml` is the one of `web`; `-` for standard input
    #[arg(short = 'f', long = "file", value_name = "FILE|DIR", required = true)]
    files: Vec<PathBuf>,
    /// Variables to set in the same release: a `.env` file, or a directory where `web.env` has those of `web`
    #[arg(long, value_name = "FILE|DIR")]
    env_file: Option<PathBuf>,
    /// The app, if the name of the file is another one
    #[arg(long, value_name = "APP")]
    app: Option<String>,
    /// Also delete the apps that have no file in the directory that is given; their variables stay
    #[arg(long)]
    prune: bool,
    /// Only print what would change: exit code 2 if something would
    #[arg(long)]
    dry_run: bool,
    /// Without asking
    #[arg(long)]
    yes: bool,
    /// Why, for `demae history`
    #[arg(short, long, value_name = "TEXT")]
    message: Option<String>,
    #[command(flatten)]
    wait: WaitArgs,
    #[command(flatten)]
    store: StoreArgs,
}

pub(in crate::cli) fn run(args: &Args, printer: &mut Printer) -> Ended {
    args.wait.check()?;
    let specs = args.specs()?;
    let config = if args.dry_run { args.store.etcd()? } else { args.store.etcd_to_write(printer)? };
    runtime(1)?.block_on(async {
        let fleet = Fleet::read(&config).await?;
        // All are checked before the first one is written.
        let mut changed = Vec::new();
        for (app, changes) in &specs {
            let after = with_changes(&fleet, app, changes)?;
            let lines = differences(&fleet, app, &after);
            if !lines.is_empty() {
                changed.push(app);
            }
            lines.iter().for_each(|line| args.print(line, printer));
        }
        let pruned = args.pruned(&fleet, &specs);
        pruned.iter().for_each(|(app, _)| args.print(&format!("- {app} is removed from every host"), printer));
        let count = changed.len() + pruned.len();
        let summary = format!("{count} of {} apps", specs.len() + pruned.len());
        if args.dry_run {
            printer.error(&format!("{summary} would change"));
            return Ok(if count == 0 { Exit::Success } else { Exit::Changes });
        }
        if count > 0 && !args.yes && stdin().is_terminal() {
            printer.error(&format!("{summary} change. Go on? [y/N]"));
            let mut line = String::new();
            stdin().read_line(&mut line)?;
            if !matches!(line.trim(), "y" | "Y" | "yes") {
                return Err(Failed::because("nothing was written"));
            }
        } else if !pruned.is_empty() && !args.yes {
            return Err(Failed::because("`--prune` would delete apps: without a terminal it needs `--yes`"));
        }
        let by = author::signature(args.message.as_deref());
        let deadline = args.wait.deadline()?;
        let (mut written, mut exit): (Vec<(&AppName, Written)>, Exit) = (Vec::new(), Exit::Success);
        for (app, changes) in &specs {
            match write(&config, Some((app, &by)), |fleet| decide(fleet, app, changes, args.wait.detach)).await {
                Ok(one) => written.push((app, one)),
                Err(failed) if written.iter().all(|(_, one)| one.revision == 0) => return Err(failed),
                // What was written goes on, and is waited for.
                Err(failed) => {
                    printer.error(&format!("error: {app}: {}", failed.message));
                    exit = Exit::Undecided;
                    break;
                }
            }
        }
        // Their rollouts go on beside each other meanwhile.
        for (app, written) in written {
            let ended = follow_until(&config, app, written, &args.wait, deadline, printer).await?;
            if ended == Exit::Interrupted {
                return Ok(ended);
            }
            exit = if exit == Exit::Success { ended } else { exit };
        }
        // What comes is there before something goes.
        if exit != Exit::Success && !pruned.is_empty() {
            printer.error(&format!("nothing is deleted, since not all has been applied: {}", names(&pruned)));
            return Ok(exit);
        }
        let mut leaving = Vec::new();
        for (app, seen) in pruned {
            let delete = |fleet: &Fleet| {
                if fleet.modified(&Key::Spec(app.clone())) != seen {
                    return Err(Failed::superseded(format!("{app} was written meanwhile, and is not deleted")));
                }
                Ok((delete::edit(fleet, &app, false)?, ()))
            };
            match commit(&config, None, delete).await {
                Ok((revision, ())) => leaving.push((app, revision)),
                Err(failed) => {
                    printer.error(&format!("error: {app} is not deleted: {}", failed.message));
                    exit = Exit::Undecided;
                }
            }
        }
        for (app, revision) in leaving {
            if args.wait.detach {
                args.print(&format!("{app} is to be removed (revision {revision})"), printer);
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let ended = delete::wait_gone(&config, &app, (revision, args.wait.format()), left, printer).await?;
            if ended == Exit::Interrupted {
                return Ok(ended);
            }
            exit = if exit == Exit::Success { ended } else { exit };
        }
        Ok(exit)
    })
}

/// What is put for each app: its spec, and variables.
type Specs = BTreeMap<AppName, Vec<(Key, Vec<u8>)>>;

fn names(apps: &[(AppName, i64)]) -> String {
    apps.iter().map(|(app, _)| app.as_str()).collect::<Vec<_>>().join(", ")
}

impl Args {
    /// A line for people; with JSON, standard output is for objects.
    fn print(&self, line: &str, printer: &mut Printer) {
        match self.wait.format() {
            Format::Text => printer.line(line),
            Format::Json => printer.error(line),
        }
    }

    /// The apps that have no file, if they are to be deleted, each with the revision of its spec.
    fn pruned(&self, fleet: &Fleet, specs: &Specs) -> Vec<(AppName, i64)> {
        let apps = fleet.contents.apps().keys().filter(|app| self.prune && !specs.contains_key(*app));
        apps.map(|app| (app.clone(), fleet.modified(&Key::Spec(app.clone())))).collect()
    }

    fn specs(&self) -> Result<Specs, Failed> {
        let mut specs = BTreeMap::new();
        let mut files = Vec::new();
        for given in &self.files {
            if given.is_dir() {
                files.extend(specs_in(given, self.prune)?);
            } else {
                files.push(given.clone());
            }
        }
        if self.prune && !self.files.iter().any(|given| given.is_dir()) {
            return Err(Failed::usage("`--prune` needs a directory: the apps that have no file in it are deleted"));
        }
        if self.prune && self.app.is_some() {
            return Err(Failed::usage(
                "`--app` gives one file another name, and `--prune` deletes by the names of files",
            ));
        }
        if self.app.is_some() && files.len() != 1 {
            return Err(Failed::usage("`--app` names the app of one file, and these are several"));
        }
        for file in files {
            let app = match &self.app {
                Some(app) => AppName::try_from(app.as_str())?,
                None => name_of(&file)?,
            };
            let mut changes = vec![(Key::Spec(app.clone()), read_file_or_stdin(&file)?)];
            changes.extend(self.variables(&app)?);
            if specs.insert(app.clone(), changes).is_some() {
                return Err(Failed::usage(format!("there are two specs of {app}")));
            }
        }
        if let Some(path) = self.env_file.as_ref().filter(|path| specs.len() != 1 && !path.is_dir()) {
            return Err(Failed::usage(format!(
                "`--env-file {}` is one file, and these are several apps; give a directory with one for each",
                path.display()
            )));
        }
        Ok(specs)
    }

    /// The variables of an app in the file that is given, or in the one with its name.
    fn variables(&self, app: &AppName) -> Result<Vec<(Key, Vec<u8>)>, Failed> {
        let Some(path) = &self.env_file else { return Ok(Vec::new()) };
        let of_app = path.join(format!("{app}.env"));
        let path = match path.is_dir() {
            false => path,
            true if of_app.exists() => &of_app,
            true => return Ok(Vec::new()),
        };
        let values = read_variables(path, dotenv::Format::Dotenv)?;
        check_count(values.len())?;
        let set = SetName::try_from(app.as_str())?;
        Ok(values.into_iter().map(|(name, value)| (Key::Env(set.clone(), name), value.into_bytes())).collect())
    }
}

/// The files of a directory that have specs.
fn specs_in(dir: &Path, is_pruning: bool) -> Result<Vec<PathBuf>, Failed> {
    let failed = |e: std::io::Error| Failed::because(format!("cannot read `{}`: {e}", dir.display()));
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let is_spec = path.extension().is_some_and(|end| end == "yaml" || end == "yml" || end == "json");
        // What `demae schema` prints is often beside them.
        let is_spec = is_spec && !path.to_string_lossy().ends_with(".schema.json");
        // One that cannot be read is an error, not an app without a file.
        let end = path.extension().map(std::ffi::OsStr::to_ascii_lowercase);
        let looks_like_one = path.is_dir() || !is_spec && end.is_some_and(|end| end == "yaml" || end == "yml");
        if is_pruning && looks_like_one {
            return Err(Failed::because(format!(
                "`{}` is not read as a spec, and with `--prune` an app whose spec it has would be deleted: move it, or give it a name that ends in .yaml",
                path.display()
            )));
        }
        if is_spec && !path.is_dir() {
            files.push(path);
        }
    }
    if files.is_empty() {
        return Err(Failed::because(format!("`{}` has no specs: no file ends in .yaml, .yml or .json", dir.display())));
    }
    files.sort();
    Ok(files)
}

fn name_of(file: &Path) -> Result<AppName, Failed> {
    let stem = file.file_stem().and_then(|stem| stem.to_str()).filter(|stem| *stem != "-");
    let stem = stem.ok_or_else(|| Failed::usage("the app of standard input is named by `--app`"))?;
    AppName::try_from(stem).map_err(|e| {
        Failed::usage(format!("`{}` does not have the name of an app: {e} (`--app` names it)", file.display()))
    })
}

fn with_changes(fleet: &Fleet, app: &AppName, changes: &[(Key, Vec<u8>)]) -> Result<Everywhere, Failed> {
    let all: Vec<_> = changes.iter().map(|(key, value)| (key.clone(), Some(value.clone()))).collect();
    match fleet.contents.with(app, &all, &fleet.key) {
        Some(Ok(everywhere)) => Ok(everywhere),
        Some(Err(problems)) => {
            Err(Failed::because(format!("`{app}` would be invalid; nothing was written:\n{problems}")))
        }
        None => Err(Failed::because(format!("`{app}` would not exist"))),
    }
}

fn differences(fleet: &Fleet, app: &AppName, after: &Everywhere) -> Vec<String> {
    let made = |everywhere: &Everywhere, name: &str| Made::new(name.to_owned(), everywhere.made_from.clone());
    match fleet.contents.apps().get(app) {
        None => vec![format!("+ {app} is new")],
        // What is there cannot be compared, and is replaced.
        Some(Err(_)) => vec![format!("+ {app} gets a valid spec")],
        Some(Ok(before)) => compare(app, &made(before, "now"), &made(after, "then"), &fleet.key),
    }
}

/// Puts what differs.
fn decide(fleet: &Fleet, app: &AppName, changes: &[(Key, Vec<u8>)], is_detached: bool) -> Result<Decision, Failed> {
    let is_same = |key: &Key, value: &[u8]| fleet.contents.entry(key).is_some_and(|entry| entry.value() == value);
    let puts: Vec<_> = changes.iter().filter(|(key, value)| !is_same(key, value)).cloned().collect();
    let pin = fleet.contents.pin(app).ok().flatten();
    if let Some(pinned) = pin.as_ref().filter(|_| !puts.is_empty() && !is_detached) {
        return Err(Failed::because(format!(
            "{app} is pinned to {pinned}, so a change of its spec would wait (`--detach` writes it all the same; `demae deploy {app} IMAGE` ends the pin)"
        )));
    }
    let made = with_changes(fleet, app, changes)?.target.release.id.clone();
    // Where nothing changes, what is pinned is what is wanted.
    let release = pin.filter(|_| puts.is_empty()).unwrap_or(made);
    let decided_from = [Key::Image(app.clone()), Key::Restart(app.clone()), Key::Pin(app.clone())];
    let decided_from = changes.iter().map(|(key, _)| key.clone()).chain(decided_from);
    let unchanged = decided_from.map(|key| (key.clone(), fleet.modified(&key))).collect();
    // A change that makes no release opens no rollout.
    let waits_for_edit = fleet.opens_rollout(app, &release);
    Ok(Decision::new(Edit { unchanged, puts, ..Edit::default() }, release, waits_for_edit))
}
