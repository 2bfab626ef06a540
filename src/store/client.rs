//! A connection to one member of etcd.

use std::{path::PathBuf, time::Duration};

use etcd_client::{Certificate, Client, ConnectOptions, Error, Identity, TlsOptions};

use super::keys::Prefix;
use crate::model::{
    env::Secret,
    status::{NAME_TAKEN, StoreBlock},
};

/// Where a password comes from.
#[derive(Debug, Clone)]
pub enum Password {
    /// The environment, or a flag.
    Given(Secret),
    /// A file, read for each connection: it may be changed while an agent runs.
    File(PathBuf),
}

impl Password {
    fn read(&self) -> Result<Secret, StoreError> {
        match self {
            Self::Given(secret) => Ok(secret.clone()),
            Self::File(path) => {
                let failed = |source| StoreError::File { path: path.clone(), source };
                let text = std::fs::read_to_string(path).map_err(failed)?;
                Ok(Secret::new(text.trim_end_matches(['\n', '\r'])))
            }
        }
    }

    /// What to look at if etcd refuses it.
    fn place(&self) -> String {
        match self {
            Self::Given(_) => "check `ETCDCTL_PASSWORD` or the flag; an agent reads it when it starts".to_owned(),
            Self::File(path) => {
                format!("put the right one into `{}`; it is read again at the next connection", path.display())
            }
        }
    }
}

/// How etcd is reached: the names that etcdctl uses.
#[derive(Debug, Clone)]
pub struct EtcdConfig {
    /// How often it is looked whether watches have brought all that was written.
    pub resync: Duration,
    /// Members, `host:port` or URLs.
    pub endpoints: Vec<String>,
    /// User and password, if the store asks for them.
    pub user: Option<(String, Password)>,
    /// The CA that signed the members' certificates.
    pub cacert: Option<PathBuf>,
    /// Our certificate and its key.
    pub cert: Option<(PathBuf, PathBuf)>,
    /// Longest time for a connection.
    pub dial_timeout: Duration,
    /// Longest time for one answer.
    pub command_timeout: Duration,
    /// What all keys begin with.
    pub prefix: Prefix,
}

/// Why etcd could not be read or written. All of these may pass; the caller tries again.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file of the configuration could not be read.
    #[error("cannot read `{}`", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The connection could not be made.
    #[error("cannot connect to etcd at {endpoint}: {reason}")]
    Connect {
        /// Where.
        endpoint: String,
        /// Why.
        reason: String,
    },
    /// A call failed.
    #[error("etcd at {endpoint}: {operation}: {reason}")]
    Call {
        /// Where.
        endpoint: String,
        /// What was asked.
        operation: &'static str,
        /// Why.
        reason: String,
    },
    /// It can be read, and is not trusted.
    #[error("the store is not trusted: {0}")]
    Untrusted(StoreBlock),
    /// What it says could not be kept on disk, so it is not accepted: after a restart the agent would go back behind it.
    #[error("the desired state cannot be kept on disk: {0}")]
    Ledger(String),
    /// The watch ended, or said nothing for too long.
    #[error("etcd at {endpoint}: the watch {reason}")]
    Watch {
        /// Where.
        endpoint: String,
        /// Why.
        reason: String,
    },
}

impl StoreError {
    /// Every kind.
    pub const KINDS: [&'static str; 6] = ["connect", "call", "watch", "file", "doubt", "ledger"];

    /// The error of a watch that gave no sign of life for this long.
    pub(super) fn silent(endpoint: &str, after: Duration) -> Self {
        let reason = format!("gave no sign of life for {} s", after.as_secs());
        Self::Watch { endpoint: endpoint.to_owned(), reason }
    }

    /// True if the user of this connection lacks the rights for it.
    pub fn is_of_rights(&self) -> bool {
        // The client's own error of a refused call is its text, too.
        matches!(self, Self::Call { reason, .. } if reason.contains("permission denied"))
    }

    /// True if etcd has answered that it will not make the call: nothing was written.
    pub fn is_refusal(&self) -> bool {
        // The texts of api/v3rpc/rpctypes/error.go.
        let refusals =
            ["too many operations", "request is too large", "database space exceeded", "duplicate key given"];
        self.is_of_rights()
            || matches!(self, Self::Call { reason, .. } if refusals.iter().any(|text| reason.contains(text)))
    }

    /// True if the store was read and its contents are not trusted. A name that another agent holds says nothing about
    /// them.
    pub fn is_about_contents(&self) -> bool {
        matches!(self, Self::Untrusted(block) if block.kind != NAME_TAKEN)
    }

    /// The kind: a bounded set, for metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::File { .. } => "file",
            Self::Connect { .. } => "connect",
            Self::Call { .. } => "call",
            Self::Watch { .. } => "watch",
            Self::Untrusted(_) => "doubt",
            Self::Ledger(_) => "ledger",
        }
    }
}

/// One member, connected.
#[derive(Clone)]
pub struct Connection {
    /// The client. Cheap to clone.
    pub client: Client,
    /// Which member.
    pub endpoint: String,
}

impl Connection {
    /// Connects to the member whose turn it is. One member at a time: the client of several members fails the calls it
    /// happens to send to a dead one.
    ///
    /// # Errors
    /// If a file cannot be read, or the connection cannot be made.
    pub async fn open(config: &EtcdConfig, turn: usize) -> Result<Self, StoreError> {
        let endpoint = config.endpoints[turn % config.endpoints.len()].clone();
        let mut options = ConnectOptions::new()
            .with_connect_timeout(config.dial_timeout)
            .with_timeout(config.command_timeout)
            // etcd ends connections that ask more often than every 5 s.
            .with_keep_alive(Duration::from_secs(10), Duration::from_secs(5))
            .with_keep_alive_while_idle(true)
            .with_require_leader(true);
        if let Some((user, password)) = &config.user {
            options = options.with_user(user, password.read()?.expose()).with_auto_token_refresh(true);
        }
        if endpoint.starts_with("https://") || (!endpoint.contains("://") && config.cacert.is_some()) {
            let mut tls = match &config.cacert {
                Some(path) => TlsOptions::new().ca_certificate(Certificate::from_pem(pem(path)?)),
                None => TlsOptions::new().with_enabled_roots(),
            };
            if let Some((cert, key)) = &config.cert {
                tls = tls.identity(Identity::from_pem(pem(cert)?, pem(key)?));
            }
            options = options.with_tls(tls);
        }
        match Client::connect([&endpoint], Some(options)).await {
            Ok(client) => Ok(Self { client, endpoint }),
            Err(e) => {
                let mut reason = say(&e);
                if let Some((user, password)) = &config.user
                    && reason.contains("authentication failed")
                {
                    reason = format!("{reason} (user `{user}`: {})", password.place());
                }
                Err(StoreError::Connect { endpoint, reason })
            }
        }
    }

    /// The error of a call to this member.
    pub fn failed(&self, operation: &'static str) -> impl Fn(Error) -> StoreError + use<> {
        let endpoint = self.endpoint.clone();
        move |e| StoreError::Call { endpoint: endpoint.clone(), operation, reason: say(&e) }
    }
}

/// Reads a PEM file. etcd-client takes anything and fails much later, so what is not PEM is refused here.
fn pem(path: &PathBuf) -> Result<Vec<u8>, StoreError> {
    let failed = |source| StoreError::File { path: path.clone(), source };
    let text = std::fs::read(path).map_err(failed)?;
    if !text.starts_with(b"-----BEGIN") && !text.windows(11).any(|w| w == b"\n-----BEGIN") {
        return Err(failed(std::io::Error::other("this is not a PEM file")));
    }
    Ok(text)
}

/// The cause, for people: the client's own text of an error is the debug form of it.
fn say(error: &Error) -> String {
    match error {
        Error::GRpcStatus(status) => {
            let mut text = status.message().to_owned();
            let mut cause = std::error::Error::source(status);
            while let Some(e) = cause {
                let more = e.to_string();
                if !text.contains(&more) {
                    text = if text.is_empty() { more } else { format!("{text}: {more}") };
                }
                cause = e.source();
            }
            if text.is_empty() { status.code().to_string() } else { text }
        }
        other => other.to_string(),
    }
}
