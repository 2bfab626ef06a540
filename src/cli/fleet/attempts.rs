//! The wait of a verb: over lost connections, up to a deadline, and until Ctrl-C.

use std::time::Duration;

use tokio::time::Instant;

use crate::cli::Failed;

/// Between two attempts to reach the store while something is waited for.
const RECONNECT: Duration = Duration::from_secs(1);

/// How a wait ended.
pub(super) enum Waited<T> {
    /// With what was waited for.
    Done(T),
    /// The deadline passed.
    TimedOut,
    /// Ctrl-C.
    Interrupted,
}

/// Makes attempts, each with another member of etcd, until one returns something. One that returns `None` has said why.
///
/// # Errors
/// If signals cannot be received.
pub(super) async fn attempts<T>(
    deadline: Instant,
    mut attempt: impl AsyncFnMut(usize) -> Option<T>,
) -> Result<Waited<T>, Failed> {
    // One for the whole wait: a signal between two of them would be lost.
    let mut pressed = std::pin::pin!(tokio::signal::ctrl_c());
    let mut turn = 0;
    loop {
        tokio::select! {
            biased;
            pressed = &mut pressed => {
                pressed?;
                return Ok(Waited::Interrupted);
            }
            () = tokio::time::sleep_until(deadline) => return Ok(Waited::TimedOut),
            found = attempt(turn) => {
                if let Some(found) = found {
                    return Ok(Waited::Done(found));
                }
            }
        }
        turn += 1;
        tokio::select! {
            pressed = &mut pressed => {
                pressed?;
                return Ok(Waited::Interrupted);
            }
            () = tokio::time::sleep_until((Instant::now() + RECONNECT).min(deadline)) => {}
        }
    }
}
