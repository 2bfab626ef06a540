//! Tells events to somebody elsewhere, by HTTP. It follows the events as any other reader does, so whatever happens
//! here costs a deploy nothing: who is slow or away misses events, and that is counted.

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
    model::{env::Secret, event::Event, text::hex},
    retry::Retry,
};

/// Longest wait for one answer.
const ANSWER: Duration = Duration::from_secs(5);
/// How often one event is tried, over about a minute.
const ATTEMPTS: u32 = 6;
/// Between two attempts, at first and at most.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// How many events wait behind the one that is tried.
const QUEUE: usize = 1000;
/// How long what waits is told when the agent ends: less than the agent waits for its last words.
const LAST_WORDS: Duration = Duration::from_millis(1500);
/// Most of an answer that is read: nothing of it is needed, but a connection is used again only when it was.
const MAX_ANSWER: usize = 64 * 1024;

/// Whom to tell, and of what.
#[derive(Debug, Clone)]
pub struct WebhookConfig {
    /// Where.
    pub url: Uri,
    /// What signatures are made with; nothing is signed without.
    pub secret: Option<Secret>,
    /// Types of events.
    pub events: Vec<String>,
}

/// Why there is no webhook.
#[derive(Debug, thiserror::Error)]
pub enum WebhookError {
    /// The certificates of this system, which others' are checked by, cannot be read.
    #[error("cannot read this system's certificates, which `webhook.url` needs for https")]
    Roots(#[source] std::io::Error),
}

/// Tells events until cancelled.
pub struct Webhook {
    config: WebhookConfig,
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    metrics: Arc<Metrics>,
    coming: Receiver<Arc<Event>>,
}

impl Webhook {
    /// Follows events from now on.
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

    /// Tells events, one after the other, until cancelled; then for a moment those that wait.
    pub async fn run(self, token: CancellationToken) {
        let Self { config, client, metrics, mut coming } = self;
        let (into, waiting) = mpsc::channel(QUEUE);
        let teller = Teller { config: config.clone(), client, metrics: metrics.clone() };
        let choosing = async {
            loop {
                let received = tokio::select! {
                    // What was told before the end is told.
                    biased;
                    received = coming.recv() => received,
                    () = token.cancelled() => break,
                };
                match received {
                    Ok(event) if !config.events.iter().any(|t| t == event.what.as_str()) => {}
                    Ok(event) => {
                        if let Err(TrySendError::Full(event)) = into.try_send(event) {
                            tracing::warn!("event {} is not told to the webhook: {QUEUE} others wait", event.seq);
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
            // The teller ends when it has told the last one.
            drop(into);
        };
        tokio::join!(choosing, teller.run(waiting, &token));
    }
}

/// Tells what it is given.
struct Teller {
    config: WebhookConfig,
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    metrics: Arc<Metrics>,
}

impl Teller {
    async fn run(&self, mut waiting: mpsc::Receiver<Arc<Event>>, token: &CancellationToken) {
        let until = async {
            token.cancelled().await;
            tokio::time::sleep(LAST_WORDS).await;
        };
        tokio::pin!(until);
        let mut under_way = 0;
        loop {
            let telling = async {
                let Some(event) = waiting.recv().await else { return false };
                under_way = 1;
                self.metrics.delivered(self.deliver(&event).await, 1);
                under_way = 0;
                true
            };
            tokio::select! {
                more = telling => {
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
            tracing::warn!("{left} events are not told to the webhook: the agent ends");
            self.metrics.delivered(Delivery::Dropped, left);
        }
    }

    async fn deliver(&self, event: &Event) -> Delivery {
        let body = Bytes::from(serde_json::to_vec(event).unwrap_or_default());
        let mut retry = Retry::new(PAUSES.0, PAUSES.1);
        for attempt in 1..=ATTEMPTS {
            match self.attempt(event, body.clone()).await {
                Ok(()) => return Delivery::Delivered,
                Err((reason, again)) => {
                    tracing::debug!(attempt, "the webhook was not told: {reason}");
                    if !again || attempt == ATTEMPTS {
                        tracing::warn!(
                            "event {} ({}) was not told to the webhook: {reason}",
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

    /// One attempt; the reason if it failed, and whether another one can help.
    async fn attempt(&self, event: &Event, body: Bytes) -> Result<(), (String, bool)> {
        let mut request = Request::post(self.config.url.clone())
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::USER_AGENT, concat!("demae/", env!("CARGO_PKG_VERSION")))
            .header("x-demae-event", event.what.as_str())
            // The same for each attempt, so that whoever is told twice can see it.
            .header("x-demae-delivery", format!("{}-{}-{}", event.host, event.at.as_millis(), event.seq));
        if let Some(secret) = &self.config.secret {
            request = request.header("x-demae-signature-256", signature(secret, &body));
        }
        let request = request.body(Full::new(body)).map_err(|e| (e.to_string(), false))?;
        let asking = async {
            let answer = self.client.request(request).await.map_err(|e| (crate::model::problem::chain(&e), true))?;
            let status = answer.status();
            // What is said does not matter; whether it was said decides over the connection.
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
    // HMAC takes keys of any length, so there is always one.
    let tag = mac.map(|mac| mac.chain_update(body).finalize().into_bytes());
    format!("sha256={}", tag.map(|tag| hex(&tag)).unwrap_or_default())
}

/// For plain http: nothing is checked, since nothing is encrypted.
fn no_roots() -> rustls::ClientConfig {
    let roots = rustls::RootCertStore::empty();
    rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of GitHub's documentation, "Validating webhook deliveries".
    #[test]
    fn signatures_are_those_that_receivers_know() {
        assert_eq!(
            signature(&Secret::new("It's a Secret to Everybody"), b"Hello, World!"),
            "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
        );
    }
}
