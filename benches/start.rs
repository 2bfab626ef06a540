//! How long an agent takes from its start until it is ready, on a host where everything is as wanted, beside one list of
//! all containers with an inspection of each; and its memory and CPU time at rest.
//!
//! `DEMAE_BENCH_APPS` (200), `DEMAE_BENCH_ROUNDS` (10), `DEMAE_BENCH_REST_S` (60).
#![expect(clippy::print_stdout, reason = "a program for people")]

#[path = "../tests/support/mod.rs"]
mod support;

use std::time::Duration;

use support::bench::{run, start};

fn main() {
    run(|number| {
        let rest = Duration::from_secs(number("DEMAE_BENCH_REST_S", 60) as u64);
        println!("\n{}", start::measure(number("DEMAE_BENCH_APPS", 200), number("DEMAE_BENCH_ROUNDS", 10), rest));
    });
}
