//! Names: values that are safe as an etcd key, a container name, a path and a word in an nginx file.
//!
//! Fields are private and `TryFrom` is the only constructor, so every name is already checked.

use std::{borrow::Borrow, fmt};

use serde::{Deserialize, Serialize};

use super::archive::{Archive, LOADED};

/// Why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind} `{}` is not valid: {rule}", text.escape_debug())]
pub struct NameError {
    kind: &'static str,
    text: String,
    rule: &'static str,
}

/// Longest app, host or set name. Socket paths contain app names, and the kernel limits a path to 107 bytes.
pub const MAX_NAME: usize = 40;

fn is_label(text: &str, max: usize) -> bool {
    let bytes = text.as_bytes();
    !bytes.is_empty()
        && bytes.len() <= max
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
        && bytes[0] != b'-'
        && bytes[bytes.len() - 1] != b'-'
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $rule:expr, $ok:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                let ok: fn(&str) -> bool = $ok;
                if ok(&text) { Ok(Self(text)) } else { Err(NameError { kind: $kind, text, rule: $rule }) }
            }
        }

        impl TryFrom<&str> for $name {
            type Error = NameError;
            fn try_from(text: &str) -> Result<Self, NameError> {
                Self::try_from(text.to_owned())
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
    };
}

name!(
    /// An app: the unit of deployment.
    AppName, "app name",
    "use 1 to 40 of a-z, 0-9 and `-`, with neither end a `-`",
    |t| is_label(t, MAX_NAME)
);
name!(
    /// A host: a machine that runs an agent.
    HostName, "host name",
    "use 1 to 40 of a-z, 0-9 and `-`, with neither end a `-`",
    |t| is_label(t, MAX_NAME)
);
name!(
    /// A set of environment variables.
    SetName, "set name",
    "use 1 to 40 of a-z, 0-9 and `-`, with neither end a `-`",
    |t| is_label(t, MAX_NAME)
);
name!(
    /// The name of an environment variable, as Docker takes it: `discovery.type` is one.
    EnvName, "variable name",
    "use 1 to 255 printable characters without blanks, `=`, `/`, quotes, `#` and `\\`, and not `DEMAE_…`, which demae sets itself",
    |t| {
        let b = t.as_bytes();
        !b.is_empty() && b.len() <= 255
            && b.iter().all(|c| c.is_ascii_graphic() && !b"=/\"'`#\\".contains(c))
            && !t.starts_with("DEMAE_") && t != "." && t != ".."
    }
);
/// How to write a virtual host.
const HOST_RULE: &str = "use a lower-case host name such as `web.example.com`, `*.example.com`, or `*` for all that no other app claims; at most 253 characters, labels at most 63 (international names in their `xn--` form), no wildcard for a whole top-level domain, and neither `demae-proof` as the first label nor anything below `demae.invalid`";

name!(
    /// A host name that nginx serves: exact, with `*.` in front, or `*` for every other host.
    VirtualHost, "virtual host",
    HOST_RULE,
    |t| {
        let rest = t.strip_prefix("*.").unwrap_or(t);
        t == "*" || t.len() <= 253 && rest.split('.').all(|label| is_label(label, 63))
    }
);
name!(
    /// A path below which an app is served, such as `/api`.
    UrlPath, "path",
    "use a path such as `/api` or `/shop/v1`: letters, digits, `.`, `_`, `~` and `-` between slashes, at most 200 characters, without a `/` at the end",
    |t| {
        let fine = |part: &str| {
            !part.is_empty() && part != "." && part != ".."
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._~-".contains(&b))
        };
        t.len() <= 200 && t.strip_prefix('/').is_some_and(|rest| rest.split('/').all(fine))
    }
);
name!(
    /// A full image reference, as `docker pull` takes it, or an archive.
    ImageRef, "image reference",
    "write it as `docker pull` takes it, such as `registry.example.com/web:v42`, at most 255 characters; or as `docker-archive:/path/of/a.tar`, or `docker-archive:https://…/a.tar@sha256:…` with the 64 digits of its sum (`oci-archive:` for an OCI layout)",
    |t| {
        if Archive::is_meant(t) {
            return Archive::parse(t).is_some();
        }
        let b = t.as_bytes();
        !b.is_empty() && b.len() <= 255 && b[0].is_ascii_alphanumeric()
            && b[b.len() - 1].is_ascii_alphanumeric()
            && b.iter().all(|c| c.is_ascii_alphanumeric() || b"._-/:@+".contains(c))
            && !t.contains("//") && !t.contains("..") && !t.starts_with(LOADED)
    }
);
name!(
    /// What a registry calls the content of an image, whatever its tag means.
    ImageDigest, "digest of an image",
    "write it as registries do: `sha256:` and 64 hexadecimal digits",
    |t| t.strip_prefix("sha256:").is_some_and(|hex| {
        hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    })
);
name!(
    /// The name of an nginx template of this host.
    TemplateName, "template name",
    "use 1 to 40 of a-z, 0-9 and `-`, with neither end a `-`",
    |t| is_label(t, MAX_NAME)
);
name!(
    /// The identity of a release: 12 hexadecimal digits.
    ReleaseId, "release",
    "a release is 12 hexadecimal digits",
    |t| t.len() == 12 && t.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
);
name!(
    /// Docker's id of a container: 64 hexadecimal digits.
    ContainerId, "container id",
    "a container id is hexadecimal",
    |t| !t.is_empty() && t.len() <= 64 && t.bytes().all(|b| b.is_ascii_hexdigit())
);

impl ImageRef {
    /// The archive that it names, if it does.
    pub fn archive(&self) -> Option<Archive<'_>> {
        Archive::parse(&self.0)
    }

    /// Whether it can only ever be the same image.
    pub fn is_fixed(&self) -> bool {
        self.archive().map_or(self.0.contains("@sha256:"), |archive| archive.sha256().is_some())
    }

    /// The same image by its digest: the engine looks at that alone, the tag stays for people.
    #[must_use]
    pub fn at(&self, digest: &ImageDigest) -> Self {
        let name = self.0.split_once('@').map_or(self.as_str(), |(name, _)| name);
        Self(format!("{name}@{digest}"))
    }

    /// The same image by its digest, if one is given.
    #[must_use]
    pub fn fixed(&self, digest: Option<&ImageDigest>) -> Self {
        digest.map_or_else(|| self.clone(), |digest| self.at(digest))
    }

    /// The digest that it ends in; `None` if it has none, or names an archive.
    pub fn digest(&self) -> Option<ImageDigest> {
        let (_, digest) = self.0.split_once('@').filter(|_| self.archive().is_none())?;
        ImageDigest::try_from(digest).ok()
    }

    /// Its name with the registry, without tag and digest, as Docker completes it: `docker.io/library/nginx`.
    pub fn repository(&self) -> String {
        let name = self.0.split_once('@').map_or(self.as_str(), |(name, _)| name);
        let tag = name.rfind(':').filter(|colon| !name[*colon..].contains('/'));
        let name = tag.map_or(name, |colon| &name[..colon]);
        // By the rules of the engine, an upper-case letter makes a registry of the first part, too.
        let is_registry = |part: &str| {
            part.contains(['.', ':']) || part == "localhost" || part.bytes().any(|b| b.is_ascii_uppercase())
        };
        let (registry, path) = match name.split_once('/') {
            Some((first, rest)) if is_registry(first) => (first, rest),
            _ => ("docker.io", name),
        };
        let registry = if registry == "index.docker.io" { "docker.io" } else { registry };
        let library = if registry == "docker.io" && !path.contains('/') { "library/" } else { "" };
        format!("{registry}/{library}{path}")
    }

    /// The reference with an explicit tag, as the engine knows it: Docker assumes `latest` if there is neither tag nor digest.
    pub fn tagged(&self) -> String {
        if let Some(archive) = self.archive() {
            return archive.loaded_as();
        }
        let last = self.0.rsplit('/').next().unwrap_or(&self.0);
        if last.contains(':') || last.contains('@') { self.0.clone() } else { format!("{}:latest", self.0) }
    }

    /// The version of the image: its tag, or the beginning of its digest.
    pub fn version(&self) -> &str {
        if let Some(archive) = self.archive() {
            let file = archive.place().rsplit('/').next().unwrap_or_default();
            return archive.name().unwrap_or(file);
        }
        let last = self.0.rsplit('/').next().unwrap_or(&self.0);
        match (last.split_once('@'), last.split_once(':')) {
            (Some((_, digest)), _) => digest.get(..19).unwrap_or(digest),
            (None, Some((_, tag))) => tag,
            (None, None) => "latest",
        }
    }
}

impl ContainerId {
    /// The first 12 digits, as Docker prints ids.
    pub fn short(&self) -> &str {
        self.0.get(..12).unwrap_or(&self.0)
    }
}

impl VirtualHost {
    /// A virtual host of a spec. A live set may hold others, since earlier versions of demae accepted more, and must
    /// stay readable.
    ///
    /// # Errors
    /// If it is no host name, covers a whole top-level domain, or is one of demae's own.
    pub fn from_spec(text: &str) -> Result<Self, NameError> {
        let host = Self::try_from(text)?;
        let rest = text.strip_prefix("*.").unwrap_or(text);
        let reserved = rest == "demae.invalid" || rest.ends_with(".demae.invalid") || rest.starts_with("demae-proof.");
        let fine = text == "*" || !reserved && (rest == text || rest.contains('.'));
        if fine { Ok(host) } else { Err(NameError { kind: "virtual host", text: host.0, rule: HOST_RULE }) }
    }

    /// Whether it matches every host that no other app claims.
    pub fn is_catch_all(&self) -> bool {
        self.0 == "*"
    }

    /// A host name that this virtual host matches: itself, or one under its wildcard.
    pub fn example(&self) -> String {
        match self.0.strip_prefix('*') {
            Some("") => "demae-proof.invalid".to_owned(),
            Some(rest) => format!("demae-proof{rest}"),
            None => self.0.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_version_is_tag_or_digest() {
        let digest = "a".repeat(64);
        for (image, version) in [
            ("web", "latest"),
            ("web:v1", "v1"),
            ("localhost:5000/team/web", "latest"),
            ("localhost:5000/team/web:v2", "v2"),
            (&format!("web:v1@sha256:{digest}"), "sha256:aaaaaaaaaaaa"),
        ] {
            assert_eq!(ImageRef::try_from(image).expect("an image").version(), version);
        }
    }

    #[test]
    fn hostile_text_is_refused_as_name() {
        for bad in ["", "../x", "A", "a/b", "web.", "-a", "a-", "a b", "a\n", "é", "a;b", &"a".repeat(41)] {
            assert!(AppName::try_from(bad).is_err(), "{bad:?} was accepted as an app name");
        }
        for bad in ["a;b", "a }", "x; } server {", "a..b", "*.", "a.*.b", "UPPER.example", "über.example", "a\nb"] {
            assert!(VirtualHost::try_from(bad).is_err(), "{bad:?} was accepted as a virtual host");
        }
        for bad in [
            "*.com",
            "*",
            "*.",
            "generation.demae.invalid",
            "*.demae.invalid",
            "demae.invalid",
            "demae-proof.a.test",
            "*.demae-proof.test",
        ] {
            let taken = VirtualHost::from_spec(bad).is_ok();
            assert_eq!(taken, bad == "*", "{bad:?} as a virtual host");
            let of_before = VirtualHost::try_from(bad).is_ok();
            assert_eq!(of_before, bad != "*.", "{bad:?} in a file of an earlier version");
        }
        for bad in ["", "A=B", "a b", "a/b", "#a", "a\tb", "é", "DEMAE_APP"] {
            assert!(EnvName::try_from(bad).is_err(), "{bad:?} was accepted as a variable name");
        }
        for good in ["1AB", "a-b", "discovery.type", "cluster.name", "a:b", "_"] {
            assert!(EnvName::try_from(good).is_ok(), "{good:?} is a name for Docker");
        }
        for bad in ["", "/", "api", "/api/", "//a", "/a/../b", "/a b", "/a\"b", "/a;b", "/a{1}"] {
            assert!(UrlPath::try_from(bad).is_err(), "{bad:?} was accepted as a path");
        }
        assert!(UrlPath::try_from("/shop/v1.0").is_ok());
        for bad in ["", " web", "web:v1\n", "-web", "web:", "a//b", "../a"] {
            assert!(ImageRef::try_from(bad).is_err(), "{bad:?} was accepted as an image reference");
        }
    }

    #[test]
    fn image_at_a_digest_is_fixed_and_keeps_its_name() {
        let digest = ImageDigest::try_from(format!("sha256:{}", "a".repeat(64))).expect("a digest");
        for image in ["web", "web:v1", "localhost:5000/team/web:v1", "web:v1@sha256:0"] {
            let image = ImageRef::try_from(image).expect("an image");
            let fixed = image.at(&digest);
            assert_eq!((fixed.is_fixed(), fixed.digest()), (true, Some(digest.clone())), "{image}");
            assert_eq!(fixed.repository(), image.repository());
            assert!(
                ImageRef::try_from(fixed.as_str()).is_ok_and(|read| read == fixed && read.tagged() == read.as_str())
            );
        }
        for bad in ["", "sha256:", "sha256:ab", &format!("sha512:{}", "a".repeat(64)), &digest.as_str().to_uppercase()]
        {
            assert!(ImageDigest::try_from(bad).is_err(), "{bad:?} was accepted as a digest");
        }
        let archive = format!("docker-archive:https://a.test/web.tar@{digest}");
        assert_eq!(ImageRef::try_from(archive).expect("an archive").digest(), None);
    }

    #[test]
    fn image_without_tag_is_latest() {
        let tagged = |t: &str| ImageRef::try_from(t).map(|i| i.tagged());
        assert_eq!(tagged("web"), Ok("web:latest".into()));
        assert_eq!(tagged("localhost:5000/web"), Ok("localhost:5000/web:latest".into()));
        assert_eq!(tagged("localhost:5000/web:v1"), Ok("localhost:5000/web:v1".into()));
    }
}
