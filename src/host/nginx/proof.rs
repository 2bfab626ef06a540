//! Proves a route: a request to an app through nginx, as a client would send it.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use super::{Nginx, NginxError};
use crate::{
    host::probe,
    model::{
        observed::Address,
        spec::{Endpoint, HealthCheck, Ingress, Probe},
    },
};

/// How long a request to an app through nginx is retried.
const RETRY_PERIOD: Duration = Duration::from_secs(5);
/// After this time nginx has connected to an app, or has answered with an error: `proxy_connect_timeout` of the
/// template is 5 s.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(6);

/// A request to an app through nginx that proves its route.
#[derive(Debug)]
pub struct Proof {
    /// The `Host` header.
    pub host: String,
    /// `GET` of this path.
    pub path: String,
    /// The path that the app receives.
    pub app_path: String,
    /// The endpoint of the app.
    pub endpoint: Endpoint,
    /// Timeout of one request. Longer than nginx takes to find out that it cannot connect.
    pub limit: Duration,
    /// Whether a timeout counts as success: no limit is known for this path.
    pub may_be_slow: bool,
}

impl Proof {
    /// A proof for each ingress of an app.
    pub fn all(ingress: &Ingress, check: &HealthCheck) -> Vec<Self> {
        // The path of the health check is only known to exist at its own endpoint.
        let other = HealthCheck { probe: Probe::Tcp, ..check.clone() };
        let check_of = |way: &Ingress| if way.endpoint == ingress.endpoint { check } else { &other };
        ingress.all().filter_map(|way| Self::of(way, check_of(way))).collect()
    }

    /// Never stricter than the health check: uses its path and limit if it has them, else any path and no limit. `None`
    /// for an app without ingress.
    fn of(ingress: &Ingress, check: &HealthCheck) -> Option<Self> {
        let host = ingress.example_host()?;
        let (asked, may_be_slow) = match &check.probe {
            Probe::Http(path) => (path.as_str(), false),
            _ => ("/", true),
        };
        let (path, app_path, may_be_slow) = match &ingress.path {
            None => (asked.to_owned(), asked, may_be_slow),
            Some(below) if ingress.strip_path => (format!("{below}{asked}"), asked, may_be_slow),
            Some(below) if asked == below.as_str() || asked.starts_with(&format!("{below}/")) => {
                (asked.to_owned(), asked, may_be_slow)
            }
            // The path of the health check is outside of the ingress path.
            Some(below) => (below.to_string(), below.as_str(), true),
        };
        let limit =
            if may_be_slow { CONNECT_TIMEOUT } else { (check.timeout + Duration::from_secs(1)).max(CONNECT_TIMEOUT) };
        let (app_path, endpoint) = (app_path.to_owned(), ingress.endpoint.clone());
        Some(Self { host, path, app_path, endpoint, limit, may_be_slow })
    }
}

/// The status of a request sent straight to the app.
async fn direct_status(proof: &Proof, address: Option<&Address>) -> Option<u16> {
    let (host, path, limit) = (&proof.host, &proof.app_path, proof.limit);
    let answer = match address? {
        Address::Socket(socket) => probe::get_unix(Path::new(socket), host, path, limit).await,
        Address::Port(port) => probe::get_tcp(&format!("127.0.0.1:{port}"), host, path, limit).await,
        Address::Own(own) => probe::get_tcp(&own.to_string(), host, path, limit).await,
    };
    Some(answer.ok()?.status)
}

impl Nginx {
    /// Requests an app through nginx, as a client would, until it answers or the time is over. Any status from the app
    /// will do: its health is probed directly, and a template may have rules in front of it. A 502 or a 504 may come
    /// from nginx or from the app; a direct request to `address` tells which.
    ///
    /// # Errors
    /// [`NginxError::NoAnswer`] if nginx gets no response from the app; any other error is inconclusive.
    pub async fn probe_app(&self, proof: &Proof, address: Option<&Address>) -> Result<(), NginxError> {
        let Proof { host, path, limit, .. } = proof;
        let until = Instant::now() + RETRY_PERIOD;
        // A template may limit the rate of requests.
        let mut pause = Duration::from_millis(10);
        loop {
            let began = Instant::now();
            let error = match probe::get_tcp(&self.config.address, host, path, *limit).await {
                Ok(answer) if answer.unknown_host => {
                    NginxError::Inconclusive(format!("nginx at {} does not know host `{host}`", self.config.address))
                }
                Ok(probe::Answer { status: 502, .. }) if direct_status(proof, address).await == Some(502) => {
                    return Ok(());
                }
                // nginx has connected; its read timeout is shorter than the health check's, or no limit is known.
                Ok(probe::Answer { status: 504, .. })
                    if proof.may_be_slow || direct_status(proof, address).await.is_some() =>
                {
                    return Ok(());
                }
                Ok(answer) if answer.status == 504 => NginxError::Inconclusive(format!(
                    "`GET {path}` for host `{host}` takes longer than nginx waits (status 504)"
                )),
                Ok(answer) if answer.status == 502 => {
                    NginxError::NoAnswer(format!("`GET {path}` for host `{host}` is answered with status 502"))
                }
                Ok(_) => return Ok(()),
                // nginx answers 502 or 504 itself when it cannot connect. So the app has the request and is slow.
                Err(_) if began.elapsed() >= *limit && proof.may_be_slow => return Ok(()),
                Err(e) => NginxError::Inconclusive(format!(
                    "`GET {path}` for host `{host}` through nginx at {}: {e}",
                    self.config.address
                )),
            };
            if Instant::now() >= until {
                // If nginx answers no request at all, nothing is known about the app.
                return Err(match self.serving().await {
                    Ok(_) => error,
                    Err(e) => NginxError::NotRunning(e),
                });
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(500));
        }
    }
}
