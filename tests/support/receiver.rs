//! A webhook receiver: records requests and answers with a given status.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
};

/// One request.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// Keyed by lower-case name.
    pub headers: BTreeMap<String, String>,
    pub body: String,
}

pub struct Receiver {
    pub address: SocketAddr,
    deliveries: Arc<Mutex<Vec<Delivery>>>,
}

impl Receiver {
    /// Answers each request with `status(n)`, where n is the number of requests before it.
    pub fn start(status: impl Fn(usize) -> u16 + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let deliveries = Arc::new(Mutex::new(Vec::new()));
        let (kept, status) = (deliveries.clone(), Arc::new(status));
        // Ends with the test process.
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (kept, status) = (kept.clone(), status.clone());
                thread::spawn(move || serve(&stream, &kept, &*status));
            }
        });
        Self { address, deliveries }
    }

    pub fn deliveries(&self) -> Vec<Delivery> {
        self.deliveries.lock().expect("no thread panicked with it").clone()
    }
}

fn serve(stream: &TcpStream, kept: &Mutex<Vec<Delivery>>, status: &dyn Fn(usize) -> u16) -> Option<()> {
    let mut input = BufReader::new(stream);
    loop {
        let mut headers = BTreeMap::new();
        loop {
            let mut line = String::new();
            if input.read_line(&mut line).ok()? == 0 {
                return None;
            }
            let line = line.trim();
            if line.is_empty() && !headers.is_empty() {
                break;
            }
            let (name, value) = line.split_once(':').unwrap_or(("request", line));
            headers.insert(name.to_lowercase(), value.trim().to_owned());
        }
        let length = headers.get("content-length").and_then(|l| l.parse().ok()).unwrap_or(0);
        let mut body = vec![0; length];
        input.read_exact(&mut body).ok()?;
        let body = String::from_utf8_lossy(&body).into_owned();
        let before = {
            let mut kept = kept.lock().ok()?;
            kept.push(Delivery { headers, body });
            kept.len() - 1
        };
        let answer = format!("HTTP/1.1 {} whatever\r\ncontent-length: 0\r\n\r\n", status(before));
        let mut output = stream;
        output.write_all(answer.as_bytes()).ok()?;
    }
}
