//! A tiny web app to deploy: static, without dependencies, with the failure modes that tests need.
//!
//! With the argument `check` it only checks whether another one listens on `SOCKET`; with `cat` it copies its input to its
//! output, with `print-then-cat BYTES` after so many bytes of its own; with `flood` it prints for ever; with `exit CODE MS` it only exits, after so many milliseconds.
//!
//! Environment: `ALSO_SOCKET` or `ALSO_PORT` (a second endpoint, reported as `way=second`), `ROOT_STATUS` (status of
//! `/`), `ONLY_HOST` (any other host gets 400), `SICK_AFTER_MS` (from then on `/healthz` answers 503), `SOCKET` (a
//! path) or `PORT` (default 8080) to listen on, `VERSION` and `GREETING` (reported by `/`), `START_MS` (start delay),
//! `MOOD`: `sick` (`/healthz` answers 503), `exit` (exits at once, code 3), `deaf` (never listens), `late` (exits at
//! once, code 1, until `/ready/now` exists) or `greedy` (allocates 256 MB before it listens).
//!
//! Paths: `/` (version and release), `/healthz`, `/slow?MS`, `/stream?N` (N lines, one every 100 ms), `/env?NAME` (an
//! environment variable), `/echo` (upgrades the connection and echoes bytes), `/seen` (the received request line,
//! headers and body length), `/cookies?N` (N bytes of `Set-Cookie`), `/location` (a redirect), `/long?N` (a body of N
//! bytes), `/early` (answers before the body arrives), `/sicken` (from now on `/healthz` answers 503), `/eat?MB`
//! (allocates memory for good), `/die` (exits, code 4).
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::disallowed_methods,
    reason = "a program of its own, without demae's rules"
)]

use std::{
    env,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream, UdpSocket},
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
    let bytes = env::args().nth(2).and_then(|count| count.parse().ok());
    if let Some("print-then-cat" | "flood") = env::args().nth(1).as_deref()
        && std::io::copy(&mut std::io::repeat(b'y').take(bytes.unwrap_or(u64::MAX)), &mut std::io::stdout()).is_err()
    {
        std::process::exit(1);
    }
    if let Some("cat" | "print-then-cat") = env::args().nth(1).as_deref() {
        let copied = std::io::copy(&mut std::io::stdin(), &mut std::io::stdout());
        std::process::exit(if copied.is_ok() { 0 } else { 1 });
    }
    if env::args().nth(1).as_deref() == Some("exit") {
        let number = |n| env::args().nth(n).and_then(|text| text.parse().ok()).unwrap_or(0);
        println!("the command of {} runs", version());
        thread::sleep(Duration::from_millis(number(3)));
        std::process::exit(i32::try_from(number(2)).unwrap_or(1));
    }
    let mood = env::var("MOOD").unwrap_or_default();
    println!("version {} starts, mood `{mood}`", version());
    if mood == "exit" {
        eprintln!("cannot work like this");
        std::process::exit(3);
    }
    if mood == "late" && !std::path::Path::new("/ready/now").exists() {
        eprintln!("connection refused: no database yet");
        std::process::exit(1);
    }
    if let Some(ms) = env::var("SICK_AFTER_MS").ok().and_then(|ms| ms.parse().ok()) {
        thread::spawn(move || {
            thread::sleep(Duration::from_millis(ms));
            SICK.store(true, Ordering::Relaxed);
        });
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
    if mood == "sick" {
        SICK.store(true, Ordering::Relaxed);
    }
    also();
    match env::var("SOCKET") {
        Ok(path) => {
            let listener = UnixListener::bind(&path).unwrap_or_else(|e| panic!("cannot bind {path}: {e}"));
            for stream in listener.incoming().flatten() {
                thread::spawn(move || {
                    let other = stream.try_clone()?;
                    serve(stream, other, "a unix socket")
                });
            }
        }
        Err(_) => {
            let port: u16 = env::var("PORT").ok().and_then(|p| p.parse().ok()).unwrap_or(8080);
            let listener = TcpListener::bind(("0.0.0.0", port)).unwrap_or_else(|e| panic!("cannot bind {port}: {e}"));
            for stream in listener.incoming().flatten() {
                thread::spawn(move || {
                    let (other, peer) = (stream.try_clone()?, stream.peer_addr()?.ip().to_string());
                    serve(stream, other, &peer)
                });
            }
        }
    }
}

/// Listens on a second endpoint, if one is set.
fn also() {
    fn begin(input: impl Read + Send + 'static, output: impl Write + Send + 'static) {
        let serving = move || serve(input, output, "unknown");
        drop(thread::Builder::new().name("second".into()).spawn(serving));
    }
    if let Ok(path) = env::var("ALSO_SOCKET") {
        let listener = UnixListener::bind(&path).unwrap_or_else(|e| panic!("cannot bind {path}: {e}"));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                begin(stream.try_clone().expect("a socket"), stream);
            }
        });
    }
    if let Some(port) = env::var("ALSO_PORT").ok().and_then(|p| p.parse::<u16>().ok()) {
        let listener = TcpListener::bind(("0.0.0.0", port)).unwrap_or_else(|e| panic!("cannot bind {port}: {e}"));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                begin(stream.try_clone().expect("a socket"), stream);
            }
        });
    }
}

fn version() -> String {
    env::var("VERSION").unwrap_or_else(|_| "?".into())
}

/// Serves a connection until the client closes it.
fn serve(input: impl Read, mut output: impl Write, peer: &str) -> std::io::Result<()> {
    let mut input = BufReader::new(input);
    loop {
        let mut line = String::new();
        if input.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let path = line.split(' ').nth(1).unwrap_or("/").to_owned();
        let (mut length, mut close, mut chunked, mut host) = (0, false, false, String::new());
        let mut seen = line.clone();
        loop {
            let mut header = String::new();
            if input.read_line(&mut header)? == 0 {
                return Ok(());
            }
            seen.push_str(&header);
            let header = header.trim().to_ascii_lowercase();
            if header.is_empty() {
                break;
            }
            chunked |= header.starts_with("transfer-encoding:") && header.contains("chunked");
            if let Some(name) = header.strip_prefix("host:") {
                name.trim().clone_into(&mut host);
            }
            if let Some(n) = header.strip_prefix("content-length:") {
                length = n.trim().parse().unwrap_or(0);
            }
            close |= header == "connection: close";
        }
        if path.starts_with("/early") {
            return answer(&mut output, "200 OK", "before the body\n");
        }
        if chunked {
            length = skip_chunks(&mut input)?;
        } else {
            // Of any length: the body is discarded.
            std::io::copy(&mut (&mut input).take(length as u64), &mut std::io::sink())?;
        }
        if env::var("ONLY_HOST").is_ok_and(|only| only != host) {
            answer(&mut output, "400 Bad Request", "not for this host\n")?;
            continue;
        }
        let (path, query) = path.split_once('?').unwrap_or((&path, ""));
        if let ("/", Ok(status)) = (path, env::var("ROOT_STATUS")) {
            answer(&mut output, &status, "as a gateway with nothing behind it\n")?;
            continue;
        }
        match path {
            "/healthz" if SICK.load(Ordering::Relaxed) => answer(&mut output, "503 Service Unavailable", "sick\n")?,
            "/sicken" => {
                SICK.store(true, Ordering::Relaxed);
                answer(&mut output, "200 OK", "sick from now on\n")?;
            }
            "/seen" => answer(&mut output, "200 OK", &format!("{}body={length}\n", seen.trim_end().to_owned() + "\n"))?,
            "/cookies" => cookies(&mut output, query.parse().unwrap_or(0))?,
            "/location" => {
                output.write_all(b"HTTP/1.1 302 Found\r\nLocation: /elsewhere?a=1\r\nContent-Length: 0\r\n\r\n")?;
                output.flush()?;
            }
            "/long" => answer(&mut output, "200 OK", &"x".repeat(query.parse().unwrap_or(0)))?,
            "/eat" => {
                eat(query.parse().unwrap_or(1));
                answer(&mut output, "200 OK", "it was good\n")?;
            }
            "/reach" => {
                let found = reach(query).unwrap_or_else(|e| format!("not reached: {e}\n"));
                answer(&mut output, "200 OK", &found)?;
            }
            "/peer" => answer(&mut output, "200 OK", peer)?,
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

/// What another app of this network, `name:port`, answers to a request. The name is looked up by hand (RFC 1035): a
/// static program has no resolver of its own.
fn reach(target: &str) -> std::io::Result<String> {
    let (name, port) = target.split_once(':').unwrap_or((target, "80"));
    let resolver = std::fs::read_to_string("/etc/resolv.conf")?;
    let server = resolver.lines().find_map(|line| line.strip_prefix("nameserver ")).unwrap_or("127.0.0.11").trim();
    let mut question = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        question.push(u8::try_from(label.len()).unwrap_or(0));
        question.extend(label.as_bytes());
    }
    question.extend([0, 0, 1, 0, 1]);
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    socket.send_to(&question, (server, 53))?;
    let mut answer = [0; 512];
    let length = socket.recv(&mut answer)?;
    if answer[7] == 0 {
        return Err(std::io::Error::other("no such name"));
    }
    // The last bytes are an address: nothing follows the answers.
    let Some([.., a, b, c, d]) = answer.get(..length) else {
        return Err(std::io::Error::other("a short answer"));
    };
    let mut stream = TcpStream::connect(format!("{a}.{b}.{c}.{d}:{port}"))?;
    write!(stream, "GET / HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text.split_once("\r\n\r\n").map_or(text.clone(), |(_, body)| body.to_owned()))
}

/// Reads a chunked body; returns its length.
fn skip_chunks(input: &mut impl BufRead) -> std::io::Result<usize> {
    let mut length = 0;
    loop {
        let mut line = String::new();
        input.read_line(&mut line)?;
        let size = usize::from_str_radix(line.trim(), 16).map_err(std::io::Error::other)?;
        std::io::copy(&mut (&mut *input).take(size as u64 + 2), &mut std::io::sink())?;
        length += size;
        if size == 0 {
            return Ok(length);
        }
    }
}

/// A response with `bytes` of headers, in cookies of at most 4 KiB.
fn cookies(output: &mut impl Write, bytes: usize) -> std::io::Result<()> {
    let mut head = String::from("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n");
    let mut left = bytes;
    while left > 0 {
        let length = left.min(4000);
        head.push_str(&format!("Set-Cookie: c{left}={}\r\n", "x".repeat(length)));
        left -= length;
    }
    output.write_all(format!("{head}\r\nok").as_bytes())?;
    output.flush()
}

/// Allocates memory for good. The pages are written to, so that the kernel must provide them.
fn eat(megabytes: usize) {
    for _ in 0..megabytes {
        std::mem::forget(std::hint::black_box(vec![1u8; 1 << 20]));
    }
}

fn hello(received: usize) -> String {
    let get = |name| env::var(name).unwrap_or_default();
    format!(
        "version={} way={} release={} replica={} greeting={} received={received}\n",
        version(),
        thread::current().name().unwrap_or("first"),
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
