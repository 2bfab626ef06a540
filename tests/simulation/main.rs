//! Whole histories of an agent, played: the real loop, planner and belief, on a model of the host and of etcd, with
//! crashes, outages, lost news, lost answers, wiped and restored stores, full disks and clocks that are set.
//!
//! `DEMAE_SIMULATED_EVENTS=n` plays at least so many events; `DEMAE_SEED=n` plays one history and prints it.
#![allow(clippy::print_stdout, reason = "a simulation tells its figures")]
#![expect(clippy::disallowed_methods, reason = "what lives by itself in a history ends with its runtime")]

mod chance;
mod ending;
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

use demae::{agent::Planner, model::status::State, plan::app::plan_app};
use history::{Outcome, first_minute, play};

/// Things that happen in one history before everything is put right.
const EVENTS: usize = 60;
/// Histories that a wrong planner may get away with.
const ESCAPES: u64 = 60;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|n| n.parse().unwrap_or_else(|_| panic!("`{name}` is not a number: {n}")))
}

fn tell(seed: u64, outcome: &Outcome) -> String {
    let first = outcome.log.iter().position(|line| line.contains("!!!")).unwrap_or(outcome.log.len());
    let last = first.saturating_sub(120);
    format!(
        "history {seed}:\n{}\n\nviolated in history {seed}: {:#?}\nplay it again: DEMAE_SEED={seed} cargo test --all-features --test simulation histories -- --nocapture",
        outcome.log[last..].join("\n"),
        outcome.violations.iter().take(5).collect::<Vec<_>>()
    )
}

/// What was seen in all histories.
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

/// Plays histories, on all cores, until so many events have happened or one goes wrong.
fn play_many(first: u64, events: u64) -> Total {
    let (total, next) = (Mutex::new(Total::default()), AtomicU64::new(first));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    let outcome = play(seed, EVENTS, plan_app);
                    let mut total = total.lock().expect("nobody panics in here");
                    if !outcome.violations.is_empty() {
                        total.failed.get_or_insert_with(|| tell(seed, &outcome));
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
    total.into_inner().expect("nobody panics in here")
}

#[test]
fn histories_of_crashes_and_faults_end_well() {
    if let Some(seed) = number("DEMAE_SEED") {
        let outcome = play(seed, EVENTS, plan_app);
        println!("{}\n{:?}", outcome.log.join("\n"), outcome.tally);
        assert!(outcome.violations.is_empty(), "{}", tell(seed, &outcome));
        return;
    }
    let total = play_many(number("DEMAE_FIRST_SEED").unwrap_or(1), number("DEMAE_SIMULATED_EVENTS").unwrap_or(10_000));
    println!("{} histories, {} events: {:?}", total.histories, total.events(), total.tally);
    println!("distinct states: {} of an app, {} of a host", total.app_states.len(), total.host_states.len());
    if let Some(failed) = total.failed {
        panic!("{failed}");
    }
    assert!(total.app_states.len() > 100, "too little was tried");
}

#[test]
fn the_same_seed_tells_the_same_history() {
    for seed in 1..4 {
        let traces: BTreeSet<u64> = (0..2).map(|_| play(seed, EVENTS, plan_app).trace).collect();
        assert_eq!(traces.len(), 1, "history {seed} went two ways");
    }
}

#[test]
fn wrong_planners_are_caught() {
    let mutants: [(&str, Planner); 5] = [
        ("switches_too_soon", mutants::switches_too_soon),
        ("cuts_connections", mutants::cuts_connections),
        ("lets_the_dead_lie", mutants::lets_the_dead_lie),
        ("removes_before_nginx_knows", mutants::removes_before_nginx_knows),
        ("forgets_nginx", mutants::forgets_nginx),
    ];
    for (name, planner) in mutants {
        let caught = (1..=ESCAPES).find_map(|seed| {
            let found = play(seed, EVENTS, planner).violations;
            found.first().map(|first| format!("in history {seed}: {first}"))
        });
        let caught = caught.unwrap_or_else(|| panic!("`{name}` was not caught in {ESCAPES} histories"));
        println!("`{name}` is caught {}", caught.chars().take(160).collect::<String>());
    }
}

#[test]
fn a_panic_about_one_app_leaves_the_others_alone() {
    // The first history with several apps.
    let status = (1..50).map(|seed| first_minute(seed, mutants::panics_about_one_app)).find(|apps| apps.len() > 2);
    let status = status.expect("a history with several apps");
    for app in &status {
        if app.app == "app0" {
            assert!(app.reason.contains("ended in a panic"), "{app:?}");
        } else {
            assert_eq!(app.state, State::Converged, "{app:?}");
        }
    }
}
