//! Looks at this host: from containers, files and nginx to values a plan can be made of. Changes nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::Path,
    sync::Arc,
};

use crate::{
    host::{
        clock::Clock,
        docker::{Docker, DockerError, Found, Instances},
        drain,
        files::{self, FileError},
        health::{Prober, Question, Reach, host_asked_for, more_questions},
        layout::Layout,
        nginx::Nginx,
        ports::{self, Ports},
    },
    model::{
        name::{AppName, HostName, ReleaseId},
        observed::{Address, Health, Instance, ObservedApp, Phase, Verdict, Wanted},
        spec::Endpoint,
    },
};

/// This host, and all that can be done to it.
pub struct World {
    /// Which host.
    pub host: HostName,
    /// Containers.
    pub docker: Docker,
    /// nginx.
    pub nginx: Nginx,
    /// Files.
    pub layout: Layout,
    /// Loopback ports.
    pub ports: Ports,
    /// Time.
    pub clock: Arc<Clock>,
    /// Health checks; `None` for whoever only looks.
    pub prober: Option<Prober>,
}

/// Why something could not be seen. Nothing is concluded from it.
#[derive(Debug, thiserror::Error)]
pub enum ObserveError {
    /// Docker.
    #[error(transparent)]
    Docker(#[from] DockerError),
    /// Files.
    #[error(transparent)]
    File(#[from] FileError),
}

impl ObserveError {
    /// Whether Docker is not there, or did not answer in time.
    pub fn is_docker_away(&self) -> bool {
        matches!(self, Self::Docker(DockerError::Unreachable { .. }))
    }
}

impl World {
    /// Everything of one app. The image is looked for only where no instance tells it.
    ///
    /// # Errors
    /// If anything of it cannot be seen; a part is never taken for the whole.
    pub async fn observe_app(&self, app: &AppName, wanted: Option<&Wanted>) -> Result<ObservedApp, ObserveError> {
        let Instances { own: found, foreign } = self.docker.instances(app, &self.clock).await?;
        let image = match wanted {
            Some(wanted) => self.image(&found, wanted).await?,
            None => None,
        };
        let group = if found.is_empty() { None } else { self.nginx_group().await };
        let mut observed = ObservedApp { image, foreign, ..self.traces(app)? };
        // Only who may be leaving is counted: not a single instance of a wanted app, nor one that a route leads to.
        let several = found.len() > 1;
        observed.instances = found
            .into_iter()
            .map(|f| {
                let leaving = wanted.is_none_or(|w| f.key.release != w.release) || several;
                let count = leaving && !observed.slots.values().flatten().any(|k| *k == f.key);
                self.instance(f, group, count)
            })
            .collect();
        self.check_routes(app, &mut observed)?;
        if let Some(prober) = &self.prober {
            let alive: Vec<_> = observed.instances.iter().filter(|i| i.is_alive()).map(|i| &i.id).collect();
            prober.keep(app, &alive);
        }
        Ok(observed)
    }

    /// A slot leads to an instance only if it does so for all places where that listens: a switch may have been cut short.
    fn check_routes(&self, app: &AppName, observed: &mut ObservedApp) -> Result<(), FileError> {
        for (slot, key) in &mut observed.slots {
            let Some(instance) = observed.instances.iter().find(|i| Some(&i.key) == key.as_ref()) else { continue };
            let several = !instance.more.is_empty();
            for address in instance.addresses().filter(|_| several) {
                let Address::Socket(path) = address else { continue };
                let route = self.layout.route_named(app, *slot, Path::new(path));
                if files::read_link(&route)?.as_deref() != Some(Path::new(path)) {
                    *key = None;
                }
            }
        }
        Ok(())
    }

    /// The image of a release, looked for only where no instance that lives tells it: no engine gives up the image of
    /// one that does, unless it was given up while that one was dead.
    async fn image(&self, found: &[Found], wanted: &Wanted) -> Result<Option<String>, ObserveError> {
        let mut known = None;
        for found in found.iter().filter(|f| f.key.release == wanted.release) {
            if found.is_alive() && !wanted.image_lost {
                return Ok(None);
            }
            known = known.or(Some(found.image.as_str()));
        }
        // The tag may be of another image by now; what the release began with comes first.
        if let Some(known) = known
            && let Some(id) = self.docker.image(known).await?
        {
            return Ok(Some(id));
        }
        Ok(self.docker.image(&wanted.image.tagged()).await?)
    }

    /// Only what lies on disk.
    ///
    /// # Errors
    /// If any of it cannot be read.
    pub fn traces(&self, app: &AppName) -> Result<ObservedApp, FileError> {
        let layout = &self.layout;
        let mut observed = ObservedApp::default();
        let routes = layout.app_routes(app);
        for name in files::list(&routes)? {
            let Some(slot) = name.strip_suffix(".sock").and_then(|n| n.parse().ok()) else { continue };
            let target = files::read_link(&routes.join(&name))?;
            observed.slots.insert(slot, target.as_deref().and_then(Layout::instance_of));
        }
        // Without a directory no route has ever changed.
        observed.slots_changed = self.clock.steady(files::modified(&routes)?.unwrap_or_default());
        for release in files::list(&layout.app_env(app))?.into_iter().filter_map(|n| ReleaseId::try_from(n).ok()) {
            if files::modified(&layout.env_file(app, &release))?.is_some() {
                observed.env_files.insert(release);
            }
        }
        observed.socket_dirs =
            files::list(&layout.app_sockets(app))?.iter().filter_map(|n| Layout::parse_key(n)).collect();
        let path = layout.proven(app);
        if let Some(text) = files::read(&path)? {
            let release = ReleaseId::try_from(String::from_utf8_lossy(&text).trim());
            let why = "; without it the release is proven anew";
            observed.proven = Some(release.map_err(|e| FileError::unreadable(&path, &e.to_string(), why))?);
            observed.proven_at = files::modified(&path)?;
        }
        for name in files::list(&layout.verdicts(app))? {
            let path = layout.verdicts(app).join(&name);
            // It may have gone since the list.
            let Some(text) = files::read(&path)? else { continue };
            let verdict = serde_json::from_slice::<Verdict>(&text);
            let why = "; without it the release is tried again";
            let verdict = verdict.map_err(|e| FileError::unreadable(&path, &e.to_string(), why))?;
            let verdict = Verdict { at: self.clock.steady(verdict.at), ..verdict };
            observed.verdicts.insert(verdict.release.clone(), verdict);
        }
        Ok(observed)
    }

    /// What apps have left on disk, by app; `None` of one of which it cannot be read: a look at that app tells why.
    ///
    /// # Errors
    /// If a directory of all apps cannot be listed.
    pub fn all_traces(&self) -> Result<BTreeMap<AppName, Option<ObservedApp>>, FileError> {
        let traces = |app: AppName| {
            let traces = self.traces(&app).ok();
            (app, traces)
        };
        Ok(self.apps_on_disk()?.into_iter().map(traces).collect())
    }

    /// Apps that have left anything on disk.
    ///
    /// # Errors
    /// If a directory cannot be listed.
    pub fn apps_on_disk(&self) -> Result<BTreeSet<AppName>, FileError> {
        let mut apps = BTreeSet::new();
        for dir in self.layout.by_app() {
            apps.extend(files::list(&dir)?.into_iter().filter_map(|n| AppName::try_from(n).ok()));
        }
        Ok(apps)
    }

    async fn nginx_group(&self) -> Option<u32> {
        if rustix::process::geteuid().is_root() { self.nginx.group().await } else { None }
    }

    fn instance(&self, found: Found, group: Option<u32>, count: bool) -> Instance {
        let address = match (&found.endpoint, found.port) {
            (Some(Endpoint::Socket(path)), _) => {
                let name = Path::new(path).file_name().unwrap_or_default();
                let path = self.layout.socket_dir(&found.app, &found.key).join(name);
                Some(Address::Socket(path.to_string_lossy().into_owned()))
            }
            (Some(Endpoint::Port(_)), Some(port)) => Some(Address::Port(port)),
            _ => None,
        };
        let more = found.more.iter().filter_map(|(endpoint, port)| match endpoint {
            Endpoint::Socket(path) => {
                let name = Path::new(path).file_name().unwrap_or_default();
                let path = self.layout.socket_dir(&found.app, &found.key).join(name);
                Some(Address::Socket(path.to_string_lossy().into_owned()))
            }
            Endpoint::Port(_) => port.map(Address::Port),
        });
        let more: Vec<Address> = more.collect();
        let all = found.endpoint.iter().chain(found.more.iter().map(|(endpoint, _)| endpoint));
        let mut listens: Vec<Endpoint> = all.cloned().collect();
        // A port that was not published has no address, so that one would be taken for another.
        if listens.len() != address.iter().chain(&more).count() {
            listens.clear();
        }
        let running = found.phase == Phase::Running;
        let alive = found.is_alive();
        let asked = match (&address, &self.prober) {
            (Some(address), Some(prober)) if alive => {
                let (check, started, restarts) = (found.check.clone(), found.started, found.restarts);
                let own = match (&found.endpoint, found.ip) {
                    (Some(Endpoint::Port(port)), Some(ip)) => Some(SocketAddr::new(ip, *port)),
                    _ => None,
                };
                let host = host_asked_for(&check, found.check_host.as_deref());
                let (address, reach) = (address.clone(), Reach { group, own });
                let inside = found.more.iter().filter_map(|(endpoint, _)| match endpoint {
                    Endpoint::Port(inside) => Some(*inside),
                    Endpoint::Socket(_) => None,
                });
                let inside = inside.collect::<Vec<u16>>();
                let more = more_questions(&more, found.ip, &inside);
                prober.ask(&found.app, &found.id, Question { address, check, started, restarts, reach, host, more })
            }
            _ => Health::Unknown,
        };
        let health = found.health.clone().unwrap_or(asked);
        let connections = match &address {
            Some(address) if running && count => self.all_connections(&found, address, &more),
            _ => None,
        };
        let is_wrong =
            |a: &Address| matches!(a, Address::Socket(path) if files::expect_socket(Path::new(path)).is_err());
        let wrong_socket = address.iter().chain(&more).any(is_wrong);
        let all = || address.iter().chain(&more);
        let port_taken = !alive && all().any(|a| matches!(a, Address::Port(port) if ports::is_taken(*port)));
        let lies_there = |a: &Address| matches!(a, Address::Socket(path) if Path::new(path).symlink_metadata().is_ok());
        let stale_socket = !running && all().any(lies_there);
        Instance {
            key: found.key,
            id: found.id,
            image: found.image,
            ordered: found.ordered,
            phase: found.phase,
            health,
            settled: found.settled,
            leaving: found.leaving,
            out_of_memory: found.out_of_memory,
            started: found.started,
            restarts: found.restarts,
            address,
            more,
            listens,
            connections,
            check: found.check,
            check_host: found.check_host,
            drain: found.drain,
            grace: found.grace,
            stale_socket,
            wrong_socket,
            port_taken,
        }
    }

    /// Connections to all places where an instance listens; `None` where any cannot be counted.
    fn all_connections(&self, found: &Found, address: &Address, more: &[Address]) -> Option<usize> {
        let mut total = self.connections(found, found.endpoint.as_ref(), address)?;
        for ((endpoint, _), address) in found.more.iter().zip(more) {
            total += self.connections(found, Some(endpoint), address)?;
        }
        Some(total)
    }

    /// Connections to an instance; `None` where they cannot be counted, which is not none.
    fn connections(&self, found: &Found, endpoint: Option<&Endpoint>, address: &Address) -> Option<usize> {
        match (address, endpoint, found.pid) {
            (Address::Socket(path), _, Some(pid)) => {
                drain::socket_connections(Path::new(path), self.nginx.known_master(), pid).ok()
            }
            (Address::Port(port), Some(Endpoint::Port(inside)), Some(pid)) => {
                drain::port_connections(pid, *inside, *port).ok()
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        host::nginx::{Local, NginxConfig, Profile, Settings},
        model::time::Timestamp,
    };

    fn world(dir: &Path) -> World {
        let host = HostName::try_from("a").expect("a name");
        let (layout, clock) = (Layout::new(dir.join("state"), dir.join("run")), Arc::new(Clock::default()));
        let settings = Settings {
            listen: Vec::new(),
            default_server: true,
            profile: Profile::Default,
            templates: None,
            trusted: Vec::new(),
        };
        let (conf, pid) = (dir.join("nginx.conf"), dir.join("nginx.pid"));
        let config = NginxConfig { conf, pid, address: "127.0.0.1:1".into(), group: None, settings };
        World {
            docker: Docker::behind("/nowhere/docker.sock", host.clone()),
            nginx: Nginx::new(Box::new(Local { binary: "nginx".into() }), config, layout.clone(), clock.clone()),
            ports: Ports::new(20_000..=20_001),
            prober: None,
            host,
            clock,
            layout,
        }
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "a test writes files of its own")]
    fn what_cannot_be_read_is_not_taken_for_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let world = world(dir.path());
        let app = AppName::try_from("web").expect("a name");
        let seen = || world.traces(&app).map_err(|e| crate::model::problem::chain(&e));
        assert_eq!(seen(), Ok(ObservedApp::default()), "nothing there is nothing there");
        let put = |path: &Path, text: &str| {
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
            std::fs::write(path, text).expect("a file");
        };
        let proven = world.layout.proven(&app);
        put(&proven, "0123456789ab\n");
        assert_eq!(seen().map(|o| o.proven.map(|r| r.to_string())), Ok(Some("0123456789ab".to_owned())));
        assert!(seen().is_ok_and(|o| o.proven_at.is_some_and(|at| at > Timestamp::default())));
        put(&proven, "");
        let told = seen().expect_err("an empty one names no release");
        assert!(told.contains("proven/web") && told.contains("remove it"), "{told}");
        std::fs::remove_file(&proven).expect("removed");
        std::fs::create_dir(&proven).expect("a directory");
        assert!(seen().is_err(), "something else lies there");
        std::fs::remove_dir(&proven).expect("removed");

        let verdict = world.layout.verdicts(&app).join("0123456789ab.json");
        put(&verdict, "{");
        let told = seen().expect_err("a verdict that is cut");
        assert!(told.contains("0123456789ab.json") && told.contains("tried again"), "{told}");
        put(&world.layout.proven(&AppName::try_from("other").expect("a name")), "0123456789ab\n");
        let all: Vec<bool> = world.all_traces().expect("a list").into_values().map(|traces| traces.is_some()).collect();
        assert_eq!(all, [true, false], "only the one app cannot be looked at");
        std::fs::remove_file(&verdict).expect("removed");

        put(&world.layout.app_routes(&app), "no directory");
        assert!(seen().is_err(), "routes that cannot be listed");
    }
}
