//! A client that sends requests at a bounded rate, and counts those that fail: static, without dependencies.
//!
//! `load ADDRESS HOST RATE STOP_FILE` asks the server at ADDRESS for the app that serves HOST, RATE times a second, and
//! beside that for one stream of a second after the other. It ends once `STOP_FILE` exists, and requests in flight with
//! it. It retries nothing. A request failed if its answer is not 200, is cut, or took ten seconds.
//!
//! Each line of its output begins with the time in milliseconds:
//!
//! - `begin`
//! - `release RELEASE VERSION`: answers are of another release than before
//! - `failed REASON`
//! - `total REQUESTS FAILED SLOWEST_MS`: five times a second, and at the end; so far, and the slowest since the line
//!   before. Streams do not count as slow.
#![expect(clippy::print_stdout, clippy::disallowed_methods, reason = "a program of its own, without demae's rules")]

use std::{
    env,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Mutex,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// A request that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(10);
/// Between two lines with totals.
const TOTALS: Duration = Duration::from_millis(200);

#[derive(Default)]
struct Tally {
    requests: u64,
    failed: u64,
    slowest: Duration,
    release: String,
}

struct Load {
    address: SocketAddr,
    host: String,
    stop: PathBuf,
    tally: Mutex<Tally>,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [address, host, rate, stop] = arguments.as_slice() else {
        println!("usage: load ADDRESS HOST RATE STOP_FILE");
        return ExitCode::from(64);
    };
    let (Ok(address), Ok(rate)) = (address.parse(), rate.parse::<u32>()) else {
        println!("usage: ADDRESS is an address with its port, RATE a number");
        return ExitCode::from(64);
    };
    let load = Load { address, host: host.clone(), stop: Path::new(stop).to_owned(), tally: Mutex::default() };
    say("begin");
    thread::scope(|scope| {
        scope.spawn(|| load.ask_at_rate(Duration::from_secs(1) / rate.max(1)));
        scope.spawn(|| load.ask_for_streams());
        while !load.is_stopped() {
            load.print_totals();
            thread::sleep(TOTALS);
        }
    });
    load.print_totals();
    ExitCode::SUCCESS
}

/// Prints a line.
fn say(line: &str) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
    println!("{now} {line}");
}

impl Load {
    fn is_stopped(&self) -> bool {
        self.stop.exists()
    }

    fn print_totals(&self) {
        if let Ok(mut tally) = self.tally.lock() {
            let slowest = std::mem::take(&mut tally.slowest);
            say(&format!("total {} {} {}", tally.requests, tally.failed, slowest.as_millis()));
        }
    }

    /// Every other request has a connection of its own; those between share one.
    fn ask_at_rate(&self, pause: Duration) {
        let (mut kept, mut is_kept) = (None, false);
        let mut next = Instant::now();
        while !self.is_stopped() {
            is_kept = !is_kept;
            let began = Instant::now();
            let answer = if is_kept { self.ask(&mut kept, "/", true) } else { self.ask(&mut None, "/", false) };
            if answer.is_err() {
                kept = None;
            }
            self.count(answer.as_deref(), began, true);
            // After a slow answer what was left out is not made up for: the rate is a bound.
            next = (next + pause).max(Instant::now());
            thread::sleep(next.saturating_duration_since(Instant::now()));
        }
    }

    /// One after the other, so that one is always in flight.
    fn ask_for_streams(&self) {
        while !self.is_stopped() {
            let began = Instant::now();
            let answer = self.ask(&mut None, "/stream?10", false);
            let is_failed = answer.is_err();
            self.count(answer.as_deref(), began, false);
            if is_failed {
                thread::sleep(Duration::from_secs(1));
            }
        }
    }

    fn count(&self, answer: Result<&str, &String>, began: Instant, is_quick: bool) {
        let took = began.elapsed();
        let Ok(mut tally) = self.tally.lock() else { return };
        tally.requests += 1;
        match answer {
            Ok(_) if took >= LIMIT => {
                tally.failed += 1;
                say(&format!("failed after {} ms: it took too long", took.as_millis()));
            }
            Ok(body) if is_quick => {
                tally.slowest = tally.slowest.max(took);
                let word = |name: &str| body.split_whitespace().find_map(|word| word.strip_prefix(name)).unwrap_or("?");
                if tally.release != word("release=") {
                    word("release=").clone_into(&mut tally.release);
                    say(&format!("release {} {}", tally.release, word("version=")));
                }
            }
            Ok(_) => {}
            Err(reason) => {
                tally.failed += 1;
                say(&format!("failed after {} ms: {reason}", took.as_millis()));
            }
        }
    }

    /// One request; the body of its answer, or why it failed.
    fn ask(&self, connection: &mut Option<BufReader<TcpStream>>, path: &str, is_kept: bool) -> Result<String, String> {
        let stream = match connection {
            Some(stream) => stream,
            None => {
                let stream = TcpStream::connect_timeout(&self.address, LIMIT).map_err(|e| format!("connect: {e}"))?;
                stream.set_nodelay(true).map_err(|e| format!("a socket: {e}"))?;
                stream.set_read_timeout(Some(LIMIT)).map_err(|e| format!("a socket: {e}"))?;
                connection.insert(BufReader::new(stream))
            }
        };
        let close = if is_kept { "" } else { "Connection: close\r\n" };
        let request = format!("GET {path} HTTP/1.1\r\nHost: {}\r\n{close}\r\n", self.host);
        stream.get_mut().write_all(request.as_bytes()).map_err(|e| format!("{path}, sending: {e}"))?;
        let (mut status, mut length, mut is_chunked, mut is_closing) = (String::new(), None, false, false);
        stream.read_line(&mut status).map_err(|e| format!("{path}, status: {e}"))?;
        loop {
            let mut line = String::new();
            if stream.read_line(&mut line).map_err(|e| format!("{path}, headers: {e}"))? == 0 {
                return Err(format!("{path}, the headers are cut after `{}` (kept: {is_kept})", status.trim()));
            }
            let line = line.trim().to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(bytes) = line.strip_prefix("content-length:") {
                length = bytes.trim().parse::<usize>().ok();
            }
            is_chunked |= line == "transfer-encoding: chunked";
            is_closing |= line == "connection: close";
        }
        let body = if is_chunked { read_chunks(stream)? } else { read(stream, length.ok_or("there is no length")?)? };
        if is_closing {
            *connection = None;
        }
        if !status.starts_with("HTTP/1.1 200 ") {
            return Err(format!("{path}, answered with {}", status.trim()));
        }
        String::from_utf8(body).map_err(|e| e.to_string())
    }
}

fn read(stream: &mut impl Read, length: usize) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).map_err(|e| format!("the body is cut: {e}"))?;
    Ok(bytes)
}

fn read_chunks(stream: &mut impl BufRead) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).map_err(|e| format!("the body is cut: {e}"))?;
        let size =
            usize::from_str_radix(line.trim(), 16).map_err(|_| "the body is cut: a chunk has no size".to_owned())?;
        let chunk = read(stream, size + 2)?;
        if size == 0 {
            return Ok(bytes);
        }
        bytes.extend_from_slice(&chunk[..size]);
    }
}
