//! etcd: the only users of `etcd-client`.
//!
//! The watch is only for speed. What is true is a full read, made at the start, after any gap, and at an interval.

pub mod client;
pub mod keys;
mod publish;
mod read;
mod watch;

pub use client::StoreError;
pub use publish::{HostInfo, publish, published};
pub use read::{Contents, ReadKey, read_once};
pub use watch::{Update, Viewer, watch};
