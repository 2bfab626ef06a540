//! The kernel's table, as text for `nft` and back.
//!
//! A connection to a stable address is led to the instance that the map names. What the map does not name is led to
//! port 1 of this host, where nothing listens, so that it is refused at once; without that, another program of the host
//! that listens on all addresses would answer.
//!
//! The kernel forgets a connection a second after its end, not after two minutes. When a container stops, Docker lists
//! the connections to it and deletes each by its two addresses and ports; one that nginx had opened meanwhile from the
//! same port, to the next instance, would be deleted in its place, and its answer never arrive. It also keeps the
//! kernel's list of connections short.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    net::{Ipv4Addr, SocketAddrV4},
};

use ipnet::Ipv4Net;

/// What the map holds: a stable address, and where it leads.
pub type Elements = BTreeMap<Ipv4Addr, SocketAddrV4>;

/// What the rules of a table are made of.
#[derive(Debug, Clone)]
pub struct Rules<'a> {
    /// The name of the table.
    pub table: &'a str,
    /// The stable addresses.
    pub range: Ipv4Net,
    /// The network interface of the instances.
    pub bridge: &'a str,
}

impl Rules<'_> {
    /// Input for `nft` that makes the whole table, in one transaction.
    ///
    /// The priorities are those of Docker's own chains, less ten: its rules for published ports match any local address,
    /// the stable ones too.
    pub fn whole(&self, elements: &Elements) -> String {
        let Self { table, range, bridge } = self;
        let elements = match elements.is_empty() {
            true => String::new(),
            false => format!("elements = {{ {} }}; ", list(elements)),
        };
        format!(
            "table ip {table} {{ }}\n\
             delete table ip {table}\n\
             table ip {table} {{\n\
             map routes {{ type ipv4_addr : ipv4_addr . inet_service; {elements}}}\n\
             ct timeout brief {{\nprotocol tcp\nl3proto ip\npolicy = {{ time_wait : 1, close : 1 }}\n}}\n\
             chain timeouts {{ type filter hook output priority -150; policy accept;\n\
             ip daddr {range} meta l4proto tcp ct timeout set \"brief\"\n}}\n\
             chain output {{ type nat hook output priority -110; policy accept;\n\
             ip daddr {range} meta l4proto tcp dnat ip to ip daddr map @routes\n\
             ip daddr {range} meta l4proto tcp redirect to :1\n}}\n\
             chain postrouting {{ type nat hook postrouting priority 90; policy accept;\n\
             ct original ip daddr {range} oifname \"{bridge}\" masquerade\n}}\n\
             chain guard {{ type filter hook output priority 10; policy accept;\n\
             ct original ip daddr {range} oifname != {{ \"{bridge}\", \"lo\" }} meta l4proto tcp reject with tcp reset\n}}\n}}\n"
        )
    }

    /// Input for `nft` that changes the map from one content to another, in one transaction; empty if they are equal.
    pub fn change(&self, from: &Elements, to: &Elements) -> String {
        let differs = |a: &Elements, b: &Elements| -> Elements {
            a.iter().filter(|(at, lead)| b.get(at) != Some(lead)).map(|(at, lead)| (*at, *lead)).collect()
        };
        let (gone, new) = (differs(from, to), differs(to, from));
        let mut text = String::new();
        if !gone.is_empty() {
            let keys: Vec<String> = gone.keys().map(Ipv4Addr::to_string).collect();
            let _ = writeln!(text, "delete element ip {} routes {{ {} }}", self.table, keys.join(", "));
        }
        if !new.is_empty() {
            let _ = writeln!(text, "add element ip {} routes {{ {} }}", self.table, list(&new));
        }
        text
    }
}

fn list(elements: &Elements) -> String {
    let one = |(at, to): (&Ipv4Addr, &SocketAddrV4)| format!("{at} : {} . {}", to.ip(), to.port());
    elements.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// Splits what `nft list table` prints into the content of the map, and everything else. `None` if the map cannot be
/// read.
pub fn parse(text: &str) -> Option<(Elements, String)> {
    let Some((before, rest)) = text.split_once("elements = {") else {
        return Some((Elements::new(), squeezed(text)));
    };
    let (inside, after) = rest.split_once('}')?;
    let element = |text: &str| {
        let (at, to) = text.split_once(':')?;
        let (ip, port) = to.split_once(" . ")?;
        let to = SocketAddrV4::new(ip.trim().parse().ok()?, port.trim().parse().ok()?);
        Some((at.trim().parse().ok()?, to))
    };
    let elements: Option<Elements> = inside.split(',').map(element).collect();
    Some((elements?, squeezed(&format!("{before}{after}"))))
}

/// The stable addresses of a table, from what `nft list table` prints.
pub fn range_of(text: &str) -> Option<Ipv4Net> {
    text.split("ip daddr ").nth(1)?.split_whitespace().next()?.parse().ok()
}

fn squeezed(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SocketAddrV4 {
        text.parse().expect("an address")
    }

    #[test]
    fn map_is_read_back_from_the_listing() {
        let listing = "table ip demae_a {\n\tmap routes {\n\t\ttype ipv4_addr : ipv4_addr . inet_service\n\t\t\
            elements = { 198.18.0.1 : 172.30.0.11 . 8080,\n\t\t\t     198.18.0.2 : 172.30.0.12 . 80 }\n\t}\n\n\
            \tchain output {\n\t}\n}\n";
        let (elements, rules) = parse(listing).expect("it is read");
        let expected = [([198, 18, 0, 1], "172.30.0.11:8080"), ([198, 18, 0, 2], "172.30.0.12:80")];
        assert_eq!(elements, expected.map(|(stable, to)| (Ipv4Addr::from(stable), at(to))).into());
        let (none, same) = parse(
            &listing.replace(&listing[listing.find("elements").unwrap()..listing.find("}\n\t}").unwrap() + 1], ""),
        )
        .expect("it is read");
        assert_eq!((none, same), (Elements::new(), rules), "the rest does not depend on the content");
        assert_eq!(parse("table ip a { map routes { elements = { nonsense } } }"), None);
        let range = range_of("chain output {\n\t\tip daddr 198.18.0.0/16 meta l4proto tcp dnat ip to …");
        assert_eq!(range.map(|range| range.to_string()).as_deref(), Some("198.18.0.0/16"));
    }

    #[test]
    fn change_is_one_transaction_of_what_differs() {
        let rules = Rules { table: "demae_a", range: "198.18.0.0/16".parse().expect("a range"), bridge: "demae0" };
        let stable = |n: u8| Ipv4Addr::new(198, 18, 0, n);
        let from = Elements::from([(stable(1), at("172.30.0.1:80")), (stable(2), at("172.30.0.2:80"))]);
        let to = Elements::from([(stable(1), at("172.30.0.9:80")), (stable(3), at("172.30.0.3:80"))]);
        assert_eq!(
            rules.change(&from, &to),
            "delete element ip demae_a routes { 198.18.0.1, 198.18.0.2 }\n\
             add element ip demae_a routes { 198.18.0.1 : 172.30.0.9 . 80, 198.18.0.3 : 172.30.0.3 . 80 }\n"
        );
        assert_eq!(rules.change(&to, &to), "");
    }
}
