//! Searches for an input that fails a check: the corpus, then mutations of it; then shrinks it.

use std::{
    cell::{Cell, RefCell},
    fmt, panic,
    sync::Once,
    time::{Duration, Instant},
};

use crate::mutate::{Chance, LONGEST, mutate};

/// Longest time to shrink a failing input.
const SHRINKING: Duration = Duration::from_secs(20);

/// A check; it panics on failure.
pub type Check = fn(&[u8]);

pub struct Search<'a> {
    pub target: &'a str,
    pub check: Check,
    /// Names and contents of files.
    pub corpus: &'a [(String, Vec<u8>)],
    pub tokens: &'a [Vec<u8>],
    pub seed: u64,
    pub first: u64,
    pub inputs: u64,
    pub until: Option<Instant>,
}

impl Search<'_> {
    /// Tries the corpus, then mutations; returns the number of mutations.
    pub fn run(&self) -> Result<u64, Broken> {
        for (name, input) in self.corpus {
            self.attempt(input, || format!("fuzz/corpus/{}/{name}", self.target))?;
        }
        let mut tried = 0;
        while tried < self.inputs && self.until.is_none_or(|until| Instant::now() < until) {
            let number = self.first + tried;
            let input = self.input(number);
            self.attempt(&input, || format!("input {number} of seed {}", self.seed))?;
            tried += 1;
        }
        Ok(tried)
    }

    /// The input with this number: the same for the same seed, corpus and tokens.
    fn input(&self, number: u64) -> Vec<u8> {
        let mut chance = Chance(self.seed.rotate_left(32) ^ number);
        let mut input = chance.pick(self.corpus).map(|(_, bytes)| bytes.clone()).unwrap_or_default();
        for _ in 0..=chance.below(5) {
            mutate(&mut chance, &mut input, self.corpus, self.tokens);
            input.truncate(LONGEST);
        }
        input
    }

    fn attempt(&self, input: &[u8], origin: impl Fn() -> String) -> Result<(), Broken> {
        let Err(first) = attempt(self.check, input) else { return Ok(()) };
        let shorter = shrink(self.check, input);
        // A check of time limits may pass on the second run.
        let (input, why) = match attempt(self.check, &shorter) {
            Err(why) => (shorter, why),
            Ok(()) => (input.to_vec(), first),
        };
        Err(Broken { target: self.target.to_owned(), origin: origin(), input, why })
    }
}

/// An input that fails a check.
#[derive(Debug)]
pub struct Broken {
    target: String,
    origin: String,
    /// Shrunk.
    pub input: Vec<u8>,
    why: String,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { target, origin, input, why } = self;
        let octal: String = input.iter().map(|b| format!("\\{b:03o}")).collect();
        writeln!(f, "{target} breaks a promise, by {origin}, shrunk to {} bytes:", input.len())?;
        writeln!(f, "    \"{}\"", input.escape_ascii())?;
        writeln!(f, "{why}")?;
        writeln!(f, "again: DEMAE_FUZZ_INPUT={} cargo test --test fuzz -- --exact {target}", hex(input))?;
        writeln!(f, "kept, and tried first from then on: printf '{octal}' > fuzz/corpus/{target}/NAME")
    }
}

thread_local! {
    static IS_TRYING: Cell<bool> = const { Cell::new(false) };
    static CAUGHT: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Runs a check; returns its panic message and location.
pub fn attempt(check: Check, input: &[u8]) -> Result<(), String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if IS_TRYING.get() {
                CAUGHT.set(info.to_string());
            } else {
                usual(info);
            }
        }));
    });
    IS_TRYING.set(true);
    let ended = panic::catch_unwind(|| check(input));
    IS_TRYING.set(false);
    ended.map_err(|_| CAUGHT.take())
}

/// Removes parts of an input as long as it still fails the check.
fn shrink(check: Check, input: &[u8]) -> Vec<u8> {
    let until = Instant::now() + SHRINKING;
    let mut best = input.to_vec();
    let mut step = best.len() / 2;
    while step > 0 {
        let mut at = 0;
        while at < best.len() {
            if Instant::now() > until {
                return best;
            }
            let mut shorter = best.clone();
            shorter.drain(at..(at + step).min(best.len()));
            if attempt(check, &shorter).is_err() {
                best = shorter;
            } else {
                at += step;
            }
        }
        step /= 2;
    }
    best
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

pub fn from_hex(text: &str) -> Vec<u8> {
    let byte = |pair: &[u8]| std::str::from_utf8(pair).ok().and_then(|p| u8::from_str_radix(p, 16).ok());
    text.as_bytes().chunks(2).map(|pair| byte(pair).expect("two hexadecimal digits for each byte")).collect()
}
