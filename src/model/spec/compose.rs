//! Keys that are read as Compose has them, so that a service can be pasted.

use std::collections::BTreeMap;

use super::{
    Ulimit,
    fields::{Fields, Reader},
    values::{absolute, limit_name, limit_value, memory, nano_cpus, printable},
};
use crate::model::{
    text,
    yaml::{Node, Value},
};

/// Longest host name of a container, as the kernel has it (`HOST_NAME_MAX`, sethostname(2)).
const MOST_HOSTNAME: usize = 64;
/// Most shared memory: what does not fit into memory cannot be shared.
const MOST_SHM: u64 = 1 << 40;

impl Reader {
    /// Keys without an effect: what they ask for is so anyway, or is refused.
    pub(super) fn without_effect(&mut self, f: &Fields<'_>) {
        self.read(f, "restart", |t| match t.split(':').next() {
            Some("always" | "unless-stopped" | "on-failure") => Ok(()),
            Some("no") => Err("an app that has ended is started again; for a command that runs once for each release there is `release_command`"),
            _ => Err("write `always`, `unless-stopped` or `on-failure`; an app that has ended is started again in each case"),
        });
        for name in ["stdin_open", "tty"] {
            if let (Some(true), Some(node)) = (self.boolean(f, name), f.get(name)) {
                self.problem(name, node, "an app has no terminal; leave it out");
            }
        }
        self.items(f, "security_opt", |t| match t {
            "no-new-privileges" | "no-new-privileges:true" | "no-new-privileges=true" => Ok(()),
            _ => Err("only `no-new-privileges` can be given: the engine's profiles stay on"),
        });
    }

    /// `deploy.restart_policy`, in the same way.
    pub(super) fn restart_policy(&mut self, deploy: &Fields<'_>) {
        let Some(node) = deploy.get("restart_policy") else { return };
        let f = self.fields("deploy.restart_policy", node);
        self.read(&f, "condition", |t| match t {
            "any" | "on-failure" => Ok(()),
            "none" => Err("an app that has ended is started again; for a command that runs once for each release there is `release_command`"),
            _ => Err("write `any` or `on-failure`; an app that has ended is started again in each case"),
        });
        for name in ["delay", "window"] {
            self.read(&f, name, text::duration);
        }
        self.number(&f, "max_attempts", 0, u32::MAX);
    }

    /// Whether a process may not get more rights than it was started with.
    pub(super) fn no_new_privileges(&mut self, f: &Fields<'_>) -> bool {
        !self.list(f, "security_opt").is_empty()
    }

    pub(super) fn hostname(&mut self, f: &Fields<'_>) -> Option<String> {
        self.read(f, "hostname", |t| {
            let label = |l: &str| !l.is_empty() && !l.starts_with('-') && !l.ends_with('-') && l.len() <= 63;
            let known = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
            let fine = t.len() <= MOST_HOSTNAME && t.split('.').all(|l| label(l) && l.bytes().all(known));
            if fine { Ok(t.to_owned()) } else { Err(format!("`{}` is not a host name", t.escape_debug())) }
        })
    }

    pub(super) fn shm_size(&mut self, f: &Fields<'_>) -> Option<i64> {
        self.read(f, "shm_size", |t| match text::size(t)? {
            0 => Err("at least `1k` is needed".to_owned()),
            bytes if bytes > MOST_SHM => Err("this is too much".to_owned()),
            bytes => i64::try_from(bytes).map_err(|_| "this is too much".to_owned()),
        })
    }

    /// A list, or one text.
    pub(super) fn one_or_more<T, E: ToString>(
        &mut self,
        f: &Fields<'_>,
        name: &str,
        read: impl Fn(&str) -> Result<T, E>,
    ) -> Vec<T> {
        match f.get(name) {
            Some(Node { value: Value::Scalar { .. }, .. }) => self.read(f, name, read).into_iter().collect(),
            _ => self.items(f, name, read),
        }
    }

    pub(super) fn tmpfs(&mut self, f: &Fields<'_>) -> Vec<String> {
        self.one_or_more(f, "tmpfs", |t| absolute(t).map(str::to_owned))
    }

    pub(super) fn dns(&mut self, f: &Fields<'_>) -> Vec<String> {
        self.one_or_more(f, "dns", |t| match t.parse::<core::net::IpAddr>() {
            Ok(address) => Ok(address.to_string()),
            Err(_) => Err(format!("`{}` is not the address of a name server", t.escape_debug())),
        })
    }

    /// A list of `name:address`, or a mapping.
    pub(super) fn extra_hosts(&mut self, f: &Fields<'_>) -> Vec<String> {
        match f.get("extra_hosts") {
            Some(Node { value: Value::Map(_), .. }) => {
                let pairs = self.pairs(f, "extra_hosts");
                pairs.into_iter().map(|(name, address, _)| format!("{name}:{address}")).collect()
            }
            _ => self.items(f, "extra_hosts", |t| printable(t).map(|t| t.replacen('=', ":", 1))),
        }
    }

    /// A mapping, or a list of `name=value`.
    pub(super) fn sysctls(&mut self, f: &Fields<'_>) -> BTreeMap<String, String> {
        let mut out = BTreeMap::new();
        for (name, value, node) in self.pairs(f, "sysctls") {
            let is_name = name.contains('.') && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-/".contains(&b));
            if is_name && printable(&value).is_ok() {
                out.insert(name, value);
            } else {
                let message = format!("`{}` is not a setting such as `net.core.somaxconn: 1024`", name.escape_debug());
                self.problem("sysctls", &node, message);
            }
        }
        out
    }

    /// By name: one number for both, or `soft` and `hard`.
    pub(super) fn ulimits(&mut self, f: &Fields<'_>) -> BTreeMap<String, Ulimit> {
        let mut out = BTreeMap::new();
        let Some(node) = f.get("ulimits") else { return out };
        let Value::Map(entries) = &node.value else {
            let message = format!("expected a mapping, found {}", node.value.kind());
            self.problem("ulimits", node, message);
            return out;
        };
        for (key, value) in entries {
            let path = format!("ulimits.{}", key.name);
            if let Err(e) = limit_name(&key.name) {
                self.problem(path, value, e);
                continue;
            }
            let limit = match &value.value {
                Value::Map(_) => {
                    let f = self.fields("ulimits.*", value);
                    let [soft, hard] = ["soft", "hard"].map(|name| self.read(&f, name, limit_value));
                    match (soft, hard) {
                        (Some(soft), Some(hard)) => Some(Ulimit { soft, hard }),
                        _ => {
                            if f.get("soft").is_none() || f.get("hard").is_none() {
                                self.problem(path.clone(), value, "give `soft` and `hard`, or one number");
                            }
                            None
                        }
                    }
                }
                _ => match self.text(&path, value).map(limit_value) {
                    Some(Ok(both)) => Some(Ulimit { soft: both, hard: both }),
                    Some(Err(e)) => {
                        self.problem(path.clone(), value, e);
                        None
                    }
                    None => None,
                },
            };
            let is_over = |limit: &Ulimit| limit.hard != -1 && (limit.soft == -1 || limit.soft > limit.hard);
            match limit {
                Some(limit) if is_over(&limit) => self.problem(path, value, "`soft` is above `hard`"),
                Some(limit) => drop(out.insert(key.name.clone(), limit)),
                None => {}
            }
        }
        out
    }

    /// The limits by Compose's older names: memory, CPU and processes. Each is given once, here or below
    /// `deploy.resources.limits`.
    pub(super) fn short_limits(
        &mut self,
        f: &Fields<'_>,
        given: (Option<i64>, Option<i64>, Option<i64>),
    ) -> (Option<i64>, Option<i64>, Option<i64>) {
        let short = (
            self.read(f, "mem_limit", memory),
            self.read(f, "cpus", nano_cpus),
            self.number(f, "pids_limit", 1, 4_194_304).map(i64::from),
        );
        let mut one = |name: &str, short: Option<i64>, given: Option<i64>| {
            if let (Some(_), Some(_), Some(node)) = (short, given, f.get(name)) {
                self.problem(name, node, "the same limit is given below `deploy.resources.limits`; give one of them");
            }
            given.or(short)
        };
        (one("mem_limit", short.0, given.0), one("cpus", short.1, given.1), one("pids_limit", short.2, given.2))
    }
}
