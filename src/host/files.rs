//! All durable writes of demae.
//!
//! A file is complete or absent: written to a temporary name, synced, renamed, and the directory synced too. Removing a
//! missing file succeeds.
#![expect(clippy::disallowed_methods, reason = "the home of durable writes")]

use std::{
    fs, io,
    io::Write as _,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use tokio::{
    runtime::{Handle, RuntimeFlavor},
    task::block_in_place,
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
    /// The error for a failed write.
    pub fn cannot_write(path: &Path, source: io::Error) -> Self {
        failed("write", path)(source)
    }

    /// The error for a file of demae that does not parse, and what removing it would do.
    pub fn unreadable(path: &Path, why: &str, remedy: &str) -> Self {
        let text = format!("{why} (put it back as it was, or remove it{remedy})");
        failed("understand", path)(io::Error::other(text))
    }

    /// The error for a file of demae that does not parse.
    pub(super) fn not_ours(path: &Path, source: io::Error) -> Self {
        failed("understand", path)(source)
    }
}

type Result<T, E = FileError> = std::result::Result<T, E>;

fn failed<'p>(operation: &'static str, path: &'p Path) -> impl Fn(io::Error) -> FileError + use<'p> {
    move |source| FileError { operation, path: path.to_owned(), source }
}

/// Writes a file atomically with this mode. Its directory must exist.
///
/// # Errors
/// If any part fails; the old file is unchanged then.
pub fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let temporary = temporary_name(path);
    let write = || -> io::Result<()> {
        remove(&temporary)?;
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        failpoint::boundary("write");
        file.write_all(bytes)?;
        // The umask applies to the mode of `open`.
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        sync(&file)?;
        failpoint::boundary("rename");
        fs::rename(&temporary, path)?;
        failpoint::boundary("renamed");
        sync_parent(path)
    };
    write().map_err(|source| {
        // A leftover does no harm, but may hold secrets.
        let _ = remove(&temporary);
        FileError { operation: "write", path: path.to_owned(), source }
    })
}

/// Replaces a whole file that need not outlive a crash of the machine. Its directory must exist.
///
/// # Errors
/// If anything of it fails; then the old file is still there, whole.
pub fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let temporary = temporary_name(path);
    write_unsynced(&temporary, bytes, mode)?;
    fs::rename(&temporary, path).map_err(failed("replace", path))
}

/// Writes a file without sync: durable once [`sync_dir`] is called on its directory.
///
/// # Errors
/// If any part fails; the file may be truncated then.
pub fn write_unsynced(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let write = || -> io::Result<()> {
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(path)?;
        file.write_all(bytes)?;
        file.set_permissions(fs::Permissions::from_mode(mode))
    };
    failpoint::boundary("write");
    write().map_err(failed("write", path))
}

/// Syncs a directory: each file in it, its entries, and its own entry.
///
/// # Errors
/// If any sync fails.
pub fn sync_dir(path: &Path) -> Result<()> {
    let sync_all = || -> io::Result<()> {
        for entry in fs::read_dir(path)? {
            sync(&fs::File::open(entry?.path())?)?;
        }
        sync(&fs::File::open(path)?)?;
        sync_parent(path)
    };
    sync_all().map_err(failed("sync", path))
}

/// Reads a file; `None` if there is none.
///
/// # Errors
/// If it exists and cannot be read.
pub fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(failed("read", path)(e)),
    }
}

/// The target of a symlink; `None` if there is none, or another kind of file.
///
/// # Errors
/// If it cannot be read.
pub fn read_link(path: &Path) -> Result<Option<PathBuf>> {
    match fs::read_link(path) {
        Ok(target) => Ok(Some(target)),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidInput) => Ok(None),
        Err(e) => Err(failed("read the symlink", path)(e)),
    }
}

/// The mtime of a file or directory, by the wall clock; `None` if it does not exist.
///
/// # Errors
/// If its metadata cannot be read.
pub fn modified(path: &Path) -> Result<Option<Timestamp>> {
    match fs::metadata(path).and_then(|m| m.modified()) {
        Ok(at) => Ok(Some(Timestamp::from_system(at))),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(failed("look at", path)(e)),
    }
}

/// Points a symlink elsewhere atomically: a reader finds the old target or the new one.
///
/// # Errors
/// If any part fails; the old link is unchanged then.
pub fn symlink(target: &Path, link: &Path) -> Result<()> {
    let temporary = temporary_name(link);
    let point = || -> io::Result<()> {
        remove(&temporary)?;
        std::os::unix::fs::symlink(target, &temporary)?;
        failpoint::boundary("relink");
        fs::rename(&temporary, link)?;
        sync_parent(link)
    };
    point().map_err(failed("point the symlink", link))
}

/// Creates a directory and its parents, durably, and sets its mode.
///
/// # Errors
/// If it cannot be created, or another kind of file is there.
pub fn make_dir(path: &Path, mode: u32) -> Result<()> {
    let is_new = !path.is_dir();
    make_dir_unsynced(path, mode)?;
    if is_new { sync_parent(path).map_err(failed("sync", path)) } else { Ok(()) }
}

/// Creates a directory and its parents without sync, and sets its mode.
///
/// # Errors
/// If it cannot be created, or another kind of file is there.
pub fn make_dir_unsynced(path: &Path, mode: u32) -> Result<()> {
    let make = || -> io::Result<()> {
        if !path.is_dir() {
            fs::DirBuilder::new().recursive(true).mode(0o755).create(path)?;
        }
        if fs::metadata(path)?.permissions().mode() & 0o7777 != mode {
            fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        }
        Ok(())
    };
    make().map_err(failed("make the directory", path))
}

/// Free bytes for this process on the file system of a path, and its size.
///
/// # Errors
/// If it does not exist, or its file system cannot be read.
pub fn space(path: &Path) -> Result<(u64, u64)> {
    let stat = rustix::fs::statvfs(path).map_err(|e| failed("ask the file system of", path)(e.into()))?;
    Ok((stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize))
}

/// Sets owner, group and mode of a file or directory. The mode comes last: a change of owner clears some bits. No
/// effect if all are right already.
///
/// # Errors
/// If the agent lacks permission.
pub fn set_owner(path: &Path, user: Option<u32>, group: Option<u32>, mode: u32) -> Result<()> {
    let set = || -> io::Result<()> {
        let found = fs::metadata(path)?;
        let is_owner_right = user.is_none_or(|u| u == found.uid()) && group.is_none_or(|g| g == found.gid());
        if !is_owner_right {
            std::os::unix::fs::chown(path, user, group)?;
        }
        if !is_owner_right || found.permissions().mode() & 0o7777 != mode {
            fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        }
        Ok(())
    };
    set().map_err(failed("set the owner of", path))
}

/// Opens the path to a socket for a group: the directory of the instance and the two above it. Needed if they were made
/// while the group was unknown, or if a person, or a crash between two calls, closed one. A directory that is open to
/// the group already is left alone.
///
/// # Errors
/// If the agent lacks permission.
pub fn open_path_to(socket: &Path, group: u32) -> Result<()> {
    for (level, dir) in socket.ancestors().skip(1).take(3).enumerate() {
        let found = match fs::symlink_metadata(dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            found => found.map_err(failed("look at", dir))?,
        };
        // The instance's directory belongs to the container's user; setgid makes files inherit its group.
        let needed = if level == 0 { 0o2050 } else { 0o050 };
        let is_open = found.gid() == group && found.permissions().mode() & needed == needed;
        if !found.is_dir() || is_open {
            continue;
        }
        let mode = if level == 0 { found.permissions().mode() & 0o777 | needed } else { 0o750 };
        set_owner(dir, None, Some(group), mode)?;
    }
    Ok(())
}

/// Lets a group connect to a socket. No effect if it does not exist.
///
/// The directory belongs to a container, which may replace its socket by a symlink at any moment. So the file is opened
/// once, without following, and all changes go through that descriptor.
///
/// # Errors
/// If it is not a socket, or the agent lacks permission.
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

/// Checks that a path is a socket, not a symlink to one. A missing file passes.
///
/// # Errors
/// If it is another kind of file, or its metadata cannot be read.
pub fn expect_socket(path: &Path) -> Result<()> {
    use std::os::unix::fs::FileTypeExt as _;
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => Ok(()),
        Ok(_) => Err(failed("use", path)(io::Error::other("not a socket"))),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(failed("look at", path)(e)),
    }
}

/// Removes a file or a symlink.
///
/// # Errors
/// If it exists and cannot be removed.
pub fn remove_file(path: &Path) -> Result<()> {
    remove(path).map_err(failed("remove", path))
}

/// Removes a directory recursively.
///
/// # Errors
/// If it exists and cannot be removed.
pub fn remove_dir(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(e)),
        _ => Ok(()),
    }
}

/// Removes a directory if it is empty.
pub fn remove_dir_if_empty(path: &Path) {
    // A missing or non-empty directory is fine.
    let _ = fs::remove_dir(path);
}

/// The names in a directory, sorted; empty if there is no such directory. Hidden and non-UTF-8 names, which demae never
/// uses, are left out.
///
/// # Errors
/// If it exists and cannot be read.
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

/// A temporary name that no reader matches: hidden, with another suffix.
fn temporary_name(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.new"))
}

/// Syncs a file. A slow disk takes seconds for it, so on a runtime of several threads the others go on meanwhile: the
/// worker's tasks move to another thread, see [`tokio::task::block_in_place`].
fn sync(file: &fs::File) -> io::Result<()> {
    match Handle::try_current() {
        Ok(runtime) if runtime.runtime_flavor() == RuntimeFlavor::MultiThread => block_in_place(|| file.sync_all()),
        _ => file.sync_all(),
    }
}

fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => sync(&fs::File::open(parent)?),
        None => Ok(()),
    }
}

/// The process that holds a lock file, by `/proc/locks` (proc(5)); `None` if there is none, or it is in another namespace
/// of processes.
pub fn lock_holder(path: &Path) -> Option<i32> {
    let file = fs::metadata(path).ok()?;
    let (major, minor) = (rustix::fs::major(file.dev()), rustix::fs::minor(file.dev()));
    let wanted = format!("{major:02x}:{minor:02x}:{}", file.ino());
    let locks = fs::read_to_string("/proc/locks").ok()?;
    locks.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        // `1: FLOCK ADVISORY WRITE 1234 08:01:5678 0 EOF`
        let [_, "FLOCK", _, _, pid, file, ..] = fields.as_slice() else { return None };
        pid.parse().ok().filter(|pid| *file == wanted && *pid > 0)
    })
}

/// A lock file held by this process.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "the lock ends when the file is closed")] fs::File);

/// Locks a file until the result is dropped; the kernel releases it however the process ends.
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
    fn write_sets_the_mode_and_replaces_atomically() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("env");
        write(&path, b"one", 0o600).expect("it is written");
        write(&path, b"two", 0o600).expect("it is written again");
        assert_eq!(read(&path).expect("it is read"), Some(b"two".to_vec()));
        assert_eq!(fs::metadata(&path).expect("it is there").permissions().mode() & 0o777, 0o600);
        assert_eq!(list(dir.path()).expect("it is listed"), ["env"]);
    }

    #[test]
    fn leftover_temporary_file_is_replaced() {
        let dir = tempfile::tempdir().expect("a directory");
        let link = dir.path().join("1.sock");
        std::os::unix::fs::symlink("torn", dir.path().join(".1.sock.new")).expect("a leftover");
        symlink(Path::new("/b"), &link).expect("it is pointed");
        assert_eq!(fs::read_link(&link).expect("it is there"), Path::new("/b"));
        assert_eq!(list(dir.path()).expect("it is listed"), ["1.sock"]);
    }

    #[test]
    fn lock_is_exclusive() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("lock");
        let held = lock(&path).expect("it is free");
        assert_eq!(lock_holder(&path), i32::try_from(std::process::id()).ok());
        assert!(lock(&path).is_err());
        drop(held);
        lock(&path).expect("it is free again");
    }
}
