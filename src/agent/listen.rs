//! Docker's events, as hints. They are lost now and then, so they are never believed further than *look again*.

use std::{sync::Arc, time::Duration};

use futures_util::StreamExt as _;
use tokio::sync::mpsc;

use crate::{host::docker::DockerError, machine::Machine, model::name::AppName};

/// Between two tries to hear events, at first and at last.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

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
pub(super) async fn listen(machine: Arc<impl Machine>, hints: mpsc::UnboundedSender<Hint>) {
    let mut pause = FIRST_PAUSE;
    loop {
        let mut events = std::pin::pin!(machine.events());
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
                    pause = FIRST_PAUSE;
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
        tokio::time::sleep(machine.jittered(pause)).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
        if hints.send(Hint::All).is_err() {
            return;
        }
    }
}
