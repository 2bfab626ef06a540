//! A rollout over many agents on one etcd: writes, CPU time of etcd, reaction, and how long it takes until another agent
//! leads.
//!
//! `DEMAE_BENCH_HOSTS` (500).
#![expect(clippy::print_stdout, reason = "a program for people")]

#[path = "../tests/support/mod.rs"]
mod support;

use support::bench::{fleet, run};

fn main() {
    run(|number| println!("\n{}", fleet::measure(number("DEMAE_BENCH_HOSTS", 500))));
}
