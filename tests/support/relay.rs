//! A proxy between the agent and the engine. It passes requests on, holds them, or drops their responses.
//!
//! Each connection carries one request: the proxy adds `Connection: close` to its head. So only the first head of a
//! connection is parsed, and everything after it is copied as bytes: chunks, streams, upgraded connections. Parsing
//! further heads would require knowing where each body ends. The agent's client opens a new connection per request
//! anyway.

use std::{
    collections::HashMap,
    io::{self, Read as _, Write as _},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};

/// What happens to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    /// Kept until it is released, as by an engine that hangs. Then it is executed, even if the client is gone.
    Hold,
    /// The engine executes it. Its response is dropped, and the connection ends without a byte.
    Lose,
    /// The response head is passed on, and nothing after it: for streams.
    Mute,
    /// The engine does not get it, and this message is returned instead.
    Refuse(&'static str),
}

struct Rule {
    matches: Box<dyn Fn(&str) -> bool + Send>,
    action: Action,
    once: bool,
}

#[derive(Default)]
struct State {
    rules: Vec<Rule>,
    /// How often held requests were released.
    released: u64,
    held: usize,
    lost: usize,
    /// The request lines of all requests.
    seen: Vec<String>,
    /// Both ends of each open connection, by number.
    open: HashMap<u64, Vec<UnixStream>>,
    next: u64,
}

struct Shared {
    engine: PathBuf,
    state: Mutex<State>,
    changed: Condvar,
}

pub struct Relay {
    path: PathBuf,
    shared: Arc<Shared>,
}

impl Relay {
    /// Listens at this path and forwards to this machine's engine.
    pub fn start(path: &Path) -> Self {
        let listener = UnixListener::bind(path).expect("a socket");
        let shared =
            Arc::new(Shared { engine: engine_socket(), state: Mutex::new(State::default()), changed: Condvar::new() });
        let accepting = shared.clone();
        // Ends with the test process.
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let shared = accepting.clone();
                thread::spawn(move || shared.serve(&client));
            }
        });
        Self { path: path.to_owned(), shared }
    }

    /// For `DOCKER_HOST`.
    pub fn host(&self) -> String {
        format!("unix://{}", self.path.display())
    }

    /// Holds every request whose request line matches.
    pub fn hold(&self, matches: impl Fn(&str) -> bool + Send + 'static) {
        self.rule(matches, Action::Hold, false);
    }

    /// Holds the next request that matches, and no other.
    pub fn hold_next(&self, matches: impl Fn(&str) -> bool + Send + 'static) {
        self.rule(matches, Action::Hold, true);
    }

    /// Executes matching requests and drops their responses.
    pub fn lose(&self, matches: impl Fn(&str) -> bool + Send + 'static) {
        self.rule(matches, Action::Lose, false);
    }

    /// Executes the next matching request and drops its response.
    pub fn lose_next(&self, matches: impl Fn(&str) -> bool + Send + 'static) {
        self.rule(matches, Action::Lose, true);
    }

    /// Answers the next matching request with 409 and this message, as the engine would.
    pub fn refuse_next(&self, matches: impl Fn(&str) -> bool + Send + 'static, words: &'static str) {
        self.rule(matches, Action::Refuse(words), true);
    }

    /// Passes on the heads of matching responses and nothing after them.
    pub fn mute(&self, matches: impl Fn(&str) -> bool + Send + 'static) {
        self.rule(matches, Action::Mute, false);
    }

    /// Removes all rules and executes the held requests.
    pub fn pass(&self) {
        let mut state = self.shared.lock();
        state.rules.clear();
        state.released += 1;
        self.shared.changed.notify_all();
    }

    /// Closes all open connections. Requests held on them are never executed.
    pub fn cut(&self) {
        let mut state = self.shared.lock();
        for stream in state.open.drain().flat_map(|(_, ends)| ends) {
            // It may be closed already.
            let _ = stream.shutdown(Shutdown::Both);
        }
        self.shared.changed.notify_all();
    }

    /// The number of requests held now.
    pub fn held(&self) -> usize {
        self.shared.lock().held
    }

    /// The number of responses dropped.
    pub fn lost(&self) -> usize {
        self.shared.lock().lost
    }

    /// The number of requests so far whose request line matches.
    pub fn seen(&self, matches: impl Fn(&str) -> bool) -> usize {
        self.shared.lock().seen.iter().filter(|line| matches(line)).count()
    }

    fn rule(&self, matches: impl Fn(&str) -> bool + Send + 'static, action: Action, once: bool) {
        self.shared.lock().rules.push(Rule { matches: Box::new(matches), action, once });
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.cut();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, client: &UnixStream) {
        // An error here ends this connection, as it would without a proxy.
        let Ok((head, rest)) = read_head(client) else { return };
        let Ok(end) = client.try_clone() else { return };
        let line = String::from_utf8_lossy(&head).lines().next().unwrap_or_default().to_owned();
        let (number, action) = self.admit(line, end);
        if action == Some(Action::Hold) {
            self.wait(number);
        }
        let ended = self.execute(number, action, client, &head, &rest);
        let mut state = self.lock();
        if ended.is_ok() && action == Some(Action::Lose) {
            state.lost += 1;
        }
        for stream in state.open.remove(&number).into_iter().flatten() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Registers a request; returns its number and the rule for it.
    fn admit(&self, line: String, client: UnixStream) -> (u64, Option<Action>) {
        let mut state = self.lock();
        let number = state.next;
        state.next += 1;
        state.open.insert(number, vec![client]);
        let rule = state.rules.iter().position(|r| (r.matches)(&line));
        let action = rule.map(|at| {
            let action = state.rules[at].action;
            if state.rules[at].once {
                state.rules.remove(at);
            }
            action
        });
        state.seen.push(line);
        (number, action)
    }

    /// Waits until the request is released or its connection is closed.
    fn wait(&self, number: u64) {
        let mut state = self.lock();
        state.held += 1;
        let released = state.released;
        while state.released == released && state.open.contains_key(&number) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.held -= 1;
    }

    fn execute(
        &self,
        number: u64,
        action: Option<Action>,
        mut client: &UnixStream,
        head: &[u8],
        rest: &[u8],
    ) -> io::Result<()> {
        if let Some(Action::Refuse(words)) = action {
            let body = format!("{{\"message\":\"{words}\"}}");
            return write!(
                client,
                "HTTP/1.1 409 Conflict\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                body.len()
            );
        }
        let engine = UnixStream::connect(&self.engine)?;
        match self.lock().open.get_mut(&number) {
            Some(ends) => ends.push(engine.try_clone()?),
            None => return Err(io::ErrorKind::ConnectionAborted.into()),
        }
        (&engine).write_all(&closing(head))?;
        (&engine).write_all(rest)?;
        let (from, to) = (client.try_clone()?, engine.try_clone()?);
        thread::spawn(move || {
            // A client that has sent everything may still read: only this direction ends.
            let _ = io::copy(&mut &from, &mut &to);
            let _ = to.shutdown(Shutdown::Write);
        });
        match action {
            Some(Action::Lose) => io::copy(&mut &engine, &mut io::sink())?,
            Some(Action::Mute) => {
                let (head, _) = read_head(&engine)?;
                client.write_all(&head)?;
                io::copy(&mut &engine, &mut io::sink())?;
                // Closing the connection would be a message too.
                self.wait(number);
                0
            }
            Some(Action::Hold | Action::Refuse(_)) | None => io::copy(&mut &engine, &mut client)?,
        };
        Ok(())
    }
}

/// A head with its empty line, and the bytes after it.
fn read_head(mut stream: &UnixStream) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let (mut bytes, mut buffer) = (Vec::new(), [0; 16 * 1024]);
    loop {
        if let Some(at) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
            let rest = bytes.split_off(at + 4);
            return Ok((bytes, rest));
        }
        match stream.read(&mut buffer)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => bytes.extend_from_slice(&buffer[..n]),
        }
    }
}

/// The request head with `Connection: close` added. An upgrade request stays unchanged.
fn closing(head: &[u8]) -> Vec<u8> {
    if String::from_utf8_lossy(head).to_ascii_lowercase().contains("\r\nconnection:") {
        return head.to_vec();
    }
    let line = head.windows(2).position(|w| w == b"\r\n").map_or(0, |at| at + 2);
    [&head[..line], &b"Connection: close\r\n"[..], &head[line..]].concat()
}

/// Matches requests with this method and with this text in their path.
pub fn is(method: &str, part: &str) -> impl Fn(&str) -> bool + Send + use<> {
    let (method, part) = (format!("{method} "), part.to_owned());
    move |line: &str| line.starts_with(&method) && line.contains(&part)
}

/// Matches requests that list the containers of one app.
pub fn lists_containers_of(app: &str) -> impl Fn(&str) -> bool + Send + use<> {
    // The last label of the filter, JSON in a query string.
    is("GET", &format!("demae.app%3D{app}%22"))
}

/// Posts to the engine directly and waits for the end of the response.
pub fn post(path: &str) -> io::Result<String> {
    let mut stream = UnixStream::connect(engine_socket())?;
    write!(stream, "POST {path} HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// The engine socket that the tests' own `docker` uses.
fn engine_socket() -> PathBuf {
    let host = std::env::var("DOCKER_HOST").unwrap_or_else(|_| String::new());
    host.strip_prefix("unix://").unwrap_or("/var/run/docker.sock").into()
}
