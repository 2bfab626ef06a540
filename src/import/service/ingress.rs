//! `ports` and the labels of reverse proxies, as an `ingress`.

use std::collections::BTreeMap;

use super::{Effect, Node, Translation, Value, list, map, scalar};
use crate::{
    import::tree::{get, items, pairs, text},
    model::name::{UrlPath, VirtualHost},
};

/// Ports of protocols other than HTTP, by their entries in the IANA registry of service names, and by custom.
const NOT_HTTP: &[u16] = &[
    20, 21, 22, 23, 25, 53, 67, 68, 69, 88, 110, 111, 119, 123, 135, 137, 138, 139, 143, 161, 162, 389, 445, 465, 500,
    514, 515, 548, 587, 636, 853, 873, 989, 990, 993, 995, 1194, 1433, 1521, 1812, 1883, 1935, 2049, 2181, 2222, 3306,
    3389, 3478, 4500, 5060, 5061, 5349, 5432, 5672, 5900, 6379, 6432, 6667, 6881, 8883, 9042, 9092, 11211, 25565,
    27015, 27017, 33060, 51413, 51820,
];

/// A port of a service.
struct Port {
    /// Inside the container: the first and the last one of a range.
    target: (u16, u16),
    is_tcp: bool,
    line: usize,
}

impl Port {
    fn may_be_http(&self) -> bool {
        self.is_tcp && self.target.0 == self.target.1 && !NOT_HTTP.contains(&self.target.0)
    }
}

impl std::fmt::Display for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.target.0)?;
        if self.target.1 != self.target.0 {
            write!(f, "-{}", self.target.1)?;
        }
        if self.is_tcp { Ok(()) } else { write!(f, "/udp") }
    }
}

/// Whether a service has a port that may be for HTTP.
pub(super) fn takes_requests(service: &Node) -> bool {
    let all = get(service, "ports").map(items).unwrap_or_default();
    all.into_iter().filter_map(port).any(|port| port.may_be_http()) || from_labels(&labels(service)).is_some()
}

/// The labels of a service, those for Swarm's services included.
pub(super) fn labels(service: &Node) -> BTreeMap<String, String> {
    let of = |node: &Node| get(node, "labels").map(pairs).unwrap_or_default();
    let below = get(service, "deploy").map(of).unwrap_or_default();
    let all = of(service).into_iter().chain(below);
    all.filter_map(|(name, value, _)| Some((name, value?))).collect()
}

/// `8080:80`, `127.0.0.1:8080:80/tcp`, `80`, or a mapping with `target`.
fn port(node: &Node) -> Option<Port> {
    let (target, protocol) = match &node.value {
        Value::Map(_) => (get(node, "target").and_then(text)?, get(node, "protocol").and_then(text).unwrap_or("tcp")),
        _ => {
            let whole = text(node)?;
            let (ports, protocol) = whole.split_once('/').unwrap_or((whole, "tcp"));
            (ports.rsplit(':').next()?, protocol)
        }
    };
    let (first, last) = target.split_once('-').unwrap_or((target, target));
    let target = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    Some(Port { target, is_tcp: protocol == "tcp", line: node.line })
}

/// Settings of a reverse proxy, from labels.
#[derive(Debug, Default, PartialEq)]
struct Proxied {
    hosts: Vec<String>,
    path: Option<String>,
    port: Option<u16>,
}

/// What labels of Traefik and of caddy-docker-proxy say.
fn from_labels(labels: &BTreeMap<String, String>) -> Option<Proxied> {
    let (mut found, mut rules) = (Proxied::default(), Vec::new());
    if labels.get("traefik.enable").is_some_and(|value| value == "false") {
        return None;
    }
    for (name, value) in labels {
        if name.starts_with("traefik.http.routers.") && name.ends_with(".rule") {
            found.hosts.extend(arguments(value, "Host"));
            rules.push(arguments(value, "PathPrefix"));
        } else if name.starts_with("traefik.http.services.") && name.ends_with(".loadbalancer.server.port") {
            found.port = value.parse().ok();
        } else if name == "caddy" {
            let hosts = value.split([',', ' ']).map(|host| host.trim().trim_start_matches("https://"));
            found.hosts.extend(hosts.filter(|host| !host.is_empty()).map(str::to_owned));
        } else if name == "caddy.reverse_proxy" {
            found.port = value.split_whitespace().last().and_then(|last| last.trim_end_matches(")}").parse().ok());
        }
    }
    // A path that only some of the routers have is one of several ways in.
    if let [first, others @ ..] = rules.as_slice()
        && let [path] = first.as_slice()
        && others.iter().all(|other| other == first)
    {
        found.path = Some(path.clone());
    }
    found.hosts.sort();
    found.hosts.dedup();
    (!found.hosts.is_empty()).then_some(found)
}

/// The texts in backquotes that a matcher of Traefik is given: ``Host(`a`, `b`)``.
fn arguments(rule: &str, matcher: &str) -> Vec<String> {
    let mut found = Vec::new();
    for part in rule.split(&format!("{matcher}(")).skip(1) {
        let inside = part.split(')').next().unwrap_or_default();
        found.extend(inside.split('`').skip(1).step_by(2).map(str::to_owned));
    }
    found
}

impl Translation<'_> {
    /// How requests reach the service, if they do.
    pub(super) fn ingress(&mut self) {
        let mut proxied = from_labels(&labels(self.service)).unwrap_or_default();
        self.proxied_by_variables(&mut proxied);
        self.labels();
        let hosts = self.hosts(&proxied);
        let ports = self.ports();
        let taken = self.port(&proxied, &ports, !hosts.is_empty());
        if let Some(expose) = get(self.service, "expose") {
            self.note(expose.line, "expose", Effect::Dropped, "apps of a host reach each other on all ports");
        }
        self.left_over(&ports, taken);
        let Some(taken) = taken else { return };
        let line = ports.first().map_or(self.service.line, |port| port.line);
        let (names, remedy) = match hosts.as_slice() {
            [] => (
                vec![format!("{}.localhost", self.app)],
                format!("; no host name is known (`--host {}=NAME` gives one)", self.name),
            ),
            known => (known.iter().map(ToString::to_string).collect(), String::new()),
        };
        let message = format!("requests for {} reach port {taken} through nginx{remedy}", names.join(", "));
        self.note(line, "ports", Effect::Changed, message);
        let names = names.into_iter().map(scalar).collect();
        let mut ingress = vec![("hosts", list(names)), ("port", scalar(taken.to_string()))];
        if let Some(path) = proxied.path.filter(|path| UrlPath::try_from(path.as_str()).is_ok()) {
            ingress.push(("path", scalar(path)));
        }
        self.put("ingress", map(ingress));
    }

    /// The port inside that takes requests: that of a proxy's label, else a published one, and where there are host names
    /// also one that is only exposed.
    fn port(&mut self, proxied: &Proxied, ports: &[Port], has_hosts: bool) -> Option<u16> {
        let first = |ports: &[Port]| ports.iter().find(|port| port.may_be_http()).map(|port| port.target.0);
        let known = proxied.port.or_else(|| first(ports));
        if known.is_some() || !has_hosts {
            return known;
        }
        let exposed = get(self.service, "expose").map(items).unwrap_or_default();
        let exposed: Vec<Port> = exposed.into_iter().filter_map(port).collect();
        Some(first(&exposed).unwrap_or_else(|| {
            self.note(self.service.line, "ports", Effect::Changed, "no port is known; `80` is a guess");
            80
        }))
    }

    /// What nginx-proxy takes from variables.
    fn proxied_by_variables(&self, proxied: &mut Proxied) {
        let variable = |name: &str| self.env.iter().find(|(known, _)| known.as_str() == name).map(|(_, value)| value);
        if let Some(hosts) = variable("VIRTUAL_HOST") {
            proxied.hosts.extend(hosts.split(',').map(|host| host.trim().to_owned()));
            proxied.port = proxied.port.or_else(|| variable("VIRTUAL_PORT").and_then(|port| port.parse().ok()));
        }
    }

    /// The virtual hosts: those that were given, else those of a proxy; none if none is known.
    fn hosts(&mut self, proxied: &Proxied) -> Vec<VirtualHost> {
        let is_only = self.project.with_requests().eq([self.name]);
        let given = self.project.options.hosts.iter();
        let given = given.filter(|(service, _)| match service {
            Some(service) => service == self.name,
            None => is_only,
        });
        let mut hosts: Vec<VirtualHost> = given.map(|(_, host)| host.clone()).collect();
        if hosts.is_empty() {
            for host in &proxied.hosts {
                match VirtualHost::try_from(host.to_lowercase()) {
                    Ok(host) => hosts.push(host),
                    Err(_) => {
                        let message = format!("`{host}` cannot be a virtual host");
                        self.note(self.service.line, "labels", Effect::Dropped, message);
                    }
                }
            }
        }
        hosts
    }

    fn ports(&mut self) -> Vec<Port> {
        let mut ports = Vec::new();
        for item in get(self.service, "ports").map(items).unwrap_or_default() {
            match port(item) {
                Some(port) => ports.push(port),
                None => self.refuse(item.line, "ports", "this is not a port"),
            }
        }
        ports
    }

    /// Ports that nginx does not serve.
    fn left_over(&mut self, ports: &[Port], taken: Option<u16>) {
        for port in ports {
            if taken == Some(port.target.0) && port.is_tcp {
                continue;
            }
            let message = if port.may_be_http() {
                format!("{port}: a second way in is an entry of `ingress` with host names of its own")
            } else {
                format!(
                    "{port}: nginx takes HTTP only; other apps of the host reach it at `{}`, and nothing from outside does",
                    self.app
                )
            };
            self.note(port.line, "ports", Effect::Dropped, message);
        }
    }

    /// Labels of the container. Those for proxies that are not in front of it any more are left out.
    fn labels(&mut self) {
        let is_of_proxy = |name: &str| {
            name == "caddy"
                || ["traefik.", "caddy.", "caddy_", "com.docker.compose."].iter().any(|p| name.starts_with(p))
        };
        let all = get(self.service, "labels").map(pairs).unwrap_or_default();
        let line = get(self.service, "labels").map_or(0, |labels| labels.line);
        let is_guard = |name: &str| {
            let name = name.to_lowercase();
            ["basicauth", "basic_auth", "digestauth", "forwardauth", "forward_auth", "ipallowlist", "ipwhitelist"]
                .iter()
                .any(|guard| name.contains(guard))
        };
        for (name, _, line) in all.iter().filter(|(name, ..)| is_of_proxy(name) && is_guard(name)) {
            self.refuse(
                *line,
                "labels",
                format!("`{name}` keeps people out, and nginx would let them in: add it to a template"),
            );
        }
        let (left_out, kept): (Vec<_>, Vec<_>) = all.into_iter().partition(|(name, ..)| is_of_proxy(name));
        if !left_out.is_empty() {
            let message = format!("those for another proxy: {}", left_out.len());
            self.note(line, "labels", Effect::Dropped, message);
        }
        if !kept.is_empty() {
            let kept = map(kept.into_iter().map(|(name, value, _)| (name, scalar(value.unwrap_or_default()))));
            self.verbatim("labels", line, &kept);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_of_proxies_say_hosts_and_ports() {
        let labels = [
            ("traefik.http.routers.web.rule", "(Host(`a.example.com`) || Host(`b.example.com`)) && PathPrefix(`/api`)"),
            ("traefik.http.services.web.loadbalancer.server.port", "3000"),
        ];
        let labels = labels.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        let expected = Proxied {
            hosts: vec!["a.example.com".to_owned(), "b.example.com".to_owned()],
            path: Some("/api".to_owned()),
            port: Some(3000),
        };
        assert_eq!(from_labels(&labels), Some(expected));
        let labels = [("caddy", "c.example.com"), ("caddy.reverse_proxy", "{{upstreams 8080}}")];
        let labels = labels.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        assert_eq!(from_labels(&labels).map(|found| found.hosts), Some(vec!["c.example.com".to_owned()]));
        assert_eq!(from_labels(&BTreeMap::new()), None);
    }

    #[test]
    fn ports_are_read_in_all_their_forms() {
        for (written, expected) in [
            ("80", Some("80")),
            ("8080:80", Some("80")),
            ("127.0.0.1:8080:80/tcp", Some("80")),
            ("[::1]:8080:80", Some("80")),
            ("53:53/udp", Some("53/udp")),
            ("3000-3005:3000-3005", Some("3000-3005")),
            ("http", None),
        ] {
            assert_eq!(port(&scalar(written)).map(|port| port.to_string()).as_deref(), expected, "{written}");
        }
        let long = map([("target", scalar("80")), ("published", scalar("8080")), ("mode", scalar("host"))]);
        assert_eq!(port(&long).map(|port| port.target), Some((80, 80)));
    }
}
