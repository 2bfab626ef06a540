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

use super::lab::Lab;

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

#[derive(Default)]
struct State {
    rule: Option<Rule>,
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
    let (shared, muted) = (shared.clone(), mute.clone());
    thread::spawn(move || {
        let (Ok(mut from), Ok(mut to)) = forth else { return };
        pass(&mut from, &mut to, |bytes| {
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
            true
        });
    });
    thread::spawn(move || {
        let (mut from, mut to) = back;
        pass(&mut from, &mut to, |_| !muted.load(Ordering::SeqCst));
    });
}

/// One direction, until an end of it is gone.
fn pass(from: &mut TcpStream, to: &mut TcpStream, mut may: impl FnMut(&[u8]) -> bool) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        if may(&buffer[..read]) && to.write_all(&buffer[..read]).is_err() {
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
