//! `demae apply`

use std::{
    collections::BTreeMap,
    fs,
    io::{IsTerminal as _, Read as _, stdin},
    path::{Path, PathBuf},
};

use super::{
    Decision, Fleet, StoreArgs, Written, author,
    diff::{Made, compare},
    wait::{WaitArgs, follow_until},
    write,
};
use crate::{
    cli::{Ended, Exit, Failed, Format, print::Printer, runtime},
    fleet::outcome::Wanted,
    model::name::AppName,
    store::{Edit, Everywhere, keys::Key},
};

/// Most bytes of a spec, as of a request that etcd takes.
const MOST: u64 = 1 << 20;

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// A spec, or a directory of specs: `web.yaml` is the one of `web`; `-` for standard input
    #[arg(short = 'f', long = "file", value_name = "FILE|DIR", required = true)]
    files: Vec<PathBuf>,
    /// The app, if the name of the file is another one
    #[arg(long, value_name = "APP")]
    app: Option<String>,
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
        for (app, spec) in &specs {
            let after = with_spec(&fleet, app, spec)?;
            let lines = differences(&fleet, app, &after);
            if !lines.is_empty() {
                changed.push(app);
            }
            for line in lines {
                match args.wait.format() {
                    Format::Text => printer.line(&line),
                    Format::Json => printer.error(&line),
                }
            }
        }
        if args.dry_run {
            printer.error(&format!("{} of {} apps would change", changed.len(), specs.len()));
            return Ok(if changed.is_empty() { Exit::Success } else { Exit::Changes });
        }
        if !changed.is_empty() && !args.yes && stdin().is_terminal() {
            printer.error(&format!("{} of {} apps change. Go on? [y/N]", changed.len(), specs.len()));
            let mut line = String::new();
            stdin().read_line(&mut line)?;
            if !matches!(line.trim(), "y" | "Y" | "yes") {
                return Err(Failed::because("nothing was written"));
            }
        }
        let by = author::signature(args.message.as_deref());
        let deadline = args.wait.deadline()?;
        let (mut written, mut exit): (Vec<(&AppName, Written)>, Exit) = (Vec::new(), Exit::Success);
        for (app, spec) in &specs {
            match write(&config, Some((app, &by)), |fleet| decide(fleet, app, spec, args.wait.detach)).await {
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
        Ok(exit)
    })
}

impl Args {
    /// The specs by app.
    fn specs(&self) -> Result<BTreeMap<AppName, Vec<u8>>, Failed> {
        let mut specs = BTreeMap::new();
        let mut files = Vec::new();
        for given in &self.files {
            if given.is_dir() {
                files.extend(specs_in(given)?);
            } else {
                files.push(given.clone());
            }
        }
        if self.app.is_some() && files.len() != 1 {
            return Err(Failed::usage("`--app` names the app of one file, and these are several"));
        }
        for file in files {
            let app = match &self.app {
                Some(app) => AppName::try_from(app.as_str())?,
                None => name_of(&file)?,
            };
            let text = read(&file)?;
            if specs.insert(app.clone(), text).is_some() {
                return Err(Failed::usage(format!("there are two specs of {app}")));
            }
        }
        Ok(specs)
    }
}

/// The files of a directory that have specs.
fn specs_in(dir: &Path) -> Result<Vec<PathBuf>, Failed> {
    let failed = |e: std::io::Error| Failed::because(format!("cannot read `{}`: {e}", dir.display()));
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let is_spec = path.extension().is_some_and(|end| end == "yaml" || end == "yml" || end == "json");
        // What `demae schema` prints is often beside them.
        let is_spec = is_spec && !path.to_string_lossy().ends_with(".schema.json");
        if is_spec && path.is_file() {
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

fn read(file: &Path) -> Result<Vec<u8>, Failed> {
    let mut text = Vec::new();
    let read = match file.as_os_str().to_str() {
        Some("-") => stdin().take(MOST).read_to_end(&mut text).map(|_| text),
        _ => fs::read(file),
    };
    read.map_err(|e| Failed::because(format!("cannot read `{}`: {e}", file.display())))
}

fn with_spec(fleet: &Fleet, app: &AppName, spec: &[u8]) -> Result<Everywhere, Failed> {
    match fleet.contents.with(app, &[(Key::Spec(app.clone()), Some(spec.to_vec()))], &fleet.key) {
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

/// Puts the spec, if it differs.
fn decide(fleet: &Fleet, app: &AppName, spec: &[u8], is_detached: bool) -> Result<Decision, Failed> {
    let key = Key::Spec(app.clone());
    let is_same = fleet.contents.entry(&key).is_some_and(|entry| entry.value() == spec);
    let pin = fleet.contents.pin(app).ok().flatten();
    if let Some(pinned) = pin.as_ref().filter(|_| !is_same && !is_detached) {
        return Err(Failed::because(format!(
            "{app} is pinned to {pinned}, so a change of its spec would wait (`--detach` writes it all the same; `demae deploy {app} IMAGE` ends the pin)"
        )));
    }
    let made = with_spec(fleet, app, spec)?.target.release.id.clone();
    // Where nothing changes, what is pinned is what is wanted.
    let release = pin.filter(|_| is_same).unwrap_or(made);
    let puts = if is_same { Vec::new() } else { vec![(key.clone(), spec.to_vec())] };
    let decided_from = [key, Key::Image(app.clone()), Key::Restart(app.clone()), Key::Pin(app.clone())];
    let unchanged = decided_from.into_iter().map(|key| (key.clone(), fleet.modified(&key))).collect();
    // A change that makes no release opens no rollout.
    let waits_for_edit = fleet.wanted(app) != Wanted::Release(release.clone());
    Ok(Decision::new(Edit { unchanged, puts, ..Edit::default() }, release, waits_for_edit))
}
