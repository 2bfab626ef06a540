//! Images in files, in place of a registry: fetched, checked, and loaded into the engine.
//!
//! The engine never gets a file as it is. One image of it is chosen and written anew, in the form that every engine loads,
//! with a name of demae's own and no other: so no name of an image that is here is taken over, and an archive may be
//! compressed, or have a layout that this engine does not know.

mod contents;
mod plain;
mod source;

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use tokio::sync::mpsc;

use super::{
    docker::{Docker, DockerError, ImageFault},
    files,
    layout::Layout,
    policy::real_path,
};
use crate::model::{
    archive::Archive,
    name::{AppName, ImageRef},
    problem::chain,
};
use contents::Contents;

/// Programs that fetch files by schemes of addresses: words in which `{url}` and `{file}` are replaced.
pub type Fetchers = BTreeMap<String, Vec<String>>;

/// Pieces in flight between a task and a thread.
const PIECES: usize = 8;
/// Size of a piece, in bytes.
const PIECE: usize = 64 * 1024;

/// Why an image cannot be had from an archive.
#[derive(Debug, thiserror::Error)]
pub(super) enum ArchiveError {
    /// The file is not what it should be: it will be no other one the next time.
    #[error("{0}")]
    Wrong(String),
    /// A file, or a right, of this host that a person has to see to.
    #[error("{0}")]
    Here(String),
    /// It could not be fetched now.
    #[error("{0}")]
    Away(String),
    /// There is no room for it. The words are those by which a full disk is known.
    #[error("no space left on device for it: {0}")]
    Full(String),
}

impl ArchiveError {
    fn wrong(message: impl Into<String>) -> Self {
        Self::Wrong(message.into())
    }
}

impl From<io::Error> for ArchiveError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull => Self::Full(chain(&error)),
            io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput => {
                Self::Wrong(format!("it is damaged or cut off: {}", chain(&error)))
            }
            _ => Self::Away(chain(&error)),
        }
    }
}

/// Loads archives, one at a time.
pub struct Archives {
    docker: Docker,
    layout: Layout,
    fetchers: Fetchers,
    one: tokio::sync::Mutex<()>,
}

/// Removes the spool whatever comes, since files in it are large.
struct Spool(PathBuf);

impl Spool {
    fn new(dir: &Path) -> Result<Self, ArchiveError> {
        let failed = |e: files::FileError| ArchiveError::Away(chain(&e));
        files::make_dir_unsynced(dir, 0o700).map_err(failed)?;
        // A person's command may load one beside the agent. What is left is of one that was killed.
        let own = std::process::id().to_string();
        let is_left = |name: &String| *name == own || !Path::new("/proc").join(name).exists();
        for name in files::list(dir).map_err(failed)?.into_iter().filter(is_left) {
            files::remove_dir(&dir.join(name)).map_err(failed)?;
        }
        let dir = dir.join(own);
        files::make_dir_unsynced(&dir, 0o700).map_err(failed)?;
        Ok(Self(dir))
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        if let Err(e) = files::remove_dir(&self.0) {
            tracing::warn!("{}", chain(&e));
        }
        if let Some(all) = self.0.parent() {
            files::remove_dir_if_empty(all);
        }
    }
}

impl Archives {
    /// For this engine, with its files in the state directory.
    pub fn new(docker: Docker, layout: Layout, fetchers: Fetchers) -> Self {
        Self { docker, layout, fetchers, one: tokio::sync::Mutex::default() }
    }

    /// Fetches an archive and loads one image of it, under the name that [`ImageRef::tagged`] says.
    ///
    /// # Errors
    /// If it cannot be fetched, is not what it should be, or the engine refuses it; the error says whether a retry can help.
    pub async fn load(&self, app: &AppName, image: &ImageRef, archive: Archive<'_>) -> Result<(), DockerError> {
        let failed =
            |message: String, fault: ImageFault| DockerError::Image { image: image.to_string(), message, fault };
        self.load_into(app, image, archive).await.map_err(|e| match e {
            // An address is the same for every host; a file is that of this one.
            Loading::Archive(e @ ArchiveError::Wrong(_)) if archive.scheme().is_some() => {
                failed(e.to_string(), ImageFault::Absent)
            }
            Loading::Archive(e @ (ArchiveError::Wrong(_) | ArchiveError::Here(_))) => {
                failed(e.to_string(), ImageFault::Person)
            }
            Loading::Archive(e) => failed(e.to_string(), ImageFault::Temporary),
            Loading::Docker(e) => e,
        })
    }

    async fn load_into(&self, app: &AppName, image: &ImageRef, archive: Archive<'_>) -> Result<(), Loading> {
        let _one = self.one.lock().await;
        let spool = Spool::new(&self.layout.spool())?;
        let plain = spool.0.join("archive.tar");
        let policy = self.docker.policy();
        let admits = |real: &Path| real.to_str().is_some_and(|real| policy.admits_archive(app, real, &real_path));
        source::fetch(archive, admits, &self.fetchers, &spool.0, &plain).await?;
        let platform = self.docker.capacity().await?.platform;
        let (format, wanted, tag) = (archive.format(), archive.name().map(str::to_owned), image.tagged());
        let dir = spool.0.clone();
        let contents = blocking(move || Contents::read(&plain, &dir, format, wanted.as_deref(), &platform)).await?;
        if let Some(root) = self.docker.root_dir().await? {
            plain::room(&root.join("image"), contents.size())?;
        }
        let (pieces, body) = mpsc::channel(PIECES);
        // It ends with the reader, whose end closes the channel.
        let writing = tokio::task::spawn_blocking(move || contents.write(&tag, Pieces { pieces, buffer: Vec::new() }));
        let loaded = self.docker.load(image, body).await;
        match writing.await {
            // The engine has ended the request, and says why.
            Ok(Err(e)) if e.kind() == io::ErrorKind::BrokenPipe => {}
            Ok(Err(e)) => return Err(ArchiveError::from(e).into()),
            Err(e) => return Err(ArchiveError::Away(e.to_string()).into()),
            Ok(Ok(())) => {}
        }
        loaded?;
        match self.docker.image(&image.tagged()).await? {
            Some(_) => Ok(()),
            None => Err(ArchiveError::Away("the engine took it and does not have it".to_owned()).into()),
        }
    }
}

/// Why an archive was not loaded.
enum Loading {
    Archive(ArchiveError),
    Docker(DockerError),
}

impl From<ArchiveError> for Loading {
    fn from(error: ArchiveError) -> Self {
        Self::Archive(error)
    }
}

impl From<DockerError> for Loading {
    fn from(error: DockerError) -> Self {
        Self::Docker(error)
    }
}

/// Runs what reads and writes files, in a thread for that.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ArchiveError> + Send + 'static,
) -> Result<T, ArchiveError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| Err(ArchiveError::Away(e.to_string())))
}

/// A writer whose pieces a task reads.
struct Pieces {
    pieces: mpsc::Sender<hyper::body::Bytes>,
    buffer: Vec<u8>,
}

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= PIECE {
            self.flush()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let piece = std::mem::take(&mut self.buffer);
        if piece.is_empty() {
            return Ok(());
        }
        self.pieces.blocking_send(piece.into()).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

/// A reader of the pieces that a task sends.
struct Received {
    pieces: mpsc::Receiver<io::Result<hyper::body::Bytes>>,
    piece: hyper::body::Bytes,
}

impl Read for Received {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.pieces.blocking_recv() {
                Some(piece) => self.piece = piece?,
                None => return Ok(0),
            }
        }
        let count = into.len().min(self.piece.len());
        into[..count].copy_from_slice(&self.piece.split_to(count));
        Ok(count)
    }
}
