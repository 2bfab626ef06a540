//! The network, the stable addresses and the kernel's table of one lab.
#![allow(clippy::disallowed_methods, reason = "a test runs programs of its own")]

use std::{
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixListener},
    },
    process::{Command, Stdio},
};

use super::{names::random, process::docker};

pub struct TcpRoutes {
    pub network: String,
    pub bridge: String,
    pub subnet: String,
    pub range: String,
    pub table: String,
    /// Reserves the addresses among the tests.
    _claim: UnixListener,
}

impl TcpRoutes {
    pub fn new(tag: &str) -> Self {
        let (number, claim) = loop {
            let number = u32::from_str_radix(&random()[..4], 16).expect("a number") % 8192;
            let name = SocketAddr::from_abstract_name(format!("demae-test-range-{number}")).expect("a name");
            if let Ok(claim) = UnixListener::bind_addr(&name) {
                break (number, claim);
            }
        };
        // A piece of 198.18.0.0/15 of sixteen, and a network of its own for each.
        let range = std::net::Ipv4Addr::from(0xC612_0000 + number * 16);
        Self {
            network: format!("demae-{tag}"),
            bridge: format!("dm{tag}"),
            subnet: format!("10.{}.{}.0/24", 200 + number / 256, number % 256),
            range: format!("{range}/28"),
            table: format!("demae_lab_{tag}"),
            _claim: claim,
        }
    }

    pub fn section(&self) -> String {
        let Self { network, bridge, subnet, range, .. } = self;
        format!(
            "[tcp_routes]\nnetwork = \"{network}\"\nbridge = \"{bridge}\"\nsubnet = \"{subnet}\"\nrange = \"{range}\"\n"
        )
    }

    /// What `nft` lists of the table; empty if there is none.
    pub fn listing(&self) -> String {
        let output = Command::new("nft").args(["list", "table", "ip", &self.table]).output().expect("nft runs");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    pub fn delete_table(&self) {
        quietly("nft", &["delete", "table", "ip", &self.table]);
    }

    pub fn delete_route(&self) {
        quietly("ip", &["route", "del", "local", &self.range, "dev", "lo"]);
    }

    pub fn has_route(&self) -> bool {
        let output = Command::new("ip").args(["route", "show", "table", "local"]).output().expect("ip runs");
        String::from_utf8_lossy(&output.stdout).contains(&self.range)
    }

    /// Removes everything, once the containers are gone.
    pub fn remove(&self) {
        self.delete_table();
        self.delete_route();
        docker(&["network", "rm", &self.network]);
    }
}

fn quietly(program: &str, arguments: &[&str]) {
    // What is not there need not be removed.
    let _ = Command::new(program).args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).status();
}
