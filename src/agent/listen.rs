//! Docker's events, as hints. Events can be lost, so they only trigger an observation.

use std::{sync::Arc, time::Duration};

use futures_util::StreamExt as _;
use tokio::sync::mpsc;

use crate::{
    host::docker::{ContainerEvent, DockerError},
    machine::Machine,
    model::name::AppName,
};

/// First and longest backoff between two subscriptions to events.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// A trigger of the loop from outside.
#[derive(Debug)]
pub(super) enum Hint {
    /// Observe this app.
    App(AppName),
    /// A container of this app ended: what is held is stale.
    Ended(AppName),
    /// Observe everything.
    All,
}

/// Turns SIGHUP into a full observation; operators send it after changing a template by hand.
pub(super) async fn on_sighup(hints: mpsc::UnboundedSender<Hint>) {
    let Ok(mut signals) = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup()) else { return };
    while signals.recv().await.is_some() {
        if hints.send(Hint::All).is_err() {
            return;
        }
    }
}

/// Turns events of Docker into hints until the agent ends, with a full observation after every gap.
pub(super) async fn listen_to_docker(machine: Arc<impl Machine>, hints: mpsc::UnboundedSender<Hint>) {
    let mut pause = FIRST_PAUSE;
    loop {
        let mut events = std::pin::pin!(machine.events());
        // The subscription starts with the first poll; only a full observation finds what happened before it.
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
                Some(Ok(ContainerEvent { app, is_end })) => {
                    pause = FIRST_PAUSE;
                    if hints.send(if is_end { Hint::Ended(app) } else { Hint::App(app) }).is_err() {
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
