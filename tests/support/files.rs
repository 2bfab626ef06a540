//! Files that a test writes.
#![allow(clippy::disallowed_methods, reason = "a test writes files of its own")]

use std::path::Path;

pub fn write(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap_or_else(|e| panic!("`{}`: {e}", path.display()));
}
