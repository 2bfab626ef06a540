//! A monotonic clock, and wall-clock stamps converted to it. Containers and files are stamped by the host's wall clock,
//! which NTP and people set; drains and deadlines must keep their length all the same.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use crate::model::time::{Timestamp, human};

/// Smaller differences are ignored, in milliseconds: clocks are slewed all the time.
const MIN_STEP: i64 = 1_000;
/// Steps from this size on are logged, in milliseconds.
const LOGGED_STEP: i64 = 10_000;
/// How many steps are kept. What was stamped before an older one is long over.
const MAX_STEPS: usize = 16;

/// How many stamps from the future are kept.
const MAX_AHEAD: usize = 4_096;

/// Time since boot, and the wall clock.
type Source = Box<dyn Fn() -> (Duration, Timestamp) + Send + Sync>;

/// A monotonic clock: starts at the wall clock of its creation and advances by the kernel's time since boot, which
/// process ages are measured by too.
pub struct Clock {
    source: Source,
    offset: i64,
    steps: Mutex<Vec<Step>>,
    /// Stamps from the future, and when each was first seen.
    ahead: Mutex<BTreeMap<i64, i64>>,
}

/// A step of the wall clock.
#[derive(Debug, Clone, Copy)]
struct Step {
    /// When, by the monotonic clock.
    at: i64,
    /// Its size in milliseconds.
    by: i64,
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Clock").field("steps", &self.steps()).finish_non_exhaustive()
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::new(|| (since_boot(), Timestamp::now()))
    }
}

impl Clock {
    /// A clock with this source.
    pub fn new(source: impl Fn() -> (Duration, Timestamp) + Send + Sync + 'static) -> Self {
        let (uptime, wall) = source();
        Self {
            source: Box::new(source),
            offset: wall.as_millis() - millis(uptime),
            steps: Mutex::default(),
            ahead: Mutex::default(),
        }
    }

    /// Now. Detects steps of the wall clock.
    pub fn now(&self) -> Timestamp {
        let (uptime, wall) = (self.source)();
        let now = self.offset + millis(uptime);
        let mut steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        let by = wall.as_millis() - now - sum(&steps);
        if by.abs() >= MIN_STEP {
            if by.abs() >= LOGGED_STEP {
                let way = if by > 0 { "ahead" } else { "back" };
                let far = human(Duration::from_millis(by.unsigned_abs()));
                tracing::warn!("the clock of this host was set {way} by {far}; running deadlines are not affected");
            }
            if steps.len() == MAX_STEPS {
                // Treat every stamp as made after the oldest step.
                let oldest = steps.remove(0);
                steps[0].by += oldest.by;
            }
            steps.push(Step { at: now, by });
        }
        Timestamp::from_millis(now)
    }

    /// A wall-clock stamp on the monotonic clock. A stamp that may be from before or after a step back counts as the
    /// later: waits become too long rather than too short. A stamp from the future, as after a step back before this
    /// agent started, counts from when it was first seen.
    pub fn to_monotonic(&self, stamp: Timestamp) -> Timestamp {
        // Detects a step that was not detected yet.
        let now = self.now().as_millis();
        let steps = self.steps();
        let mut at = stamp.as_millis() - sum(&steps);
        for step in steps.iter().rev() {
            if at >= step.at {
                break;
            }
            at += step.by;
        }
        let mut ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner);
        // Also once its time has come: otherwise its age would drop back to zero.
        if let Some(seen) = ahead.get(&at) {
            at = *seen;
        } else if at > now + MIN_STEP {
            if ahead.len() >= MAX_AHEAD {
                ahead.pop_first();
            }
            ahead.insert(at, now);
            at = now;
        }
        Timestamp::from_millis(at)
    }

    /// A time of this clock as wall-clock time.
    pub fn wall(&self, at: Timestamp) -> Timestamp {
        Timestamp::from_millis(at.as_millis() + sum(&self.steps()))
    }

    fn steps(&self) -> Vec<Step> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn since_boot() -> Duration {
    Duration::try_from(rustix::time::clock_gettime(rustix::time::ClockId::Boottime))
        .expect("the time since boot is not negative")
}

fn sum(steps: &[Step]) -> i64 {
    steps.iter().map(|s| s.by).sum()
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    };

    use super::*;

    /// A clock with its time since boot and its wall clock, both in milliseconds.
    fn clock() -> (Clock, Arc<AtomicI64>, Arc<AtomicI64>) {
        let (uptime, wall) = (Arc::new(AtomicI64::new(0)), Arc::new(AtomicI64::new(1_000_000)));
        let (r, w) = (uptime.clone(), wall.clone());
        let source = move || {
            let uptime = Duration::from_millis(r.load(Ordering::Relaxed).unsigned_abs());
            (uptime, Timestamp::from_millis(w.load(Ordering::Relaxed)))
        };
        (Clock::new(source), uptime, wall)
    }

    fn pass((_, uptime, wall): &(Clock, Arc<AtomicI64>, Arc<AtomicI64>), ms: i64) {
        uptime.fetch_add(ms, Ordering::Relaxed);
        wall.fetch_add(ms, Ordering::Relaxed);
    }

    #[test]
    fn wall_clock_steps_do_not_move_the_clock() {
        let it = clock();
        let at = |ms: i64| Timestamp::from_millis(ms);
        pass(&it, 5_000);
        let stamped_before = at(it.2.load(Ordering::Relaxed));
        assert_eq!(it.0.now(), stamped_before);
        pass(&it, 1_000);
        // Set ahead by an hour.
        it.2.fetch_add(3_600_000, Ordering::Relaxed);
        assert_eq!(it.0.now(), at(1_006_000));
        assert_eq!(it.0.to_monotonic(stamped_before), stamped_before);
        pass(&it, 1_000);
        let stamped_after = at(it.2.load(Ordering::Relaxed));
        assert_eq!(it.0.to_monotonic(stamped_after), it.0.now());
        assert_eq!(it.0.wall(it.0.now()), stamped_after);
        // Set back by two: what was stamped in between may be of either side.
        pass(&it, 1_000);
        it.2.fetch_sub(7_200_000, Ordering::Relaxed);
        assert_eq!(it.0.now(), at(1_008_000));
        pass(&it, 1_000);
        let stamped_last = at(it.2.load(Ordering::Relaxed));
        assert_eq!(it.0.to_monotonic(stamped_last), it.0.now());
        assert!(it.0.to_monotonic(stamped_before) >= stamped_before, "too late rather than too early");
        assert_eq!(it.0.to_monotonic(at(-9_000_000)), at(-9_000_000));
    }

    #[test]
    fn stamp_from_the_future_counts_from_first_sight() {
        let it = clock();
        pass(&it, 1_000);
        let future = Timestamp::from_millis(9_000_000);
        assert_eq!(it.0.to_monotonic(future), it.0.now());
        pass(&it, 5_000);
        assert_eq!(it.0.now().since(it.0.to_monotonic(future)), Duration::from_secs(5));
        pass(&it, 20_000_000);
        assert_eq!(it.0.now().since(it.0.to_monotonic(future)), Duration::from_secs(20_005), "its age never drops");
    }

    #[test]
    fn small_steps_are_ignored_and_old_steps_are_dropped() {
        let it = clock();
        it.2.fetch_add(900, Ordering::Relaxed);
        assert_eq!(
            (it.0.now(), it.0.wall(Timestamp::from_millis(1))),
            (Timestamp::from_millis(1_000_000), Timestamp::from_millis(1))
        );
        for _ in 0..50 {
            it.2.fetch_add(5_000, Ordering::Relaxed);
            pass(&it, 10);
            it.0.now();
        }
        assert_eq!(it.0.steps().len(), MAX_STEPS);
        assert!(
            it.0.to_monotonic(Timestamp::from_millis(it.2.load(Ordering::Relaxed))).since(it.0.now())
                < Duration::from_secs(1)
        );
    }
}
