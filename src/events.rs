//! Recent events of this host, and a stream of new ones. Emitting never waits for a reader.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::broadcast;

use crate::{
    metrics::Metrics,
    model::{
        event::{Event, VERSION, What},
        name::{AppName, HostName},
        problem::bounded,
        time::Timestamp,
    },
};

/// Number of events kept: a day of a quiet host, the deploys of an hour of a busy one.
const CAPACITY: usize = 1000;

/// Longest message of an event, in bytes.
const MOST_MESSAGE: usize = 2048;

/// The event stream. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Events {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    host: HostName,
    run: i64,
    metrics: Arc<Metrics>,
    buffer: Mutex<Buffer>,
    out: broadcast::Sender<Arc<Event>>,
}

#[derive(Debug, Default)]
struct Buffer {
    seq: u64,
    events: VecDeque<Arc<Event>>,
}

impl Events {
    /// An empty stream.
    pub fn new(host: HostName, metrics: Arc<Metrics>) -> Self {
        let (out, _) = broadcast::channel(CAPACITY);
        Self {
            shared: Arc::new(Shared {
                host,
                run: Timestamp::now().as_millis(),
                metrics,
                buffer: Mutex::default(),
                out,
            }),
        }
    }

    /// Emits an event. A reader that is too slow misses it, and gets a `lost` event.
    pub fn emit(&self, app: Option<&AppName>, what: What, message: String) {
        self.shared.metrics.event_emitted(&what);
        let mut buffer = self.shared.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        buffer.seq += 1;
        let host = self.shared.host.clone();
        let at = Timestamp::now();
        let (run, seq) = (self.shared.run, buffer.seq);
        let message = bounded(message, MOST_MESSAGE);
        let event = Arc::new(Event { version: VERSION, run, seq, at, host, app: app.cloned(), what, message });
        if buffer.events.len() == CAPACITY {
            buffer.events.pop_front();
        }
        buffer.events.push_back(event.clone());
        // Sent under the lock, so order and numbers agree. Fails without readers.
        let _ = self.shared.out.send(event);
    }

    /// The kept events, and a receiver for the next ones, without a gap between the two.
    pub fn follow(&self) -> (Vec<Arc<Event>>, broadcast::Receiver<Arc<Event>>) {
        let buffer = self.shared.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        (buffer.events.iter().cloned().collect(), self.shared.out.subscribe())
    }

    /// The event that replaces those that a reader missed.
    pub fn lost(&self, count: u64) -> Event {
        Event {
            version: VERSION,
            run: self.shared.run,
            seq: 0,
            at: Timestamp::now(),
            host: self.shared.host.clone(),
            app: None,
            what: What::Lost { count },
            message: format!("{count} events came faster than they were read, and are lost to this reader"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events() -> Events {
        let metrics = Arc::new(Metrics::new().expect("metrics"));
        Events::new(HostName::try_from("h").expect("a name"), metrics)
    }

    fn emit(events: &Events, n: u64) {
        events.emit(None, What::Store { reachable: true }, n.to_string());
    }

    #[tokio::test]
    async fn reader_gets_past_and_future_events_without_gap() {
        let events = events();
        (0..CAPACITY as u64 + 5).for_each(|n| emit(&events, n));
        let (known, mut coming) = events.follow();
        assert_eq!((known.len(), known.last().map(|e| e.seq)), (CAPACITY, Some(CAPACITY as u64 + 5)));
        emit(&events, 0);
        assert_eq!(coming.recv().await.map(|e| e.seq), Ok(CAPACITY as u64 + 6));
    }

    #[tokio::test]
    async fn emit_does_not_wait_for_readers() {
        let events = events();
        let (_, mut slow) = events.follow();
        (0..2 * CAPACITY as u64).for_each(|n| emit(&events, n));
        assert!(matches!(slow.recv().await, Err(broadcast::error::RecvError::Lagged(n)) if n > 0));
    }
}
