//! A relay between the agent and the engine. It passes requests on, holds them, or loses their answers, as it is told.
//!
//! Each connection carries one request: the relay puts `Connection: close` into its head. So only the first head of a
//! connection is ever read, and all that follows is copied as bytes, whatever it is: chunks, streams, upgraded
//! connections. To look for further heads in what a client writes would mean to know where each body ends. The agent's
//! client makes a new connection for each request anyway.

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
enum Fate {
    /// It is kept until it is released, as by an engine that hangs. Then it is carried out, whoever still listens.
    Hold,
    /// The engine does it. Its answer is thrown away, and the connection ends without a byte.
    Lose,
    /// The answer begins, and what should follow never comes: for streams.
    Mute,
    /// The engine never hears of it, and this is said in its place.
    Refuse(&'static str),
}

struct Rule {
    fits: Box<dyn Fn(&str) -> bool + Send>,
    fate: Fate,
    once: bool,
}

#[derive(Default)]
struct State {
    rules: Vec<Rule>,
    /// How often held requests were released.
    released: u64,
    held: usize,
    lost: usize,
    /// The first lines of all requests.
    seen: Vec<String>,
    /// Both ends of each connection, by its number.
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
    /// Listens at this path for the engine of this machine.
    pub fn start(path: &Path) -> Self {
        let listener = UnixListener::bind(path).expect("a socket");
        let shared =
            Arc::new(Shared { engine: engine_socket(), state: Mutex::new(State::default()), changed: Condvar::new() });
        let accepting = shared.clone();
        // It ends with the test's process.
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

    /// Holds every request whose first line fits.
    pub fn hold(&self, fits: impl Fn(&str) -> bool + Send + 'static) {
        self.rule(fits, Fate::Hold, false);
    }

    /// Holds the next request that fits, and no other.
    pub fn hold_next(&self, fits: impl Fn(&str) -> bool + Send + 'static) {
        self.rule(fits, Fate::Hold, true);
    }

    /// Has requests that fit done, and loses their answers.
    pub fn lose(&self, fits: impl Fn(&str) -> bool + Send + 'static) {
        self.rule(fits, Fate::Lose, false);
    }

    /// Has the next request that fits done, and loses its answer.
    pub fn lose_next(&self, fits: impl Fn(&str) -> bool + Send + 'static) {
        self.rule(fits, Fate::Lose, true);
    }

    /// Answers the next request that fits with a conflict and these words, as the engine would.
    pub fn refuse_next(&self, fits: impl Fn(&str) -> bool + Send + 'static, words: &'static str) {
        self.rule(fits, Fate::Refuse(words), true);
    }

    /// Lets answers begin, and nothing follow.
    pub fn mute(&self, fits: impl Fn(&str) -> bool + Send + 'static) {
        self.rule(fits, Fate::Mute, false);
    }

    /// Forgets all it was told, and carries out what it holds.
    pub fn pass(&self) {
        let mut state = self.shared.lock();
        state.rules.clear();
        state.released += 1;
        self.shared.changed.notify_all();
    }

    /// Ends all connections that are open. What is held on them is never carried out.
    pub fn cut(&self) {
        let mut state = self.shared.lock();
        for stream in state.open.drain().flat_map(|(_, ends)| ends) {
            // It may have ended by itself.
            let _ = stream.shutdown(Shutdown::Both);
        }
        self.shared.changed.notify_all();
    }

    /// How many requests are held now.
    pub fn held(&self) -> usize {
        self.shared.lock().held
    }

    /// How many answers were lost.
    pub fn lost(&self) -> usize {
        self.shared.lock().lost
    }

    /// How many requests have come whose first line fits.
    pub fn seen(&self, fits: impl Fn(&str) -> bool) -> usize {
        self.shared.lock().seen.iter().filter(|line| fits(line)).count()
    }

    fn rule(&self, fits: impl Fn(&str) -> bool + Send + 'static, fate: Fate, once: bool) {
        self.shared.lock().rules.push(Rule { fits: Box::new(fits), fate, once });
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
        // Whatever breaks off here ends this connection, as it would without a relay.
        let Ok((head, rest)) = read_head(client) else { return };
        let Ok(end) = client.try_clone() else { return };
        let line = String::from_utf8_lossy(&head).lines().next().unwrap_or_default().to_owned();
        let (number, fate) = self.admit(line, end);
        if fate == Some(Fate::Hold) {
            self.wait(number);
        }
        let ended = self.carry_out(number, fate, client, &head, &rest);
        let mut state = self.lock();
        if ended.is_ok() && fate == Some(Fate::Lose) {
            state.lost += 1;
        }
        for stream in state.open.remove(&number).into_iter().flatten() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Gives a request its number and its fate.
    fn admit(&self, line: String, client: UnixStream) -> (u64, Option<Fate>) {
        let mut state = self.lock();
        let number = state.next;
        state.next += 1;
        state.open.insert(number, vec![client]);
        let rule = state.rules.iter().position(|r| (r.fits)(&line));
        let fate = rule.map(|at| {
            let fate = state.rules[at].fate;
            if state.rules[at].once {
                state.rules.remove(at);
            }
            fate
        });
        state.seen.push(line);
        (number, fate)
    }

    /// Until it is released, or cut.
    fn wait(&self, number: u64) {
        let mut state = self.lock();
        state.held += 1;
        let released = state.released;
        while state.released == released && state.open.contains_key(&number) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.held -= 1;
    }

    fn carry_out(
        &self,
        number: u64,
        fate: Option<Fate>,
        mut client: &UnixStream,
        head: &[u8],
        rest: &[u8],
    ) -> io::Result<()> {
        if let Some(Fate::Refuse(words)) = fate {
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
            // A client that has written all may still read: only this direction ends.
            let _ = io::copy(&mut &from, &mut &to);
            let _ = to.shutdown(Shutdown::Write);
        });
        match fate {
            Some(Fate::Lose) => io::copy(&mut &engine, &mut io::sink())?,
            Some(Fate::Mute) => {
                let (head, _) = read_head(&engine)?;
                client.write_all(&head)?;
                io::copy(&mut &engine, &mut io::sink())?;
                // The end would be something that follows.
                self.wait(number);
                0
            }
            Some(Fate::Hold | Fate::Refuse(_)) | None => io::copy(&mut &engine, &mut client)?,
        };
        Ok(())
    }
}

/// A head with its empty line, and what came behind it.
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

/// The head of a request after whose answer the engine ends the connection. One that asks for an upgrade stays as it is.
fn closing(head: &[u8]) -> Vec<u8> {
    if String::from_utf8_lossy(head).to_ascii_lowercase().contains("\r\nconnection:") {
        return head.to_vec();
    }
    let line = head.windows(2).position(|w| w == b"\r\n").map_or(0, |at| at + 2);
    [&head[..line], &b"Connection: close\r\n"[..], &head[line..]].concat()
}

/// Requests with this method, and with this in their path.
pub fn is(method: &str, part: &str) -> impl Fn(&str) -> bool + Send + use<> {
    let (method, part) = (format!("{method} "), part.to_owned());
    move |line: &str| line.starts_with(&method) && line.contains(&part)
}

/// Looks at the containers of one app.
pub fn looks_at(app: &str) -> impl Fn(&str) -> bool + Send + use<> {
    // The last of the labels that are asked for, in JSON, in a query.
    is("GET", &format!("demae.app%3D{app}%22"))
}

/// Posts to the engine itself, past all relays, and waits for the end of the answer.
pub fn post(path: &str) -> io::Result<String> {
    let mut stream = UnixStream::connect(engine_socket())?;
    write!(stream, "POST {path} HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Where the tests' own `docker` finds the engine.
fn engine_socket() -> PathBuf {
    let host = std::env::var("DOCKER_HOST").unwrap_or_default();
    host.strip_prefix("unix://").unwrap_or("/var/run/docker.sock").into()
}
