//! One question over TLS, for the time that is told with the answer.

use std::{path::Path, time::Duration};

use http_body_util::Empty;
use hyper::{Uri, body::Bytes, header::DATE};
use hyper_rustls::{ConfigBuilderExt as _, HttpsConnectorBuilder};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};

use super::probe::NoAnswer;
use crate::model::problem::chain as causes;

/// Whom to trust, and who asks.
#[derive(Debug, Clone, Copy)]
pub struct Trust<'a> {
    /// The authorities of others; those of this system if there is none.
    pub cacert: Option<&'a Path>,
    /// Our own certificate, and its key.
    pub own: Option<(&'a Path, &'a Path)>,
}

/// The time that is told with the answer to a question, whatever that is.
///
/// # Errors
/// In words, if a file cannot be read, or nobody answers in time.
pub async fn date(uri: Uri, trust: Trust<'_>, within: Duration) -> Result<Option<String>, NoAnswer> {
    let config = config(trust)?;
    let connector = HttpsConnectorBuilder::new().with_tls_config(config).https_only().enable_http1().build();
    let client: Client<_, Empty<Bytes>> = Client::builder(TokioExecutor::new()).build(connector);
    match tokio::time::timeout(within, client.get(uri)).await {
        Err(_) => Err(format!("no answer within {} s", within.as_secs())),
        Ok(Err(e)) => Err(causes(&e)),
        Ok(Ok(answer)) => Ok(answer.headers().get(DATE).and_then(|d| d.to_str().ok()).map(str::to_owned)),
    }
}

fn config(trust: Trust<'_>) -> Result<ClientConfig, NoAnswer> {
    let unreadable = |path: &Path| {
        let path = path.display().to_string();
        move |e: rustls::pki_types::pem::Error| format!("cannot read `{path}`: {e}")
    };
    let builder = match trust.cacert {
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for cert in CertificateDer::pem_file_iter(path).map_err(unreadable(path))? {
                roots.add(cert.map_err(unreadable(path))?).map_err(|e| format!("`{}`: {e}", path.display()))?;
            }
            ClientConfig::builder().with_root_certificates(roots)
        }
        None => ClientConfig::builder()
            .with_native_roots()
            .map_err(|e| format!("cannot read this system's certificates: {e}"))?,
    };
    let Some((cert, key)) = trust.own else { return Ok(builder.with_no_client_auth()) };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(cert).map_err(unreadable(cert))?.collect();
    let chain = chain.map_err(unreadable(cert))?;
    let own = PrivateKeyDer::from_pem_file(key).map_err(unreadable(key))?;
    builder.with_client_auth_cert(chain, own).map_err(|e| e.to_string())
}
