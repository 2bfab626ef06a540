//! A tiny web app to deploy: static, without dependencies, with the moods that a test needs.
//!
//! With the argument `check` it only asks whether another one listens on `SOCKET`.
//!
//! Environment: `SOCKET` (a path) or `PORT` (8080 unless given) to listen on, `VERSION` to tell, `GREETING` to tell,
//! `START_MS` to be slow at the start, `MOOD` to be `sick` (`/healthz` answers 503), `exit` (ends at once, code 3),
//! `deaf` (never listens) or `greedy` (takes 256 MB before it listens).
//!
//! Paths: `/` tells version and release, `/healthz`, `/slow?MS`, `/stream?N` (N lines, one every 100 ms),
//! `/env?NAME` (a variable, to see that it arrived), `/echo` (a connection that is upgraded and echoes bytes),
//! `/sicken` (from now on `/healthz` answers 503), `/eat?MB` (takes so much memory and keeps it), `/die` (ends, code 4).
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::disallowed_methods,
    reason = "a program of its own, without demae's rules"
)]

use std::{
    env,
    io::{BufRead, BufReader, Read, Write},
    net::TcpListener,
    os::unix::net::UnixListener,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

static SICK: AtomicBool = AtomicBool::new(false);

fn main() {
    if env::args().nth(1).as_deref() == Some("check") {
        // For a health check that Docker runs inside the container.
        let path = env::var("SOCKET").unwrap_or_default();
        std::process::exit(if std::os::unix::net::UnixStream::connect(path).is_ok() { 0 } else { 1 });
    }
    let mood = env::var("MOOD").unwrap_or_default();
    println!("version {} starts, mood `{mood}`", version());
    if mood == "exit" {
        eprintln!("cannot work like this");
        std::process::exit(3);
    }
    if mood == "greedy" {
        eat(256);
    }
    if let Some(ms) = env::var("START_MS").ok().and_then(|ms| ms.parse().ok()) {
        thread::sleep(Duration::from_millis(ms));
    }
    if mood == "deaf" {
        loop {
            thread::park();
        }
    }
    SICK.store(mood == "sick", Ordering::Relaxed);
    match env::var("SOCKET") {
        Ok(path) => {
            let listener = UnixListener::bind(&path).unwrap_or_else(|e| panic!("cannot bind {path}: {e}"));
            for stream in listener.incoming().flatten() {
                thread::spawn(move || {
                    let other = stream.try_clone()?;
                    serve(stream, other)
                });
            }
        }
        Err(_) => {
            let port: u16 = env::var("PORT").ok().and_then(|p| p.parse().ok()).unwrap_or(8080);
            let listener = TcpListener::bind(("0.0.0.0", port)).unwrap_or_else(|e| panic!("cannot bind {port}: {e}"));
            for stream in listener.incoming().flatten() {
                thread::spawn(move || {
                    let other = stream.try_clone()?;
                    serve(stream, other)
                });
            }
        }
    }
}

fn version() -> String {
    env::var("VERSION").unwrap_or_else(|_| "?".into())
}

/// One connection: requests until the other side has had enough.
fn serve(input: impl Read, mut output: impl Write) -> std::io::Result<()> {
    let mut input = BufReader::new(input);
    loop {
        let mut line = String::new();
        if input.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let path = line.split(' ').nth(1).unwrap_or("/").to_owned();
        let (mut length, mut close) = (0, false);
        loop {
            let mut header = String::new();
            if input.read_line(&mut header)? == 0 {
                return Ok(());
            }
            let header = header.trim().to_ascii_lowercase();
            if header.is_empty() {
                break;
            }
            if let Some(n) = header.strip_prefix("content-length:") {
                length = n.trim().parse().unwrap_or(0);
            }
            close |= header == "connection: close";
        }
        let mut body = vec![0; length];
        input.read_exact(&mut body)?;
        let (path, query) = path.split_once('?').unwrap_or((&path, ""));
        match path {
            "/healthz" if SICK.load(Ordering::Relaxed) => answer(&mut output, "503 Service Unavailable", "sick\n")?,
            "/sicken" => {
                SICK.store(true, Ordering::Relaxed);
                answer(&mut output, "200 OK", "sick from now on\n")?;
            }
            "/eat" => {
                eat(query.parse().unwrap_or(1));
                answer(&mut output, "200 OK", "it was good\n")?;
            }
            "/die" => std::process::exit(4),
            "/slow" => {
                thread::sleep(Duration::from_millis(query.parse().unwrap_or(1000)));
                answer(&mut output, "200 OK", &hello(length))?;
            }
            "/stream" => stream(&mut output, query.parse().unwrap_or(10))?,
            "/env" => answer(&mut output, "200 OK", &env::var(query).unwrap_or_default())?,
            "/echo" => {
                output.write_all(
                    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
                )?;
                output.flush()?;
                let mut bytes = [0; 1024];
                loop {
                    match input.read(&mut bytes)? {
                        0 => return Ok(()),
                        n => output.write_all(&bytes[..n])?,
                    }
                }
            }
            _ => answer(&mut output, "200 OK", &hello(length))?,
        }
        if close {
            return Ok(());
        }
    }
}

/// Takes so many megabytes, and never gives them back. They are written to, so that the kernel must hand them out.
fn eat(megabytes: usize) {
    for _ in 0..megabytes {
        std::mem::forget(std::hint::black_box(vec![1u8; 1 << 20]));
    }
}

fn hello(received: usize) -> String {
    let get = |name| env::var(name).unwrap_or_default();
    format!(
        "version={} release={} replica={} greeting={} received={received}\n",
        version(),
        get("DEMAE_RELEASE"),
        get("DEMAE_REPLICA"),
        get("GREETING")
    )
}

fn answer(output: &mut impl Write, status: &str, body: &str) -> std::io::Result<()> {
    let text = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    output.write_all(text.as_bytes())?;
    output.flush()
}

fn stream(output: &mut impl Write, lines: usize) -> std::io::Result<()> {
    output.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")?;
    for n in 0..lines {
        let line = format!("line {n} of version {}\n", version());
        write!(output, "{:x}\r\n{line}\r\n", line.len())?;
        output.flush()?;
        thread::sleep(Duration::from_millis(100));
    }
    output.write_all(b"0\r\n\r\n")?;
    output.flush()
}
