//! Docker's events, as hints. They are lost now and then, so they are never believed further than *look again*.

use std::time::Duration;

use futures_util::StreamExt as _;
use tokio::sync::mpsc;

use crate::{host::docker::DockerError, model::name::AppName, retry::Retry, world::SharedWorld};

/// What woke the loop, if not a task.
#[derive(Debug)]
pub(super) enum Hint {
    /// Look at this app.
    App(AppName),
    /// Look at everything.
    All,
}

/// Turns SIGHUP into a look at everything: what an operator sends after changing a template by hand.
pub(super) async fn hang_up(hints: mpsc::UnboundedSender<Hint>) {
    let Ok(mut signals) = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup()) else { return };
    while signals.recv().await.is_some() {
        if hints.send(Hint::All).is_err() {
            return;
        }
    }
}

/// Turns events of Docker into hints, for as long as the agent lives. After every gap: look at everything.
pub(super) async fn listen(world: SharedWorld, hints: mpsc::UnboundedSender<Hint>) {
    let mut retry = Retry::new(Duration::from_millis(200), Duration::from_secs(10));
    loop {
        let mut events = std::pin::pin!(world.docker.events());
        // The request goes out with the first look; what happened before it is only found by looking at everything.
        let mut first = true;
        loop {
            let next = if first {
                first = false;
                match tokio::time::timeout(Duration::from_millis(50), events.next()).await {
                    Ok(event) => event,
                    Err(_) => {
                        if hints.send(Hint::All).is_err() {
                            return;
                        }
                        continue;
                    }
                }
            } else {
                events.next().await
            };
            match next {
                Some(Ok(app)) => {
                    retry.reset();
                    if hints.send(Hint::App(app)).is_err() {
                        return;
                    }
                }
                Some(Err(DockerError::Unreachable { reason, .. })) => {
                    tracing::debug!("events of Docker ended: {reason}");
                    break;
                }
                Some(Err(e)) => {
                    tracing::debug!("events of Docker ended: {e}");
                    break;
                }
                None => break,
            }
        }
        tokio::time::sleep(retry.pause()).await;
        if hints.send(Hint::All).is_err() {
            return;
        }
    }
}
