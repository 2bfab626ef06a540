//! File systems of a test's own, which may be full.
#![allow(clippy::disallowed_methods, reason = "a test mounts file systems and writes files of its own")]

use std::{fs, io::Write as _, path::PathBuf, process::Command};

/// A small tmpfs mounted over a directory. Docker must see it too, since app sockets are on it.
pub struct Disk {
    at: PathBuf,
}

impl Disk {
    /// Mounts one of 4 MiB and 2,000 inodes.
    pub fn mount(at: PathBuf) -> Self {
        Self::of(at, "4m,nr_inodes=2000")
    }

    /// Mounts one of this size.
    pub fn of(at: PathBuf, size: &str) -> Self {
        fs::create_dir_all(&at).expect("a directory");
        let mut command = Command::new("mount");
        command.args(["-t", "tmpfs", "-o", &format!("size={size},mode=755"), "demae-lab"]).arg(&at);
        assert!(command.status().is_ok_and(|s| s.success()), "a disk of its own needs a test that is root");
        Self { at }
    }

    /// Fills it to the last byte.
    pub fn fill(&self) {
        let mut file = fs::File::options().create(true).append(true).open(self.at.join("filler")).expect("a file");
        // One page at a time, so that the last one is used too.
        while file.write_all(&[0; 4096]).is_ok() {}
    }

    /// Uses up the inodes; bytes are left.
    pub fn fill_inodes(&self) {
        let dir = self.at.join("many");
        fs::create_dir(&dir).expect("a directory");
        let file = |n: usize| fs::File::options().create_new(true).write(true).open(dir.join(n.to_string()));
        let made = (0..).take_while(|n| file(*n).is_ok()).count();
        assert!(made > 100, "{made} files fill it");
    }

    /// Deletes the fillers.
    pub fn clear(&self) {
        // Only one of them exists.
        let _ = fs::remove_file(self.at.join("filler"));
        let _ = fs::remove_dir_all(self.at.join("many"));
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Processes of the lab still have files open there; they are killed right after it.
        let _ = Command::new("umount").arg("-l").arg(&self.at).status();
    }
}
