//! Short forms of the benchmarks: they still run, and lose nothing.

use std::time::Duration;

use crate::support::bench::{
    deploy::{AGAIN, BARE, DEMAE, Plan, Route, measure},
    figures::Figures,
    fleet, many, path,
    start::{self, LIST, READY},
};

fn assert_complete(figures: &Figures) {
    for column in [BARE, AGAIN, DEMAE] {
        assert!(figures.of(column).len() == 2 && figures.of(column).iter().all(|ms| *ms > 1.0), "{figures:?}");
    }
    let ratio = figures.ratio(DEMAE, BARE);
    assert!(ratio.low <= ratio.median && ratio.median <= ratio.high, "{ratio}");
}

#[test]
fn deploys_are_measured_beside_their_bare_steps() {
    for (route, reloads) in [(Route::Socket, 0.0), (Route::Table, 0.0), (Route::Port, 2.0)] {
        let outcome = measure(Plan { route, rounds: 2, start_ms: 0, vhosts: 10, apps: 1, rollouts: true });
        println!("{outcome}");
        assert_complete(&outcome.first);
        assert_complete(&outcome.removed);
        assert!((outcome.reloads - reloads).abs() < 0.5, "{outcome}");
        assert_eq!((outcome.demae.failed, outcome.bare.failed), (0, 0), "{outcome}");
    }
}

#[test]
fn many_changes_at_once_are_measured_beside_their_bare_steps() {
    let outcome = many::measure(3, 2);
    println!("{outcome}");
    assert_eq!((outcome.figures.of(many::BARE).len(), outcome.figures.of(many::DEMAE).len()), (2, 2), "{outcome}");
    assert!(outcome.reloads.abs() < 0.5, "{outcome}");
}

#[test]
fn start_of_an_agent_is_measured_beside_one_list() {
    let outcome = start::measure(5, 2, Duration::from_secs(1));
    println!("{outcome}");
    assert_eq!((outcome.figures.of(LIST).len(), outcome.figures.of(READY).len()), (2, 2), "{outcome}");
    assert!(outcome.resident > 1024 && outcome.cpu < 1.0, "{outcome}");
}

#[test]
fn requests_by_table_and_by_port_are_measured_in_turn() {
    let outcome = path::measure(2, Duration::from_millis(300));
    println!("{outcome}");
    assert_eq!((outcome.table.len(), outcome.port.len(), outcome.failed), (2, 2, 0), "{outcome}");
    assert!(outcome.ratio().median > 0.0, "{outcome}");
}

#[test]
fn rollouts_over_many_agents_are_measured() {
    let outcome = fleet::measure(12);
    println!("{outcome}");
    assert_eq!(outcome.rolled.len(), 2, "{outcome}");
    assert!(outcome.rolled.iter().all(|rolled| rolled.writes_per_turn <= 8.0), "{outcome}");
    assert!(outcome.failover <= Duration::from_secs(20), "{outcome}");
    assert!(outcome.unproven <= 3, "{outcome}");
}
