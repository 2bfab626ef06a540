//! `demae takeover`

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::{Edit, Fleet, commit, delete};
use crate::{
    cli::{Common, Ended, Exit, Failed, Format, print::Printer, runtime},
    config::Config,
    host::{
        docker::Docker,
        drain::{CountedEndpoint, Counter},
        files,
        layout::Layout,
        probe,
        takeover::{Takeover, Takeovers},
    },
    model::{
        name::{AppName, ContainerId, VirtualHost},
        spec::Spec,
        status::{AppStatus, HostStatus, State},
        text,
    },
    store::keys::Key,
};

/// Between two looks at the agent, at connections, or at a container that starts.
const LOOK: Duration = Duration::from_millis(200);
/// How long something must hold the app back before that is the outcome.
const SETTLED: Duration = Duration::from_secs(5);
/// What the old container has to end.
const GRACE: Duration = Duration::from_secs(30);

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// The app; its spec is in the store
    #[arg(value_name = "APP")]
    app: String,
    /// The container that has served its virtual hosts so far
    #[arg(long, value_name = "CONTAINER", required_unless_present = "undo")]
    from: Option<String>,
    /// Its port inside, if several are published
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// Longest wait for open connections of the old container
    #[arg(long, value_name = "DURATION", default_value = "30s")]
    drain: String,
    /// Longest wait for the app
    #[arg(long, value_name = "DURATION", default_value = "5m")]
    timeout: String,
    /// Start the old container again, and remove the app
    #[arg(long, conflicts_with_all = ["from", "port"])]
    undo: bool,
    #[command(flatten)]
    common: Common,
}

pub(in crate::cli) fn run(args: &Args, printer: &mut Printer) -> Ended {
    let app = AppName::try_from(args.app.as_str())?;
    let duration = |flag: &str, given: &str| text::duration(given).map_err(|e| Failed::usage(format!("{flag}: {e}")));
    let (drain, timeout) = (duration("--drain", &args.drain)?, duration("--timeout", &args.timeout)?);
    let config = Config::load(&args.common)?;
    let layout = Layout::new(&config.state_dir, &config.run_dir);
    let docker = Docker::behind(&config.docker_socket, config.host.clone());
    let here = Here { config, layout, docker, timeout };
    runtime(1)?.block_on(async {
        match &args.from {
            Some(from) => here.take(&app, from, args.port, drain, printer).await,
            None => here.undo(&app, printer).await,
        }
    })
}

/// This host.
struct Here {
    config: Config,
    layout: Layout,
    docker: Docker,
    timeout: Duration,
}

/// The container that is taken over from.
struct Old {
    id: ContainerId,
    name: String,
    restart: String,
    /// The port inside, and the one that is published.
    port: (u16, Option<u16>),
    address: SocketAddr,
}

impl Here {
    async fn take(
        &self,
        app: &AppName,
        from: &str,
        port: Option<u16>,
        drain: Duration,
        printer: &mut Printer,
    ) -> Ended {
        let old = self.old(from, port).await?;
        let hosts = self.hosts(app).await?;
        if probe::connect_tcp(old.address, Duration::from_secs(2)).await.is_err() {
            return Err(Failed::because(format!(
                "`{}` does not answer at {}; nothing was changed",
                old.name, old.address
            )));
        }
        let before = Takeovers::read(&self.layout)?.0.remove(app);
        let is_again = before.as_ref().is_some_and(|before| before.container == old.name);
        if !is_again && !self.status(app).await?.is_some_and(|status| status.is("routes_rejected")) {
            return Err(Failed::because(format!(
                "{app} is not held back by a hand-written server on this host, so it has nothing to take over; nothing was changed"
            )));
        }
        // The policy from before the first try.
        let restart = before.as_ref().filter(|_| is_again).map_or(&old.restart, |before| &before.restart).clone();
        let (container, port) = (old.name.clone(), old.port.0);
        self.record(app, Some(Takeover { hosts: hosts.clone(), container, restart, port }))?;
        let patience = self.hint();
        let names: Vec<&str> = hosts.iter().map(VirtualHost::as_str).collect();
        printer.error(&format!("waiting until {app} is healthy and has {}", names.join(", ")));
        if let Err(failed) = self.converged(app, patience).await {
            // What was not taken is left alone from now on; what was taken is served.
            self.record(app, before)?;
            return Err(Failed { message: format!("{}; `{}` was not touched", failed.message, old.name), ..failed });
        }
        if !self.drain(&old, drain, printer).await? {
            return Err(Failed::blocked(format!(
                "{app} serves {}; `{}` still has connections after {} s, and was not stopped: from clients that stay, or by an address on which demae does not listen, such as port 443. Once it has none: docker update --restart=no {} && docker stop {}",
                names.join(", "),
                old.name,
                drain.as_secs(),
                old.name,
                old.name
            )));
        }
        self.docker.set_restart(&old.id, "no").await?;
        self.docker.stop(&old.id, GRACE).await?;
        printer.line(&format!("{app} serves {}; `{}` is stopped, and kept", names.join(", "), old.name));
        printer.error(&format!("to undo it: demae takeover {app} --undo"));
        Ok(Exit::Success)
    }

    /// The container, if it runs and another program's.
    async fn old(&self, from: &str, port: Option<u16>) -> Result<Old, Failed> {
        let (found, _) = self.docker.inspect_with_image(from).await?;
        let name = found["Name"].as_str().unwrap_or(from).trim_start_matches('/').to_owned();
        if found["State"]["Running"] != true {
            return Err(Failed::because(format!("`{name}` does not run")));
        }
        if found["Config"]["Labels"]["demae.app"].is_string() {
            return Err(Failed::because(format!("`{name}` is an instance of an app of demae already")));
        }
        let ports = published(&found);
        let port = match (port, ports.as_slice()) {
            (Some(inside), _) => {
                (inside, ports.iter().find(|(port, _)| *port == inside).map(|(_, published)| *published))
            }
            (None, [(inside, published)]) => (*inside, Some(*published)),
            (None, _) => {
                return Err(Failed::usage(format!(
                    "`{name}` publishes {} ports; `--port` says which one the hand-written server forwards to",
                    ports.len()
                )));
            }
        };
        if found["HostConfig"]["AutoRemove"] == true {
            return Err(Failed::because(format!(
                "`{name}` was started with `--rm`: it would be gone once it is stopped, and could not be started again"
            )));
        }
        let id = ContainerId::try_from(found["Id"].as_str().unwrap_or_default())?;
        let address = self.address(&id, &name, port.0).await?;
        let restart = found["HostConfig"]["RestartPolicy"]["Name"].as_str().unwrap_or("no");
        let restart = if restart.is_empty() { "no" } else { restart };
        Ok(Old { id, name, restart: restart.to_owned(), port, address })
    }

    /// Where the container itself listens. Its published port proves nothing: Docker's proxy accepts any connection.
    async fn address(&self, id: &ContainerId, name: &str, inside: u16) -> Result<SocketAddr, Failed> {
        let own = self.docker.address_of(id).await?;
        let own = own.ok_or_else(|| Failed::because(format!("`{name}` has no address of its own")))?;
        Ok(SocketAddr::new(own, inside))
    }

    /// The virtual hosts of the app.
    async fn hosts(&self, app: &AppName) -> Result<BTreeSet<VirtualHost>, Failed> {
        let fleet = Fleet::read(&self.config.etcd).await?;
        fleet.app(app)?;
        let text =
            fleet.contents.entry(&Key::Spec(app.clone())).map(|entry| entry.value().to_vec()).unwrap_or_default();
        let ingress = Spec::parse(&text)?.ingress;
        let ingress = ingress.ok_or_else(|| Failed::because(format!("the spec of {app} has no `ingress`")))?;
        Ok(ingress.all().flat_map(|way| way.hosts.clone()).collect())
    }

    /// Writes down what the app may take, or that it may take nothing.
    fn record(&self, app: &AppName, takeover: Option<Takeover>) -> Result<(), Failed> {
        let mut takeovers = Takeovers::read(&self.layout)?;
        match takeover {
            None => drop(takeovers.0.remove(app)),
            Some(takeover) => drop(takeovers.0.insert(app.clone(), takeover)),
        }
        Ok(takeovers.write(&self.layout)?)
    }

    /// Makes the agent look at nginx's files now. Returns how long it may be held back before that is the outcome: an
    /// agent that cannot be reached looks by itself.
    fn hint(&self) -> Duration {
        let agent = files::lock_holder(&self.layout.lock()).and_then(Pid::from_raw);
        match agent.map(|agent| kill_process(agent, Signal::HUP)) {
            Some(Ok(())) => SETTLED,
            _ => self.config.resync + SETTLED,
        }
    }

    async fn status(&self, app: &AppName) -> Result<Option<AppStatus>, Failed> {
        let address = self.config.listen.to_string();
        let answer = probe::get_tcp(&address, "localhost", "/status", Duration::from_secs(5)).await;
        let answer = answer.map_err(|e| Failed::because(format!("the agent of this host does not answer: {e}")))?;
        let status: HostStatus = serde_json::from_str(&answer.body)?;
        Ok(status.apps.into_iter().find(|status| status.app == app.as_str()))
    }

    /// Waits until the app has converged on this host.
    async fn converged(&self, app: &AppName, patience: Duration) -> Result<(), Failed> {
        let began = Instant::now();
        let mut held: Option<Instant> = None;
        loop {
            let status = self.status(app).await?;
            let reason = match &status {
                None => "it does not run on this host".to_owned(),
                // What was refused before may be its state still.
                Some(status) if status.state == State::Converged && status.healthy > 0 => return Ok(()),
                Some(status) => status.reason.clone(),
            };
            let is_stopped = status
                .as_ref()
                .is_none_or(|status| matches!(status.state, State::Blocked | State::Invalid | State::Paused));
            held = if is_stopped { held.or(Some(Instant::now())) } else { None };
            if held.is_some_and(|since| since.elapsed() > patience) {
                return Err(Failed::blocked(format!("{app}: {reason}")));
            }
            if began.elapsed() > self.timeout {
                return Err(Failed::undecided(format!(
                    "{app} has not converged within {} s: {reason}",
                    self.timeout.as_secs()
                )));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Waits until no connection to the container is open; false if some are at the end.
    async fn drain(&self, old: &Old, drain: Duration, printer: &mut Printer) -> Result<bool, Failed> {
        let Some(container) = self.docker.pid_of(old.id.as_str()).await? else { return Ok(true) };
        let (inside, published) = old.port;
        let endpoints = vec![CountedEndpoint::Port { inside, published }];
        let counter = Counter { container, endpoints };
        let began = Instant::now();
        let mut idle = 0;
        while began.elapsed() < drain {
            match counter.count(None) {
                Some(0) => idle += 1,
                Some(_) => idle = 0,
                None => {
                    printer.error("note: its connections cannot be counted; it is stopped once the drain time is over");
                    tokio::time::sleep(drain.saturating_sub(began.elapsed())).await;
                    return Ok(true);
                }
            }
            // A request may be on its way between two connections.
            if idle > 2 {
                return Ok(true);
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(false)
    }

    async fn undo(&self, app: &AppName, printer: &mut Printer) -> Ended {
        let takeovers = Takeovers::read(&self.layout)?;
        let Some(takeover) = takeovers.0.get(app) else {
            return Err(Failed::because(format!("{app} has taken nothing over on this host")));
        };
        let fleet = Fleet::read(&self.config.etcd).await?;
        let mut others = fleet.statuses.get(app).into_iter().flatten().map(|(host, _)| host);
        if let Some(other) = others.find(|other| **other != self.config.host) {
            return Err(Failed::because(format!(
                "{app} also runs on {other}, and would be removed there, too; let it leave this host by a constraint, and start `{}` by hand",
                takeover.container
            )));
        }
        let (found, _) = self.docker.inspect_with_image(&takeover.container).await?;
        let id = ContainerId::try_from(found["Id"].as_str().unwrap_or_default())?;
        self.docker.set_restart(&id, &takeover.restart).await?;
        self.docker.start(&id).await?;
        let address = self.address(&id, &takeover.container, takeover.port).await?;
        let began = Instant::now();
        while probe::connect_tcp(address, LOOK).await.is_err() {
            if began.elapsed() > self.timeout {
                return Err(Failed::undecided(format!(
                    "`{}` does not answer at {address}; {app} serves on",
                    takeover.container
                )));
            }
            tokio::time::sleep(LOOK).await;
        }
        let (revision, ()) = commit(&self.config.etcd, None, |fleet| match fleet.app(app) {
            Ok(_) => Ok((delete::edit(fleet, app, false)?, ())),
            Err(_) => Ok((Edit::default(), ())),
        })
        .await?;
        let exit = delete::wait_gone(&self.config.etcd, app, (revision, Format::Text), self.timeout, printer).await?;
        if exit == Exit::Success {
            self.record(app, None)?;
            printer.line(&format!("`{}` serves again", takeover.container));
        }
        Ok(exit)
    }
}

/// The published TCP ports of a container: inside, and on this host.
fn published(found: &Value) -> Vec<(u16, u16)> {
    let ports = found["NetworkSettings"]["Ports"].as_object().into_iter().flatten();
    let ports = ports.filter_map(|(inside, bindings)| {
        let inside = inside.strip_suffix("/tcp")?.parse().ok()?;
        let published = bindings.as_array()?.first()?["HostPort"].as_str()?.parse().ok()?;
        Some((inside, published))
    });
    ports.collect()
}
