//! Images in files, in place of a registry: how a spec names them.

use std::fmt;

use sha2::{Digest as _, Sha256};

use super::text::hex;

/// An image in a file, as `docker-archive:/srv/images/web-42.tar.gz` or
/// `oci-archive:https://builds.example.com/web-42.tar@sha256:<64 digits>#web:42`. The names of the formats are those of
/// containers-transports(5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Archive<'a> {
    format: Format,
    place: &'a str,
    sha256: Option<&'a str>,
    name: Option<&'a str>,
}

/// The format of an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// What `docker save` writes.
    Docker,
    /// A tar of an OCI image layout.
    Oci,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Docker => "docker-archive",
            Self::Oci => "oci-archive",
        })
    }
}

/// How names of loaded images begin. No image of a registry may have such a name.
pub const LOADED: &str = "demae.local/";

/// Longest text: addresses with a signature are long.
const MOST: usize = 1024;

impl<'a> Archive<'a> {
    /// Whether a text is meant to name an archive.
    pub fn is_meant(text: &str) -> bool {
        Format::of(text).is_some()
    }

    /// Parses a text; `None` if it is none.
    pub fn parse(text: &'a str) -> Option<Self> {
        let (format, rest) = Format::of(text)?;
        let fine = |b: u8| b.is_ascii_alphanumeric() || b"-._~:/?&=%+,@!#".contains(&b);
        if text.len() > MOST || !text.bytes().all(fine) {
            return None;
        }
        let (rest, name) = match rest.split_once('#') {
            Some((rest, name)) => (rest, Some(name)),
            None => (rest, None),
        };
        let (place, sha256) = match rest.split_once("@sha256:") {
            Some((place, sum)) => (place, Some(sum)),
            None => (rest, None),
        };
        let is_sum =
            |sum: &str| sum.len() == 64 && sum.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        let is_path = place.starts_with('/')
            && !place.ends_with('/')
            && place[1..].split('/').all(|part| !matches!(part, "" | "." | ".."));
        let is_name = |name: &str| !name.is_empty() && !name.contains(['#', '?', '&', '=', '%', ',', '!']);
        // A login in an address would be readable in the store.
        let is_url = place.split_once("://").is_some_and(|(scheme, rest)| {
            let letters = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+.-".contains(&b);
            !scheme.is_empty() && scheme.bytes().all(letters) && rest.len() > 1 && !rest.contains('@') && is_plain(rest)
        });
        let is_pinned = sha256.is_some() || is_path;
        let fine = (is_path || is_url) && is_pinned && sha256.is_none_or(is_sum) && name.is_none_or(is_name);
        fine.then_some(Self { format, place, sha256, name })
    }

    /// The name that its image has in the engine of a host: one of demae's own, different for each text. So what was loaded
    /// from another place is not taken for it.
    pub fn loaded_as(&self) -> String {
        let Self { format, place, sha256, name } = self;
        let text = format!("{format}\0{place}\0{}\0{}", sha256.unwrap_or_default(), name.unwrap_or_default());
        format!("{LOADED}archive:{}", &hex(&Sha256::digest(text))[..32])
    }

    /// Its format, as it was named.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Its path on the host, or its address.
    pub fn place(&self) -> &'a str {
        self.place
    }

    /// The scheme of its address; `None` for a path.
    pub fn scheme(&self) -> Option<&'a str> {
        self.place.split_once("://").map(|(scheme, _)| scheme)
    }

    /// The SHA-256 of the file, in hexadecimal. An address always has one.
    pub fn sha256(&self) -> Option<&'a str> {
        self.sha256
    }

    /// Which of several images in it is meant.
    pub fn name(&self) -> Option<&'a str> {
        self.name
    }
}

/// Whether an address has no parts by which it leads out of a directory that a policy names.
fn is_plain(rest: &str) -> bool {
    let lower = rest.to_ascii_lowercase();
    let path = lower.split('?').next().unwrap_or_default();
    !path.contains("%2e") && !path.contains("%2f") && !path.split('/').any(|part| matches!(part, "" | "." | ".."))
}

impl Format {
    fn of(text: &str) -> Option<(Self, &str)> {
        let docker = text.strip_prefix("docker-archive:").map(|rest| (Self::Docker, rest));
        docker.or_else(|| text.strip_prefix("oci-archive:").map(|rest| (Self::Oci, rest)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_a_place_a_sum_and_a_name() {
        let sum = "0123456789abcdef".repeat(4);
        let url = format!("oci-archive:https://builds.example.com/web.tar@sha256:{sum}#web:42");
        let found = Archive::parse(&url).expect("an archive");
        assert_eq!(found.place(), "https://builds.example.com/web.tar");
        assert_eq!((found.format(), found.scheme()), (Format::Oci, Some("https")));
        assert_eq!((found.sha256(), found.name()), (Some(sum.as_str()), Some("web:42")));
        let found = Archive::parse("docker-archive:/srv/images/web-42.tar.gz").expect("an archive");
        assert_eq!((found.place(), found.scheme(), found.sha256()), ("/srv/images/web-42.tar.gz", None, None));
        for bad in [
            "docker-archive:web.tar",
            "docker-archive:/srv/../etc/x.tar",
            "docker-archive:/srv/",
            "docker-archive:https://builds.example.com/web.tar",
            &format!("docker-archive:https://user:secret@builds.example.com/web.tar@sha256:{sum}"),
            &format!("docker-archive:/srv/web.tar@sha256:{}", &sum[1..]),
            "docker-archive:/srv/web.tar#",
            &format!("docker-archive:https://builds.example.com/web/../web.tar@sha256:{sum}"),
            &format!("docker-archive:https://builds.example.com/web/%2E%2E/web.tar@sha256:{sum}"),
            "docker-archive:/srv/a b.tar",
            "docker-archive:",
        ] {
            assert!(Archive::parse(bad).is_none() && Archive::is_meant(bad), "{bad}");
        }
        assert!(!Archive::is_meant("registry.example.com/docker-archive:v1"));
    }
}
