//! A request over TLS, for the `Date` header of the response.

use std::{path::Path, time::Duration};

use http_body_util::Empty;
use hyper::{Uri, body::Bytes, header::DATE};
use hyper_rustls::{ConfigBuilderExt as _, HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};

use super::probe::NoAnswer;
use crate::model::problem::chain as causes;

/// The certificates of a TLS client.
#[derive(Debug, Clone, Copy)]
pub struct ClientCertificates<'a> {
    /// The CA bundle; the system's if `None`.
    pub cacert: Option<&'a Path>,
    /// The client certificate, and its key.
    pub client: Option<(&'a Path, &'a Path)>,
}

/// The `Date` header of the response to a request, whatever its status.
///
/// # Errors
/// If a file cannot be read, or there is no response in time.
pub async fn date(
    uri: Uri,
    certificates: ClientCertificates<'_>,
    within: Duration,
) -> Result<Option<String>, NoAnswer> {
    let config = config(certificates)?;
    let connector = HttpsConnectorBuilder::new().with_tls_config(config).https_only().enable_http1().build();
    let client: Client<_, Empty<Bytes>> = Client::builder(TokioExecutor::new()).build(connector);
    match tokio::time::timeout(within, client.get(uri)).await {
        Err(_) => Err(format!("no answer within {} s", within.as_secs())),
        Ok(Err(e)) => Err(causes(&e)),
        Ok(Ok(answer)) => Ok(answer.headers().get(DATE).and_then(|d| d.to_str().ok()).map(str::to_owned)),
    }
}

/// A client for http and https, with this system's certificates. Without any, no server's certificate is valid.
pub fn client() -> Client<HttpsConnector<HttpConnector>, Empty<Bytes>> {
    let roots = ClientConfig::builder().with_native_roots();
    let config = roots.unwrap_or_else(|_| ClientConfig::builder().with_root_certificates(RootCertStore::empty()));
    let connector = HttpsConnectorBuilder::new().with_tls_config(config.with_no_client_auth());
    Client::builder(TokioExecutor::new()).build(connector.https_or_http().enable_http1().build())
}

fn config(certificates: ClientCertificates<'_>) -> Result<ClientConfig, NoAnswer> {
    let unreadable = |path: &Path| {
        let path = path.display().to_string();
        move |e: rustls::pki_types::pem::Error| format!("cannot read `{path}`: {e}")
    };
    let builder = match certificates.cacert {
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
    let Some((cert, key)) = certificates.client else { return Ok(builder.with_no_client_auth()) };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(cert).map_err(unreadable(cert))?.collect();
    let chain = chain.map_err(unreadable(cert))?;
    let client = PrivateKeyDer::from_pem_file(key).map_err(unreadable(key))?;
    builder.with_client_auth_cert(chain, client).map_err(|e| e.to_string())
}
