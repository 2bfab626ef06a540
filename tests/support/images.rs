//! Images: of the example app, and from a directory.
#![allow(clippy::disallowed_methods, reason = "a test runs programs and writes files of its own")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use super::lab::run;

/// The example app, built static, once for all tests.
pub fn example_app() -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/app.rs");
    let binary = dir.join("example-app");
    let lock = fs::File::create(dir.join("example-app.lock")).expect("a lock");
    lock.lock().expect("the lock");
    let newer = |a: &Path, b: &Path| match (
        fs::metadata(a).and_then(|m| m.modified()),
        fs::metadata(b).and_then(|m| m.modified()),
    ) {
        (Ok(a), Ok(b)) => a > b,
        _ => false,
    };
    if !newer(&binary, &source) {
        let beside = dir.join("example-app.new");
        run(Command::new("rustc")
            .args(["--edition", "2024", "-O", "-C", "target-feature=+crt-static", "-C", "strip=symbols", "-o"])
            .arg(&beside)
            .arg(&source));
        fs::rename(beside, &binary).expect("renamed");
    }
    binary
}

/// An image `FROM scratch` around the example app.
pub fn build(name: &str, version: &str, dir: &Path) {
    fs::create_dir_all(dir).expect("a directory");
    fs::copy(example_app(), dir.join("app")).expect("copied");
    let text = format!("FROM scratch\nCOPY app /app\nENV VERSION={version}\nENTRYPOINT [\"/app\"]\n");
    fs::write(dir.join("Dockerfile"), text).expect("a file");
    build_from(name, dir);
}

/// Builds an image from a directory, sharing nothing with other builds: their end would take it away.
pub fn build_from(name: &str, dir: &Path) {
    let output = Command::new("docker")
        .args(["build", "-q", "--no-cache", "--force-rm", "-t", name])
        .arg(dir)
        .output()
        .expect("docker runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
