//! A load client that sends requests without pause: a response counts if it is complete and has status 200.
//!
//! It retries nothing. A request on a reused connection that ends without a byte is counted separately, since other
//! clients would retry it.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// Behaviour of one client.
#[derive(Debug, Clone)]
pub struct Client {
    /// True if it reuses its connection.
    pub keep_alive: bool,
    /// True if it sends a body.
    pub post: bool,
    /// What it asks for.
    pub path: String,
    /// Pause between two requests.
    pub pause: Duration,
}

impl Client {
    pub fn get(keep_alive: bool) -> Self {
        Self { keep_alive, post: false, path: "/".into(), pause: Duration::from_millis(2) }
    }

    pub fn post(keep_alive: bool) -> Self {
        Self { post: true, ..Self::get(keep_alive) }
    }

    pub fn slow(keep_alive: bool, ms: u64) -> Self {
        Self { path: format!("/slow?{ms}"), ..Self::get(keep_alive) }
    }

    pub fn pausing(self, pause: Duration) -> Self {
        Self { pause, ..self }
    }
}

/// All styles at once: reused and new connections, with and without bodies, and two requests of two seconds in flight.
pub fn mixed(pause: Duration) -> Vec<Client> {
    let quick = [Client::get(true), Client::get(false), Client::post(true), Client::post(false)];
    let mut clients: Vec<Client> = quick.into_iter().map(|c| c.pausing(pause)).collect();
    clients.extend([Client::slow(true, 2000), Client::slow(false, 2000)]);
    clients
}

/// Counters of a load.
#[derive(Debug, Default, Clone)]
pub struct Tally {
    pub requests: u64,
    /// Not 200, cut off, or refused.
    pub failed: u64,
    /// Ended without a byte on a reused connection.
    pub stale: u64,
    /// Of the failed ones: complete responses with another status than 200.
    pub wrong: u64,
    /// The first failures.
    pub reasons: Vec<String>,
    pub slowest: Duration,
    /// Responses by the word after `version=`.
    pub versions: BTreeMap<String, u64>,
    /// When each word after `release=` was first seen.
    pub first_seen: BTreeMap<String, Instant>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    requests: AtomicU64,
    tally: Mutex<Tally>,
}

/// Running clients.
pub struct Load {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    /// Starts the clients.
    pub fn start(address: SocketAddr, host: &str, clients: Vec<Client>) -> Self {
        let shared = Arc::new(Shared::default());
        let threads = clients
            .into_iter()
            .map(|client| {
                let (shared, host) = (shared.clone(), host.to_owned());
                thread::spawn(move || work(&shared, address, &host, &client))
            })
            .collect();
        Self { shared, threads }
    }

    /// Requests completed or failed so far.
    pub fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::Relaxed)
    }

    /// The counters so far.
    pub fn so_far(&self) -> Tally {
        self.shared.tally.lock().expect("a tally").clone()
    }

    /// Lets requests in flight end; returns the counters.
    pub fn stop(self) -> Tally {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("a client does not panic");
        }
        self.shared.tally.lock().expect("a tally").clone()
    }
}

fn work(shared: &Shared, address: SocketAddr, host: &str, client: &Client) {
    let mut connection: Option<BufReader<TcpStream>> = None;
    while !shared.stop.load(Ordering::Relaxed) {
        let reused = connection.is_some();
        let began = Instant::now();
        let answer = ask(&mut connection, address, host, client);
        let took = began.elapsed();
        if !client.keep_alive || answer.is_err() {
            connection = None;
        }
        shared.requests.fetch_add(1, Ordering::Relaxed);
        {
            let mut tally = shared.tally.lock().expect("a tally");
            tally.requests += 1;
            // Slow paths are slow on purpose.
            if !client.path.starts_with("/slow") {
                tally.slowest = tally.slowest.max(took);
            }
            match answer {
                Ok(body) => {
                    let word = |name: &str| {
                        body.split(name).nth(1).and_then(|r| r.split_whitespace().next()).unwrap_or("").to_owned()
                    };
                    *tally.versions.entry(word("version=")).or_default() += 1;
                    tally.first_seen.entry(word("release=")).or_insert_with(Instant::now);
                }
                Err(reason) => {
                    if reason == NO_BYTES && reused {
                        tally.stale += 1;
                    } else {
                        tally.failed += 1;
                        tally.wrong += u64::from(reason.starts_with(NOT_200));
                    }
                    if tally.reasons.len() < 20 {
                        let at = jiff::Timestamp::now();
                        tally.reasons.push(format!("{at} {host}: {reason} (reused: {reused}, {client:?})"));
                    }
                }
            }
        }
        thread::sleep(client.pause);
    }
}

const NO_BYTES: &str = "the connection ended without a byte";
const NOT_200: &str = "answered with ";

/// One request; its body, or why it failed.
fn ask(
    connection: &mut Option<BufReader<TcpStream>>,
    address: SocketAddr,
    host: &str,
    client: &Client,
) -> Result<String, String> {
    let stream = match connection {
        Some(stream) => stream,
        None => {
            let stream =
                TcpStream::connect_timeout(&address, Duration::from_secs(5)).map_err(|e| format!("connect: {e}"))?;
            stream.set_nodelay(true).map_err(|e| e.to_string())?;
            stream.set_read_timeout(Some(Duration::from_secs(30))).map_err(|e| e.to_string())?;
            connection.insert(BufReader::new(stream))
        }
    };
    let method = if client.post { "POST" } else { "GET" };
    let close = if client.keep_alive { "" } else { "Connection: close\r\n" };
    let body = if client.post { "x".repeat(1000) } else { String::new() };
    let length = if client.post { format!("Content-Length: {}\r\n", body.len()) } else { String::new() };
    let request = format!("{method} {} HTTP/1.1\r\nHost: {host}\r\n{close}{length}\r\n{body}", client.path);
    if stream.get_mut().write_all(request.as_bytes()).is_err() {
        return Err(NO_BYTES.into());
    }
    let mut status = String::new();
    match stream.read_line(&mut status) {
        Ok(0) => return Err(NO_BYTES.into()),
        Err(e) if status.is_empty() && e.kind() == std::io::ErrorKind::ConnectionReset => return Err(NO_BYTES.into()),
        Err(e) => return Err(format!("status line: {e}")),
        Ok(_) => {}
    }
    let (mut length, mut chunked, mut closing) = (None, false, false);
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).map_err(|e| format!("headers: {e}"))? == 0 {
            return Err("the headers are cut".into());
        }
        let line = line.trim().to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(n) = line.strip_prefix("content-length:") {
            length = n.trim().parse::<usize>().ok();
        }
        chunked |= line == "transfer-encoding: chunked";
        closing |= line == "connection: close";
    }
    let mut bytes = Vec::new();
    if chunked {
        read_chunks(stream, &mut bytes)?;
    } else {
        let length = length.ok_or("there is no length")?;
        bytes.resize(length, 0);
        stream.read_exact(&mut bytes).map_err(|e| format!("the body is cut: {e}"))?;
    }
    if closing {
        *connection = None;
    }
    if !status.starts_with("HTTP/1.1 200") {
        return Err(format!("{NOT_200}{}", status.trim()));
    }
    String::from_utf8(bytes).map_err(|e| e.to_string())
}

fn read_chunks(stream: &mut BufReader<TcpStream>, bytes: &mut Vec<u8>) -> Result<(), String> {
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).map_err(|e| format!("a chunk is cut: {e}"))?;
        let size = usize::from_str_radix(line.trim(), 16).map_err(|_| "a chunk has no size".to_owned())?;
        let mut chunk = vec![0; size + 2];
        stream.read_exact(&mut chunk).map_err(|e| format!("a chunk is cut: {e}"))?;
        if size == 0 {
            return Ok(());
        }
        bytes.extend_from_slice(&chunk[..size]);
    }
}

/// One request on its own connection; the body of any complete response, whatever its status.
pub fn get(address: SocketAddr, host: &str, path: &str) -> Result<(u16, String), String> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5)).map_err(|e| e.to_string())?;
    stream.set_read_timeout(Some(Duration::from_secs(30))).map_err(|e| e.to_string())?;
    // HTTP/1.0, so the response is not chunked.
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n").map_err(|e| e.to_string())?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").ok_or("the answer is cut")?;
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).ok_or("there is no status")?;
    Ok((status, body.to_owned()))
}
