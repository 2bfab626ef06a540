//! A Docker registry on loopback.
#![allow(clippy::disallowed_methods, reason = "a test starts programs and writes files of its own")]

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
};

use super::{load, mishaps::wait};

pub struct Registry {
    address: SocketAddr,
    child: Child,
    names: std::sync::Mutex<Vec<String>>,
}

impl Registry {
    /// Starts it at a free address, with its files in an existing directory.
    pub fn start(address: SocketAddr, dir: &Path) -> Self {
        let config = dir.join("registry.yml");
        let text = format!(
            "version: 0.1\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: {address}}}\n",
            dir.join("registry").display()
        );
        fs::write(&config, text).expect("a file");
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry runs");
        wait("the registry answers", || load::get(address, "localhost", "/v2/").is_ok_and(|(code, _)| code == 200));
        Self { address, child, names: Vec::new().into() }
    }

    /// The name of a version of the app in this registry.
    pub fn name(&self, version: &str) -> String {
        format!("localhost:{}/app:{version}", self.address.port())
    }

    /// Pushes an image and removes its registry name from the engine, so that it must be pulled.
    pub fn push(&self, image: &str, version: &str) {
        let name = self.name(version);
        for args in [&["tag", image, &name][..], &["push", "-q", &name], &["rmi", &name]] {
            assert!(docker(args), "docker {}", args.join(" "));
        }
        self.names.lock().expect("no test panicked with it").push(name);
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for name in self.names.lock().unwrap_or_else(std::sync::PoisonError::into_inner).iter() {
            docker(&["rmi", "-f", name]);
        }
    }
}

fn docker(args: &[&str]) -> bool {
    let mut command = Command::new("docker");
    command.args(args).stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|s| s.success())
}
