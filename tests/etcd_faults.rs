//! etcd at its worst: members that die or hang, a store that is full, slow to tell, written by many at once, or read by
//! many at once.
#![expect(clippy::disallowed_methods, reason = "a test runs programs and writes files of its own")]

mod support;

use std::{
    collections::BTreeSet,
    fs,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use demae::{
    model::{name::HostName, status::State},
    store::{self, Belief, Brake, Claim, EtcdCluster, Shelf, Update, Viewer, client::EtcdConfig, keys::Prefix},
};
use support::{
    etcd::Etcd,
    lab::{Lab, Setup},
    load::{Client, Load},
    names::free_address,
    wait::until,
    wire::{Wire, named},
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
fn members_that_hang_or_die_hold_up_no_deploy_for_long() {
    let mut lab = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    lab.stop_etcd();
    let peers = [("a", free_address()), ("b", free_address()), ("c", free_address())];
    let (b, c) = (free_address(), free_address());
    let start = |lab: &Lab, name, at| Etcd::start(lab.dir.path(), name, at, &peers, &[]);
    let _a = start(&lab, "a", lab.etcd);
    let hangs = start(&lab, "b", b);
    let dies = start(&lab, "c", c);
    until("the cluster is healthy", || etcdctl(&lab, &["endpoint", "health"]).0);
    // The one that the lab writes to comes last.
    let config = fs::read_to_string(lab.path("agent.toml")).expect("a file");
    let config = config.replace(&format!("[\"{}\"]", lab.etcd), &format!("[\"{b}\", \"{c}\", \"{}\"]", lab.etcd));
    fs::write(lab.path("agent.toml"), config).expect("a file");
    lab.start_agent(&[]);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let load = Load::start(lab.ingress, "web.test", quick());

    // Whichever of them leads, two of three are left, and agree on another after a moment.
    let agreed = |lab: &Lab| until("two of three agree", || etcdctl(lab, &["endpoint", "health"]).0);
    hangs.signal("-STOP");
    agreed(&lab);
    lab.take_over("web", "apps/web/image", &lab.image("v2"));
    hangs.signal("-CONT");
    drop(dies);
    agreed(&lab);
    lab.take_over("web", "apps/web/image", &lab.image("v1"));
    lab.kill_agent();
    hangs.signal("-STOP");
    // Two of three are away: nothing can be written, and what serves goes on with an agent that starts now.
    lab.start_agent(&[]);
    until("the store is missed", || lab.status().is_some_and(|s| s.store.error.is_some()));
    hangs.signal("-CONT");
    agreed(&lab);
    lab.take_over("web", "apps/web/image", &lab.image("v2"));
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "of {}: {:#?}", tally.requests, tally.reasons);
}

#[test]
fn a_write_whose_answer_was_lost_is_known_for_ones_own() {
    let mut lab = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    let wire = Wire::lead(&lab);
    let host_key = format!("state/hosts/{}", lab.host);
    let not_taken = |lab: &Lab| assert!(lab.status().is_none_or(|s| s.store.block.is_none()), "it is its own");

    // A read names the key once; what makes it does so in its condition and in its effect.
    let key = "secret/release-key";
    wire.lose_answer(move |bytes| named(key, bytes) >= 2);
    lab.start_agent(&[]);
    until("the release key is made, and its maker does not know", || wire.lost() == 1 && !lab.get_key(key).is_empty());
    let made = lab.get_key(key);
    wire.cut();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    assert_eq!(lab.get_key(key), made);
    let load = Load::start(lab.ingress, "web.test", quick());

    // The name of the host, taken by an agent that does not hear that it has it.
    lab.stop_agent();
    until("the name is free", || lab.get_key(&host_key).is_empty());
    wire.lose_answer(|bytes| named("\"owner\"", bytes) > 0);
    lab.start_agent(&[]);
    until("the name is taken, and its holder does not know", || wire.lost() == 2 && !lab.get_key(&host_key).is_empty());
    wire.cut();
    lab.take_over("web", "apps/web/image", &lab.image("v2"));
    not_taken(&lab);

    // What it tells of an app.
    let app_key = format!("state/apps/web/{}", lab.host);
    let release = lab.app("web").and_then(|a| a.release).expect("a release");
    until("the status is published", || {
        let told = lab.get_key(&app_key);
        told.contains(&release) && told.contains("converged")
    });
    wire.lose_answer(|bytes| named("\"state\":\"converging\"", bytes) > 0);
    // It takes longer than statuses are gathered for.
    lab.put("env/web/START_MS", "1500");
    lab.put("apps/web/image", &lab.image("v1"));
    until("the status is written, and its writer does not know", || {
        wire.lost() == 3 && lab.get_key(&app_key).contains("converging")
    });
    wire.cut();
    lab.wait_app("web", "converged", |a| a.state == State::Converged && a.release.as_ref() != Some(&release));
    until("the status is published", || {
        let told = lab.get_key(&app_key);
        !told.contains(&release) && told.contains("converged")
    });
    not_taken(&lab);
    assert_eq!(lab.containers().len(), 1);
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "of {}: {:#?}", tally.requests, tally.reasons);
}

#[test]
fn a_connection_that_says_nothing_is_given_up() {
    let mut lab = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    lab.stop_etcd();
    let etcd = Etcd::start(lab.dir.path(), "a", lab.etcd, &[("a", free_address())], &[]);
    until("etcd is healthy", || etcdctl(&lab, &["endpoint", "health"]).0);
    lab.start_agent(&[]);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    // The connection stays open, and nobody answers on it any more.
    etcd.signal("-STOP");
    until("it is noticed", || lab.status().is_some_and(|s| s.store.error.is_some()));
    assert_eq!(lab.get("web.test", "/").map(|(status, _)| status), Ok(200));
    etcd.signal("-CONT");
    until("it is read again", || lab.status().is_some_and(|s| s.store.error.is_none()));
    lab.take_over("web", "apps/web/image", &lab.image("v2"));
}

#[test]
fn a_store_that_is_full_is_still_read_and_repaired_from() {
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
    // An agent that starts now reads it all the same, and does what is to be done.
    lab.kill_agent();
    let killed = lab.containers();
    lab.start_agent(&[]);
    lab.wait_app("web", "seen", |a| a.state == State::Converged);
    support::process::docker(&["rm", "-f", &killed[0]]);
    let lost = load.so_far().failed;
    until("it is made anew", || lab.containers().len() == 1 && lab.containers() != killed);
    lab.wait_app("web", "converged", |a| a.state == State::Converged);
    until("requests are answered again", || lab.get("web.test", "/").is_ok_and(|(status, _)| status == 200));
    let removed = load.stop().failed - lost;
    assert!(removed > 0, "a container that somebody removes takes its requests along, so the load counts");
    let revision = lab.revision().to_string();
    assert!(etcdctl(&lab, &["compact", &revision]).0 && etcdctl(&lab, &["defrag"]).0);
    assert!(etcdctl(&lab, &["alarm", "disarm"]).0);
    lab.take_over("web", "apps/web/image", &lab.image("v2"));
}

#[test]
fn a_store_of_many_megabytes_is_read_whole() {
    let mut lab = Lab::new();
    // More than four times what a client takes in one answer unless told otherwise.
    let value = "v".repeat(120_000);
    for n in 0..150 {
        lab.put(&format!("env/big-{}/V{n}", n % 10), &value);
    }
    lab.put("env/small/GREETING", "hello");
    let spec = lab.socket_spec(&lab.image("v1"), "web.test", "env_from: [small]\n");
    lab.deploy("web", "apps/web/spec", &spec);
    assert_eq!(lab.get("web.test", "/env?GREETING").map(|(_, body)| body), Ok("hello".into()));
    // And followed.
    lab.put("env/small/GREETING", "again");
    let again = |lab: &Lab| lab.get("web.test", "/env?GREETING").is_ok_and(|(_, body)| body == "again");
    until("the change is there", || again(&lab));
    // All at once, and more keys than come in one answer.
    lab.kill_agent();
    let small: Vec<(String, String)> = (0..600).map(|n| (format!("env/many-{}/V{n}", n % 10), "v".into())).collect();
    small.chunks(100).for_each(|some| lab.put_all(some));
    lab.put("env/small/GREETING", "anew");
    lab.start_agent(&[]);
    until("what came meanwhile is there", || {
        lab.get("web.test", "/env?GREETING").is_ok_and(|(_, body)| body == "anew")
    });
    lab.wait_app("web", "converged", |a| a.state == State::Converged);
}

#[test]
fn a_lease_that_is_lost_is_taken_again_and_touches_no_container() {
    let lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let key = format!("state/apps/web/{}", lab.host);
    until("the status is published", || lab.get_key(&key).contains("converged"));
    let containers = lab.containers();
    let born = || {
        let (_, text) = etcdctl(&lab, &["get", &format!("/demae/{key}"), "-w", "fields"]);
        text.lines().find(|l| l.contains("CreateRevision")).map(str::to_owned)
    };
    let before = born().expect("a key");
    let (_, leases) = etcdctl(&lab, &["lease", "list"]);
    for lease in leases.lines().filter(|l| l.len() == 16 && l.bytes().all(|b| b.is_ascii_hexdigit())) {
        etcdctl(&lab, &["lease", "revoke", lease]);
    }
    until("the key went with the lease, and another one came", || born().is_some_and(|b| b != before));
    assert!(lab.get_key(&key).contains("converged"));
    assert_eq!(lab.containers(), containers);
}

#[test]
fn of_many_writers_the_last_one_holds_and_few_containers_are_made() {
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
    // One that serves, one that comes, and at most one that nobody wants any more and one that is being made.
    assert!(most <= 4, "{most} containers at once");
    let image = lab.get_key("apps/web/image");
    let greeting = lab.get_key("env/web/GREETING");
    lab.wait_app("web", "converged", |a| a.state == State::Converged && a.image.as_ref() == Some(&image));
    until("the last word is served", || {
        lab.get("web.test", "/env?GREETING").is_ok_and(|(_, body)| body == greeting) && lab.containers().len() == 1
    });
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "of {}: {:#?}", tally.requests, tally.reasons);
}

#[test]
fn what_is_put_in_one_transaction_is_one_release() {
    let lab = Lab::new();
    lab.put("env/web/GREETING", "first");
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let created = || lab.metric("demae_steps_total", "kind=\"create\",outcome=\"done\"");
    let before = created();
    let second = [("apps/web/image".to_owned(), lab.image("v2")), ("env/web/GREETING".to_owned(), "second".to_owned())];
    lab.put_all(&second);
    lab.wait_app("web", "converged", |a| a.state == State::Converged && a.image == Some(lab.image("v2")));
    assert_eq!(lab.get("web.test", "/env?GREETING").map(|(_, body)| body), Ok("second".into()));
    assert!((created() - before - 1.0).abs() < 0.5, "one container was made for it");
}

/// A disk that forgets.
struct NoShelf;

impl Shelf for NoShelf {
    fn ledger(&self) -> Result<Option<Vec<u8>>, String> {
        Ok(None)
    }

    fn keep(&self, _text: &[u8]) -> Result<(), String> {
        Ok(())
    }

    fn acceptance(&self) -> Option<Vec<u8>> {
        None
    }

    fn use_up(&self) {}
}

#[test]
fn many_readers_come_back_to_a_store_that_was_started_anew_and_make_one_key() {
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
            let belief = Belief::new(config.prefix.clone(), viewer, Arc::new(NoShelf), out);
            let reading = store::watch(etcd, belief, token.clone());
            tasks.spawn_on(reading, runtime.handle());
            updates
        })
        .collect();
    let all_at = |revision: i64| updates.iter().all(|u| u.borrow().status.revision >= revision);
    until("all have read it", || updates.iter().all(|u| u.borrow().snapshot.is_some()));
    let releases: BTreeSet<String> =
        updates.iter().map(|u| format!("{:?}", u.borrow().snapshot.as_ref().map(|s| s.apps.clone()))).collect();
    assert_eq!(releases.len(), 1, "all name the release by one key, though each found none and made one");
    lab.stop_etcd();
    until("all miss it", || updates.iter().all(|u| u.borrow().status.error.is_some()));
    lab.start_etcd();
    lab.put("apps/web/image", "web:v2");
    let revision = lab.revision();
    until("all have read what came after", || {
        all_at(revision) && updates.iter().all(|u| u.borrow().status.error.is_none())
    });
    let reads: u64 = updates.iter().map(|u| u.borrow().reads).sum();
    let most = updates.iter().map(|u| u.borrow().reads).max();
    assert!(reads <= 4 * READERS as u64, "{reads} full reads for {READERS} readers, {most:?} by one");
    token.cancel();
    tasks.close();
    runtime.block_on(tasks.wait());
}
