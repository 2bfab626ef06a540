//! This machine: Docker, nginx, directories, ports.

use std::{fs, os::unix::fs::MetadataExt as _, path::Path};

use super::{Findings, Patient};
use crate::{host::files, model::problem::chain};

/// The oldest API that demae is tested with: Docker 20.10.
const OLDEST_API: (u32, u32) = (1, 41);
/// The first nginx that keeps connections of clients open over a reload when told to.
const KEEPS_CONNECTIONS: (u32, u32, u32) = (1, 27, 4);
/// From this version on nginx keeps connections to upstreams unless told not to.
const KEEPS_UPSTREAMS: (u32, u32, u32) = (1, 29, 7);
/// Less than this is near its end, in bytes and in percent.
const LITTLE_SPACE: (u64, u64) = (1 << 30, 5);

/// Whether Docker answers.
pub(super) async fn docker(patient: &Patient<'_>, found: &mut Findings) -> bool {
    let socket = &patient.config.docker_socket;
    match patient.world.docker.version().await {
        Err(e) => {
            let remedy = format!(
                "start Docker, and let this user use `{socket}`: as root, or in the group docker; what needs Docker is not looked at until it answers"
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

pub(super) async fn nginx(patient: &Patient<'_>, found: &mut Findings) {
    let (world, setup) = (patient.world, &patient.config.nginx);
    let master = match world.nginx.master().await {
        Ok(master) => master,
        Err(e) => {
            let remedy =
                "start nginx, with demae's include in its `http` block; `[nginx]` in the agent's file says where it is";
            return found.fail("nginx", chain(&e), remedy);
        }
    };
    if let Err(e) = world.nginx.check_include().await {
        let remedy = "agents change nothing in nginx until then; docs/install.md has the line, and where it goes";
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
        Err(e) => found.fail("nginx", chain(&e), "see that `nginx.binary` is nginx"),
    }
    if let (Ok(version), Some(dir)) = (world.nginx.version().await, &setup.settings.templates)
        && version >= KEEPS_UPSTREAMS
    {
        templates(dir, found);
    }
    let observed = world.nginx.observe().await;
    match (&observed.live, &observed.error) {
        (None, Some(error)) if observed.unreadable => {
            let remedy = "a running agent cannot change nginx until that can be read: mend its rights, or what it says";
            found.fail("nginx files", error.clone(), remedy);
        }
        (None, _) => found.ok("nginx files", "there are none of demae's yet; the agent makes them"),
        (Some(_), Some(error)) => {
            let remedy = "`nginx.address` must be one that nginx listens on for demae's apps, in plain HTTP";
            found.fail("nginx files", error.clone(), remedy);
        }
        (Some(_), None) if observed.drifted => found.warn(
            "nginx files",
            "somebody changed files of demae's",
            "keep files of your own outside of demae's directory: a running agent writes these anew",
        ),
        (Some(live), None) if !observed.is_serving_live() => found.warn(
            "nginx files",
            format!("nginx serves another generation than {}", live.generation),
            "a running agent reloads nginx; if this stays, look at nginx's error log",
        ),
        (Some(live), None) => {
            found
                .ok("nginx files", format!("generation {} is served, for {} apps", live.generation, live.vhosts.len()));
        }
    }
}

/// Templates of the host's own that leave nginx to keep connections to instances: it finds them again by the path of the
/// route, and sends requests to the instance from before.
fn templates(dir: &Path, found: &mut Findings) {
    let names = match files::list(dir) {
        Ok(names) => names,
        Err(e) => return found.fail("templates", chain(&e), "let the agent's user read it"),
    };
    for name in names.iter().filter(|name| name.ends_with(".conf.hbs")) {
        let text = fs::read_to_string(dir.join(name)).unwrap_or_default();
        let says = |word: &str| text.contains(word);
        if says("upstream ") && !says("upstream_keepalive_off") && !says("keepalive 0") {
            found.fail(
                "templates",
                format!(
                    "`{}` lets this nginx keep connections to instances that are replaced",
                    dir.join(name).display()
                ),
                "put `{{#if upstream_keepalive_off}}keepalive 0;{{/if}}` at the end of its `upstream` block",
            );
        }
    }
}

/// Whether a symlink that an app puts in the place of its socket would be followed.
pub(super) fn sockets(patient: &Patient<'_>, found: &mut Findings) {
    let dir = patient.world.layout.sockets();
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
                "`{}` is not mounted with `nosymfollow`: an app may put a symlink in the place of its socket",
                dir.display()
            ),
            "enable deploy/var-lib-demae-sockets.mount, or mount it so by other means (Linux 5.10 or later)",
        ),
        None => found.warn(
            "sockets",
            format!("how `{}` is mounted cannot be told", dir.display()),
            "see that /proc is mounted",
        ),
    }
}

/// The options of the mount that a directory lies on, as proc(5) has them.
fn mount_options(dir: &Path) -> Option<String> {
    let dir = fs::canonicalize(dir).ok()?;
    let text = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let mounts = text.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(4);
        Some((Path::new(fields.next()?).to_owned(), fields.next()?.to_owned()))
    });
    // Of several at one place the last one counts.
    mounts
        .filter(|(at, _)| dir.starts_with(at))
        .max_by_key(|(at, _)| at.components().count())
        .map(|(_, options)| options)
}

pub(super) async fn directories(patient: &Patient<'_>, found: &mut Findings) {
    let layout = &patient.world.layout;
    for (check, path, missing) in [
        ("state directory", layout.state(), "the agent makes it; routes and what nginx serves lie there"),
        ("run directory", layout.run(), "the agent makes it, or systemd does"),
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
            let remedy = "move what lies there; the agent needs a directory of its own";
            found.fail(check, format!("`{}` is no directory", path.display()), remedy);
            continue;
        }
        // nginx's workers pass through both on their way to sockets.
        if meta.mode() & 0o001 == 0 {
            let remedy = format!("`chmod 0755 {}`: what is secret is closed further below", path.display());
            found.fail(
                check,
                format!("`{}` has mode {:04o}, and nginx cannot pass", path.display(), meta.mode() & 0o7777),
                remedy,
            );
        } else if meta.uid() != rustix::process::geteuid().as_raw() {
            let remedy = "run the agent, and this, as the user who owns it";
            found.warn(check, format!("`{}` belongs to user {}", path.display(), meta.uid()), remedy);
        } else {
            found.ok(check, format!("`{}`", path.display()));
        }
        space(path, found);
    }
    // Most of what fills a host's disks are images and logs.
    if patient.docker_answers
        && let Ok(Some(images)) = patient.world.docker.root_dir().await
    {
        space(&images, found);
    }
    let group = if patient.docker_answers || patient.config.nginx.container.is_none() {
        patient.world.nginx.group().await
    } else {
        None
    };
    for (dir, remedy) in [
        (layout.sockets(), "a running agent opens it to nginx by itself, once it serves a socket"),
        (layout.routes(), "`chmod 0755` it: there are only symlinks in it"),
    ] {
        let Ok(meta) = fs::metadata(&dir) else { continue };
        // Who nginx's workers are is not known while none run.
        let may = meta.mode() & 0o001 != 0
            || meta.mode() & 0o010 != 0 && group.is_none_or(|group| group == meta.gid())
            || group == Some(0);
        if !may {
            let (mode, gid) = (meta.mode() & 0o7777, meta.gid());
            let text = format!("`{}` has mode {mode:04o} and group {gid}, and nginx cannot pass", dir.display());
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
            let remedy = "make room: a deploy stops where files cannot be written, and what serves goes on";
            found.warn("disk", format!("{} MiB are free where `{}` lies", free >> 20, path.display()), remedy);
        }
        Ok((free, _)) => found.ok("disk", format!("{} MiB are free where `{}` lies", free >> 20, path.display())),
        Err(e) => found.warn("disk", chain(&e), "see that it is mounted"),
    }
}

pub(super) fn ports(patient: &Patient<'_>, found: &mut Findings) {
    const KERNEL: &str = "/proc/sys/net/ipv4/ip_local_port_range";
    let range = &patient.config.ports;
    let shown = format!("{}-{}", range.start(), range.end());
    let text = fs::read_to_string(KERNEL).unwrap_or_default();
    let mut numbers = text.split_whitespace().filter_map(|n| n.parse::<u16>().ok());
    let (Some(from), Some(to)) = (numbers.next(), numbers.next()) else {
        return found.warn(
            "ports",
            format!("`{KERNEL}` cannot be read"),
            "keep `ports.range` out of the kernel's own range",
        );
    };
    if *range.start() <= to && from <= *range.end() {
        let remedy = format!("set `ports.range` below {from}: else an outgoing connection may hold the port of an app");
        found.warn(
            "ports",
            format!("{shown} overlaps {from}-{to}, which the kernel takes for outgoing connections"),
            remedy,
        );
    } else {
        found.ok("ports", format!("{shown}, outside of the kernel's {from}-{to}"));
    }
}
