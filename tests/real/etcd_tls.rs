//! etcd with server and client certificates: renewed, from another CA, expired.
#![expect(clippy::disallowed_methods, reason = "a test runs programs and writes files of its own")]

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use crate::support::{
    etcd::Etcd,
    lab::{Lab, Setup},
    load::{Client, Load},
    names::free_address,
    trust::output_of,
    wait::until,
};
use demae::model::status::State;

/// An etcd that requires client certificates.
pub fn secured(dir: &Path, at: SocketAddr, peer: SocketAddr) -> Etcd {
    let more =
        ["--client-cert-auth", "--trusted-ca-file", "ca.crt", "--cert-file", "server.crt", "--key-file", "server.key"];
    Etcd::start_secured(dir, "secured", at, &[("secured", peer)], &more)
}

fn openssl(dir: &Path, arguments: &str) {
    let output = Command::new("openssl").current_dir(dir).args(arguments.split(' ')).output().expect("openssl runs");
    assert!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Creates a CA, in place of the one before.
pub fn authority(dir: &Path) {
    openssl(dir, "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=ca -keyout ca.key -out ca.crt");
}

/// A certificate signed by that CA.
pub fn certificate(dir: &Path, name: &str) {
    certificate_for(dir, name, 2);
}

/// A certificate valid for so many days; with 0 it has expired when it is used.
fn certificate_for(dir: &Path, name: &str, days: u32) {
    fs::write(dir.join("names"), "subjectAltName=IP:127.0.0.1\n").expect("a file");
    openssl(dir, &format!("req -newkey rsa:2048 -nodes -subj /CN={name} -keyout {name}.key.new -out {name}.csr"));
    openssl(
        dir,
        &format!(
            "x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days {days} -extfile names -out {name}.crt.new"
        ),
    );
    for kind in ["key", "crt"] {
        fs::rename(dir.join(format!("{name}.{kind}.new")), dir.join(format!("{name}.{kind}"))).expect("it exists");
    }
}

/// Puts a key below `/demae/`.
fn put(lab: &Lab, key: &str, value: &str) -> bool {
    let mut command = Command::new("etcdctl");
    command.current_dir(lab.dir.path()).env("ETCDCTL_API", "3").stderr(Stdio::null()).stdout(Stdio::null());
    command.args(["--endpoints", &format!("https://{}", lab.etcd), "--cacert", "ca.crt"]);
    command.args(["--cert", "client.crt", "--key", "client.key", "put", &format!("/demae/{key}"), value]);
    command.status().expect("etcdctl runs").success()
}

/// Waits until the agent has tried etcd twice: the first attempt may have been in flight.
fn wait_tried(lab: &Lab) {
    let failures = || lab.metric("demae_store_errors_total", "");
    let known = failures();
    until("the agent has tried it twice", || failures() >= known + 2.0);
}

#[test]
fn renewed_certificates_are_used_and_bad_ones_stop_nothing() {
    let mut lab = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    lab.stop_etcd();
    let dir = lab.dir.path().to_owned();
    authority(&dir);
    certificate(&dir, "server");
    certificate(&dir, "client");
    let config = fs::read_to_string(lab.path("agent.toml")).expect("a file");
    let at = dir.display();
    let with = format!(
        "endpoints = [\"https://{}\"]\ncacert = \"{at}/ca.crt\"\ncert = \"{at}/client.crt\"\nkey = \"{at}/client.key\"",
        lab.etcd
    );
    let config = config.replace(&format!("endpoints = [\"{}\"]", lab.etcd), &with);
    fs::write(lab.path("agent.toml"), config).expect("a file");

    let peer = free_address();
    let etcd = secured(&dir, lab.etcd, peer);
    let spec = lab.socket_spec(&lab.image("v1"), "web.test", "");
    until("etcd takes a key", || put(&lab, "apps/web/spec", &spec));
    lab.start_agent(&[]);
    lab.wait_app("web", "converged", |a| a.state == State::Converged);
    let load = Load::start(lab.ingress, "web.test", vec![Client::get(true).pausing(Duration::from_millis(5))]);

    // `doctor` compares clocks with etcd over TLS too.
    let doctor = output_of(&lab.demae(&["doctor"]));
    assert!(doctor.lines().any(|l| l.starts_with("ok    clock") && l.contains("in sync with")), "{doctor}");

    // All certificates are renewed, by another CA. The agent reads them at its next connection.
    drop(etcd);
    until("the agent reports the store error", || lab.status().is_some_and(|s| s.store.error.is_some()));
    authority(&dir);
    certificate(&dir, "server");
    certificate(&dir, "client");
    let etcd = secured(&dir, lab.etcd, peer);
    let v2 = lab.image("v2");
    until("etcd takes another key", || put(&lab, "apps/web/image", &v2));
    lab.wait_app("web", "deployed", |a| a.state == State::Converged && a.image.as_ref() == Some(&v2));

    // The client certificate is from an unknown CA.
    drop(etcd);
    until("the agent reports the store error again", || lab.status().is_some_and(|s| s.store.error.is_some()));
    let unknown_ca = dir.join("unknown_ca");
    fs::create_dir(&unknown_ca).expect("a directory");
    authority(&unknown_ca);
    certificate(&unknown_ca, "client");
    for kind in ["key", "crt"] {
        fs::rename(dir.join(format!("client.{kind}")), dir.join(format!("good.{kind}"))).expect("it exists");
        fs::copy(unknown_ca.join(format!("client.{kind}")), dir.join(format!("client.{kind}"))).expect("it exists");
    }
    let etcd = secured(&dir, lab.etcd, peer);
    until("etcd answers others", || std::net::TcpStream::connect(lab.etcd).is_ok());
    assert!(!put(&lab, "apps/web/image", &lab.image("v1")), "a certificate of an unknown CA is rejected");
    wait_tried(&lab);
    let store = lab.status().expect("a status").store;
    let error = store.error.unwrap_or_default();
    assert!(!error.is_empty() && !error.contains("refused") && store.block.is_none(), "no empty store: {error}");
    for kind in ["key", "crt"] {
        fs::rename(dir.join(format!("good.{kind}")), dir.join(format!("client.{kind}"))).expect("it exists");
    }
    until("the store is read again", || lab.status().is_some_and(|s| s.store.error.is_none()));

    // The server certificate has expired.
    drop(etcd);
    certificate_for(&dir, "server", 0);
    let etcd = secured(&dir, lab.etcd, peer);
    until("the expiry is reported", || {
        lab.status().is_some_and(|s| s.store.error.is_some_and(|e| e.to_lowercase().contains("expired")))
    });
    drop(etcd);
    certificate(&dir, "server");
    let _etcd = secured(&dir, lab.etcd, peer);
    until("the store is read again", || lab.status().is_some_and(|s| s.store.error.is_none()));
    let tally = load.stop();
    assert_eq!((tally.failed, tally.stale), (0, 0), "of {}: {:#?}", tally.requests, tally.reasons);
    assert_eq!(lab.containers().len(), 1);
}
