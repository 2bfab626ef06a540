//! Everything demae writes to disk, and nothing else does.
//!
//! A file is whole or not there: written beside its place, synced, renamed, and the rename synced too. Removing what is
//! not there is done already.
#![expect(clippy::disallowed_methods, reason = "the home of durable writes")]

use std::{
    fs, io,
    io::Write as _,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use crate::{failpoint, model::time::Timestamp};

/// Why a file could not be written, read or removed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} `{}`", path.display())]
pub struct FileError {
    operation: &'static str,
    path: PathBuf,
    source: io::Error,
}

impl FileError {
    /// Whether the disk, or the quota, is full.
    pub fn is_full(&self) -> bool {
        matches!(self.source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }
}

impl FileError {
    /// A file that could not be written.
    pub fn cannot_write(path: &Path, source: io::Error) -> Self {
        failed("write", path)(source)
    }

    /// A file of ours that cannot be understood, and what removing it would do.
    pub fn unreadable(path: &Path, why: &str, remedy: &str) -> Self {
        let text = format!("{why} (put it back as it was, or remove it{remedy})");
        failed("understand", path)(io::Error::other(text))
    }

    /// A file of ours that says nothing we know.
    pub(super) fn not_ours(path: &Path, source: io::Error) -> Self {
        failed("understand", path)(source)
    }
}

type Result<T, E = FileError> = std::result::Result<T, E>;

fn failed<'p>(operation: &'static str, path: &'p Path) -> impl Fn(io::Error) -> FileError + use<'p> {
    move |source| FileError { operation, path: path.to_owned(), source }
}

/// Writes a whole file with these rights. Its directory must exist.
///
/// # Errors
/// If anything of it fails; then the old file is still there, whole.
pub fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let beside = beside(path);
    let write = || -> io::Result<()> {
        remove(&beside)?;
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&beside)?;
        failpoint::boundary("write");
        file.write_all(bytes)?;
        // The mode of `open` is cut by the umask.
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.sync_all()?;
        failpoint::boundary("rename");
        fs::rename(&beside, path)?;
        failpoint::boundary("renamed");
        sync_parent(path)
    };
    write().map_err(|source| {
        // What is left beside would be in nobody's way, but it may hold secrets.
        let _ = remove(&beside);
        FileError { operation: "write", path: path.to_owned(), source }
    })
}

/// Writes a whole file that need not outlive a crash until [`sync_dir`] is called on its directory.
///
/// # Errors
/// If anything of it fails; what is there then may be cut.
pub fn write_quickly(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let write = || -> io::Result<()> {
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(path)?;
        file.write_all(bytes)?;
        file.set_permissions(fs::Permissions::from_mode(mode))
    };
    failpoint::boundary("write");
    write().map_err(failed("write", path))
}

/// Makes a directory durable: each file in it, its names, and its own name.
///
/// # Errors
/// If any of it cannot be synced.
pub fn sync_dir(path: &Path) -> Result<()> {
    let sync = || -> io::Result<()> {
        for entry in fs::read_dir(path)? {
            fs::File::open(entry?.path())?.sync_all()?;
        }
        fs::File::open(path)?.sync_all()?;
        sync_parent(path)
    };
    sync().map_err(failed("sync", path))
}

/// Reads a whole file; `None` if there is none.
///
/// # Errors
/// If it is there and cannot be read.
pub fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(failed("read", path)(e)),
    }
}

/// Where a symlink leads; `None` if there is none, or something else is in its place.
///
/// # Errors
/// If that cannot be told.
pub fn read_link(path: &Path) -> Result<Option<PathBuf>> {
    match fs::read_link(path) {
        Ok(target) => Ok(Some(target)),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidInput) => Ok(None),
        Err(e) => Err(failed("read the symlink", path)(e)),
    }
}

/// When a file or a directory was last changed, by the wall clock; `None` if it is not there.
///
/// # Errors
/// If it is there, or may be, and cannot be looked at.
pub fn modified(path: &Path) -> Result<Option<Timestamp>> {
    match fs::metadata(path).and_then(|m| m.modified()) {
        Ok(at) => Ok(Some(Timestamp::from_system(at))),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(failed("look at", path)(e)),
    }
}

/// Points a symlink somewhere else, at once: whoever opens it finds the old target or the new one.
///
/// # Errors
/// If anything of it fails; then the old one is still there.
pub fn symlink(target: &Path, link: &Path) -> Result<()> {
    let beside = beside(link);
    let point = || -> io::Result<()> {
        remove(&beside)?;
        std::os::unix::fs::symlink(target, &beside)?;
        failpoint::boundary("relink");
        fs::rename(&beside, link)?;
        sync_parent(link)
    };
    point().map_err(failed("point the symlink", link))
}

/// Makes a directory and those above it, and gives it these rights.
///
/// # Errors
/// If it cannot be made, or there is something else.
pub fn make_dir(path: &Path, mode: u32) -> Result<()> {
    let make = || -> io::Result<()> {
        if !path.is_dir() {
            fs::DirBuilder::new().recursive(true).mode(0o755).create(path)?;
            sync_parent(path)?;
        }
        if fs::metadata(path)?.permissions().mode() & 0o7777 != mode {
            fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        }
        Ok(())
    };
    make().map_err(failed("make the directory", path))
}

/// Bytes that this process may still write to the file system of a path, and bytes in all.
///
/// # Errors
/// If it is not there, or cannot be asked.
pub fn space(path: &Path) -> Result<(u64, u64)> {
    let stat = rustix::fs::statvfs(path).map_err(|e| failed("ask the file system of", path)(e.into()))?;
    Ok((stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize))
}

/// Gives a file or directory to a user and a group, then the rights: the change of owner clears some of them. What has
/// them already is not touched.
///
/// # Errors
/// If this agent may not.
pub fn hand_over(path: &Path, user: Option<u32>, group: Option<u32>, mode: u32) -> Result<()> {
    let give = || -> io::Result<()> {
        let found = fs::metadata(path)?;
        let is_theirs = user.is_none_or(|u| u == found.uid()) && group.is_none_or(|g| g == found.gid());
        if !is_theirs {
            std::os::unix::fs::chown(path, user, group)?;
        }
        if !is_theirs || found.permissions().mode() & 0o7777 != mode {
            fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        }
        Ok(())
    };
    give().map_err(failed("hand over", path))
}

/// Lets a group pass to a socket, if it was made while the group was not known: through the directory of the instance and
/// the two above it, that of the app and that of all; or if hands, or a crash between two calls, closed one of them. A
/// directory that is open to the group already is left alone.
///
/// # Errors
/// If this agent may not.
pub fn open_way_to(socket: &Path, group: u32) -> Result<()> {
    for (level, dir) in socket.ancestors().skip(1).take(3).enumerate() {
        let found = match fs::symlink_metadata(dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            found => found.map_err(failed("look at", dir))?,
        };
        // That of the instance belongs to the container's user, and hands its group down.
        let needed = if level == 0 { 0o2050 } else { 0o050 };
        let is_open = found.gid() == group && found.permissions().mode() & needed == needed;
        if !found.is_dir() || is_open {
            continue;
        }
        let mode = if level == 0 { found.permissions().mode() & 0o777 | needed } else { 0o750 };
        hand_over(dir, None, Some(group), mode)?;
    }
    Ok(())
}

/// Lets a group connect to a socket; what is not there is left alone.
///
/// The directory belongs to a container, which may put a symlink in the place of its socket at any moment. So the file
/// is opened once, without following, and everything is done to what was opened.
///
/// # Errors
/// If it is not a socket, or this agent may not.
pub fn open_socket_to(path: &Path, group: u32) -> Result<()> {
    use std::os::{fd::AsRawFd as _, unix::fs::FileTypeExt as _, unix::fs::MetadataExt as _};

    use rustix::fs::{AtFlags, CWD, Gid, Mode, OFlags};
    let open = || -> io::Result<()> {
        let fd = match rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()) {
            Ok(fd) => fs::File::from(fd),
            Err(rustix::io::Errno::NOENT) => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        let meta = fd.metadata()?;
        if !meta.file_type().is_socket() {
            return Err(io::Error::other("this is not a socket"));
        }
        if meta.gid() == group && meta.mode() & 0o060 == 0o060 {
            return Ok(());
        }
        rustix::fs::chownat(&fd, "", None, Some(Gid::from_raw(group)), AtFlags::EMPTY_PATH)?;
        let mode = fs::Permissions::from_mode(meta.mode() & 0o777 | 0o660);
        fs::set_permissions(format!("/proc/self/fd/{}", fd.as_raw_fd()), mode)
    };
    open().map_err(failed("open to nginx", path))
}

/// Sees that what lies at a path is a socket, and no symlink to one. Nothing there is fine.
///
/// # Errors
/// If it is something else, or cannot be looked at.
pub fn expect_socket(path: &Path) -> Result<()> {
    use std::os::unix::fs::FileTypeExt as _;
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => Ok(()),
        Ok(_) => Err(failed("use", path)(io::Error::other("something else than a socket lies there"))),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(failed("look at", path)(e)),
    }
}

/// Removes a file or a symlink.
///
/// # Errors
/// If it is there and cannot be removed.
pub fn remove_file(path: &Path) -> Result<()> {
    remove(path).map_err(failed("remove", path))
}

/// Removes a directory with all that is in it.
///
/// # Errors
/// If it is there and cannot be removed.
pub fn remove_dir(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(e)),
        _ => Ok(()),
    }
}

/// Removes a directory if nothing is in it.
pub fn remove_dir_if_empty(path: &Path) {
    // A directory that is not empty, or not there, is fine either way.
    let _ = fs::remove_dir(path);
}

/// The names in a directory, sorted; none if there is no such directory. Names that demae would not give are left out.
///
/// # Errors
/// If it is there and cannot be read.
pub fn list(path: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(failed("list", path)(e)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(failed("list", path))?.file_name();
        names.extend(name.into_string().ok().filter(|n| !n.starts_with('.')));
    }
    names.sort();
    Ok(names)
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// A name that no reader looks at: hidden, and not ending as the real one does.
fn beside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.new"))
}

fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => fs::File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

/// A file that one process holds.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "the lock ends when the file is closed")] fs::File);

/// Takes a lock for as long as the answer lives; the kernel gives it back however the process ends.
///
/// # Errors
/// If another process holds it, or the file cannot be opened.
pub fn lock(path: &Path) -> Result<Lock> {
    let take = || -> io::Result<fs::File> {
        let file = fs::OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path)?;
        rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(|e| {
            if e == rustix::io::Errno::WOULDBLOCK { io::Error::other("another agent holds it") } else { e.into() }
        })?;
        Ok(file)
    };
    take().map(Lock).map_err(failed("lock", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_its_rights_and_replaces_the_old_one_whole() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("env");
        write(&path, b"one", 0o600).expect("it is written");
        write(&path, b"two", 0o600).expect("it is written again");
        assert_eq!(read(&path).expect("it is read"), Some(b"two".to_vec()));
        assert_eq!(fs::metadata(&path).expect("it is there").permissions().mode() & 0o777, 0o600);
        assert_eq!(list(dir.path()).expect("it is listed"), ["env"]);
    }

    #[test]
    fn what_a_crash_left_beside_is_no_obstacle() {
        let dir = tempfile::tempdir().expect("a directory");
        let link = dir.path().join("1.sock");
        std::os::unix::fs::symlink("torn", dir.path().join(".1.sock.new")).expect("a leftover");
        symlink(Path::new("/b"), &link).expect("it is pointed");
        assert_eq!(fs::read_link(&link).expect("it is there"), Path::new("/b"));
        assert_eq!(list(dir.path()).expect("it is listed"), ["1.sock"]);
    }

    #[test]
    fn a_lock_is_held_by_one() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("lock");
        let held = lock(&path).expect("it is free");
        assert!(lock(&path).is_err());
        drop(held);
        lock(&path).expect("it is free again");
    }
}
