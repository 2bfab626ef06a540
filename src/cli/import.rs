//! `demae import`

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use super::{Ended, Exit, Failed, print::Printer, runtime, validate::Rules};
use crate::{
    config::docker_socket,
    host::{docker::Docker, files},
    import::{self, Effect, Options, Outcome},
    model::{
        dotenv,
        name::{AppName, HostName, VirtualHost},
        policy::BUILT_IN,
    },
};

/// The names that a Compose file has, in the order in which Compose looks for them.
const COMPOSE_FILES: [&str; 4] = ["compose.yaml", "compose.yml", "docker-compose.yml", "docker-compose.yaml"];

#[derive(Debug, clap::Args)]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub(super) struct Args {
    #[command(subcommand)]
    from: From,
}

#[derive(Debug, clap::Subcommand)]
enum From {
    /// Make specs of the services of a Compose file, or of a stack file of Swarm
    #[command(visible_alias = "stack")]
    Compose(ComposeArgs),
    /// Make specs of the roles of Kamal's `config/deploy.yml`
    Kamal(KamalArgs),
    /// Make a spec of a `docker run` command
    Run(RunArgs),
    /// Make specs of containers of this machine's Docker
    Container(ContainerArgs),
}

#[derive(Debug, clap::Args)]
struct ComposeArgs {
    /// Compose files, later ones over earlier ones; unless given, that of this directory
    #[arg(value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Only this service; more than once
    #[arg(long, value_name = "SERVICE")]
    service: Vec<String>,
    /// Values of variables in the files; unless given, `.env` beside the first one
    #[arg(long, value_name = "FILE")]
    env_file: Option<PathBuf>,
    /// The name of the project, which Docker's volumes begin with; unless given, that of the directory
    #[arg(long, value_name = "NAME")]
    project: Option<String>,
    #[command(flatten)]
    target: TargetArgs,
}

#[derive(Debug, clap::Args)]
struct KamalArgs {
    /// Kamal's files: that of a destination after the first one
    #[arg(value_name = "FILE", default_value = "config/deploy.yml")]
    files: Vec<PathBuf>,
    #[command(flatten)]
    target: TargetArgs,
}

#[derive(Debug, clap::Args)]
struct RunArgs {
    /// The command, after `--`: `demae import run -- docker run -p 80:80 web:v1`
    #[arg(value_name = "WORD", required = true, last = true)]
    words: Vec<String>,
    #[command(flatten)]
    target: TargetArgs,
}

#[derive(Debug, clap::Args)]
struct ContainerArgs {
    /// Containers, by name or id
    #[arg(value_name = "CONTAINER", required = true)]
    containers: Vec<String>,
    /// The engine's socket; unless given, that of `DOCKER_HOST`, or `/var/run/docker.sock`
    #[arg(long, value_name = "SOCKET")]
    docker: Option<String>,
    #[command(flatten)]
    target: TargetArgs,
}

/// What is made of services, and where it goes.
#[derive(Debug, clap::Args)]
struct TargetArgs {
    /// A virtual host of the service that takes requests, or of this one; more than once
    #[arg(long = "host", value_name = "[SERVICE=]NAME")]
    hosts: Vec<String>,
    /// The name of the app of a service, where it is another one; more than once
    #[arg(long = "app", value_name = "SERVICE=APP")]
    names: Vec<String>,
    /// Import services without these keys, although they need them
    #[arg(long = "drop", value_name = "KEY,…", value_delimiter = ',')]
    dropped: Vec<String>,
    /// The policy of the hosts, in place of the rules that hold without one
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
    /// Write `APP.yaml` and `APP.env` here, instead of specs to standard output
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Replace files that are there and differ
    #[arg(long, requires = "out")]
    force: bool,
}

pub(super) fn run(args: &Args, printer: &mut Printer) -> Ended {
    match &args.from {
        From::Compose(args) => compose(args, printer),
        From::Kamal(args) => {
            let no_files = |_: &str| Err("Kamal has no such files".to_owned());
            let options = args.target.options("kamal", BTreeMap::new(), &no_files)?;
            args.target.deliver(&import::kamal::kamal(&texts(&args.files)?, &options)?, printer)
        }
        From::Run(args) => {
            let read = |path: &str| fs::read(path).map_err(|e| e.to_string());
            let options = args.target.options("docker", BTreeMap::new(), &read)?;
            // A whole command line in quotes.
            let words = match args.words.as_slice() {
                [line] => import::run_line::split(line).map_err(Failed::usage)?,
                words => words.to_vec(),
            };
            args.target.deliver(&import::run_line::run_line(&words, &options)?, printer)
        }
        From::Container(args) => containers(args, printer),
    }
}

fn compose(args: &ComposeArgs, printer: &mut Printer) -> Ended {
    let paths = match args.files.as_slice() {
        [] => found_here()?,
        given => given.to_vec(),
    };
    let texts = texts(&paths)?;
    let dir = paths.first().and_then(|path| path.parent()).map(Path::to_owned).unwrap_or_default();
    let variables = variables(args.env_file.as_deref(), &dir)?;
    let read = |path: &str| fs::read(dir.join(path)).map_err(|e| e.to_string());
    let given = args.project.clone().or_else(|| variables.get("COMPOSE_PROJECT_NAME").cloned());
    let (project, is_given) = match given {
        Some(given) => (given, true),
        None => (project_of(&dir)?, false),
    };
    let mut options = args.target.options(&project, variables, &read)?;
    options.is_project_given = is_given;
    options.services = args.service.iter().cloned().collect();
    args.target.deliver(&import::compose(&texts, &options)?, printer)
}

/// Each file by its name and text.
fn texts(paths: &[PathBuf]) -> Result<Vec<(String, Vec<u8>)>, Failed> {
    let read = |path: &PathBuf| match fs::read(path) {
        Ok(text) => Ok((path.display().to_string(), text)),
        Err(e) => Err(Failed::because(format!("cannot read `{}`: {e}", path.display()))),
    };
    paths.iter().map(read).collect()
}

/// The Compose file of this directory, and the one that Compose puts over it.
fn found_here() -> Result<Vec<PathBuf>, Failed> {
    let found = COMPOSE_FILES.iter().map(PathBuf::from).find(|path| path.is_file());
    let first = found.ok_or_else(|| Failed::usage("this directory has no Compose file; name one"))?;
    let overrides = COMPOSE_FILES.iter().map(|name| PathBuf::from(name.replace(".y", ".override.y")));
    Ok(std::iter::once(first).chain(overrides.filter(|path| path.is_file()).take(1)).collect())
}

fn variables(given: Option<&Path>, dir: &Path) -> Result<BTreeMap<String, String>, Failed> {
    let path = given.map_or_else(|| dir.join(".env"), Path::to_owned);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && given.is_none() => return Ok(BTreeMap::new()),
        Err(e) => return Err(Failed::because(format!("cannot read `{}`: {e}", path.display()))),
    };
    match import::variables(&text, &BTreeMap::new()) {
        Ok((found, _)) => Ok(found.into_iter().map(|(name, value)| (name.to_string(), value)).collect()),
        Err(problems) => {
            let lines: Vec<String> =
                problems.iter().map(|(line, what)| format!("{}:{line}: {what}", path.display())).collect();
            Err(Failed::because(lines.join("\n")))
        }
    }
}

/// The name of a project, by its directory: what is left of it in lower case, with the letters that Compose allows.
fn project_of(dir: &Path) -> Result<String, Failed> {
    let whole = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    let whole = fs::canonicalize(whole)?;
    let name = whole.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
    let name: String = name.chars().filter(|c| c.is_ascii_alphanumeric() || "_-".contains(*c)).collect();
    Ok(name.trim_start_matches(['_', '-']).to_owned())
}

fn containers(args: &ContainerArgs, printer: &mut Printer) -> Ended {
    let nameless = HostName::try_from("none")?;
    let docker = Docker::behind(&docker_socket(args.docker.clone())?, nameless);
    let inspected = runtime(1)?.block_on(async {
        let mut all = Vec::new();
        for name in &args.containers {
            all.push(docker.inspect_with_image(name).await?);
        }
        Ok::<_, Failed>(all)
    })?;
    let unread = |_: &str| Err("containers have no files of variables".to_owned());
    let options = args.target.options("docker", BTreeMap::new(), &unread)?;
    let mut whole = Outcome { apps: Vec::new(), notes: Vec::new() };
    for (container, image) in &inspected {
        let one = import::container::container(container, image, &options)?;
        whole.apps.extend(one.apps);
        whole.notes.extend(one.notes);
    }
    args.target.deliver(&whole, printer)
}

impl TargetArgs {
    fn options<'a>(
        &self,
        project: &str,
        variables: BTreeMap<String, String>,
        read: &'a dyn Fn(&str) -> Result<Vec<u8>, String>,
    ) -> Result<Options<'a>, Failed> {
        let mut hosts = Vec::new();
        for given in &self.hosts {
            let (service, host) = match given.split_once('=') {
                Some((service, host)) => (Some(service.to_owned()), host),
                None => (None, given.as_str()),
            };
            hosts.push((service, VirtualHost::try_from(host)?));
        }
        let policy = match &self.policy {
            Some(path) => Rules::of_file(path)?.policy(),
            None => BUILT_IN.clone(),
        };
        let mut names = BTreeMap::new();
        for given in &self.names {
            let (service, app) =
                given.split_once('=').ok_or_else(|| Failed::usage("--app: write it like `SERVICE=APP`"))?;
            names.insert(service.to_owned(), AppName::try_from(app)?);
        }
        Ok(Options {
            project: project.to_owned(),
            is_project_given: false,
            variables,
            services: BTreeSet::new(),
            hosts,
            names,
            dropped: self.dropped.iter().cloned().collect(),
            policy,
            read,
        })
    }

    /// Says what became of each key, and writes what was made, unless a key has no meaning here.
    fn deliver(&self, outcome: &Outcome, printer: &mut Printer) -> Ended {
        let place = |line: usize| if line == 0 { String::new() } else { format!("line {line}: ") };
        for note in &outcome.notes {
            printer.error(&format!("{}{note}", place(note.line)));
        }
        for app in &outcome.apps {
            for note in &app.notes {
                printer.error(&format!("{}{}: {note}", place(note.line), app.app));
            }
        }
        if outcome.worst() == Some(Effect::Refused) {
            return Err(Failed::because(
                "what is refused has no meaning here, and without it the app is another one; nothing was written (`--drop KEY,…` imports the services without these keys)",
            ));
        }
        match &self.out {
            Some(dir) => self.write(dir, outcome, printer)?,
            None => Self::print(outcome, printer),
        }
        Ok(if outcome.worst().is_none() { Exit::Success } else { Exit::Changes })
    }

    fn print(outcome: &Outcome, printer: &mut Printer) {
        for (n, app) in outcome.apps.iter().enumerate() {
            if outcome.apps.len() > 1 {
                printer.line(&format!("{}# {}.yaml", if n > 0 { "---\n" } else { "" }, app.app));
            }
            printer.line(app.spec.trim_end());
        }
        if outcome.apps.iter().any(|app| !app.env.is_empty()) {
            printer.error("variables are not printed; `--out DIR` writes them to files beside the specs");
        }
    }

    /// Writes all files, or none if one is there that differs.
    fn write(&self, dir: &Path, outcome: &Outcome, printer: &mut Printer) -> Result<(), Failed> {
        let mut all = Vec::new();
        for app in &outcome.apps {
            all.push((dir.join(format!("{}.yaml", app.app)), app.spec.clone(), 0o644));
            if !app.env.is_empty() {
                let text = dotenv::write(&app.env, dotenv::Format::Dotenv).map_err(Failed::because)?;
                // Secrets are among them.
                all.push((dir.join(format!("{}.env", app.app)), text, 0o600));
            }
        }
        let differs =
            |path: &Path, text: &str| path.exists() && fs::read(path).ok().as_deref() != Some(text.as_bytes());
        if let Some((path, ..)) = all.iter().find(|(path, text, _)| differs(path, text)).filter(|_| !self.force) {
            return Err(Failed::because(format!(
                "`{}` is there and differs; nothing was written (`--force` replaces it)",
                path.display()
            )));
        }
        fs::create_dir_all(dir).map_err(|e| Failed::because(format!("cannot create `{}`: {e}", dir.display())))?;
        for (path, text, mode) in &all {
            files::write(path, text.as_bytes(), *mode)?;
        }
        let (dir, specs) = (dir.display(), if outcome.apps.len() == 1 { "spec" } else { "specs" });
        printer.error(&format!(
            "{} {specs} in {dir}: `demae apply -f {dir} --env-file {dir}` deploys to every host that `deploy.placement` allows",
            outcome.apps.len()
        ));
        Ok(())
    }
}
