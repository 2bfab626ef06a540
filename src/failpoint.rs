//! Lets a test kill the agent between any two steps, as `kill -9` would, or stop it there, as a suspended machine
//! would. Compiled in only with the feature `failpoints`.

/// A boundary between two steps. With `DEMAE_FAILPOINT=n` the process aborts at its n-th boundary; with
/// `DEMAE_STANDSTILL=switch` it stops at the first boundary of that name, until SIGCONT.
#[cfg(feature = "failpoints")]
pub fn boundary(what: &str) {
    use std::sync::{
        LazyLock, Once,
        atomic::{AtomicU64, Ordering},
    };
    static COUNT: AtomicU64 = AtomicU64::new(0);
    static LIMIT: LazyLock<Option<u64>> =
        LazyLock::new(|| std::env::var("DEMAE_FAILPOINT").ok().and_then(|n| n.parse().ok()));
    static STANDSTILL: LazyLock<Option<String>> = LazyLock::new(|| std::env::var("DEMAE_STANDSTILL").ok());
    static STOOD: Once = Once::new();
    let here = COUNT.fetch_add(1, Ordering::SeqCst) + 1;
    if *LIMIT == Some(here) {
        tracing::error!("failpoint {here}: ending at `{what}`");
        std::process::abort();
    }
    if STANDSTILL.as_deref() == Some(what) {
        STOOD.call_once(|| {
            use rustix::process::{Signal, getpid, kill_process};
            tracing::warn!("failpoint {here}: standing still at `{what}`");
            if let Err(e) = kill_process(getpid(), Signal::STOP) {
                tracing::error!("cannot stop the process: {e}");
            }
            // Another thread may receive the signal first; this one must not go on meanwhile.
            std::thread::sleep(std::time::Duration::from_millis(50));
        });
    }
}

/// Does nothing without the feature.
#[cfg(not(feature = "failpoints"))]
pub fn boundary(_what: &str) {}
