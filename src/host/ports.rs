//! Loopback ports for apps that listen on TCP.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::TcpListener,
    ops::RangeInclusive,
    sync::Mutex,
    time::{Duration, Instant},
};

/// How long a port rests after its use: nginx workers that know it may live a while.
const QUARANTINE: Duration = Duration::from_secs(120);
/// How long it rests at least: a container that was just given one may not be there to be seen yet.
const SHORTEST_REST: Duration = Duration::from_secs(10);

/// Why there is no port.
#[derive(Debug, thiserror::Error)]
#[error("no port of {}-{} is free: {taken} belong to containers, {resting} rest after use, the others are taken by other programs", range.start(), range.end())]
pub struct NoPort {
    range: RangeInclusive<u16>,
    taken: usize,
    resting: usize,
}

/// Whether another program listens on a loopback port.
pub fn is_taken(port: u16) -> bool {
    TcpListener::bind(("127.0.0.1", port)).is_err_and(|e| e.kind() == std::io::ErrorKind::AddrInUse)
}

/// The ports of a range, and which of them are spoken for.
#[derive(Debug)]
pub struct Ports {
    range: RangeInclusive<u16>,
    resting: Mutex<HashMap<u16, Instant>>,
}

impl Ports {
    /// Hands out ports of this range.
    pub fn new(range: RangeInclusive<u16>) -> Self {
        Self { range, resting: Mutex::new(HashMap::new()) }
    }

    /// A port that nobody has: not a container of this host, nobody who listens, nobody who just had it. The seed
    /// spreads the choice, so that one app does not get the port another has just left.
    ///
    /// # Errors
    /// If the whole range is in use.
    pub fn take(&self, seed: &str, taken: &HashSet<u16>) -> Result<u16, NoPort> {
        let mut resting = self.resting.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        resting.retain(|_, since| since.elapsed() < QUARANTINE);
        let count = u64::from(*self.range.end() - *self.range.start()) + 1;
        let begin = seed.bytes().fold(0u64, |h, b| h.wrapping_mul(31).wrapping_add(u64::from(b)));
        let in_order = (0..count).filter_map(|offset| u16::try_from(begin.wrapping_add(offset) % count).ok());
        let fresh = in_order.map(|step| *self.range.start() + step).filter(|port| !resting.contains_key(port));
        // Where all have been used lately, the one that has rested longest is better than none.
        let mut rested: Vec<(Instant, u16)> = resting.iter().map(|(port, since)| (*since, *port)).collect();
        rested.sort_unstable();
        let rested = rested.into_iter().filter(|(since, _)| since.elapsed() >= SHORTEST_REST).map(|(_, port)| port);
        let is_free = |port: &u16| !taken.contains(port) && TcpListener::bind(("127.0.0.1", *port)).is_ok();
        match fresh.chain(rested).find(is_free) {
            Some(port) => {
                // Two apps may ask at once, before either container is there to be seen.
                resting.insert(port, Instant::now());
                Ok(port)
            }
            None => Err(NoPort { range: self.range.clone(), taken: taken.len(), resting: resting.len() }),
        }
    }

    /// How many ports of the range are in use or at rest, and how many there are.
    pub fn usage(&self, used: &BTreeSet<u16>) -> (usize, usize) {
        let mut resting = self.resting.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        resting.retain(|_, since| since.elapsed() < QUARANTINE);
        let resting = resting.keys().filter(|port| !used.contains(port)).count();
        (used.iter().filter(|port| self.range.contains(port)).count() + resting, self.range.len())
    }

    /// Lets a port rest.
    pub fn rest(&self, port: u16) {
        let mut resting = self.resting.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        resting.insert(port, Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_never_handed_out_twice() {
        let busy = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = busy.local_addr().expect("an address").port();
        let ports = Ports::new(port..=port);
        assert!(ports.take("a", &HashSet::new()).is_err(), "somebody listens there");
        drop(busy);
        assert!(ports.take("a", &HashSet::from([port])).is_err(), "a container has it");
        assert_eq!(ports.take("a", &HashSet::new()).expect("it is free"), port);
        assert!(ports.take("a", &HashSet::new()).is_err(), "it was just handed out");
    }
}
