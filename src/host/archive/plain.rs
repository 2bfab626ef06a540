//! From a file as it comes to a plain one: sums it up, and takes the compression away.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use ruzstd::decoding::{FrameDecoder, StreamingDecoder};
use sha2::{Digest as _, Sha256};

use super::ArchiveError;
use crate::{host::files, model::text::hex};

/// Room that is left on the disk, in percent: a disk that is full to the end stops everything on it.
const RESERVE: u64 = 5;
/// The room is looked at after so many bytes.
const LOOK: u64 = 64 << 20;
/// How a file begins that was compressed: RFC 1952 and RFC 8878.
const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Writes what a source holds to a file, without compression. Returns the SHA-256 of the source, in hexadecimal.
///
/// # Errors
/// If the source ends too early, is no compressed file, or the disk is full.
pub(super) fn write(source: impl Read, to: &Path) -> Result<String, ArchiveError> {
    let mut source = Summed { source, sum: Sha256::new() };
    let mut begin = Vec::new();
    source.by_ref().take(4).read_to_end(&mut begin)?;
    let is_gzip = begin.starts_with(&GZIP);
    let is_zstd = begin.starts_with(&ZSTD);
    {
        let whole = BufReader::new(begin.as_slice().chain(&mut source));
        if is_gzip {
            copy(flate2::bufread::MultiGzDecoder::new(whole), to)?;
        } else if is_zstd {
            copy(zstd(whole), to)?;
        } else {
            copy(whole, to)?;
        }
    }
    // What follows the compressed part is summed up, too.
    io::copy(&mut source, &mut io::sink())?;
    Ok(hex(&source.sum.finalize()))
}

/// Reads zstd: all its frames, since compressors that use several threads write several.
struct Zstd<R: BufRead> {
    /// What is left of the source, between two frames.
    source: Option<R>,
    frame: Option<StreamingDecoder<R, FrameDecoder>>,
}

/// Reads zstd.
pub(super) fn zstd(source: impl BufRead) -> impl Read {
    Zstd { source: Some(source), frame: None }
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(frame) = &mut self.frame {
                match frame.read(into)? {
                    0 => self.source = self.frame.take().map(StreamingDecoder::into_inner),
                    count => return Ok(count),
                }
            }
            let Some(mut source) = self.source.take() else { return Ok(0) };
            if source.fill_buf()?.is_empty() {
                return Ok(0);
            }
            self.frame =
                Some(StreamingDecoder::new(source).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?);
        }
    }
}

/// Copies to a new file while there is room for it.
pub(super) fn copy(mut source: impl Read, to: &Path) -> Result<(), ArchiveError> {
    let mut file = create(to)?;
    loop {
        room(to, 0)?;
        if io::copy(&mut source.by_ref().take(LOOK), &mut file)? == 0 {
            return Ok(file.flush()?);
        }
    }
}

/// Whether so many bytes fit on the disk of a file, with some left.
///
/// # Errors
/// If they do not.
pub(super) fn room(at: &Path, bytes: u64) -> Result<(), ArchiveError> {
    let Some(dir) = at.parent() else { return Ok(()) };
    // What cannot be asked for is seen when the disk is full.
    let Ok((free, size)) = files::space(dir) else { return Ok(()) };
    if free < bytes.saturating_add(size / 100 * RESERVE) {
        let message = format!("{} MiB are free in `{}`", free >> 20, dir.display());
        return Err(ArchiveError::Full(message));
    }
    Ok(())
}

/// A new file for the agent alone.
pub(super) fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

/// Sums up what goes through.
struct Summed<R> {
    source: R,
    sum: Sha256,
}

impl<R: Read> Read for Summed<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.source.read(into)?;
        self.sum.update(&into[..count]);
        Ok(count)
    }
}

/// Whether a file is compressed by zstd, which older engines do not read.
pub(super) fn is_zstd(begin: &[u8]) -> bool {
    begin.starts_with(&ZSTD)
}
