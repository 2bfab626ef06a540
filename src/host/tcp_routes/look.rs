//! Looks at what the routes need of this host, and keeps it as it must be.

use std::{net::Ipv4Addr, path::Path, time::Duration};

use ipnet::Ipv4Net;
use serde::Deserialize;
use tokio_util::sync::CancellationToken;

use super::{
    Settings, TcpRouteError, TcpRoutes,
    addresses::dynamic_part,
    kernel::{Changes, ip, nft},
    ruleset,
};
use crate::{
    host::docker::BridgeNetwork,
    model::{name::AppName, problem::chain},
};

/// How soon to look again while Docker does not answer.
const AWAY: Duration = Duration::from_secs(1);
/// After a change of the kernel's tables, others may follow at once.
const SETTLE: Duration = Duration::from_millis(100);

impl TcpRoutes {
    /// Looks at everything that the routes need, and puts back what is missing. `nginx` is a process of nginx, if one
    /// is known. False if Docker does not answer: then nothing is known, and nothing can be created either.
    async fn check(&self, nginx: Option<i32>) -> bool {
        let found = match self.look(nginx).await {
            Ok(found) => found,
            Err(TcpRouteError::Docker(e)) => {
                tracing::debug!("{}", chain(&e));
                return false;
            }
            Err(e) => Err(chain(&e)),
        };
        self.usable.send_if_modified(|known| {
            let is_new = known.as_ref() != Some(&found);
            if is_new && let Err(why) = &found {
                tracing::info!("TCP apps get published ports, and nginx is reloaded for them: {why}");
            }
            *known = Some(found);
            is_new
        });
        true
    }

    /// What is in the way of such routes on this host. Changes nothing.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub async fn why_impossible(&self, nginx: Option<i32>) -> Result<Option<String>, TcpRouteError> {
        if let Some(nginx) = nginx
            && !is_same_network(nginx)
        {
            return Ok(Some("nginx is in a network namespace of its own".to_owned()));
        }
        let routes = ip(&["-j", "-4", "route", "show", "table", "all"]).await?;
        if let Some(why) = self.conflict(&routes) {
            return Ok(Some(why));
        }
        let tables = nft(&["list", "tables", "ip"], None).await?;
        for name in tables.lines().filter_map(|line| line.strip_prefix("table ip demae_")) {
            let table = format!("demae_{}", name.trim());
            // It may be gone since.
            if table != self.table
                && let Ok(text) = nft(&["list", "table", "ip", &table], None).await
                && ruleset::range_of(&text).is_none_or(|range| overlap(&range, &self.settings.range))
            {
                return Ok(Some(format!(
                    "table `{table}` of another agent has addresses of `tcp_routes.range` {}: give each agent a range of its own; if that agent is gone, `nft delete table ip {table}`",
                    self.settings.range
                )));
            }
        }
        Ok(None)
    }

    async fn look(&self, nginx: Option<i32>) -> Result<Result<(), String>, TcpRouteError> {
        // What serves comes first.
        let has_slots = !self.all()?.slots.is_empty();
        if (has_slots || self.settings.enabled)
            && let Some(why) = self.why_impossible(nginx).await?
        {
            return Ok(Err(why));
        }
        if has_slots {
            self.restore().await?;
        }
        if !self.settings.enabled {
            return Ok(Err("`tcp_routes.enabled` is false".to_owned()));
        }
        let Some(dynamic) = dynamic_part(self.settings.subnet) else {
            return Ok(Err(format!("`tcp_routes.subnet` {} is too small", self.settings.subnet)));
        };
        let Settings { network: name, bridge, subnet, .. } = self.settings.clone();
        if let Err(why) = self.docker.ensure_network(&BridgeNetwork { name, bridge, subnet, dynamic }).await? {
            return Ok(Err(why));
        }
        if !Path::new("/sys/class/net").join(&self.settings.bridge).exists() {
            return Ok(Err(format!(
                "there is no interface `{}` here: Docker is on another machine, or this agent is in a network namespace of its own",
                self.settings.bridge
            )));
        }
        if !has_slots {
            self.restore().await?;
        }
        Ok(Ok(()))
    }

    /// What else on this host uses the addresses, by its routes as `ip -j` prints them.
    fn conflict(&self, routes: &str) -> Option<String> {
        let routes: Vec<Route> = match serde_json::from_str(routes) {
            Ok(routes) => routes,
            Err(e) => return Some(format!("`ip -j route` prints what cannot be read: {e}")),
        };
        let Settings { subnet, range, bridge, .. } = &self.settings;
        if overlap(subnet, range) {
            return Some(format!("`tcp_routes.subnet` {subnet} and `tcp_routes.range` {range} overlap"));
        }
        for route in routes {
            // A wider route than any network's, as some VPNs have in place of the default one, is none to this host.
            let Some(net) = route.net().filter(|net| net.prefix_len() >= 8) else { continue };
            let dev = route.dev.unwrap_or_default();
            let is_own = net == *range && dev == "lo" && route.kind == "local";
            if overlap(&net, range) && !is_own {
                return Some(format!("`tcp_routes.range` {range} is in use: {net} leads to `{dev}`"));
            }
            if overlap(&net, subnet) && dev != *bridge {
                return Some(format!("`tcp_routes.subnet` {subnet} is in use: {net} leads to `{dev}`"));
            }
        }
        None
    }

    /// Keeps everything as it must be, until the token is cancelled: looks after each change of the kernel's tables and
    /// routes, and after each `every`. After an entry was put back, `changed` is called.
    pub async fn keep<N: Future<Output = Option<i32>>>(
        &self,
        nginx: impl Fn() -> N,
        changed: impl Fn(AppName),
        every: Duration,
        token: CancellationToken,
    ) {
        let changes = Changes::listen().map_err(|e| tracing::debug!("changes of the kernel are not heard: {e}")).ok();
        let mut every_now = every;
        let mut is_due = true;
        loop {
            if is_due {
                let before = self.kernel.lock().await.elements.clone();
                every_now = if self.check(nginx().await).await { every } else { AWAY };
                let after = self.kernel.lock().await.elements.clone();
                if before.is_some()
                    && before != after
                    && let Ok(disk) = self.all()
                {
                    disk.slots.into_keys().for_each(&changed);
                }
            }
            let next = async {
                match &changes {
                    Some(changes) => {
                        if changes.next().await.is_err() {
                            tokio::time::sleep(every).await;
                        }
                        tokio::time::sleep(SETTLE).await;
                    }
                    None => std::future::pending().await,
                }
            };
            let is_heard = tokio::select! {
                () = token.cancelled() => return,
                heard = tokio::time::timeout(every_now, next) => heard.is_ok(),
            };
            // Most of what is heard is of Docker's own rules, or of this agent's switches.
            is_due = !(is_heard && self.is_usable() && self.is_intact().await);
        }
    }

    /// Whether table, route and network interface are as they were left.
    async fn is_intact(&self) -> bool {
        let range = self.settings.range.to_string();
        let has_bridge = Path::new("/sys/class/net").join(&self.settings.bridge).exists();
        let has_route = async {
            let routes = ip(&["-4", "route", "show", "table", "local", "exact", &range]).await;
            routes.is_ok_and(|routes| routes.contains("dev lo"))
        };
        if !has_bridge || !has_route.await {
            return false;
        }
        let known = self.kernel.lock().await;
        let (Some(elements), Some(rules)) = (&known.elements, &known.rules) else { return false };
        self.list().await.is_ok_and(|listed| listed.is_some_and(|(e, r)| (&e, &r) == (elements, rules)))
    }
}

fn overlap(a: &Ipv4Net, b: &Ipv4Net) -> bool {
    a.contains(b) || b.contains(a)
}

/// A route, as `ip -j` prints it.
#[derive(Debug, Deserialize)]
struct Route {
    dst: String,
    #[serde(default)]
    dev: Option<String>,
    #[serde(default, rename = "type")]
    kind: String,
}

impl Route {
    /// Its addresses; `None` for the default route.
    fn net(&self) -> Option<Ipv4Net> {
        self.dst.parse().ok().or_else(|| self.dst.parse::<Ipv4Addr>().ok().map(Ipv4Net::from))
    }
}

/// Connections that the kernel tracks, and its limit; `None` if it tracks none. Each is one for a
/// while after its end: for a second to a TCP app, for two minutes else.
pub fn conntrack() -> Option<(u64, u64)> {
    let read = |name: &str| {
        let text = std::fs::read_to_string(format!("/proc/sys/net/netfilter/nf_conntrack_{name}")).ok()?;
        text.trim().parse().ok()
    };
    Some((read("count")?, read("max")?))
}

/// Whether a process is in the same network namespace as this one; true if it cannot be told.
fn is_same_network(pid: i32) -> bool {
    let own = std::fs::read_link("/proc/self/ns/net");
    let other = std::fs::read_link(format!("/proc/{pid}/ns/net"));
    !matches!((own, other), (Ok(own), Ok(other)) if own != other)
}
