//! Until when certificates are good.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use x509_cert::{Certificate, der::DecodePem as _};

use super::files;
use crate::model::time::Timestamp;

/// Why the end of a certificate is not known.
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
    /// It is no certificate.
    #[error("`{}` does not begin with a certificate in PEM: {reason}", path.display())]
    Parse {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

/// When the certificate of a file expires: the first one, which is the server's or client's own; what follows are those
/// that vouch for it.
///
/// # Errors
/// If the file cannot be read, or does not begin with a certificate.
pub fn expiry(path: &Path) -> Result<Timestamp, CertificateError> {
    let text = fs::read(path).map_err(|source| CertificateError::Read { path: path.to_owned(), source })?;
    let failed = |reason: String| CertificateError::Parse { path: path.to_owned(), reason };
    let text = String::from_utf8(text).map_err(|e| failed(e.to_string()))?;
    let begin = text.find("-----BEGIN CERTIFICATE-----").ok_or_else(|| failed("there is none".to_owned()))?;
    let end = "-----END CERTIFICATE-----";
    let length = text[begin..].find(end).ok_or_else(|| failed("it is cut".to_owned()))? + end.len();
    let certificate = Certificate::from_pem(&text[begin..begin + length]).map_err(|e| failed(e.to_string()))?;
    let until = certificate.tbs_certificate().validity().not_after.to_unix_duration();
    Ok(Timestamp::from_millis(i64::try_from(until.as_millis()).unwrap_or(i64::MAX)))
}

/// Certificates that nginx files of a directory name. Paths with variables are made at each request, and not known.
pub fn named_in(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for name in files::list(dir).unwrap_or_default() {
        if !name.ends_with(".conf") {
            continue;
        }
        let text = fs::read_to_string(dir.join(&name)).unwrap_or_default();
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
    fn the_first_certificate_of_a_file_counts() {
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
    fn nginx_files_name_certificates() {
        let dir = tempfile::tempdir().expect("a directory");
        let text = "server {\n  ssl_certificate /a.pem;\n  ssl_certificate_key /a.key;\n  ssl_certificate \"/b.pem\";\n  ssl_certificate /c/$host.pem;\n}\n";
        fs::write(dir.path().join("app-web.conf"), text).expect("a file");
        fs::write(dir.path().join("manifest.json"), "ssl_certificate /d.pem;").expect("a file");
        assert_eq!(named_in(dir.path()), [PathBuf::from("/a.pem"), PathBuf::from("/b.pem")]);
    }
}
