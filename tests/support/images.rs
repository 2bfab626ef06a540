//! Images: of the example app, and from a directory.
#![allow(clippy::disallowed_methods, reason = "a test runs programs and writes files of its own")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use super::process::run;

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

/// An image of nothing but the example app. It is made from an archive, which takes a tenth of the time of a build, and
/// holds its name, so that it shares nothing with other images: their end would take it away.
pub fn build(name: &str, version: &str, dir: &Path) {
    fs::create_dir_all(dir).expect("a directory");
    fs::copy(example_app(), dir.join("app")).expect("copied");
    fs::write(dir.join("name"), name).expect("a file");
    let archive = dir.join("image.tar");
    run(Command::new("tar").arg("-C").arg(dir).arg("-cf").arg(&archive).args(["app", "name"]));
    let (version, entrypoint) = (format!("ENV VERSION={version}"), "ENTRYPOINT [\"/app\"]");
    let mut import = Command::new("docker");
    import.args(["import", "-c", &version, "-c", entrypoint]).arg(&archive).arg(name).stdout(Stdio::null());
    run(&mut import);
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
