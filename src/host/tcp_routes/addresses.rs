//! Fixed addresses of instances: handed out in turn, so that one is not used again soon.
//!
//! Docker gives the address of a stopped container to the next one. What an app's route leads to must therefore be an
//! address that was chosen here, outside of the part that Docker chooses from.

use std::{
    collections::{HashMap, HashSet},
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use ipnet::Ipv4Net;

/// How long an address rests after it was handed out or released: longer than a connection to its last owner is
/// remembered by the kernel, 120 s (`nf_conntrack_tcp_timeout_time_wait`).
pub const REST: Duration = Duration::from_secs(120);

/// The part of a network that Docker chooses addresses from: the last quarter.
pub fn dynamic_part(subnet: Ipv4Net) -> Option<Ipv4Net> {
    subnet.subnets(subnet.prefix_len() + 2).ok()?.last()
}

/// The addresses of a network that are handed out here.
#[derive(Debug)]
pub struct Addresses {
    first: u32,
    count: u32,
    /// How far from the first one the next candidate is.
    next: u32,
    /// Candidates left until it must be known anew which are held.
    left: u32,
    held: HashSet<Ipv4Addr>,
    resting: HashMap<Ipv4Addr, Instant>,
}

impl Addresses {
    /// Those of a network, beginning at this one, or at the first. Neither the network's own address is among them, nor
    /// that of the gateway, nor the part that Docker chooses from.
    pub fn new(subnet: Ipv4Net, from: Option<Ipv4Addr>) -> Self {
        let first = u32::from(subnet.network()) + 2;
        let end = dynamic_part(subnet).map_or(first, |part| u32::from(part.network()));
        let count = end.saturating_sub(first);
        let next = from.map_or(0, |from| u32::from(from).wrapping_sub(first));
        let next = if next < count { next } else { 0 };
        Self { first, count, next, left: 0, held: HashSet::new(), resting: HashMap::new() }
    }

    /// Begins a round, in which each address is handed out at most once, with those that containers hold.
    pub fn begin_round(&mut self, held: HashSet<Ipv4Addr>) {
        (self.held, self.left) = (held, self.count);
    }

    /// The next free address; `None` if none is left in this round, and [`begin_round`](Self::begin_round) is due.
    pub fn take(&mut self, now: Instant) -> Option<Ipv4Addr> {
        self.resting.retain(|_, since| now.duration_since(*since) < REST);
        while self.left > 0 {
            let address = Ipv4Addr::from(self.first + self.next);
            (self.next, self.left) = ((self.next + 1) % self.count, self.left - 1);
            if !self.held.contains(&address) && !self.resting.contains_key(&address) {
                self.resting.insert(address, now);
                return Some(address);
            }
        }
        None
    }

    /// Where the next run is to begin, if this one hands out no more than `ahead` others until it says so again.
    pub fn resume_at(&self, ahead: u32) -> Ipv4Addr {
        Ipv4Addr::from(self.first + (self.next + ahead) % self.count.max(1))
    }

    /// An address is held no more.
    pub fn release(&mut self, address: Ipv4Addr, now: Instant) {
        self.held.remove(&address);
        self.resting.insert(address, now);
    }

    /// The number of addresses.
    pub fn count(&self) -> u32 {
        self.count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn last(address: Option<Ipv4Addr>) -> Option<u8> {
        address.map(|a| a.octets()[3])
    }

    #[test]
    fn address_is_not_handed_out_again_while_it_is_held_or_rests() {
        let subnet: Ipv4Net = "10.0.0.0/29".parse().expect("a network");
        let (mut addresses, now) = (Addresses::new(subnet, None), Instant::now());
        assert_eq!((addresses.count(), addresses.take(now)), (4, None), "nobody has told what is held");
        addresses.begin_round([Ipv4Addr::new(10, 0, 0, 3)].into());
        let taken: Vec<Option<u8>> = (0..4).map(|_| last(addresses.take(now))).collect();
        assert_eq!(taken, [Some(2), Some(4), Some(5), None], "6 and 7 are Docker's");
        addresses.begin_round(HashSet::new());
        addresses.release(Ipv4Addr::new(10, 0, 0, 4), now + REST / 2);
        assert_eq!(last(addresses.take(now + REST)), Some(2), "it rested");
        assert_eq!(last(addresses.take(now + REST)), Some(3), "it was never used");
        assert_eq!(last(addresses.take(now + REST)), Some(5), "4 was released later");
    }

    #[test]
    fn next_run_continues_where_this_one_was() {
        let subnet: Ipv4Net = "10.0.0.0/24".parse().expect("a network");
        let mut addresses = Addresses::new(subnet, Some(Ipv4Addr::new(10, 0, 0, 190)));
        addresses.begin_round(HashSet::new());
        let taken: Vec<Option<u8>> = (0..3).map(|_| last(addresses.take(Instant::now()))).collect();
        assert_eq!(taken, [Some(190), Some(191), Some(2)], "192 to 255 are Docker's");
        assert_eq!(last(Some(addresses.resume_at(10))), Some(13));
        let mut outside = Addresses::new(subnet, Some(Ipv4Addr::new(10, 0, 1, 7)));
        outside.begin_round(HashSet::new());
        assert_eq!(last(outside.take(Instant::now())), Some(2), "the network was another one then");
    }
}
