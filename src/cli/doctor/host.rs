//! This machine: Docker, nginx, directories, ports.

use std::{fs, os::unix::fs::MetadataExt as _, path::Path};

use super::{Context, Findings};
use crate::{
    host::{files, tcp_routes},
    model::problem::chain,
};

/// The oldest API that demae is tested with: Docker 20.10.
const OLDEST_API: (u32, u32) = (1, 41);
/// The first nginx that can keep client connections open over a reload.
const KEEPS_CONNECTIONS: (u32, u32, u32) = (1, 27, 4);
/// From this version on nginx keeps connections to upstreams unless configured otherwise.
const KEEPS_UPSTREAMS: (u32, u32, u32) = (1, 29, 7);
/// From this share of its limit on, in percent, many tracked connections are reported.
const MUCH_TRACKED: u64 = 80;
/// Below both of these a disk is nearly full, in bytes and in percent.
const LITTLE_SPACE: (u64, u64) = (1 << 30, 5);

/// Checks Docker; true if it answers.
pub(super) async fn docker(context: &Context<'_>, found: &mut Findings) -> bool {
    let socket = &context.config.docker_socket;
    match context.world.docker.version().await {
        Err(e) => {
            let remedy = format!(
                "start Docker, and let this user use `{socket}`: as root, or in the group docker; checks that need Docker are skipped until it answers"
            );
            found.fail("docker", chain(&e), remedy);
            false
        }
        Ok((version, api)) => {
            let mut parts = api.split('.').map(|p| p.parse().unwrap_or(0));
            let number = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
            if number < OLDEST_API {
                let (major, minor) = OLDEST_API;
                let remedy = format!("upgrade Docker: demae is tested with API {major}.{minor} and later");
                found.warn("docker", format!("Docker {version} speaks API {api}"), remedy);
            } else {
                found.ok("docker", format!("Docker {version}, API {api}"));
            }
            true
        }
    }
}

/// Checks whether the rules for what may run here can be used.
pub(super) fn policy(context: &Context<'_>, found: &mut Findings) {
    let (policy, path) = (context.world.docker.policy(), context.config.policy.display());
    match policy.why_unusable() {
        Some(why) => {
            found.fail("policy", why.to_owned(), "nothing is created on this host until then; what runs goes on");
        }
        None if !context.config.policy.exists() => {
            found.ok(
                "policy",
                format!("there is no `{path}`: specs may ask for what docs/policy.md lists as allowed without one"),
            );
        }
        None => {
            found.ok("policy", format!("`{path}` holds, with rules of their own for {} apps", policy.apps().count()));
        }
    }
}

/// Checks whether the logins at registries can be read, without using them.
pub(super) fn registries(context: &Context<'_>, found: &mut Findings) {
    let problems = context.world.docker.login_problems();
    for problem in &problems {
        let remedy =
            "no image is pulled from there until then; `[[registry]]` in the agent's file, and Docker's `config.json`";
        found.fail("registries", problem.clone(), remedy);
    }
    if problems.is_empty() {
        found
            .ok("registries", format!("{} in the agent's file; else Docker's logins", context.config.registries.len()));
    }
}

pub(super) async fn nginx(context: &Context<'_>, found: &mut Findings) {
    let (world, setup) = (context.world, &context.config.nginx);
    let master = match world.nginx.master().await {
        Ok(master) => master,
        Err(e) => {
            let remedy =
                "start nginx, with demae's include in its `http` block; `[nginx]` in the agent's file says where it is";
            return found.fail("nginx", chain(&e), remedy);
        }
    };
    if let Err(e) = world.nginx.check_include().await {
        let remedy = "agents change nothing in nginx until then; docs/install.md has the line and its place";
        found.fail("nginx", chain(&e), remedy);
    }
    match world.nginx.version().await {
        Ok((a, b, c)) if (a, b, c) < KEEPS_CONNECTIONS && setup.settings.profile.is_default() => found.warn(
            "nginx",
            format!(
                "nginx {a}.{b}.{c} runs as process {master}; it may lose requests on reused connections at a reload"
            ),
            "use socket mode, which reloads seldom, or `nginx.profile = \"strict\"`, or nginx 1.27.4 or later",
        ),
        Ok((a, b, c)) => {
            found.ok("nginx", format!("nginx {a}.{b}.{c} runs as process {master}"));
        }
        Err(e) => found.fail("nginx", chain(&e), "set `nginx.binary` to nginx"),
    }
    if let (Ok(version), Some(dir)) = (world.nginx.version().await, &setup.settings.templates)
        && version >= KEEPS_UPSTREAMS
    {
        templates(dir, found);
    }
    let observed = world.nginx.observe().await;
    match (&observed.live, &observed.error) {
        (None, Some(error)) if observed.unreadable => {
            let remedy = "a running agent cannot change nginx until the file can be read: fix its mode, or its content";
            found.fail("nginx files", error.clone(), remedy);
        }
        (None, _) => found.ok("nginx files", "there are none of demae's yet; the agent creates them"),
        (Some(_), Some(error)) => {
            let remedy = "`nginx.address` must be one that nginx listens on for demae's apps, in plain HTTP";
            found.fail("nginx files", error.clone(), remedy);
        }
        (Some(_), None) if observed.drifted => found.warn(
            "nginx files",
            "files of demae's were modified",
            "keep files of your own outside of demae's directory: a running agent overwrites these",
        ),
        (Some(live), None) if !observed.is_serving_live() => found.warn(
            "nginx files",
            format!("nginx serves another generation than {}", live.generation),
            "a running agent reloads nginx; if this persists, check nginx's error log",
        ),
        (Some(live), None) => {
            found
                .ok("nginx files", format!("generation {} is served, for {} apps", live.generation, live.vhosts.len()));
        }
    }
}

/// Checks for templates of the host that let nginx keep connections to instances: nginx reuses them by the path of the
/// route, and sends requests to the replaced instance.
fn templates(dir: &Path, found: &mut Findings) {
    let names = match files::list(dir) {
        Ok(names) => names,
        Err(e) => return found.fail("templates", chain(&e), "let the agent's user read it"),
    };
    for name in names.iter().filter(|name| name.ends_with(".conf.hbs")) {
        let text = match fs::read_to_string(dir.join(name)) {
            Ok(text) => text,
            Err(e) => {
                found.fail("templates", format!("cannot read `{name}`: {e}"), "let the agent's user read it");
                continue;
            }
        };
        let says = |word: &str| text.contains(word);
        if says("upstream ") && !says("upstream_keepalive_off") && !says("keepalive 0") {
            found.fail(
                "templates",
                format!("`{}` lets this nginx keep connections to replaced instances", dir.join(name).display()),
                "put `{{#if upstream_keepalive_off}}keepalive 0;{{/if}}` at the end of its `upstream` block",
            );
        }
    }
}

/// Checks whether a symlink in place of an app's socket would be followed.
pub(super) fn sockets(context: &Context<'_>, found: &mut Findings) {
    let dir = context.world.layout.sockets();
    if !dir.is_dir() {
        return;
    }
    match mount_options(&dir) {
        Some(options) if options.split(',').any(|option| option == "nosymfollow") => {
            found.ok("sockets", format!("no symlink below `{}` is followed", dir.display()));
        }
        Some(_) => found.warn(
            "sockets",
            format!(
                "`{}` is not mounted with `nosymfollow`: an app may replace its socket by a symlink",
                dir.display()
            ),
            "enable deploy/var-lib-demae-sockets.mount, or mount it with `nosymfollow` by other means (Linux 5.10 or later)",
        ),
        None => found.warn(
            "sockets",
            format!("the mount options of `{}` are unknown", dir.display()),
            "make sure that /proc is mounted",
        ),
    }
}

/// The mount options of a directory, from proc(5).
fn mount_options(dir: &Path) -> Option<String> {
    let dir = fs::canonicalize(dir).ok()?;
    let text = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let mounts = text.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(4);
        Some((Path::new(fields.next()?).to_owned(), fields.next()?.to_owned()))
    });
    // Of several mounts at one place the last one counts.
    mounts
        .filter(|(at, _)| dir.starts_with(at))
        .max_by_key(|(at, _)| at.components().count())
        .map(|(_, options)| options)
}

pub(super) async fn directories(context: &Context<'_>, found: &mut Findings) {
    let layout = &context.world.layout;
    for (check, path, missing) in [
        ("state directory", layout.state(), "the agent creates it; it holds routes and nginx files"),
        ("run directory", layout.run(), "the agent or systemd creates it"),
    ] {
        let meta = match fs::metadata(path) {
            Ok(meta) => meta,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                found.ok(check, format!("`{}` is not there yet: {missing}", path.display()));
                if let Some(place) = path.ancestors().find(|p| p.is_dir()) {
                    space(place, found);
                }
                continue;
            }
            Err(e) => {
                found.fail(check, format!("`{}`: {e}", path.display()), "let the agent's user read it");
                continue;
            }
        };
        if !meta.is_dir() {
            let remedy = "move that file; the agent needs a directory of its own";
            found.fail(check, format!("`{}` is not a directory", path.display()), remedy);
            continue;
        }
        // nginx's workers traverse both to reach sockets.
        if meta.mode() & 0o001 == 0 {
            let remedy = format!("`chmod 0755 {}`: secrets are protected further below", path.display());
            found.fail(
                check,
                format!("`{}` has mode {:04o}, and nginx cannot traverse it", path.display(), meta.mode() & 0o7777),
                remedy,
            );
        } else if meta.uid() != rustix::process::geteuid().as_raw() {
            let remedy = "run the agent, and this, as its owner";
            found.warn(check, format!("`{}` belongs to user {}", path.display(), meta.uid()), remedy);
        } else {
            found.ok(check, format!("`{}`", path.display()));
        }
        space(path, found);
    }
    // Images and logs take most of a host's disks.
    if context.docker_answers
        && let Ok(Some(images)) = context.world.docker.root_dir().await
    {
        space(&images, found);
    }
    let group = if context.docker_answers || context.config.nginx.container.is_none() {
        context.world.nginx.group().await
    } else {
        None
    };
    for (dir, remedy) in [
        (layout.sockets(), "a running agent opens it to nginx once it serves a socket"),
        (layout.routes(), "`chmod 0755` it: it holds only symlinks"),
    ] {
        let Ok(meta) = fs::metadata(&dir) else { continue };
        // The group of nginx's workers is unknown while none run.
        let may = meta.mode() & 0o001 != 0
            || meta.mode() & 0o010 != 0 && group.is_none_or(|group| group == meta.gid())
            || group == Some(0);
        if !may {
            let (mode, gid) = (meta.mode() & 0o7777, meta.gid());
            let text = format!("`{}` has mode {mode:04o} and group {gid}, and nginx cannot traverse it", dir.display());
            found.fail("state directory", text, remedy);
        }
    }
    if let Ok(meta) = fs::metadata(layout.ledger())
        && meta.mode() & 0o077 != 0
    {
        let remedy =
            format!("`chmod 0600 {}`, and change the secrets that others may have read", layout.ledger().display());
        found.fail("ledger", format!("its mode is {:04o}, and it holds secrets", meta.mode() & 0o7777), remedy);
    }
}

fn space(path: &Path, found: &mut Findings) {
    let (bytes, percent) = LITTLE_SPACE;
    match files::space(path) {
        Ok((free, size)) if free < bytes && free * 100 < size * percent => {
            let remedy = "free disk space: deploys stop when files cannot be written, while apps keep serving";
            found.warn("disk", format!("{} MiB are free on the disk of `{}`", free >> 20, path.display()), remedy);
        }
        Ok((free, _)) => found.ok("disk", format!("{} MiB are free on the disk of `{}`", free >> 20, path.display())),
        Err(e) => found.warn("disk", chain(&e), "make sure that it is mounted"),
    }
}

pub(super) fn ports(context: &Context<'_>, found: &mut Findings) {
    const KERNEL: &str = "/proc/sys/net/ipv4/ip_local_port_range";
    let range = &context.config.ports;
    let shown = format!("{}-{}", range.start(), range.end());
    // Without it there is nothing to compare with.
    let text = fs::read_to_string(KERNEL).unwrap_or_else(|_| String::new());
    let mut numbers = text.split_whitespace().filter_map(|n| n.parse::<u16>().ok());
    let (Some(from), Some(to)) = (numbers.next(), numbers.next()) else {
        return found.warn(
            "ports",
            format!("`{KERNEL}` cannot be read"),
            "keep `ports.range` out of the kernel's own range",
        );
    };
    if *range.start() <= to && from <= *range.end() {
        let remedy =
            format!("set `ports.range` below {from}: otherwise an outgoing connection may hold the port of an app");
        found.warn(
            "ports",
            format!("{shown} overlaps {from}-{to}, which the kernel takes for outgoing connections"),
            remedy,
        );
    } else {
        found.ok("ports", format!("{shown}, outside of the kernel's {from}-{to}"));
    }
}

pub(super) async fn tcp_routes(context: &Context<'_>, found: &mut Findings) {
    const CHECK: &str = "tcp routes";
    let (routes, settings) = (&context.world.tcp_routes, &context.config.tcp_routes);
    if !settings.enabled {
        found.ok(CHECK, "`tcp_routes.enabled` is false: TCP apps get published ports, and nginx is reloaded for them");
        return;
    }
    let nginx = context.world.nginx.known_master();
    match routes.why_impossible(nginx).await {
        Err(e) => found.warn(
            CHECK,
            chain(&e),
            "TCP apps get published ports until that works; docs/install.md says what is needed",
        ),
        Ok(Some(why)) => found.warn(
            CHECK,
            why,
            "TCP apps get published ports until that is resolved; docs/install.md says what is needed",
        ),
        Ok(None) if routes.is_ready() => {
            found.ok(
                CHECK,
                format!("network `{}` {}, stable addresses {}", settings.network, settings.subnet, settings.range),
            );
        }
        Ok(None) => found.ok(CHECK, "nothing is in the way; the agent makes the network, the route and the table"),
    }
    if let Some((entries, limit)) = tcp_routes::conntrack() {
        let text = format!("the kernel tracks {entries} connections of at most {limit}");
        if entries * 100 >= limit * MUCH_TRACKED {
            let remedy = "raise `net.netfilter.nf_conntrack_max`: beyond it new connections are dropped";
            found.warn(CHECK, text, remedy);
        } else {
            found.ok(CHECK, text);
        }
    }
}
