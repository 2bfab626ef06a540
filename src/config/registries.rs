//! Images: `[images]`, `[[registry]]`, and where Docker's own logins are.

use std::path::PathBuf;

use serde::Deserialize;

use super::{ConfigError, bad, duration};
use crate::host::{
    archive::Fetchers,
    images::Limits,
    registry::{Registry, Source},
};

/// One `[[registry]]`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RegistryFile {
    host: String,
    helper: Option<String>,
    username: Option<String>,
    password_file: Option<PathBuf>,
}

/// `[images]`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct ImagesFile {
    clean_above: Option<u8>,
    clean_to: Option<u8>,
    refuse_above: Option<u8>,
    keep_for: Option<String>,
}

/// Checks the limits.
pub(super) fn images(file: &ImagesFile) -> Result<Limits, ConfigError> {
    let default = Limits::default();
    let clean_above = file.clean_above.unwrap_or(default.clean_above);
    let clean_to = file.clean_to.unwrap_or(default.clean_to.min(clean_above));
    if clean_above > 100 || clean_to > clean_above {
        return Err(bad("images")(format!(
            "`clean_above = {clean_above}` and `clean_to = {clean_to}` are no percentages of a disk, the second one not above the first"
        )));
    }
    let refuse_above = file.refuse_above.unwrap_or(default.refuse_above);
    let keep_for = duration("images.keep_for", file.keep_for.as_deref())?.unwrap_or(default.keep_for);
    Ok(Limits { clean_above, clean_to, refuse_above, keep_for })
}

/// Checks the programs.
pub(super) fn fetchers(fetchers: Fetchers) -> Result<Fetchers, ConfigError> {
    for (scheme, words) in &fetchers {
        if words.first().is_none_or(|program| !program.starts_with('/')) {
            return Err(bad("fetch")(format!("`{scheme}` needs the path of a program as its first word")));
        }
        let has = |part: &str| words.iter().any(|word| word.contains(part));
        if !has("{url}") || !has("{file}") {
            return Err(bad("fetch")(format!("`{scheme}` needs words with `{{url}}` and `{{file}}`")));
        }
    }
    Ok(fetchers)
}

/// Checks the list.
pub(super) fn registries(files: Vec<RegistryFile>) -> Result<Vec<Registry>, ConfigError> {
    let mut registries: Vec<Registry> = Vec::new();
    for file in files {
        let registry = registry(file)?;
        if registries.iter().any(|known| known.host == registry.host) {
            return Err(bad("registry")(format!("`{}` is there twice", registry.host)));
        }
        registries.push(registry);
    }
    Ok(registries)
}

fn registry(file: RegistryFile) -> Result<Registry, ConfigError> {
    let RegistryFile { host, helper, username, password_file } = file;
    if host.is_empty() || host.contains('/') {
        return Err(bad("registry.host")(format!(
            "`{host}` is not a registry; write it as images do, such as `registry.example.com:5000`, or `docker.io`"
        )));
    }
    let source = match (helper, username, password_file) {
        (Some(helper), None, None) => Source::Helper(helper),
        (None, Some(username), Some(file)) if file.is_absolute() => Source::Password { username, file },
        (None, Some(_), Some(file)) => {
            return Err(bad("registry.password_file")(format!("`{}` is not an absolute path", file.display())));
        }
        _ => {
            return Err(bad("registry")(format!(
                "`{host}` needs a `helper`, or a `username` and a `password_file`; not both"
            )));
        }
    };
    Ok(Registry { host, source })
}

/// Docker's `config.json`: the configured one, or that of this user, as the docker command finds it.
pub(super) fn docker_config(configured: Option<PathBuf>) -> Result<Option<PathBuf>, ConfigError> {
    match configured {
        Some(path) if path.is_absolute() => Ok(Some(path)),
        Some(path) => Err(bad("docker.config")(format!("`{}` is not an absolute path", path.display()))),
        None => {
            let own = std::env::var_os("DOCKER_CONFIG").map(PathBuf::from);
            let own = own.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".docker")));
            Ok(own.map(|dir| dir.join("config.json")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<Registry>, String> {
        #[derive(Deserialize)]
        struct File {
            registry: Vec<RegistryFile>,
        }
        let file: File = toml::from_str(text).map_err(|e| e.to_string())?;
        registries(file.registry).map_err(|e| e.to_string())
    }

    #[test]
    fn a_registry_has_one_kind_of_login() {
        let good = read(
            "[[registry]]\nhost = 'a.example'\nhelper = 'ecr-login'\n\
                         [[registry]]\nhost = 'docker.io'\nusername = 'pull'\npassword_file = '/etc/demae/hub'\n",
        );
        let good = good.expect("they are valid");
        assert_eq!(good[0].source, Source::Helper("ecr-login".to_owned()));
        for (text, part) in [
            ("host = 'a/b'\nhelper = 'x'", "`a/b` is not a registry"),
            ("host = 'a'", "needs a `helper`"),
            ("host = 'a'\nhelper = 'x'\nusername = 'b'", "not both"),
            ("host = 'a'\nusername = 'b'\npassword_file = 'c'", "not an absolute path"),
            ("host = 'a'\nhelper = 'x'\n[[registry]]\nhost = 'a'\nhelper = 'x'", "twice"),
            ("host = 'a'\nhelpers = 'x'", "unknown field"),
        ] {
            let message = read(&format!("[[registry]]\n{text}\n")).expect_err(text);
            assert!(message.contains(part), "{message}");
        }
    }
}
