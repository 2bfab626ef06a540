//! Root's file of rules for what may run on this host. It is looked at each time that something is created, so that a rule
//! holds as soon as it is written.

use std::{
    fs::Metadata,
    io::ErrorKind,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use crate::model::{
    name::HostName,
    policy::{FILE, Policy},
    problem::chain,
};

/// The file, and the rules that were last read from it.
#[derive(Debug)]
pub struct PolicyFile {
    path: PathBuf,
    host: HostName,
    known: Mutex<(Option<Stamp>, Arc<Policy>)>,
}

/// What tells one content of a file from another without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    file: (u64, u64, u64),
    modified: (i64, i64),
    changed: (i64, i64),
    rights: (u32, u32),
    dir: (u32, u32),
}

impl PolicyFile {
    /// The file at a path, which need not exist: without it, built-in rules hold.
    pub fn at(path: &Path, host: &HostName) -> Self {
        let built_in = Policy::built_in(host.as_str(), &name_of(path));
        Self { path: path.to_owned(), host: host.clone(), known: Mutex::new((None, Arc::new(built_in))) }
    }

    /// Built-in rules only.
    pub fn none(host: &HostName) -> Self {
        Self::at(Path::new(""), host)
    }

    /// The rules that hold now. Reads the file only if it has changed. Of a file that cannot be used, rules that allow
    /// nothing.
    pub fn current(&self) -> Arc<Policy> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let (host, name) = (self.host.as_str(), name_of(&self.path));
        let found = self.look();
        let (stamp, policy) = match found {
            Ok(stamp) if stamp == known.0 && known.1.why_unusable().is_none() => return known.1.clone(),
            Ok(None) => (None, Policy::built_in(host, &name)),
            Ok(Some(stamp)) => {
                let read = std::fs::read_to_string(&self.path).map_err(|e| chain(&e));
                let read = read.and_then(|text| Policy::parse(host, &name, &text).map_err(|e| e.to_string()));
                // Half of a file may be one with fewer rules.
                let is_same = self.look().is_ok_and(|again| again == Some(stamp));
                match read {
                    Ok(_) if !is_same => (None, Policy::unusable(host, &name, self.unusable("it is being written"))),
                    Ok(policy) => (Some(stamp), policy),
                    Err(why) => (None, Policy::unusable(host, &name, self.unusable(&why))),
                }
            }
            Err(why) => (None, Policy::unusable(host, &name, self.unusable(&why))),
        };
        // The same rules are the same value, so that a change of them is noticed by its address.
        if *known.1 == policy {
            known.0 = stamp;
        } else {
            *known = (stamp, Arc::new(policy));
        }
        known.1.clone()
    }

    fn unusable(&self, why: &str) -> String {
        format!("its policy `{}` cannot be used: {why}", self.path.display())
    }

    /// What tells its content; `None` if there is no file.
    fn look(&self) -> Result<Option<Stamp>, String> {
        if self.path.as_os_str().is_empty() {
            return Ok(None);
        }
        let found = match std::fs::metadata(&self.path) {
            Ok(found) => found,
            // A link that leads nowhere is a file that is lost.
            Err(e) if e.kind() == ErrorKind::NotFound && !is_there(&self.path) => return Ok(None),
            Err(e) => return Err(e.to_string()),
        };
        let dir = self.path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let above = std::fs::metadata(dir).map_err(|e| e.to_string())?;
        let refuse = |path: &Path, why: String| {
            format!("`{}` {why}: give it to root, and take the right to write from others", path.display())
        };
        for (path, metadata) in [(self.path.as_path(), &found), (dir, &above)] {
            if let Some(why) = who_else_writes(metadata) {
                return Err(refuse(path, why));
            }
        }
        // Where a link leads, and all above it: from a sticky directory others take nothing away.
        let real = std::fs::canonicalize(&self.path).map_err(|e| e.to_string())?;
        for dir in real.ancestors().skip(1) {
            let metadata = std::fs::metadata(dir).map_err(|e| e.to_string())?;
            let is_sticky = metadata.mode() & 0o1000 != 0 && metadata.uid() == 0;
            if let Some(why) = who_else_writes(&metadata).filter(|_| !is_sticky) {
                return Err(refuse(dir, why));
            }
        }
        if !found.is_file() {
            return Err("it is not a file".to_owned());
        }
        Ok(Some(Stamp {
            file: (found.dev(), found.ino(), found.size()),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
            rights: (found.uid(), found.mode()),
            dir: (above.uid(), above.mode()),
        }))
    }
}

/// Where a directory is once links are followed; `None` if it does not exist.
pub fn real_path(dir: &str) -> Option<String> {
    Some(std::fs::canonicalize(dir).ok()?.to_str()?.to_owned())
}

fn is_there(path: &Path) -> bool {
    !path.symlink_metadata().is_err_and(|e| e.kind() == ErrorKind::NotFound)
}

/// Who but root and this agent can write to it.
fn who_else_writes(found: &Metadata) -> Option<String> {
    let own = rustix::process::geteuid().as_raw();
    if found.uid() != 0 && found.uid() != own {
        return Some(format!("belongs to the user {}", found.uid()));
    }
    // The group and all others.
    (found.mode() & 0o022 != 0).then(|| format!("can be written to by others (mode {:o})", found.mode() & 0o7777))
}

fn name_of(path: &Path) -> String {
    path.file_name().map_or_else(|| FILE.to_owned(), |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test writes files of its own")]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    fn file(dir: &Path) -> PolicyFile {
        PolicyFile::at(&dir.join("policy.toml"), &HostName::try_from("web1").expect("a name"))
    }

    #[test]
    fn rules_are_those_that_the_file_has_now() {
        let dir = tempfile::tempdir().expect("a directory");
        let (policy, path) = (file(dir.path()), dir.path().join("policy.toml"));
        let without = policy.current();
        assert!(without.why_unusable().is_none() && Arc::ptr_eq(&without, &policy.current()));
        fs::write(&path, "[containers]\nmax_pids = 10\n").expect("a file");
        let first = policy.current();
        assert!(*first != *without && Arc::ptr_eq(&first, &policy.current()));
        fs::write(&path, "[containers]\nmax_pids = 20\n").expect("a file");
        assert_ne!(*policy.current(), *first);
        fs::remove_file(&path).expect("removed");
        assert_eq!(*policy.current(), *without);
    }

    #[test]
    fn a_file_that_cannot_be_used_allows_nothing_until_it_can() {
        let dir = tempfile::tempdir().expect("a directory");
        let (policy, path) = (file(dir.path()), dir.path().join("policy.toml"));
        let why = || policy.current().why_unusable().map(str::to_owned);
        fs::write(&path, "[containers]\nmax_pids = many\n").expect("a file");
        assert!(why().is_some_and(|why| why.contains("policy.toml")), "{:?}", why());
        fs::write(&path, "[containers]\nmax_pids = 10\n").expect("a file");
        assert_eq!(why(), None);
        for (path, mode) in [(path.as_path(), 0o666), (dir.path(), 0o777)] {
            let before = fs::metadata(path).expect("it is there").permissions();
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("changed");
            assert!(why().is_some_and(|why| why.contains("others")), "{:?}", why());
            fs::set_permissions(path, before).expect("changed back");
            assert_eq!(why(), None);
        }
        fs::remove_file(&path).expect("removed");
        std::os::unix::fs::symlink("nowhere", &path).expect("a link");
        assert!(why().is_some(), "a link that leads nowhere is not a missing file");
        fs::remove_file(&path).expect("removed");
        fs::create_dir(&path).expect("a directory");
        assert!(why().is_some());
    }
}
