//! The instances of the wanted release, classified.

use std::{collections::BTreeMap, time::Duration};

use super::{
    AppInput,
    step::{Handle, Step},
    wait::within,
};
use crate::model::{
    desired::Target,
    name::ReleaseId,
    observed::{Address, Health, Instance, InstanceKey, ObservedApp, Phase, Verdict},
    proxy::Upstreams,
};

/// Minimum time that an unhealthy instance in service gets to recover before it is replaced.
const MIN_RECOVERY_TIME: Duration = Duration::from_secs(5);

/// The instances of the wanted release, classified.
pub(super) struct Group<'a> {
    /// All of them.
    pub(super) all: Vec<&'a Instance>,
    /// The best instances by state, at most as many as are wanted, by number.
    pub(super) selected: Vec<&'a Instance>,
    /// Instances that failed without a verdict on the release, and are to be replaced.
    pub(super) failed_candidates: Vec<&'a Instance>,
    /// Whether an instance in service has been unhealthy for so long that it is replaced.
    pub(super) replaces_unhealthy: bool,
}

impl<'a> Group<'a> {
    pub(super) fn of(input: &AppInput<'a>, target: &Target, proven: bool) -> Self {
        let all: Vec<&Instance> =
            input.observed.instances.iter().filter(|i| i.key.release == target.release.id).collect();
        let failed_candidates: Vec<&Instance> = all
            .iter()
            .copied()
            .filter(|i| !is_established(input, i) || stopped_for_good(i) || i.port_taken)
            .filter(|i| {
                i.port_taken
                    || was_killed(i)
                    || proven && (missed_deadline(i, input) || matches!(i.phase, Phase::Exited(_)))
            })
            .collect();
        let unhealthy_too_long = |i: &Instance| match &i.health {
            Health::Unhealthy { since, .. } => {
                proven && is_established(input, i) && input.now >= since.plus(recovery_time(i))
            }
            _ => false,
        };
        let mut selected: Vec<&Instance> = all
            .iter()
            .copied()
            .filter(|i| i.phase != Phase::Removing && !input.is_stopping(i))
            .filter(|i| !failed_candidates.iter().any(|s| s.id == i.id) && !unhealthy_too_long(i))
            .collect();
        let rank = |i: &Instance| match &i.health {
            Health::Healthy if i.is_running() => 0,
            Health::Unhealthy { .. } => 3,
            _ if i.is_running() => 1,
            _ => 2,
        };
        selected.sort_by_key(|i| (rank(i), !i.settled, i.key.number));
        selected.truncate(usize::from(target.replicas));
        selected.sort_by_key(|i| i.key.number);
        let replaces_unhealthy = all.iter().any(|i| unhealthy_too_long(i));
        Self { all, selected, failed_candidates, replaces_unhealthy }
    }

    /// The image id that the release was resolved to, if it has a live instance. That of a dead one may be gone.
    pub(super) fn image(&self) -> Option<String> {
        self.all.iter().find(|i| i.is_alive()).map(|i| i.image.clone())
    }

    /// The lowest free number.
    pub(super) fn free_number(&self) -> u16 {
        (1..=u16::MAX).find(|n| !self.all.iter().any(|i| i.key.number == *n)).unwrap_or(u16::MAX)
    }

    /// The verdict on the release, if a candidate failed.
    pub(super) fn failure(&self, input: &AppInput<'_>, target: &Target) -> Option<Step> {
        self.all.iter().filter(|i| !input.is_stopping(i)).find_map(|i| {
            let verdict = |cause, exit_code| verdict(input, target, i, cause, exit_code);
            match &i.phase {
                Phase::Exited(_) if was_killed(i) => None,
                Phase::Exited(code) if !i.settled => {
                    let memory = if i.out_of_memory { "was OOM-killed (exit code " } else { "ended with exit code " };
                    let close = if i.out_of_memory { ")" } else { "" };
                    // s6-overlay exits with 100 unless it is PID 1, which Docker's init process is.
                    let hint = if *code == 100 && target.release.container.init {
                        "; an image with an init of its own, such as s6-overlay, needs `init: false`"
                    } else {
                        ""
                    };
                    let when =
                        if is_monitored(input, target, i) { "while it was monitored" } else { "before it was healthy" };
                    let cause = format!("it {memory}{code}{close} {when}{hint}");
                    Some(verdict(cause, Some(*code)))
                }
                Phase::Running if i.health.is_unhealthy() && is_monitored(input, target, i) => {
                    let answer = match &i.health {
                        Health::Unhealthy { answer, .. } => answer.as_str(),
                        _ => "",
                    };
                    Some(verdict(format!("it became unhealthy while it was monitored: {answer}"), None))
                }
                Phase::Restarting => Some(verdict("crash loop: it ends after each start".to_owned(), None)),
                Phase::Running if missed_deadline(i, input) => {
                    let took = within(i.check.deadline());
                    let cause = match &i.health {
                        Health::Starting(answer) | Health::Unhealthy { answer, .. } if !answer.is_empty() => {
                            format!("it was not healthy {took}: {answer}")
                        }
                        _ => format!("it was not healthy {took}"),
                    };
                    Some(verdict(cause, None))
                }
                _ => None,
            }
        })
    }
}

/// Whether an instance of a release that is not proven serves requests, and is monitored.
fn is_monitored(input: &AppInput<'_>, target: &Target, instance: &Instance) -> bool {
    !input.turn.monitor().is_zero() && (target.ingress.is_none() || is_routed(input, instance))
}

/// A verdict on the wanted release, with one of its instances as evidence.
pub(super) fn verdict(
    input: &AppInput<'_>,
    target: &Target,
    instance: &Instance,
    cause: String,
    exit_code: Option<i64>,
) -> Step {
    record(input, target, Some(instance), (cause, exit_code), target.conditions())
}

/// A verdict on the wanted release, of which there cannot be an instance.
pub(super) fn verdict_without_instance(input: &AppInput<'_>, target: &Target, cause: String) -> Step {
    record(input, target, None, (cause, None), target.conditions())
}

/// A verdict on a release that does not answer through nginx: it depends on the templates of the host too.
pub(super) fn verdict_through_nginx(input: &AppInput<'_>, target: &Target, instance: &Instance, cause: String) -> Step {
    record(input, target, Some(instance), (cause, None), conditions_in_nginx(input, target))
}

fn conditions_in_nginx(input: &AppInput<'_>, target: &Target) -> String {
    format!("{} {}", target.conditions(), input.proxy.templates)
}

/// Whether the conditions of a verdict still hold.
pub(super) fn verdict_applies(input: &AppInput<'_>, target: &Target, verdict: &Verdict) -> bool {
    match verdict.conditions.as_str() {
        // Written by a version without conditions.
        "" => true,
        conditions if conditions.contains(' ') => conditions == conditions_in_nginx(input, target),
        conditions => conditions == target.conditions(),
    }
}

fn record(
    input: &AppInput<'_>,
    target: &Target,
    instance: Option<&Instance>,
    (cause, exit_code): (String, Option<i64>),
    conditions: String,
) -> Step {
    let before = input.observed.verdicts.get(&target.release.id).filter(|v| v.conditions == conditions);
    let attempts = before.map_or(0, |v| v.attempts).saturating_add(1);
    let release = target.release.clone();
    Step::RecordVerdict { handle: instance.map(handle), release, cause, exit_code, attempts, conditions }
}

pub(super) fn of_release<'a>(
    observed: &'a ObservedApp,
    release: &ReleaseId,
) -> impl Iterator<Item = &'a Instance> + use<'a> {
    let release = release.clone();
    observed.instances.iter().filter(move |i| i.key.release == release)
}

/// Whether a candidate failed a probe after its deadline. A passed deadline alone is not enough: an agent that was
/// stopped for a while has stale probe results.
fn missed_deadline(instance: &Instance, input: &AppInput<'_>) -> bool {
    instance.is_alive() && instance.health.is_unhealthy() && input.now >= instance.deadline()
}

/// Whether an instance is in service: it is routed, or Docker keeps it running.
pub(super) fn is_established(input: &AppInput<'_>, instance: &Instance) -> bool {
    instance.settled || is_routed(input, instance)
}

/// Whether an instance has exited and must not be restarted.
pub(super) fn stopped_for_good(instance: &Instance) -> bool {
    instance.leaving && matches!(instance.phase, Phase::Exited(_))
}

/// Whether an instance was killed from outside, by an operator or by an engine or host that went down, which says
/// nothing about its release. Exit codes as in a shell: 128 + SIGKILL and 128 + SIGTERM; and 255, which Docker gives to a
/// container whose end it has not seen, since the machine or the engine was killed.
fn was_killed(instance: &Instance) -> bool {
    let code = matches!(instance.phase, Phase::Exited(137 | 143 | 255)) && !instance.out_of_memory;
    code || stopped_for_good(instance)
}

pub(super) fn recovery_time(instance: &Instance) -> Duration {
    instance.check.interval.saturating_mul(instance.check.retries).max(MIN_RECOVERY_TIME)
}

pub(super) fn failure_reason(instance: &Instance) -> String {
    match (&instance.phase, &instance.health) {
        _ if instance.port_taken => "another program has its port".to_owned(),
        (Phase::Exited(code), _) => format!("it ended with exit code {code}"),
        (_, Health::Starting(answer) | Health::Unhealthy { answer, .. }) => format!("it was not healthy: {answer}"),
        _ => "it was not healthy".to_owned(),
    }
}

pub(super) fn handle(instance: &Instance) -> Handle {
    Handle { key: instance.key.clone(), id: instance.id.clone() }
}

/// Whether an instance is routed.
pub(super) fn is_routed(input: &AppInput<'_>, instance: &Instance) -> bool {
    match &instance.address {
        Some(Address::Socket(_)) => leads_to(&input.observed.slots, instance),
        Some(Address::Own(_)) => leads_to(&input.observed.mapped, instance),
        Some(Address::Port(port)) => match input.proxy.live.map(|v| &v.upstreams) {
            Some(Upstreams::Ports(ports)) => ports.contains(port),
            _ => false,
        },
        None => false,
    }
}

fn leads_to(routes: &BTreeMap<u16, Option<InstanceKey>>, instance: &Instance) -> bool {
    routes.values().flatten().any(|key| *key == instance.key)
}
