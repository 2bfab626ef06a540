//! How long a deploy takes beside its bare steps, behind a socket, the kernel's table and a published port.
//!
//! Each round runs the bare steps twice and demae once, in rotating order, so that every figure is paired with one of the
//! same round; the bare steps against themselves show the noise. Intervals are 95 % bootstrap intervals of the median.
//!
//! `DEMAE_BENCH_ROUNDS` (30), `DEMAE_BENCH_ROUTES` (`socket,table,port`), `DEMAE_BENCH_START_MS` (0): start time of the app,
//! `DEMAE_BENCH_VHOSTS` (0): other virtual hosts in nginx, `DEMAE_BENCH_APPS` (0): other apps on the host, `DEMAE_BENCH_ROLLOUTS` (1): 0 without rollouts.
#![expect(clippy::print_stdout, reason = "a program for people")]

#[path = "../tests/support/mod.rs"]
mod support;

use support::bench::{
    deploy::{Plan, Route, measure},
    run,
};

fn main() {
    run(|number| {
        let routes = std::env::var("DEMAE_BENCH_ROUTES").unwrap_or_else(|_| "socket,table,port".into());
        for (name, route) in [("socket", Route::Socket), ("table", Route::Table), ("port", Route::Port)] {
            if routes.split(',').any(|wanted| wanted == name) {
                let plan = Plan {
                    route,
                    rounds: number("DEMAE_BENCH_ROUNDS", 30),
                    start_ms: number("DEMAE_BENCH_START_MS", 0),
                    vhosts: number("DEMAE_BENCH_VHOSTS", 0),
                    apps: number("DEMAE_BENCH_APPS", 0),
                    rollouts: number("DEMAE_BENCH_ROLLOUTS", 1) > 0,
                };
                println!("\n{}", measure(plan));
            }
        }
    });
}
