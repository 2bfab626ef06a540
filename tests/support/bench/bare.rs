//! The bare steps of a deploy: put, watch, create, start, probe, switch, stop, remove. No plan, no drain, no proof, no
//! safety against crashes.
#![allow(clippy::disallowed_methods, reason = "a benchmark runs programs and writes files of its own")]

use std::{
    collections::HashMap,
    fs,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use bollard::{
    Docker,
    models::{ContainerCreateBody, HostConfig, Mount, MountType, PortBinding},
    query_parameters::{
        CreateContainerOptionsBuilder, InspectContainerOptions, RemoveContainerOptionsBuilder,
        StopContainerOptionsBuilder,
    },
};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::deploy::{Plan, Route};
use crate::support::{containers::remove_all, lab::Lab, names::free_address, process::signal, wait::PATIENCE};

/// The host name that the bare steps serve.
pub const HOST: &str = "bare.test";
/// Between two probes, and two looks at nginx's workers.
const POLL: Duration = Duration::from_millis(1);

/// Deploys of the bare steps.
pub struct Bare {
    route: Route,
    dir: PathBuf,
    ingress: SocketAddr,
    nginx_pid: PathBuf,
    image: String,
    start_ms: usize,
    host: String,
    etcd: String,
    docker: Docker,
    watch: etcd_client::WatchStream,
    count: u32,
    old: Option<String>,
    network: Option<String>,
    _containers: RemoveOnDrop,
}

/// What one deploy was.
pub struct Deployed {
    /// The word after `release=` in its responses.
    pub release: String,
    pub began: Instant,
    /// Until the old container was removed.
    pub took: Duration,
}

impl Bare {
    /// Watches the lab's etcd, and adds its virtual host to the lab's nginx, which must be started anew.
    pub async fn new(lab: &Lab, plan: &Plan, image: &str) -> Self {
        let dir = lab.path("bare");
        fs::create_dir_all(&dir).expect("a directory");
        let etcd = lab.etcd.to_string();
        let mut client = etcd_client::Client::connect([&etcd], None).await.expect("etcd");
        let mut watch = client.watch("/bare", None).await.expect("a watch");
        watch.message().await.expect("it is made");
        let bare = Self {
            route: plan.route,
            ingress: lab.ingress,
            nginx_pid: lab.path("nginx.pid"),
            image: image.to_owned(),
            start_ms: plan.start_ms,
            host: lab.host.clone(),
            docker: Docker::connect_with_unix_defaults().expect("Docker"),
            count: 0,
            old: None,
            network: lab.tcp_routes.as_ref().map(|own| own.network.clone()),
            _containers: RemoveOnDrop(lab.host.clone()),
            dir,
            etcd,
            watch,
        };
        bare.write_server(&format!("unix:{}/current:", bare.dir.display()));
        let others = (0..plan.vhosts).map(|n| bare.server(&format!("other{n}.test"), "unix:/nowhere:"));
        fs::write(bare.dir.join("others.conf"), others.collect::<String>()).expect("a file");
        let conf = fs::read_to_string(lab.path("nginx.conf")).expect("a file");
        let include = format!("http {{ server_names_hash_max_size 8192; include {}/*.conf;", bare.dir.display());
        fs::write(lab.path("nginx.conf"), conf.replacen("http {", &include, 1)).expect("a file");
        bare
    }

    fn server(&self, name: &str, upstream: &str) -> String {
        format!(
            "server {{ listen {}; server_name {name}; location / {{ proxy_pass http://{upstream}; proxy_http_version 1.1; }} }}\n",
            self.ingress
        )
    }

    fn write_server(&self, upstream: &str) {
        fs::write(self.dir.join("bare.conf"), self.server(HOST, upstream)).expect("a file");
    }

    /// One deploy.
    pub async fn deploy(&mut self) -> Deployed {
        self.count += 1;
        let release = format!("bare{}", self.count);
        let dir = self.dir.join(&release);
        fs::create_dir(&dir).expect("a directory");
        let port = free_address().port();
        let began = Instant::now();
        let mut put = Command::new("etcdctl");
        put.env("ETCDCTL_API", "3").args(["--endpoints", &self.etcd, "put", "/bare", &release]).stdout(Stdio::null());
        assert!(put.status().expect("etcdctl runs").success());
        self.watch.message().await.expect("an event").expect("it is open");
        let options = CreateContainerOptionsBuilder::default().name(&format!("{}-{release}", self.host)).build();
        let body = self.container(&release, &dir, port);
        let id = self.docker.create_container(Some(options), body).await.expect("created").id;
        self.docker.start_container(&id, None).await.expect("started");
        match self.route {
            Route::Socket | Route::Table => switch_socket(&dir.join("app.sock"), &self.dir.join("current")).await,
            Route::Port => self.switch_port(&id, port).await,
        }
        if let Some(old) = self.old.replace(id) {
            end(&self.docker, &old).await;
        }
        Deployed { release, began, took: began.elapsed() }
    }

    /// As demae would make it, so that Docker has the same to do.
    fn container(&self, release: &str, dir: &Path, port: u16) -> ContainerCreateBody {
        let mut env = vec![format!("DEMAE_RELEASE={release}"), format!("START_MS={}", self.start_ms)];
        let mut host_config = HostConfig { init: Some(true), ..HostConfig::default() };
        let mut exposed_ports = None;
        match self.route {
            Route::Socket | Route::Table => {
                env.push("SOCKET=/run/app/app.sock".into());
                host_config.mounts = Some(vec![mount(dir)]);
                // Docker takes longer to start a container in a network that is not its default one.
                host_config.network_mode.clone_from(&self.network);
            }
            Route::Port => {
                let binding = PortBinding { host_ip: Some("127.0.0.1".into()), host_port: Some(port.to_string()) };
                host_config.port_bindings = Some(HashMap::from([("8080/tcp".to_owned(), Some(vec![binding]))]));
                exposed_ports = Some(vec!["8080/tcp".to_owned()]);
            }
        }
        ContainerCreateBody {
            image: Some(self.image.clone()),
            env: Some(env),
            labels: Some(HashMap::from([("demae.host".to_owned(), label(&self.host))])),
            host_config: Some(host_config),
            exposed_ports,
            ..ContainerCreateBody::default()
        }
    }

    async fn switch_port(&self, id: &str, port: u16) {
        let inspected = self.docker.inspect_container(id, None::<InspectContainerOptions>).await.expect("inspected");
        let networks = inspected.network_settings.and_then(|settings| settings.networks).unwrap_or_default();
        let ip = networks.into_values().find_map(|network| network.ip_address).expect("an address");
        poll("the app answers", async || match tokio::net::TcpStream::connect(format!("{ip}:8080")).await {
            Ok(stream) => answers(stream).await,
            Err(_) => false,
        })
        .await;
        self.write_server(&format!("127.0.0.1:{port}"));
        let master: u32 =
            fs::read_to_string(&self.nginx_pid).expect("a pid file").trim().parse().expect("the pid of nginx");
        let old = workers(master);
        signal(master, "-HUP");
        poll("only new workers take requests", async || {
            let now = workers(master);
            !now.is_empty() && !now.iter().any(|pid| old.contains(pid))
        })
        .await;
    }
}

/// Removes the containers of the bare steps of a lab when it is dropped, whatever happened.
pub(super) struct RemoveOnDrop(pub(super) String);

impl Drop for RemoveOnDrop {
    fn drop(&mut self) {
        remove_all(&label(&self.0));
    }
}

/// The host's label of the containers of the bare steps: not that of the agent, which would take them for its own.
fn label(host: &str) -> String {
    format!("{host}-bare")
}

async fn poll(what: &str, holds: impl AsyncFn() -> bool) {
    let began = Instant::now();
    while !holds().await {
        assert!(began.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(POLL).await;
    }
}

/// Waits until the app answers at a socket, and leads a symlink to it.
pub(super) async fn switch_socket(socket: &Path, current: &Path) {
    poll("the app answers", async || {
        // nginx's workers are of another user.
        let opened = fs::set_permissions(socket, fs::Permissions::from_mode(0o666)).is_ok();
        match tokio::net::UnixStream::connect(socket).await {
            Ok(stream) if opened => answers(stream).await,
            _ => false,
        }
    })
    .await;
    let next = current.with_extension("next");
    std::os::unix::fs::symlink(socket, &next).expect("a symlink");
    fs::rename(&next, current).expect("renamed");
}

/// Stops and removes a container.
pub(super) async fn end(docker: &Docker, id: &str) {
    let options = StopContainerOptionsBuilder::default().t(2).build();
    docker.stop_container(id, Some(options)).await.expect("stopped");
    let options = RemoveContainerOptionsBuilder::default().v(true).build();
    docker.remove_container(id, Some(options)).await.expect("removed");
}

fn mount(dir: &Path) -> Mount {
    Mount {
        typ: Some(MountType::BIND),
        source: Some(dir.display().to_string()),
        target: Some("/run/app".into()),
        ..Mount::default()
    }
}

/// A container of the example app behind a socket in this directory, without a network.
pub(super) fn socket_container(image: &str, host: &str, dir: &Path) -> ContainerCreateBody {
    ContainerCreateBody {
        image: Some(image.to_owned()),
        env: Some(vec!["SOCKET=/run/app/app.sock".into()]),
        labels: Some(HashMap::from([("demae.host".to_owned(), label(host))])),
        host_config: Some(HostConfig {
            init: Some(true),
            network_mode: Some("none".into()),
            mounts: Some(vec![mount(dir)]),
            ..HostConfig::default()
        }),
        ..ContainerCreateBody::default()
    }
}

/// Workers of an nginx that take requests.
fn workers(master: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{master}/task/{master}/children")).unwrap_or_default();
    let takes_requests = |pid: &u32| {
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.starts_with("nginx: worker process") && !line.contains("shutting down")
    };
    text.split_whitespace().filter_map(|pid| pid.parse().ok()).filter(takes_requests).collect()
}

async fn answers(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> bool {
    let request = async {
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok::<_, std::io::Error>(text.starts_with("HTTP/1.1 200"))
    };
    request.await.unwrap_or(false)
}
