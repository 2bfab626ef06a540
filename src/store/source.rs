//! The seam to the store: what keeping up with it needs. In service that is etcd; simulated histories run on a model.

use std::{sync::Arc, time::Duration};

use tokio::sync::Notify;

use super::{
    client::StoreError,
    contents::Write,
    read::{Proof, Reading},
    trust::FleetAcceptance,
    update::News,
};
use crate::{model::release::ReleaseKey, retry};

/// The members of a store, and the claim of this host's name in it.
pub trait Source: Send + 'static {
    /// One member, connected.
    type Session: Session;

    /// How many members there are.
    fn members(&self) -> usize;

    /// Notified when the store is to be read in full at once.
    fn resync_requested(&self) -> Arc<Notify>;

    /// Connects to a member: `turn` modulo their number.
    ///
    /// # Errors
    /// If the connection cannot be made.
    fn open(&self, turn: usize) -> impl Future<Output = Result<Self::Session, StoreError>> + Send;

    /// A duration, give or take a fifth, so that many hosts do not ask at once.
    fn jittered(&self, duration: Duration) -> Duration {
        retry::jittered(duration)
    }
}

/// One connection to a member, from its first read to its end.
pub trait Session: Send + Sync {
    /// Its stream of changes.
    type Watch: Watch;

    /// Reads everything at one revision, and looks for `newest` in the history of the store.
    ///
    /// # Errors
    /// If a call fails.
    fn read(&self, newest: Option<Write>) -> impl Future<Output = Result<Reading, StoreError>> + Send;

    /// Asks what was written after a revision.
    ///
    /// # Errors
    /// If the call fails.
    fn prove(&self, since: i64) -> impl Future<Output = Result<Proof, StoreError>> + Send;

    /// The key that release ids are made with, if the store has one. No watch sees it.
    ///
    /// # Errors
    /// If the call fails.
    fn release_key(&self) -> impl Future<Output = Result<Option<ReleaseKey>, StoreError>> + Send;

    /// What a person accepted for the whole fleet. No watch sees it.
    ///
    /// # Errors
    /// If the call fails.
    fn fleet_acceptance(&self) -> impl Future<Output = Result<Option<FleetAcceptance>, StoreError>> + Send;

    /// Creates the release key if the store has none: the known one, or a random one.
    ///
    /// # Errors
    /// If a call fails.
    fn make_release_key(
        &self,
        known: Option<&ReleaseKey>,
    ) -> impl Future<Output = Result<ReleaseKey, StoreError>> + Send;

    /// True if this agent holds the name of its host, false if it is free.
    ///
    /// # Errors
    /// If another agent holds it, or the call fails.
    fn has_name(&self) -> impl Future<Output = Result<bool, StoreError>> + Send;

    /// Claims the name.
    ///
    /// # Errors
    /// If another agent was faster, or a call fails.
    fn take_name(&self) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Watches changes from this revision on.
    ///
    /// # Errors
    /// If the watch cannot be opened.
    fn watch(&self, from: i64) -> impl Future<Output = Result<Self::Watch, StoreError>> + Send;
}

/// A stream of changes.
pub trait Watch: Send {
    /// The next message. Cancel-safe: no message is lost if the future is dropped.
    ///
    /// # Errors
    /// If the stream has ended.
    fn next(&mut self) -> impl Future<Output = Result<News, StoreError>> + Send;

    /// Requests a progress message.
    ///
    /// # Errors
    /// If it cannot be sent.
    fn ask(&mut self) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// The member's endpoint.
    fn endpoint(&self) -> &str;
}
