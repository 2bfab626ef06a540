//! Golden scenarios of the planner: scripts of events, and the plan after each, as files in `tests/golden/scenarios/`. They
//! show the planner's decisions in order, named for what they teach. `UPDATE_EXPECT=1` writes the plans anew.
//!
//! A line that begins with `>` is an event; the lines below it are what the planner makes of it, and are generated. Events:
//!
//! - `want v2 [xN] [socket|port|worker] [stop-first]`: this release is wanted; options last until changed
//! - `absent`, `unknown`, `paused`, `invalid`: the desired state
//! - `step`: the planned step succeeds; `fails`: it fails, and may be retried
//! - `nginx`: nginx serves what the plan wishes
//! - `steps`: steps succeed, nginx follows and running instances become healthy, until there is no step
//! - `healthy|unhealthy|starting v1.1`, `exits v1.1 137`, `dies v1.1`, `vanishes v1.1`, `connections v1.1 3`
//! - `wait 10` in seconds, `restart`: the agent forgets health and failures

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path, sync::Arc, time::Duration};

use demae::{
    model::{
        desired::{DesiredApp, Target},
        fleet::Turn,
        name::AppName,
        observed::{Health, Instance, ObservedApp, Phase},
        problem::Problem,
        proxy::{Upstreams, Vhost},
        release::{Release, ReleaseKey},
        spec::Spec,
        time::Timestamp,
    },
    plan::{AppPlan, Backoff, Backoffs, VhostWish, check::violations, simulate::SimHost, step::Step, step::StepKind},
};

const START: Timestamp = Timestamp::from_millis(1_000_000_000);

struct Scenario {
    host: SimHost,
    desired: DesiredApp,
    backoffs: Backoffs,
    kind: &'static str,
    order: &'static str,
    replicas: usize,
    /// Ids of releases, by version.
    releases: BTreeMap<String, String>,
}

impl Scenario {
    fn new() -> Self {
        let app = AppName::try_from("web").expect("a name");
        Self {
            host: SimHost::new(app, ObservedApp::default(), None, START),
            desired: DesiredApp::Absent("the store has no such app".into()),
            backoffs: Backoffs::new(),
            kind: "socket",
            order: "start-first",
            replicas: 1,
            releases: BTreeMap::new(),
        }
    }

    fn target(&mut self, version: &str) -> Target {
        let ingress = match self.kind {
            "socket" => "ingress: {hosts: [a.test], socket: /run/app/app.sock, drain: 10s}\n",
            "port" => "ingress: {hosts: [a.test], port: 8080, drain: 10s}\n",
            _ => "",
        };
        let text = format!(
            "image: web:{version}\n{ingress}healthcheck: {{start_period: 30s}}\n\
             deploy: {{replicas_per_host: {}, update_config: {{order: {}}}}}\n",
            self.replicas, self.order
        );
        let spec = Spec::parse(text.as_bytes()).unwrap_or_else(|problems| panic!("{text}: {problems:?}"));
        let endpoint = spec.ingress.as_ref().map(|ingress| ingress.endpoint.clone());
        let (key, image) = (ReleaseKey::new("key"), spec.image.clone().expect("an image"));
        let health = spec.health.clone();
        let release = Release::new(&key, image, spec.container.clone(), BTreeMap::new(), health, endpoint, None);
        self.releases.insert(release.id.to_string(), version.to_owned());
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

    fn plan(&self) -> AppPlan {
        let plan = self.host.plan(&self.desired, &self.backoffs);
        let found = violations(&self.host.input(&self.desired, &self.backoffs), &plan);
        assert_eq!(found, [] as [String; 0], "{plan:#?}");
        plan
    }

    /// The plan in lines, with versions in place of release ids and times since the start.
    fn printed(&self) -> String {
        let plan = self.plan();
        let mut lines = Vec::new();
        lines.extend(plan.step.iter().map(|planned| format!("step: {planned}")));
        lines.extend(plan.waits.iter().map(|wait| format!("wait: {wait}")));
        lines.extend(plan.blocks.iter().map(|block| format!("block: {}: {block}", block.kind())));
        if plan.commits {
            lines.push("commits".into());
        }
        if plan.is_converged() {
            lines.push("converged".into());
        }
        let upstreams = |vhost: &Vhost| match &vhost.upstreams {
            Upstreams::Slots(n) => format!("slots 1 to {n}"),
            Upstreams::Ports(ports) => format!("ports {ports:?}"),
            Upstreams::Addresses(addresses) => format!("addresses {addresses:?}"),
        };
        match &plan.vhost {
            VhostWish::Set(vhost) if self.host.live.as_ref() != Some(vhost) => {
                lines.push(format!("nginx: {}", upstreams(vhost)));
            }
            VhostWish::Announce(vhost) if self.host.live.as_ref() != Some(vhost) => {
                lines.push(format!("nginx: {}, announced", upstreams(vhost)));
            }
            VhostWish::Remove if self.host.live.is_some() => lines.push("nginx: nothing".into()),
            _ => {}
        }
        let mut text = lines.iter().fold(String::new(), |text, line| text + "  " + line + "\n");
        for (id, version) in &self.releases {
            text = text.replace(id, version);
        }
        self.relative(&text)
    }

    /// Replaces times by seconds since the start of the scenario.
    fn relative(&self, text: &str) -> String {
        let mut out = text.to_owned();
        for second in 0..=3_600 {
            let at = START.plus(Duration::from_secs(second)).to_string();
            out = out.replace(&at, &format!("{second} s"));
        }
        out
    }

    fn instance(&mut self, name: &str) -> &mut Instance {
        let releases = self.releases.clone();
        let is_it = |i: &&mut Instance| {
            let version = releases.get(i.key.release.as_str()).map_or("?", String::as_str);
            format!("{version}.{}", i.key.number) == name
        };
        self.host.observed.instances.iter_mut().find(is_it).unwrap_or_else(|| panic!("there is no instance {name}"))
    }

    fn succeed(&mut self) {
        let Some(planned) = self.plan().step else { panic!("there is no step to perform") };
        self.host.apply(&planned.step);
        self.backoffs.remove(&planned.step.kind());
        if let Step::Discard { why, .. } = &planned.step {
            let why = why.clone();
            self.back_off(StepKind::Discard, &why);
        }
    }

    fn back_off(&mut self, kind: StepKind, error: &str) {
        let attempts = self.backoffs.get(&kind).map_or(1, |backoff| backoff.attempts + 1);
        let until = self.host.now.plus(Duration::from_secs(u64::from(attempts)));
        self.backoffs.insert(kind, Backoff { until, attempts, error: error.into(), kind: "docker", temporary: true });
    }

    fn serve(&mut self) {
        let wish = self.plan().vhost;
        self.host.serve(&wish);
    }

    /// Performs everything that succeeds in an ordinary deploy, and returns the steps.
    fn run(&mut self) -> String {
        let mut text = String::new();
        for _ in 0..100 {
            let plan = self.plan();
            self.host.serve(&plan.vhost);
            match plan.step {
                Some(planned) => {
                    let _ = writeln!(text, "  - {planned}");
                    self.succeed();
                }
                None if plan.waits.is_empty() => break,
                None => {
                    self.host.now = self.host.now.plus(Duration::from_secs(1));
                    for instance in self.host.observed.instances.iter_mut().filter(|i| i.phase == Phase::Running) {
                        instance.connections = Some(0);
                        if matches!(instance.health, Health::Unknown | Health::Starting(_)) {
                            instance.health = Health::Healthy;
                        }
                    }
                }
            }
        }
        for (id, version) in &self.releases {
            text = text.replace(id, version);
        }
        self.relative(&text)
    }

    fn happen(&mut self, event: &str) -> String {
        let words: Vec<&str> = event.split_whitespace().collect();
        let now = self.host.now;
        match words[..] {
            ["want", version, ref options @ ..] => {
                for option in options {
                    match *option {
                        "socket" => self.kind = "socket",
                        "port" => self.kind = "port",
                        "worker" => self.kind = "worker",
                        "stop-first" => self.order = "stop-first",
                        "start-first" => self.order = "start-first",
                        count => self.replicas = count.trim_start_matches('x').parse().expect("a number such as x2"),
                    }
                }
                self.backoffs.clear();
                self.desired = DesiredApp::Run(self.target(version));
            }
            ["absent"] => self.desired = DesiredApp::Absent("the store has no such app".into()),
            ["unknown"] => self.desired = DesiredApp::Unknown("the store has not been read".into()),
            ["paused"] => self.desired = DesiredApp::Paused("by hand".into()),
            ["invalid"] => {
                let last_good = self.desired.target().cloned();
                let problems = Problem::new("spec", "this is not YAML").into();
                self.desired = DesiredApp::Invalid { problems, last_good };
            }
            ["step"] if self.plan().step.is_none() => return "  there is no step\n".to_owned(),
            ["step"] => self.succeed(),
            ["fails"] => {
                let kind = self.plan().step.expect("there is a step to fail").step.kind();
                self.back_off(kind, "no space left on device");
            }
            ["turn", kind] => {
                self.host.turn = match kind {
                    "held" => Turn::Held("it is the turn of other hosts".into()),
                    "try" => Turn::Try,
                    "switch" => Turn::Switch { monitor: Duration::from_secs(10), confirmed: true },
                    "lapsed" => Turn::Switch { monitor: Duration::from_secs(10), confirmed: false },
                    "free" => Turn::Free,
                    other => panic!("`{other}` is no turn"),
                };
            }
            ["nginx"] => self.serve(),
            ["steps"] => return self.run(),
            ["healthy", name] => self.instance(name).health = Health::Healthy,
            ["starting", name] => self.instance(name).health = Health::Starting("connection refused".into()),
            ["unhealthy", name] => {
                self.instance(name).health = Health::Unhealthy { since: now, answer: "status 503".into() };
            }
            ["exits", name, code] => self.instance(name).phase = Phase::Exited(code.parse().expect("a code")),
            ["vanishes", name] => {
                let id = self.instance(name).id.clone();
                self.host.observed.instances.retain(|i| i.id != id);
            }
            ["connections", name, count] => {
                self.instance(name).connections = Some(count.parse().expect("a number"));
            }
            ["wait", seconds] => {
                self.host.now = now.plus(Duration::from_secs(seconds.parse().expect("a number")));
            }
            ["restart"] => {
                self.backoffs.clear();
                for instance in &mut self.host.observed.instances {
                    (instance.health, instance.connections) = (Health::Unknown, None);
                }
            }
            _ => panic!("`{event}` is no event of a scenario"),
        }
        String::new()
    }
}

/// Plays the events of a file, and returns it with the plans of today.
fn replayed(text: &str) -> String {
    let mut scenario = Scenario::new();
    let mut out = String::new();
    for line in text.lines() {
        if let Some(event) = line.strip_prefix("> ") {
            let _ = writeln!(out, "> {event}");
            let performed = scenario.happen(event);
            out.push_str(&performed);
            out.push_str(&scenario.printed());
        } else if line.starts_with('#') || line.is_empty() {
            let _ = writeln!(out, "{line}");
        }
    }
    out
}

#[test]
fn plans_are_those_of_the_scenarios() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/scenarios");
    let mut files: Vec<_> = fs::read_dir(&dir).expect("scenarios").map(|entry| entry.expect("a file").path()).collect();
    files.sort();
    assert!(files.len() >= 25, "{} scenarios", files.len());
    for file in files {
        let text = fs::read_to_string(&file).expect("a scenario");
        expect_test::expect_file![file].assert_eq(&replayed(&text));
    }
}
