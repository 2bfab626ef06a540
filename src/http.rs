//! The agent's one HTTP listener: metrics, health, status.

use std::{net::SocketAddr, sync::Arc};

use axum::{
    Json, Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::IntoResponse,
    routing::get,
};
use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::CancellationToken;

use crate::{
    metrics::Metrics,
    model::{status::HostStatus, time::Timestamp},
};

/// The loop must have gone round within this time for the agent to be alive.
const ALIVE: std::time::Duration = std::time::Duration::from_secs(30);

/// What the listener shows.
#[derive(Debug, Clone)]
pub struct Shown {
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// Status of host and apps.
    pub status: watch::Receiver<HostStatus>,
    /// When the loop last went round.
    pub pulse: watch::Receiver<Timestamp>,
    /// Whether etcd and Docker have been read.
    pub ready: watch::Receiver<bool>,
}

/// Serves until cancelled.
///
/// # Errors
/// If the listener breaks.
pub async fn serve(listener: TcpListener, shown: Shown, token: CancellationToken) -> std::io::Result<()> {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/status", get(status))
        .with_state(shown);
    axum::serve(listener, router).with_graceful_shutdown(token.cancelled_owned()).await
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
    let synced = shown.status.borrow().store.synced;
    shown.metrics.set_sync_age(synced.map(|at| Timestamp::now().since(at)));
    match shown.metrics.render() {
        Ok(text) => ([(CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(e) => (StatusCode::INTERNAL_SERVER_ERROR, e.to_string()).into_response(),
    }
}

async fn healthz(State(shown): State<Shown>) -> impl IntoResponse {
    let age = Timestamp::now().since(*shown.pulse.borrow());
    if age <= ALIVE {
        (StatusCode::OK, "alive\n".to_owned())
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, format!("the loop has not gone round for {} s\n", age.as_secs()))
    }
}

async fn readyz(State(shown): State<Shown>) -> impl IntoResponse {
    if *shown.ready.borrow() {
        (StatusCode::OK, "etcd and Docker have been read\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "etcd or Docker has not been read yet\n")
    }
}

async fn status(State(shown): State<Shown>) -> impl IntoResponse {
    Json(shown.status.borrow().clone())
}
