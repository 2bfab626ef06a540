//! A wire between the agent and etcd, on which answers may get lost and requests be held up.
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

/// Whether a request fits, by what is read of it at once.
type Fits = Box<dyn FnMut(&[u8]) -> bool + Send>;

/// What happens to a request.
struct Rule {
    fits: Fits,
    fate: Fate,
}

#[derive(Clone, Copy, PartialEq)]
enum Fate {
    /// It arrives, and from then on no answer comes back on its connection.
    Mute,
    /// It is kept until it is released.
    Hold,
}

/// What of the watch gets lost; all else arrives, signs of life of the connection too.
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
    swallowed: usize,
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

/// Passes on what is said, both ways, until it is told otherwise.
pub struct Wire {
    at: SocketAddr,
    shared: Arc<Shared>,
}

impl Wire {
    /// Leads the agent of a lab to the lab's etcd, from its next start on. It ends with the test's process.
    pub fn lead(lab: &Lab) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a socket");
        let wire = Self { at: listener.local_addr().expect("an address"), shared: Arc::default() };
        let config = fs::read_to_string(lab.path("agent.toml")).expect("a file");
        fs::write(lab.path("agent.toml"), config.replace(&lab.etcd.to_string(), &wire.at.to_string())).expect("a file");
        let (shared, server) = (wire.shared.clone(), lab.etcd);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                // A server that is away ends the connection.
                if let Ok(server) = TcpStream::connect(server) {
                    carry(&shared, client, server);
                }
            }
        });
        wire
    }

    /// The next request that fits arrives, and from then on no answer comes back on its connection.
    pub fn lose_answer(&self, fits: impl FnMut(&[u8]) -> bool + Send + 'static) {
        self.shared.lock().rule = Some(Rule { fits: Box::new(fits), fate: Fate::Mute });
    }

    /// The next request that fits is kept until it is released.
    pub fn hold(&self, fits: impl FnMut(&[u8]) -> bool + Send + 'static) {
        self.shared.lock().rule = Some(Rule { fits: Box::new(fits), fate: Fate::Hold });
    }

    /// Whether a request is held.
    pub fn is_holding(&self) -> bool {
        self.shared.lock().holding
    }

    /// Lets it go on.
    pub fn release(&self) {
        self.shared.lock().holding = false;
        self.shared.released.notify_all();
    }

    /// How many requests have lost their answers.
    pub fn lost(&self) -> usize {
        self.shared.lock().lost
    }

    /// The next message of a watch gets lost.
    pub fn swallow_one(&self) {
        self.shared.lock().loss = Loss::Next;
    }

    /// All messages of watches get lost, until told otherwise.
    pub fn swallow_all(&self) {
        self.shared.lock().loss = Loss::All;
    }

    /// They arrive again.
    pub fn swallow_none(&self) {
        self.shared.lock().loss = Loss::Nothing;
    }

    /// How many messages of watches were lost.
    pub fn swallowed(&self) -> usize {
        self.shared.lock().swallowed
    }

    /// Ends all connections that are open.
    pub fn cut(&self) {
        for stream in self.shared.lock().open.drain(..) {
            // It may have ended by itself.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn carry(shared: &Arc<Shared>, client: TcpStream, server: TcpStream) {
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
            match state.rule.take_if(|rule| (rule.fits)(bytes)).map(|rule| rule.fate) {
                // Before the request is passed on: no answer can come first.
                Some(Fate::Mute) => {
                    mute.store(true, Ordering::SeqCst);
                    state.lost += 1;
                }
                Some(Fate::Hold) => {
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
                let is_lost = state.loss != Loss::Nothing && watches_back.is_news(frame);
                if is_lost {
                    state.swallowed += 1;
                    state.loss = if state.loss == Loss::Next { Loss::Nothing } else { state.loss };
                }
                !is_lost
            };
            frames.into_iter().filter(|frame| arrives(frame)).flat_map(|frame| frame.0).collect()
        });
    });
}

/// One direction, until an end of it is gone; with what is left of all that is read.
fn pass(from: &mut TcpStream, to: &mut TcpStream, mut left: impl FnMut(&[u8]) -> Vec<u8>) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        if to.write_all(&left(&buffer[..read])).is_err() {
            break;
        }
    }
    // Whoever waits at the other end learns of it.
    let _ = to.shutdown(Shutdown::Write);
}

/// How often a key is named in what was read at once.
pub fn named(key: &str, bytes: &[u8]) -> usize {
    bytes.windows(key.len()).filter(|w| *w == key.as_bytes()).count()
}
