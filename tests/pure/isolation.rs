//! Keys of one app or one env set change nothing of another app: neither its desired state, nor its nginx files, nor
//! its published status.

#[path = "../fuzz/mutate.rs"]
mod mutate;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
};

use demae::{
    host::{
        layout::Layout,
        nginx::{Neighbours, Profile, Renderer, Settings},
    },
    model::{
        desired::{AppKeys, DesiredApp, HostMode, Keys, Snapshot, StoredSpec, resolve},
        name::{AppName, EnvName, SetName},
        problem::catch_panic,
        proxy::{ObservedProxy, Upstreams, Vhost},
        release::ReleaseKey,
        spec::{Ingress, Spec},
    },
    plan::{
        VhostWish,
        proxy::{ProxyInput, ProxyStep, conflicts, plan_proxy},
    },
    store::keys::{BadKey, Key},
};
use proptest::{prelude::*, test_runner::TestRunner};

/// The app under test; its keys are not written.
const GOOD: &str = "image: good:v1\nenv_from: [common]\nvolumes: [\"/srv/good:/data\"]\nhealthcheck: {http: /up}\n\
                    ingress: {hosts: [good.test, \"*.good.test\"], port: 8080}\n";

/// Specs close to the good one's, as starting points.
const NEAR: [&str; 8] = [
    "image: bad:v1\ningress: {hosts: [good.test], port: 8080}\n",
    "image: bad:v1\ningress: {hosts: [\"*.good.test\", a.good.test], port: 80}\n",
    "image: bad:v1\ningress: {hosts: [\"*\"], socket: /run/app/a.sock}\n",
    "image: bad:v1\ningress: {hosts: [other.test], port: 1, path: /a, strip_path: true}\n",
    "image: bad:v1\nvolumes: [\"/srv/good/inner:/x\"]\n",
    "image: bad:v1\nenv_from: [good, common, bad]\nlabels: {demae.app: good}\n",
    "image: bad:v1\ndeploy: {replicas_per_host: 100, placement: {constraints: [a == b]}}\n",
    "x-a: &a {image: good:v1}\n<<: *a\n",
];

fn app(name: &str) -> AppName {
    AppName::try_from(name).expect("a name")
}

/// The keys as an agent parses them, including the good app's.
fn keys(written: &[(Vec<u8>, Vec<u8>)]) -> Keys {
    let mut keys = Keys::default();
    let spec = |created: i64, text: &[u8]| {
        let spec = Arc::new(catch_panic(|| Spec::parse(text)));
        Some(StoredSpec { created, modified: created, spec })
    };
    keys.apps.insert(app("good"), AppKeys { spec: spec(1, GOOD.as_bytes()), ..AppKeys::default() });
    for (set, name) in [("good", "A"), ("common", "B")] {
        let (set, name) = (SetName::try_from(set).expect("a name"), EnvName::try_from(name).expect("a name"));
        keys.env.entry(set).or_default().insert(name, b"value".to_vec());
    }
    for (key, value) in written {
        match Key::parse(key) {
            Ok(Key::Spec(app)) => keys.apps.entry(app).or_default().spec = spec(2, value),
            Ok(Key::Image(app)) => keys.apps.entry(app).or_default().image = Some(value.clone()),
            Ok(Key::Restart(app)) => keys.apps.entry(app).or_default().restart = Some(value.clone()),
            Ok(Key::Paused(app)) => keys.apps.entry(app).or_default().paused = Some(value.clone()),
            Ok(Key::Env(set, name)) => drop(keys.env.entry(set).or_default().insert(name, value.clone())),
            Err(BadKey::Set(set, problem)) => keys.env_problems.entry(set).or_default().push(problem),
            _ => {}
        }
    }
    keys
}

fn snapshot(keys: &Keys) -> Snapshot {
    let apps = resolve(keys, &ReleaseKey::new("key"), HostMode::Active, &BTreeMap::new(), |_| None);
    Snapshot { apps, proven: true, ..Snapshot::default() }
}

fn vhost(ingress: &Ingress) -> Vhost {
    Vhost {
        hosts: ingress.hosts.clone(),
        upstreams: Upstreams::Ports(vec![20_001]),
        template: ingress.template.clone(),
        max_body_size: ingress.max_body_size,
        read_timeout: ingress.read_timeout.as_secs(),
        response_header_size: ingress.response_header_size,
        request_buffering: ingress.request_buffering,
        path: ingress.path.clone(),
        strip_path: ingress.strip_path,
        endpoint: None,
        more: Vec::new(),
    }
}

/// The nginx files of all apps without a conflict, by name.
fn files(snapshot: &Snapshot) -> BTreeMap<String, Vec<u8>> {
    let settings = Settings {
        listen: vec!["80".into()],
        default_server: true,
        profile: Profile::Default,
        templates: None,
        trusted: Vec::new(),
    };
    let renderer = Renderer::new(settings, (1, 22, 1)).expect("there is no directory to read");
    let conflicts = conflicts(snapshot, &ObservedProxy::default());
    let wishes: BTreeMap<AppName, VhostWish> = snapshot
        .apps
        .iter()
        .map(|(app, desired)| {
            let ingress = desired.target().and_then(|t| t.ingress.as_ref());
            let wish = match ingress.filter(|_| !conflicts.contains_key(app)) {
                Some(ingress) => VhostWish::Set(vhost(ingress)),
                None => VhostWish::Remove,
            };
            (app.clone(), wish)
        })
        .collect();
    let input = ProxyInput {
        wishes: &wishes,
        observed: &ObservedProxy::default(),
        backoff: None,
        health_unknown_since: None,
        held_since: None,
        busy: false,
        now: demae::model::time::Timestamp::from_millis(1_000_000),
    };
    let Some((ProxyStep::Publish(vhosts), _)) = plan_proxy(&input).step else { panic!("a first set is published") };
    let around = Neighbours::of(vhosts.values());
    let layout = Layout::new("/var/lib/demae", "/run/demae");
    let parts = vhosts.iter().filter_map(|(app, vhost)| renderer.app(app, vhost, &around, &layout).ok());
    parts.flatten().collect()
}

/// Asserts that the good app is unchanged; returns true if the bad app has a file of its own too.
fn is_unchanged_by(written: &[(Vec<u8>, Vec<u8>)]) -> bool {
    let (alone, beside) = (snapshot(&keys(&[])), snapshot(&keys(written)));
    let good = app("good");
    assert!(matches!(alone.apps[&good], DesiredApp::Run(_)), "it is good by itself");
    assert_eq!(alone.apps[&good], beside.apps[&good], "its desired state changed");
    assert!(!conflicts(&beside, &ObservedProxy::default()).contains_key(&good), "it lost its virtual host");
    let (before, after) = (files(&alone), files(&beside));
    for (name, text) in &before {
        assert_eq!(after.get(name), Some(text), "`{name}` changed");
    }
    // The bad app adds only files of its own, and replaces no shared one.
    for name in after.keys().filter(|name| !before.contains_key(*name)) {
        assert!(name.ends_with("@bad.loc") || *name == "app-bad.conf", "`{name}` is neither app's");
    }
    // The published problems of the bad app are bounded.
    if let Some(DesiredApp::Invalid { problems, .. }) = beside.apps.get(&app("bad")) {
        assert!(problems.to_string().len() < 64 * 1024, "{} bytes of problems", problems.to_string().len());
    }
    after.len() > before.len()
}

/// A key of the bad app or its env set, with an arbitrary value.
fn written() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
    let key = prop_oneof![
        12 => Just(b"apps/bad/spec".to_vec()),
        1 => prop_oneof![Just("image"), Just("restart"), Just("paused"), Just("nonsense")]
            .prop_map(|what| format!("apps/bad/{what}").into_bytes()),
        2 => "[ -~]{0,12}".prop_map(|name| format!("env/bad/{name}").into_bytes()),
        1 => proptest::collection::vec(any::<u8>(), 0..12).prop_map(|name| [b"env/bad/".to_vec(), name].concat()),
    ];
    let value = prop_oneof![
        12 => (0..NEAR.len(), any::<u64>(), prop_oneof![Just(0), 0..6usize]).prop_map(|(near, seed, times)| {
            let mut text = NEAR[near].as_bytes().to_vec();
            let mut chance = mutate::Chance(seed);
            let tokens: Vec<Vec<u8>> = ["good", "good.test", "hosts", "path", "\"*\"", "demae.invalid"]
                .map(|token| token.as_bytes().to_vec())
                .into();
            (0..times).for_each(|_| mutate::mutate(&mut chance, &mut text, &[], &tokens));
            text
        }),
        1 => proptest::collection::vec(any::<u8>(), 0..200),
        1 => (1..3000usize).prop_map(|n| format!("image: a\n{}", (0..n).map(|i| format!("k{i}: 1\n")).collect::<String>()).into_bytes()),
    ];
    (key, value)
}

#[test]
fn nothing_written_under_one_app_changes_another() {
    let config = ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() };
    let served = AtomicU32::new(0);
    let done = TestRunner::new(config).run(&proptest::collection::vec(written(), 1..6), |written| {
        served.fetch_add(u32::from(is_unchanged_by(&written)), Relaxed);
        Ok(())
    });
    if let Err(error) = done {
        panic!("{error}");
    }
    // Inputs that never produce a file would prove nothing.
    let served = served.into_inner();
    assert!(served > cases() / 20, "only {served} of {} had a file of its own", cases());
}

fn cases() -> u32 {
    std::env::var("DEMAE_PROPERTY_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(400)
}

#[test]
fn hosts_of_another_app_cannot_be_claimed() {
    for near in NEAR {
        is_unchanged_by(&[(b"apps/bad/spec".to_vec(), near.as_bytes().to_vec())]);
    }
}
