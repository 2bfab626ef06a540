//! `demae dev`: a complete demae on one machine, to try it. etcd and nginx are the real ones.
#![expect(clippy::disallowed_methods, reason = "keeps the files of its programs in one directory")]

mod host;
mod process;

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{Ended, Exit, Failed, agent, print::Printer, runtime};
use crate::{
    config::Config,
    host::{docker::Docker, files},
    shutdown, telemetry,
};
use host::{DevHost, Place};
use process::{START_STOP_TIMEOUT, end, free_address, program, random, running, spawn, wait_for};

/// Most hosts: each has an agent and an nginx of its own.
const MOST_HOSTS: u8 = 9;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Keep all files in this directory, with `dev.env` to source; a temporary one unless given
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// How many hosts, each with an nginx and an agent; they share Docker
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u8).range(1..=i64::from(MOST_HOSTS)))]
    hosts: u8,
    /// Keep-alive of clients in nginx
    #[arg(long, value_enum, default_value = "default")]
    profile: ProfileArg,
    /// What is logged
    #[arg(long, env = "DEMAE_LOG", default_value = "info", value_name = "FILTER")]
    log: String,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum ProfileArg {
    /// As nginx ships
    Default,
    /// No keep-alive: no request is lost to a reload
    Strict,
}

/// The saved state of a directory, so that a second `dev` in it continues after an interrupted one.
#[derive(Debug, Serialize, Deserialize)]
struct DevState {
    etcd: SocketAddr,
    peer: SocketAddr,
    hosts: Vec<DevHost>,
}

pub(super) fn run(args: &Args, printer: &mut Printer) -> Ended {
    let _telemetry = telemetry::start(&args.log).map_err(Failed::because)?;
    let etcd = program("etcd", "etcd-server")?;
    let nginx = program("nginx", "nginx")?;
    let dir = match &args.dir {
        Some(dir) => {
            fs::create_dir_all(dir).map_err(|e| Failed::because(format!("cannot make `{}`: {e}", dir.display())))?;
            fs::canonicalize(dir)?
        }
        None => temporary()?,
    };
    let is_dev_dir = dir.join("dev.json").exists() || fs::read_dir(&dir)?.next().is_none();
    if !is_dev_dir {
        return Err(Failed::because(format!(
            "`{}` is not empty, and everything in it would be removed in the end; give a directory that is empty or not there",
            dir.display()
        )));
    }
    // Before anything is started or cleaned up: another `dev` may be running here.
    let lock = files::lock(&dir.join("dev.lock"))?;
    let first = !dir.join("dev.json").exists();
    let state = DevState::open(&dir, args.hosts)?;
    if state.hosts.len() != usize::from(args.hosts) {
        let count = state.hosts.len();
        return Err(Failed::because(format!(
            "`{}` is of a `dev` with {count} hosts that was interrupted; give `--hosts {count}`, or another directory",
            dir.display()
        )));
    }
    let places = state.places(&dir);
    let configs = places.iter().map(|place| place.config(state.etcd, &nginx, args.profile));
    let configs = configs.collect::<Result<Vec<Config>, Failed>>()?;
    let runtime = runtime(2)?;
    if let Some(config) = configs.first()
        && let Err(e) = runtime.block_on(docker_answers(config))
    {
        // Nothing was started, so only these files need to be removed.
        if first {
            let _ = fs::remove_file(dir.join("dev.json"));
            places.iter().for_each(Place::remove_files);
        }
        drop(lock);
        let _ = fs::remove_file(dir.join("dev.lock"));
        if args.dir.is_none() {
            let _ = fs::remove_dir(&dir);
        }
        return Err(e);
    }
    let hosts: Vec<(&Place<'_>, &Config)> = places.iter().zip(&configs).collect();
    let ended = runtime.block_on(async {
        let tasks = TaskTracker::new();
        let (graceful, forced) = shutdown::on_signals(&tasks)?;
        let up = async {
            state.start_etcd(&dir, &etcd)?;
            hosts.iter().try_for_each(|(place, config)| place.start_nginx(&nginx, config))?;
            wait_for(state.etcd, "etcd", &dir.join("etcd.log")).await?;
            for (place, _) in &hosts {
                place.nginx_is_up().await?;
            }
            Ok::<_, Failed>(())
        };
        let ended = match up.await {
            Err(e) => Err(e),
            Ok(()) => {
                let ready = async {
                    for (place, _) in &hosts {
                        place.agent_is_ready().await;
                    }
                    // From here on, commands find what they need.
                    state.write_env(&dir)?;
                    state.print_usage(&dir, printer);
                    Ok::<_, Failed>(())
                };
                let mut serving = std::pin::pin!(serve(&configs, graceful));
                let by_force = || Err(Failed::because("ended at once by a second signal; containers may be left"));
                tokio::select! {
                    ended = &mut serving => ended,
                    () = forced.cancelled() => by_force(),
                    ready = ready => match ready {
                        Err(e) => Err(e),
                        Ok(()) => tokio::select! {
                            ended = serving => ended,
                            () = forced.cancelled() => by_force(),
                        },
                    },
                }
            }
        };
        printer.error("cleaning up: containers, processes, files");
        for (place, config) in &hosts {
            place.clean_up(config).await;
        }
        end(&dir.join("etcd.pid"), &dir, Signal::TERM).await;
        ended
    });
    runtime.shutdown_background();
    // Only what `dev` created: the directory may hold other files.
    places.iter().rev().for_each(Place::remove_files);
    let _ = fs::remove_dir_all(dir.join("etcd"));
    for name in ["dev.env", "dev.json", "dev.lock", "etcd.log", "etcd.pid"] {
        let _ = fs::remove_file(dir.join(name));
    }
    drop(lock);
    if args.dir.is_none() {
        let _ = fs::remove_dir(&dir);
    }
    ended
}

/// Runs the agents until they are to end, or one of them has failed.
async fn serve(configs: &[Config], graceful: CancellationToken) -> Ended {
    let mut agents = JoinSet::new();
    for config in configs {
        let (config, token) = (config.clone(), graceful.clone());
        agents.spawn(async move { agent::serve(&config, false, token).await });
    }
    let mut result = Ok(Exit::Success);
    while let Some(ended) = agents.join_next().await {
        graceful.cancel();
        match ended {
            Ok(Ok(_)) => {}
            Ok(Err(failed)) => result = Err(failed),
            Err(e) => result = Err(Failed::because(format!("an agent ended: {e}"))),
        }
    }
    result
}

impl DevState {
    /// Loads the state of an interrupted `dev` in this directory, or creates one.
    fn open(dir: &Path, hosts: u8) -> Result<Self, Failed> {
        let path = dir.join("dev.json");
        if let Ok(text) = fs::read(&path)
            && let Ok(state) = serde_json::from_slice::<DevState>(&text)
            && !state.hosts.is_empty()
        {
            return Ok(state);
        }
        let name = format!("dev-{}", random()?);
        let name_of = |n: u8| if hosts == 1 { name.clone() } else { format!("{name}-{}", n + 1) };
        let hosts = (0..hosts).map(|n| DevHost::new(name_of(n))).collect::<Result<_, _>>()?;
        let state = DevState { etcd: free_address()?, peer: free_address()?, hosts };
        fs::write(&path, serde_json::to_vec_pretty(&state)?)?;
        Ok(state)
    }

    /// The first host is in the directory itself, the others are below it.
    fn places(&self, dir: &Path) -> Vec<Place<'_>> {
        let place = |(number, host)| {
            let dir = if number == 0 { dir.to_owned() } else { dir.join(format!("host{}", number + 1)) };
            Place { host, number, dir }
        };
        (0..).zip(&self.hosts).map(place).collect()
    }

    fn start_etcd(&self, dir: &Path, etcd: &Path) -> Result<(), Failed> {
        let pid_file = dir.join("etcd.pid");
        if running(&pid_file, dir).is_some() {
            return Ok(());
        }
        let url = |address: SocketAddr| format!("http://{address}");
        let mut command = tokio::process::Command::new(etcd);
        command
            .args(["--name", "dev", "--logger", "zap", "--log-level", "error", "--initial-cluster"])
            .arg(format!("dev={}", url(self.peer)))
            .arg("--data-dir")
            .arg(dir.join("etcd"))
            .arg("--listen-client-urls")
            .arg(url(self.etcd))
            .arg("--advertise-client-urls")
            .arg(url(self.etcd))
            .arg("--listen-peer-urls")
            .arg(url(self.peer))
            .arg("--initial-advertise-peer-urls")
            .arg(url(self.peer));
        let pid = spawn(command, &dir.join("etcd.log"))?;
        fs::write(pid_file, pid.to_string())?;
        Ok(())
    }

    /// What commands in another terminal need. The first host is the one that `demae status` and the like ask.
    fn environment(&self, dir: &Path) -> Vec<(String, String)> {
        let mut all = vec![("ETCDCTL_API".to_owned(), "3".to_owned())];
        all.push(("ETCDCTL_ENDPOINTS".to_owned(), self.etcd.to_string()));
        for (number, host) in self.hosts.iter().enumerate() {
            let suffix = if number == 0 { String::new() } else { format!("_{}", number + 1) };
            all.push((format!("DEMAE_INGRESS{suffix}"), format!("http://{}", host.ingress)));
            if number == 0 {
                all.push(("DEMAE_METRICS".to_owned(), format!("http://{}/metrics", host.metrics)));
            }
        }
        all.push(("DEMAE_CONFIG".to_owned(), format!("{}/agent.toml", dir.display())));
        all
    }

    fn write_env(&self, dir: &Path) -> Result<(), Failed> {
        let lines = self.environment(dir).into_iter().map(|(name, value)| format!("export {name}={value}\n"));
        let beside = dir.join(".dev.env.new");
        fs::write(&beside, lines.collect::<String>())?;
        fs::rename(beside, dir.join("dev.env"))?;
        Ok(())
    }

    fn print_usage(&self, dir: &Path, printer: &mut Printer) {
        let names: Vec<String> = self.hosts.iter().map(|host| format!("`{}`", host.host)).collect();
        let as_hosts = if names.len() == 1 { "host" } else { "hosts" };
        printer.line(&format!("demae runs as {as_hosts} {}, in {}\n", names.join(", "), dir.display()));
        for (name, value) in self.environment(dir) {
            printer.line(&format!("  export {name}={value}"));
        }
        printer.line("\nTry, in another terminal:\n");
        printer.line(
            "  etcdctl put /demae/apps/hello/spec '{image: IMAGE, ingress: {hosts: [hello.localhost], port: 8080}}'",
        );
        printer.line("  demae wait hello");
        printer.line("  curl -H 'Host: hello.localhost' $DEMAE_INGRESS\n");
        printer.line("Ctrl-C stops it and removes its containers, processes and files.");
    }
}

/// Checks that this user can reach Docker.
async fn docker_answers(config: &Config) -> Result<(), Failed> {
    let docker = Docker::behind(&config.docker_socket, config.host.clone()).with_timeout(START_STOP_TIMEOUT);
    docker.version().await.map(drop).map_err(|e| {
        Failed::try_later(format!(
            "{e}; start Docker, and let this user use `{}`: as root, or in the group docker",
            config.docker_socket
        ))
    })
}

fn temporary() -> Result<PathBuf, Failed> {
    let dir = std::env::temp_dir().join(format!("demae-dev-{}", random()?));
    fs::create_dir(&dir)?;
    Ok(dir)
}
