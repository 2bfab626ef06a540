//! Waits for conditions, never for a number of seconds.

use std::time::{Duration, Instant};

/// Longest wait for anything that should take a second: a loaded machine is slower, and a wrong condition never holds.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The poll interval. Not an estimate of the duration: the condition decides.
pub fn pause() {
    std::thread::sleep(Duration::from_millis(20));
}

/// Waits until a condition holds.
pub fn until(what: &str, holds: impl FnMut() -> bool) {
    until_within(PATIENCE, what, holds);
}

/// Waits until a condition holds that is slow by design.
pub fn until_within(patience: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < patience, "not within {patience:?}: {what}");
        pause();
    }
}
