//! Parsers for single values of a spec: what they may be, and what to write instead.

use super::{Constraint, Device, PullPolicy, Volume, VolumeSource};
use crate::model::text;

/// Host directories below which an app may mount, on a host without a policy of its own. All else belongs to the system or
/// to demae: a denylist would be incomplete.
pub const MOUNTABLE: &[&str] = &["/srv", "/opt", "/mnt", "/media", "/data", "/home", "/var/www"];

/// Directories inside a container that must not be mounted over: the app would lose its own system.
const SYSTEM_DIRS: &[&str] = &[
    "/", "/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/proc", "/root", "/run", "/sbin", "/sys", "/usr", "/var",
    "/var/lib", "/var/run",
];

/// Whether a directory belongs to the system, so nothing may be mounted over it.
pub(super) fn is_system_dir(dir: &str) -> bool {
    SYSTEM_DIRS.contains(&dir)
}

pub(super) fn printable(text: &str) -> Result<&str, String> {
    if text.is_empty() || text.chars().any(char::is_control) {
        return Err("empty text and control characters are not allowed".to_owned());
    }
    Ok(text)
}

pub(super) fn absolute(text: &str) -> Result<&str, String> {
    let clean = text.starts_with('/')
        && (text == "/" || !text.ends_with('/'))
        && !text[1..].split('/').any(|part| (part.is_empty() && text != "/") || part == "." || part == "..")
        && !text.chars().any(|c| c.is_control() || c == ',' || c == ':');
    if clean { Ok(text) } else { Err(format!("`{}` is not a plain absolute path", text.escape_debug())) }
}

pub(super) fn http_path(text: &str) -> Result<String, String> {
    let fine = text.starts_with('/')
        && text.len() <= 1024
        && text.bytes().all(|b| b.is_ascii_graphic() && !b"\"'\\;{}<>`|^#".contains(&b));
    if fine { Ok(text.to_owned()) } else { Err(format!("`{}` is not a path such as `/healthz`", text.escape_debug())) }
}

pub(super) fn host_header(text: &str) -> Result<String, String> {
    let fine = !text.is_empty()
        && text.len() <= 260
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b".-_:[]".contains(&b));
    if fine {
        Ok(text.to_owned())
    } else {
        Err(format!("`{}` is not a host such as `web.example.com` or `localhost:8080`", text.escape_debug()))
    }
}

pub(super) fn network(text: &str) -> Result<Option<String>, String> {
    match text {
        "bridge" | "default" => Ok(None),
        t if t.starts_with("container:") || t.starts_with("service:") => {
            Err("an app cannot join the network of another container".to_owned())
        }
        t if t.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) && !t.is_empty() => {
            Ok(Some(t.to_owned()))
        }
        t => Err(format!("`{}` is not the name of a network", t.escape_debug())),
    }
}

/// Limits of a process that can be given: those that take nothing from others. Docker's own names, without `nice`,
/// `rtprio` and `rttime`, which give precedence over other apps.
const LIMITS: [&str; 12] =
    ["core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nofile", "nproc", "rss", "sigpending", "stack"];

pub(super) fn limit_name(text: &str) -> Result<(), String> {
    if LIMITS.contains(&text) {
        return Ok(());
    }
    Err(format!("`{}` is not a limit that can be given; these are: {}", text.escape_debug(), LIMITS.join(", ")))
}

/// A limit; -1 for none.
pub(super) fn limit_value(text: &str) -> Result<i64, String> {
    match text.parse::<i64>() {
        Ok(value) if value >= -1 => Ok(value),
        _ => Err(format!("`{}` is not a whole number, or -1 for no limit", text.escape_debug())),
    }
}

pub(super) fn memory(text: &str) -> Result<i64, String> {
    match text::size(text)? {
        // Docker's own minimum.
        bytes if bytes < 6 * 1024 * 1024 => Err("Docker needs at least `6M`".to_owned()),
        bytes => i64::try_from(bytes).map_err(|_| "this is too much".to_owned()),
    }
}

pub(super) fn signal(text: &str) -> Result<String, String> {
    let name = text.strip_prefix("SIG").unwrap_or(text);
    let fine = (name.parse::<u8>().is_ok_and(|n| (1..=64).contains(&n)))
        || (!name.is_empty()
            && name.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b"+-".contains(&b)));
    if fine { Ok(text.to_owned()) } else { Err(format!("`{}` is not a signal such as `SIGTERM`", text.escape_debug())) }
}

pub(super) fn pull_policy(text: &str) -> Result<PullPolicy, String> {
    match text {
        "missing" | "if_not_present" => Ok(PullPolicy::Missing),
        "always" => Ok(PullPolicy::Always),
        "never" => Ok(PullPolicy::Never),
        other => Err(format!("`{other}` is not a pull policy; use `missing`, `always` or `never`")),
    }
}

pub(super) fn nano_cpus(text: &str) -> Result<i64, String> {
    match text.parse::<f64>() {
        #[expect(clippy::cast_possible_truncation, reason = "checked to be in range by the guard")]
        Ok(n) if (0.01..=1024.0).contains(&n) => Ok((n * 1e9).round() as i64),
        _ => Err(format!("`{text}` is not a number of cores such as `1.5`")),
    }
}

pub(super) fn volume(text: &str) -> Result<Volume, String> {
    let mut parts = text.split(':');
    let (source, target, mode) = match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(source), Some(target), mode, None) => (source, target, mode),
        _ => {
            return Err(format!(
                "`{}` is not a volume; write `/host/path:/path` or `name:/path`, with `:ro` to only read",
                text.escape_debug()
            ));
        }
    };
    let read_only = match mode {
        None | Some("rw") => false,
        Some("ro") => true,
        Some(other) => return Err(format!("`{other}` is not a mode of a volume; use `ro` or `rw`")),
    };
    let target = absolute(target)?.to_owned();
    if target == "/" {
        return Err("a volume cannot be mounted over `/`".to_owned());
    }
    let source = if source.starts_with('/') {
        VolumeSource::Host(absolute(source)?.to_owned())
    } else if source.len() > 1
        && source.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        && !source.starts_with('.')
    {
        VolumeSource::Named(source.to_owned())
    } else {
        return Err(format!("`{}` is neither an absolute path nor the name of a volume", source.escape_debug()));
    };
    Ok(Volume { source, target, read_only })
}

pub(super) fn capability(text: &str) -> Result<String, String> {
    let name = text.to_ascii_uppercase();
    let name = name.strip_prefix("CAP_").unwrap_or(&name);
    let fine = !name.is_empty() && name.bytes().all(|b| b.is_ascii_uppercase() || b == b'_');
    if fine {
        Ok(name.to_owned())
    } else {
        Err(format!("`{}` is not a capability such as `NET_ADMIN`", text.escape_debug()))
    }
}

/// `/dev/fuse`, `/dev/ttyUSB0:/dev/modem`, or with permissions of `rwm` as a third part.
pub(super) fn device(text: &str) -> Result<Device, String> {
    let problem = || format!("`{}` is not a device such as `/dev/fuse` or `/dev/sda:/dev/xvda:r`", text.escape_debug());
    let parts: Vec<&str> = text.split(':').collect();
    let (host, container, permissions) = match parts.as_slice() {
        [host] => (host, host, "rwm"),
        [host, container] => (host, container, "rwm"),
        [host, container, permissions] => (host, container, *permissions),
        _ => return Err(problem()),
    };
    let is_known = !permissions.is_empty() && permissions.bytes().all(|b| b"rwm".contains(&b));
    let is_below = |path: &str| absolute(path).is_ok_and(|path| path.starts_with("/dev/"));
    if !is_known || !is_below(host) || absolute(container).is_err() {
        return Err(problem());
    }
    let (host, container) = ((*host).to_owned(), (*container).to_owned());
    Ok(Device { host, container, permissions: permissions.to_owned() })
}

pub(super) fn constraint(text: &str) -> Result<Constraint, String> {
    let (label, equal, value) = match (text.split_once("=="), text.split_once("!=")) {
        (Some((label, value)), None) => (label, true, value),
        (None, Some((label, value))) => (label, false, value),
        _ => {
            return Err(format!(
                "`{}` is not a constraint; write `label == value` or `label != value`",
                text.escape_debug()
            ));
        }
    };
    let (label, value) = (label.trim(), value.trim());
    let fits = |text: &str| text.len() <= 200 && printable(text).is_ok();
    if !fits(label) || !fits(value) {
        return Err(format!(
            "`{}` is not a constraint; write `label == value` or `label != value`",
            text.escape_debug()
        ));
    }
    Ok(Constraint { label: label.to_owned(), value: value.to_owned(), equal })
}
