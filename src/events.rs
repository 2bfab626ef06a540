//! What happened on this host lately, for whoever wants to follow. Telling never waits for a reader.

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

/// How many events are kept for a reader who comes later: a day of a quiet host, the deploys of an hour of a busy one.
const KEPT: usize = 1000;

/// Most bytes of the message of one.
const MOST_MESSAGE: usize = 2048;

/// Everything that happened lately. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Events {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    host: HostName,
    run: i64,
    metrics: Arc<Metrics>,
    kept: Mutex<Kept>,
    out: broadcast::Sender<Arc<Event>>,
}

#[derive(Debug, Default)]
struct Kept {
    seq: u64,
    events: VecDeque<Arc<Event>>,
}

impl Events {
    /// Nothing has happened yet.
    pub fn new(host: HostName, metrics: Arc<Metrics>) -> Self {
        let (out, _) = broadcast::channel(KEPT);
        Self {
            shared: Arc::new(Shared { host, run: Timestamp::now().as_millis(), metrics, kept: Mutex::default(), out }),
        }
    }

    /// Tells of something. A reader who is too slow misses it, and is told so.
    pub fn tell(&self, app: Option<&AppName>, what: What, message: String) {
        self.shared.metrics.told(&what);
        let mut kept = self.shared.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.seq += 1;
        let host = self.shared.host.clone();
        let at = Timestamp::now();
        let (run, seq) = (self.shared.run, kept.seq);
        let message = bounded(message, MOST_MESSAGE);
        let event = Arc::new(Event { version: VERSION, run, seq, at, host, app: app.cloned(), what, message });
        if kept.events.len() == KEPT {
            kept.events.pop_front();
        }
        kept.events.push_back(event.clone());
        // Sent while nobody else can tell, so that order and numbers agree. Without a reader there is nobody to hear.
        let _ = self.shared.out.send(event);
    }

    /// What happened so far, and what happens from now on, without a gap between the two.
    pub fn follow(&self) -> (Vec<Arc<Event>>, broadcast::Receiver<Arc<Event>>) {
        let kept = self.shared.kept.lock().unwrap_or_else(PoisonError::into_inner);
        (kept.events.iter().cloned().collect(), self.shared.out.subscribe())
    }

    /// Stands in the stream of a reader for events that it missed.
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

    fn tell(events: &Events, n: u64) {
        events.tell(None, What::Store { reachable: true }, n.to_string());
    }

    #[tokio::test]
    async fn a_reader_gets_what_was_and_what_comes_without_a_gap() {
        let events = events();
        (0..KEPT as u64 + 5).for_each(|n| tell(&events, n));
        let (known, mut coming) = events.follow();
        assert_eq!((known.len(), known.last().map(|e| e.seq)), (KEPT, Some(KEPT as u64 + 5)));
        tell(&events, 0);
        assert_eq!(coming.recv().await.map(|e| e.seq), Ok(KEPT as u64 + 6));
    }

    #[tokio::test]
    async fn telling_waits_for_no_reader() {
        let events = events();
        let (_, mut slow) = events.follow();
        (0..2 * KEPT as u64).for_each(|n| tell(&events, n));
        assert!(matches!(slow.recv().await, Err(broadcast::error::RecvError::Lagged(n)) if n > 0));
    }
}
