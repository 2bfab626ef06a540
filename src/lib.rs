//! demae: write what you want into etcd; every Docker host makes it so, without dropping a request.
//!
//! Imports run one way, and a test holds them to it:
//! `model <- {plan, store, host} <- {world, execute} <- agent <- cli <- main`.

pub mod model;
pub mod plan;
