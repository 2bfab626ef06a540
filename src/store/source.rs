//! What keeping up with a store needs of it. In service that is etcd; histories are played on a model of one.

use std::{sync::Arc, time::Duration};

use tokio::sync::Notify;

use super::{belief::News, client::StoreError, landmark::Landmark, read::Reading};
use crate::{model::release::ReleaseKey, retry};

/// All members of a store, and the name that this host has in it.
pub trait Source: Send + 'static {
    /// One member, connected.
    type Session: Session;

    /// How many there are.
    fn members(&self) -> usize;

    /// Told when the store is to be read in full, at once.
    fn doubted(&self) -> Arc<Notify>;

    /// Connects to the member whose turn it is.
    ///
    /// # Errors
    /// If the connection cannot be made.
    fn open(&self, turn: usize) -> impl Future<Output = Result<Self::Session, StoreError>> + Send;

    /// A duration, give or take a little, so that many hosts do not ask at once.
    fn jittered(&self, duration: Duration) -> Duration {
        retry::jittered(duration)
    }
}

/// One connection to a member, from its first read to whatever ends it.
pub trait Session: Send + Sync {
    /// What it tells of changes.
    type Watch: Watch;

    /// Reads everything at one revision, and looks for what the store must know if it is the one from before.
    ///
    /// # Errors
    /// If a call fails.
    fn read(&self, landmark: Option<Landmark>) -> impl Future<Output = Result<Reading, StoreError>> + Send;

    /// The key that release ids are made with, if the store has one. No watch sees it.
    ///
    /// # Errors
    /// If a call fails.
    fn release_key(&self) -> impl Future<Output = Result<Option<ReleaseKey>, StoreError>> + Send;

    /// Gives the store a key if it has none: the one that is known, or a new one.
    ///
    /// # Errors
    /// If a call fails.
    fn make_release_key(
        &self,
        known: Option<&ReleaseKey>,
    ) -> impl Future<Output = Result<ReleaseKey, StoreError>> + Send;

    /// Whether this agent has the name of its host there; if not, nobody has it.
    ///
    /// # Errors
    /// If somebody else has it, or a call fails.
    fn has_name(&self) -> impl Future<Output = Result<bool, StoreError>> + Send;

    /// Takes the name.
    ///
    /// # Errors
    /// If somebody else was faster, or a call fails.
    fn take_name(&self) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Changes from this revision on.
    ///
    /// # Errors
    /// If it cannot be opened.
    fn watch(&self, from: i64) -> impl Future<Output = Result<Self::Watch, StoreError>> + Send;
}

/// A stream of changes.
pub trait Watch: Send {
    /// The next message. Nothing is lost if the future is dropped before it has ended.
    ///
    /// # Errors
    /// If it is neither news nor a sign of life: then none will come.
    fn next(&mut self) -> impl Future<Output = Result<News, StoreError>> + Send;

    /// Asks for a sign of life, which comes as a message.
    ///
    /// # Errors
    /// If it cannot be asked.
    fn ask(&mut self) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Whose it is.
    fn endpoint(&self) -> &str;
}
