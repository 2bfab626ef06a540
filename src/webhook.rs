//! Delivers events to a webhook, by HTTP. It reads the event stream like any other reader, so it cannot block a deploy:
//! a slow or unreachable receiver misses events, which are counted.

use std::{sync::Arc, time::Duration};

use hmac::{Hmac, Mac};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Request, StatusCode, Uri, body::Bytes, header};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use sha2::Sha256;
use tokio::sync::{
    broadcast::{Receiver, error::RecvError},
    mpsc::{self, error::TrySendError},
};
use tokio_util::sync::CancellationToken;

use crate::{
    events::Events,
    metrics::{Delivery, Metrics},
    model::{
        env::Secret,
        event::Event,
        text::{hex, json},
    },
    retry::Retry,
};

/// Timeout of one request.
const ANSWER: Duration = Duration::from_secs(5);
/// Attempts per event, over about a minute.
const ATTEMPTS: u32 = 6;
/// First and longest backoff between two attempts.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// Length of the queue behind the event in flight.
const QUEUE: usize = 1000;
/// How long queued events are still delivered at shutdown: less than the agent waits for its tasks.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(1500);
/// Most of a response body that is read: its content is ignored, but a connection is only reused when it was read.
const MAX_ANSWER: usize = 64 * 1024;

/// The receiver, and the events that it gets.
#[derive(Debug, Clone)]
pub struct WebhookConfig {
    /// Its URL.
    pub url: Uri,
    /// The key of signatures; requests are unsigned without one.
    pub secret: Option<Secret>,
    /// Types of events to deliver.
    pub events: Vec<String>,
}

/// Why the webhook cannot start.
#[derive(Debug, thiserror::Error)]
pub enum WebhookError {
    /// The system's root certificates cannot be read.
    #[error("cannot read this system's certificates, which `webhook.url` needs for https")]
    Roots(#[source] std::io::Error),
}

/// Delivers events until cancelled.
pub struct Webhook {
    config: WebhookConfig,
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    metrics: Arc<Metrics>,
    coming: Receiver<Arc<Event>>,
}

impl Webhook {
    /// Subscribes to events from now on.
    ///
    /// # Errors
    /// If the URL is https and this system has no certificates to check others by.
    pub fn new(config: WebhookConfig, events: &Events, metrics: Arc<Metrics>) -> Result<Self, WebhookError> {
        let builder = HttpsConnectorBuilder::new();
        let connector = if config.url.scheme_str() == Some("https") {
            builder.with_native_roots().map_err(WebhookError::Roots)?
        } else {
            builder.with_tls_config(no_roots())
        };
        let client = Client::builder(TokioExecutor::new()).build(connector.https_or_http().enable_http1().build());
        Ok(Self { config, client, metrics, coming: events.follow().1 })
    }

    /// Delivers events one by one until cancelled; then, for a moment, the queued ones.
    pub async fn run(self, token: CancellationToken) {
        let Self { config, client, metrics, mut coming } = self;
        let (into, waiting) = mpsc::channel(QUEUE);
        let sender = WebhookSender { config: config.clone(), client, metrics: metrics.clone() };
        let filtering = async {
            loop {
                let received = tokio::select! {
                    // Events emitted before the shutdown are delivered.
                    biased;
                    received = coming.recv() => received,
                    () = token.cancelled() => break,
                };
                match received {
                    Ok(event) if !config.events.iter().any(|t| t == event.what.as_str()) => {}
                    Ok(event) => {
                        if let Err(TrySendError::Full(event)) = into.try_send(event) {
                            tracing::warn!("event {} is dropped for the webhook: {QUEUE} events are queued", event.seq);
                            metrics.delivered(Delivery::Dropped, 1);
                        }
                    }
                    Err(RecvError::Lagged(count)) => {
                        tracing::warn!("the webhook missed {count} events of all types");
                        metrics.delivered(Delivery::Dropped, count);
                    }
                    Err(RecvError::Closed) => break,
                }
            }
            // The sender ends after the last event.
            drop(into);
        };
        tokio::join!(filtering, sender.run(waiting, &token));
    }
}

/// Delivers queued events.
struct WebhookSender {
    config: WebhookConfig,
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    metrics: Arc<Metrics>,
}

impl WebhookSender {
    async fn run(&self, mut waiting: mpsc::Receiver<Arc<Event>>, token: &CancellationToken) {
        let until = async {
            token.cancelled().await;
            tokio::time::sleep(SHUTDOWN_TIMEOUT).await;
        };
        tokio::pin!(until);
        let mut under_way = 0;
        loop {
            let sending = async {
                let Some(event) = waiting.recv().await else { return false };
                under_way = 1;
                self.metrics.delivered(self.deliver(&event).await, 1);
                under_way = 0;
                true
            };
            tokio::select! {
                more = sending => {
                    if !more {
                        return;
                    }
                }
                () = &mut until => break,
            }
        }
        let mut left = under_way;
        while waiting.try_recv().is_ok() {
            left += 1;
        }
        if left > 0 {
            tracing::warn!("{left} events were not sent to the webhook: the agent is shutting down");
            self.metrics.delivered(Delivery::Dropped, left);
        }
    }

    async fn deliver(&self, event: &Event) -> Delivery {
        let body = Bytes::from(json(event));
        let mut retry = Retry::new(PAUSES.0, PAUSES.1);
        for attempt in 1..=ATTEMPTS {
            match self.attempt(event, body.clone()).await {
                Ok(()) => return Delivery::Delivered,
                Err((reason, again)) => {
                    tracing::debug!(attempt, "webhook delivery failed: {reason}");
                    if !again || attempt == ATTEMPTS {
                        tracing::warn!(
                            "event {} ({}) was not delivered to the webhook: {reason}",
                            event.seq,
                            event.what.as_str()
                        );
                        return Delivery::Failed;
                    }
                }
            }
            tokio::time::sleep(retry.pause()).await;
        }
        Delivery::Failed
    }

    /// One attempt. On failure: the reason, and whether a retry can help.
    async fn attempt(&self, event: &Event, body: Bytes) -> Result<(), (String, bool)> {
        let mut request = Request::post(self.config.url.clone())
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::USER_AGENT, concat!("demae/", env!("CARGO_PKG_VERSION")))
            .header("x-demae-event", event.what.as_str())
            // The same for each attempt, so the receiver can detect duplicates.
            .header("x-demae-delivery", format!("{}-{}-{}", event.host, event.at.as_millis(), event.seq));
        if let Some(secret) = &self.config.secret {
            request = request.header("x-demae-signature-256", signature(secret, &body));
        }
        let request = request.body(Full::new(body)).map_err(|e| (e.to_string(), false))?;
        let asking = async {
            let answer = self.client.request(request).await.map_err(|e| (crate::model::problem::chain(&e), true))?;
            let status = answer.status();
            // The content does not matter, but the connection is only reused when it was read.
            let _ = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
            let passing = status.is_server_error()
                || matches!(status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS);
            if status.is_success() { Ok(()) } else { Err((format!("answered with status {status}"), passing)) }
        };
        match tokio::time::timeout(ANSWER, asking).await {
            Ok(ended) => ended,
            Err(_) => Err((format!("no answer within {} s", ANSWER.as_secs()), true)),
        }
    }
}

/// `sha256=` and the HMAC-SHA-256 of the body in hexadecimal: the form that GitHub's webhooks made common.
fn signature(secret: &Secret, body: &[u8]) -> String {
    let mac = Hmac::<Sha256>::new_from_slice(secret.expose().as_bytes());
    // HMAC takes keys of any length, so this cannot fail.
    let tag = mac.map(|mac| mac.chain_update(body).finalize().into_bytes());
    format!("sha256={}", tag.map_or_else(|_| String::new(), |tag| hex(&tag)))
}

/// For plain http: there are no certificates to verify.
fn no_roots() -> rustls::ClientConfig {
    let roots = rustls::RootCertStore::empty();
    rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of GitHub's documentation, "Validating webhook deliveries".
    #[test]
    fn signature_matches_the_example_of_github() {
        assert_eq!(
            signature(&Secret::new("It's a Secret to Everybody"), b"Hello, World!"),
            "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
        );
    }
}
