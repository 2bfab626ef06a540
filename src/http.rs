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
    metrics::{Metrics, View, Vitals},
    model::{event::Event, status::HostStatus, time::Timestamp},
};

/// The loop must have gone round within this time for the agent to be alive.
const ALIVE: std::time::Duration = std::time::Duration::from_secs(30);

/// Most connections at a time. Each takes a file of the process, which has 1,024 where nobody says otherwise.
const MOST_CONNECTIONS: usize = 256;
/// Longest time for the head of a request, and between two requests.
const LONGEST_HEAD: std::time::Duration = std::time::Duration::from_secs(5);
/// Before a connection is tried to be taken again.
const AGAIN: std::time::Duration = std::time::Duration::from_millis(100);
/// Longest wait for an answer under way when the agent ends.
const LAST_ANSWER: std::time::Duration = std::time::Duration::from_secs(1);

/// What the listener shows.
#[derive(Debug, Clone)]
pub struct Shown {
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// What metrics show of the loop.
    pub view: watch::Receiver<Arc<View>>,
    /// What metrics show of this machine.
    pub vitals: watch::Receiver<Vitals>,
    /// What happens.
    pub events: Events,
    /// Status of host and apps.
    pub status: watch::Receiver<HostStatus>,
    /// When the loop last went round.
    pub pulse: watch::Receiver<Instant>,
    /// Whether etcd and Docker have been read.
    pub ready: watch::Receiver<bool>,
    /// Ends streams that would go on for ever.
    pub end: CancellationToken,
}

/// Serves until cancelled.
///
/// # Errors
/// If the listener breaks.
pub async fn serve(listener: TcpListener, shown: Shown) -> std::io::Result<()> {
    let end = shown.end.clone();
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/status", get(status))
        .route("/events", get(events))
        .with_state(shown);
    let (places, tasks) = (Arc::new(Semaphore::new(MOST_CONNECTIONS)), TaskTracker::new());
    loop {
        let accepted = tokio::select! {
            () = end.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(e) => {
                // Out of files, for one. Others are served meanwhile, and end.
                tracing::debug!("a connection cannot be taken: {e}");
                tokio::time::sleep(AGAIN).await;
                continue;
            }
        };
        // One too many is closed at once: the agent needs its files for Docker and etcd.
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
        // How it ended is the client's business.
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
/// In words, if it cannot be had.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, String> {
    TcpListener::bind(address)
        .await
        .map_err(|e| format!("cannot listen on {address}: {e}; choose another with `--listen`"))
}

async fn metrics(State(shown): State<Shown>) -> impl IntoResponse {
    let (view, vitals) = (shown.view.borrow().clone(), shown.vitals.borrow().clone());
    // Text of a thousand apps takes milliseconds; the loop's thread is not kept from its work for that.
    let rendered = tokio::task::spawn_blocking(move || shown.metrics.render(&view, &vitals, Timestamp::now())).await;
    let failed = |e: String| (StatusCode::INTERNAL_SERVER_ERROR, e).into_response();
    match rendered {
        Ok(Ok(text)) => ([(CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Ok(Err(e)) => failed(e.to_string()),
        Err(e) => failed(e.to_string()),
    }
}

async fn healthz(State(shown): State<Shown>) -> impl IntoResponse {
    let age = shown.pulse.borrow().elapsed();
    if age <= ALIVE {
        (StatusCode::OK, "alive\n".to_owned())
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, format!("the loop has not gone round for {} s\n", age.as_secs()))
    }
}

async fn readyz(State(shown): State<Shown>) -> impl IntoResponse {
    if *shown.ready.borrow() {
        (StatusCode::OK, "etcd, Docker and nginx have been read\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "etcd, Docker or nginx has not been read yet\n")
    }
}

async fn status(State(shown): State<Shown>) -> impl IntoResponse {
    Json(shown.status.borrow().clone())
}

/// One line of JSON for each event: those that are kept, and with `?follow` those that come.
async fn events(State(shown): State<Shown>, RawQuery(query): RawQuery) -> impl IntoResponse {
    let follow = query.as_deref().is_some_and(|q| q.split('&').any(|part| part == "follow"));
    let (kept, coming) = shown.events.follow();
    let past = stream::iter(kept).map(|event| line(&event));
    let body = if follow {
        let future = stream::unfold((coming, shown.events, shown.end), next);
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
    let mut text = serde_json::to_vec(event).unwrap_or_default();
    text.push(b'\n');
    Bytes::from(text)
}
