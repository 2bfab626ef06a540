//! A Docker registry on loopback.
#![allow(clippy::disallowed_methods, reason = "a test starts programs and writes files of its own")]

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};

use super::{load, mishaps::wait};

pub struct Registry {
    address: SocketAddr,
    child: Child,
    names: std::sync::Mutex<Vec<String>>,
    /// Where the password is kept that it takes, and where the docker command finds it; without one, anybody may pull.
    dir: Option<PathBuf>,
}

/// The name that a registry with a password takes.
pub const USER: &str = "pull";
/// Passwords, each with its hash by bcrypt, as `htpasswd -nbB` prints it.
pub const FIRST: (&str, &str) = ("first-secret", "$2b$04$Dj01o99F8BFonMbzyfO3dOzAEWS8jMtoDhTKFUwq0/nlnq4f6HSXK");
pub const SECOND: (&str, &str) = ("second-secret", "$2b$04$xvkSFaWx5fcgSXlHHtzaruOMouHL33iByrHsM8IUUoBIe5.MKmSMG");

impl Registry {
    /// Starts it at a free address, with its files in an existing directory.
    pub fn start(address: SocketAddr, dir: &Path) -> Self {
        Self::start_with(address, dir, "", 200, None)
    }

    /// Starts one that takes [`USER`] with the [`FIRST`] password.
    pub fn start_with_password(address: SocketAddr, dir: &Path) -> Self {
        let auth = format!("auth: {{htpasswd: {{realm: test, path: {}}}}}\n", dir.join("htpasswd").display());
        fs::write(dir.join("htpasswd"), format!("{USER}:{}\n", FIRST.1)).expect("a file");
        let registry = Self::start_with(address, dir, &auth, 401, Some(dir.to_owned()));
        registry.log_in(FIRST.0);
        registry
    }

    /// Takes another password from now on, and not the one before.
    pub fn change_password(&self, (password, hash): (&str, &str)) {
        let dir = self.dir.as_ref().expect("it has a password");
        let file = dir.join("htpasswd");
        let before = fs::metadata(&file).and_then(|file| file.modified()).expect("a time");
        // It reads the file again if its time is another one.
        wait("the file has another time", || {
            fs::write(&file, format!("{USER}:{hash}\n")).expect("a file");
            fs::metadata(&file).and_then(|file| file.modified()).is_ok_and(|now| now > before)
        });
        self.log_in(password);
    }

    /// The name by which images know it.
    pub fn host(&self) -> String {
        format!("localhost:{}", self.address.port())
    }

    /// A `config.json` with a login.
    pub fn config(&self, password: &str) -> String {
        let auth = STANDARD.encode(format!("{USER}:{password}"));
        format!("{{\"auths\": {{\"{}\": {{\"auth\": \"{auth}\"}}}}}}", self.host())
    }

    fn log_in(&self, password: &str) {
        let dir = self.dir.as_ref().expect("it has a password");
        fs::write(dir.join("config.json"), self.config(password)).expect("a file");
    }

    fn start_with(address: SocketAddr, dir: &Path, auth: &str, answer: u16, login: Option<PathBuf>) -> Self {
        let config = dir.join("registry.yml");
        let text = format!(
            "version: 0.1\n{auth}storage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: {address}}}\n",
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
        wait("the registry answers", || load::get(address, "localhost", "/v2/").is_ok_and(|(code, _)| code == answer));
        Self { address, child, names: Vec::new().into(), dir: login }
    }

    /// The name of a version of the app in this registry.
    pub fn name(&self, version: &str) -> String {
        format!("localhost:{}/app:{version}", self.address.port())
    }

    /// Pushes an image and removes its registry name from the engine, so that it must be pulled.
    pub fn push(&self, image: &str, version: &str) {
        let name = self.name(version);
        let login = self.dir.as_ref().map(|dir| dir.display().to_string());
        let login: Vec<&str> = login.iter().flat_map(|dir| ["--config", dir.as_str()]).collect();
        let push = [&login, &["push", "-q", &name][..]].concat();
        for args in [&["tag", image, &name][..], &push, &["rmi", &name]] {
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
