//! Who is still talking to an instance: counted, not guessed.

use std::{
    collections::HashMap,
    fs, io,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::Path,
};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with};

/// `SOCK_DIAG_BY_FAMILY`, linux/sock_diag.h.
const BY_FAMILY: u16 = 20;
/// `NLM_F_REQUEST | NLM_F_DUMP`, linux/netlink.h.
const DUMP: u16 = 0x301;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// `UDIAG_SHOW_VFS`, linux/unix_diag.h.
const SHOW_VFS: u32 = 2;
/// `UNIX_DIAG_VFS`, linux/unix_diag.h.
const VFS: u16 = 1;
/// `1 << TCP_ESTABLISHED`: the state of a connected socket, also of a unix one.
const CONNECTED: u32 = 1 << 1;

/// Counts connected unix sockets by the inode of the socket file they came through, in this network namespace: that of
/// whoever connected. The path would not tell instances apart, since each binds the same path in its own container.
///
/// # Errors
/// If the kernel does not answer.
pub fn unix_connections() -> io::Result<HashMap<u32, usize>> {
    let fd = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, SocketFlags::CLOEXEC, Some(netlink::SOCK_DIAG))?;
    rustix::net::sockopt::set_socket_timeout(&fd, rustix::net::sockopt::Timeout::Recv, Some(std::time::Duration::from_secs(2)))?;
    let mut request = Vec::with_capacity(40);
    request.extend(40u32.to_ne_bytes()); // nlmsghdr: length, type, flags, sequence, port
    request.extend(BY_FAMILY.to_ne_bytes());
    request.extend(DUMP.to_ne_bytes());
    request.extend([0; 8]);
    request.extend([1, 0, 0, 0]); // unix_diag_req: AF_UNIX, protocol, padding
    request.extend(CONNECTED.to_ne_bytes());
    request.extend(0u32.to_ne_bytes()); // inode: all
    request.extend(SHOW_VFS.to_ne_bytes());
    request.extend([0; 8]); // cookie
    send(&fd, &request, SendFlags::empty())?;
    let mut counts = HashMap::new();
    let mut buffer = vec![0u8; 64 * 1024];
    loop {
        let (length, _) = recv(fd.as_fd(), buffer.as_mut_slice(), RecvFlags::empty())?;
        let mut rest = &buffer[..length];
        while rest.len() >= 16 {
            let size = read_u32(rest, 0) as usize;
            if size < 16 || size > rest.len() {
                return Err(io::Error::other("the kernel's answer about sockets is cut"));
            }
            match read_u16(rest, 4) {
                NLMSG_DONE => return Ok(counts),
                NLMSG_ERROR => return Err(io::Error::other("the kernel refuses to list sockets")),
                BY_FAMILY => {
                    if let Some(inode) = vfs_inode(&rest[16..size]) {
                        *counts.entry(inode).or_insert(0) += 1;
                    }
                }
                _ => {}
            }
            rest = &rest[size.next_multiple_of(4).min(rest.len())..];
        }
    }
}

/// The inode in one `unix_diag_msg`: 16 bytes of header, then attributes.
fn vfs_inode(message: &[u8]) -> Option<u32> {
    let mut rest = message.get(16..)?;
    while rest.len() >= 4 {
        let size = usize::from(read_u16(rest, 0));
        if size < 4 || size > rest.len() {
            return None;
        }
        if read_u16(rest, 2) == VFS && size >= 8 {
            return Some(read_u32(rest, 4));
        }
        rest = &rest[size.next_multiple_of(4).min(rest.len())..];
    }
    None
}

fn read_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes([bytes[at], bytes[at + 1]])
}

fn read_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The same, in the network namespace of another process: for an nginx in a container.
///
/// # Errors
/// If this agent may not enter it, or the kernel does not answer.
pub fn unix_connections_of(pid: i32) -> io::Result<HashMap<u32, usize>> {
    if same_namespace(pid)? {
        return unix_connections();
    }
    let namespace = fs::File::open(format!("/proc/{pid}/ns/net"))?;
    // A namespace belongs to a thread; this one ends with the answer.
    let thread = std::thread::Builder::new().name("sock-diag".into()).spawn(move || {
        rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(rustix::thread::LinkNameSpaceType::Network))?;
        unix_connections()
    })?;
    thread.join().unwrap_or_else(|_| Err(io::Error::other("the counting thread panicked")))
}

fn same_namespace(pid: i32) -> io::Result<bool> {
    let inode = |path: &str| fs::metadata(path).map(|m| m.ino());
    Ok(inode(&format!("/proc/{pid}/ns/net"))? == inode("/proc/self/ns/net")?)
}

/// The inode of a socket file, as the kernel tells it in socket lists: cut to 32 bits.
pub fn socket_inode(path: &Path) -> Option<u32> {
    #[expect(clippy::cast_possible_truncation, reason = "the kernel cuts it the same way")]
    fs::symlink_metadata(path).ok().map(|m| m.ino() as u32)
}

/// Counts connections to a published port: those that end inside the container, in its own table, and those of this
/// host that have not got there yet.
///
/// # Errors
/// If the tables cannot be read.
pub fn port_connections(container_pid: i32, inside: u16, published: u16) -> io::Result<usize> {
    let mut within = 0;
    for table in ["tcp", "tcp6"] {
        let text = match fs::read_to_string(format!("/proc/{container_pid}/net/{table}")) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(e),
        };
        within += count(&text, |local, _| local == inside);
    }
    let outside = count(&fs::read_to_string("/proc/self/net/tcp")?, |_, remote| remote == published);
    Ok(within.max(outside))
}

/// Lines of `/proc/net/tcp` that are established, or on their way to be, and satisfy a condition on their ports.
fn count(table: &str, fits: impl Fn(u16, u16) -> bool) -> usize {
    let port = |address: &str| address.rsplit_once(':').and_then(|(_, p)| u16::from_str_radix(p, 16).ok());
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let mut fields = line.split_whitespace().skip(1);
            let (local, remote, state) = (port(fields.next()?)?, port(fields.next()?)?, fields.next()?);
            (matches!(state, "01" | "02" | "03") && fits(local, remote)).then_some(())
        })
        .count()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn connections_are_counted_by_the_file_they_came_through() {
        let dir = tempfile::tempdir().expect("a directory");
        let (a, b) = (dir.path().join("a.sock"), dir.path().join("b.sock"));
        let (listen_a, _listen_b) = (UnixListener::bind(&a).expect("a"), UnixListener::bind(&b).expect("b"));
        let counted = |path: &Path| {
            let inode = socket_inode(path).expect("an inode");
            unix_connections().expect("a list").get(&inode).copied().unwrap_or(0)
        };
        assert_eq!((counted(&a), counted(&b)), (0, 0));
        let clients: Vec<UnixStream> = (0..3).map(|_| UnixStream::connect(&a).expect("a connection")).collect();
        // Not yet accepted: a request may be on its way all the same.
        assert_eq!((counted(&a), counted(&b)), (3, 0));
        let accepted: Vec<_> = (0..3).map(|_| listen_a.accept().expect("accepted")).collect();
        assert_eq!(counted(&a), 3);
        drop((clients, accepted));
        assert_eq!(counted(&a), 0);
    }

    #[test]
    fn connections_to_a_port_are_counted() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let own = i32::try_from(std::process::id()).expect("a pid");
        assert_eq!(port_connections(own, port, port).expect("a table"), 0);
        let _client = std::net::TcpStream::connect(("127.0.0.1", port)).expect("a connection");
        assert_eq!(port_connections(own, port, port).expect("a table"), 1);
    }
}
