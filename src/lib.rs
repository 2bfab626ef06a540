//! demae: write what you want into etcd; every Docker host makes it so, without dropping a request.
//!
//! Imports run one way, and a test holds them to it:
//! `model <- {plan, store, host} <- {world, execute} <- agent <- cli <- main`.

pub mod model;
pub mod plan;

pub mod host;
pub mod store;

pub mod execute;
pub mod world;

pub mod agent;

pub mod cli;
pub mod config;
pub mod failpoint;
pub mod http;
pub mod metrics;
pub mod retry;
pub mod shutdown;
pub mod telemetry;
