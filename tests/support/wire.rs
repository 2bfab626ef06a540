//! A wire between the agent and etcd, on which answers may get lost.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

/// Which requests lose their answers, by what is read of them at once.
type Rule = Box<dyn Fn(&[u8]) -> bool + Send>;

#[derive(Default)]
struct State {
    rule: Option<Rule>,
    open: Vec<TcpStream>,
    lost: usize,
}

/// Passes on what is said, both ways, until it is told otherwise.
pub struct Wire {
    /// Where it listens.
    pub at: SocketAddr,
    state: Arc<Mutex<State>>,
}

impl Wire {
    /// Leads to this address. It ends with the test's process.
    pub fn to(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a socket");
        let wire = Self { at: listener.local_addr().expect("an address"), state: Arc::default() };
        let state = wire.state.clone();
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                // A server that is away ends the connection.
                if let Ok(server) = TcpStream::connect(server) {
                    carry(&state, client, server);
                }
            }
        });
        wire
    }

    /// The next request that fits arrives, and from then on no answer comes back on its connection.
    pub fn lose_answer(&self, fits: impl Fn(&[u8]) -> bool + Send + 'static) {
        lock(&self.state).rule = Some(Box::new(fits));
    }

    /// How many requests have lost their answers.
    pub fn lost(&self) -> usize {
        lock(&self.state).lost
    }

    /// Ends all connections that are open.
    pub fn cut(&self) {
        for stream in lock(&self.state).open.drain(..) {
            // It may have ended by itself.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn carry(state: &Arc<Mutex<State>>, client: TcpStream, server: TcpStream) {
    let both = [&client, &server].map(|s| s.try_clone().expect("a socket"));
    lock(state).open.extend(both);
    let mute = Arc::new(AtomicBool::new(false));
    let (forth, back) = ((client.try_clone(), server.try_clone()), (server, client));
    let (state, muted) = (state.clone(), mute.clone());
    thread::spawn(move || {
        let (Ok(mut from), Ok(mut to)) = forth else { return };
        pass(&mut from, &mut to, |bytes| {
            let mut state = lock(&state);
            if state.rule.take_if(|fits| fits(bytes)).is_some() {
                // Before the request is passed on: no answer can come first.
                mute.store(true, Ordering::SeqCst);
                state.lost += 1;
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
