//! Waits for conditions, never for a number of seconds.

use std::time::{Duration, Instant};

/// Longest wait for anything that should take a second: a loaded machine takes longer, and a wrong one takes for ever.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Between two looks at something that is waited for. Not a guess of how long it takes: the condition decides.
pub fn pause() {
    std::thread::sleep(Duration::from_millis(5));
}

/// Waits until something holds.
pub fn until(what: &str, holds: impl FnMut() -> bool) {
    until_within(PATIENCE, what, holds);
}

/// Waits until something holds that takes its time by design.
pub fn until_within(patience: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < patience, "not within {patience:?}: {what}");
        pause();
    }
}
