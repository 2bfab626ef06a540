//! How long it takes until many apps have converged that change at once, beside the bare steps of as many, eight at a time.
//!
//! `DEMAE_BENCH_APPS` (50), `DEMAE_BENCH_ROUNDS` (10).
#![expect(clippy::print_stdout, reason = "a program for people")]

#[path = "../tests/support/mod.rs"]
mod support;

use support::bench::{many, run};

fn main() {
    run(|number| {
        println!("\n{}", many::measure(number("DEMAE_BENCH_APPS", 50), number("DEMAE_BENCH_ROUNDS", 10)));
    });
}
