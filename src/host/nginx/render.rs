//! Renders nginx configuration. Only checked names and numbers get here, so nothing can be injected.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use handlebars::Handlebars;
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use crate::{
    host::{
        files::{self, FileError},
        layout::Layout,
        tcp_routes::STABLE_PORT,
    },
    model::{
        name::{AppName, TemplateName, UrlPath, VirtualHost},
        problem::chain,
        proxy::{Upstreams, Vhost},
    },
};

/// The default template of an app.
const DEFAULT: &str = include_str!("../../../deploy/nginx/default.conf.hbs");
/// The directives of every location of an app; templates of a host include it as `{{> demae-proxy}}`.
const PROXY: &str = include_str!("../../../deploy/nginx/proxy.conf.hbs");
/// The locations of an app below a path.
const PATH: &str = include_str!("../../../deploy/nginx/path.conf.hbs");
/// The directives in each of them.
const PATH_BODY: &str = include_str!("../../../deploy/nginx/path-body.conf.hbs");
/// The template of the shared file.
const HOST: &str = include_str!("../../../deploy/nginx/host.conf.hbs");
/// The virtual host that answers with the generation. `.invalid` is reserved by RFC 2606.
pub const PROBE_HOST: &str = "generation.demae.invalid";
/// Suffix of template files.
const SUFFIX: &str = ".conf.hbs";
/// How long nginx may take to connect to an app, in seconds.
const CONNECT_TIMEOUT: u64 = 5;
/// The same by the kernel's table: where no container is nobody refuses, and a connection within one machine takes
/// microseconds. Longer than the kernel waits before it repeats a lost first packet, 1 s (`TCP_TIMEOUT_INIT`,
/// include/net/tcp.h).
const CONNECT_TIMEOUT_IN_TABLE: u64 = 2;
/// From this version on nginx keeps connections to upstreams unless configured otherwise, and knows `keepalive 0`:
/// nginx 1.29.7, `ngx_http_upstream_keepalive_module.c`.
const KEEPS_UPSTREAM_CONNECTIONS: (u32, u32, u32) = (1, 29, 7);
/// The first nginx with `keepalive_min_timeout`.
const HAS_MIN_TIMEOUT: (u32, u32, u32) = (1, 27, 4);

/// Headers that proxies set for apps, besides those that are always set; and whether one of a trusted proxy is kept.
/// `Proxy` becomes `HTTP_PROXY` in the environment of a CGI program; the last two replace the path in some frameworks.
const FORWARDED: [(&str, bool); 9] = [
    ("Forwarded", true),
    ("X-Forwarded-Port", true),
    ("X-Forwarded-Ssl", true),
    ("X-Forwarded-Scheme", true),
    ("X-Forwarded-Server", true),
    ("X-Forwarded-Prefix", true),
    ("Proxy", false),
    ("X-Original-URL", false),
    ("X-Rewrite-URL", false),
];

/// Keep-alive of clients, so that no request is lost to a reload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// As nginx ships, with `keepalive_min_timeout` where nginx knows it.
    #[default]
    Default,
    /// No keep-alive: no request is lost on any version, at the price of a handshake for each.
    Strict,
}

impl Profile {
    /// Whether client connections are kept alive.
    pub fn is_default(self) -> bool {
        self == Self::Default
    }
}

/// What the operator of a host configures.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Values of `listen` for every virtual host.
    pub listen: Vec<String>,
    /// Whether demae's server is the default server.
    pub default_server: bool,
    /// Keep-alive of clients.
    pub profile: Profile,
    /// A directory with templates of this host.
    pub templates: Option<PathBuf>,
    /// Addresses and networks of trusted proxies in front of this nginx, whose forwarded headers are kept.
    pub trusted: Vec<String>,
}

#[derive(Serialize)]
struct HostView<'a> {
    generation: u64,
    listen: &'a [String],
    default_server: bool,
    probe_host: &'a str,
    names_hash_bucket_size: Option<usize>,
    names_hash_max_size: Option<usize>,
    trusted: &'a [String],
    forwarded: Vec<Header>,
    rootless: Vec<Site>,
}

#[derive(Serialize)]
struct AppView<'a> {
    app: &'a str,
    server_names: String,
    hosts: Vec<&'a str>,
    servers: Vec<String>,
    sites: Vec<Site>,
    listen: Vec<String>,
    max_body_size: u64,
    read_timeout: u64,
    connect_timeout: u64,
    response_header_size: u64,
    request_buffering: bool,
    strict: bool,
    keepalive_min_timeout: bool,
    upstream_keepalive_off: bool,
    trusted: &'a [String],
    forwarded: Vec<Header>,
    retries: Vec<Retry>,
    path: &'a str,
    path_pattern: String,
    strip_path: bool,
    prefix: Option<&'a str>,
    uri: &'static str,
}

/// Host names with the same server.
#[derive(Serialize)]
struct Site {
    names: String,
    /// Pattern of the files with locations of other apps below these hosts, for nginx's `include`.
    paths: Option<String>,
}

/// A header that is not passed through from clients.
#[derive(Serialize)]
struct Header {
    name: &'static str,
    /// The value that the app gets.
    value: String,
    /// nginx's variable of the received header, if a trusted proxy may set it.
    kept: Option<String>,
}

/// A retry of a request that reached no instance.
#[derive(Serialize)]
struct Retry {
    name: &'static str,
    then: Option<&'static str>,
}

/// Which hosts have apps at their root and below paths: an app's text depends on it.
#[derive(Debug, Default, Clone)]
pub struct Neighbours {
    /// Hosts with an app below a path.
    pub with_paths: BTreeSet<VirtualHost>,
    /// Hosts with an app at their root.
    pub with_root: BTreeSet<VirtualHost>,
}

impl Neighbours {
    /// Collected from vhosts.
    pub fn of<'v>(vhosts: impl IntoIterator<Item = &'v Vhost>) -> Self {
        let mut found = Self::default();
        for vhost in vhosts.into_iter().flat_map(Vhost::all) {
            let hosts = vhost.hosts.iter().cloned();
            if vhost.path.is_some() { found.with_paths.extend(hosts) } else { found.with_root.extend(hosts) }
        }
        found
    }
}

/// The loaded templates of a host.
pub struct Renderer {
    handlebars: Handlebars<'static>,
    settings: Settings,
    keepalive_min_timeout: bool,
    upstream_keepalive_off: bool,
    broken: BTreeMap<String, String>,
    own: BTreeSet<String>,
    present: BTreeSet<String>,
    fingerprint: String,
}

impl Renderer {
    /// Loads the templates. A broken one breaks only the apps that use it.
    ///
    /// # Errors
    /// If the directory exists and cannot be read: its templates are unknown then.
    pub fn new(settings: Settings, nginx_version: (u32, u32, u32)) -> Result<Self, FileError> {
        let mut texts = BTreeMap::from([
            ("default".to_owned(), Ok(DEFAULT.to_owned())),
            ("demae-proxy".to_owned(), Ok(PROXY.to_owned())),
            ("demae-path".to_owned(), Ok(PATH_BODY.to_owned())),
        ]);
        let own = settings.templates.as_deref().map(read_templates).transpose()?.unwrap_or_default();
        // An empty file means the built-in template of that name.
        let is_own = |text: &Result<String, String>| text.as_ref().map_or(true, |text| !text.trim().is_empty());
        let (own, empty): (BTreeMap<_, _>, BTreeMap<_, _>) = own.into_iter().partition(|(_, text)| is_own(text));
        let names: BTreeSet<String> = own.keys().cloned().collect();
        let present = names.iter().chain(empty.keys()).cloned().collect();
        for name in empty.into_keys().filter(|name| !texts.contains_key(name)).collect::<Vec<_>>() {
            texts.insert(name, Err("the file is empty".to_owned()));
        }
        texts.extend(own);
        let keepalive_min_timeout = nginx_version >= HAS_MIN_TIMEOUT;
        let upstream_keepalive_off = nginx_version >= KEEPS_UPSTREAM_CONNECTIONS;
        let mut digest = Sha256::new();
        let basis = (&settings.listen, settings.default_server, settings.profile, &settings.trusted);
        digest.update(format!("{basis:?} {keepalive_min_timeout} {upstream_keepalive_off} {HOST} {PATH}"));
        let mut handlebars = Handlebars::new();
        handlebars.set_strict_mode(true);
        handlebars.register_escape_fn(handlebars::no_escape);
        let mut broken = BTreeMap::new();
        for (name, text) in &texts {
            digest.update(format!("\0{name}\0{text:?}"));
            let registered = match text {
                Ok(text) => handlebars.register_template_string(name, text).map_err(|e| e.to_string()),
                Err(e) => Err(e.clone()),
            };
            if let Err(e) = registered {
                broken.insert(name.clone(), e);
            }
        }
        for (name, text) in [(" host", HOST), (" path", PATH)] {
            if let Err(e) = handlebars.register_template_string(name, text) {
                broken.insert(name.to_owned(), e.to_string());
            }
        }
        let fingerprint = digest.finalize().iter().take(8).map(|b| format!("{b:02x}")).collect();
        Ok(Self {
            handlebars,
            settings,
            keepalive_min_timeout,
            upstream_keepalive_off,
            broken,
            own: names,
            present,
            fingerprint,
        })
    }

    /// A fingerprint of everything that the text depends on apart from the apps.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Names of this host's own templates.
    pub fn own(&self) -> &BTreeSet<String> {
        &self.own
    }

    /// Names of the template files of this host, including empty ones.
    pub fn present(&self) -> &BTreeSet<String> {
        &self.present
    }

    /// The name of an app's template.
    pub fn template_of(vhost: &Vhost) -> &str {
        vhost.template.as_ref().map_or("default", TemplateName::as_str)
    }

    /// The error for an app whose template is gone.
    pub fn lost_error(&self, template: &str) -> String {
        let dir = self.settings.templates.as_deref().unwrap_or(Path::new("")).display().to_string();
        let back = if template == "default" {
            "; put it back, or put an empty file there to go back to demae's own"
        } else {
            "; put it back, or name another one in the spec"
        };
        format!("template `{dir}/{template}{SUFFIX}`, by which it is served, is missing{back}")
    }

    /// The shared file. `taken` are directives that the host's own files set already.
    pub fn host(
        &self,
        generation: u64,
        vhosts: &[&Vhost],
        taken: &BTreeMap<String, (PathBuf, String)>,
        layout: &Layout,
    ) -> Result<String, String> {
        let names = || vhosts.iter().flat_map(|v| v.all()).flat_map(|v| &v.hosts);
        let longest = names().map(|h| h.as_str().len()).max().unwrap_or(0).max(PROBE_HOST.len());
        let count = names().count() + 2;
        // nginx's default of 64 holds names of up to 46 characters; 512 holds the longest possible name.
        let bucket = (longest > 40).then_some(if longest > 100 { 512 } else { 128 });
        let max_size = (count > 400).then(|| (count * 4).next_power_of_two());
        let free = |name: &str| !taken.contains_key(name);
        let neighbours = Neighbours::of(vhosts.iter().copied());
        let rootless = neighbours.with_paths.difference(&neighbours.with_root);
        let has_catch_all = neighbours.with_root.iter().any(VirtualHost::is_catch_all);
        let view = HostView {
            generation,
            listen: &self.settings.listen,
            default_server: self.settings.default_server && !has_catch_all,
            probe_host: PROBE_HOST,
            names_hash_bucket_size: bucket.filter(|_| free("server_names_hash_bucket_size")),
            names_hash_max_size: max_size.filter(|_| free("server_names_hash_max_size")),
            trusted: &self.settings.trusted,
            forwarded: self.forwarded(false),
            rootless: rootless.map(|host| site(&[host], Some(layout))).collect(),
        };
        self.handlebars.render(" host", &view).map_err(|e| e.to_string())
    }

    /// Renders the files of one app, by name.
    ///
    /// # Errors
    /// If its template is broken or missing, or cannot serve the vhost.
    pub fn app(
        &self,
        app: &AppName,
        vhost: &Vhost,
        neighbours: &Neighbours,
        layout: &Layout,
    ) -> Result<BTreeMap<String, Vec<u8>>, String> {
        let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        for (number, ingress) in vhost.all().enumerate() {
            for (name, text) in self.ingress_files(app, number, ingress, neighbours, layout)? {
                files.entry(name).or_default().extend(text);
            }
        }
        Ok(files)
    }

    /// Renders the files of one ingress of an app. Each has its own upstream, with a number from the second on.
    fn ingress_files(
        &self,
        app: &AppName,
        number: usize,
        vhost: &Vhost,
        neighbours: &Neighbours,
        layout: &Layout,
    ) -> Result<BTreeMap<String, Vec<u8>>, String> {
        let name = Self::template_of(vhost);
        if let Some(error) = self.broken.get(name).or_else(|| self.broken.get("demae-proxy")) {
            return Err(format!("template `{name}` is broken: {error}"));
        }
        if !self.handlebars.has_template(name) {
            return Err(format!("this host has no template `{name}`"));
        }
        let catch_all = vhost.hosts.iter().any(VirtualHost::is_catch_all);
        if catch_all && !self.settings.default_server {
            return Err("an app for all other hosts needs the default server, and `nginx.default_server` of this host is `false`".to_owned());
        }
        let servers: Vec<String> = match &vhost.upstreams {
            Upstreams::Slots(n) => {
                let route = |slot| layout.route_to(app, slot, vhost.endpoint.as_ref());
                (1..=*n).map(|slot| format!("unix:{}", route(slot).display())).collect()
            }
            Upstreams::Ports(ports) => ports.iter().map(|port| format!("127.0.0.1:{port}")).collect(),
            Upstreams::Addresses(stable) => stable.iter().map(|address| format!("{address}:{STABLE_PORT}")).collect(),
        };
        let hosts: Vec<&VirtualHost> = vhost.hosts.iter().collect();
        let (shared, plain): (Vec<&VirtualHost>, Vec<&VirtualHost>) =
            hosts.iter().partition(|host| neighbours.with_paths.contains(**host));
        let plain = if plain.is_empty() { None } else { Some(site(&plain, None)) };
        let shared = shared.into_iter().map(|host| site(&[host], Some(layout)));
        // Below a path its locations are in the servers of its hosts.
        let sites = if vhost.path.is_some() { Vec::new() } else { plain.into_iter().chain(shared).collect() };
        let default = if catch_all { " default_server" } else { "" };
        let path = vhost.path.as_ref().map_or("", UrlPath::as_str);
        // A request that is not buffered cannot be retried.
        let retries = if servers.len() > 1 && vhost.request_buffering {
            vec![Retry { name: "next", then: Some("last") }, Retry { name: "last", then: None }]
        } else {
            Vec::new()
        };
        let prefix = Some(path).filter(|_| vhost.strip_path);
        // App names have no `_`, so this is not another app's.
        let upstream_name = if number == 0 { app.to_string() } else { format!("{app}_{}", number + 1) };
        let view = AppView {
            app: &upstream_name,
            server_names: names(&hosts),
            hosts: vhost.hosts.iter().map(VirtualHost::as_str).collect(),
            servers,
            sites,
            listen: self.settings.listen.iter().map(|value| format!("{value}{default}")).collect(),
            max_body_size: vhost.max_body_size,
            read_timeout: vhost.read_timeout,
            connect_timeout: match vhost.upstreams {
                Upstreams::Addresses(_) => CONNECT_TIMEOUT_IN_TABLE,
                _ => CONNECT_TIMEOUT,
            },
            response_header_size: vhost.response_header_size,
            request_buffering: vhost.request_buffering,
            strict: self.settings.profile == Profile::Strict,
            keepalive_min_timeout: self.keepalive_min_timeout && self.settings.profile == Profile::Default,
            upstream_keepalive_off: self.upstream_keepalive_off,
            trusted: &self.settings.trusted,
            forwarded: self.forwarded(prefix.is_some()),
            retries,
            path,
            path_pattern: path.replace('.', "\\."),
            strip_path: vhost.strip_path,
            prefix,
            uri: if vhost.strip_path { "$demae_uri" } else { "" },
        };
        let render = |name: &str| {
            let text = self.handlebars.render(name, &view).map_err(|e| format!("template `{name}`: {e}"))?;
            Ok::<_, String>(text.into_bytes())
        };
        if vhost.path.is_none() {
            return Ok(BTreeMap::from([(file_of(app), render(name)?)]));
        }
        let mut files = BTreeMap::from([(file_of(app), render(name)?)]);
        let locations = render(" path")?;
        files.extend(vhost.hosts.iter().map(|host| (path_file(host, Some(app)), locations.clone())));
        Ok(files)
    }

    fn forwarded(&self, has_prefix: bool) -> Vec<Header> {
        let header = |(name, kept): (&'static str, bool)| {
            let variable = name.to_ascii_lowercase().replace('-', "_");
            let kept = kept && !self.settings.trusted.is_empty();
            let value = if kept { format!("$demae_{variable}") } else { "''".to_owned() };
            Header { name, value, kept: kept.then(|| format!("$http_{variable}")) }
        };
        FORWARDED.into_iter().filter(|(name, _)| !(has_prefix && *name == "X-Forwarded-Prefix")).map(header).collect()
    }
}

/// The file of a set that belongs to an app.
pub(super) fn file_of(app: &AppName) -> String {
    format!("app-{app}.conf")
}

/// The file with the locations of an app below a host; a pattern for all apps without one. Not a `.conf`, so that only
/// the server of the host includes it.
fn path_file(host: &VirtualHost, app: Option<&AppName>) -> String {
    let host = host.as_str().replace('*', "_");
    let app = app.map_or("*", AppName::as_str);
    // Neither name has an `@`, so files of two hosts are never confused.
    format!("path@{host}@{app}.loc")
}

fn names(hosts: &[&VirtualHost]) -> String {
    let name = |host: &&VirtualHost| if host.is_catch_all() { "_".to_owned() } else { host.to_string() };
    hosts.iter().map(name).collect::<Vec<_>>().join(" ")
}

/// Host names with the same server, and the locations of other apps below the first of them.
fn site(hosts: &[&VirtualHost], shared: Option<&Layout>) -> Site {
    let pattern = |layout: &Layout| layout.nginx_live().join(path_file(hosts[0], None)).display().to_string();
    Site { names: names(hosts), paths: shared.map(pattern) }
}

fn read_templates(dir: &Path) -> Result<BTreeMap<String, Result<String, String>>, FileError> {
    let mut texts = BTreeMap::new();
    for file in files::list(dir)? {
        let Some(name) = file.strip_suffix(SUFFIX) else { continue };
        if TemplateName::try_from(name).is_err() {
            tracing::warn!("`{}` is not the name of a template; it is not read", dir.join(&file).display());
            continue;
        }
        let text = match files::read(&dir.join(&file)) {
            Ok(Some(bytes)) => String::from_utf8(bytes).map_err(|e| {
                format!("`{}` is not UTF-8 at byte {}", dir.join(&file).display(), e.utf8_error().valid_up_to())
            }),
            // It was removed since the list.
            Ok(None) => continue,
            Err(e) => Err(chain(&e)),
        };
        texts.insert(name.to_owned(), text);
    }
    Ok(texts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings {
            listen: vec!["80".into()],
            default_server: true,
            profile: Profile::Default,
            templates: None,
            trusted: Vec::new(),
        }
    }

    fn renderer(version: (u32, u32, u32)) -> Renderer {
        Renderer::new(settings(), version).expect("there is no directory to read")
    }

    fn vhost(upstreams: Upstreams, template: Option<&str>) -> Vhost {
        let hosts = ["web.example.com", "*.web.example.com"].map(|host| host.try_into().expect("a host"));
        let template = template.map(|t| t.try_into().expect("a name"));
        Vhost { template, max_body_size: 1_048_576, ..Vhost::plain(hosts.into(), upstreams) }
    }

    fn text(renderer: &Renderer, vhost: &Vhost) -> Result<String, String> {
        let app = AppName::try_from("web").expect("a name");
        let layout = Layout::new("/var/lib/demae", "/run/demae");
        let files = renderer.app(&app, vhost, &Neighbours::of([vhost]), &layout)?;
        let texts = files.into_values().map(|text| String::from_utf8(text).expect("text"));
        Ok(texts.collect::<Vec<_>>().join("\n"))
    }

    #[test]
    fn an_app_is_rendered() {
        let old = renderer((1, 22, 1));
        let sockets = text(&old, &vhost(Upstreams::Slots(2), None)).expect("it renders");
        expect_test::expect_file!["../../../tests/golden/app.conf"].assert_eq(&sockets);
        let ports = text(&old, &vhost(Upstreams::Ports(vec![20001]), None)).expect("it renders");
        assert!(ports.contains("server 127.0.0.1:20001 max_fails=0;"), "{ports}");
        assert!(!ports.contains("keepalive"), "{ports}");
        let below = Vhost {
            path: Some("/shop/v1.0".try_into().expect("a path")),
            strip_path: true,
            ..vhost(Upstreams::Ports(vec![20001, 20002]), None)
        };
        expect_test::expect_file!["../../../tests/golden/path.conf"]
            .assert_eq(&text(&old, &below).expect("it renders"));
    }

    #[test]
    fn directives_unknown_to_the_nginx_version_are_omitted() {
        let directives = |version| {
            let text = text(&renderer(version), &vhost(Upstreams::Slots(1), None)).expect("it renders");
            (text.contains("keepalive_min_timeout 10s;"), text.contains("    keepalive 0;"))
        };
        assert_eq!(directives((1, 22, 1)), (false, false));
        assert_eq!(directives((1, 27, 3)), (false, false));
        assert_eq!(directives((1, 27, 4)), (true, false));
        assert_eq!(directives((1, 29, 6)), (true, false), "it refuses the value 0");
        assert_eq!(directives((1, 29, 7)), (true, true), "it would keep connections to the replaced instance");
        assert_eq!(directives((1, 30, 0)), (true, true));
    }

    #[test]
    fn the_host_part_is_rendered() {
        let layout = Layout::new("/var/lib/demae", "/run/demae");
        let text = renderer((1, 22, 1)).host(7, &[], &BTreeMap::new(), &layout).expect("it renders");
        expect_test::expect_file!["../../../tests/golden/host.conf"].assert_eq(&text);
        let trusted = Settings { trusted: vec!["10.0.0.0/8".into()], ..settings() };
        let trusted = Renderer::new(trusted, (1, 22, 1)).expect("there is no directory to read");
        let text = trusted.host(7, &[], &BTreeMap::new(), &layout).expect("it renders");
        expect_test::expect_file!["../../../tests/golden/host-trusted.conf"].assert_eq(&text);
    }

    #[test]
    fn missing_template_is_an_error() {
        let error = text(&renderer((1, 22, 1)), &vhost(Upstreams::Slots(1), Some("gone")));
        assert_eq!(error, Err("this host has no template `gone`".to_owned()));
    }
}
