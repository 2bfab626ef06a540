//! What people wrote, as it was read: keys, values and the revisions of their writes. Values only, no I/O.

use std::collections::BTreeMap;

/// A value and the revisions of its writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    value: Vec<u8>,
    created: i64,
    modified: i64,
}

impl Entry {
    /// A value, the revision that created its key, and the revision of its last change.
    pub fn new(value: Vec<u8>, created: i64, modified: i64) -> Self {
        Self { value, created, modified }
    }

    /// The value.
    pub fn value(&self) -> &[u8] {
        &self.value
    }

    /// The revision that created the key.
    pub fn created(&self) -> i64 {
        self.created
    }

    /// The revision of the last change.
    pub fn modified(&self) -> i64 {
        self.modified
    }
}

/// Keys without their prefix, and their entries.
pub(super) type Entries = BTreeMap<Vec<u8>, Entry>;

/// The desired range at one revision.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contents {
    pub(super) entries: Entries,
    pub(super) revision: i64,
}

/// One write: a key, without the prefix, and the revision that wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    /// The key.
    pub key: Vec<u8>,
    /// The revision.
    pub revision: i64,
}

impl Contents {
    /// All keys without their prefix, at a revision.
    pub fn new(entries: BTreeMap<Vec<u8>, Entry>, revision: i64) -> Self {
        Self { entries, revision }
    }

    /// The value of `cluster`, without the blanks that an editor leaves around it.
    pub(super) fn cluster(&self) -> Option<String> {
        let entry = self.entries.get(b"cluster".as_slice())?;
        Some(String::from_utf8_lossy(&entry.value).trim().to_owned())
    }

    /// The newest write among these keys; `None` if there are none.
    pub fn newest(&self) -> Option<Write> {
        let (key, entry) = self.entries.iter().max_by_key(|(_, entry)| entry.modified)?;
        Some(Write { key: key.clone(), revision: entry.modified })
    }

    /// True if a key is as that write left it.
    pub fn shows(&self, write: &Write) -> bool {
        self.entries.get(&write.key).is_some_and(|entry| entry.modified == write.revision)
    }

    /// True if a store with this many keys in the range, of which these were written after `since`, holds exactly these
    /// entries: no write after `since` and no deletion is missing here.
    pub fn matches(&self, total: usize, since: i64, written: &[Write]) -> bool {
        let newer = self.entries.values().filter(|entry| entry.modified > since).count();
        total == self.entries.len() && newer == written.len() && written.iter().all(|write| self.shows(write))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missed_write_or_deletion_shows_in_the_comparison() {
        let contents = |entries: &[(&str, i64)]| {
            let entries = entries.iter().map(|(k, at)| (k.as_bytes().to_vec(), Entry::new(vec![], 1, *at)));
            Contents::new(entries.collect(), 9)
        };
        let write = |key: &str, revision| Write { key: key.into(), revision };
        let held = contents(&[("a", 3), ("b", 7)]);
        assert!(held.matches(2, 9, &[]) && held.matches(2, 5, &[write("b", 7)]));
        assert!(!held.matches(2, 5, &[write("a", 8), write("b", 7)]), "a write to `a` was missed");
        assert!(!held.matches(2, 5, &[write("b", 8)]), "a second write to `b` was missed");
        assert!(!held.matches(1, 5, &[write("b", 7)]), "the deletion of `a` was missed");
        assert!(!held.matches(2, 5, &[]), "the deletion of `b` and a key from before");
        assert_eq!(held.newest(), Some(write("b", 7)));
        assert!(held.shows(&write("b", 7)) && !held.shows(&write("b", 6)) && !held.shows(&write("c", 1)));
    }
}
