//! Lets a test end the agent between any two steps, as `kill -9` would. Compiled in only with the feature `failpoints`.

/// A boundary between two steps. With `DEMAE_FAILPOINT=n` the process aborts at the n-th it comes to.
#[cfg(feature = "failpoints")]
pub fn boundary(what: &str) {
    use std::sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering},
    };
    static COUNT: AtomicU64 = AtomicU64::new(0);
    static LIMIT: LazyLock<Option<u64>> =
        LazyLock::new(|| std::env::var("DEMAE_FAILPOINT").ok().and_then(|n| n.parse().ok()));
    let here = COUNT.fetch_add(1, Ordering::SeqCst) + 1;
    if *LIMIT == Some(here) {
        tracing::error!("failpoint {here}: ending at `{what}`");
        std::process::abort();
    }
}

/// Nothing, without the feature.
#[cfg(not(feature = "failpoints"))]
pub fn boundary(_what: &str) {}
