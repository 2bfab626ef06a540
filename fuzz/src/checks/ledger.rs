//! A ledger: what was kept comes back; what was cut, changed or made up does not.

use std::collections::BTreeMap;

use demae::{
    model::{
        name::{AppName, HostName},
        release::ReleaseKey,
        status::StoreBlock,
        time::Timestamp,
    },
    store::{Contents, Entry, Identity, Ledger, LedgerError, keys::Prefix},
};
use sha2::{Digest as _, Sha256};

use super::Bytes;

/// Times that RFC 3339 can write, up to the year 9999.
const LAST_TIME: u64 = 253_402_207_200_000;

/// The bytes as a ledger, as the text of one with its checksum mended, and as what one is made of.
pub fn check(bytes: &[u8]) {
    let host = HostName::try_from("web1").expect("a name");
    let prefix = Prefix::new("/demae").expect("a prefix");
    let parse = |text: &[u8]| Ledger::parse(text, &host, &prefix);

    if let Ok(ledger) = parse(bytes) {
        assert!(ledger.text(&host, &prefix) == bytes, "taken, and not what was written: {ledger:?}");
    }

    // A checksum holds against accidents. Whoever can write the file can mend it, and must not make the agent panic.
    let sum: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
    let sealed = [format!("demae-ledger 1 {sum}\n").as_bytes(), bytes].concat();
    if let Ok(ledger) = parse(&sealed) {
        assert!(parse(&ledger.text(&host, &prefix)).as_ref() == Ok(&ledger), "not the same twice: {ledger:?}");
    }

    let mut from = Bytes(bytes);
    let ledger = ledger(&mut from);
    let text = ledger.text(&host, &prefix);
    assert!(parse(&text).as_ref() == Ok(&ledger), "what was kept does not come back: {ledger:?}");
    is_told_apart(&text, &host, &prefix);
    damage(&text, &mut from, &|text| parse(text).is_ok());
}

fn ledger(from: &mut Bytes<'_>) -> Ledger {
    let saved = i64::try_from(from.number() % LAST_TIME).expect("small");
    let has = from.byte();
    let some = |bit: u8| has & bit != 0;
    let identity = Identity {
        etcd: from.number(),
        revision: from.number().cast_signed(),
        whole: from.number().cast_signed(),
        cluster: some(1).then(|| from.text()),
        key: some(2).then(|| from.text()),
    };
    let held = some(4).then(|| StoreBlock { kind: from.text(), message: from.text(), remedy: from.text() });
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
    Ledger { identity, saved: Timestamp::from_millis(saved), contents, key, last_good, held }
}

/// Another host's, and that of other keys, are not taken for ours.
fn is_told_apart(text: &[u8], host: &HostName, prefix: &Prefix) {
    let other = HostName::try_from("web2").expect("a name");
    let elsewhere = Prefix::new("/demae2").expect("a prefix");
    for read in [Ledger::parse(text, &other, prefix), Ledger::parse(text, host, &elsewhere)] {
        assert!(matches!(read, Err(LedgerError::Foreign { .. })), "taken for ours: {read:?}");
    }
}

/// The length of the first line: its beginning, the form, and the checksum.
const FIRST_LINE: usize = 80;

/// Cut or changed anywhere, or with something put in its first line: never taken. A short one is cut after each of its bytes.
fn damage(text: &[u8], from: &mut Bytes<'_>, is_taken: &dyn Fn(&[u8]) -> bool) {
    let places: Vec<usize> = if text.len() < 320 {
        (0..text.len()).collect()
    } else {
        // The first line, the last bytes, and some between.
        let between = (0..8).map(|n| n * text.len() / 8 + from.below(text.len() / 8));
        [0, 12, 13, 14, 15, FIRST_LINE - 1, FIRST_LINE, text.len() - 1].into_iter().chain(between).collect()
    };
    let mask = from.byte().max(1);
    for at in places {
        assert!(!is_taken(&text[..at]), "cut after {at} bytes: {:?}", String::from_utf8_lossy(text));
        let mut changed = text.to_vec();
        changed[at] ^= mask;
        assert!(!is_taken(&changed), "byte {at} changed by {mask}: {:?}", String::from_utf8_lossy(text));
        for put in [b'0', b'+', b' ', b'\n', mask].into_iter().filter(|_| at < FIRST_LINE) {
            let mut longer = text.to_vec();
            longer.insert(at, put);
            assert!(!is_taken(&longer), "{put} put in at {at}: {:?}", String::from_utf8_lossy(text));
        }
    }
}
