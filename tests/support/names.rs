//! Names and addresses that no other test has.
#![allow(clippy::disallowed_methods, reason = "a test reads random numbers")]

use std::{
    fs,
    net::{SocketAddr, TcpListener},
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{self as unix, UnixListener},
    },
    sync::{Mutex, PoisonError},
};

pub fn random() -> String {
    let mut bytes = [0u8; 4];
    std::io::Read::read_exact(&mut fs::File::open("/dev/urandom").expect("random"), &mut bytes).expect("random");
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Keeps the claimed port names of this process.
static TAKEN: Mutex<Vec<UnixListener>> = Mutex::new(Vec::new());

/// A port below the ephemeral range, so no outgoing connection takes it before its use. An abstract socket, which the
/// kernel frees with this process, reserves it among the tests.
pub fn free_address() -> SocketAddr {
    loop {
        let port = 10_000 + u16::from_str_radix(&random()[..4], 16).expect("a number") % 9_000;
        let name = unix::SocketAddr::from_abstract_name(format!("demae-test-port-{port}")).expect("a name");
        let Ok(claim) = UnixListener::bind_addr(&name) else { continue };
        if let Ok(listener) = TcpListener::bind(("127.0.0.1", port)) {
            TAKEN.lock().unwrap_or_else(PoisonError::into_inner).push(claim);
            return listener.local_addr().expect("an address");
        }
    }
}
