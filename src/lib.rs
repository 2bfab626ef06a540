//! demae: keeps the containers and the nginx of a Docker host as etcd says, and drops no request on the way.
//!
//! Imports run one way, and a test holds them to it:
//! `model <- {plan, store, host} <- {world, execute} <- machine <- agent <- cli <- main`.

pub mod model;
pub mod plan;

pub mod host;
pub mod store;

pub mod execute;
pub mod machine;
pub mod world;

pub mod agent;

pub mod vitals;
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
