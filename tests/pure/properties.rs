//! Properties of the planner over generated histories: changed desired states, failing apps and steps, dead containers.
//!
//! The host is simulated; the planner and `check::violations` are real.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use demae::{
    model::{
        desired::{DesiredApp, Target},
        env::Secret,
        fleet::Turn,
        name::{AppName, EnvName, ImageRef},
        observed::{Address, Health, Instance, ObservedApp, Phase},
        problem::Problem,
        proxy::Upstreams,
        release::{Release, ReleaseKey},
        spec::{ContainerSpec, Endpoint, HealthCheck, Ingress, Order, Probe, PullPolicy},
        time::Timestamp,
    },
    plan::{AppPlan, Backoff, Backoffs, VhostWish, check::violations, simulate::SimHost, step::StepKind},
};
use proptest::prelude::*;

/// Behaviour of a release once started.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Behaviour {
    Works,
    NeverHealthy,
    Exits,
}

#[derive(Debug, Clone)]
enum Event {
    /// Sets this version with this many replicas.
    Want {
        version: u8,
        replicas: u16,
    },
    /// The app's key is deleted, or the app is paused.
    Leave,
    Pause,
    /// The agent is restarted while the store is down.
    LoseStore,
    /// The spec becomes invalid.
    Break,
    /// A container dies, becomes unhealthy, is paused, or is removed manually.
    Die(usize),
    Sicken(usize),
    Freeze(usize),
    Vanish(usize),
    /// The next so many steps fail.
    Fail(u8),
    /// The agent is killed and restarted: it knows no health and no backoffs.
    Crash,
    /// This host gets a turn that goes so far.
    Turn(u8),
    /// A number of passes.
    Run(u8),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (0u8..4, 1u16..4).prop_map(|(version, replicas)| Event::Want { version, replicas }),
        1 => Just(Event::Leave),
        1 => Just(Event::Pause),
        1 => Just(Event::LoseStore),
        1 => Just(Event::Break),
        1 => (0usize..6).prop_map(Event::Die),
        1 => (0usize..6).prop_map(Event::Sicken),
        1 => (0usize..6).prop_map(Event::Freeze),
        1 => (0usize..6).prop_map(Event::Vanish),
        1 => (1u8..5).prop_map(Event::Fail),
        2 => Just(Event::Crash),
        3 => (0u8..5).prop_map(Event::Turn),
        6 => (1u8..30).prop_map(Event::Run),
    ]
}

fn target(version: u8, replicas: u16, endpoint: Option<Endpoint>, order: Order) -> Target {
    let env = BTreeMap::from([(EnvName::try_from("VERSION").expect("a name"), Secret::new(version.to_string()))]);
    let image = ImageRef::try_from(format!("app:v{version}")).expect("an image");
    let probe = if endpoint.is_some() { Probe::Http("/".into()) } else { Probe::Running };
    let health = HealthCheck { probe, start_period: Duration::from_secs(3), ..HealthCheck::default() };
    let ingress = endpoint.clone().map(|endpoint| Ingress {
        hosts: vec!["app.example".try_into().expect("a host")],
        endpoint,
        drain: Duration::from_secs(10),
        template: None,
        max_body_size: 0,
        read_timeout: Duration::from_secs(60),
        response_header_size: 32 * 1024,
        request_buffering: true,
        path: None,
        strip_path: false,
        more: Vec::new(),
    });
    let key = ReleaseKey::new("key");
    let release = Release::new(&key, image, ContainerSpec::default(), env, health, endpoint, None);
    Target {
        release: Arc::new(release),
        replicas,
        ingress,
        order,
        update: demae::model::spec::Update::default(),
        pull_policy: PullPolicy::Missing,
        created: 1,
        modified: 1,
        cordoned: false,
        retried: 0,
        release_command: None,
    }
}

/// The port of apps that are published, and of those that are routed by the kernel's table.
const PUBLISHED: u16 = 8080;
const IN_TABLE: u16 = 9090;

struct History {
    host: SimHost,
    desired: DesiredApp,
    backoffs: Backoffs,
    behaviours: [Behaviour; 4],
    endpoint: Option<Endpoint>,
    order: Order,
    failing: u8,
    log: Vec<String>,
}

impl History {
    fn new(behaviours: [Behaviour; 4], endpoint: Option<Endpoint>, order: Order) -> Self {
        let app = AppName::try_from("app").expect("a name");
        let host = SimHost::new(app, ObservedApp::default(), None, Timestamp::from_millis(1_000_000));
        let host = if endpoint == Some(Endpoint::Port(IN_TABLE)) { host.with_table() } else { host };
        let desired = DesiredApp::Absent("not yet".into());
        Self { host, desired, backoffs: Backoffs::new(), behaviours, endpoint, order, failing: 0, log: Vec::new() }
    }

    fn target(&self, version: u8, replicas: u16) -> Target {
        target(version, replicas, self.endpoint.clone(), self.order)
    }

    fn behaviour(&self, release: &str) -> Behaviour {
        (0..4u8)
            .find(|v| self.target(*v, 1).release.id.as_str() == release)
            .map_or(Behaviour::Works, |v| self.behaviours[usize::from(v)])
    }

    fn is_routed(&self, i: &Instance) -> bool {
        match (&self.endpoint, self.host.live.as_ref()) {
            (Some(Endpoint::Socket(_)), _) => self.host.observed.slots.values().flatten().any(|k| *k == i.key),
            (Some(Endpoint::Port(_)), Some(vhost)) => match (&vhost.upstreams, &i.address) {
                (Upstreams::Ports(ports), Some(Address::Port(p))) => ports.contains(p),
                (Upstreams::Addresses(stable), Some(Address::Own(_))) => {
                    let slots = self.host.observed.mapped.iter().take(stable.len());
                    slots.filter_map(|(_, key)| key.as_ref()).any(|key| *key == i.key)
                }
                _ => false,
            },
            _ => false,
        }
    }

    /// Healthy instances with routes.
    fn serving(&self) -> usize {
        let instances = self.host.observed.instances.iter();
        instances.filter(|i| i.phase == Phase::Running && i.health.is_healthy()).filter(|i| self.is_routed(i)).count()
    }

    /// One pass of the agent; returns its plan.
    fn pass(&mut self) -> AppPlan {
        let plan = self.host.plan(&self.desired, &self.backoffs);
        let input = self.host.input(&self.desired, &self.backoffs);
        let found = violations(&input, &plan);
        assert!(found.is_empty(), "violations {found:?}\nplan {plan:#?}\nhistory:\n{}", self.log.join("\n"));
        assert_eq!(plan, self.host.plan(&self.desired, &self.backoffs), "the same input gave another plan");

        let before = self.serving();
        let live = self.host.live.clone();
        self.host.serve(&plan.vhost);
        if self.host.live != live {
            self.log.push(format!("  nginx: {:?}", self.host.live.as_ref().map(|v| &v.upstreams)));
        }
        if let Some(planned) = &plan.step {
            if self.failing > 0 {
                self.failing -= 1;
                self.log.push(format!("  FAILS {planned}"));
                self.back_off(planned.step.kind(), "it failed");
            } else {
                self.log.push(format!("  {planned}"));
                self.host.apply(&planned.step);
                if planned.step.kind() != StepKind::Discard {
                    self.backoffs.remove(&planned.step.kind());
                }
                if let demae::plan::step::Step::Discard { why, .. } = &planned.step {
                    self.back_off(StepKind::Discard, why);
                }
            }
        } else {
            self.host.now = self.host.now.plus(Duration::from_millis(500));
            self.simulate_programs();
        }
        let wanted = !matches!(self.desired, DesiredApp::Absent(_));
        if wanted && before > 0 && self.order == Order::StartFirst {
            assert!(self.serving() > 0, "the last healthy instance lost its requests\n{}", self.log.join("\n"));
        }
        plan
    }

    fn back_off(&mut self, kind: StepKind, error: &str) {
        let attempts = self.backoffs.get(&kind).map_or(1, |c| c.attempts + 1);
        let until = self.host.now.plus(Duration::from_secs(u64::from(attempts.min(30))));
        self.backoffs.insert(kind, Backoff { until, attempts, error: error.into(), kind: "docker", temporary: true });
    }

    /// Lets containers behave like their release.
    fn simulate_programs(&mut self) {
        let behaviours: Vec<Behaviour> =
            self.host.observed.instances.iter().map(|i| self.behaviour(i.key.release.as_str())).collect();
        let now = self.host.now;
        let routed: Vec<bool> = self.host.observed.instances.iter().map(|i| self.is_routed(i)).collect();
        for (instance, routed) in self.host.observed.instances.iter_mut().zip(routed) {
            // A routed instance is busy; an unrouted one finishes its requests one after the other.
            let connections = instance.connections.unwrap_or(0);
            instance.connections = Some(if routed { 3 } else { connections.saturating_sub(1) });
        }
        for (instance, behaviour) in self.host.observed.instances.iter_mut().zip(behaviours) {
            if instance.phase != Phase::Running {
                continue;
            }
            match (behaviour, &instance.health) {
                (Behaviour::Works, Health::Starting(_) | Health::Unknown) => instance.health = Health::Healthy,
                (Behaviour::NeverHealthy, _) if now >= instance.deadline() => {
                    instance.health = Health::Unhealthy { since: now, answer: "refused".into() };
                }
                (Behaviour::NeverHealthy, _) => instance.health = Health::Starting("refused".into()),
                (Behaviour::Exits, _) if now.since(instance.started) > Duration::from_millis(100) => {
                    instance.phase = Phase::Exited(3);
                }
                _ => {}
            }
        }
    }

    fn apply_event(&mut self, event: &Event) {
        self.log.push(format!("{event:?}"));
        let now = self.host.now;
        let count = self.host.observed.instances.len().max(1);
        match event {
            Event::Want { version, replicas } => {
                let target = self.target(*version, *replicas);
                if !matches!(&self.desired, DesiredApp::Run(t) if t.release.id == target.release.id) {
                    self.backoffs.clear();
                }
                self.desired = DesiredApp::Run(target);
            }
            Event::Leave => self.desired = DesiredApp::Absent("it was removed".into()),
            Event::LoseStore => self.desired = DesiredApp::Unknown("it was removed".into()),
            Event::Pause => self.desired = DesiredApp::Paused("a person said so".into()),
            Event::Break => {
                let last_good = match &self.desired {
                    DesiredApp::Run(target) => Some(target.clone()),
                    DesiredApp::Invalid { last_good, .. } => last_good.clone(),
                    _ => None,
                };
                let problems = Problem::new("spec", "this is not YAML").into();
                self.desired = DesiredApp::Invalid { problems, last_good };
            }
            Event::Fail(n) => self.failing = *n,
            Event::Turn(n) => {
                let (held, monitor) = ("it is the turn of other hosts".to_owned(), Duration::from_secs(10));
                let turns = [
                    Turn::Free,
                    Turn::Held(held),
                    Turn::Try,
                    Turn::Switch { monitor, confirmed: false },
                    Turn::Switch { monitor, confirmed: true },
                ];
                self.host.turn = turns[usize::from(*n)].clone();
            }
            Event::Crash => {
                self.backoffs.clear();
                for instance in &mut self.host.observed.instances {
                    instance.health = Health::Unknown;
                }
            }
            Event::Run(passes) => {
                for _ in 0..*passes {
                    self.pass();
                }
            }
            Event::Vanish(i) => {
                if self.host.observed.instances.len() > *i {
                    self.host.observed.instances.remove(*i % count);
                }
            }
            Event::Die(i) | Event::Sicken(i) | Event::Freeze(i) => {
                let Some(instance) = self.host.observed.instances.get_mut(*i % count) else { return };
                match event {
                    Event::Sicken(_) if instance.phase == Phase::Running => {
                        instance.health = Health::Unhealthy { since: now, answer: "503".into() };
                    }
                    Event::Die(_) if instance.is_alive() => instance.phase = Phase::Exited(137),
                    Event::Freeze(_) if instance.phase == Phase::Running => instance.phase = Phase::Paused,
                    _ => {}
                }
            }
        }
    }

    /// Faults have stopped: the app converges within a bound.
    fn assert_converges(&mut self) {
        self.failing = 0;
        self.host.turn = Turn::Free;
        self.log.push("faults stop".into());
        for _ in 0..600 {
            let plan = self.pass();
            let halted = plan.blocks.iter().any(|b| matches!(b.kind(), "halted" | "paused" | "invalid"));
            let kept = !plan.waits.is_empty() && plan.waits.iter().all(|w| w.kind() == "store");
            if plan.is_converged()
                || (plan.step.is_none() && (kept || halted && plan.waits.iter().all(|w| w.kind() == "retry")))
            {
                return self.assert_consistent(&plan);
            }
        }
        panic!("it does not converge: {:#?}\n{}", self.host.plan(&self.desired, &self.backoffs), self.log.join("\n"));
    }

    fn assert_consistent(&self, plan: &AppPlan) {
        let observed = &self.host.observed;
        match &self.desired {
            DesiredApp::Run(target) if plan.is_converged() => {
                assert_eq!(observed.instances.len(), usize::from(target.replicas), "{}", self.log.join("\n"));
                assert!(observed.instances.iter().all(|i| i.key.release == target.release.id && i.settled));
                assert_eq!(observed.env_files.iter().collect::<Vec<_>>(), [&target.release.id]);
                assert!(observed.verdicts.is_empty());
            }
            DesiredApp::Absent(_) => {
                assert!(observed.instances.is_empty() && !observed.has_routes() && self.host.live.is_none());
                assert!(observed.slot_addresses.is_empty());
                assert!(observed.env_files.is_empty() && observed.socket_dirs.is_empty() && observed.proven.is_none());
            }
            _ => {}
        }
    }
}

fn behaviours() -> impl Strategy<Value = [Behaviour; 4]> {
    let one =
        || prop_oneof![3 => Just(Behaviour::Works), 1 => Just(Behaviour::NeverHealthy), 1 => Just(Behaviour::Exits)];
    // Version 0 always works, so there is something to lose.
    [Just(Behaviour::Works).boxed(), one().boxed(), one().boxed(), one().boxed()]
}

fn endpoint() -> impl Strategy<Value = Option<Endpoint>> {
    prop_oneof![
        3 => Just(Some(Endpoint::Socket("/run/app/app.sock".into()))),
        2 => Just(Some(Endpoint::Port(PUBLISHED))),
        3 => Just(Some(Endpoint::Port(IN_TABLE))),
        1 => Just(None),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), max_shrink_iters: 5_000, ..ProptestConfig::default() })]

    /// The app never loses its last healthy instance, no foreign container is touched, a plan always has a reason, and
    /// once the faults stop the app converges.
    #[test]
    fn any_history_converges(
        behaviours in behaviours(),
        endpoint in endpoint(),
        stop_first in proptest::bool::weighted(0.2),
        events in proptest::collection::vec(event(), 1..40),
    ) {
        let order = if stop_first { Order::StopFirst } else { Order::StartFirst };
        let mut history = History::new(behaviours, endpoint, order);
        for event in &events {
            history.apply_event(event);
        }
        history.assert_converges();
    }

    /// Applying a step twice leaves the same state as applying it once.
    #[test]
    fn steps_are_idempotent(endpoint in endpoint(), replicas in 1u16..4) {
        let mut history = History::new([Behaviour::Works; 4], endpoint, Order::StartFirst);
        for version in [0, 1] {
            history.apply_event(&Event::Want { version, replicas });
            for _ in 0..100 {
                let plan = history.host.plan(&history.desired, &history.backoffs);
                history.host.serve(&plan.vhost);
                if let Some(planned) = &plan.step {
                    history.host.apply(&planned.step);
                    if planned.step.kind() != StepKind::Create {
                        let once = history.host.observed.clone();
                        history.host.apply(&planned.step);
                        prop_assert_eq!(&once, &history.host.observed);
                    }
                } else {
                    history.host.advance(Duration::from_secs(1));
                }
            }
            prop_assert!(history.host.plan(&history.desired, &history.backoffs).is_converged());
        }
    }
}

fn cases() -> u32 {
    std::env::var("DEMAE_PROPERTY_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(2_000)
}

/// A negative control: a planner that stops the old instance as soon as the new one runs is caught.
#[test]
fn a_broken_plan_is_caught() {
    let mut history =
        History::new([Behaviour::Works; 4], Some(Endpoint::Socket("/run/app/app.sock".into())), Order::StartFirst);
    history.apply_event(&Event::Want { version: 0, replicas: 1 });
    history.apply_event(&Event::Run(30));
    let instance = history.host.observed.instances.first().expect("it runs").clone();
    let handle = demae::plan::step::Handle { key: instance.key, id: instance.id };
    let mut plan = AppPlan::default();
    let step = demae::plan::step::Step::Stop { handle, grace: Duration::ZERO };
    plan.step = Some(demae::plan::step::Planned { step, reason: "a mutation" });
    let found = violations(&history.host.input(&history.desired, &history.backoffs), &plan);
    assert!(found.iter().any(|v| v.contains("requests go to")), "{found:?}");
    assert!(found.iter().any(|v| v.contains("last healthy")), "{found:?}");
}

/// A restarted agent has probed no instance yet, and one of two serving instances is superfluous.
#[test]
fn no_instance_leaves_the_routes_before_another_is_known_healthy() {
    for endpoint in [Endpoint::Socket("/run/app/app.sock".into()), Endpoint::Port(8080)] {
        let mut history = History::new([Behaviour::Works; 4], Some(endpoint), Order::StartFirst);
        history.apply_event(&Event::Want { version: 0, replicas: 2 });
        history.apply_event(&Event::Run(60));
        assert_eq!(history.serving(), 2);
        for instance in &mut history.host.observed.instances {
            instance.health = Health::Unknown;
        }
        history.desired = DesiredApp::Run(history.target(0, 1));
        let unprobed = history.host.plan(&history.desired, &history.backoffs);
        assert_eq!((unprobed.step, unprobed.vhost), (None, VhostWish::Keep));
        // The one with the lower number does not answer.
        let answer = || "connection refused".to_owned();
        for instance in &mut history.host.observed.instances {
            let unhealthy = Health::Starting(answer());
            instance.health = if instance.key.number == 1 { unhealthy } else { Health::Healthy };
        }
        history.apply_event(&Event::Run(5));
        assert_eq!(history.serving(), 1, "{}", history.log.join("\n"));
    }
}

/// A turn goes as far as it may, says when only the record of it is missing, and keeps the old release until the new one
/// has served for its time.
#[test]
fn turn_of_a_host_goes_step_by_step() {
    let endpoints = [
        Some(Endpoint::Socket("/run/app/app.sock".into())),
        Some(Endpoint::Port(PUBLISHED)),
        Some(Endpoint::Port(IN_TABLE)),
        None,
    ];
    for (endpoint, order) in
        endpoints.iter().flat_map(|e| [Order::StartFirst, Order::StopFirst].map(|o| (e.clone(), o)))
    {
        let mut history = History::new([Behaviour::Works; 4], endpoint.clone(), order);
        history.apply_event(&Event::Want { version: 0, replicas: 2 });
        history.apply_event(&Event::Run(60));
        let old = history.host.observed.clone();
        let runs = |history: &History, version: u8| {
            let release = history.target(version, 2).release.id.clone();
            let of = |i: &&Instance| i.key.release == release && i.phase == Phase::Running;
            history.host.observed.instances.iter().filter(of).count()
        };
        history.apply_event(&Event::Turn(1));
        history.apply_event(&Event::Want { version: 1, replicas: 2 });
        history.apply_event(&Event::Run(60));
        assert_eq!(history.host.observed.instances.len(), old.instances.len(), "nothing is begun before the turn");
        assert!(!history.host.plan(&history.desired, &history.backoffs).commits);
        history.apply_event(&Event::Turn(2));
        history.apply_event(&Event::Run(60));
        let plan = history.host.plan(&history.desired, &history.backoffs);
        assert!(plan.commits, "{endpoint:?} {order:?}: {plan:#?}\n{}", history.log.join("\n"));
        assert_eq!(runs(&history, 0), 2, "all of the old release runs");
        assert_eq!((&history.host.observed.slots, &history.host.observed.mapped), (&old.slots, &old.mapped));
        history.apply_event(&Event::Turn(4));
        // A worker has served since it was started: no requests are moved to it.
        if endpoint.is_none() {
            history.apply_event(&Event::Run(100));
            assert_eq!((runs(&history, 0), runs(&history, 1)), (0, 2));
            continue;
        }
        let passes = (0..200).find(|_| history.pass().waits.iter().any(|w| w.kind() == "monitor"));
        assert!(passes.is_some(), "{}", history.log.join("\n"));
        assert_eq!(runs(&history, 1), 2);
        let kept = history.host.observed.instances.iter().filter(|i| i.key.release == history.target(0, 2).release.id);
        assert_eq!(kept.count(), 2, "what to go back to is still there");
        history.apply_event(&Event::Run(100));
        assert!(history.host.plan(&history.desired, &history.backoffs).is_converged(), "{}", history.log.join("\n"));
        assert_eq!((runs(&history, 0), runs(&history, 1)), (0, 2));
    }
}
