//! Loopback ports for apps that listen on TCP.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::TcpListener,
    ops::RangeInclusive,
    sync::Mutex,
    time::{Duration, Instant},
};

/// How long a released port stays in quarantine: nginx workers that know it may still run.
const QUARANTINE: Duration = Duration::from_secs(120);
/// Minimum quarantine: a container that was just given a port may not be listed yet.
const MIN_QUARANTINE: Duration = Duration::from_secs(10);

/// No free port.
#[derive(Debug, thiserror::Error)]
#[error("no port of {}-{} is free: {taken} belong to containers, {quarantined} are in quarantine after use, the others are taken by other programs", range.start(), range.end())]
pub struct NoPort {
    range: RangeInclusive<u16>,
    taken: usize,
    quarantined: usize,
}

/// Whether another program listens on a loopback port.
pub fn is_taken(port: u16) -> bool {
    TcpListener::bind(("127.0.0.1", port)).is_err_and(|e| e.kind() == std::io::ErrorKind::AddrInUse)
}

/// The ports of a range, and those in quarantine.
#[derive(Debug)]
pub struct Ports {
    range: RangeInclusive<u16>,
    quarantined: Mutex<HashMap<u16, Instant>>,
}

impl Ports {
    /// Allocates ports of this range.
    pub fn new(range: RangeInclusive<u16>) -> Self {
        Self { range, quarantined: Mutex::new(HashMap::new()) }
    }

    /// Allocates a port that is not used by a container of this host, has no listener and is not in quarantine. The
    /// seed spreads the choice, so that an app does not get the port that another has just released.
    ///
    /// # Errors
    /// If the whole range is in use.
    pub fn allocate(&self, seed: &str, taken: &HashSet<u16>) -> Result<u16, NoPort> {
        let mut quarantined = self.quarantined.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        quarantined.retain(|_, since| since.elapsed() < QUARANTINE);
        let count = u64::from(*self.range.end() - *self.range.start()) + 1;
        let begin = seed.bytes().fold(0u64, |h, b| h.wrapping_mul(31).wrapping_add(u64::from(b)));
        let in_order = (0..count).filter_map(|offset| u16::try_from(begin.wrapping_add(offset) % count).ok());
        let unused = in_order.map(|step| *self.range.start() + step).filter(|port| !quarantined.contains_key(port));
        // If all are in quarantine, take the one that was released first.
        let mut expiring: Vec<(Instant, u16)> = quarantined.iter().map(|(port, since)| (*since, *port)).collect();
        expiring.sort_unstable();
        let expiring =
            expiring.into_iter().filter(|(since, _)| since.elapsed() >= MIN_QUARANTINE).map(|(_, port)| port);
        let is_free = |port: &u16| !taken.contains(port) && TcpListener::bind(("127.0.0.1", *port)).is_ok();
        match unused.chain(expiring).find(is_free) {
            Some(port) => {
                // Two apps may allocate at once, before either container is listed.
                quarantined.insert(port, Instant::now());
                Ok(port)
            }
            None => Err(NoPort { range: self.range.clone(), taken: taken.len(), quarantined: quarantined.len() }),
        }
    }

    /// How many ports of the range are used or in quarantine, and its size.
    pub fn usage(&self, used: &BTreeSet<u16>) -> (usize, usize) {
        let mut quarantined = self.quarantined.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        quarantined.retain(|_, since| since.elapsed() < QUARANTINE);
        let quarantined = quarantined.keys().filter(|port| !used.contains(port)).count();
        (used.iter().filter(|port| self.range.contains(port)).count() + quarantined, self.range.len())
    }

    /// Puts a port into quarantine.
    pub fn quarantine(&self, port: u16) {
        let mut quarantined = self.quarantined.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        quarantined.insert(port, Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_is_never_allocated_twice() {
        let busy = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = busy.local_addr().expect("an address").port();
        let ports = Ports::new(port..=port);
        assert!(ports.allocate("a", &HashSet::new()).is_err(), "another program listens there");
        drop(busy);
        assert!(ports.allocate("a", &HashSet::from([port])).is_err(), "a container has it");
        assert_eq!(ports.allocate("a", &HashSet::new()).expect("it is free"), port);
        assert!(ports.allocate("a", &HashSet::new()).is_err(), "it was just allocated");
    }
}
