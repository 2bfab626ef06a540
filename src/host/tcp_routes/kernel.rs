//! What is asked of the kernel: by `nft` and `ip`, and by its notifications.

use std::{io, os::fd::OwnedFd, process::Stdio, time::Duration};

use rustix::net::{
    AddressFamily, RecvFlags, SocketFlags, SocketType, bind,
    netlink::{self, SocketAddrNetlink},
    recv, socket_with,
};
use tokio::io::{AsyncWriteExt as _, unix::AsyncFd};

/// Timeout of one command: `nft` takes a few milliseconds.
const TIMEOUT: Duration = Duration::from_secs(5);
/// `1 << (NFNLGRP_NFTABLES - 1)`, linux/netfilter/nfnetlink.h.
const NFTABLES: u32 = 1 << 6;
/// `RTMGRP_IPV4_ROUTE`, linux/rtnetlink.h.
const ROUTES: u32 = 0x40;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// It cannot be run.
    #[error("`{program}` cannot be run, on Debian it is in the package `{package}`: {source}")]
    Missing {
        /// Which.
        program: &'static str,
        /// Where it is from.
        package: &'static str,
        /// Why.
        source: io::Error,
    },
    /// It failed.
    #[error("`{command}` failed: {message}")]
    Failed {
        /// The command, without its input.
        command: String,
        /// What it printed.
        message: String,
    },
}

/// Runs `nft`; returns what it prints.
pub async fn nft(arguments: &[&str], input: Option<&str>) -> Result<String, CommandError> {
    run(("nft", "nftables"), arguments, input).await
}

/// Runs `ip`; returns what it prints.
pub async fn ip(arguments: &[&str]) -> Result<String, CommandError> {
    run(("ip", "iproute2"), arguments, None).await
}

#[expect(clippy::disallowed_methods, reason = "the home of nft and ip")]
async fn run(
    (program, package): (&'static str, &'static str),
    arguments: &[&str],
    input: Option<&str>,
) -> Result<String, CommandError> {
    let failed = |message: String| CommandError::Failed {
        command: format!("{program} {}", arguments.join(" ")),
        message: message.trim().to_owned(),
    };
    let mut command = tokio::process::Command::new(program);
    command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
    let mut child = command.spawn().map_err(|source| CommandError::Missing { program, package, source })?;
    let (stdin, text) = (child.stdin.take(), input.unwrap_or_default());
    let work = async {
        if let Some(mut stdin) = stdin {
            // A program that does not read all of it says why.
            let _ = stdin.write_all(text.as_bytes()).await;
        }
        child.wait_with_output().await
    };
    let output = match tokio::time::timeout(TIMEOUT, work).await {
        Ok(output) => output.map_err(|e| failed(e.to_string()))?,
        Err(_) => return Err(failed(format!("no end within {} s", TIMEOUT.as_secs()))),
    };
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(failed(String::from_utf8_lossy(&output.stderr).into_owned()))
}

/// Notifications of changed tables and routes, by this agent or by others.
#[derive(Debug)]
pub struct Changes {
    tables: AsyncFd<OwnedFd>,
    routes: AsyncFd<OwnedFd>,
}

impl Changes {
    /// Begins to listen.
    ///
    /// # Errors
    /// If the kernel refuses.
    #[expect(deprecated, reason = "sound for an owned descriptor, which stays open while it is registered")]
    pub fn listen() -> io::Result<Self> {
        let open = |protocol, groups| {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol)?;
            bind(&socket, &SocketAddrNetlink::new(0, groups))?;
            AsyncFd::new(socket)
        };
        // Without a protocol it is `NETLINK_ROUTE`, 0.
        Ok(Self { tables: open(Some(netlink::NETFILTER), NFTABLES)?, routes: open(None, ROUTES)? })
    }

    /// Waits for a change.
    ///
    /// # Errors
    /// If nothing can be heard any more.
    pub async fn next(&self) -> io::Result<()> {
        tokio::select! {
            heard = drain(&self.tables) => heard,
            heard = drain(&self.routes) => heard,
        }
    }
}

/// Waits for messages, and drops all that are there.
async fn drain(socket: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut guard = socket.readable().await?;
    let mut buffer = [0u8; 8192];
    loop {
        match recv(socket.get_ref(), buffer.as_mut_slice(), RecvFlags::DONTWAIT) {
            // Too many at once: some are lost, which is a change too.
            Ok(_) | Err(rustix::io::Errno::NOBUFS | rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => {
                guard.clear_ready();
                return Ok(());
            }
            Err(e) => return Err(e.into()),
        }
    }
}
