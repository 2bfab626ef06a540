//! Ledgers: what was saved is loaded; truncated, modified or forged files are not.

use std::collections::BTreeMap;

use demae::{
    model::{
        name::{AppName, HostName},
        release::ReleaseKey,
        status::StoreBlock,
        time::Timestamp,
    },
    store::{Contents, Entry, FenceRecord, Identity, Ledger, LedgerError, Nonce, keys::Prefix},
};
use sha2::{Digest as _, Sha256};

use super::Bytes;

/// Last time in RFC 3339, in the year 9999.
const LAST_TIME: u64 = 253_402_207_200_000;

/// Input: a ledger; a ledger's text without its checksum; and the fields of one.
pub fn check(bytes: &[u8]) {
    let host = HostName::try_from("web1").expect("a name");
    let prefix = Prefix::new("/demae").expect("a prefix");
    let parse = |text: &[u8]| Ledger::parse(text, &host, &prefix);

    if let Ok(ledger) = parse(bytes) {
        assert!(ledger.text(&host, &prefix) == bytes, "accepted, but not as it was written: {ledger:?}");
    }

    // The checksum detects accidents. Anyone who can write the file can forge it, which must not make the agent panic.
    let sum: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
    let sealed = [format!("demae-ledger 1 {sum}\n").as_bytes(), bytes].concat();
    if let Ok(ledger) = parse(&sealed) {
        assert!(parse(&ledger.text(&host, &prefix)).as_ref() == Ok(&ledger), "not stable: {ledger:?}");
    }

    let mut from = Bytes(bytes);
    let ledger = ledger(&mut from);
    let text = ledger.text(&host, &prefix);
    assert!(parse(&text).as_ref() == Ok(&ledger), "the saved ledger is not loaded: {ledger:?}");
    refuses_foreign(&text, &host, &prefix);
    damage(&text, &mut from, &|text| parse(text).is_ok());
}

fn ledger(from: &mut Bytes<'_>) -> Ledger {
    let saved = i64::try_from(from.number() % LAST_TIME).expect("small");
    let has = from.byte();
    let some = |bit: u8| has & bit != 0;
    let identity = Identity {
        etcd: from.number(),
        revision: from.number().cast_signed(),
        cluster: some(1).then(|| from.text()),
        key: some(2).then(|| from.text()),
    };
    let quarantine = some(4).then(|| StoreBlock { kind: from.text(), message: from.text(), remedy: from.text() });
    let key = ReleaseKey::new(from.field().unwrap_or_default());
    let mut entries = BTreeMap::new();
    while let Some(name) = from.field() {
        let value = from.field().unwrap_or_default().to_vec();
        let (created, modified) = (i64::from(from.byte()), i64::from(from.byte()));
        entries.insert(name.to_vec(), Entry::new(value, created, modified));
    }
    let web = AppName::try_from("web").expect("a name");
    let last_good = if some(8) { [(web, entries.clone())].into() } else { BTreeMap::new() };
    let contents = Contents::new(entries, identity.revision);
    let nonce = |word: &str| vec![Nonce::new(word)];
    let fence = some(16).then(|| FenceRecord { acknowledged: nonce("a"), pending: nonce("b") });
    let fleet_acceptance = some(32).then(|| from.text());
    let saved = Timestamp::from_millis(saved);
    Ledger { identity, saved, contents, key, last_good, quarantine, fence, fleet_acceptance }
}

/// The ledger of another host, or of another prefix, is refused.
fn refuses_foreign(text: &[u8], host: &HostName, prefix: &Prefix) {
    let other = HostName::try_from("web2").expect("a name");
    let elsewhere = Prefix::new("/demae2").expect("a prefix");
    for read in [Ledger::parse(text, &other, prefix), Ledger::parse(text, host, &elsewhere)] {
        assert!(matches!(read, Err(LedgerError::Foreign { .. })), "a foreign ledger is accepted: {read:?}");
    }
}

/// Length of the first line: magic, format and checksum.
const FIRST_LINE: usize = 80;

/// Truncated or modified anywhere, or with a byte inserted in the first line: always refused. A short one is truncated
/// at each byte.
fn damage(text: &[u8], from: &mut Bytes<'_>, is_accepted: &dyn Fn(&[u8]) -> bool) {
    let places: Vec<usize> = if text.len() < 320 {
        (0..text.len()).collect()
    } else {
        // The first line, the last bytes, and some in between.
        let between = (0..8).map(|n| n * text.len() / 8 + from.below(text.len() / 8));
        [0, 12, 13, 14, 15, FIRST_LINE - 1, FIRST_LINE, text.len() - 1].into_iter().chain(between).collect()
    };
    let mask = from.byte().max(1);
    for at in places {
        assert!(!is_accepted(&text[..at]), "truncated after {at} bytes: {:?}", String::from_utf8_lossy(text));
        let mut changed = text.to_vec();
        changed[at] ^= mask;
        assert!(!is_accepted(&changed), "byte {at} changed by {mask}: {:?}", String::from_utf8_lossy(text));
        for put in [b'0', b'+', b' ', b'\n', mask].into_iter().filter(|_| at < FIRST_LINE) {
            let mut longer = text.to_vec();
            longer.insert(at, put);
            assert!(!is_accepted(&longer), "{put} inserted at {at}: {:?}", String::from_utf8_lossy(text));
        }
    }
}
