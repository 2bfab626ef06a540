//! etcd: each member, and whether the store is the one from before.

use std::time::Duration;

use super::{Findings, Patient};
use crate::{
    cli::setup::{self, Disk},
    host::{probe, tls},
    model::{desired::Snapshot, time::Timestamp},
    store::{self, client::EtcdConfig},
};

/// The first versions of each line in which users have only the rights that they were given (CVE-2026-33343).
const SAFE: [(u32, u32, u32); 3] = [(3, 4, 44), (3, 5, 30), (3, 6, 11)];
/// Clocks that differ by more than this make logs and ages hard to read.
const CLOCK: Duration = Duration::from_secs(5);

pub(super) async fn members(patient: &Patient<'_>, found: &mut Findings) {
    let etcd = &patient.config.etcd;
    for (endpoint, asked) in store::members(etcd, &patient.config.host).await {
        match asked {
            Err(e) => {
                let reason = e.to_string();
                let remedy = if is_of_rights(&reason) {
                    RIGHTS
                } else if endpoint.starts_with("https://") || etcd.cacert.is_some() {
                    "see that it runs there, that the certificates are good, and that no firewall is between"
                } else {
                    "see that it runs there, and whether it wants https; `etcd.endpoints` in the agent's file"
                };
                found.fail("etcd", reason, remedy);
            }
            Ok(member) => {
                let version = member.version.as_deref().unwrap_or("of a version that this user may not ask for");
                let text = format!("{endpoint}: etcd {version}, {} keys below `{}`", member.keys, etcd.prefix.as_str());
                if etcd.user.is_some() && member.version.as_deref().is_some_and(|v| !is_safe(v)) {
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
                        "an agent can read it, and tell it nothing: if it is out of space, compact it, defragment it, and `etcdctl alarm disarm`"
                    };
                    found.fail("etcd", reason, remedy);
                }
                clock(&endpoint, etcd, found).await;
            }
        }
    }
}

/// What to do about missing rights.
const RIGHTS: &str = "give this user the rights that docs/keys.md names, and see that name and password are right";

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

/// Longest wait for a member to tell its time.
const TIME: Duration = Duration::from_secs(2);

/// etcd's HTTP side tells its time.
async fn clock(endpoint: &str, etcd: &EtcdConfig, found: &mut Findings) {
    let (scheme, address) = endpoint.split_once("://").unwrap_or(("", endpoint));
    let date = if scheme == "https" || scheme.is_empty() && etcd.cacert.is_some() {
        let own = etcd.cert.as_ref().map(|(cert, key)| (cert.as_path(), key.as_path()));
        let trust = tls::Trust { cacert: etcd.cacert.as_deref(), own };
        match format!("https://{address}/version").parse() {
            Ok(uri) => tls::date(uri, trust, TIME).await,
            Err(_) => Ok(None),
        }
    } else {
        probe::get_tcp(address, "localhost", "/version", TIME).await.map(|answer| answer.date)
    };
    let remedy = "compare `timedatectl` on both machines";
    let theirs = match date.map(|date| date.as_deref().and_then(Timestamp::parse_http)) {
        Ok(Some(theirs)) => theirs,
        Ok(None) => return found.warn("clock", format!("{endpoint} did not tell its time"), remedy),
        Err(e) => return found.warn("clock", format!("{endpoint} did not tell its time: {e}"), remedy),
    };
    let ours = Timestamp::now();
    let apart = ours.since(theirs).max(theirs.since(ours));
    if apart > CLOCK {
        let remedy = "let both machines keep time by NTP; deadlines do not depend on it, but ages and logs do";
        found.warn("clock", format!("this machine and {endpoint} are {} s apart", apart.as_secs()), remedy);
    } else {
        found.ok("clock", format!("as that of {endpoint}"));
    }
}

/// Whether an agent would take the store; what it says, if it can be read.
pub(super) async fn standing(patient: &Patient<'_>, found: &mut Findings) -> Option<Snapshot> {
    let config = patient.config;
    let viewer = setup::viewer(config, patient.world).await.ok()?;
    // If no member answers, that was told of above.
    let compared = store::compare(&config.etcd, &viewer, &Disk(patient.world.layout.clone())).await.ok()?;
    // One of another host, or of another version, is a reason not to believe the store, which is told of below.
    if let Some(lost @ (store::LedgerError::Read(_) | store::LedgerError::Damaged(_))) = &compared.lost {
        let remedy = "run this as the agent's user, or root. An agent that cannot read it either writes it anew once it has read the store, and until then changes nothing";
        found.warn("ledger", lost.to_string(), remedy);
    }
    match (&compared.block, &compared.found.cluster) {
        (Some(block), _) => {
            found.fail("store", format!("an agent does not believe it: {}", block.message), block.remedy.clone());
        }
        (None, None) => found.warn(
            "store",
            format!("it has no `{}`, so a wiped one is not known from it", config.etcd.prefix.key("cluster")),
            "run `demae init`, once",
        ),
        (None, Some(cluster)) => {
            let known = match (&compared.known, &compared.lost) {
                (Some(_), _) => "the one from before",
                (None, Some(_)) => "and whether it is the one from before is not known",
                (None, None) => "new to this host",
            };
            found.ok("store", format!("`{cluster}`, {known}, at revision {}", compared.found.revision));
        }
    }
    match setup::agent_id(&patient.world.layout) {
        Err(e) => {
            found.fail("name", e.message, "no agent starts that cannot read it: mend its rights, or remove it");
        }
        Ok(id) => {
            // If no member answers, that was told of above.
            if let Ok(Some(block)) = store::claimed(&config.etcd, &config.host, id.as_deref()).await {
                found.fail("name", block.message, block.remedy);
            }
        }
    }
    for problem in &compared.snapshot.unreadable {
        let remedy = problem.hint.clone().unwrap_or_else(|| "mend or delete the key".to_owned());
        found.warn("keys", format!("`{}`: {}", problem.key, problem.message), remedy);
    }
    // By a store that is not believed no agent takes anything away, and nobody is to mend hosts for its sake.
    compared.block.is_none().then_some(compared.snapshot)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_in_which_rights_hold_are_known() {
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
