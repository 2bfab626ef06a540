//! Support code of the tests on real etcd, nginx and Docker.
#![allow(dead_code, reason = "each test file uses a part of it")]

pub mod addresses;
pub mod agent;
pub mod bench;
pub mod containers;
pub mod dashboards;
pub mod disk;
pub mod engine;
pub mod etcd;
pub mod files;
pub mod fleet;
pub mod frames;
pub mod http;
pub mod images;
pub mod json_schema;
pub mod lab;
pub mod load;
pub mod mishaps;
pub mod names;
pub mod process;
pub mod prometheus;
pub mod receiver;
pub mod registry;
pub mod relay;
pub mod server;
pub mod trust;
pub mod wait;
pub mod wire;
