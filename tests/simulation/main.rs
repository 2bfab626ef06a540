//! Simulated histories of an agent: the real loop, planner and watcher, on a model of the host and of etcd, with
//! crashes, outages, lost events, lost responses, wiped and restored stores, full disks and clock steps.
//!
//! `DEMAE_SIMULATED_EVENTS=n` plays at least so many events; `DEMAE_SEED=n` plays one history and prints it.
#![allow(clippy::print_stdout, reason = "a simulation tells its figures")]
#![expect(clippy::disallowed_methods, reason = "detached tasks of a history end with its runtime")]

mod chance;
mod ending;
mod fleet;
mod history;
mod machine;
mod mishaps;
mod mutants;
mod nginx;
mod operator;
mod oracle;
mod programs;
mod scene;
mod store;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use demae::{
    agent::{Planner, ProxyPlanner},
    model::status::State,
};
use history::{Outcome, Planners, first_minute, play};

/// Events in one history before all faults end.
const EVENTS: usize = 60;
/// Histories in which a mutant must be caught.
const HISTORIES_TO_CATCH: u64 = 60;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|n| n.parse().unwrap_or_else(|_| panic!("`{name}` is not a number: {n}")))
}

fn describe(seed: u64, outcome: &Outcome) -> String {
    let first = outcome.log.iter().position(|line| line.contains("!!!")).unwrap_or(outcome.log.len());
    let last = first.saturating_sub(120);
    format!(
        "history {seed}:\n{}\n\nviolated in history {seed}: {:#?}\nplay it again: DEMAE_SEED={seed} cargo test --all-features --test simulation histories -- --nocapture",
        outcome.log[last..].join("\n"),
        outcome.violations.iter().take(5).collect::<Vec<_>>()
    )
}

/// Totals over all histories.
#[derive(Default)]
struct Total {
    histories: u64,
    tally: BTreeMap<String, u64>,
    app_states: BTreeSet<u64>,
    host_states: BTreeSet<u64>,
    failed: Option<String>,
}

impl Total {
    fn events(&self) -> u64 {
        self.tally.values().sum()
    }
}

/// Plays histories, on all cores, until so many events have happened or one fails.
fn play_many(first: u64, events: u64) -> Total {
    let (total, next) = (Mutex::new(Total::default()), AtomicU64::new(first));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    let outcome = play(seed, EVENTS, Planners::REAL);
                    let mut total = total.lock().expect("no thread panicked with it");
                    if !outcome.violations.is_empty() {
                        total.failed.get_or_insert_with(|| describe(seed, &outcome));
                    }
                    total.histories += 1;
                    outcome.tally.into_iter().for_each(|(kind, n)| *total.tally.entry(kind).or_default() += n);
                    total.app_states.extend(outcome.app_states);
                    total.host_states.extend(outcome.host_states);
                    if total.failed.is_some() || total.events() >= events {
                        return;
                    }
                }
            });
        }
    });
    total.into_inner().expect("no thread panicked with it")
}

#[test]
fn histories_of_crashes_and_faults_converge() {
    if let Some(seed) = number("DEMAE_SEED") {
        let outcome = play(seed, EVENTS, Planners::REAL);
        println!("{}\n{:?}", outcome.log.join("\n"), outcome.tally);
        assert!(outcome.violations.is_empty(), "{}", describe(seed, &outcome));
        return;
    }
    let total = play_many(number("DEMAE_FIRST_SEED").unwrap_or(1), number("DEMAE_SIMULATED_EVENTS").unwrap_or(10_000));
    println!("{} histories, {} events: {:?}", total.histories, total.events(), total.tally);
    println!("distinct states: {} of an app, {} of a host", total.app_states.len(), total.host_states.len());
    if let Some(failed) = total.failed {
        panic!("{failed}");
    }
    assert!(total.app_states.len() > 100, "too few states were reached");
}

#[test]
fn same_seed_plays_the_same_history() {
    for seed in 1..4 {
        let traces: BTreeSet<u64> = (0..2).map(|_| play(seed, EVENTS, Planners::REAL).trace).collect();
        assert_eq!(traces.len(), 1, "history {seed} differs between two runs");
    }
}

#[test]
fn wrong_planners_are_caught() {
    let apps: [(&str, Planner); 8] = [
        ("switches_too_soon", mutants::switches_too_soon),
        ("cuts_connections", mutants::cuts_connections),
        ("ignores_the_policy", mutants::ignores_the_policy),
        ("does_not_restart", mutants::does_not_restart),
        ("removes_before_nginx_knows", mutants::removes_before_nginx_knows),
        ("never_changes_nginx", mutants::never_changes_nginx),
        ("removes_a_wanted_vhost", mutants::removes_a_wanted_vhost),
        ("leads_to_dead_ports", mutants::leads_to_dead_ports),
    ];
    let proxies: [(&str, ProxyPlanner); 4] = [
        ("drops_apps_that_stay", mutants::drops_apps_that_stay),
        ("leaves_out_an_app", mutants::leaves_out_an_app),
        ("serves_other_ports", mutants::serves_other_ports),
        ("gives_a_host_twice", mutants::gives_a_host_twice),
    ];
    let apps = apps.map(|(name, app)| (name, Planners { app, ..Planners::REAL }));
    let proxies = proxies.map(|(name, proxy)| (name, Planners { proxy, ..Planners::REAL }));
    let catch = |name: &str, planners: Planners| {
        let caught = (1..=HISTORIES_TO_CATCH).find_map(|seed| {
            let found = play(seed, EVENTS, planners).violations;
            found.first().map(|first| format!("in history {seed}: {first}"))
        });
        let caught = caught.unwrap_or_else(|| panic!("`{name}` was not caught in {HISTORIES_TO_CATCH} histories"));
        println!("`{name}` is caught {}", caught.chars().take(160).collect::<String>());
    };
    std::thread::scope(|scope| {
        for (name, planners) in apps.into_iter().chain(proxies) {
            scope.spawn(move || catch(name, planners));
        }
    });
}

#[test]
fn panic_in_one_app_does_not_affect_the_others() {
    // The first history with several apps.
    let status = (1..50)
        .map(|seed| first_minute(seed, Planners { app: mutants::panics_about_one_app, ..Planners::REAL }))
        .find(|apps| apps.len() > 2);
    let status = status.expect("a history with several apps");
    for app in &status {
        if app.app == "app0" {
            assert!(app.reason.contains("ended in a panic"), "{app:?}");
        } else {
            assert_eq!(app.state, State::Converged, "{app:?}");
        }
    }
}
