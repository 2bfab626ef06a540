//! The first signal requests an orderly shutdown, the second one ends at once.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// A token that is cancelled by SIGTERM or SIGINT. A second signal cancels the second token.
///
/// # Errors
/// If signal handlers cannot be installed.
pub fn on_signals(tasks: &TaskTracker) -> std::io::Result<(CancellationToken, CancellationToken)> {
    let (orderly, at_once) = (CancellationToken::new(), CancellationToken::new());
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (first, second) = (orderly.clone(), at_once.clone());
    tasks.spawn(async move {
        for token in [first, second] {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
                // Shut down by other means.
                () = token.cancelled() => return,
            }
            token.cancel();
        }
    });
    Ok((orderly, at_once))
}
