//! etcd faults: members that die or hang, a full store, lost responses, many concurrent writers or readers.
#![expect(clippy::disallowed_methods, reason = "a test runs programs and writes files of its own")]

use std::{
    collections::BTreeSet,
    fs,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use crate::support::{
    containers::{ids, only},
    etcd::Etcd,
    lab::{Lab, Setup},
    load::{Client, Load},
    names::free_address,
    wait::until,
    wire::{Wire, count_key},
};
use demae::{
    model::{name::HostName, status::State},
    store::{
        self, Brake, Claim, DesiredCache, EtcdCluster, StateStore, Update, Viewer, client::EtcdConfig, keys::Prefix,
    },
};
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

fn etcdctl(lab: &Lab, args: &[&str]) -> (bool, String) {
    let mut command = Command::new("etcdctl");
    command.env("ETCDCTL_API", "3").args(["--endpoints", &lab.etcd.to_string()]).args(args).stdin(Stdio::null());
    let output = command.output().expect("etcdctl runs");
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

fn quick() -> Vec<Client> {
    vec![Client::get(true).pausing(Duration::from_millis(5)), Client::post(false).pausing(Duration::from_millis(5))]
}

#[test]
fn hanging_or_dead_members_delay_no_deploy_for_long() {
    let mut lab = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    lab.stop_etcd();
    let peers = [("a", free_address()), ("b", free_address()), ("c", free_address())];
    let (b, c) = (free_address(), free_address());
    let start = |lab: &Lab, name, at| Etcd::start(lab.dir.path(), name, at, &peers, &[]);
    let _a = start(&lab, "a", lab.etcd);
    let hangs = start(&lab, "b", b);
    let dies = start(&lab, "c", c);
    until("the cluster is healthy", || etcdctl(&lab, &["endpoint", "health"]).0);
    // The member that the lab writes to comes last.
    let config = fs::read_to_string(lab.path("agent.toml")).expect("a file");
    let config = config.replace(&format!("[\"{}\"]", lab.etcd), &format!("[\"{b}\", \"{c}\", \"{}\"]", lab.etcd));
    fs::write(lab.path("agent.toml"), config).expect("a file");
    lab.start_agent(&[]);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let load = Load::start(lab.ingress, "web.test", quick());

    // Whichever member leads, two of three are left and elect another leader after a moment.
    let wait_quorum = |lab: &Lab| until("two of three have quorum", || etcdctl(lab, &["endpoint", "health"]).0);
    hangs.signal("-STOP");
    wait_quorum(&lab);
    lab.take_over("web", "apps/web/image", &lab.image("v2"));
    hangs.signal("-CONT");
    drop(dies);
    wait_quorum(&lab);
    lab.take_over("web", "apps/web/image", &lab.image("v1"));
    lab.kill_agent();
    hangs.signal("-STOP");
    // Two of three are down: writes fail, and apps keep serving with an agent that starts now.
    lab.start_agent(&[]);
    until("the store error is reported", || lab.status().is_some_and(|s| s.store.error.is_some()));
    hangs.signal("-CONT");
    wait_quorum(&lab);
    lab.take_over("web", "apps/web/image", &lab.image("v2"));
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "of {}: {:#?}", tally.requests, tally.reasons);
}

#[test]
fn write_whose_response_was_lost_is_recognised_as_own() {
    let mut lab = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    let wire = Wire::intercept(&lab);
    let host_key = format!("state/hosts/{}", lab.host);
    let assert_not_name_taken =
        |lab: &Lab| assert!(lab.status().is_none_or(|s| s.store.block.is_none()), "it is recognised as its own");

    // A read names the key once; its creation names it in the condition and in the put.
    let key = "secret/release-key";
    wire.lose_answer(move |bytes| count_key(key, bytes) >= 2);
    lab.start_agent(&[]);
    until("the release key is created, and the response is lost", || wire.lost() == 1 && !lab.get_key(key).is_empty());
    let made = lab.get_key(key);
    wire.cut();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    assert_eq!(lab.get_key(key), made);
    let load = Load::start(lab.ingress, "web.test", quick());

    // The host name is claimed, and the response is lost.
    lab.stop_agent();
    until("the name is free", || lab.get_key(&host_key).is_empty());
    wire.lose_answer(|bytes| count_key("\"owner\"", bytes) > 0);
    lab.start_agent(&[]);
    until("the name is claimed, and the response is lost", || wire.lost() == 2 && !lab.get_key(&host_key).is_empty());
    wire.cut();
    lab.take_over("web", "apps/web/image", &lab.image("v2"));
    assert_not_name_taken(&lab);

    // The published status of an app.
    let app_key = format!("state/apps/{}/web", lab.host);
    let release = lab.app("web").and_then(|a| a.release).expect("a release");
    until("the status is published", || {
        let published = lab.get_key(&app_key);
        published.contains(&release) && published.contains("converged")
    });
    wire.lose_answer(|bytes| count_key("\"state\":\"converging\"", bytes) > 0);
    // Longer than the publisher batches statuses.
    lab.put("env/web/START_MS", "1500");
    lab.put("apps/web/image", &lab.image("v1"));
    until("the status is written, and the response is lost", || {
        wire.lost() == 3 && lab.get_key(&app_key).contains("converging")
    });
    wire.cut();
    lab.wait_app("web", "converged", |a| a.state == State::Converged && a.release.as_ref() != Some(&release));
    until("the status is published", || {
        let published = lab.get_key(&app_key);
        !published.contains(&release) && published.contains("converged")
    });
    assert_not_name_taken(&lab);
    assert_eq!(lab.containers().len(), 1);
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "of {}: {:#?}", tally.requests, tally.reasons);
}

#[test]
fn silent_connection_is_closed() {
    let mut lab = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    lab.stop_etcd();
    let etcd = Etcd::start(lab.dir.path(), "a", lab.etcd, &[("a", free_address())], &[]);
    until("etcd is healthy", || etcdctl(&lab, &["endpoint", "health"]).0);
    lab.start_agent(&[]);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    // The connection stays open, and the peer is silent.
    etcd.signal("-STOP");
    until("the silence is detected", || lab.status().is_some_and(|s| s.store.error.is_some()));
    assert_eq!(lab.get("web.test", "/").map(|(status, _)| status), Ok(200));
    etcd.signal("-CONT");
    until("the store is read again", || lab.status().is_some_and(|s| s.store.error.is_none()));
    lab.take_over("web", "apps/web/image", &lab.image("v2"));
}

#[test]
fn full_store_is_still_read_and_used_for_repairs() {
    let mut lab = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    lab.stop_etcd();
    let quota = ["--quota-backend-bytes", "4194304"];
    let _etcd = Etcd::start(lab.dir.path(), "a", lab.etcd, &[("a", free_address())], &quota);
    until("etcd is healthy", || etcdctl(&lab, &["endpoint", "health"]).0);
    lab.start_agent(&[]);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let load = Load::start(lab.ingress, "web.test", quick());
    let much = "x".repeat(100_000);
    until("the store takes no more", || !etcdctl(&lab, &["put", "/other/filler", &much]).0);
    // An agent that starts now still reads it and repairs drift.
    lab.kill_agent();
    lab.start_agent(&[]);
    lab.wait_app("web", "converged", |a| a.state == State::Converged);
    let removed = only(&lab, "web");
    crate::support::process::docker(&["rm", "-f", &removed]);
    let lost = load.so_far().failed;
    // It may have the name of the removed one.
    until("it is recreated", || matches!(ids(&lab, "web").as_slice(), [id] if *id != removed));
    lab.wait_app("web", "converged", |a| a.state == State::Converged);
    until("requests are answered again", || lab.get("web.test", "/").is_ok_and(|(status, _)| status == 200));
    let failed = load.stop().failed - lost;
    assert!(failed > 0, "a removed container loses its requests, so the load counts");
    let revision = lab.revision().to_string();
    assert!(etcdctl(&lab, &["compact", &revision]).0 && etcdctl(&lab, &["defrag"]).0);
    assert!(etcdctl(&lab, &["alarm", "disarm"]).0);
    lab.take_over("web", "apps/web/image", &lab.image("v2"));
}

#[test]
fn store_of_many_megabytes_is_read_in_full() {
    let mut lab = Lab::new();
    // More than four times a gRPC client's default limit of one response.
    let value = "v".repeat(120_000);
    for n in 0..150 {
        lab.put(&format!("env/big-{}/V{n}", n % 10), &value);
    }
    lab.put("env/small/GREETING", "hello");
    let spec = lab.socket_spec(&lab.image("v1"), "web.test", "env_from: [small]\n");
    lab.deploy("web", "apps/web/spec", &spec);
    assert_eq!(lab.get("web.test", "/env?GREETING").map(|(_, body)| body), Ok("hello".into()));
    // The watch works too.
    lab.put("env/small/GREETING", "again");
    let again = |lab: &Lab| lab.get("web.test", "/env?GREETING").is_ok_and(|(_, body)| body == "again");
    until("the change is served", || again(&lab));
    // All at once, in more keys than one response holds.
    lab.kill_agent();
    let small: Vec<(String, String)> = (0..600).map(|n| (format!("env/many-{}/V{n}", n % 10), "v".into())).collect();
    small.chunks(100).for_each(|some| lab.put_all(some));
    lab.put("env/small/GREETING", "anew");
    lab.start_agent(&[]);
    until("the change made meanwhile is served", || {
        lab.get("web.test", "/env?GREETING").is_ok_and(|(_, body)| body == "anew")
    });
    lab.wait_app("web", "converged", |a| a.state == State::Converged);
}

#[test]
fn lost_lease_is_renewed_and_touches_no_container() {
    let lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let key = format!("state/apps/{}/web", lab.host);
    until("the status is published", || lab.get_key(&key).contains("converged"));
    let containers = lab.containers();
    let create_revision = || {
        let (_, text) = etcdctl(&lab, &["get", &format!("/demae/{key}"), "-w", "fields"]);
        text.lines().find(|l| l.contains("CreateRevision")).map(str::to_owned)
    };
    let before = create_revision().expect("a key");
    let (_, leases) = etcdctl(&lab, &["lease", "list"]);
    for lease in leases.lines().filter(|l| l.len() == 16 && l.bytes().all(|b| b.is_ascii_hexdigit())) {
        etcdctl(&lab, &["lease", "revoke", lease]);
    }
    until("the key expired with the lease and was created again", || create_revision().is_some_and(|b| b != before));
    assert!(lab.get_key(&key).contains("converged"));
    assert_eq!(lab.containers(), containers);
}

#[test]
fn concurrent_writers_converge_on_the_last_write_with_few_containers() {
    let lab = Lab::new();
    let (v1, v2) = (lab.image("v1"), lab.image("v2"));
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&v1, "web.test", ""));
    let load = Load::start(lab.ingress, "web.test", quick());
    let mut most = 0;
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..4)
            .map(|writer| {
                let (lab, images) = (&lab, [&v1, &v2]);
                scope.spawn(move || {
                    for n in 0..12 {
                        lab.put("apps/web/image", images[n % 2]);
                        lab.put("env/web/GREETING", &format!("{writer} {n}"));
                    }
                })
            })
            .collect();
        while writers.iter().any(|w| !w.is_finished()) {
            most = most.max(lab.containers().len());
        }
    });
    // One that serves, one that starts, and at most one that is superseded and one that is being created.
    assert!(most <= 4, "{most} containers at once");
    let image = lab.get_key("apps/web/image");
    let greeting = lab.get_key("env/web/GREETING");
    lab.wait_app("web", "converged", |a| a.state == State::Converged && a.image.as_ref() == Some(&image));
    until("the last write is served", || {
        lab.get("web.test", "/env?GREETING").is_ok_and(|(_, body)| body == greeting) && lab.containers().len() == 1
    });
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "of {}: {:#?}", tally.requests, tally.reasons);
}

#[test]
fn one_transaction_makes_one_release() {
    let lab = Lab::new();
    lab.put("env/web/GREETING", "first");
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let created = || lab.metric("demae_steps_total", "kind=\"create\",outcome=\"done\"");
    let before = created();
    let second = [("apps/web/image".to_owned(), lab.image("v2")), ("env/web/GREETING".to_owned(), "second".to_owned())];
    lab.put_all(&second);
    lab.wait_app("web", "converged", |a| a.state == State::Converged && a.image == Some(lab.image("v2")));
    assert_eq!(lab.get("web.test", "/env?GREETING").map(|(_, body)| body), Ok("second".into()));
    assert!((created() - before - 1.0).abs() < 0.5, "one container was created for it");
}

/// A state store that keeps nothing.
struct NoDisk;

impl StateStore for NoDisk {
    fn ledger(&self) -> Result<Option<Vec<u8>>, String> {
        Ok(None)
    }

    fn write_ledger(&self, _text: &[u8]) -> Result<(), String> {
        Ok(())
    }

    fn head(&self) -> Option<Vec<u8>> {
        None
    }

    fn write_head(&self, _text: &[u8]) {}

    fn acceptance(&self) -> Option<Vec<u8>> {
        None
    }

    fn clear_acceptance(&self) {}
}

#[test]
fn many_readers_reconnect_to_a_restarted_store_and_create_one_key() {
    const READERS: usize = 200;
    let mut lab = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    lab.put("apps/web/spec", "image: web:v1\n");
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let (tasks, token) = (TaskTracker::new(), CancellationToken::new());
    let config = EtcdConfig {
        endpoints: vec![lab.etcd.to_string()],
        user: None,
        cacert: None,
        cert: None,
        dial_timeout: Duration::from_secs(2),
        command_timeout: Duration::from_secs(5),
        resync: Duration::from_secs(60),
        prefix: Prefix::new("/demae").expect("a prefix"),
    };
    let updates: Vec<watch::Receiver<Update>> = (0..READERS)
        .map(|n| {
            let (out, updates) = watch::channel(Update::default());
            let viewer = Viewer {
                host: HostName::try_from(format!("host-{n}")).expect("a name"),
                labels: Default::default(),
                resync: Duration::from_secs(600),
                brake: Brake::default(),
                traces: BTreeSet::new(),
            };
            let claim = Claim::new(viewer.host.clone(), format!("agent-{n}")).expect("a claim");
            let etcd = EtcdCluster::new(config.clone(), Arc::new(claim));
            let cache = DesiredCache::new(config.prefix.clone(), viewer, Arc::new(NoDisk), Arc::default(), out);
            let reading = store::watch(etcd, cache, token.clone());
            tasks.spawn_on(reading, runtime.handle());
            updates
        })
        .collect();
    let all_at = |revision: i64| updates.iter().all(|u| u.borrow().status.revision >= revision);
    until("all have read it", || updates.iter().all(|u| u.borrow().snapshot.is_some()));
    let releases: BTreeSet<String> =
        updates.iter().map(|u| format!("{:?}", u.borrow().snapshot.as_ref().map(|s| s.apps.clone()))).collect();
    assert_eq!(releases.len(), 1, "all use one release key, though each found none and created one");
    lab.stop_etcd();
    until("all report the store error", || updates.iter().all(|u| u.borrow().status.error.is_some()));
    lab.start_etcd();
    lab.put("apps/web/image", "web:v2");
    let revision = lab.revision();
    until("all have read the later change", || {
        all_at(revision) && updates.iter().all(|u| u.borrow().status.error.is_none())
    });
    let reads: u64 = updates.iter().map(|u| u.borrow().reads).sum();
    let most = updates.iter().map(|u| u.borrow().reads).max();
    assert!(reads <= 4 * READERS as u64, "{reads} full reads for {READERS} readers, {most:?} by one");
    token.cancel();
    tasks.close();
    runtime.block_on(tasks.wait());
}
