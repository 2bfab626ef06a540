//! Backoff between retries. The only user of the `backoff` crate.

use std::time::Duration;

use backoff::{ExponentialBackoff, ExponentialBackoffBuilder, backoff::Backoff};

/// Exponential backoff without an end: a controller never gives up.
#[derive(Debug)]
pub struct Retry {
    policy: ExponentialBackoff,
    longest: Duration,
}

impl Retry {
    /// Pauses from `first` to `longest`, each twice the one before.
    pub fn new(first: Duration, longest: Duration) -> Self {
        Self { policy: policy(first, longest, 0.0), longest }
    }

    /// The next pause, with 20 % jitter. Jitter is added after the limit, so the limit is enforced here.
    pub fn pause(&mut self) -> Duration {
        jittered(self.step()).min(self.longest)
    }

    /// The next pause without jitter, for callers with their own randomness.
    pub fn step(&mut self) -> Duration {
        self.policy.next_backoff().unwrap_or(self.longest)
    }

    /// Resets to the first pause.
    pub fn reset(&mut self) {
        self.policy.reset();
    }
}

/// The pause after `attempts` consecutive failures, for callers that keep only the count: 1 s, 2 s, 4 s … 5 min, the
/// curve of the kubelet's crash loop backoff, begun ten times sooner since most failures of a deploy are short.
pub fn pause_after(attempts: u32) -> Duration {
    Duration::from_secs(1u64 << attempts.saturating_sub(1).min(9)).min(Duration::from_secs(300))
}

/// A duration with 20 % jitter, so many agents do not act at once.
pub fn jittered(duration: Duration) -> Duration {
    policy(duration, duration * 2, 0.2).next_backoff().unwrap_or(duration)
}

fn policy(first: Duration, longest: Duration, jitter: f64) -> ExponentialBackoff {
    ExponentialBackoffBuilder::new()
        .with_initial_interval(first)
        .with_multiplier(2.0)
        .with_randomization_factor(jitter)
        .with_max_interval(longest)
        .with_max_elapsed_time(None)
        .build()
}
