//! A rollout over many hosts on one real etcd. Each agent has the real store side: its watches, its lease, its published
//! status, its turn and its part in elections. What a host does with containers is simulated, and takes no time of a core.
#![allow(clippy::disallowed_methods, reason = "a benchmark reads files of its own")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    sync::{Arc, Mutex},
    time::Duration,
};

use demae::{
    fleet::turn::{Directive, HostFacts, directive, next_write},
    metrics::Metrics,
    model::{
        desired::{DesiredApp, HostMode, Target},
        fleet::{Leader, TransactionKind, Turn},
        name::{AppName, HostName, ReleaseId},
        status::{AppStatus, HostStatus, State, StoreStatus, VERSION},
        time::Timestamp,
    },
    rollout::{self, LeaderOutlets, Link, Request},
    store::{
        Brake, Claim, DesiredCache, Edit, EtcdCluster, FleetSession, Publishing, SharedFence, Sources, StateStore,
        Update, Viewer,
        client::EtcdConfig,
        keep_lease,
        keys::{Key, Prefix},
        publish, watch,
    },
};
use tokio::{
    runtime::Runtime,
    sync::watch::{Receiver, Sender, channel},
    task::JoinHandle,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::support::{etcd::Etcd, names::free_address};

/// How long the simulated start of an instance takes.
const START: Duration = Duration::from_millis(50);
/// A record of a switch counts for so long, as in the agent.
const CONFIRMED: Duration = Duration::from_secs(5);

/// The figures of one release.
#[derive(Debug, Clone)]
pub struct Rolled {
    /// How many hosts at a time, as in the spec.
    pub parallelism: String,
    /// From the put until the rollout was done.
    pub took: Duration,
    /// Revisions of etcd for each host: turns, proofs, statuses and fences.
    pub writes_per_turn: f64,
    /// CPU time of etcd for each host.
    pub cpu_per_turn: Duration,
    /// From the put until an agent had read it: the slowest of 100.
    pub reaction_p99: Duration,
}

/// The figures of a run.
#[derive(Debug)]
pub struct Outcome {
    pub hosts: usize,
    pub rolled: Vec<Rolled>,
    /// From the end of the leader's agent, in a rollout, until another one leads.
    pub failover: Duration,
    /// Requests that moved without a leader: turns that were begun before it ended.
    pub moved_meanwhile: usize,
    /// Resident memory of etcd in the end, in MiB.
    pub etcd_mib: u64,
    /// Size of its database, in MiB.
    pub database_mib: u64,
    /// The largest number of hosts that had requests on a release which they had not proven.
    pub unproven: usize,
}

/// What all agents share with the benchmark.
#[derive(Debug, Default)]
struct Board {
    /// When each agent first read each release.
    read: Mutex<BTreeMap<ReleaseId, Vec<Instant>>>,
    /// Hosts with requests on a release that they have not proven, and the most there ever were.
    unproven: Mutex<(BTreeSet<HostName>, usize)>,
    /// Moves of requests so far.
    moves: Mutex<usize>,
}

/// The state directory, in memory.
#[derive(Default)]
struct Disk(Mutex<Option<Vec<u8>>>);

impl StateStore for Disk {
    fn ledger(&self) -> Result<Option<Vec<u8>>, String> {
        Ok(self.0.lock().expect("a lock").clone())
    }

    fn write_ledger(&self, text: &[u8]) -> Result<(), String> {
        *self.0.lock().expect("a lock") = Some(text.to_vec());
        Ok(())
    }

    fn head(&self) -> Option<Vec<u8>> {
        None
    }

    fn write_head(&self, _: &[u8]) {}

    fn acceptance(&self) -> Option<Vec<u8>> {
        None
    }

    fn clear_acceptance(&self) {}
}

/// A simulated host.
struct Host {
    name: HostName,
    app: AppName,
    board: Arc<Board>,
    proven: Option<ReleaseId>,
    routed: Option<ReleaseId>,
    /// The candidate, and since when it runs.
    started: Option<(ReleaseId, Instant)>,
    /// Since when requests are on the release that is not proven.
    moved: Option<Instant>,
    confirmed: Option<Instant>,
    writing: Option<Instant>,
    write_after: Instant,
    seen: Option<ReleaseId>,
}

impl Host {
    async fn run(
        mut self,
        mut updates: Receiver<Update>,
        mut link: Link,
        statuses: Sender<(HostStatus, BTreeMap<String, String>)>,
    ) {
        loop {
            let target = target(&updates, &self.app);
            let wake = match &target {
                Some(target) => self.act(target, &link),
                None => None,
            };
            self.publish(target.as_ref(), &statuses);
            let wake = wake.unwrap_or_else(|| Instant::now() + Duration::from_secs(60));
            tokio::select! {
                changed = updates.changed() => if changed.is_err() { return },
                changed = link.rollouts.changed() => if changed.is_err() { return },
                answer = link.answers.recv() => {
                    let Some(answer) = answer else { return };
                    let sent = self.writing.take();
                    match answer.made {
                        Some(true) if answer.kind == TransactionKind::Commit => self.confirmed = sent,
                        Some(true) => {}
                        _ => self.write_after = Instant::now() + Duration::from_millis(200),
                    }
                }
                () = tokio::time::sleep_until(wake) => {}
            }
        }
    }

    /// One round. Returns when the next one is due.
    fn act(&mut self, target: &Target, link: &Link) -> Option<Instant> {
        let wanted = &target.release.id;
        if self.seen.as_ref() != Some(wanted) {
            self.seen = Some(wanted.clone());
            self.board.read.lock().expect("a lock").entry(wanted.clone()).or_default().push(Instant::now());
        }
        let records = link.rollouts.borrow().as_ref()?.records.get(&self.app).cloned().unwrap_or_default();
        let now = Instant::now();
        let mut wake = None;
        let directive = self.with_facts(target, |facts| directive(facts, &records));
        let mut is_ready = false;
        match directive {
            Directive::Wanted(Turn::Free) => self.take(wanted, true),
            Directive::Wanted(Turn::Try | Turn::Switch { confirmed: false, .. }) => {
                let began = match &self.started {
                    Some((release, began)) if release == wanted => *began,
                    _ => now,
                };
                self.started = Some((wanted.clone(), began));
                is_ready = now >= began + START;
                wake = Some(began + START);
            }
            Directive::Wanted(Turn::Switch { confirmed: true, monitor }) => {
                if self.routed.as_ref() != Some(wanted) {
                    self.take(wanted, false);
                    self.moved = Some(now);
                }
                let due = self.moved.unwrap_or(now) + monitor;
                if now >= due {
                    self.take(wanted, true);
                } else {
                    wake = Some(due);
                }
            }
            Directive::Wanted(Turn::Held(_)) | Directive::Kept(..) | Directive::Pinned(_) => {}
        }
        if self.writing.is_none() {
            let write = self.with_facts(target, |facts| next_write(facts, &records, is_ready, Timestamp::now()));
            if let Some(transaction) = write {
                if now < self.write_after {
                    return Some(self.write_after);
                }
                self.writing = Some(now);
                link.requests.send(Request { app: self.app.clone(), transaction }).expect("the other end is there");
            }
        }
        wake.filter(|at| *at > now)
    }

    /// Requests go to a release.
    fn take(&mut self, release: &ReleaseId, proven: bool) {
        if self.routed.as_ref() != Some(release) {
            *self.board.moves.lock().expect("a lock") += 1;
        }
        let had = self.proven.is_some();
        self.routed = Some(release.clone());
        let mut unproven = self.board.unproven.lock().expect("a lock");
        if proven {
            self.proven = Some(release.clone());
            self.moved = None;
            unproven.0.remove(&self.name);
        } else if had {
            unproven.0.insert(self.name.clone());
            unproven.1 = unproven.1.max(unproven.0.len());
        }
    }

    fn with_facts<T>(&self, target: &Target, ask: impl FnOnce(&HostFacts<'_>) -> T) -> T {
        let routed = self.routed.iter().cloned().collect();
        ask(&HostFacts {
            app: &self.app,
            host: &self.name,
            wanted: Some(&target.release.id),
            retried: 0,
            pulled: None,
            has_command: false,
            command_end: None,
            command_trouble: None,
            run: "",
            update: &target.update,
            detection: Duration::ZERO,
            proven: self.proven.as_ref(),
            routed: &routed,
            serving: self.routed.as_ref(),
            verdicts: &[],
            confirmed: self.confirmed.is_some_and(|at| at.elapsed() < CONFIRMED),
        })
    }

    fn publish(&self, target: Option<&Target>, statuses: &Sender<(HostStatus, BTreeMap<String, String>)>) {
        let wanted = target.map(|target| target.release.id.to_string());
        let serving = self.routed.as_ref().map(ToString::to_string);
        let is_there = self.proven.as_ref().map(ToString::to_string) == wanted;
        let is_trying = self.started.as_ref().is_some_and(|(release, _)| Some(release.to_string()) == wanted);
        let reason = match (is_there, self.moved, is_trying) {
            (true, ..) => "",
            (false, Some(_), _) => "waiting until it has served for long enough",
            (false, None, true) => "waiting until its record says that it switches",
            (false, None, false) => "waiting for the turn of this host",
        };
        let app = AppStatus {
            spec_revision: 0,
            app: self.app.to_string(),
            host: self.name.clone(),
            state: if is_there { State::Converged } else { State::Converging },
            release: wanted.clone(),
            serving: serving.filter(|serving| Some(serving) != wanted.as_ref()),
            digest: None,
            image: target.map(|target| target.release.image.to_string()),
            wanted: 1,
            healthy: u16::from(self.routed.is_some()),
            since: Timestamp::default(),
            reason: reason.to_owned(),
            kinds: Vec::new(),
            verdict: None,
            timeline: Vec::new(),
        };
        statuses.send_if_modified(|(status, _)| {
            let apps = vec![app];
            let changed = status.apps != apps;
            status.apps = apps;
            changed
        });
    }
}

fn target(updates: &Receiver<Update>, app: &AppName) -> Option<Target> {
    match updates.borrow().snapshot.as_ref()?.apps.get(app)? {
        DesiredApp::Run(target) => Some(target.clone()),
        _ => None,
    }
}

/// An agent: its tasks, which end at once when it is killed.
struct Agent(Vec<JoinHandle<()>>);

impl Agent {
    fn start(
        runtime: &Runtime,
        config: &EtcdConfig,
        name: &HostName,
        metrics: &Arc<Metrics>,
        board: &Arc<Board>,
    ) -> Self {
        let app = AppName::try_from("web").expect("a name");
        let claim = Arc::new(Claim::new(name.clone(), format!("{name}-id")).expect("random bits"));
        let run = claim.owner().run.clone();
        let (updates, updates_in) = channel(Update::default());
        let (leases, leases_in) = channel(None);
        let status = HostStatus {
            version: VERSION,
            host: name.clone(),
            mode: HostMode::Active,
            agent: String::new(),
            store: StoreStatus::default(),
            proxy: None,
            tcp_routes: None,
            apps: Vec::new(),
            unreadable: Vec::new(),
        };
        let (statuses, statuses_in) = channel((status, BTreeMap::new()));
        let viewer = Viewer {
            host: name.clone(),
            labels: BTreeMap::new(),
            resync: Duration::from_secs(60),
            brake: Brake::default(),
            traces: BTreeSet::new(),
        };
        let token = CancellationToken::new();
        let fence = Arc::new(SharedFence::default());
        let cache = DesiredCache::new(config.prefix.clone(), viewer, Arc::new(Disk::default()), fence.clone(), updates);
        let (link, ends) = Link::new(run.clone(), true);
        let host = Host {
            name: name.clone(),
            app,
            board: board.clone(),
            proven: None,
            routed: None,
            started: None,
            moved: None,
            confirmed: None,
            writing: None,
            write_after: Instant::now(),
            seen: None,
        };
        let sources = Sources {
            statuses: statuses_in,
            leases: leases_in.clone(),
            updates: updates_in.clone(),
            fence,
            takes_turns: link.takes_turns.clone(),
            capacity: None,
        };
        let outlets = LeaderOutlets { metrics: metrics.clone(), gauges: channel(None).0 };
        let (c, u) = (config.clone(), updates_in.clone());
        Self(vec![
            runtime.spawn(watch(EtcdCluster::new(c.clone(), claim.clone()), cache, token.clone())),
            runtime.spawn(keep_lease(c.clone(), u.clone(), leases, token.clone())),
            runtime.spawn(publish(c.clone(), claim, sources, Arc::new(Publishing::default()), token.clone())),
            runtime.spawn(rollout::follow(
                c.clone(),
                name.clone(),
                u.clone(),
                leases_in,
                ends,
                metrics.clone(),
                token.clone(),
            )),
            runtime.spawn(rollout::lead(c, name.clone(), run, u.clone(), outlets, token)),
            runtime.spawn(host.run(u, link, statuses)),
        ])
    }

    fn kill(&self) {
        self.0.iter().for_each(JoinHandle::abort);
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The fleet.
struct Fleet {
    runtime: Runtime,
    etcd: Etcd,
    session: FleetSession,
    agents: BTreeMap<HostName, Agent>,
    board: Arc<Board>,
    app: AppName,
    _dir: tempfile::TempDir,
}

impl Fleet {
    fn start(hosts: usize) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let (at, peer) = (free_address(), free_address());
        let etcd = Etcd::start(dir.path(), "fleet", at, &[("fleet", peer)], &["--max-txn-ops", "128"]);
        let config = EtcdConfig {
            endpoints: vec![at.to_string()],
            user: None,
            cacert: None,
            cert: None,
            dial_timeout: Duration::from_secs(5),
            command_timeout: Duration::from_secs(10),
            resync: Duration::from_secs(60),
            prefix: Prefix::new("/demae").expect("a prefix"),
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
        let session = runtime.block_on(async {
            loop {
                match FleetSession::open(&config, 0).await {
                    Ok(session) if session.release_key().await.is_ok() => return session,
                    _ => tokio::time::sleep(Duration::from_millis(50)).await,
                }
            }
        });
        let metrics = Arc::new(Metrics::new().expect("metrics"));
        let board = Arc::new(Board::default());
        let agents = (0..hosts)
            .map(|n| {
                let name = HostName::try_from(format!("host{n:04}")).expect("a name");
                let agent = Agent::start(&runtime, &config, &name, &metrics, &board);
                (name, agent)
            })
            .collect();
        let app = AppName::try_from("web").expect("a name");
        Self { runtime, etcd, session, agents, board, app, _dir: dir }
    }

    fn put(&self, puts: Vec<(Key, Vec<u8>)>) -> i64 {
        let edit = Edit { puts, ..Edit::default() };
        self.runtime.block_on(self.session.edit(&edit)).expect("etcd answers").expect("it has no condition")
    }

    fn wait(&self, what: &str, within: Duration, is_so: impl Fn() -> bool) -> Duration {
        let began = Instant::now();
        while !is_so() {
            assert!(began.elapsed() < within, "not within {within:?}: {what}");
            std::thread::sleep(Duration::from_millis(20));
        }
        began.elapsed()
    }

    fn leader(&self) -> Option<Leader> {
        let text =
            self.runtime.block_on(self.session.get(&demae::model::fleet::FleetKey::Leader)).expect("etcd answers");
        serde_json::from_slice(&text?).ok()
    }

    fn rollout(&self) -> Option<demae::model::fleet::Rollout> {
        let key = demae::model::fleet::FleetKey::Rollout(self.app.clone());
        serde_json::from_slice(&self.runtime.block_on(self.session.get(&key)).expect("etcd answers")?).ok()
    }

    fn is_done(&self, image: &str, since: &Option<ReleaseId>) -> bool {
        let done = self.rollout().filter(|r| r.phase == demae::model::fleet::RolloutPhase::Done);
        done.is_some_and(|r| Some(&r.release) != since.as_ref()) && !image.is_empty()
    }

    /// The spec, in which a change of `parallelism` makes no release.
    fn spec(&self, parallelism: &str) -> (Key, Vec<u8>) {
        let text =
            format!("image: web:v0\ndeploy: {{update_config: {{parallelism: {parallelism}, monitor: 100ms}}}}\n");
        (Key::Spec(self.app.clone()), text.into_bytes())
    }

    fn image(&self, image: &str) -> (Key, Vec<u8>) {
        (Key::Image(self.app.clone()), image.as_bytes().to_vec())
    }

    /// Rolls a release over all hosts.
    fn roll(&self, image: &str, parallelism: &str) -> Rolled {
        let before = self.rollout().map(|rollout| rollout.release);
        self.put(vec![self.spec(parallelism)]);
        // What follows from the spec alone is written before it is measured.
        std::thread::sleep(Duration::from_secs(2));
        let (cpu, began) = (cpu_time(self.etcd.pid()), Instant::now());
        let revision = self.put(vec![self.image(image)]);
        let took = self.wait("the rollout is done", Duration::from_secs(900), || self.is_done(image, &before));
        // The last statuses are gathered for half a second.
        std::thread::sleep(Duration::from_millis(1500));
        let ended = self.runtime.block_on(self.session.read(&[])).expect("etcd answers").revision;
        let hosts = f64::from(u32::try_from(self.agents.len()).expect("few"));
        let release = self.rollout().expect("a rollout").release;
        let read = self.board.read.lock().expect("a lock");
        let mut reactions: Vec<Duration> = read[&release].iter().map(|at| at.duration_since(began)).collect();
        reactions.sort();
        #[expect(clippy::cast_precision_loss, reason = "a small number")]
        let writes = (ended - revision) as f64;
        Rolled {
            parallelism: parallelism.to_owned(),
            took,
            writes_per_turn: writes / hosts,
            cpu_per_turn: (cpu_time(self.etcd.pid()) - cpu).div_f64(hosts),
            reaction_p99: reactions[(reactions.len() * 99).div_ceil(100) - 1],
        }
    }
}

/// Rolls a release over so many hosts at 25 % and at one at a time, and ends the leader in a third one.
pub fn measure(hosts: usize) -> Outcome {
    let mut fleet = Fleet::start(hosts);
    let long = Duration::from_secs(300);
    fleet.wait("the release key is there", long, || {
        fleet.runtime.block_on(fleet.session.release_key()).is_ok_and(|key| key.is_some())
    });
    fleet.wait("an agent leads", long, || fleet.leader().is_some());
    fleet.put(vec![fleet.spec("0")]);
    fleet.wait("the first release is done", long, || fleet.is_done("web:v0", &None));
    let rolled = vec![fleet.roll("web:v1", "25%"), fleet.roll("web:v2", "1")];
    let unproven = fleet.board.unproven.lock().expect("a lock").1;

    let before = fleet.rollout().map(|rollout| rollout.release);
    fleet.put(vec![fleet.image("web:v3")]);
    fleet.wait("the third one is under way", long, || fleet.rollout().map(|r| r.release) != before);
    let leader = fleet.leader().expect("a leader");
    let killed = fleet.agents.remove(&leader.host).expect("it is one of them");
    killed.kill();
    // A turn that has begun goes on without a leader.
    std::thread::sleep(Duration::from_secs(2));
    let moves = *fleet.board.moves.lock().expect("a lock");
    let failover = Duration::from_secs(2)
        + fleet.wait("another agent leads", long, || fleet.leader().is_some_and(|next| next.run != leader.run));
    let moved_meanwhile = *fleet.board.moves.lock().expect("a lock") - moves;
    let image = "web:v3";
    fleet.wait("the third one is done", Duration::from_secs(900), || fleet.is_done(image, &before));
    let (etcd_mib, database_mib) = (resident(fleet.etcd.pid()), database(fleet._dir.path()));
    Outcome { hosts, rolled, failover, moved_meanwhile, etcd_mib, database_mib, unproven }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} agents on one etcd; `monitor: 100ms`, instances start in {START:?}", self.hosts)?;
        writeln!(
            f,
            "{:>14} {:>10} {:>16} {:>18} {:>16}",
            "parallelism", "done", "writes per turn", "etcd CPU per turn", "p99 to read it"
        )?;
        for rolled in &self.rolled {
            writeln!(
                f,
                "{:>14} {:>8.1} s {:>16.2} {:>15.2} ms {:>13} ms",
                rolled.parallelism,
                rolled.took.as_secs_f64(),
                rolled.writes_per_turn,
                rolled.cpu_per_turn.as_secs_f64() * 1000.0,
                rolled.reaction_p99.as_millis()
            )?;
        }
        writeln!(
            f,
            "another leader after {:.1} s; moves of requests meanwhile: {}",
            self.failover.as_secs_f64(),
            self.moved_meanwhile
        )?;
        write!(
            f,
            "etcd: {} MiB resident, {} MiB on disk; at most {} hosts on an unproven release",
            self.etcd_mib, self.database_mib, self.unproven
        )
    }
}

/// CPU time of a process. `/proc/<pid>/stat` counts in hundredths of a second.
fn cpu_time(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
    let fields: Vec<&str> = stat.rsplit_once(')').expect("a name").1.split_whitespace().collect();
    let ticks: u64 = [11, 12].iter().map(|n| fields[*n].parse::<u64>().expect("a number")).sum();
    Duration::from_millis(ticks * 10)
}

/// Resident memory of a process, in MiB.
fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line");
    line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).expect("a number") / 1024
}

fn database(dir: &std::path::Path) -> u64 {
    let file = dir.join("fleet/member/snap/db");
    fs::metadata(file).map_or(0, |file| file.len() / 1024 / 1024)
}
