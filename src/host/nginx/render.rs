//! From values to text for nginx. Only checked names and numbers get here, so nothing can be slipped in.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use handlebars::Handlebars;
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use crate::{
    host::{files, layout::Layout},
    model::{
        name::{AppName, TemplateName, VirtualHost},
        proxy::{Upstreams, Vhost},
    },
};

/// The template of an app, unless the host has its own.
const DEFAULT: &str = include_str!("../../../deploy/nginx/default.conf.hbs");
/// The template of what all apps share.
const HOST: &str = include_str!("../../../deploy/nginx/host.conf.hbs");
/// The virtual host that tells the generation. `.invalid` belongs to nobody, RFC 2606.
pub const PROBE_HOST: &str = "generation.demae.invalid";
/// How a template's file ends.
const SUFFIX: &str = ".conf.hbs";

/// How clients' connections are treated, so that none is lost to a reload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// As nginx ships, with `keepalive_min_timeout` where nginx knows it.
    #[default]
    Default,
    /// No keep-alive: nothing is lost on any version, at the price of a handshake for each request.
    Strict,
}

impl Profile {
    /// Whether connections of clients are kept.
    pub fn is_default(self) -> bool {
        self == Self::Default
    }
}

/// What an operator of a host decides about nginx's text.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Values of `listen`, each for every virtual host.
    pub listen: Vec<String>,
    /// Whether ours is the default server.
    pub default_server: bool,
    /// How clients' connections are treated.
    pub profile: Profile,
    /// A directory with templates of this host.
    pub templates: Option<PathBuf>,
}

#[derive(Serialize)]
struct HostView<'a> {
    generation: u64,
    listen: &'a [String],
    default_server: bool,
    probe_host: &'a str,
    names_hash_bucket_size: Option<usize>,
    names_hash_max_size: Option<usize>,
}

#[derive(Serialize)]
struct AppView<'a> {
    app: &'a str,
    server_names: String,
    hosts: Vec<&'a str>,
    servers: Vec<String>,
    listen: &'a [String],
    max_body_size: u64,
    read_timeout: u64,
    strict: bool,
    keepalive_min_timeout: bool,
}

/// The templates of a host, read.
pub struct Renderer {
    handlebars: Handlebars<'static>,
    settings: Settings,
    keepalive_min_timeout: bool,
    broken: BTreeMap<String, String>,
    fingerprint: String,
}

impl Renderer {
    /// Reads the templates. One that is broken breaks the apps that use it, and no others.
    pub fn new(settings: Settings, nginx_version: (u32, u32, u32)) -> Self {
        let mut texts = BTreeMap::from([("default".to_owned(), DEFAULT.to_owned())]);
        if let Some(dir) = &settings.templates {
            texts.extend(read_templates(dir));
        }
        let keepalive_min_timeout = nginx_version >= (1, 27, 4);
        let mut digest = Sha256::new();
        digest.update(format!(
            "{:?} {HOST}",
            (&settings.listen, settings.default_server, settings.profile, keepalive_min_timeout)
        ));
        let mut handlebars = Handlebars::new();
        handlebars.set_strict_mode(true);
        handlebars.register_escape_fn(handlebars::no_escape);
        let mut broken = BTreeMap::new();
        for (name, text) in &texts {
            digest.update(format!("\0{name}\0{text}"));
            if let Err(e) = handlebars.register_template_string(name, text) {
                broken.insert(name.clone(), e.to_string());
            }
        }
        if let Err(e) = handlebars.register_template_string(" host", HOST) {
            broken.insert(" host".to_owned(), e.to_string());
        }
        let fingerprint = digest.finalize().iter().take(8).map(|b| format!("{b:02x}")).collect();
        Self { handlebars, settings, keepalive_min_timeout, broken, fingerprint }
    }

    /// Stands for everything the text depends on, beside the apps.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The part that all apps share. `taken` are directives that the host's own files set already.
    pub fn host(
        &self,
        generation: u64,
        vhosts: &BTreeMap<AppName, Vhost>,
        taken: &std::collections::HashSet<String>,
    ) -> Result<String, String> {
        let names = || vhosts.values().flat_map(|v| &v.hosts);
        let longest = names().map(|h| h.as_str().len()).max().unwrap_or(0).max(PROBE_HOST.len());
        let count = names().count() + 2;
        // nginx's own default of 64 holds names of up to 46 characters; 512 holds the longest there can be.
        let bucket = (longest > 40).then_some(if longest > 100 { 512 } else { 128 });
        let max_size = (count > 400).then(|| (count * 4).next_power_of_two());
        let free = |name: &str| !taken.contains(name);
        let view = HostView {
            generation,
            listen: &self.settings.listen,
            default_server: self.settings.default_server,
            probe_host: PROBE_HOST,
            names_hash_bucket_size: bucket.filter(|_| free("server_names_hash_bucket_size")),
            names_hash_max_size: max_size.filter(|_| free("server_names_hash_max_size")),
        };
        self.handlebars.render(" host", &view).map_err(|e| e.to_string())
    }

    /// The part of one app.
    pub fn app(&self, app: &AppName, vhost: &Vhost, layout: &Layout) -> Result<String, String> {
        let name = vhost.template.as_ref().map_or("default", TemplateName::as_str);
        if let Some(error) = self.broken.get(name) {
            return Err(format!("template `{name}` is broken: {error}"));
        }
        if !self.handlebars.has_template(name) {
            return Err(format!("this host has no template `{name}`"));
        }
        let servers = match &vhost.upstreams {
            Upstreams::Slots(n) => (1..=*n).map(|slot| format!("unix:{}", layout.route(app, slot).display())).collect(),
            Upstreams::Ports(ports) => ports.iter().map(|port| format!("127.0.0.1:{port}")).collect(),
        };
        let hosts: Vec<&str> = vhost.hosts.iter().map(VirtualHost::as_str).collect();
        let view = AppView {
            app: app.as_str(),
            server_names: hosts.join(" "),
            hosts,
            servers,
            listen: &self.settings.listen,
            max_body_size: vhost.max_body_size,
            read_timeout: vhost.read_timeout,
            strict: self.settings.profile == Profile::Strict,
            keepalive_min_timeout: self.keepalive_min_timeout && self.settings.profile == Profile::Default,
        };
        self.handlebars.render(name, &view).map_err(|e| format!("template `{name}`: {e}"))
    }
}

fn read_templates(dir: &Path) -> BTreeMap<String, String> {
    let mut texts = BTreeMap::new();
    for file in files::list(dir).unwrap_or_default() {
        let Some(name) = file.strip_suffix(SUFFIX) else { continue };
        if TemplateName::try_from(name).is_err() {
            tracing::warn!("`{}` is not the name of a template; it is not read", dir.join(&file).display());
            continue;
        }
        match files::read(&dir.join(&file)).map(|t| t.map(String::from_utf8)) {
            Ok(Some(Ok(text))) => {
                texts.insert(name.to_owned(), text);
            }
            Ok(_) => tracing::warn!("template `{name}` is not UTF-8; it is not read"),
            Err(e) => tracing::warn!("{e}"),
        }
    }
    texts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings { listen: vec!["80".into()], default_server: true, profile: Profile::Default, templates: None }
    }

    fn vhost(upstreams: Upstreams, template: Option<&str>) -> Vhost {
        Vhost {
            hosts: vec!["web.example.com".try_into().expect("a host"), "*.web.example.com".try_into().expect("a host")],
            upstreams,
            template: template.map(|t| t.try_into().expect("a name")),
            max_body_size: 1_048_576,
            read_timeout: 60,
        }
    }

    #[test]
    fn an_app_is_rendered() {
        let renderer = Renderer::new(settings(), (1, 22, 1));
        let app = AppName::try_from("web").expect("a name");
        let layout = Layout::new("/var/lib/demae", "/run/demae");
        let text = renderer.app(&app, &vhost(Upstreams::Slots(2), None), &layout).expect("it renders");
        expect_test::expect_file!["../../../tests/golden/app.conf"].assert_eq(&text);
        let ports = renderer.app(&app, &vhost(Upstreams::Ports(vec![20001]), None), &layout).expect("it renders");
        assert!(ports.contains("server 127.0.0.1:20001 max_fails=0;"), "{ports}");
        assert!(!ports.contains("keepalive_"), "{ports}");
        let newer = Renderer::new(settings(), (1, 28, 0))
            .app(&app, &vhost(Upstreams::Slots(1), None), &layout)
            .expect("it renders");
        assert!(newer.contains("keepalive_min_timeout 10s;"), "{newer}");
    }

    #[test]
    fn the_host_part_is_rendered() {
        let renderer = Renderer::new(settings(), (1, 22, 1));
        let text = renderer.host(7, &BTreeMap::new(), &Default::default()).expect("it renders");
        expect_test::expect_file!["../../../tests/golden/host.conf"].assert_eq(&text);
    }

    #[test]
    fn a_template_that_is_not_there_is_told() {
        let renderer = Renderer::new(settings(), (1, 22, 1));
        let app = AppName::try_from("web").expect("a name");
        let error = renderer.app(&app, &vhost(Upstreams::Slots(1), Some("gone")), &Layout::new("/a", "/b"));
        assert_eq!(error, Err("this host has no template `gone`".to_owned()));
    }
}
