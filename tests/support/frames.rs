//! HTTP/2 frames of a connection, and which of its streams are watches. RFC 9113, section 4.1.

use std::{
    collections::BTreeSet,
    sync::{Mutex, PoisonError},
};

use super::wire::count_key;

/// Length of the client connection preface.
const PREFACE: usize = 24;
/// Length of a frame header: length, type, flags, stream.
const HEADER: usize = 9;
const DATA: u8 = 0;
const END_STREAM: u8 = 1;

/// One direction of a connection, cut into frames.
pub struct Frames {
    rest: Vec<u8>,
    preface: usize,
}

/// One frame, with its header.
pub struct Frame(pub Vec<u8>);

impl Frames {
    pub fn of_client() -> Self {
        Self { rest: Vec::new(), preface: PREFACE }
    }

    pub fn of_server() -> Self {
        Self { rest: Vec::new(), preface: 0 }
    }

    /// Adds received bytes; returns the frames that are complete.
    pub fn take(&mut self, bytes: &[u8]) -> Vec<Frame> {
        self.rest.extend_from_slice(bytes);
        let skipped = self.preface.min(self.rest.len());
        self.rest.drain(..skipped);
        self.preface -= skipped;
        let mut frames = Vec::new();
        while let [a, b, c, ..] = self.rest[..] {
            let length = HEADER + (usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c));
            if self.rest.len() < length {
                break;
            }
            frames.push(Frame(self.rest.drain(..length).collect()));
        }
        frames
    }
}

impl Frame {
    fn is_data(&self) -> bool {
        self.0[3] == DATA
    }

    fn ends(&self) -> bool {
        self.0[4] & END_STREAM != 0
    }

    fn stream(&self) -> [u8; 4] {
        [self.0[5], self.0[6], self.0[7], self.0[8]]
    }
}

/// Streams on which a client sent a key and which it has not closed: its watches.
#[derive(Default)]
pub struct Watches(Mutex<BTreeSet<[u8; 4]>>);

impl Watches {
    /// Tracks a frame of the client.
    pub fn follow(&self, frame: &Frame) {
        let mut streams = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if frame.ends() {
            streams.remove(&frame.stream());
        } else if frame.is_data() && count_key("/demae/apps/", &frame.0) > 0 {
            streams.insert(frame.stream());
        }
    }

    /// True if a server's frame is a message of a watch.
    pub fn is_watch_message(&self, frame: &Frame) -> bool {
        frame.is_data() && self.0.lock().unwrap_or_else(PoisonError::into_inner).contains(&frame.stream())
    }
}
