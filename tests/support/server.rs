//! A small server of HTTP on loopback, which answers as a test says, and ends with it.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

/// What is answered to a request.
pub struct Answer {
    /// Such as `200 OK`.
    pub status: &'static str,
    /// Further lines of the head, each with its end.
    pub head: String,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn new(status: &'static str, head: impl Into<String>, body: impl Into<Vec<u8>>) -> Self {
        Self { status, head: head.into(), body: body.into() }
    }
}

pub struct Server {
    pub address: SocketAddr,
    over: Arc<AtomicBool>,
}

impl Server {
    /// Answers to paths, without their first slash.
    pub fn start(answer: impl Fn(&str) -> Answer + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let over = Arc::new(AtomicBool::new(false));
        let is_over = over.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok).take_while(|_| !is_over.load(Relaxed)) {
                let mut stream = stream;
                let (mut request, mut byte) = (Vec::new(), [0]);
                // Some try TLS first (a handshake begins with 22), and then go without.
                let is_more = |request: &[u8]| !request.ends_with(b"\r\n\r\n") && request.first() != Some(&22);
                while is_more(&request) && matches!(stream.read(&mut byte), Ok(1)) {
                    request.push(byte[0]);
                }
                let request = String::from_utf8_lossy(&request).into_owned();
                let mut words = request.split(' ');
                let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
                let Answer { status, head, body } = answer(path.trim_start_matches('/'));
                let head =
                    format!("HTTP/1.1 {status}\r\n{head}content-length: {}\r\nconnection: close\r\n\r\n", body.len());
                let body = if method == "HEAD" { Vec::new() } else { body };
                // The client may have enough of it.
                let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
            }
        });
        Self { address, over }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.over.store(true, Relaxed);
        let _ = std::net::TcpStream::connect(self.address);
    }
}
