//! Tests that need neither etcd nor Docker, and take seconds.

mod cli;
mod decisions;
mod documented;
mod import;
mod isolation;
mod layering;
mod policy;
mod properties;
mod rollouts;
mod scenarios;
