//! The ledger: the accepted desired state on disk. An agent runs from it while etcd is away, and compares a store with it
//! before it trusts that store.
//!
//! The file is one line that names its form and checksum, then JSON. It holds what people wrote, secrets included, so it
//! must be readable by root only. It is written when what this host runs has changed; how far the store has been read
//! since is kept in a small file beside it, the head, whose loss costs nothing but a time that is shown.

use std::collections::BTreeMap;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{FenceRecord, Identity};
use crate::model::{
    name::{AppName, HostName},
    release::ReleaseKey,
    status::StoreBlock,
    text::{hex, json},
    time::Timestamp,
};
use crate::store::{
    contents::{Contents, Entries, Entry},
    keys::Prefix,
};

/// The version of this form.
const VERSION: u32 = 1;
/// What the first line begins with.
const MAGIC: &str = "demae-ledger";

/// The state directory, as far as the store is concerned. Writes are durable and whole, or leave what was there.
pub trait StateStore: Send + Sync {
    /// The text of the ledger; `None` if there is none.
    ///
    /// # Errors
    /// In words, if it exists and cannot be read.
    fn ledger(&self) -> Result<Option<Vec<u8>>, String>;

    /// Replaces the ledger.
    ///
    /// # Errors
    /// In words; then the old one is still there.
    fn write_ledger(&self, text: &[u8]) -> Result<(), String>;

    /// The text of the head; `None` if there is none or it cannot be read.
    fn head(&self) -> Option<Vec<u8>>;

    /// Replaces the head. It need not be durable, and a failure is of no consequence.
    fn write_head(&self, text: &[u8]);

    /// What a person accepted on this host; `None` if nothing.
    fn acceptance(&self) -> Option<Vec<u8>>;

    /// Removes what a person accepted: it has been used.
    fn clear_acceptance(&self);
}

/// How far the store has been read since the ledger was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// etcd's cluster id.
    pub etcd: u64,
    /// The highest revision seen.
    pub revision: i64,
    /// When the store was last found to be as it had been read.
    pub proven: Timestamp,
}

/// What a ledger holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Ledger {
    /// The store that was accepted.
    pub identity: Identity,
    /// When it was read.
    pub saved: Timestamp,
    /// The desired range.
    pub contents: Contents,
    /// The key that release ids are made with.
    pub key: ReleaseKey,
    /// Of apps that are invalid or paused in it, their keys from when they were neither.
    pub last_good: BTreeMap<AppName, Entries>,
    /// Why what was read after it is not trusted.
    pub quarantine: Option<StoreBlock>,
    /// The fence of this host; `None` in a ledger of a version without fences.
    pub fence: Option<FenceRecord>,
    /// The id of the last acceptance for the fleet that this host has taken.
    pub fleet_acceptance: Option<String>,
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
        /// The host that wrote it.
        host: String,
        /// What its keys begin with.
        prefix: String,
    },
}

/// The form on disk. Other versions add fields, which are ignored, and leave out those that have a default.
#[derive(Serialize, Deserialize)]
struct Body {
    host: String,
    prefix: String,
    saved: Timestamp,
    identity: Identity,
    revision: i64,
    #[serde(default, rename = "held")]
    quarantine: Option<StoreBlock>,
    key: String,
    entries: Vec<Line>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    last_good: BTreeMap<AppName, Vec<Line>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    fence: Option<FenceRecord>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    fleet_acceptance: Option<String>,
}

/// Key, value, revisions of creation and of the last change.
type Line = (String, String, i64, i64);

impl Ledger {
    /// The text of its file.
    pub fn text(&self, host: &HostName, prefix: &Prefix) -> Vec<u8> {
        let line = |(key, entry): (&Vec<u8>, &Entry)| {
            (STANDARD.encode(key), STANDARD.encode(entry.value()), entry.created(), entry.modified())
        };
        let lines = |entries: &Entries| entries.iter().map(line).collect();
        let body = Body {
            host: host.to_string(),
            prefix: prefix.as_str().to_owned(),
            saved: self.saved,
            identity: self.identity.clone(),
            revision: self.contents.revision,
            quarantine: self.quarantine.clone(),
            key: STANDARD.encode(self.key.expose()),
            entries: lines(&self.contents.entries),
            last_good: self.last_good.iter().map(|(app, entries)| (app.clone(), lines(entries))).collect(),
            fence: self.fence.clone(),
            fleet_acceptance: self.fleet_acceptance.clone(),
        };
        let body = json(&body).into_bytes();
        let mut text = format!("{MAGIC} {VERSION} {}\n", digest(&body)).into_bytes();
        text.extend(body);
        text
    }

    /// Reads a ledger. A text that differs in any byte from what was written is refused.
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
        // `01` and `+1` are numbers too, and no agent writes them.
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
        let Body { identity, saved, quarantine, fence, fleet_acceptance, .. } = body;
        Ok(Self { identity, saved, contents, key, last_good, quarantine, fence, fleet_acceptance })
    }
}

fn digest(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

#[cfg(test)]
mod tests {
    use super::{super::Nonce, *};

    fn ledger() -> (Ledger, HostName, Prefix) {
        let mut contents = Contents { revision: 9, ..Contents::default() };
        contents.entries.insert(b"apps/web/spec".to_vec(), Entry::new(b"image: web:v1\n".to_vec(), 3, 7));
        contents.entries.insert(b"env/web/\xff".to_vec(), Entry::new(vec![0, 255], 4, 4));
        let identity = Identity { cluster: Some("c1".into()), etcd: 7, revision: 9, key: Some("k".into()) };
        let ledger = Ledger {
            identity,
            saved: Timestamp::from_millis(1),
            key: ReleaseKey::new("a secret key"),
            last_good: [(AppName::try_from("web").expect("a name"), contents.entries.clone())].into(),
            contents,
            quarantine: None,
            fence: Some(FenceRecord { acknowledged: vec![Nonce::new("a")], pending: vec![Nonce::new("b")] }),
            fleet_acceptance: Some("c".into()),
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

    /// What versions before the fence wrote, and what a later one may add.
    #[test]
    fn a_ledger_of_a_neighbouring_version_is_read() {
        let (ledger, host, prefix) = ledger();
        let text = String::from_utf8(ledger.text(&host, &prefix)).expect("text");
        let mut body: serde_json::Value =
            serde_json::from_str(text.split_once('\n').expect("two lines").1).expect("JSON");
        let fields = body.as_object_mut().expect("a mapping");
        fields.remove("fence");
        fields.remove("fleet_acceptance");
        fields["identity"]["whole"] = 9.into();
        fields.insert("made_up".into(), true.into());
        let body = serde_json::to_vec(&body).expect("JSON");
        let text = [format!("{MAGIC} {VERSION} {}\n", digest(&body)).as_bytes(), &body].concat();
        let expected = Ledger { fence: None, fleet_acceptance: None, ..ledger };
        assert_eq!(Ledger::parse(&text, &host, &prefix), Ok(expected));
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
