//! demae: keeps the containers and the nginx of a Docker host as etcd says, and drops no request on the way.
//!
//! # Tasks of a running agent
//!
//! `cli/agent.rs` starts them and connects them. Counters (`metrics::Metrics`) and the event stream (`events::Events`)
//! are shared.
//!
//! | task | input | output |
//! |---|---|---|
//! | `store::watch` | etcd: reads and a watch; `resync_requested` | `updates`: the latest `store::Update` |
//! | `agent::Agent::run`, the loop | `updates`, `changes`, `hints`, `jobs` | `status`, `publish`, `view`, `ready`, … |
//! | jobs of the loop | one step or observation each | `jobs`: a `Completion` (`agent/completion.rs`) |
//! | `agent::listen` | Docker's events, SIGHUP | `hints`: observe this app, or everything |
//! | `host::health`, one per running instance | probes | `changes`: an app whose health changed |
//! | `store::keep_lease` | `updates` | `leases`: the current lease, if any |
//! | `store::publish` | `publish`, `leases`, `updates`, `store::SharedFence` | etcd: `state/` |
//! | `rollout::follow`, unless off | etcd: rollouts, own permits; `leases`, `requests` of the loop | `rollouts`: records and kept releases; `answers` |
//! | `rollout::lead`, unless off | etcd: everything, while it leads | etcd: `state/`, `secret/releases/`; `leader_gauges` |
//! | `host_gauges::watch` | disks, certificates | `host_gauges`; the loop adds ports |
//! | `http::serve` | `status`, `view`, `host_gauges`, `leader_gauges`, `pulse`, `ready`, events | `/metrics`, `/status`, `/events`, … |
//! | `webhook::Webhook::run`, if configured | events | HTTP requests |
//! | `shutdown::on_signals` | SIGTERM, SIGINT | two tokens: orderly, at once |
//!
//! `changes` and `hints` are unbounded queues, `jobs` is a `JoinSet`, `resync_requested` a `Notify`. The other names in
//! backticks without a path are watch channels, which hold the latest value. No reader blocks the loop.
//!
//! # Imports
//!
//! They run one way, and `tests/pure/layering.rs` holds them to it:
//! `model <- {plan, fleet, import, store, host} <- {world, execute, command, rollout} <- machine <- agent <- cli <- main`.
//! In braces, only `execute` imports `world`, and `command` both. ARCHITECTURE.md walks one change through the code.

pub mod model;

pub mod fleet;
pub mod import;
pub mod plan;

pub mod host;
pub mod store;

pub mod command;
pub mod execute;
pub mod machine;
pub mod world;

pub mod rollout;

pub mod agent;

pub mod host_gauges;
pub mod webhook;

pub mod cli;
pub mod config;
pub mod events;
pub mod failpoint;
pub mod http;
pub mod metrics;
pub mod retry;
pub mod shutdown;
pub mod telemetry;
