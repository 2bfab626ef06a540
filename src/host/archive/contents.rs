//! What is in an archive, and one image of it in the form that every engine loads: the one of `docker save`, with a
//! `manifest.json`. Layouts by OCI are turned into it
//! (<https://github.com/opencontainers/image-spec/blob/v1.1.0/image-layout.md>).

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufReader, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::json;

use super::{ArchiveError, plain};
use crate::model::archive::Format;

/// Most files in an archive, and most bytes of one that is read as a whole.
const MOST_FILES: usize = 100_000;
const MOST_JSON: u64 = 16 << 20;
/// Most bytes of all names together.
const MOST_NAMES: usize = 16 << 20;
/// Most layers of an image, as engines have them.
const MOST_LAYERS: usize = 127;
/// Most indexes within each other.
const MOST_DEPTH: u8 = 4;
/// Annotations with the name of an image: that of the layout, and containerd's.
const NAMES: [&str; 2] = ["io.containerd.image.name", "org.opencontainers.image.ref.name"];

/// The image that was chosen from an archive.
pub(super) struct Contents {
    config: Vec<u8>,
    layers: Vec<Part>,
}

/// Bytes of a file.
struct Part {
    file: PathBuf,
    from: u64,
    size: u64,
}

/// A file in an archive.
#[derive(Debug, Clone)]
enum Entry {
    Bytes { from: u64, size: u64 },
    Link(String),
}

/// An archive with the places of its files.
struct Tar {
    path: PathBuf,
    entries: BTreeMap<String, Entry>,
}

/// One image of a `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// An index of OCI, or a manifest.
#[derive(Deserialize)]
struct Index {
    #[serde(default)]
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

#[derive(Deserialize, Clone)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    platform: Option<Platform>,
}

/// The platform of an image, as its configuration has it.
#[derive(Deserialize, Clone)]
struct Platform {
    os: String,
    architecture: String,
}

impl Platform {
    fn name(&self) -> String {
        format!("{}/{}", self.os, self.architecture)
    }
}

impl Contents {
    /// Chooses an image: the one with this name, or the only one; of an index, the one for this platform.
    ///
    /// # Errors
    /// If there is no such image, several, or the archive is damaged.
    pub(super) fn read(
        path: &Path,
        spool: &Path,
        format: Format,
        wanted: Option<&str>,
        platform: &str,
    ) -> Result<Self, ArchiveError> {
        let tar = Tar::open(path)?;
        let (config, layers) = match format {
            Format::Docker => tar.saved(wanted)?,
            Format::Oci => tar.layout(wanted, platform)?,
        };
        let config = tar.bytes(&config)?;
        let of_image: Platform = parsed("the configuration of the image", &config)?;
        if of_image.name() != platform {
            let message = format!("it is for {}, and this host is {platform}", of_image.name());
            return Err(ArchiveError::Wrong(message));
        }
        if layers.len() > MOST_LAYERS {
            let message = format!("the image has {} layers, and {MOST_LAYERS} are the most", layers.len());
            return Err(ArchiveError::Wrong(message));
        }
        let mut parts = Vec::new();
        for (number, layer) in layers.iter().enumerate() {
            let part = tar.part(layer)?;
            let mut begin = [0; 4];
            let is_zstd = part.size >= 4 && part.open()?.read_exact(&mut begin).is_ok() && plain::is_zstd(&begin);
            parts.push(if is_zstd { part.without_zstd(&spool.join(format!("layer-{number}")))? } else { part });
        }
        Ok(Self { config, layers: parts })
    }

    /// How many bytes of layers the engine gets.
    pub(super) fn size(&self) -> u64 {
        self.layers.iter().map(|layer| layer.size).fold(0, u64::saturating_add)
    }

    /// Writes it, with this name.
    pub(super) fn write(self, tag: &str, to: impl Write) -> io::Result<()> {
        let names: Vec<String> = (0..self.layers.len()).map(|number| format!("{number}.tar")).collect();
        let manifest = json!([{ "Config": "config.json", "RepoTags": [tag], "Layers": names }]).to_string();
        let mut tar = tar::Builder::new(to);
        let mut append = |name: &str, size: u64, bytes: &mut dyn Read| {
            let mut header = tar::Header::new_gnu();
            header.set_size(size);
            header.set_mode(0o600);
            tar.append_data(&mut header, name, bytes)
        };
        for (name, part) in names.iter().zip(&self.layers) {
            append(name, part.size, &mut part.open()?)?;
        }
        for (name, bytes) in [("config.json", self.config.as_slice()), ("manifest.json", manifest.as_bytes())] {
            append(name, u64::try_from(bytes.len()).unwrap_or(u64::MAX), &mut &*bytes)?;
        }
        tar.into_inner()?.flush()
    }
}

impl Part {
    fn open(&self) -> io::Result<impl Read + use<>> {
        let mut file = File::open(&self.file)?;
        file.seek(SeekFrom::Start(self.from))?;
        Ok(file.take(self.size))
    }

    /// The same without compression, in a file of its own: the size must be known before it is written.
    fn without_zstd(&self, to: &Path) -> Result<Self, ArchiveError> {
        plain::copy(plain::zstd(BufReader::new(self.open()?)), to)?;
        let size = std::fs::metadata(to)?.len();
        Ok(Self { file: to.to_owned(), from: 0, size })
    }
}

/// A file of which only headers are read: what they say in many words is kept in memory, so there is a limit.
struct Headers {
    file: File,
    in_a_row: u64,
}

impl Read for Headers {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(into)?;
        self.in_a_row += u64::try_from(count).unwrap_or(u64::MAX);
        if self.in_a_row > MOST_JSON {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "its headers are too long"));
        }
        Ok(count)
    }
}

impl Seek for Headers {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.in_a_row = 0;
        self.file.seek(to)
    }
}

impl Tar {
    fn open(path: &Path) -> Result<Self, ArchiveError> {
        let mut archive = tar::Archive::new(BufReader::new(Headers { file: File::open(path)?, in_a_row: 0 }));
        let (mut entries, mut names) = (BTreeMap::new(), 0);
        // The error quotes the file, which may be any file of the host.
        let not_tar = |_: io::Error| {
            ArchiveError::wrong("it is no tar file, or is damaged, cut off or has headers that are too long")
        };
        for entry in archive.entries_with_seek().map_err(not_tar)? {
            let entry = entry.map_err(not_tar)?;
            let name = normal(&entry.path().map_err(not_tar)?);
            names += name.len();
            let found = match entry.header().entry_type() {
                tar::EntryType::Regular | tar::EntryType::Continuous => {
                    Entry::Bytes { from: entry.raw_file_position(), size: entry.size() }
                }
                kind @ (tar::EntryType::Symlink | tar::EntryType::Link) => {
                    let Some(target) = entry.link_name().map_err(not_tar)? else { continue };
                    // A hard link is from the top, a symlink from its directory.
                    let base = Path::new(&name).parent().filter(|_| kind == tar::EntryType::Symlink);
                    let target = normal(&base.unwrap_or(Path::new("")).join(target));
                    names += target.len();
                    Entry::Link(target)
                }
                _ => continue,
            };
            entries.insert(name, found);
            if entries.len() > MOST_FILES || names > MOST_NAMES {
                return Err(ArchiveError::wrong(format!("it has more than {MOST_FILES} files, or too long names")));
            }
        }
        let end = std::fs::metadata(path)?.len();
        let is_cut = |entry: &Entry| matches!(entry, Entry::Bytes { from, size } if from.saturating_add(*size) > end);
        if entries.values().any(is_cut) {
            return Err(ArchiveError::wrong("it is cut off"));
        }
        Ok(Self { path: path.to_owned(), entries })
    }

    fn part(&self, name: &str) -> Result<Part, ArchiveError> {
        let mut name = normal(Path::new(name));
        // Older engines save a layer that two images share as a link.
        for _ in 0..MOST_DEPTH {
            match self.entries.get(&name) {
                Some(Entry::Bytes { from, size }) => {
                    return Ok(Part { file: self.path.clone(), from: *from, size: *size });
                }
                Some(Entry::Link(target)) => name.clone_from(target),
                None => break,
            }
        }
        Err(ArchiveError::wrong(format!("there is no `{name}` in it")))
    }

    fn bytes(&self, name: &str) -> Result<Vec<u8>, ArchiveError> {
        let part = self.part(name)?;
        if part.size > MOST_JSON {
            return Err(ArchiveError::wrong(format!("`{name}` in it has {} bytes", part.size)));
        }
        let mut bytes = Vec::new();
        part.open()?.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn json<T: DeserializeOwned>(&self, name: &str) -> Result<T, ArchiveError> {
        parsed(&format!("`{name}` in it"), &self.bytes(name)?)
    }

    /// The image of a `manifest.json`: names of its configuration and layers.
    fn saved(&self, wanted: Option<&str>) -> Result<(String, Vec<String>), ArchiveError> {
        if !self.entries.contains_key("manifest.json") {
            let hint = if self.entries.contains_key("index.json") { ": it is an `oci-archive`" } else { "" };
            return Err(ArchiveError::wrong(format!("it was not written by `docker save`{hint}")));
        }
        let all: Vec<Saved> = self.json("manifest.json")?;
        let named = all.into_iter().map(|saved| (saved.repo_tags.clone().unwrap_or_default(), saved));
        let saved = choose(named.collect(), wanted)?;
        Ok((saved.config, saved.layers))
    }

    /// The image of a layout by OCI.
    fn layout(&self, wanted: Option<&str>, platform: &str) -> Result<(String, Vec<String>), ArchiveError> {
        if !self.entries.contains_key("index.json") {
            let hint = if self.entries.contains_key("manifest.json") { ": it is a `docker-archive`" } else { "" };
            return Err(ArchiveError::wrong(format!("it has no layout by OCI{hint}")));
        }
        let index: Index = self.json("index.json")?;
        let images = index.manifests.into_iter().filter(Descriptor::is_image);
        let named = images.map(|image| (image.names(), image)).collect();
        let mut chosen = choose(named, wanted)?;
        for _ in 0..MOST_DEPTH {
            let name = blob(&chosen.digest)?;
            if !chosen.media_type.contains("index") && !chosen.media_type.contains("manifest.list") {
                let manifest: Manifest = self.json(&name)?;
                let layers = manifest.layers.iter().map(|layer| blob(&layer.digest)).collect::<Result<_, _>>()?;
                return Ok((blob(&manifest.config.digest)?, layers));
            }
            let inner: Index = self.json(&name)?;
            let known = inner.manifests.iter().filter(|image| image.is_image());
            let platforms: Vec<String> = known.clone().filter_map(|i| Some(i.platform.as_ref()?.name())).collect();
            let fits = |image: &&Descriptor| image.platform.as_ref().is_none_or(|p| p.name() == platform);
            chosen = known.clone().find(fits).cloned().ok_or_else(|| {
                ArchiveError::wrong(format!("it is for {}, and this host is {platform}", platforms.join(", ")))
            })?;
        }
        Err(ArchiveError::wrong("its indexes lead to no image"))
    }
}

impl Descriptor {
    /// Builders put statements about an image beside it.
    fn is_image(&self) -> bool {
        self.platform.as_ref().is_none_or(|platform| platform.os != "unknown")
    }

    fn names(&self) -> Vec<String> {
        NAMES.iter().filter_map(|name| self.annotations.get(*name).cloned()).collect()
    }
}

/// The image with a name, or the only one.
fn choose<T>(mut all: Vec<(Vec<String>, T)>, wanted: Option<&str>) -> Result<T, ArchiveError> {
    let names = || all.iter().flat_map(|(names, _)| names.clone()).collect::<Vec<_>>().join(", ");
    match wanted {
        Some(wanted) => {
            let position = all.iter().position(|(names, _)| names.iter().any(|name| is_named(name, wanted)));
            let missing = || ArchiveError::wrong(format!("no image in it is named `{wanted}`: {}", or_none(&names())));
            let position = position.ok_or_else(missing)?;
            Ok(all.swap_remove(position).1)
        }
        None if all.len() > 1 => {
            let message = format!("{} images are in it; write which one after a `#`: {}", all.len(), or_none(&names()));
            Err(ArchiveError::wrong(message))
        }
        None => all.pop().map(|(_, image)| image).ok_or_else(|| ArchiveError::wrong("there is no image in it")),
    }
}

fn or_none(names: &str) -> &str {
    if names.is_empty() { "they have no names" } else { names }
}

/// Whether a name is the one that is meant: engines write some with their registry.
fn is_named(name: &str, wanted: &str) -> bool {
    let rest = name.strip_suffix(wanted);
    rest.is_some_and(|rest| matches!(rest, "" | "docker.io/" | "docker.io/library/"))
}

/// Where a layout keeps what has this digest.
fn blob(digest: &str) -> Result<String, ArchiveError> {
    let (algorithm, sum) = digest.split_once(':').unwrap_or_default();
    let letters = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric());
    if letters(algorithm) && letters(sum) {
        return Ok(format!("blobs/{algorithm}/{sum}"));
    }
    Err(ArchiveError::wrong(format!("`{}` in it is no digest", digest.escape_debug())))
}

fn parsed<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T, ArchiveError> {
    let place = |e: serde_json::Error| format!("{what} is damaged, in line {}, column {}", e.line(), e.column());
    serde_json::from_slice(bytes).map_err(|e| ArchiveError::Wrong(place(e)))
}

/// A path without `.` and `..`, as entries are looked for.
fn normal(path: &Path) -> String {
    let mut parts: Vec<String> = Vec::new();
    for part in path.components() {
        match part {
            std::path::Component::Normal(part) => parts.push(part.to_string_lossy().into_owned()),
            std::path::Component::ParentDir => drop(parts.pop()),
            _ => {}
        }
    }
    parts.join("/")
}

#[cfg(test)]
#[path = "contents_tests.rs"]
mod tests;
