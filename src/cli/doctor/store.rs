//! etcd: each member, and whether the store is the trusted one.

use std::time::Duration;

use super::{Context, Findings};
use crate::{
    cli::setup::{self, Disk},
    host::{probe, tls},
    model::{desired::Snapshot, time::Timestamp},
    store::{self, client::EtcdConfig},
};

/// The first version of each release line that enforces the rights of users (CVE-2026-33343).
const SAFE: [(u32, u32, u32); 3] = [(3, 4, 44), (3, 5, 30), (3, 6, 11)];
/// Larger clock skew makes logs and ages hard to read.
const MAX_CLOCK_SKEW: Duration = Duration::from_secs(5);

pub(super) async fn members(context: &Context<'_>, found: &mut Findings) {
    let etcd = &context.config.etcd;
    for (endpoint, result) in store::members(etcd, &context.config.host).await {
        match result {
            Err(e) => {
                let reason = e.to_string();
                let remedy = if is_of_rights(&reason) {
                    RIGHTS
                } else if endpoint.starts_with("https://") || etcd.cacert.is_some() {
                    "make sure that it runs there, that the certificates are valid, and that no firewall is in between"
                } else {
                    "make sure that it runs there, and check whether it needs https; `etcd.endpoints` in the agent's file"
                };
                found.fail("etcd", reason, remedy);
            }
            Ok(member) => {
                let version = member.version.as_deref().unwrap_or("of a version that this user may not ask for");
                let text = format!("{endpoint}: etcd {version}, {} keys below `{}`", member.keys, etcd.prefix.as_str());
                let is_limited = etcd.user.is_some() || etcd.cert.is_some();
                if is_limited && member.version.as_deref().is_some_and(|v| !is_safe(v)) {
                    let remedy = "upgrade to 3.4.44, 3.5.30, 3.6.11 or later: in older ones any user can read and write every key";
                    found.warn("etcd", text, remedy);
                } else {
                    found.ok("etcd", text);
                }
                if let Err(e) = member.writable {
                    let reason = e.to_string();
                    let remedy = if is_of_rights(&reason) {
                        RIGHTS
                    } else {
                        "an agent can read it, but publish nothing: if it is out of space, compact it, defragment it, and `etcdctl alarm disarm`"
                    };
                    found.fail("etcd", reason, remedy);
                }
                clock(&endpoint, etcd, found).await;
            }
        }
    }
}

/// Checks whether the user of this agent has more rights than an agent needs. Without a user all that
/// reach etcd have all rights.
pub(super) async fn excess_rights(context: &Context<'_>, found: &mut Findings) {
    let etcd = &context.config.etcd;
    if etcd.user.is_none() && etcd.cert.is_none() {
        return;
    }
    // If no member answers, that is reported already.
    let Ok(more) = store::may_write_more(etcd, &context.config.host).await else { return };
    if more.is_empty() {
        found.ok("rights", "with this host's login one cannot write what other hosts run, or what they report");
    } else {
        let remedy = "give each host a user and a role of its own: deploy/etcd-roles.sh makes them, and docs/security.md has their rights";
        let text = format!("with this host's login one can also write {}", more.join(", "));
        found.warn("rights", text, remedy);
    }
}

/// The remedy for missing rights.
const RIGHTS: &str = "give this user the rights that docs/keys.md names, and check name and password";

/// The remedy for missing rights to take turns.
const RIGHTS_FOR_ROLLOUTS: &str = "give this user the rights that docs/rollouts.md names, or turn rollouts off in the agent's file, for all hosts of the fleet";

fn is_of_rights(reason: &str) -> bool {
    reason.contains("permission denied") || reason.contains("authenticat")
}

fn is_safe(version: &str) -> bool {
    let mut parts = version.split(['.', '-', '+']).map(|p| p.parse::<u32>().unwrap_or(0));
    let mut next = || parts.next().unwrap_or(0);
    let version = (next(), next(), next());
    match SAFE.iter().find(|(major, minor, _)| (*major, *minor) == (version.0, version.1)) {
        Some(first) => version >= *first,
        None => version > SAFE[SAFE.len() - 1],
    }
}

/// Timeout for the time of a member.
const TIME_TIMEOUT: Duration = Duration::from_secs(2);

/// Compares clocks by the `Date` header of etcd.
async fn clock(endpoint: &str, etcd: &EtcdConfig, found: &mut Findings) {
    let (scheme, address) = endpoint.split_once("://").unwrap_or(("", endpoint));
    let date = if scheme == "https" || scheme.is_empty() && etcd.cacert.is_some() {
        let client = etcd.cert.as_ref().map(|(cert, key)| (cert.as_path(), key.as_path()));
        let certificates = tls::ClientCertificates { cacert: etcd.cacert.as_deref(), client };
        match format!("https://{address}/version").parse() {
            Ok(uri) => tls::date(uri, certificates, TIME_TIMEOUT).await,
            Err(_) => Ok(None),
        }
    } else {
        probe::get_tcp(address, "localhost", "/version", TIME_TIMEOUT).await.map(|answer| answer.date)
    };
    let remedy = "compare `timedatectl` on both machines";
    let their_time = match date.map(|date| date.as_deref().and_then(Timestamp::parse_http)) {
        Ok(Some(their_time)) => their_time,
        Ok(None) => return found.warn("clock", format!("{endpoint} did not report its time"), remedy),
        Err(e) => return found.warn("clock", format!("{endpoint} did not report its time: {e}"), remedy),
    };
    let our_time = Timestamp::now();
    let apart = our_time.since(their_time).max(their_time.since(our_time));
    if apart > MAX_CLOCK_SKEW {
        let remedy = "synchronise both machines by NTP; deadlines do not depend on it, but ages and logs do";
        found.warn("clock", format!("this machine and {endpoint} are {} s apart", apart.as_secs()), remedy);
    } else {
        found.ok("clock", format!("in sync with {endpoint}"));
    }
}

/// Checks whether an agent would trust the store; returns its content if it can be read and is trusted.
pub(super) async fn trust(context: &Context<'_>, found: &mut Findings) -> Option<Snapshot> {
    let config = context.config;
    let viewer = setup::viewer(config, context.world).await.ok()?;
    // If no member answers, that is reported already.
    let compared = store::compare(&config.etcd, &viewer, &Disk(context.world.layout.clone())).await.ok()?;
    // The ledger of another host, or of another version, is a reason to distrust the store, which is reported below.
    if let Some(lost @ (store::LedgerError::Read(_) | store::LedgerError::Damaged(_))) = &compared.lost {
        let remedy = "run this as the agent's user, or root. An agent that cannot read it either rewrites it once it has read the store, and changes nothing until then";
        found.warn("ledger", lost.to_string(), remedy);
    }
    match (&compared.block, &compared.found.cluster) {
        (Some(block), _) => {
            found.fail("store", format!("an agent does not trust it: {}", block.message), block.remedy.clone());
        }
        (None, None) => found.warn(
            "store",
            format!("it has no `{}`, so a wipe would not be detected", config.etcd.prefix.key("cluster")),
            "run `demae init`, once",
        ),
        (None, Some(cluster)) => {
            let known = match (&compared.known, &compared.lost) {
                (Some(_), _) => "the trusted one",
                (None, Some(_)) => "but without a readable ledger it cannot be compared with the trusted one",
                (None, None) => "new to this host",
            };
            found.ok("store", format!("`{cluster}`, {known}, at revision {}", compared.found.revision));
        }
    }
    match setup::agent_id(&context.world.layout) {
        Err(e) => {
            found.fail("name", e.message, "an agent needs it to start: fix its mode, or remove it");
        }
        Ok(id) => {
            // If no member answers, that is reported already.
            if let Ok(Some(block)) = store::claimed(&config.etcd, &config.host, id.as_deref()).await {
                found.fail("name", block.message, block.remedy);
            }
        }
    }
    for problem in &compared.snapshot.unreadable {
        let remedy = problem.hint.clone().unwrap_or_else(|| "fix or delete the key".to_owned());
        found.warn("keys", format!("`{}`: {}", problem.key, problem.message), remedy);
    }
    // No agent removes anything by a store that is not trusted, so leftovers are not reported either.
    compared.block.is_none().then_some(compared.snapshot)
}

/// Checks whether the rights of the agent suffice for rollouts.
pub(super) async fn rollouts(context: &Context<'_>, found: &mut Findings) {
    let Some(rollouts) = context.config.rollouts else {
        return found.ok("rollouts", "turned off in the agent's file: this host converges by itself");
    };
    // If no member answers, that is reported already.
    let Ok(session) = store::FleetSession::open(&context.config.etcd, 0).await else { return };
    match session.try_rights().await {
        Err(e) if e.is_of_rights() => {
            let text = if rollouts.required {
                format!("no app of this host gets a new release: {e}")
            } else {
                format!("an agent that starts now takes no turns, and converges by itself: {e}")
            };
            return found.warn("rollouts", text, RIGHTS_FOR_ROLLOUTS);
        }
        Err(_) => return,
        Ok(()) => {}
    }
    let leads = match session.try_rights_to_lead().await {
        _ if !rollouts.may_lead => "is never the leader, by its file",
        Err(e) if e.is_of_rights() => "lacks the rights to be the leader",
        Err(_) => return,
        Ok(()) => "may be the leader",
    };
    if leads != "may be the leader" && matches!(session.has_leader().await, Ok(false)) {
        let text = format!("this host takes turns, {leads}, and there is no leader now: no app gets a new release");
        return found.warn("rollouts", text, "let some agents of the fleet lead: docs/rollouts.md has their rights");
    }
    found.ok("rollouts", format!("this host takes turns, and {leads}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn etcd_versions_with_enforced_rights_are_known() {
        for (version, safe) in [
            ("3.4.23", false),
            ("3.4.44", true),
            ("3.5.29", false),
            ("3.5.30", true),
            ("3.6.11", true),
            ("3.7.0-rc.0", true),
            ("3.3.27", false),
            ("", false),
        ] {
            assert_eq!(is_safe(version), safe, "{version}");
        }
    }
}
