//! Expiry dates of certificates.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use x509_cert::{Certificate, der::DecodePem as _};

use super::files;
use crate::model::time::Timestamp;

/// Why the expiry of a certificate is unknown.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// The file cannot be read.
    #[error("cannot read the certificate `{}`", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is not a certificate.
    #[error("`{}` does not begin with a certificate in PEM: {reason}", path.display())]
    Parse {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

/// The expiry of the first certificate in a file, the leaf; the rest is its chain.
///
/// # Errors
/// If the file cannot be read, or does not begin with a certificate.
pub fn expiry(path: &Path) -> Result<Timestamp, CertificateError> {
    let text = fs::read(path).map_err(|source| CertificateError::Read { path: path.to_owned(), source })?;
    let failed = |reason: String| CertificateError::Parse { path: path.to_owned(), reason };
    let text = String::from_utf8(text).map_err(|e| failed(e.to_string()))?;
    let begin = text.find("-----BEGIN CERTIFICATE-----").ok_or_else(|| failed("there is none".to_owned()))?;
    let end = "-----END CERTIFICATE-----";
    let length = text[begin..].find(end).ok_or_else(|| failed("it is truncated".to_owned()))? + end.len();
    let certificate = Certificate::from_pem(&text[begin..begin + length]).map_err(|e| failed(e.to_string()))?;
    let until = certificate.tbs_certificate().validity().not_after.to_unix_duration();
    Ok(Timestamp::from_millis(i64::try_from(until.as_millis()).unwrap_or(i64::MAX)))
}

/// Certificates in `ssl_certificate` directives of a directory. Paths with variables are unknown until a request.
pub fn in_nginx_files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    // Certificates of files that cannot be read go unwatched, which loses a metric.
    for name in files::list(dir).into_iter().flatten() {
        if !name.ends_with(".conf") {
            continue;
        }
        let Ok(text) = fs::read_to_string(dir.join(&name)) else { continue };
        let values = text.lines().filter_map(|l| l.trim().strip_prefix("ssl_certificate "));
        let paths = values.map(|v| v.trim().trim_end_matches(';').trim_matches(['"', '\'']));
        found.extend(paths.filter(|p| p.starts_with('/') && !p.contains('$')).map(PathBuf::from));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made by `openssl req -x509 -newkey ed25519 -days 36500 -subj /CN=demae.test`; its key was thrown away.
    const PEM: &str = include_str!("../../tests/golden/certificate.pem");

    #[test]
    #[expect(clippy::disallowed_methods, reason = "files of a test")]
    fn expiry_is_that_of_the_first_certificate() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("web.pem");
        fs::write(&path, format!("-----BEGIN X-----\n-----END X-----\n{PEM}{PEM}")).expect("a file");
        let at = expiry(&path).expect("a certificate");
        assert!(at > Timestamp::parse("2100-01-01T00:00:00Z").expect("a time"), "{at}");
        for bad in
            ["", "-----BEGIN CERTIFICATE-----\n", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
        {
            fs::write(&path, bad).expect("a file");
            assert!(expiry(&path).is_err(), "{bad:?}");
        }
        assert!(expiry(Path::new("/nonexistent")).is_err());
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "files of a test")]
    fn certificates_are_found_in_nginx_files() {
        let dir = tempfile::tempdir().expect("a directory");
        let text = "server {\n  ssl_certificate /a.pem;\n  ssl_certificate_key /a.key;\n  ssl_certificate \"/b.pem\";\n  ssl_certificate /c/$host.pem;\n}\n";
        fs::write(dir.path().join("app-web.conf"), text).expect("a file");
        fs::write(dir.path().join("manifest.json"), "ssl_certificate /d.pem;").expect("a file");
        assert_eq!(in_nginx_files(dir.path()), [PathBuf::from("/a.pem"), PathBuf::from("/b.pem")]);
    }
}
