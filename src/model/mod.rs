//! Plain values: no I/O, no clock, no async. Illegal states cannot be represented.

pub mod archive;
pub mod change;
pub mod desired;
pub mod dotenv;
pub mod env;
pub mod event;
pub mod fleet;
pub mod images;
pub mod mounts;
pub mod name;
pub mod observed;
pub mod policy;
pub mod problem;
pub mod proxy;
pub mod release;
pub mod spec;
pub mod status;
pub mod text;
pub mod time;
pub mod yaml;
