//! What the tests on real etcd, nginx and Docker share.
#![allow(dead_code, reason = "each test file uses a part of it")]

pub mod lab;
pub mod load;
