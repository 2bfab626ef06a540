//! Requests per second through nginx to a TCP app, by the kernel's table and by a published port.

use std::{
    fmt,
    time::{Duration, Instant},
};

use super::figures::{Interval, interval, median};
use crate::support::{
    lab::{Lab, Setup},
    load::{Client, Load},
    wait::until,
};

/// Clients at once, each on a connection of its own that is kept.
const CLIENTS: usize = 16;

/// Requests per second in each round.
pub struct Outcome {
    pub table: Vec<f64>,
    pub port: Vec<f64>,
    pub failed: u64,
    pub reasons: Vec<String>,
}

/// Loads one app by each kind of route, in turn.
pub fn measure(rounds: usize, window: Duration) -> Outcome {
    let by_table = Lab::with(&Setup { tcp_routes: true, ..Setup::default() });
    let by_port = Lab::new();
    for lab in [&by_table, &by_port] {
        lab.deploy("web", "apps/web/spec", &lab.port_spec(&lab.image("v1"), "web.test", ""));
    }
    let mut outcome = Outcome { table: Vec::new(), port: Vec::new(), failed: 0, reasons: Vec::new() };
    for round in 0..rounds {
        let mut order = [("table", &by_table), ("port", &by_port)];
        order.rotate_left(round % 2);
        for (route, lab) in order {
            let clients = (0..CLIENTS).map(|_| Client::get(true).pausing(Duration::ZERO)).collect();
            let load = Load::start(lab.ingress, "web.test", clients);
            until("requests flow", || load.requests() > 100);
            let (before, began) = (load.requests(), Instant::now());
            std::thread::sleep(window);
            let rate = (load.requests() - before) as f64 / began.elapsed().as_secs_f64();
            let tally = load.stop();
            outcome.failed += tally.failed;
            outcome.reasons.extend(tally.reasons.into_iter().map(|reason| format!("{route}: {reason}")));
            if route == "table" { outcome.table.push(rate) } else { outcome.port.push(rate) }
        }
    }
    outcome
}

impl Outcome {
    /// How many times as many requests went by the table as by the port, in the same round.
    pub fn ratio(&self) -> Interval {
        interval(&self.table.iter().zip(&self.port).map(|(table, port)| table / port).collect::<Vec<_>>())
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (table, port) = (median(&self.table), median(&self.port));
        writeln!(f, "{} rounds, {CLIENTS} clients, requests per second through nginx", self.table.len())?;
        writeln!(f, "  by the table {table:.0}, by a published port {port:.0}: × {}", self.ratio())?;
        writeln!(f, "  {} requests failed: {:?}", self.failed, self.reasons)
    }
}
