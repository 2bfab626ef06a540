//! The agent's one HTTP listener: metrics, health, status, events.

use std::{net::SocketAddr, sync::Arc};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{RawQuery, State},
    http::{StatusCode, header::CONTENT_TYPE},
    response::IntoResponse,
    routing::get,
};
use futures_util::{StreamExt as _, stream};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{
        OwnedSemaphorePermit, Semaphore,
        broadcast::{Receiver, error::RecvError},
        watch,
    },
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    events::Events,
    metrics::{FleetGauges, HostGauges, LeaderGauges, Metrics, View},
    model::{event::Event, status::HostStatus, text::json, time::Timestamp},
};

/// The loop must have completed a round within this time for the agent to be alive.
const ALIVE: std::time::Duration = std::time::Duration::from_secs(30);

/// Most concurrent connections. Each takes a file descriptor of the process, which has 1,024 by default.
const MOST_CONNECTIONS: usize = 256;
/// Timeout for the head of a request, and between two requests.
const LONGEST_HEAD: std::time::Duration = std::time::Duration::from_secs(5);
/// Pause after a failed accept.
const ACCEPT_RETRY: std::time::Duration = std::time::Duration::from_millis(100);
/// Longest wait for a response in flight at shutdown.
const LAST_ANSWER: std::time::Duration = std::time::Duration::from_secs(1);

/// State that the listener serves.
#[derive(Debug, Clone)]
pub struct HttpState {
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// Gauges of the loop, for metrics.
    pub view: watch::Receiver<Arc<View>>,
    /// Gauges of this machine, for metrics.
    pub host_gauges: watch::Receiver<HostGauges>,
    /// Gauges of rollouts, for metrics.
    pub leader_gauges: watch::Receiver<Option<LeaderGauges>>,
    /// Whether this host takes turns in rollouts.
    pub takes_turns: watch::Receiver<bool>,
    /// The event stream.
    pub events: Events,
    /// Status of host and apps.
    pub status: watch::Receiver<HostStatus>,
    /// When the loop last completed a round.
    pub pulse: watch::Receiver<Instant>,
    /// Whether etcd and Docker have been read.
    pub ready: watch::Receiver<bool>,
    /// Ends endless streams at shutdown.
    pub end: CancellationToken,
}

/// Serves until cancelled.
///
/// # Errors
/// If the listener fails.
pub async fn serve(listener: TcpListener, state: HttpState) -> std::io::Result<()> {
    let end = state.end.clone();
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/status", get(status))
        .route("/events", get(events))
        .with_state(state);
    let (places, tasks) = (Arc::new(Semaphore::new(MOST_CONNECTIONS)), TaskTracker::new());
    loop {
        let accepted = tokio::select! {
            () = end.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(e) => {
                // Out of file descriptors, for one. Other connections end meanwhile.
                tracing::debug!("cannot accept a connection: {e}");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        // Excess connections are closed at once: the agent needs its descriptors for Docker and etcd.
        let Ok(place) = places.clone().try_acquire_owned() else { continue };
        tasks.spawn(connection(stream, router.clone(), end.clone(), place));
    }
    tasks.close();
    tasks.wait().await;
    Ok(())
}

/// Serves one connection until it ends, or the agent does.
async fn connection(stream: TcpStream, router: Router, end: CancellationToken, _place: OwnedSemaphorePermit) {
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(LONGEST_HEAD)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    tokio::pin!(serving);
    tokio::select! {
        // An error is the client's.
        _ = &mut serving => {}
        () = end.cancelled() => {
            serving.as_mut().graceful_shutdown();
            let _ = tokio::time::timeout(LAST_ANSWER, serving).await;
        }
    }
}

/// Binds the address.
///
/// # Errors
/// In words, if it cannot be bound.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, String> {
    TcpListener::bind(address)
        .await
        .map_err(|e| format!("cannot listen on {address}: {e}; choose another with `--listen`"))
}

async fn metrics(State(state): State<HttpState>) -> impl IntoResponse {
    let (view, host_gauges) = (state.view.borrow().clone(), state.host_gauges.borrow().clone());
    let fleet = FleetGauges { enabled: *state.takes_turns.borrow(), leader: state.leader_gauges.borrow().clone() };
    // Rendering a thousand apps takes milliseconds, so it does not run on the loop's thread.
    let rendered =
        tokio::task::spawn_blocking(move || state.metrics.render(&view, &host_gauges, &fleet, Timestamp::now())).await;
    let failed = |e: String| (StatusCode::INTERNAL_SERVER_ERROR, e).into_response();
    match rendered {
        Ok(Ok(text)) => ([(CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Ok(Err(e)) => failed(e.to_string()),
        Err(e) => failed(e.to_string()),
    }
}

async fn healthz(State(state): State<HttpState>) -> impl IntoResponse {
    let age = state.pulse.borrow().elapsed();
    if age <= ALIVE {
        (StatusCode::OK, "alive\n".to_owned())
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, format!("the main loop has not run for {} s\n", age.as_secs()))
    }
}

async fn readyz(State(state): State<HttpState>) -> impl IntoResponse {
    if *state.ready.borrow() {
        (StatusCode::OK, "etcd, Docker and nginx have been read\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "etcd, Docker or nginx has not been read yet\n")
    }
}

async fn status(State(state): State<HttpState>) -> impl IntoResponse {
    Json(state.status.borrow().clone())
}

/// One line of JSON per event: the kept ones, and with `?follow` the next ones.
async fn events(State(state): State<HttpState>, RawQuery(query): RawQuery) -> impl IntoResponse {
    let follow = query.as_deref().is_some_and(|q| q.split('&').any(|part| part == "follow"));
    let (kept, coming) = state.events.follow();
    let past = stream::iter(kept).map(|event| line(&event));
    let body = if follow {
        let future = stream::unfold((coming, state.events, state.end), next);
        Body::from_stream(past.chain(future).map(Ok::<_, std::convert::Infallible>))
    } else {
        Body::from_stream(past.map(Ok::<_, std::convert::Infallible>))
    };
    ([(CONTENT_TYPE, "application/x-ndjson")], body)
}

type Following = (Receiver<Arc<Event>>, Events, CancellationToken);

async fn next((mut coming, events, end): Following) -> Option<(Bytes, Following)> {
    let received = tokio::select! {
        () = end.cancelled() => return None,
        received = coming.recv() => received,
    };
    let line = match received {
        Ok(event) => line(&event),
        Err(RecvError::Lagged(count)) => line(&events.lost(count)),
        Err(RecvError::Closed) => return None,
    };
    Some((line, (coming, events, end)))
}

fn line(event: &Event) -> Bytes {
    let mut text = json(event).into_bytes();
    text.push(b'\n');
    Bytes::from(text)
}
