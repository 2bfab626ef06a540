//! Ways to restore etcd, each detected by the host's fence; fleet-wide acceptance; a quiet ledger.
#![expect(clippy::disallowed_methods, reason = "a test moves directories of its own")]

use std::{fs, os::unix::fs::MetadataExt as _, path::Path, process::Command, time::Duration};

use crate::support::{
    containers::only,
    lab::{Lab, Setup},
    load::{Load, mixed},
    trust::{block, init, output_of, wait_block},
    wait::until,
};
use demae::model::status::State;

/// Copies the data of a stopped etcd, as a disk backup would.
fn copy(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    let status = Command::new("cp").arg("-a").arg(from).arg(to).status().expect("cp runs");
    assert!(status.success());
}

/// Replaces the running etcd's data with a copy.
fn restore(lab: &mut Lab, from: &str) {
    lab.stop_etcd();
    copy(&lab.path(from), &lab.path("etcd"));
    lab.start_etcd();
}

fn back_up(lab: &mut Lab, to: &str) {
    lab.stop_etcd();
    copy(&lab.path("etcd"), &lab.path(to));
    lab.start_etcd();
}

/// The nonces of the fence in the store.
fn nonces(lab: &Lab) -> Vec<String> {
    let text = lab.get_key(&format!("state/fence/{}", lab.host));
    let fence: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    fence["nonces"].as_array().into_iter().flatten().filter_map(|n| n.as_str().map(str::to_owned)).collect()
}

fn wait_fence(lab: &Lab, count: usize) {
    until("the fence is written", || nonces(lab).len() >= count);
}

/// Writes other keys until the revision is past the last one that the agent saw.
fn bump_revision(lab: &Lab, seen: i64) {
    while lab.revision() <= seen + 20 {
        lab.put_all(&(0..60).map(|n| (format!("env/other/V{n}"), "1".into())).collect::<Vec<_>>());
        lab.put("env/other/COUNT", "1");
    }
}

#[test]
fn every_kind_of_etcd_restore_is_detected_and_changes_nothing() {
    let mut lab = Lab::new();
    init(&lab);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    wait_fence(&lab, 1);
    back_up(&mut lab, "older");
    lab.deploy("web", "apps/web/image", &lab.image("v2"));
    wait_fence(&lab, 2);
    back_up(&mut lab, "newest");
    let (seen, running) = (lab.revision(), only(&lab, "web"));
    let load = Load::start(lab.ingress, "web.test", mixed(Duration::from_millis(5)));

    type Restore = fn(&mut Lab, i64);
    let ways: [(&str, &str, Restore); 5] = [
        ("an older snapshot", "older_revision", |lab, _| restore(lab, "older")),
        ("one that has counted on", "older_revision", |lab, seen| {
            restore(lab, "older");
            bump_revision(lab, seen);
        }),
        // Like `--bump-revision --mark-compacted`: a revision far ahead, and no history.
        ("one with a bumped revision", "older_revision", |lab, seen| {
            restore(lab, "older");
            bump_revision(lab, seen);
            lab.compact();
        }),
        ("a wiped prefix", "sentinel_missing", |lab, _| lab.del("")),
        ("another cluster at the same address", "sentinel_missing", |lab, _| {
            lab.stop_etcd();
            fs::remove_dir_all(lab.path("etcd")).expect("removed");
            lab.start_etcd();
        }),
    ];
    for (way, kind, replace) in ways {
        // With a running agent, and with one that starts later from its ledger.
        for restarts in [false, true] {
            if restarts {
                lab.stop_agent();
            }
            replace(&mut lab, seen);
            if restarts {
                lab.start_agent(&[]);
            }
            let found = wait_block(&lab, kind);
            assert!(found.remedy.contains("demae store accept"), "{way}: {found}");
            assert_eq!(only(&lab, "web"), running, "{way}");
            restore(&mut lab, "newest");
            until(&format!("trusted again after {way}"), || block(&lab).is_none());
        }
    }
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    assert_eq!(only(&lab, "web"), running);
}

/// Everything else is equal: only the fence is lost, and the store is the same.
#[test]
fn deleted_fence_is_rewritten() {
    let mut lab = Lab::new();
    init(&lab);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    wait_fence(&lab, 1);
    lab.stop_agent();
    lab.del("state/");
    lab.put("apps/web/image", &lab.image("v2"));
    lab.start_agent(&[]);
    lab.wait_app("web", "converged on what was put meanwhile", |s| {
        s.state == State::Converged && s.image == Some(lab.image("v2"))
    });
    wait_fence(&lab, 1);
    assert_eq!(block(&lab), None);
}

/// The agent is killed between its ledger and its fence write, and the desired state changes before it restarts.
#[test]
fn pending_fence_write_does_not_block() {
    let mut lab = Lab::new();
    init(&lab);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    wait_fence(&lab, 1);
    let fence = lab.get_key(&format!("state/fence/{}", lab.host));
    lab.deploy("web", "apps/web/image", &lab.image("v2"));
    wait_fence(&lab, 2);
    lab.kill_agent();
    // As if the last write had been lost: a ledger with a pending write is what a kill before the response leaves.
    let ledger = fs::read(lab.path("state/ledger")).expect("a ledger");
    assert!(
        String::from_utf8_lossy(&ledger).contains("\"pending\":["),
        "the acknowledgement is written with the next change"
    );
    lab.put(&format!("state/fence/{}", lab.host), &fence);
    lab.put("apps/web/image", &lab.image("v1"));
    lab.start_agent(&[]);
    lab.wait_app("web", "converged on the last change", |s| {
        s.state == State::Converged && s.image == Some(lab.image("v1"))
    });
    assert_eq!(block(&lab), None);
    wait_fence(&lab, 3);
}

#[test]
fn fleet_acceptance_is_used_once_by_every_host() {
    let mut first = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    let mut second = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    let file = second.path("agent.toml");
    let text = fs::read_to_string(&file).expect("a file").replace(&second.etcd.to_string(), &first.etcd.to_string());
    fs::write(&file, text).expect("a file");
    first.start_agent(&[]);
    second.start_agent(&[]);
    let image = first.image("v1");
    first.put("apps/web/spec", &first.socket_spec(&image, "web.test", ""));
    for lab in [&first, &second] {
        lab.wait_app("web", "converged", |s| s.state == State::Converged);
    }
    first.stop_etcd();
    fs::remove_dir_all(first.path("etcd")).expect("removed");
    first.start_etcd();
    first.put("apps/other/spec", &first.socket_spec(&image, "other.test", ""));
    wait_block(&first, "other_store");
    wait_block(&second, "other_store");
    let accept = first.demae(&["store", "accept", "--yes"]);
    let printed = output_of(&accept);
    assert!(accept.status.success(), "{printed}");
    assert!(printed.contains("would be removed from every host that runs them: web"), "{printed}");
    for lab in [&first, &second] {
        until("the acceptance is applied", || block(lab).is_none());
        lab.wait_app("other", "converged", |s| s.state == State::Converged);
        until("apps that the new store lacks are removed", || lab.lists_no("web") && lab.containers().len() == 1);
    }
    // It is used up: the same store, wiped, needs another acceptance.
    let accepted = first.get_key("state/accept");
    first.del("");
    first.put("state/accept", &accepted);
    wait_block(&first, "sentinel_missing");
    wait_block(&second, "sentinel_missing");
    assert_eq!((first.containers().len(), second.containers().len()), (1, 1));
}

/// Writes that do not concern this host cause neither a ledger write nor, at a resync, a full read.
#[test]
fn ledger_is_not_rewritten_for_changes_of_other_hosts() {
    let lab = Lab::with(&Setup { top: "resync = \"1s\"", ..Setup::default() });
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    wait_fence(&lab, 1);
    let ledger = || fs::metadata(lab.path("state/ledger")).map(|m| (m.ino(), m.mtime_nsec())).expect("a ledger");
    let elsewhere =
        |n: usize| format!("image: web:v{n}\ndeploy: {{placement: {{constraints: ['host == elsewhere-{n}']}}}}\n");
    lab.put("apps/elsewhere/spec", &elsewhere(0));
    until("the change is seen", || lab.status().is_some_and(|s| s.store.revision >= lab.revision()));
    let (before, reads) = (ledger(), lab.metric("demae_store_reads_total", ""));
    for n in 1..40 {
        lab.put(&format!("state/hosts/other-{n}"), "{}");
        lab.put("apps/elsewhere/spec", &elsewhere(n));
        // Proven by a resync.
        let seen = lab.revision();
        until("a resync has seen it", || lab.status().is_some_and(|s| s.store.revision >= seen));
    }
    assert_eq!(ledger(), before, "the ledger was rewritten");
    assert_eq!(lab.metric("demae_store_reads_total", ""), reads, "everything was read again");
    // A change for this host is written.
    lab.deploy("web", "apps/web/image", &lab.image("v2"));
    assert_ne!(ledger(), before);
}
