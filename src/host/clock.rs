//! A clock that nobody sets. Containers and files are stamped by the wall clock of the host, and people and NTP set that.
//! A drain or a deadline must last as long as it says all the same.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use crate::model::time::{Timestamp, humane};

/// A smaller step is no step: clocks are slewed all the time.
const STEP: i64 = 1_000;
/// A step that people may have noticed.
const NOTEWORTHY: i64 = 10_000;
/// Steps that are remembered. What was stamped before an older one is long over.
const STEPS: usize = 16;

/// Stamps in the future that are remembered.
const MOST_AHEAD: usize = 4_096;

/// How long it has run, and what the wall clock says.
type Source = Box<dyn Fn() -> (Duration, Timestamp) + Send + Sync>;

/// Counts on from the wall clock of when it was made, whatever becomes of that: by the kernel's time since boot, which
/// processes are aged by too.
pub struct Clock {
    source: Source,
    began: i64,
    steps: Mutex<Vec<Step>>,
    /// What was stamped in the future, and when that was first seen.
    ahead: Mutex<BTreeMap<i64, i64>>,
}

/// The wall clock was set.
#[derive(Debug, Clone, Copy)]
struct Step {
    /// When, by this clock.
    at: i64,
    /// By so many milliseconds.
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
    /// With a source of its own.
    pub fn new(source: impl Fn() -> (Duration, Timestamp) + Send + Sync + 'static) -> Self {
        let (ran, wall) = source();
        Self {
            source: Box::new(source),
            began: wall.as_millis() - millis(ran),
            steps: Mutex::default(),
            ahead: Mutex::default(),
        }
    }

    /// Now. Notices when the wall clock was set.
    pub fn now(&self) -> Timestamp {
        let (ran, wall) = (self.source)();
        let now = self.began + millis(ran);
        let mut steps = self.steps.lock().unwrap_or_else(PoisonError::into_inner);
        let by = wall.as_millis() - now - sum(&steps);
        if by.abs() >= STEP {
            if by.abs() >= NOTEWORTHY {
                let way = if by > 0 { "ahead" } else { "back" };
                let far = humane(Duration::from_millis(by.unsigned_abs()));
                tracing::warn!("the clock of this host was set {way} by {far}; what is under way is timed without it");
            }
            if steps.len() == STEPS {
                // As if everything had been stamped after it.
                let oldest = steps.remove(0);
                steps[0].by += oldest.by;
            }
            steps.push(Step { at: now, by });
        }
        Timestamp::from_millis(now)
    }

    /// What was stamped by the wall clock, by this one. Where it could have been stamped before or after the clock was set
    /// back, it is taken for the later: whoever waits for it waits too long rather than too short. What was stamped in the
    /// future, for one by a clock that was set back before this agent began, counts from when it was first seen.
    pub fn steady(&self, stamp: Timestamp) -> Timestamp {
        // A step that nobody has noticed yet is noticed here.
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
        // Also once its time has come: it would grow young again.
        if let Some(seen) = ahead.get(&at) {
            at = *seen;
        } else if at > now + STEP {
            if ahead.len() >= MOST_AHEAD {
                ahead.pop_first();
            }
            ahead.insert(at, now);
            at = now;
        }
        Timestamp::from_millis(at)
    }

    /// A time of this clock as the wall clock will show it.
    pub fn wall(&self, at: Timestamp) -> Timestamp {
        Timestamp::from_millis(at.as_millis() + sum(&self.steps()))
    }

    fn steps(&self) -> Vec<Step> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn since_boot() -> Duration {
    Duration::try_from(rustix::time::clock_gettime(rustix::time::ClockId::Boottime)).unwrap_or_default()
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

    /// A clock that has run for `ran` ms on a host whose wall clock says `wall`.
    fn clock() -> (Clock, Arc<AtomicI64>, Arc<AtomicI64>) {
        let (ran, wall) = (Arc::new(AtomicI64::new(0)), Arc::new(AtomicI64::new(1_000_000)));
        let (r, w) = (ran.clone(), wall.clone());
        let source = move || {
            let ran = Duration::from_millis(r.load(Ordering::Relaxed).unsigned_abs());
            (ran, Timestamp::from_millis(w.load(Ordering::Relaxed)))
        };
        (Clock::new(source), ran, wall)
    }

    fn pass((_, ran, wall): &(Clock, Arc<AtomicI64>, Arc<AtomicI64>), ms: i64) {
        ran.fetch_add(ms, Ordering::Relaxed);
        wall.fetch_add(ms, Ordering::Relaxed);
    }

    #[test]
    fn it_runs_on_whatever_becomes_of_the_wall_clock() {
        let it = clock();
        let at = |ms: i64| Timestamp::from_millis(ms);
        pass(&it, 5_000);
        let stamped_before = at(it.2.load(Ordering::Relaxed));
        assert_eq!(it.0.now(), stamped_before);
        pass(&it, 1_000);
        // Set ahead by an hour.
        it.2.fetch_add(3_600_000, Ordering::Relaxed);
        assert_eq!(it.0.now(), at(1_006_000));
        assert_eq!(it.0.steady(stamped_before), stamped_before);
        pass(&it, 1_000);
        let stamped_after = at(it.2.load(Ordering::Relaxed));
        assert_eq!(it.0.steady(stamped_after), it.0.now());
        assert_eq!(it.0.wall(it.0.now()), stamped_after);
        // Set back by two: what was stamped in between may be of either side.
        pass(&it, 1_000);
        it.2.fetch_sub(7_200_000, Ordering::Relaxed);
        assert_eq!(it.0.now(), at(1_008_000));
        pass(&it, 1_000);
        let stamped_last = at(it.2.load(Ordering::Relaxed));
        assert_eq!(it.0.steady(stamped_last), it.0.now());
        assert!(it.0.steady(stamped_before) >= stamped_before, "too late rather than too early");
        assert_eq!(it.0.steady(at(-9_000_000)), at(-9_000_000));
    }

    #[test]
    fn the_future_begins_when_it_is_first_seen() {
        let it = clock();
        pass(&it, 1_000);
        let future = Timestamp::from_millis(9_000_000);
        assert_eq!(it.0.steady(future), it.0.now());
        pass(&it, 5_000);
        assert_eq!(it.0.now().since(it.0.steady(future)), Duration::from_secs(5));
        pass(&it, 20_000_000);
        assert_eq!(it.0.now().since(it.0.steady(future)), Duration::from_secs(20_005), "it does not grow young again");
    }

    #[test]
    fn small_steps_are_no_steps_and_old_ones_are_forgotten() {
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
        assert_eq!(it.0.steps().len(), STEPS);
        assert!(
            it.0.steady(Timestamp::from_millis(it.2.load(Ordering::Relaxed))).since(it.0.now())
                < Duration::from_secs(1)
        );
    }
}
