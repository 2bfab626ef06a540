//! Pure decisions about many hosts: what the leader does next, and what a host may do in its turn.
//!
//! Each write is a [`Transaction`](crate::model::fleet::Transaction): it names what it was decided from, and the store
//! refuses it if any of that has changed. So a leader or a host that was suspended, or that reads old data, can do no
//! harm with what it writes.
//!
//! The number that must hold: hosts with requests on a release that the fleet has not proven are never more than
//! `parallelism` and the allowed failures together. A host writes *switch* into its permit before it moves a request, and
//! that permit ends by a proof, by a failure that was taken back, or as *lost*, which counts for as long as the host is
//! gone.

pub mod leader;
mod order;
pub mod outcome;
pub mod records;
pub mod turn;
