//! Benchmarks of deploys: demae beside the bare steps that no tool can leave out, in the same run.

use std::time::Duration;

use demae::model::status::State;

use super::{lab::Lab, wait::until_within};

pub mod bare;
pub mod deploy;
pub mod figures;
pub mod fleet;
pub mod many;
pub mod path;
pub mod start;

/// Runs a benchmark, unless it was started by `cargo test`, which only checks that it starts. It gets the numbers that
/// are set in the environment, by name, or their defaults.
pub fn run(benchmark: impl FnOnce(&dyn Fn(&str, usize) -> usize)) {
    if std::env::args().any(|argument| argument == "--bench") {
        benchmark(&|name, default| {
            std::env::var(name)
                .map_or(default, |n| n.parse().unwrap_or_else(|_| panic!("`{name}` is not a number: {n}")))
        });
    }
}

/// Puts a key for each of so many apps, and waits until all of them have converged.
fn change_all(lab: &Lab, apps: usize, key: &str, value: impl Fn(usize) -> String) {
    let all: Vec<(String, String)> = (0..apps).map(|n| (format!("apps/app{n}/{key}"), value(n))).collect();
    all.chunks(100).for_each(|some| lab.put_all(some));
    let revision = lab.revision();
    until_within(Duration::from_secs(600), "all apps converged", || {
        let is_done = |s: demae::model::status::HostStatus| {
            let converged = s.apps.iter().filter(|a| a.app.starts_with("app") && a.state == State::Converged);
            s.store.revision >= revision && converged.count() == apps
        };
        lab.status().is_some_and(is_done)
    });
}
