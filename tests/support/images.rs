//! Images: of the example app, and from a directory.
#![allow(clippy::disallowed_methods, reason = "a test runs programs and writes files of its own")]

use std::{
    fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io::Read as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use super::process::run;

/// The example app, built static, once for all tests.
pub fn example_app() -> PathBuf {
    compiled("examples/app.rs", "example-app")
}

/// A program of one source file, built static, once for all tests.
fn compiled(source: &str, name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(source);
    let binary = dir.join(name);
    let lock = fs::File::create(dir.join(format!("{name}.lock"))).expect("a lock");
    lock.lock().expect("the lock");
    let newer = |a: &Path, b: &Path| match (
        fs::metadata(a).and_then(|m| m.modified()),
        fs::metadata(b).and_then(|m| m.modified()),
    ) {
        (Ok(a), Ok(b)) => a > b,
        _ => false,
    };
    if !newer(&binary, &source) {
        let beside = dir.join(format!("{name}.new"));
        run(Command::new("rustc")
            .args(["--edition", "2024", "-O", "-C", "target-feature=+crt-static", "-C", "strip=symbols", "-o"])
            .arg(&beside)
            .arg(&source));
        fs::rename(beside, &binary).expect("renamed");
    }
    binary
}

/// An image of the example app alone. It is imported from an archive, which takes a tenth of the time of a build. The
/// archive contains the image's name, so no layer is shared with other images and removed with them.
pub fn build(name: &str, version: &str, dir: &Path) {
    import(name, &example_app(), &[&format!("VERSION={version}")], dir);
}

/// One whose app ends at once.
pub fn build_failing(name: &str, dir: &Path) {
    import(name, &example_app(), &["VERSION=bad", "MOOD=exit"], dir);
}

/// The same with so many more bytes, which cannot be compressed.
pub fn build_large(name: &str, version: &str, dir: &Path, bytes: u64) {
    fs::create_dir_all(dir).expect("a directory");
    let mut filler = fs::File::create(dir.join("filler")).expect("a file");
    let random = fs::File::open("/dev/urandom").expect("it is there");
    std::io::copy(&mut random.take(bytes), &mut filler).expect("written");
    import(name, &example_app(), &[&format!("VERSION={version}")], dir);
}

fn import(name: &str, program: &Path, env: &[&str], dir: &Path) {
    fs::create_dir_all(dir).expect("a directory");
    fs::copy(program, dir.join("app")).expect("copied");
    fs::write(dir.join("name"), name).expect("a file");
    let archive = dir.join("image.tar");
    run(Command::new("tar").arg("-C").arg(dir).arg("-cf").arg(&archive).arg("--exclude=./image.tar").arg("."));
    let mut import = Command::new("docker");
    import.args(["import", "-c", "ENTRYPOINT [\"/app\"]"]).stdout(Stdio::null());
    for variable in env {
        import.args(["-c", &format!("ENV {variable}")]);
    }
    import.arg(&archive).arg(name);
    run(&mut import);
}

/// An image with a shell.
pub fn build_shell(name: &str, dir: &Path) {
    fs::create_dir_all(dir).expect("a directory");
    fs::copy("/bin/busybox", dir.join("busybox")).expect("copied");
    import(name, &example_app(), &[], dir);
}

/// An image that does what the README asks of `traefik/whoami`; removed when it is dropped.
pub struct Whoami {
    pub name: String,
}

impl Whoami {
    pub fn new(tag: &str, dir: &Path) -> Self {
        let name = format!("demae-{tag}/whoami");
        import(&name, &compiled("tests/support/whoami/main.rs", "whoami"), &[], dir);
        Self { name }
    }
}

impl Drop for Whoami {
    fn drop(&mut self) {
        // Its container may be about to go.
        let _ = Command::new("docker").args(["rmi", "-f", &self.name]).stdout(Stdio::null()).status();
    }
}

/// An image of the example app that all labs share: made by the first, removed by the last. Labs give it names of their
/// own, which costs a tenth of making and removing it.
pub struct Shared {
    pub name: String,
    /// Shared by those that use the image, exclusive while it is removed.
    lock: fs::File,
}

impl Shared {
    pub fn take(version: &str, dir: &Path) -> Self {
        let mut hasher = DefaultHasher::new();
        fs::read(example_app()).expect("the example app").hash(&mut hasher);
        let name = format!("demae-test-app-{:x}:{version}", hasher.finish());
        let locks = Path::new(env!("CARGO_TARGET_TMPDIR")).join("images");
        fs::create_dir_all(&locks).expect("a directory");
        let lock = fs::File::create(locks.join(name.replace(':', "-"))).expect("a lock");
        let exists = || {
            let mut inspect = Command::new("docker");
            inspect.args(["image", "inspect", &name]).stdout(Stdio::null()).stderr(Stdio::null());
            inspect.status().expect("docker runs").success()
        };
        // One at a time looks and makes. Those that look hold the image, so were it made under an exclusive lock of
        // the image, many that look at once would keep each other from it.
        let making = fs::File::create(locks.join(name.replace(':', "-") + ".making")).expect("a lock");
        making.lock().expect("the lock");
        // Waits for the last user of before, who may be removing it.
        lock.lock_shared().expect("the lock");
        if !exists() {
            build(&name, version, dir);
        }
        Self { name, lock }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let is_last = self.lock.unlock().is_ok() && self.lock.try_lock().is_ok();
        if is_last {
            let mut remove = Command::new("docker");
            let _ = remove.args(["rmi", "-f", &self.name]).stdout(Stdio::null()).stderr(Stdio::null()).status();
        }
    }
}

/// Builds an image from a directory, sharing no layer with other builds, whose removal would remove it.
pub fn build_from(name: &str, dir: &Path) {
    let output = Command::new("docker")
        .args(["build", "-q", "--no-cache", "--force-rm", "-t", name])
        .arg(dir)
        .output()
        .expect("docker runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
