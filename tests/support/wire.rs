//! A proxy between the agent and etcd that can drop responses and hold requests.
#![allow(clippy::disallowed_methods, reason = "a test writes files of its own")]

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use super::{
    frames::{Frame, Frames, Watches},
    lab::Lab,
};

/// Matches a request by the bytes of one read.
type Matches = Box<dyn FnMut(&[u8]) -> bool + Send>;

/// What happens to a request.
struct Rule {
    matches: Matches,
    action: Action,
}

#[derive(Clone, Copy, PartialEq)]
enum Action {
    /// It is delivered, and from then on no response comes back on its connection.
    Mute,
    /// It is kept until it is released.
    Hold,
}

/// Which watch messages are dropped; everything else is delivered, including keep-alives of the connection.
#[derive(Clone, Copy, Default, PartialEq)]
enum Loss {
    #[default]
    Nothing,
    Next,
    All,
}

#[derive(Default)]
struct State {
    rule: Option<Rule>,
    loss: Loss,
    dropped: usize,
    open: Vec<TcpStream>,
    lost: usize,
    holding: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    released: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Forwards both directions until a rule matches.
pub struct Wire {
    at: SocketAddr,
    shared: Arc<Shared>,
}

impl Wire {
    /// Puts the proxy between a lab's agent and etcd, from the agent's next start on. It ends with the test process.
    pub fn intercept(lab: &Lab) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a socket");
        let wire = Self { at: listener.local_addr().expect("an address"), shared: Arc::default() };
        let config = fs::read_to_string(lab.path("agent.toml")).expect("a file");
        fs::write(lab.path("agent.toml"), config.replace(&lab.etcd.to_string(), &wire.at.to_string())).expect("a file");
        let (shared, server) = (wire.shared.clone(), lab.etcd);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                // If the server is down, the connection ends.
                if let Ok(server) = TcpStream::connect(server) {
                    forward(&shared, client, server);
                }
            }
        });
        wire
    }

    /// The next matching request is delivered, and from then on no response comes back on its connection.
    pub fn lose_answer(&self, matches: impl FnMut(&[u8]) -> bool + Send + 'static) {
        self.shared.lock().rule = Some(Rule { matches: Box::new(matches), action: Action::Mute });
    }

    /// The next matching request is kept until it is released.
    pub fn hold(&self, matches: impl FnMut(&[u8]) -> bool + Send + 'static) {
        self.shared.lock().rule = Some(Rule { matches: Box::new(matches), action: Action::Hold });
    }

    /// True if a request is held.
    pub fn is_holding(&self) -> bool {
        self.shared.lock().holding
    }

    /// Releases the held request.
    pub fn release(&self) {
        self.shared.lock().holding = false;
        self.shared.released.notify_all();
    }

    /// The number of requests whose responses were dropped.
    pub fn lost(&self) -> usize {
        self.shared.lock().lost
    }

    /// Drops the next watch message.
    pub fn drop_next_watch_message(&self) {
        self.shared.lock().loss = Loss::Next;
    }

    /// Drops all watch messages.
    pub fn drop_watch_messages(&self) {
        self.shared.lock().loss = Loss::All;
    }

    /// Delivers watch messages again.
    pub fn deliver_watch_messages(&self) {
        self.shared.lock().loss = Loss::Nothing;
    }

    /// The number of watch messages dropped.
    pub fn dropped(&self) -> usize {
        self.shared.lock().dropped
    }

    /// Closes all open connections.
    pub fn cut(&self) {
        for stream in self.shared.lock().open.drain(..) {
            // It may be closed already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn forward(shared: &Arc<Shared>, client: TcpStream, server: TcpStream) {
    let both = [&client, &server].map(|s| s.try_clone().expect("a socket"));
    shared.lock().open.extend(both);
    let mute = Arc::new(AtomicBool::new(false));
    let (forth, back) = ((client.try_clone(), server.try_clone()), (server, client));
    let watches = Arc::new(Watches::default());
    let (shared, muted) = (shared.clone(), mute.clone());
    let (shared_back, watches_back) = (shared.clone(), watches.clone());
    thread::spawn(move || {
        let (Ok(mut from), Ok(mut to)) = forth else { return };
        let mut frames = Frames::of_client();
        pass(&mut from, &mut to, |bytes| {
            frames.take(bytes).iter().for_each(|frame| watches.follow(frame));
            let mut state = shared.lock();
            match state.rule.take_if(|rule| (rule.matches)(bytes)).map(|rule| rule.action) {
                // Before the request is passed on: no response can come first.
                Some(Action::Mute) => {
                    mute.store(true, Ordering::SeqCst);
                    state.lost += 1;
                }
                Some(Action::Hold) => {
                    state.holding = true;
                    while state.holding {
                        state = shared.released.wait(state).unwrap_or_else(PoisonError::into_inner);
                    }
                }
                None => {}
            }
            bytes.to_vec()
        });
    });
    thread::spawn(move || {
        let (mut from, mut to) = back;
        let mut frames = Frames::of_server();
        pass(&mut from, &mut to, |bytes| {
            let frames = frames.take(bytes);
            if muted.load(Ordering::SeqCst) {
                return Vec::new();
            }
            let mut state = shared_back.lock();
            let mut arrives = |frame: &Frame| {
                let is_lost = state.loss != Loss::Nothing && watches_back.is_watch_message(frame);
                if is_lost {
                    state.dropped += 1;
                    state.loss = if state.loss == Loss::Next { Loss::Nothing } else { state.loss };
                }
                !is_lost
            };
            frames.into_iter().filter(|frame| arrives(frame)).flat_map(|frame| frame.0).collect()
        });
    });
}

/// Copies one direction until either end closes; `left` returns what to forward of each read.
fn pass(from: &mut TcpStream, to: &mut TcpStream, mut left: impl FnMut(&[u8]) -> Vec<u8>) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        if to.write_all(&left(&buffer[..read])).is_err() {
            break;
        }
    }
    // The reader at the other end sees the end of the stream.
    let _ = to.shutdown(Shutdown::Write);
}

/// How often a key occurs in the bytes of one read.
pub fn count_key(key: &str, bytes: &[u8]) -> usize {
    bytes.windows(key.len()).filter(|w| *w == key.as_bytes()).count()
}
