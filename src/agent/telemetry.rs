//! Metrics, events and spans of one app: durations of changes, repaired drift, blocks.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;
use tracing::Span;

use crate::{
    events::Events,
    metrics::{AppSeries, ChangeOutcome, Drift, Metrics},
    model::{
        change::Change,
        desired::{DesiredApp, Target},
        event::What,
        name::{AppName, ContainerId, ReleaseId},
        observed::{Instance, ObservedApp, Phase},
        status::Moment,
        time::Timestamp,
    },
    plan::{
        AppPlan,
        step::{Handle, Step, StepKind, TIME_IS_OVER},
        wait::{Block, Wait},
    },
};

/// Most moments of one change that are kept.
const MAX_MOMENTS: usize = 64;

/// Telemetry of one app.
pub(super) struct AppTelemetry {
    app: AppName,
    pub(super) series: Arc<AppSeries>,
    change: Option<Pending>,
    timeline: Vec<Moment>,
    drains: BTreeMap<ContainerId, Draining>,
    unconverged: Option<Timestamp>,
    /// Drift repaired since the app converged; `None` while a change is in progress.
    repaired: Option<BTreeSet<Drift>>,
    blocks: BTreeMap<&'static str, String>,
}

/// A change that has not converged yet.
struct Pending {
    seen: Instant,
    kind: Change,
    deploy: Span,
    /// Whether the release has answered through nginx; only the old one is left to retire.
    answered: bool,
    healthy: bool,
    /// Waits of the deploy between two steps, health or drain.
    waits: BTreeMap<&'static str, (Instant, Span)>,
}

impl Pending {
    fn new(app: &AppName, kind: Change, release: Option<&ReleaseId>, seen: Instant) -> Self {
        let deploy = deploy_span(app, kind, release);
        Self { seen, kind, deploy, answered: false, healthy: false, waits: BTreeMap::new() }
    }
}

/// An instance that is draining.
struct Draining {
    began: Instant,
    /// Time until its stop was due, and the number of connections cut by it, if any.
    ended: Option<(Duration, Option<usize>)>,
}

impl AppTelemetry {
    pub(super) fn new(app: AppName) -> Self {
        Self {
            series: Arc::new(AppSeries::new(app.clone())),
            app,
            change: None,
            timeline: Vec::new(),
            drains: BTreeMap::new(),
            unconverged: None,
            repaired: None,
            blocks: BTreeMap::new(),
        }
    }

    pub(super) fn timeline(&self) -> &[Moment] {
        &self.timeline
    }

    pub(super) fn unconverged(&self) -> Option<Timestamp> {
        self.unconverged
    }

    /// The desired state changed. `seen` is when the change arrived from the store, if its latency is measured.
    pub(super) fn desired_changed(
        &mut self,
        before: &DesiredApp,
        after: &DesiredApp,
        release: Option<&ReleaseId>,
        seen: Option<Instant>,
        now: Timestamp,
    ) {
        let kind = Change::between(before, after);
        self.unconverged.get_or_insert(now);
        self.repaired = None;
        if let Some(before) = &self.change {
            before.deploy.record("outcome", "superseded");
        }
        // What a rollout decides meanwhile is no other change.
        if let (Some(before), true) = (&self.change, seen.is_some()) {
            self.series.ended(before.kind, ChangeOutcome::Superseded);
        }
        match (self.change.take(), seen) {
            // A change that is superseded before it answered is measured from the first one: that is how long the user
            // waits.
            (Some(before), _) if !before.answered => {
                let kind = if before.kind == kind { kind } else { Change::Other };
                self.change = Some(Pending::new(&self.app, kind, release, before.seen));
            }
            (_, Some(seen)) => {
                self.timeline.clear();
                self.change = Some(Pending::new(&self.app, kind, release, seen));
            }
            (_, None) => self.timeline.clear(),
        }
        self.moment("seen");
    }

    /// The span of a step of this app.
    pub(super) fn span(&self, kind: StepKind) -> Span {
        match &self.change {
            Some(pending) => step_span(&pending.deploy, kind),
            None => Span::none(),
        }
    }

    /// Records an observation. Returns how many instances in service crashed or became unhealthy.
    pub(super) fn observed(
        &mut self,
        before: Option<&ObservedApp>,
        after: &ObservedApp,
        target: Option<&Target>,
    ) -> u64 {
        let Some(before) = before else { return 0 };
        let mut incidents = 0;
        for instance in after.instances.iter().filter(|i| i.settled) {
            let Some(known) = before.instances.iter().find(|i| i.id == instance.id && i.settled) else { continue };
            let restarts = u64::from(instance.restarts.saturating_sub(known.restarts));
            // A start by an operator or this agent is not one of Docker's restarts, and resets Docker's count.
            let is_counted = known.phase == Phase::Restarting;
            let started = u64::from(instance.started != known.started && instance.is_alive() && !is_counted);
            self.series.restarted(restarts.max(started));
            incidents += restarts.max(started);
            if known.health.is_healthy() && instance.health.is_unhealthy() {
                incidents += 1;
                self.series.flapped();
            }
        }
        self.note_health(after, target);
        incidents
    }

    /// Records when all instances of the wanted release are healthy for the first time.
    pub(super) fn note_health(&mut self, after: &ObservedApp, target: Option<&Target>) {
        let (Some(target), Some(pending)) = (target, &mut self.change) else { return };
        let is_healthy = |i: &&Instance| i.key.release == target.release.id && i.is_running() && i.health.is_healthy();
        let healthy = after.instances.iter().filter(is_healthy).count() >= usize::from(target.replicas);
        if healthy && !std::mem::replace(&mut pending.healthy, healthy) {
            self.moment("healthy");
            self.end_wait("health", "all instances are healthy");
        }
    }

    /// The app could not be observed.
    pub(super) fn observe_failed(&mut self, now: Timestamp) {
        self.unconverged.get_or_insert(now);
    }

    /// A plan was made for the current desired state.
    pub(super) fn planned(&mut self, plan: &AppPlan, observed: &ObservedApp, sinks: &Sinks<'_>, now: Timestamp) {
        self.note_drains(plan, observed);
        self.note_blocks(&plan.blocks, sinks.events);
        let held_back = |b: &Block| matches!(b, Block::Paused(_) | Block::Cordoned);
        if plan.is_converged() {
            self.unconverged = None;
            self.count_repairs(sinks.metrics);
            self.converge(sinks.release, sinks.events);
        } else if plan.blocks.iter().any(held_back) {
            // An operator holds it back on purpose.
            self.unconverged = None;
        } else {
            self.unconverged.get_or_insert(now);
        }
        // From here on only an operator can go on, and that time is not measured.
        let ends = |b: &&Block| held_back(b) || matches!(b, Block::Halted(_) | Block::Invalid(_));
        if let Some(block) = plan.blocks.iter().find(ends)
            && let Some(pending) = self.change.take()
        {
            let failed = matches!(block, Block::Halted(_));
            self.series.ended(pending.kind, if failed { ChangeOutcome::Failed } else { ChangeOutcome::Held });
            pending.deploy.record("outcome", block.kind());
            pending.deploy.record("took_ms", millis(pending.seen.elapsed()));
            pending.deploy.in_scope(|| tracing::warn!(app = %self.app, "the deploy ends here: {block}"));
        }
    }

    fn converge(&mut self, release: Option<&ReleaseId>, events: &Events) {
        let Some(pending) = self.change.take() else { return };
        let took = pending.seen.elapsed();
        self.timeline.push(Moment { what: "converged".into(), ms: millis(took) });
        self.series.converged(pending.kind, took);
        self.series.ended(pending.kind, ChangeOutcome::Converged);
        let moments: Vec<String> = self.timeline.iter().map(|m| format!("{} {}", m.what, m.ms)).collect();
        let message = format!("converged ({})", moments.join(", "));
        pending.deploy.record("outcome", "converged");
        pending.deploy.record("took_ms", millis(took));
        pending.deploy.in_scope(|| tracing::info!(app = %self.app, took_ms = millis(took), "{message}"));
        let what = What::Converged {
            change: pending.kind.as_str().to_owned(),
            release: release.map(ToString::to_string),
            took_ms: millis(took),
        };
        events.emit(Some(&self.app), what, message);
    }

    fn note_blocks(&mut self, blocks: &[Block], events: &Events) {
        let now: BTreeMap<&'static str, String> = blocks.iter().map(|b| (b.kind(), b.to_string())).collect();
        for (kind, why) in now.iter().filter(|(kind, why)| self.blocks.get(*kind) != Some(why)) {
            let remedy = blocks.iter().find(|b| b.kind() == *kind).map(|b| b.remedy(&self.app)).unwrap_or_default();
            let span = self.change.as_ref().map_or_else(Span::none, |pending| pending.deploy.clone());
            span.in_scope(|| tracing::warn!(app = %self.app, block = kind, "blocked: {why}"));
            events.emit(Some(&self.app), What::Block { kind: (*kind).to_owned(), remedy }, why.clone());
        }
        for kind in self.blocks.keys().filter(|kind| !now.contains_key(*kind)) {
            events.emit(Some(&self.app), What::Unblock { kind: (*kind).to_owned() }, format!("resolved: {kind}"));
        }
        self.blocks = now;
    }

    /// A step succeeded.
    pub(super) fn step_succeeded(&mut self, step: &Step, sinks: &Sinks<'_>) {
        let kind = step.kind();
        self.note_repair(kind);
        let moment = match step {
            Step::Pull { .. } => "pulled",
            Step::Create { .. } => "created",
            Step::Start(_) => "started",
            Step::Switch(..) => "switched",
            Step::Prove { .. } => "proven",
            Step::Stop { .. } => "stopped",
            Step::Remove(_) => "removed",
            Step::RecordVerdict { .. } => "failed",
            Step::Discard { .. } => "discarded",
            Step::WriteEnvFile(_) | Step::ClearSocket(_) | Step::Settle(_) | Step::CleanUp(_) => return,
        };
        self.moment(moment);
        match step {
            Step::Start(_) => self.begin_wait("health"),
            // The route is a symlink, so nginx needed no reload.
            Step::Switch(_, slots) if !slots.is_empty() => sinks.metrics.reload_skipped(),
            Step::Prove { ingress: Some(_), .. } => {
                if let Some(pending) = &mut self.change
                    && !std::mem::replace(&mut pending.answered, true)
                {
                    self.series.answered(pending.kind, pending.seen.elapsed());
                }
            }
            Step::Stop { handle, .. } => self.count_drain(handle, sinks.metrics),
            Step::RecordVerdict { release, cause, exit_code, .. } => {
                self.end_wait("health", "it did not become healthy");
                let what = What::Verdict { release: release.id.to_string(), exit_code: *exit_code };
                sinks.events.emit(Some(&self.app), what, cause.clone());
            }
            _ => {}
        }
    }

    /// A step without a change in the store repairs drift.
    fn note_repair(&mut self, kind: StepKind) {
        let Some(repaired) = &mut self.repaired else { return };
        repaired.insert(match kind {
            StepKind::Create | StepKind::Start | StepKind::ClearSocket => Drift::Container,
            StepKind::Switch => Drift::Route,
            StepKind::WriteEnvFile => Drift::File,
            _ => return,
        });
    }

    /// The app converged again. Each kind counts once, however many steps it took.
    fn count_repairs(&mut self, metrics: &Metrics) {
        let repaired = self.repaired.replace(BTreeSet::new()).unwrap_or_default();
        let container = repaired.contains(&Drift::Container);
        // A replaced container brings its own route and files; those are no drift of their own.
        let own = |drift: &Drift| !(container && matches!(drift, Drift::Route | Drift::File));
        repaired.into_iter().filter(own).for_each(|drift| metrics.repaired(drift));
    }

    /// Starts and ends drains. An instance that was never in service has nothing to drain.
    fn note_drains(&mut self, plan: &AppPlan, observed: &ObservedApp) {
        self.drains.retain(|id, _| observed.instances.iter().any(|i| i.id == *id));
        for wait in &plan.waits {
            let Wait::Drain { key, .. } = wait else { continue };
            let Some(instance) = observed.instances.iter().find(|i| i.key == *key && i.settled) else { continue };
            self.drains.entry(instance.id.clone()).or_insert_with(|| Draining { began: Instant::now(), ended: None });
            self.begin_wait("drain");
        }
        let Some((planned, Step::Stop { handle, .. })) = plan.step.as_ref().map(|p| (p, &p.step)) else { return };
        let Some(instance) = observed.instances.iter().find(|i| i.id == handle.id && i.settled) else { return };
        let new = || Draining { began: Instant::now(), ended: None };
        let draining = self.drains.entry(instance.id.clone()).or_insert_with(new);
        // A failed stop is planned again; its drain ended before.
        if draining.ended.is_none() {
            let cut = (planned.reason == TIME_IS_OVER).then(|| instance.connections.unwrap_or(0));
            draining.ended = Some((draining.began.elapsed(), cut));
            self.moment("drained");
            // Without a connection to wait for it is a drain all the same.
            self.begin_wait("drain");
            self.end_wait("drain", if cut.is_some() { "its drain time is over" } else { "no connection is left" });
        }
    }

    /// The planned step expired before it started: an instance that was to be stopped is still draining.
    pub(super) fn step_not_started(&mut self) {
        let ended = self.drains.values_mut().filter_map(|d| d.ended.take()).count();
        if ended > 0 && self.timeline.last().is_some_and(|m| m.what == "drained") {
            self.timeline.pop();
        }
    }

    fn count_drain(&mut self, handle: &Handle, metrics: &Metrics) {
        if let Some((took, cut)) = self.drains.remove(&handle.id).and_then(|d| d.ended) {
            metrics.drained(cut, took);
        }
    }

    fn moment(&mut self, what: &str) {
        if let Some(pending) = &self.change
            && self.timeline.len() < MAX_MOMENTS
        {
            self.timeline.push(Moment { what: what.to_owned(), ms: millis(pending.seen.elapsed()) });
        }
    }

    fn begin_wait(&mut self, what: &'static str) {
        if let Some(pending) = &mut self.change {
            let parent = &pending.deploy;
            let span = || match what {
                "health" => tracing::info_span!(parent: parent, "health"),
                _ => tracing::info_span!(parent: parent, "drain"),
            };
            pending.waits.entry(what).or_insert_with(|| (Instant::now(), span()));
        }
    }

    fn end_wait(&mut self, what: &'static str, end: &'static str) {
        if let Some(pending) = &mut self.change
            && let Some((began, span)) = pending.waits.remove(what)
        {
            span.in_scope(|| tracing::info!(app = %self.app, took_ms = millis(began.elapsed()), "{end}"));
        }
    }
}

/// Where telemetry of an app goes.
pub(super) struct Sinks<'a> {
    pub(super) metrics: &'a Metrics,
    pub(super) events: &'a Events,
    /// The wanted release.
    pub(super) release: Option<&'a ReleaseId>,
}

/// The root span of one deploy.
fn deploy_span(app: &AppName, change: Change, release: Option<&ReleaseId>) -> Span {
    let release = release.map_or("", ReleaseId::as_str);
    let empty = tracing::field::Empty;
    tracing::info_span!(parent: None, "deploy", %app, change = change.as_str(), release, outcome = empty, took_ms = empty)
}

/// The span of one step. Span names are fixed at compile time, so each kind has its own line.
fn step_span(deploy: &Span, kind: StepKind) -> Span {
    macro_rules! named {
        ($($variant:ident => $name:literal),* $(,)?) => {
            match kind { $(StepKind::$variant => tracing::info_span!(parent: deploy, $name)),* }
        };
    }
    named! {
        Pull => "pull",
        WriteEnvFile => "write_env_file",
        Create => "create",
        Start => "start",
        ClearSocket => "clear_socket",
        Switch => "switch",
        Prove => "prove",
        Settle => "settle",
        Stop => "stop",
        Remove => "remove",
        Discard => "discard",
        RecordVerdict => "record_verdict",
        CleanUp => "clean_up",
    }
}

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
