//! Single planner decisions, as tables of observed state and planned steps.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use demae::{
    model::{
        desired::{DesiredApp, Snapshot, Target},
        fleet::FleetImage,
        mounts::{NestedMount, Relation, nested},
        name::{AppName, ImageDigest, ReleaseId},
        observed::{Address, Bind, Foreign, Health, ObservedApp, Phase},
        policy::Policy,
        problem::Problem,
        proxy::{Upstreams, Vhost},
        release::{Release, ReleaseKey},
        spec::{Endpoint, PullPolicy, Spec},
        time::Timestamp,
    },
    plan::{
        AppInput, AppPlan, Backoff, Backoffs, ProxyView, Stopping, VhostWish,
        app::plan_app,
        check::violations,
        simulate::SimHost,
        step::{Handle, IMAGE_ABSENT, Planned, Step, StepKind},
        wait::{Block, Wait},
    },
};

fn target(text: &str, version: &str) -> Target {
    let spec = Spec::parse(text.as_bytes()).expect("a spec");
    let image = format!("web:{version}").as_str().try_into().expect("an image");
    let endpoint = spec.ingress.as_ref().map(|i| i.endpoint.clone());
    let key = ReleaseKey::new("key");
    let release =
        Release::new(&key, image, spec.container.clone(), BTreeMap::new(), spec.health.clone(), endpoint, None);
    Target {
        release: Arc::new(release),
        replicas: spec.deploy.replicas_per_host,
        ingress: spec.ingress,
        order: spec.deploy.order,
        update: demae::model::spec::Update::default(),
        pull_policy: spec.pull_policy,
        created: 1,
        modified: 1,
        cordoned: false,
        retried: 0,
        release_command: None,
    }
}

const PORT: &str = "ingress: {hosts: [a.test], port: 8080, drain: 5s}\n";

/// One app on a host, with the other inputs of its plan.
struct Scene {
    host: SimHost,
    desired: DesiredApp,
    backoffs: Backoffs,
    stopping: Stopping,
    nested: Option<NestedMount>,
    policy: Policy,
    stays_until: Option<Timestamp>,
    old_workers: bool,
    image: FleetImage,
}

impl Scene {
    /// With this release serving, or with none.
    fn new(serving: Option<Target>) -> Self {
        let app = AppName::try_from("web").expect("a name");
        let host = SimHost::new(app, ObservedApp::default(), None, Timestamp::from_millis(1_000_000_000));
        let (desired, backoffs, stopping) = (DesiredApp::Absent(String::new()), Backoffs::new(), Stopping::new());
        let policy = Policy::built_in("web1", "policy.toml");
        let mut scene = Self {
            host,
            desired,
            backoffs,
            stopping,
            nested: None,
            policy,
            stays_until: None,
            old_workers: false,
            image: FleetImage::AsNamed,
        };
        if let Some(target) = serving {
            scene.desired = DesiredApp::Run(target);
            scene.settle();
        }
        scene
    }

    fn input(&self) -> AppInput<'_> {
        AppInput {
            image: &self.image,
            stopping: &self.stopping,
            nested: self.nested.as_ref(),
            policy: &self.policy,
            stays_until: self.stays_until,
            proxy: ProxyView { old_workers: self.old_workers, ..self.host.input(&self.desired, &self.backoffs).proxy },
            ..self.host.input(&self.desired, &self.backoffs)
        }
    }

    fn plan(&self) -> AppPlan {
        let input = self.input();
        let plan = plan_app(&input);
        assert_eq!(violations(&input, &plan), Vec::<String>::new(), "{plan:#?}");
        plan
    }

    fn kind(&self) -> Option<StepKind> {
        self.plan().step.map(|planned| planned.step.kind())
    }

    /// Applies steps until converged, with every instance healthy.
    fn settle(&mut self) {
        for _ in 0..100 {
            let plan = self.plan();
            self.host.serve(&plan.vhost);
            match plan.step {
                Some(planned) => self.host.apply(&planned.step),
                None if plan.is_converged() => return,
                None => self.host.advance(Duration::from_secs(1)),
            }
        }
        panic!("it does not converge: {:#?}", self.plan());
    }

    /// Applies steps until one of this kind is next.
    fn until(&mut self, kind: StepKind) {
        for _ in 0..100 {
            let plan = self.plan();
            self.host.serve(&plan.vhost);
            match plan.step {
                Some(planned) if planned.step.kind() == kind => return,
                Some(planned) => self.host.apply(&planned.step),
                None => self.host.advance(Duration::from_millis(500)),
            }
        }
        panic!("no {kind:?} is planned: {:#?}", self.plan());
    }
}

#[test]
fn nothing_is_created_before_the_image_of_the_fleet_is_known() {
    let digest = |n: usize| ImageDigest::try_from(format!("sha256:{n:064x}")).expect("a digest");
    let (old, new) = (target(PORT, "v1"), target(PORT, "v2"));
    let image = new.release.image.clone();
    let scene = |image: FleetImage, found: Option<ImageDigest>| {
        let mut scene = Scene { image: FleetImage::AsNamed, ..Scene::new(Some(old.clone())) };
        (scene.desired, scene.image) = (DesiredApp::Run(new.clone()), image);
        scene.host.observed.pulled = false;
        (scene.host.observed.image, scene.host.observed.image_digest) = (Some("sha256:here".to_owned()), found);
        scene
    };
    let waits = |scene: &Scene| scene.plan().step.is_none() && scene.plan().waits.contains(&Wait::Digest);
    // It was pulled, and no host has said yet which one the release is.
    let mut first = scene(FleetImage::Unwritten, Some(digest(1)));
    assert!(waits(&first), "{:#?}", first.plan());
    first.image = FleetImage::Written(digest(1));
    first.until(StepKind::Create);
    // One that was built or loaded here has no digest to be known by.
    scene(FleetImage::Unwritten, None).until(StepKind::Create);
    // What serves needs no record: a lost container is replaced.
    let mut settled = Scene::new(Some(old.clone()));
    settled.image = FleetImage::Unwritten;
    settled.host.observed.image_digest = Some(digest(1));
    settled.host.observed.instances.clear();
    settled.until(StepKind::Create);
    // Before the records are read nothing is pulled by a tag, not even with `always`; what is here is started.
    (settled.image, settled.host.observed.pulled) = (FleetImage::Unread, false);
    settled.desired = DesiredApp::Run(Target { pull_policy: PullPolicy::Always, ..old.clone() });
    settled.until(StepKind::Create);
    settled.host.observed.image = None;
    let plan = settled.plan();
    assert!(plan.step.is_none() && plan.waits.iter().any(|w| matches!(w, Wait::Store(_))), "{plan:#?}");
    // What cannot be read is not taken for missing.
    let unreadable = scene(FleetImage::Unreadable, Some(digest(1)));
    assert!(unreadable.kind().is_none() && unreadable.plan().waits.iter().any(|w| matches!(w, Wait::Turn(_))));
    // What is pulled is what other hosts have, and `always` has nothing to ask for then.
    let mut later = scene(FleetImage::Written(digest(2)), None);
    later.host.observed.image = None;
    let pulled = later.plan().step.map(|planned| planned.step);
    assert_eq!(pulled, Some(Step::Pull { image, digest: Some(digest(2)) }));
    let always = Target { pull_policy: PullPolicy::Always, ..new.clone() };
    for (written, kind) in
        [(FleetImage::Written(digest(2)), StepKind::WriteEnvFile), (FleetImage::Unwritten, StepKind::Pull)]
    {
        let mut scene = scene(written, Some(digest(2)));
        scene.desired = DesiredApp::Run(always.clone());
        assert_eq!(scene.kind(), Some(kind));
    }
}

#[test]
fn image_that_no_registry_has_fails_its_release_once_something_is_proven() {
    let absent = |attempts| Backoff {
        until: Timestamp::from_millis(1_000_000_005_000),
        attempts,
        error: "image `web:v2` cannot be pulled: manifest unknown".into(),
        kind: IMAGE_ABSENT,
        temporary: false,
    };
    let scene = |serving: Option<Target>, backoff: Backoff| {
        let mut scene = Scene::new(serving);
        scene.desired = DesiredApp::Run(target(PORT, "v2"));
        scene.host.observed.image = None;
        scene.backoffs.insert(StepKind::Pull, backoff);
        scene
    };
    let old = || Some(target(PORT, "v1"));
    // It may have been pushed a moment ago.
    let early = scene(old(), absent(2));
    assert!(
        early.kind().is_none() && matches!(early.plan().blocks[..], [Block::ImageMissing(_)]),
        "{:#?}",
        early.plan()
    );
    let mut failed = scene(old(), absent(3));
    let Some(Step::RecordVerdict { handle: None, cause, .. }) = failed.plan().step.map(|planned| planned.step) else {
        panic!("a verdict: {:#?}", failed.plan())
    };
    assert!(cause.contains("manifest unknown"), "{cause}");
    failed.until(StepKind::RecordVerdict);
    let verdict = failed.plan().step.expect("a verdict").step;
    failed.host.apply(&verdict);
    assert!(matches!(failed.plan().blocks[..], [Block::Halted(_)]), "{:#?}", failed.plan());
    // What may be mended on this host is no fault of the release, and before anything serves it is tried for ever.
    for waits in [scene(old(), Backoff { kind: "image", ..absent(9) }), scene(None, absent(9))] {
        assert!(waits.kind().is_none() && matches!(waits.plan().blocks[..], [Block::ImageMissing(_)]));
    }
}

#[test]
fn stopping_instance_delays_no_other_step() {
    let mut scene = Scene::new(Some(target(PORT, "v1")));
    scene.desired = DesiredApp::Run(target(PORT, "v2"));
    scene.until(StepKind::Stop);
    let Some(Planned { step: Step::Stop { handle, .. }, .. }) = scene.plan().step else { panic!("a stop is next") };
    scene.stopping.insert(handle.id.clone(), scene.host.now.plus(Duration::from_secs(60)));
    let plan = scene.plan();
    assert!(plan.step.is_none() && plan.waits.iter().any(|w| matches!(w, Wait::Stopping { .. })), "{plan:#?}");
    // The next release starts while the old instance stops.
    scene.desired = DesiredApp::Run(target(PORT, "v3"));
    assert_eq!(scene.kind(), Some(StepKind::WriteEnvFile));
    // A plan that stops it again is rejected.
    let twice = Step::Stop { handle, grace: Duration::ZERO };
    let plan = AppPlan { step: Some(Planned { step: twice, reason: "a mutation" }), ..AppPlan::default() };
    assert!(violations(&scene.input(), &plan).iter().any(|v| v.contains("already being stopped")));
}

#[test]
fn port_instance_outlives_uploads_that_older_workers_read() {
    let mut scene = Scene::new(Some(target(PORT, "v1")));
    scene.desired = DesiredApp::Run(target(PORT, "v2"));
    scene.until(StepKind::Stop);
    let old = scene
        .host
        .observed
        .instances
        .iter()
        .position(|i| i.key.release != scene.desired.target().expect("one").release.id);
    let old = old.expect("the old one is there");
    scene.old_workers = true;
    let left = scene.host.live_changed;
    for (seconds, connections, stops) in [
        (1, 0, false),
        // A connection has the drain time from when it can have begun, then it is cut.
        (5, 1, false),
        (6, 1, true),
        // No connection, but a worker may still be reading a request.
        (6, 0, false),
        (300, 0, false),
        // A later connection is waited for, as long.
        (300, 1, false),
        (305, 1, true),
        (601, 0, true),
        (601, 1, false),
        (606, 1, true),
    ] {
        scene.host.now = left.plus(Duration::from_secs(seconds));
        let instance = &mut scene.host.observed.instances[old];
        instance.connections = Some(connections);
        if connections == 0 {
            instance.idle_at = Some(scene.host.now);
        }
        let stop = scene.kind() == Some(StepKind::Stop);
        assert_eq!(stop, stops, "after {seconds} s with {connections} connections");
    }
    scene.host.now = left.plus(Duration::from_secs(60));
    scene.host.observed.instances[old].connections = Some(0);
    let instance = &scene.host.observed.instances[old];
    let step =
        Step::Stop { handle: Handle { key: instance.key.clone(), id: instance.id.clone() }, grace: Duration::ZERO };
    let plan = AppPlan { step: Some(Planned { step, reason: "a mutation" }), ..AppPlan::default() };
    assert!(violations(&scene.input(), &plan).iter().any(|v| v.contains("older nginx worker")));
    scene.old_workers = false;
    assert_eq!(scene.kind(), Some(StepKind::Stop), "without older workers no request is in flight");
}

/// Lets the scene's candidate exit with this code; returns the recorded verdict.
fn fail(scene: &mut Scene, code: i64) -> (String, u32) {
    scene.until(StepKind::Start);
    let step = scene.plan().step.expect("a start").step;
    scene.host.apply(&step);
    let wanted = scene.desired.target().expect("it is wanted").release.id.clone();
    let of_it = scene.host.observed.instances.iter_mut().filter(|i| i.key.release == wanted);
    of_it.for_each(|i| i.phase = Phase::Exited(code));
    let step = scene.plan().step.expect("a verdict").step;
    let Step::RecordVerdict { cause, attempts, .. } = &step else { panic!("a verdict: {step}") };
    let verdict = (cause.clone(), *attempts);
    scene.host.apply(&step);
    verdict
}

#[test]
fn failed_first_release_is_retried_with_backoff_and_a_later_one_is_not() {
    let mut scene = Scene::new(None);
    scene.desired = DesiredApp::Run(target(PORT, "v1"));
    let mut pauses = Vec::new();
    for attempt in 1..=4 {
        assert_eq!(fail(&mut scene, 1).1, attempt);
        let failed = scene.host.now;
        // The failed candidate is removed first.
        scene.until(StepKind::Create);
        pauses.push(scene.host.now.since(failed).as_secs());
    }
    assert!(pauses.windows(2).all(|p| p[1] > p[0]) && pauses[0] <= 6, "{pauses:?}");

    let mut scene = Scene::new(Some(target(PORT, "v1")));
    scene.desired = DesiredApp::Run(target(PORT, "v2"));
    fail(&mut scene, 1);
    for _ in 0..20 {
        let plan = scene.plan();
        plan.step.iter().for_each(|planned| scene.host.apply(&planned.step));
    }
    scene.host.now = scene.host.now.plus(Duration::from_secs(3600));
    let plan = scene.plan();
    assert!(plan.step.is_none() && plan.blocks.iter().any(|b| b.kind() == "halted"), "{plan:#?}");
    // When the verdict's inputs change, the verdict is dropped.
    let stop_first = format!("{PORT}deploy: {{update_config: {{order: stop-first}}}}\n");
    scene.desired = DesiredApp::Run(target(&stop_first, "v2"));
    assert!(scene.plan().blocks.is_empty() && scene.plan().step.is_some(), "{:#?}", scene.plan());
}

#[test]
fn known_exit_code_is_explained() {
    let cause = |code: i64, more: &str| {
        let mut scene = Scene::new(None);
        scene.desired = DesiredApp::Run(target(&format!("{PORT}{more}"), "v1"));
        fail(&mut scene, code).0
    };
    assert!(cause(100, "").contains("`init: false`"), "{}", cause(100, ""));
    assert!(!cause(100, "init: false\n").contains("`init: false`") && !cause(1, "").contains("init"));
}

#[test]
fn deleted_app_is_kept_until_its_delete_grace_is_over() {
    let mut scene = Scene::new(Some(target(PORT, "v1")));
    scene.desired = DesiredApp::Absent("it was deleted".into());
    scene.stays_until = Some(scene.host.now.plus(Duration::from_secs(3)));
    let plan = scene.plan();
    assert!(plan.step.is_none() && plan.vhost == VhostWish::Keep, "{plan:#?}");
    assert!(plan.waits.iter().any(|w| matches!(w, Wait::Deletion(_))), "{plan:#?}");
    scene.host.now = scene.host.now.plus(Duration::from_secs(3));
    assert_eq!(scene.plan().vhost, VhostWish::Remove);
}

#[test]
fn rollback_to_a_release_with_fewer_endpoints_is_planned() {
    let mut scene = Scene::new(Some(target(PORT, "v1")));
    let Some(alone) = scene.input().proxy.live.cloned() else { panic!("it has a virtual host") };
    let list = "ingress:\n  - {hosts: [a.test], port: 8080, drain: 5s}\n  - {hosts: [b.test], port: 9000}\n";
    scene.desired = DesiredApp::Run(target(list, "v2"));
    // The virtual host of the second release, before it became unhealthy.
    let way = |port: u16, inside: u16| Vhost {
        upstreams: Upstreams::Ports(vec![port]),
        endpoint: Some(Endpoint::Port(inside)),
        ..alone.clone()
    };
    let both = Vhost { more: vec![way(20_778, 9000)], ..way(20_777, 8080) };
    scene.host.serve(&VhostWish::Set(both));
    let wanted = Vhost { endpoint: Some(Endpoint::Port(8080)), ..alone.clone() };
    assert_eq!(scene.plan().vhost, VhostWish::Set(wanted), "no upstream is an endpoint that it lacks");
}

#[test]
fn nothing_is_created_beside_foreign_containers_or_nested_mounts() {
    let mut scene = Scene::new(None);
    scene.desired = DesiredApp::Run(target(PORT, "v1"));
    assert!(scene.kind().is_some());
    scene.host.observed.foreign = vec![Foreign { name: "demae.a.web".into(), owner: "agent 1".into() }];
    let plan = scene.plan();
    assert!(plan.step.is_none() && plan.blocks.iter().any(|b| b.kind() == "foreign"), "{plan:#?}");
    scene.host.observed.foreign.clear();
    let owner = AppName::try_from("other").expect("a name");
    scene.nested =
        Some(NestedMount { path: "/srv/a/b".into(), relation: Relation::Below, other: "/srv/a".into(), owner });
    let plan = scene.plan();
    assert!(plan.step.is_none() && plan.blocks.iter().any(|b| b.kind() == "mount_unsafe"), "{plan:#?}");
}

#[test]
fn last_healthy_instance_is_kept_for_an_invalid_spec() {
    let mut scene = Scene::new(Some(target(PORT, "v1")));
    let last_good = scene.desired.target().cloned();
    scene.desired = DesiredApp::Invalid { problems: Problem::new("spec", "this is not YAML").into(), last_good };
    let instance = scene.host.observed.instances[0].clone();
    scene.host.live = None::<Vhost>;
    let step = Step::Stop { handle: Handle { key: instance.key, id: instance.id }, grace: Duration::ZERO };
    let plan = AppPlan { step: Some(Planned { step, reason: "a mutation" }), ..AppPlan::default() };
    assert!(violations(&scene.input(), &plan).iter().any(|v| v.contains("last healthy")));
}

#[test]
fn unhealthy_instance_is_replaced_for_that_reason() {
    let mut scene = Scene::new(Some(target(PORT, "v1")));
    let since = scene.host.now;
    scene.host.now = since.plus(Duration::from_secs(60));
    scene.host.observed.instances[0].health = Health::Unhealthy { since, answer: "503".into() };
    let planned = scene.plan().step.expect("a step");
    assert_eq!((planned.step.kind(), planned.reason), (StepKind::Create, demae::plan::app::REPLACES_UNHEALTHY));
}

#[test]
fn container_whose_port_is_taken_is_removed() {
    let mut scene = Scene::new(None);
    scene.desired = DesiredApp::Run(target(PORT, "v1"));
    scene.until(StepKind::Start);
    assert!(matches!(scene.host.observed.instances[0].address, Some(Address::Port(_))));
    scene.host.observed.instances[0].port_taken = true;
    assert_eq!(scene.kind(), Some(StepKind::Remove));
    let release: ReleaseId = scene.host.observed.instances[0].key.release.clone();
    assert!(!scene.host.observed.verdicts.contains_key(&release), "that is no fault of the release");
}

/// A policy of the host of a scene.
fn policy(text: &str) -> Policy {
    Policy::parse("web1", "policy.toml", text).expect("it is valid")
}

fn block_of(plan: &AppPlan) -> Vec<&'static str> {
    plan.blocks.iter().map(Block::kind).collect()
}

#[test]
fn a_narrower_policy_stops_nothing_and_lets_nothing_new_begin() {
    let mut scene = Scene::new(Some(target(PORT, "v1")));
    scene.policy = policy("[containers]\nread_only = true\n");
    assert!(scene.plan().is_converged(), "what runs is not touched: {:#?}", scene.plan());
    scene.desired = DesiredApp::Run(target(PORT, "v2"));
    let plan = scene.plan();
    assert!(plan.step.is_none() && block_of(&plan) == ["not_allowed"] && plan.healthy == 1, "{plan:#?}");
    assert!(plan.blocks[0].to_string().contains("policy.toml:2"), "{}", plan.blocks[0]);
    // It is restarted as it is when it ends, but no container is created for it.
    let mut scene = Scene::new(Some(target(PORT, "v1")));
    scene.policy = policy("[containers]\nread_only = true\n");
    scene.host.observed.instances[0].phase = Phase::Exited(1);
    assert_eq!(scene.kind(), Some(StepKind::Start));
    scene.host.observed.instances.clear();
    assert_eq!(block_of(&scene.plan()), ["not_allowed"]);
    scene.policy = policy("");
    assert_eq!(scene.kind(), Some(StepKind::Create));
}

#[test]
fn a_virtual_host_that_is_not_allowed_is_kept_and_not_added() {
    let others = PORT.replace("a.test", "b.test");
    let mut scene = Scene::new(Some(target(PORT, "v1")));
    scene.policy = policy("[ingress]\nhosts = ['a.test']\n");
    scene.desired = DesiredApp::Run(target(&others, "v1"));
    let plan = scene.plan();
    assert!(block_of(&plan) == ["not_allowed"] && plan.vhost == VhostWish::Keep, "{plan:#?}");
    let mut scene = Scene::new(Some(target(&others, "v1")));
    scene.policy = policy("[ingress]\nhosts = ['a.test']\n");
    assert!(scene.plan().is_converged(), "it had its host before: {:#?}", scene.plan());
    scene.desired = DesiredApp::Run(target(&others, "v2"));
    assert_eq!(block_of(&scene.plan()), ["not_allowed"], "{:#?}", scene.plan());
}

#[test]
fn plan_against_the_policy_is_refused_by_the_check() {
    let mut scene = Scene::new(None);
    scene.desired = DesiredApp::Run(target(PORT, "v1"));
    scene.until(StepKind::Create);
    let plan = scene.plan();
    scene.policy = policy("[containers]\nread_only = true\n");
    assert_eq!(violations(&scene.input(), &plan).len(), 1, "a container that is not allowed");
    let mut scene = Scene::new(Some(target(PORT, "v1")));
    let vhost = scene.host.input(&scene.desired, &scene.backoffs).proxy.live.cloned().expect("it is served");
    scene.desired = DesiredApp::Run(target(&PORT.replace("a.test", "b.test"), "v1"));
    let hosts = vec!["b.test".try_into().expect("a host")];
    let plan = AppPlan { vhost: VhostWish::Set(Vhost { hosts, ..vhost }), ..AppPlan::default() };
    let before = violations(&scene.input(), &plan).len();
    scene.policy = policy("[ingress]\nhosts = ['a.test']\n");
    assert_eq!(violations(&scene.input(), &plan).len(), before + 1, "a virtual host that is not allowed");
}

#[test]
fn of_two_apps_with_mounts_in_one_tree_the_first_one_goes_on() {
    let bind = |path: &str, read_only| Bind { source: path.to_owned(), read_only, real: None };
    let app = |name: &str| AppName::try_from(name).expect("a name");
    let wanted = |apps: &[(&str, &str)]| {
        let target = |volume: &str| DesiredApp::Run(target(&format!("volumes: [\"{volume}\"]\n"), "v1"));
        let apps = apps.iter().map(|(name, volume)| (app(name), target(volume))).collect();
        Snapshot { apps, ..Snapshot::default() }
    };
    let refused = |apps: &[(&str, &str)], present: &[(&str, &str, bool)]| {
        let present = present.iter().map(|(name, path, read_only)| (app(name), vec![bind(path, *read_only)])).collect();
        let found = nested(&wanted(apps), &present).into_iter();
        found
            .map(|(app, nested)| format!("{app} {:?} {}", nested.relation, nested.owner))
            .collect::<Vec<_>>()
            .join(", ")
    };
    let (above, below) = (("a", "/srv/x:/x"), ("b", "/srv/x/y:/y"));
    // Neither has a container: what is above goes first, since nothing can be replaced yet.
    assert_eq!(refused(&[above, below], &[]), "b Below a");
    assert_eq!(refused(&[above, below], &[("a", "/srv/x", false)]), "b Below a");
    assert_eq!(refused(&[above, below], &[("b", "/srv/x/y", true)]), "a Above b");
    // Also of an app that is leaving.
    assert_eq!(refused(&[above], &[("b", "/srv/x/y", false)]), "a Above b");
    assert_eq!(refused(&[below], &[("a", "/srv/x", false)]), "b Below a");
    // What can only be read replaces nothing; a similar name is no directory above.
    assert_eq!(refused(&[("a", "/srv/x:/x:ro"), below], &[("b", "/srv/x/y", false)]), "");
    assert_eq!(refused(&[("a", "/srv/xy:/x"), below], &[("a", "/srv/xy", false)]), "");
    // The containers of an app from before count, too, and so do two mounts of one spec.
    assert_eq!(refused(&[above], &[("a", "/srv/x/y", false)]), "a Above a");
    assert_eq!(refused(&[below], &[("b", "/srv/x", false)]), "b Below b");
    assert_eq!(refused(&[above], &[("a", "/srv/x", false)]), "");
    let both = DesiredApp::Run(target("volumes: [\"/srv/x:/x\", \"/srv/x/y:/y\"]\n", "v1"));
    let snapshot = Snapshot { apps: BTreeMap::from([(app("a"), both)]), ..Snapshot::default() };
    assert_eq!(nested(&snapshot, &BTreeMap::new()).len(), 1);
}
