//! Environment variables: secret values, and the text of an env-file.

use std::{collections::BTreeMap, fmt};

use super::name::EnvName;

/// A secret value: its `Debug` prints stars.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Secret(String);

impl Secret {
    /// Wraps a value.
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// The value itself. Only for passing it to a container.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Longest `NAME=value`, in bytes: the kernel's `MAX_ARG_STRLEN` of 32 pages less the final NUL. A process with a
/// longer one cannot be started, and Docker does not report that.
pub const MAX_VARIABLE: usize = 131_071;
/// Largest environment in bytes. The kernel takes a quarter of the stack limit (2 MiB by default) for arguments and
/// environment together; half a MiB leaves room on any host.
pub const MAX_ENVIRONMENT: usize = 512 * 1024;

/// Checks a value of an environment variable.
///
/// # Errors
/// One sentence that does not contain the value.
pub fn check_value(name: &str, value: &str) -> Result<(), String> {
    if value.contains('\0') {
        return Err("the value contains a NUL byte, which no environment can carry".into());
    }
    let length = name.len() + 1 + value.len();
    if length > MAX_VARIABLE {
        return Err(format!("the variable has {length} bytes; the kernel takes at most {MAX_VARIABLE}"));
    }
    Ok(())
}

/// Checks the size of a whole environment.
///
/// # Errors
/// One sentence with the size and the limit.
pub fn check_total(env: &BTreeMap<EnvName, Secret>) -> Result<(), String> {
    let total: usize = env.iter().map(|(k, v)| k.as_str().len() + v.expose().len() + 2).sum();
    if total > MAX_ENVIRONMENT {
        return Err(format!("the environment has {total} bytes; at most {MAX_ENVIRONMENT} can be handed to a process"));
    }
    Ok(())
}

/// The text of an env-file, as `docker run --env-file` reads it: `NAME=value`, all literal.
///
/// What the format cannot carry (a line break, a trailing CR, a line over 64 KiB) is left out and marked by a comment,
/// never changed; the container still gets it, through the API.
pub fn env_file<'a>(variables: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let mut text = String::new();
    for (name, value) in variables {
        let why = if value.contains(['\n', '\r']) {
            Some("it has a line break")
        } else if name.len() + value.len() >= 64 * 1024 - 1 {
            Some("it is longer than 64 KiB")
        } else {
            None
        };
        match why {
            Some(why) => {
                text.push_str(&format!("# {name} cannot be written to an env-file ({why}); the container has it\n"));
            }
            None => text.push_str(&format!("{name}={value}\n")),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_of_secret_prints_stars() {
        assert_eq!(format!("{:?}", Secret::new("hunter2")), "***");
    }

    #[test]
    fn env_file_is_literal_and_marks_unsupported_values() {
        let text = env_file([("A", "\"q\" $x #y "), ("PEM", "a\nb"), ("EMPTY", "")]);
        assert_eq!(
            text,
            "A=\"q\" $x #y \n# PEM cannot be written to an env-file (it has a line break); the container has it\nEMPTY=\n"
        );
    }
}
