//! A registry of its own, on loopback.
#![allow(clippy::disallowed_methods, reason = "a test starts programs and writes files of its own")]

use std::{
    fs,
    net::SocketAddr,
    process::{Child, Command, Stdio},
};

use super::{
    lab::{Lab, docker, free_address, until},
    load,
};

pub struct Registry {
    address: SocketAddr,
    child: Child,
    names: std::sync::Mutex<Vec<String>>,
}

impl Registry {
    pub fn start(lab: &Lab) -> Self {
        let address = free_address();
        let config = lab.path("registry.yml");
        let text = format!(
            "version: 0.1\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: {address}}}\n",
            lab.path("registry").display()
        );
        fs::write(&config, text).expect("a file");
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry runs");
        until("the registry answers", || load::get(address, "localhost", "/v2/").is_ok_and(|(code, _)| code == 200));
        Self { address, child, names: Vec::new().into() }
    }

    /// What an image is called here.
    pub fn name(&self, version: &str) -> String {
        format!("localhost:{}/app:{version}", self.address.port())
    }

    /// Brings an image of the lab here, and takes its name from the engine.
    pub fn push(&self, lab: &Lab, version: &str) {
        let name = self.name(version);
        docker(&["tag", &lab.image(version), &name]);
        docker(&["push", "-q", &name]);
        docker(&["rmi", &name]);
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
