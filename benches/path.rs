//! Requests per second through nginx to a TCP app, by the kernel's table and by a published port.
//!
//! `DEMAE_BENCH_ROUNDS` (10), `DEMAE_BENCH_WINDOW_MS` (3000): how long each is loaded in each round.
#![expect(clippy::print_stdout, reason = "a program for people")]

#[path = "../tests/support/mod.rs"]
mod support;

use std::time::Duration;

use support::bench::{path, run};

fn main() {
    run(|number| {
        let window = u64::try_from(number("DEMAE_BENCH_WINDOW_MS", 3000)).expect("a number");
        println!("\n{}", path::measure(number("DEMAE_BENCH_ROUNDS", 10), Duration::from_millis(window)));
    });
}
