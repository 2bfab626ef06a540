//! Observes this host: turns containers, files and nginx into values that a plan is made from. Changes nothing.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{SocketAddr, SocketAddrV4},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use crate::{
    host::{
        clock::Clock,
        docker::{Docker, DockerError, Found, Instances},
        drain::{CountedEndpoint, Counter},
        files::{self, FileError},
        health::{ProbeTarget, Prober, Reach, extra_endpoints, host_header},
        images::Images,
        layout::Layout,
        nginx::Nginx,
        ports::{self, Ports},
        tcp_routes::{TcpRouteError, TcpRoutes},
    },
    model::{
        name::{AppName, ContainerId, HostName, ImageDigest, ReleaseId},
        observed::{Address, Health, Instance, InstanceKey, ObservedApp, Phase, Verdict, Via, Wanted},
        spec::Endpoint,
        time::Timestamp,
    },
};

/// This host, with everything that observes or changes it.
pub struct World {
    /// Its name.
    pub host: HostName,
    /// The Docker engine.
    pub docker: Docker,
    /// Images that were pulled here, and what is pulled.
    pub images: Images,
    /// nginx.
    pub nginx: Nginx,
    /// Paths of files.
    pub layout: Layout,
    /// Loopback ports.
    pub ports: Ports,
    /// Routes by the kernel's table.
    pub tcp_routes: TcpRoutes,
    /// The monotonic clock.
    pub clock: Arc<Clock>,
    /// Health checks; `None` in commands that observe once.
    pub prober: Option<Prober>,
    /// How connections are counted, of the instances that were counted at the last observation of each app.
    pub counters: Mutex<HashMap<AppName, HashMap<ContainerId, Counter>>>,
    /// Release commands whose container this agent has seen, by app and the start in their record.
    pub commands: Mutex<BTreeSet<(AppName, Timestamp)>>,
}

/// Why something could not be observed. Nothing is concluded from it.
#[derive(Debug, thiserror::Error)]
pub enum ObserveError {
    /// Docker.
    #[error(transparent)]
    Docker(#[from] DockerError),
    /// Files.
    #[error(transparent)]
    File(#[from] FileError),
    /// Routes by the kernel's table.
    #[error(transparent)]
    TcpRoute(#[from] TcpRouteError),
}

impl ObserveError {
    /// Whether Docker could not be reached, or did not answer in time.
    pub fn is_docker_away(&self) -> bool {
        matches!(self, Self::Docker(DockerError::Unreachable { .. }))
    }
}

impl World {
    /// Everything of one app, with these containers if a list has just named them. The image is inspected only if no
    /// instance tells its id.
    ///
    /// # Errors
    /// If anything cannot be observed; a part never counts as the whole.
    pub async fn observe_app(
        &self,
        app: &AppName,
        wanted: Option<&Wanted>,
        listed: Option<Vec<String>>,
    ) -> Result<ObservedApp, ObserveError> {
        let Instances { own: found, foreign } = self.docker.instances(app, listed, &self.clock).await?;
        let (image, image_digest) = match wanted {
            Some(wanted) => self.image(&found, wanted).await?.unzip(),
            None => (None, None),
        };
        let group = if found.is_empty() { None } else { self.nginx_group().await };
        let mut observed = ObservedApp { image, image_digest: image_digest.flatten(), foreign, ..self.traces(app)? };
        // Connections are counted only for instances that may be leaving: not for a single instance of a wanted app,
        // nor for one with a route.
        let has_several = found.len() > 1;
        self.counters.lock().unwrap_or_else(PoisonError::into_inner).remove(app);
        observed.instances = found
            .into_iter()
            .map(|f| {
                let leaving = wanted.is_none_or(|w| f.key.release != w.release) || has_several;
                let is_routed = |via: &Via| observed.routes(*via).values().flatten().any(|key| *key == f.key);
                let count = leaving && !Via::ALL.iter().any(is_routed);
                self.instance(f, group, count)
            })
            .collect();
        self.check_routes(app, &mut observed)?;
        let slots = wanted.map_or(0, |wanted| wanted.slots);
        self.check_table(app, slots, &mut observed).await?;
        if let Some(prober) = &self.prober {
            let alive: Vec<_> = observed.instances.iter().filter(|i| i.is_alive()).map(|i| &i.id).collect();
            prober.retain(app, &alive);
        }
        Ok(observed)
    }

    /// Clears a slot unless the routes of all endpoints lead to its instance: a switch may have been interrupted.
    fn check_routes(&self, app: &AppName, observed: &mut ObservedApp) -> Result<(), FileError> {
        for (slot, key) in &mut observed.slots {
            let Some(instance) = observed.instances.iter().find(|i| Some(&i.key) == key.as_ref()) else { continue };
            let has_several = !instance.more.is_empty();
            for address in instance.addresses().filter(|_| has_several) {
                let Address::Socket(path) = address else { continue };
                let route = self.layout.route_named(app, *slot, Path::new(path));
                if files::read_link(&route)?.as_deref() != Some(Path::new(path)) {
                    *key = None;
                }
            }
        }
        Ok(())
    }

    /// Takes where the slots lead from the kernel's table, and adds the stable addresses of those that the app is to
    /// have.
    async fn check_table(&self, app: &AppName, wanted: u16, observed: &mut ObservedApp) -> Result<(), TcpRouteError> {
        if observed.slot_addresses.is_empty() && wanted == 0 {
            return Ok(());
        }
        let slots = self.tcp_routes.read(app)?;
        if !slots.0.is_empty() {
            let elements = self.tcp_routes.elements().await?;
            let instances = &observed.instances;
            let leads_to = |at: &SocketAddrV4| instances.iter().find(|i| i.address == Some(Address::Own(*at)));
            let mapped = slots.0.iter().filter_map(|(n, slot)| match elements.get(&slot.address) {
                Some(at) => Some((*n, leads_to(at).map(|instance| instance.key.clone()))),
                None => slot.to.as_ref().map(|_| (*n, None)),
            });
            observed.mapped = mapped.collect();
        }
        observed.slot_addresses = self.tcp_routes.stable_addresses(app, &slots, wanted)?;
        Ok(())
    }

    /// The image of a release; inspected only if no live instance has it: an engine keeps the image of a live
    /// container, unless the image was removed while the container was dead.
    async fn image(
        &self,
        found: &[Found],
        wanted: &Wanted,
    ) -> Result<Option<(String, Option<ImageDigest>)>, ObserveError> {
        let mut known = None;
        for found in found.iter().filter(|f| f.key.release == wanted.release) {
            if found.is_alive() && !wanted.image_lost {
                return Ok(None);
            }
            known = known.or(Some(found.image.as_str()));
        }
        // The tag may point to another image by now; the release's first image takes precedence.
        if let Some(known) = known
            && let Some(id) = self.docker.image(known).await?
        {
            return Ok(Some((id, None)));
        }
        let found = self.docker.image(&wanted.image.fixed(wanted.digest.as_ref()).tagged()).await?;
        Ok(found.map(|id| {
            let digest = wanted.digest.clone().or_else(|| self.images.digest(&wanted.image, &id));
            (id, digest)
        }))
    }

    /// Only an app's files.
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
        let slots = self.tcp_routes.read(app)?;
        observed.slot_addresses = slots.0.iter().map(|(n, slot)| (*n, slot.address)).collect();
        let led = slots.0.into_iter().filter_map(|(n, slot)| Some((n, Some(slot.to?.instance))));
        observed.mapped = led.collect();
        // Without a directory no symlink was ever changed, without a file no entry of the table.
        let changed = files::modified(&routes)?.max(files::modified(&layout.tcp_route(app))?);
        observed.slots_changed = self.clock.to_monotonic(changed.unwrap_or_default());
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
            let why = "; without it the release is proven again";
            observed.proven = Some(release.map_err(|e| FileError::unreadable(&path, &e.to_string(), why))?);
            observed.proven_at = files::modified(&path)?;
        }
        for name in files::list(&layout.verdicts(app))? {
            let path = layout.verdicts(app).join(&name);
            // It may have been removed since the list.
            let Some(text) = files::read(&path)? else { continue };
            let verdict = serde_json::from_slice::<Verdict>(&text);
            let why = "; without it the release is tried again";
            let verdict = verdict.map_err(|e| FileError::unreadable(&path, &e.to_string(), why))?;
            let verdict = Verdict { at: self.clock.to_monotonic(verdict.at), ..verdict };
            observed.verdicts.insert(verdict.release.clone(), verdict);
        }
        Ok(observed)
    }

    /// Files of all apps, by app; `None` for an app whose files cannot be read: the observation of that app reports
    /// why.
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

    /// Apps that have any files.
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

    /// Where an instance takes requests that binds this path inside its container.
    pub(crate) fn socket_address(&self, app: &AppName, key: &InstanceKey, inside: &str) -> Address {
        let name = Path::new(inside).file_name().unwrap_or_default();
        Address::Socket(self.layout.socket_dir(app, key).join(name).to_string_lossy().into_owned())
    }

    fn instance(&self, found: Found, group: Option<u32>, count: bool) -> Instance {
        let address = match (&found.endpoint, found.fixed, found.port) {
            (Some(Endpoint::Socket(path)), ..) => Some(self.socket_address(&found.app, &found.key, path)),
            (Some(Endpoint::Port(inside)), Some(own), _) => Some(Address::Own(SocketAddrV4::new(own, *inside))),
            (Some(Endpoint::Port(_)), None, Some(port)) => Some(Address::Port(port)),
            _ => None,
        };
        let more = found.more.iter().filter_map(|(endpoint, port)| match endpoint {
            Endpoint::Socket(path) => Some(self.socket_address(&found.app, &found.key, path)),
            Endpoint::Port(_) => port.map(Address::Port),
        });
        let more: Vec<Address> = more.collect();
        let all = found.endpoint.iter().chain(found.more.iter().map(|(endpoint, _)| endpoint));
        let mut listens: Vec<Endpoint> = all.cloned().collect();
        // An unpublished port has no address, which would shift the pairs.
        if listens.len() != address.iter().chain(&more).count() {
            listens.clear();
        }
        let running = found.phase == Phase::Running;
        let alive = found.is_alive();
        let probed = match (&address, &self.prober) {
            (Some(address), Some(prober)) if alive => {
                let (check, started, restarts) = (found.check.clone(), found.started, found.restarts);
                let container_addr = match (&found.endpoint, found.ip) {
                    (Some(Endpoint::Port(port)), Some(ip)) => Some(SocketAddr::new(ip, *port)),
                    _ => None,
                };
                let host = host_header(&check, found.check_host.as_deref());
                let (address, reach) = (address.clone(), Reach { group, container_addr });
                let inside = found.more.iter().filter_map(|(endpoint, _)| match endpoint {
                    Endpoint::Port(inside) => Some(*inside),
                    Endpoint::Socket(_) => None,
                });
                let inside = inside.collect::<Vec<u16>>();
                let more = extra_endpoints(&more, found.ip, &inside);
                prober.probe(
                    &found.app,
                    &found.id,
                    ProbeTarget { address, check, started, restarts, reach, host, more },
                )
            }
            _ => Health::Unknown,
        };
        let health = found.health.clone().unwrap_or(probed);
        let counter = if running && count { counter(&found, address.as_ref(), &more) } else { None };
        let connections = counter.as_ref().and_then(|counter| counter.count(self.nginx.known_master()));
        if let Some(counter) = counter {
            let mut counters = self.counters.lock().unwrap_or_else(PoisonError::into_inner);
            counters.entry(found.app.clone()).or_default().insert(found.id.clone(), counter);
        }
        let is_not_socket =
            |a: &Address| matches!(a, Address::Socket(path) if files::expect_socket(Path::new(path)).is_err());
        let has_moved = running && found.fixed.is_some_and(|own| found.ip != Some(own.into()));
        let wrong_address = has_moved || address.iter().chain(&more).any(is_not_socket);
        let all = || address.iter().chain(&more);
        let port_taken = !alive && all().any(|a| matches!(a, Address::Port(port) if ports::is_taken(*port)));
        let exists = |a: &Address| matches!(a, Address::Socket(path) if Path::new(path).symlink_metadata().is_ok());
        let stale_socket = !running && all().any(exists);
        let own = self.layout.sockets();
        let binds = found.binds.into_iter().filter(|bind| !Path::new(&bind.source).starts_with(&own)).collect();
        Instance {
            key: found.key,
            id: found.id,
            image: found.image,
            requested_image: found.requested_image,
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
            wrong_address,
            port_taken,
            idle_at: None,
            binds,
        }
    }

    /// Counts the connections of instances of an app again, as they were counted at the last observation; `None` if they cannot be
    /// counted, which is not zero.
    pub fn recount(&self, app: &AppName, ids: &[ContainerId]) -> Vec<(ContainerId, Option<usize>)> {
        let counters =
            self.counters.lock().unwrap_or_else(PoisonError::into_inner).get(app).cloned().unwrap_or_default();
        let nginx = self.nginx.known_master();
        let count = |id: &ContainerId| counters.get(id).and_then(|counter| counter.count(nginx));
        ids.iter().map(|id| (id.clone(), count(id))).collect()
    }
}

/// How the connections of an instance are counted; `None` if it takes none, or its process is unknown.
fn counter(found: &Found, first: Option<&Address>, more: &[Address]) -> Option<Counter> {
    let endpoints = found.endpoint.iter().chain(found.more.iter().map(|(endpoint, _)| endpoint));
    let addresses: Vec<&Address> = first.into_iter().chain(more).collect();
    let one = |(address, endpoint): (&&Address, &Endpoint)| match (address, endpoint) {
        (Address::Socket(path), _) => Some(CountedEndpoint::Socket(path.into())),
        (Address::Port(published), Endpoint::Port(inside)) => {
            Some(CountedEndpoint::Port { inside: *inside, published: Some(*published) })
        }
        (Address::Own(own), _) => Some(CountedEndpoint::Port { inside: own.port(), published: None }),
        (Address::Port(_), Endpoint::Socket(_)) => None,
    };
    let endpoints: Option<Vec<CountedEndpoint>> = addresses.iter().zip(endpoints).map(one).collect();
    let endpoints = endpoints.filter(|counted| !counted.is_empty() && counted.len() == addresses.len())?;
    Some(Counter { container: found.pid?, endpoints })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{
        nginx::{Local, NginxConfig, Profile, Settings},
        tcp_routes,
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
            counters: Mutex::default(),
            commands: Mutex::default(),
            tcp_routes: TcpRoutes::new(
                tcp_routes::Settings {
                    enabled: false,
                    network: "demae".into(),
                    bridge: "demae0".into(),
                    subnet: "172.30.0.0/16".parse().expect("a network"),
                    range: "198.18.0.0/16".parse().expect("a network"),
                },
                &host,
                layout.clone(),
                Docker::behind("/nowhere/docker.sock", host.clone()),
            ),
            images: Images::new(
                Docker::behind("/nowhere/docker.sock", host.clone()),
                layout.clone(),
                crate::host::images::Limits::default(),
                crate::host::archive::Fetchers::new(),
            ),
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
    fn unreadable_traces_are_an_error_not_absence() {
        let dir = tempfile::tempdir().expect("a directory");
        let world = world(dir.path());
        let app = AppName::try_from("web").expect("a name");
        let seen = || world.traces(&app).map_err(|e| crate::model::problem::chain(&e));
        assert_eq!(seen(), Ok(ObservedApp::default()), "no files is a valid observation");
        let put = |path: &Path, text: &str| {
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
            std::fs::write(path, text).expect("a file");
        };
        let proven = world.layout.proven(&app);
        put(&proven, "0123456789ab\n");
        assert_eq!(seen().map(|o| o.proven.map(|r| r.to_string())), Ok(Some("0123456789ab".to_owned())));
        assert!(seen().is_ok_and(|o| o.proven_at.is_some_and(|at| at > Timestamp::default())));
        put(&proven, "");
        let error = seen().expect_err("an empty one names no release");
        assert!(error.contains("proven/web") && error.contains("remove it"), "{error}");
        std::fs::remove_file(&proven).expect("removed");
        std::fs::create_dir(&proven).expect("a directory");
        assert!(seen().is_err(), "a directory in place of the file");
        std::fs::remove_dir(&proven).expect("removed");

        let verdict = world.layout.verdicts(&app).join("0123456789ab.json");
        put(&verdict, "{");
        let error = seen().expect_err("a truncated verdict");
        assert!(error.contains("0123456789ab.json") && error.contains("tried again"), "{error}");
        put(&world.layout.proven(&AppName::try_from("other").expect("a name")), "0123456789ab\n");
        let all: Vec<bool> = world.all_traces().expect("a list").into_values().map(|traces| traces.is_some()).collect();
        assert_eq!(all, [true, false], "only that app is unreadable");
        std::fs::remove_file(&verdict).expect("removed");

        put(&world.layout.app_routes(&app), "no directory");
        assert!(seen().is_err(), "routes that cannot be listed");
    }
}
