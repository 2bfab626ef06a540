//! The last good snapshot, kept on disk: what an agent runs from while etcd is away, and what a store is held against
//! before it is believed.
//!
//! One line that names the form and its checksum, then JSON. It holds what people wrote, secrets too, so whoever keeps it
//! keeps it from all others.

use std::collections::BTreeMap;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{
    keys::Prefix,
    landmark::Landmark,
    last_good::Entries,
    read::{Contents, Entry},
    standing::Identity,
};
use crate::model::{
    name::{AppName, HostName},
    release::ReleaseKey,
    status::StoreBlock,
    text::hex,
    time::Timestamp,
};

/// The version of this form.
const VERSION: u32 = 1;
/// What the first line begins with.
const MAGIC: &str = "demae-ledger";

/// Where the ledger, and what people accepted, is kept. Writes are durable and whole, or leave what was there.
pub trait Shelf: Send + Sync {
    /// The ledger; nothing if there is none.
    ///
    /// # Errors
    /// In words, if it is there and cannot be read.
    fn ledger(&self) -> Result<Option<Vec<u8>>, String>;

    /// Puts another ledger in its place.
    ///
    /// # Errors
    /// In words; then the old one is still there.
    fn keep(&self, text: &[u8]) -> Result<(), String>;

    /// What a person accepted, if anything.
    fn acceptance(&self) -> Option<Vec<u8>>;

    /// What was accepted has been used.
    fn use_up(&self);
}

/// What a ledger holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Ledger {
    /// Which store it is of.
    pub identity: Identity,
    /// When it was proven to be so.
    pub saved: Timestamp,
    /// All that people wrote.
    pub contents: Contents,
    /// The key that release ids are made with.
    pub key: ReleaseKey,
    /// Of apps that make no sense in it, or are paused, what they said before.
    pub last_good: BTreeMap<AppName, BTreeMap<Vec<u8>, Entry>>,
    /// Why what came after it was not believed.
    pub held: Option<StoreBlock>,
}

/// Why a ledger is not used. Nothing is stopped over it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LedgerError {
    /// It cannot be read.
    #[error("the ledger cannot be read: {0}")]
    Read(String),
    /// It is not whole.
    #[error("the ledger is damaged: {0}")]
    Damaged(&'static str),
    /// Another version of demae wrote it.
    #[error("the ledger has form {0}, and this demae knows form {VERSION}")]
    Version(u32),
    /// It is not this host's, or of other keys.
    #[error("the ledger is of host `{host}` and prefix `{prefix}`")]
    Foreign {
        /// Whose it is.
        host: String,
        /// What its keys begin with.
        prefix: String,
    },
}

#[derive(Serialize, Deserialize)]
struct Body {
    host: String,
    prefix: String,
    saved: Timestamp,
    identity: Identity,
    revision: i64,
    #[serde(default)]
    held: Option<StoreBlock>,
    key: String,
    entries: Vec<Line>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    last_good: BTreeMap<AppName, Vec<Line>>,
}

/// Key, value, revisions of creation and of the last change.
type Line = (String, String, i64, i64);

/// A ledger as it is kept.
pub(super) fn text(
    (host, prefix): (&HostName, &Prefix),
    identity: &Identity,
    saved: Timestamp,
    (contents, key): (&Contents, &ReleaseKey),
    last_good: &BTreeMap<AppName, Entries>,
    held: Option<&StoreBlock>,
) -> Vec<u8> {
    let line = |(key, entry): (&Vec<u8>, &Entry)| {
        (STANDARD.encode(key), STANDARD.encode(entry.value()), entry.created(), entry.modified())
    };
    let lines = |entries: &Entries| entries.iter().map(line).collect();
    let body = Body {
        host: host.to_string(),
        prefix: prefix.as_str().to_owned(),
        saved,
        identity: identity.clone(),
        revision: contents.revision,
        held: held.cloned(),
        key: STANDARD.encode(key.expose()),
        entries: lines(&contents.entries),
        last_good: last_good.iter().map(|(app, entries)| (app.clone(), lines(entries))).collect(),
    };
    let body = serde_json::to_vec(&body).unwrap_or_default();
    let mut text = format!("{MAGIC} {VERSION} {}\n", digest(&body)).into_bytes();
    text.extend(body);
    text
}

impl Ledger {
    /// As it is kept.
    pub fn text(&self, host: &HostName, prefix: &Prefix) -> Vec<u8> {
        let Self { identity, saved, contents, key, last_good, held } = self;
        text((host, prefix), identity, *saved, (contents, key), last_good, held.as_ref())
    }

    /// What the store that it is of must know, if nobody has seen it since.
    pub(super) fn landmark(&self) -> Option<Landmark> {
        let age = Timestamp::now().since(self.saved);
        Landmark::newest(&self.contents, self.identity.revision, age)
    }

    /// From what was kept. Anything that is not exactly what was written is refused.
    ///
    /// # Errors
    /// Why it is not used.
    pub fn parse(text: &[u8], host: &HostName, prefix: &Prefix) -> Result<Self, LedgerError> {
        let end = text.iter().position(|b| *b == b'\n').ok_or(LedgerError::Damaged("it has no first line"))?;
        let first = std::str::from_utf8(&text[..end]).map_err(|_| LedgerError::Damaged("its first line is no text"))?;
        let words: Vec<&str> = first.split(' ').collect();
        let [MAGIC, version, sum] = words[..] else {
            return Err(LedgerError::Damaged("its first line is not that of a ledger"));
        };
        // Before the checksum: another form may have another one.
        let number: u32 = version.parse().map_err(|_| LedgerError::Damaged("its form is no number"))?;
        // `01` and `+1` are numbers too, and nobody wrote them.
        if version != number.to_string() {
            return Err(LedgerError::Damaged("its form is no number"));
        }
        if number != VERSION {
            return Err(LedgerError::Version(number));
        }
        let body = &text[end + 1..];
        if digest(body) != sum {
            return Err(LedgerError::Damaged("its checksum is not that of its text"));
        }
        let body: Body = serde_json::from_slice(body).map_err(|_| LedgerError::Damaged("its text makes no sense"))?;
        if body.host != host.as_str() || body.prefix != prefix.as_str() {
            return Err(LedgerError::Foreign { host: body.host, prefix: body.prefix });
        }
        let bytes = |text: &str| STANDARD.decode(text).map_err(|_| LedgerError::Damaged("a value makes no sense"));
        let entries = |lines: &[Line]| -> Result<Entries, LedgerError> {
            let entry = |(key, value, created, modified): &Line| {
                Ok((bytes(key)?, Entry::new(bytes(value)?, *created, *modified)))
            };
            lines.iter().map(entry).collect()
        };
        let contents = Contents { entries: entries(&body.entries)?, revision: body.revision };
        let last_good = body.last_good.into_iter().map(|(app, lines)| Ok((app, entries(&lines)?)));
        let last_good = last_good.collect::<Result<_, LedgerError>>()?;
        let key = ReleaseKey::new(bytes(&body.key)?);
        Ok(Self { identity: body.identity, saved: body.saved, contents, key, last_good, held: body.held })
    }
}

fn digest(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger() -> (Ledger, HostName, Prefix) {
        let mut contents = Contents { revision: 9, ..Contents::default() };
        contents.entries.insert(b"apps/web/spec".to_vec(), Entry::new(b"image: web:v1\n".to_vec(), 3, 7));
        contents.entries.insert(b"env/web/\xff".to_vec(), Entry::new(vec![0, 255], 4, 4));
        let identity = Identity { cluster: Some("c1".into()), etcd: 7, revision: 9, whole: 9, key: Some("k".into()) };
        let ledger = Ledger {
            identity,
            saved: Timestamp::from_millis(1),
            key: ReleaseKey::new("a secret key"),
            last_good: [(AppName::try_from("web").expect("a name"), contents.entries.clone())].into(),
            contents,
            held: None,
        };
        (ledger, HostName::try_from("web1").expect("a name"), Prefix::new("/demae").expect("a prefix"))
    }

    #[test]
    fn what_was_kept_comes_back() {
        let (ledger, host, prefix) = ledger();
        let text = ledger.text(&host, &prefix);
        assert_eq!(Ledger::parse(&text, &host, &prefix), Ok(ledger));
    }

    #[test]
    fn a_ledger_that_was_cut_or_changed_anywhere_is_refused() {
        let (ledger, host, prefix) = ledger();
        let text = ledger.text(&host, &prefix);
        for length in 0..text.len() {
            assert!(Ledger::parse(&text[..length], &host, &prefix).is_err(), "cut after {length} bytes");
        }
        for at in 0..text.len() {
            let mut changed = text.clone();
            changed[at] ^= 1;
            assert!(Ledger::parse(&changed, &host, &prefix).is_err(), "byte {at} changed");
        }
    }

    #[test]
    fn ledgers_of_others_are_told_apart() {
        let (ledger, host, prefix) = ledger();
        let text = ledger.text(&host, &prefix);
        let other = HostName::try_from("web2").expect("a name");
        assert!(matches!(Ledger::parse(&text, &other, &prefix), Err(LedgerError::Foreign { .. })));
        let newer = String::from_utf8(text).expect("text").replacen(" 1 ", " 2 ", 1);
        assert_eq!(Ledger::parse(newer.as_bytes(), &host, &prefix), Err(LedgerError::Version(2)));
    }
}
