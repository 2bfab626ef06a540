//! Files that a test writes.
#![allow(clippy::disallowed_methods, reason = "a test writes files of its own")]

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::names::random;

pub fn write(path: &Path, text: &str) {
    fs::write(path, text).unwrap_or_else(|e| panic!("`{}`: {e}", path.display()));
}

/// A directory that apps may mount, with one in it; removed with the test.
pub struct Place(pub PathBuf);

impl Place {
    pub fn new() -> Self {
        let dir = Path::new("/srv").join(format!("demae-test-{}", random()));
        fs::create_dir_all(dir.join("inner")).expect("a directory");
        Self(dir)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
