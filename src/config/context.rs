//! Contexts: the stores that a person works with from elsewhere, by name.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::{
    ConfigError, bad,
    etcd::{self, EtcdFile, EtcdFlags},
};
use crate::store::client::EtcdConfig;

/// A file of contexts, each a table by its name.
#[derive(Debug, Default, Deserialize)]
#[serde(transparent)]
struct Contexts(BTreeMap<String, ContextFile>);

#[derive(Debug, Deserialize)]
struct ContextFile {
    /// Whether its name is asked for before something is written.
    #[serde(default)]
    confirm: bool,
    #[serde(flatten)]
    etcd: BTreeMap<String, toml::Value>,
}

/// A store.
#[derive(Debug)]
pub struct Context {
    /// Its name.
    pub name: String,
    /// How it is reached.
    pub etcd: EtcdConfig,
    /// Whether its name is asked for before something is written.
    pub confirm: bool,
}

/// Where contexts are, unless `DEMAE_CONTEXTS` names another file.
fn path() -> Option<PathBuf> {
    let var = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    var("DEMAE_CONTEXTS").or_else(|| {
        let config = var("XDG_CONFIG_HOME").or_else(|| Some(var("HOME")?.join(".config")))?;
        Some(config.join("demae/contexts.toml"))
    })
}

/// Reads a context. Nothing of the environment takes part in it but its place.
///
/// # Errors
/// What is wrong, and where; for an unknown name, which ones there are.
pub fn context(name: &str) -> Result<Context, ConfigError> {
    let path = path().ok_or_else(|| bad("context")("there is no `HOME` in which to look for contexts".to_owned()))?;
    let text = std::fs::read_to_string(&path).map_err(|source| ConfigError::Read { path: path.clone(), source })?;
    parse(name, &text, &path)
}

fn parse(name: &str, text: &str, path: &Path) -> Result<Context, ConfigError> {
    let failed = |message: String| ConfigError::Parse { path: path.to_owned(), message: message.trim_end().to_owned() };
    let mut contexts: Contexts = toml::from_str(text).map_err(|e| failed(e.to_string()))?;
    let Some(found) = contexts.0.remove(name) else {
        let known: Vec<&str> = contexts.0.keys().map(String::as_str).collect();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        return Err(failed(format!("there is no context `{}`; these are: {known}", name.escape_debug())));
    };
    let table = toml::Table::from_iter(found.etcd);
    let file: EtcdFile = table.try_into().map_err(|e: toml::de::Error| failed(format!("`{name}`: {}", e.message())))?;
    if file.endpoints.is_empty() {
        return Err(failed(format!("`{name}`: `endpoints` is missing")));
    }
    if file.has_no_password() {
        return Err(failed(format!("`{name}`: `user` needs a `password_file`")));
    }
    let etcd = etcd::config(&EtcdFlags::default(), file)?;
    Ok(Context { name: name.to_owned(), etcd, confirm: found.confirm })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "[prod]\nendpoints = [\"https://etcd1:2379\"]\nprefix = \"/shop\"\nconfirm = true\n\
                        [dev]\nendpoints = [\"127.0.0.1:2379\"]\n[typo]\nendpoint = \"x\"\n\
                        [me]\nendpoints = [\"x:1\"]\nuser = \"me\"\n";

    fn read(name: &str) -> Result<Context, String> {
        parse(name, TEXT, Path::new("contexts.toml")).map_err(|e| e.to_string())
    }

    #[test]
    fn context_is_found_by_its_name() {
        let prod = read("prod").expect("it is there");
        assert_eq!((prod.etcd.endpoints, prod.etcd.prefix.as_str()), (vec!["https://etcd1:2379".to_owned()], "/shop"));
        assert!(prod.confirm && !read("dev").expect("it is there").confirm);
    }

    #[test]
    fn wrong_contexts_are_refused_by_name() {
        let unknown = read("test").expect_err("it is not there");
        assert!(unknown.contains("these are: dev, me, prod, typo"), "{unknown}");
        let typo = read("typo").expect_err("a key is wrong");
        assert!(typo.contains("`typo`") && typo.contains("endpoint"), "{typo}");
        assert!(read("me").expect_err("there is no password").contains("`password_file`"));
    }
}
