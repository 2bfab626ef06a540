//! The instances of a release, told apart by what they are good for.

use std::time::Duration;

use super::{
    AppInput,
    step::{Handle, Step},
    wait::within,
};
use crate::model::{
    desired::Target,
    name::ReleaseId,
    observed::{Address, Health, Instance, ObservedApp, Phase, Verdict},
    proxy::Upstreams,
};

/// Shortest time that an unhealthy instance in service is watched before it is replaced.
const PATIENCE: Duration = Duration::from_secs(5);

/// The instances of the wanted release, told apart by what they are good for.
pub(super) struct Group<'a> {
    /// All of them.
    pub(super) all: Vec<&'a Instance>,
    /// At most as many as are wanted, the best first by state, then in order of number.
    pub(super) good: Vec<&'a Instance>,
    /// Candidates that failed though the release is proven.
    pub(super) spent: Vec<&'a Instance>,
    /// Whether one in service was unhealthy for so long that it is replaced.
    pub(super) condemned: bool,
}

impl<'a> Group<'a> {
    pub(super) fn of(input: &AppInput<'a>, target: &Target, proven: bool) -> Self {
        let all: Vec<&Instance> =
            input.observed.instances.iter().filter(|i| i.key.release == target.release.id).collect();
        let spent: Vec<&Instance> = all
            .iter()
            .copied()
            .filter(|i| !is_established(input, i) || is_left(i) || i.port_taken)
            .filter(|i| {
                i.port_taken || was_killed(i) || proven && (is_late(i, input) || matches!(i.phase, Phase::Exited(_)))
            })
            .collect();
        let condemned = |i: &Instance| match &i.health {
            Health::Unhealthy { since, .. } => {
                proven && is_established(input, i) && input.now >= since.plus(patience(i))
            }
            _ => false,
        };
        let mut good: Vec<&Instance> = all
            .iter()
            .copied()
            .filter(|i| i.phase != Phase::Removing && !input.is_stopping(i))
            .filter(|i| !spent.iter().any(|s| s.id == i.id) && !condemned(i))
            .collect();
        let rank = |i: &Instance| match &i.health {
            Health::Healthy if i.is_running() => 0,
            Health::Unhealthy { .. } => 3,
            _ if i.is_running() => 1,
            _ => 2,
        };
        good.sort_by_key(|i| (rank(i), !i.settled, i.key.number));
        good.truncate(usize::from(target.replicas));
        good.sort_by_key(|i| i.key.number);
        let condemned = all.iter().any(|i| condemned(i));
        Self { all, good, spent, condemned }
    }

    /// The image that the release was resolved to, if it has an instance that lives. That of a dead one may be gone.
    pub(super) fn image(&self) -> Option<String> {
        self.all.iter().find(|i| i.is_alive()).map(|i| i.image.clone())
    }

    /// The lowest number that no instance has.
    pub(super) fn free_number(&self) -> u16 {
        (1..=u16::MAX).find(|n| !self.all.iter().any(|i| i.key.number == *n)).unwrap_or(u16::MAX)
    }

    /// The verdict that a candidate earned, if one did.
    pub(super) fn failure(&self, input: &AppInput<'_>, target: &Target) -> Option<Step> {
        self.all.iter().filter(|i| !input.is_stopping(i)).find_map(|i| {
            let verdict = |cause, exit_code| verdict(input, target, i, cause, exit_code);
            match &i.phase {
                Phase::Exited(_) if was_killed(i) => None,
                Phase::Exited(code) if !i.settled => {
                    let memory = if i.out_of_memory { "was OOM-killed (exit code " } else { "ended with exit code " };
                    let close = if i.out_of_memory { ")" } else { "" };
                    // s6-overlay ends with it unless it is PID 1, where Docker's init process is.
                    let hint = if *code == 100 && target.release.container.init {
                        "; an image with an init of its own, such as s6-overlay, needs `init: false`"
                    } else {
                        ""
                    };
                    let cause = format!("it {memory}{code}{close} before it was healthy{hint}");
                    Some(verdict(cause, Some(*code)))
                }
                Phase::Restarting => Some(verdict("it ends again and again".to_owned(), None)),
                Phase::Running if is_late(i, input) => {
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

/// The verdict on the release that is wanted, by one of its instances.
pub(super) fn verdict(
    input: &AppInput<'_>,
    target: &Target,
    instance: &Instance,
    cause: String,
    exit_code: Option<i64>,
) -> Step {
    record(input, target, instance, (cause, exit_code), target.conditions())
}

/// The verdict on a release that does not answer through nginx: it depends on the templates of the host too.
pub(super) fn verdict_through_nginx(input: &AppInput<'_>, target: &Target, instance: &Instance, cause: String) -> Step {
    record(input, target, instance, (cause, None), conditions_in_nginx(input, target))
}

fn conditions_in_nginx(input: &AppInput<'_>, target: &Target) -> String {
    format!("{} {}", target.conditions(), input.proxy.templates)
}

/// Whether what a verdict depends on is as it was.
pub(super) fn still_holds(input: &AppInput<'_>, target: &Target, verdict: &Verdict) -> bool {
    match verdict.conditions.as_str() {
        // From a demae that did not say.
        "" => true,
        conditions if conditions.contains(' ') => conditions == conditions_in_nginx(input, target),
        conditions => conditions == target.conditions(),
    }
}

fn record(
    input: &AppInput<'_>,
    target: &Target,
    instance: &Instance,
    (cause, exit_code): (String, Option<i64>),
    conditions: String,
) -> Step {
    let before = input.observed.verdicts.get(&target.release.id).filter(|v| v.conditions == conditions);
    let attempts = before.map_or(0, |v| v.attempts).saturating_add(1);
    let release = target.release.clone();
    Step::RecordVerdict { handle: handle(instance), release, cause, exit_code, attempts, conditions }
}

pub(super) fn of_release<'a>(
    observed: &'a ObservedApp,
    release: &ReleaseId,
) -> impl Iterator<Item = &'a Instance> + use<'a> {
    let release = release.clone();
    observed.instances.iter().filter(move |i| i.key.release == release)
}

/// Whether a candidate was asked after its deadline, and was not well. That the deadline is over is not enough: an agent
/// that was stopped for a while has old answers.
fn is_late(instance: &Instance, input: &AppInput<'_>) -> bool {
    instance.is_alive() && instance.health.is_unhealthy() && input.now >= instance.deadline()
}

/// Whether an instance has been put in service: it is routed, or Docker keeps it running.
pub(super) fn is_established(input: &AppInput<'_>, instance: &Instance) -> bool {
    instance.settled || is_routed(input, instance)
}

/// Whether an instance has ended, and is not to be started again.
pub(super) fn is_left(instance: &Instance) -> bool {
    instance.leaving && matches!(instance.phase, Phase::Exited(_))
}

/// Whether somebody ended an instance from outside: a person, or an engine or a host that went down. That says nothing
/// about its release. 128 + SIGKILL and 128 + SIGTERM, as a shell would tell them.
fn was_killed(instance: &Instance) -> bool {
    let code = matches!(instance.phase, Phase::Exited(137 | 143)) && !instance.out_of_memory;
    code || is_left(instance)
}

pub(super) fn patience(instance: &Instance) -> Duration {
    instance.check.interval.saturating_mul(instance.check.retries).max(PATIENCE)
}

pub(super) fn ending(instance: &Instance) -> String {
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

/// Whether requests go to an instance.
pub(super) fn is_routed(input: &AppInput<'_>, instance: &Instance) -> bool {
    match &instance.address {
        Some(Address::Socket(_)) => input.observed.slots.values().flatten().any(|k| *k == instance.key),
        Some(Address::Port(port)) => match input.proxy.live.map(|v| &v.upstreams) {
            Some(Upstreams::Ports(ports)) => ports.contains(port),
            _ => false,
        },
        None => false,
    }
}
