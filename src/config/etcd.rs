//! The connection to etcd.

use std::{path::PathBuf, time::Duration};

use serde::Deserialize;

use super::{ConfigError, bad, duration};
use crate::{
    model::env::Secret,
    store::{
        client::{EtcdConfig, Password},
        keys::Prefix,
    },
};

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct EtcdFile {
    pub(super) endpoints: Vec<String>,
    prefix: Option<String>,
    user: Option<String>,
    password_file: Option<PathBuf>,
    cacert: Option<PathBuf>,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    dial_timeout: Option<String>,
    command_timeout: Option<String>,
}

impl EtcdFile {
    /// Whether a user is named without a password.
    pub(super) fn has_no_password(&self) -> bool {
        self.user.as_ref().is_some_and(|user| !user.contains(':')) && self.password_file.is_none()
    }
}

/// The connection to etcd, by the names that etcdctl uses.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Store")]
pub struct EtcdFlags {
    /// Endpoints of etcd
    #[arg(long, env = "ETCDCTL_ENDPOINTS", value_delimiter = ',', value_name = "ENDPOINT,…")]
    pub endpoints: Vec<String>,
    /// User, or user:password
    #[arg(long, env = "ETCDCTL_USER", hide_env_values = true, value_name = "USER")]
    pub user: Option<String>,
    /// Password of the user; better in a file, or in the environment
    #[arg(long, env = "ETCDCTL_PASSWORD", hide_env_values = true, value_name = "PASSWORD")]
    pub password: Option<String>,
    /// CA that signed the members' certificates
    #[arg(long, env = "ETCDCTL_CACERT", value_name = "FILE")]
    pub cacert: Option<PathBuf>,
    /// Client certificate
    #[arg(long, env = "ETCDCTL_CERT", value_name = "FILE")]
    pub cert: Option<PathBuf>,
    /// Key of the client certificate
    #[arg(long, env = "ETCDCTL_KEY", value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// Timeout of a connection
    #[arg(long, env = "ETCDCTL_DIAL_TIMEOUT", value_name = "DURATION")]
    pub dial_timeout: Option<String>,
    /// Timeout of one request
    #[arg(long, env = "ETCDCTL_COMMAND_TIMEOUT", value_name = "DURATION")]
    pub command_timeout: Option<String>,
    /// Prefix of all keys
    #[arg(long, env = "DEMAE_PREFIX", value_name = "PREFIX")]
    pub prefix: Option<String>,
}

/// Between two comparisons with what was written, unless the file says otherwise.
pub(super) const RESYNC: Duration = Duration::from_secs(60);

/// The connection by flags, else by a file, else the default.
pub(super) fn config(flags: &EtcdFlags, file: EtcdFile) -> Result<EtcdConfig, ConfigError> {
    let mut endpoints = if flags.endpoints.is_empty() { file.endpoints } else { flags.endpoints.clone() };
    endpoints.retain(|e| !e.trim().is_empty());
    if endpoints.is_empty() {
        endpoints.push("127.0.0.1:2379".to_owned());
    }
    let user = match flags.user.clone().or(file.user) {
        None => None,
        Some(user) => {
            let (name, inline) = match user.split_once(':') {
                Some((name, password)) => (name.to_owned(), Some(password.to_owned())),
                None => (user, None),
            };
            // Fail early if it is unreadable; it is read again for each connection.
            if let Some(path) = &file.password_file {
                std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.clone(), source })?;
            }
            let given = inline.or_else(|| flags.password.clone()).map(|text| Password::Given(Secret::new(text)));
            let password = given.or(file.password_file.map(Password::File));
            let password = password.ok_or_else(|| {
                bad("user")(format!(
                    "there is no password for `{name}`; set `ETCDCTL_PASSWORD`, or `etcd.password_file` in the file"
                ))
            })?;
            Some((name, password))
        }
    };
    let cert = match (flags.cert.clone().or(file.cert), flags.key.clone().or(file.key)) {
        (Some(cert), Some(key)) => Some((cert, key)),
        (None, None) => None,
        _ => return Err(bad("cert")("`cert` and `key` belong together; one of them is missing".to_owned())),
    };
    let dial = flags.dial_timeout.clone().or(file.dial_timeout);
    let command = flags.command_timeout.clone().or(file.command_timeout);
    Ok(EtcdConfig {
        resync: RESYNC,
        endpoints,
        user,
        cacert: flags.cacert.clone().or(file.cacert),
        cert,
        dial_timeout: duration("dial_timeout", dial.as_deref())?.unwrap_or(Duration::from_secs(2)),
        command_timeout: duration("command_timeout", command.as_deref())?.unwrap_or(Duration::from_secs(5)),
        prefix: Prefix::new(flags.prefix.as_deref().or(file.prefix.as_deref()).unwrap_or("/demae"))
            .map_err(bad("prefix"))?,
    })
}
