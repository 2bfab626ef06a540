//! Counts the open connections of an instance.

use std::{
    collections::HashMap,
    fs, io,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with};

/// `SOCK_DIAG_BY_FAMILY`, linux/sock_diag.h.
const BY_FAMILY: u16 = 20;
/// `NLM_F_REQUEST | NLM_F_DUMP`, linux/netlink.h.
const DUMP: u16 = 0x301;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// `UDIAG_SHOW_VFS`, `UDIAG_SHOW_PEER` and `UDIAG_SHOW_RQLEN`, linux/unix_diag.h.
const SHOW_VFS: u32 = 2;
const SHOW_PEER: u32 = 4;
const SHOW_QUEUE: u32 = 16;
/// `UNIX_DIAG_VFS`, `UNIX_DIAG_PEER` and `UNIX_DIAG_RQLEN`, linux/unix_diag.h.
const VFS: u16 = 1;
const PEER: u16 = 2;
const QUEUE: u16 = 4;
/// `TCP_ESTABLISHED`, `TCP_SYN_SENT` and `TCP_SYN_RECV` as bits, linux/tcp_states.h.
const OPEN: u32 = 0b1110;
/// `1 << TCP_ESTABLISHED`: the state of a connected socket, also of a unix one.
const CONNECTED: u32 = 1 << 1;
/// `1 << TCP_LISTEN`.
const LISTENING: u32 = 1 << 10;

/// Connected unix sockets of a network namespace.
#[derive(Debug, Default)]
struct Connected {
    /// Accepted connections, by the inode of the socket file they came through.
    accepted: HashMap<u32, usize>,
    /// Connections not accepted yet, to any socket file.
    pending: usize,
}

/// How the connections of one instance are counted.
#[derive(Debug, Clone)]
pub struct Counter {
    /// A process in the network namespace of its container.
    pub container: i32,
    /// Its endpoints.
    pub endpoints: Vec<CountedEndpoint>,
}

/// An endpoint whose connections are counted.
#[derive(Debug, Clone)]
pub enum CountedEndpoint {
    /// A socket file on this host.
    Socket(PathBuf),
    /// A port.
    Port {
        /// Inside the container.
        inside: u16,
        /// On this host; `None` if it is not published.
        published: Option<u16>,
    },
}

impl Counter {
    /// Connections to all endpoints, by a process of nginx; `None` if any cannot be counted, which is not zero.
    pub fn count(&self, nginx: Option<i32>) -> Option<usize> {
        let one = |endpoint: &CountedEndpoint| match endpoint {
            CountedEndpoint::Socket(path) => socket_connections(path, nginx, self.container).ok(),
            CountedEndpoint::Port { inside, published } => port_connections(self.container, *inside, *published).ok(),
        };
        self.endpoints.iter().map(one).sum()
    }
}

/// Counts connections to a unix socket: the accepted ones, seen in the network namespace of the client, and those in
/// the listener's queue, seen in the namespace of the container. A request may wait there while the app is busy, and
/// would be lost with it.
///
/// The path does not identify the instance, since each binds the same path in its own container; the inode does.
///
/// # Errors
/// If the kernel does not answer.
pub fn socket_connections(socket: &Path, nginx: Option<i32>, container: i32) -> io::Result<usize> {
    let Some(inode) = socket_inode(socket)? else { return Ok(0) };
    // The queue first: a connection that leaves it in between is counted as accepted.
    let queue = within(container, move || queue_length(inode));
    let connected = match nginx {
        Some(pid) => within(pid, connected)?,
        None => connected()?,
    };
    // Without root the agent cannot enter the container, and counts every pending connection as one to it.
    let pending = queue.unwrap_or(connected.pending);
    Ok(connected.accepted.get(&inode).copied().unwrap_or(0) + pending)
}

fn connected() -> io::Result<Connected> {
    let mut found = Connected::default();
    dump(&unix_request(CONNECTED, SHOW_VFS | SHOW_PEER), |message| {
        if let Some(inode) = attribute(message, VFS) {
            *found.accepted.entry(inode).or_insert(0) += 1;
        }
        // The other end of a connection has an inode once it is accepted.
        if attribute(message, PEER) == Some(0) {
            found.pending += 1;
        }
    })?;
    Ok(found)
}

fn queue_length(inode: u32) -> io::Result<usize> {
    let mut length = 0;
    dump(&unix_request(LISTENING, SHOW_VFS | SHOW_QUEUE), |message| {
        if attribute(message, VFS) == Some(inode) {
            length += attribute(message, QUEUE).unwrap_or(0) as usize;
        }
    })?;
    Ok(length)
}

fn unix_request(states: u32, show: u32) -> Vec<u8> {
    let mut request = vec![1, 0, 0, 0]; // unix_diag_req: AF_UNIX, protocol, padding
    request.extend(states.to_ne_bytes());
    request.extend(0u32.to_ne_bytes()); // inode: all
    request.extend(show.to_ne_bytes());
    request.extend([0; 8]); // cookie
    request
}

/// Counts TCP connections in this network namespace that are open or being opened and whose ports match.
fn tcp_connections(fits: impl Fn(u16, u16) -> bool) -> io::Result<usize> {
    let mut count = 0;
    for family in [2, 10] {
        let mut request = vec![family, 6, 0, 0]; // inet_diag_req_v2: AF_INET or AF_INET6, IPPROTO_TCP, nothing more
        request.extend(OPEN.to_ne_bytes());
        request.extend([0; 48]); // sockid: any
        dump(&request, |message| {
            // inet_diag_msg: four bytes, then the two ports in network order.
            if let Some(&[a, b, c, d]) = message.get(4..8)
                && fits(u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))
            {
                count += 1;
            }
        })?;
    }
    Ok(count)
}

/// Requests a socket list from the kernel; calls `each` with each message.
fn dump(request: &[u8], mut each: impl FnMut(&[u8])) -> io::Result<()> {
    let fd = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, SocketFlags::CLOEXEC, Some(netlink::SOCK_DIAG))?;
    rustix::net::sockopt::set_socket_timeout(
        &fd,
        rustix::net::sockopt::Timeout::Recv,
        Some(std::time::Duration::from_secs(2)),
    )?;
    let length = u32::try_from(16 + request.len()).map_err(io::Error::other)?;
    let mut packet = Vec::with_capacity(16 + request.len());
    packet.extend(length.to_ne_bytes()); // nlmsghdr: length, type, flags, sequence, port
    packet.extend(BY_FAMILY.to_ne_bytes());
    packet.extend(DUMP.to_ne_bytes());
    packet.extend([0; 8]);
    packet.extend(request);
    send(&fd, &packet, SendFlags::empty())?;
    let mut buffer = vec![0u8; 64 * 1024];
    loop {
        let (length, _) = recv(fd.as_fd(), buffer.as_mut_slice(), RecvFlags::empty())?;
        let mut rest = &buffer[..length];
        while rest.len() >= 16 {
            let size = read_u32(rest, 0) as usize;
            if size < 16 || size > rest.len() {
                return Err(io::Error::other("the kernel's socket list is truncated"));
            }
            match read_u16(rest, 4) {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => return Err(io::Error::other("the kernel refuses to list sockets")),
                BY_FAMILY => each(&rest[16..size]),
                _ => {}
            }
            rest = &rest[size.next_multiple_of(4).min(rest.len())..];
        }
    }
}

/// The first number in an attribute of one `unix_diag_msg`: 16 bytes of header, then attributes.
fn attribute(message: &[u8], wanted: u16) -> Option<u32> {
    let mut rest = message.get(16..)?;
    while rest.len() >= 4 {
        let size = usize::from(read_u16(rest, 0));
        if size < 4 || size > rest.len() {
            return None;
        }
        if read_u16(rest, 2) == wanted && size >= 8 {
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

/// Runs a count in the network namespace of another process.
fn within<T: Send + 'static>(pid: i32, count: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    if same_namespace(pid)? {
        return count();
    }
    let namespace = fs::File::open(format!("/proc/{pid}/ns/net"))?;
    // A namespace belongs to a thread; this one ends with the answer.
    let thread = std::thread::Builder::new().name("sock-diag".into()).spawn(move || {
        rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(rustix::thread::LinkNameSpaceType::Network))?;
        count()
    })?;
    thread.join().unwrap_or_else(|_| Err(io::Error::other("the counting thread panicked")))
}

fn same_namespace(pid: i32) -> io::Result<bool> {
    let inode = |path: &str| fs::metadata(path).map(|m| m.ino());
    Ok(inode(&format!("/proc/{pid}/ns/net"))? == inode("/proc/self/ns/net")?)
}

/// The inode of a socket file as in socket lists: truncated to 32 bits. `None` if there is no such file.
fn socket_inode(path: &Path) -> io::Result<Option<u32>> {
    match fs::symlink_metadata(path) {
        #[expect(clippy::cast_possible_truncation, reason = "the kernel cuts it the same way")]
        Ok(found) => Ok(Some(found.ino() as u32)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Counts connections to a port of a container. Of a published one, the larger of those inside the container and those
/// of this host, which may not have got there yet.
///
/// # Errors
/// If neither socket lists nor `/proc/net` can be read.
pub fn port_connections(container_pid: i32, inside: u16, published: Option<u16>) -> io::Result<usize> {
    // Without root the agent cannot enter the container and reads its table instead: the same, slower.
    let within = within(container_pid, move || tcp_connections(|local, _| local == inside))
        .or_else(|_| table_connections(&format!("/proc/{container_pid}/net"), |local, _| local == inside))?;
    let Some(published) = published else { return Ok(within) };
    let outside = tcp_connections(|_, remote| remote == published)
        .or_else(|_| table_connections("/proc/self/net", |_, remote| remote == published))?;
    Ok(within.max(outside))
}

fn table_connections(net: &str, fits: impl Fn(u16, u16) -> bool + Copy) -> io::Result<usize> {
    let mut total = 0;
    for table in ["tcp", "tcp6"] {
        match fs::read_to_string(format!("{net}/{table}")) {
            Ok(text) => total += count(&text, fits),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    Ok(total)
}

/// Counts lines of `/proc/net/tcp` that are open or being opened and whose ports match.
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
        let own = i32::try_from(std::process::id()).expect("a pid");
        let counted = |path: &Path| socket_connections(path, Some(own), own).expect("a count");
        assert_eq!((counted(&a), counted(&b)), (0, 0));
        let clients: Vec<UnixStream> = (0..3).map(|_| UnixStream::connect(&a).expect("a connection")).collect();
        // Not accepted yet: a request may be in flight.
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
        assert_eq!(port_connections(own, port, Some(port)).expect("a table"), 0);
        let _client = std::net::TcpStream::connect(("127.0.0.1", port)).expect("a connection");
        assert_eq!(port_connections(own, port, Some(port)).expect("a table"), 1);
    }
}
