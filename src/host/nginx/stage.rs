//! A copy of the configuration tree of nginx, in which a set is tested before it goes live.
//!
//! Testing one file alone proves little: nginx accepts or refuses the whole tree. So the files from the main file down
//! to demae's include are copied, with that include pointed to the set under test. Everything else is included from its
//! place.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::{OsStr, OsString},
    fs, io,
    os::unix::ffi::{OsStrExt as _, OsStringExt as _},
    path::{Path, PathBuf},
};

use crate::host::files::{self, FileError};

/// Maximum depth of includes.
const MAX_DEPTH: usize = 20;

/// Why the tree could not be copied.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// A file of the tree cannot be read.
    #[error("cannot read nginx's `{}`", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// demae's set is not included.
    #[error("`{}` does not include demae's files; add `include {live}/*.conf;` to its `http` block", conf.display())]
    NotIncluded {
        /// The main file.
        conf: PathBuf,
        /// The live set.
        live: String,
    },
    /// The copy cannot be written.
    #[error(transparent)]
    File(#[from] FileError),
}

/// What the configuration tree contains.
#[derive(Debug, Default)]
pub struct Tree {
    /// Directives of `SHARED_DIRECTIVES` in the host's own files: by name, the file and the value.
    pub settings: BTreeMap<String, (PathBuf, String)>,
    /// The server names of the host's own files, with a file that has each.
    pub server_names: BTreeMap<String, PathBuf>,
    /// Those of servers that come before demae's.
    pub earlier_names: BTreeSet<String>,
    /// Whether demae's files have been seen.
    has_own: bool,
    /// The value of `pid`, if it is set.
    pub pid: Option<PathBuf>,
}

/// Directives that are allowed once for all servers, and that demae sets unless the host does.
const SHARED_DIRECTIVES: [&str; 2] = ["server_names_hash_bucket_size", "server_names_hash_max_size"];

/// Reads each byte as the character of its number: files of nginx may be in any encoding, and unparsed parts must stay
/// as they are.
fn text_of(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| char::from(*byte)).collect()
}

/// The bytes that a text was read from.
fn bytes_of(text: &str) -> Vec<u8> {
    text.chars().map(|c| u8::try_from(c).unwrap_or(b'?')).collect()
}

fn path_of(text: &str) -> PathBuf {
    PathBuf::from(OsString::from_vec(bytes_of(text)))
}

/// Copies the tree of `conf` into `test`, with `live` replaced by `set`, and returns the path of the copied main file.
///
/// `root` is the root of nginx's paths on this machine.
pub fn stage(root: &Path, conf: &Path, live: &Path, set: &Path, test: &Path) -> Result<(PathBuf, Tree), StageError> {
    files::remove_dir(test)?;
    files::make_dir(test, 0o755)?;
    let prefix = conf.parent().unwrap_or(Path::new("/")).to_owned();
    link_siblings(root, conf, &prefix, test)?;
    let mut stager = Stager { root, prefix, live, set, test, copies: 0, tree: Tree::default() };
    let main = stager.copy(conf, true, 0)?;
    match main {
        Some(path) => Ok((path, stager.tree)),
        None => Err(not_included(conf, live)),
    }
}

/// Reads the tree of `conf` without copying: whether it includes demae's files, and what it contains.
pub fn survey(root: &Path, conf: &Path, live: &Path) -> Result<(bool, Tree), StageError> {
    let prefix = conf.parent().unwrap_or(Path::new("/")).to_owned();
    let mut stager = Stager { root, prefix, live, set: live, test: live, copies: 0, tree: Tree::default() };
    let included = stager.includes_demae(conf, 0)?;
    Ok((included, stager.tree))
}

/// Checks that the tree of `conf` includes demae's files.
pub fn check_include(root: &Path, conf: &Path, live: &Path) -> Result<(), StageError> {
    if survey(root, conf, live)?.0 { Ok(()) } else { Err(not_included(conf, live)) }
}

fn not_included(conf: &Path, live: &Path) -> StageError {
    StageError::NotIncluded { conf: conf.to_owned(), live: live.display().to_string() }
}

/// Relative paths start at the directory of the main file, so the copy gets links to everything beside it.
fn link_siblings(root: &Path, conf: &Path, prefix: &Path, test: &Path) -> Result<(), StageError> {
    let dir = under(root, prefix);
    let read = |source| StageError::Read { path: prefix.to_owned(), source };
    for entry in fs::read_dir(&dir).map_err(read)? {
        let name = entry.map_err(read)?.file_name();
        if conf.file_name().is_none_or(|c| c != name) {
            files::symlink(&prefix.join(&name), &test.join(&name))?;
        }
    }
    Ok(())
}

struct Stager<'a> {
    root: &'a Path,
    prefix: PathBuf,
    live: &'a Path,
    set: &'a Path,
    test: &'a Path,
    copies: usize,
    tree: Tree,
}

impl Stager<'_> {
    fn read(&self, path: &Path) -> Result<String, StageError> {
        let bytes = fs::read(under(self.root, path));
        bytes.map(|bytes| text_of(&bytes)).map_err(|source| StageError::Read { path: path.to_owned(), source })
    }

    /// The files that an include matches.
    fn expand(&self, pattern: &str) -> Vec<PathBuf> {
        let absolute = self.prefix.join(path_of(pattern));
        let on_host = under(self.root, &absolute);
        let Some(text) = on_host.to_str() else { return Vec::new() };
        if !text.contains(['*', '?', '[']) {
            return vec![absolute];
        }
        let found = glob::glob(text).into_iter().flatten().filter_map(Result::ok);
        found
            .filter_map(|p| {
                if self.root == Path::new("/") {
                    Some(p)
                } else {
                    p.strip_prefix(self.root).ok().map(|p| Path::new("/").join(p))
                }
            })
            .collect()
    }

    fn is_ours(&self, pattern: &str) -> bool {
        self.prefix.join(path_of(pattern)).starts_with(self.live)
    }

    fn includes_demae(&mut self, path: &Path, depth: usize) -> Result<bool, StageError> {
        if depth > MAX_DEPTH {
            return Ok(false);
        }
        let text = self.read(path)?;
        let mut found = false;
        for directive in directives(&text) {
            match directive.words.as_slice() {
                [name, pid] if name == "pid" => self.tree.pid = Some(self.prefix.join(path_of(pid))),
                [name, value] if SHARED_DIRECTIVES.contains(&name.as_str()) => {
                    self.tree.settings.insert(name.clone(), (path.to_owned(), value.clone()));
                }
                [name, names @ ..] if name == "server_name" => {
                    for name in names.iter().map(|name| name.to_ascii_lowercase()) {
                        if !self.tree.has_own {
                            self.tree.earlier_names.insert(name.clone());
                        }
                        self.tree.server_names.insert(name, path.to_owned());
                    }
                }
                [name, pattern] if name == "include" => {
                    if self.is_ours(pattern) {
                        found = true;
                        self.tree.has_own = true;
                    } else {
                        for file in self.expand(pattern) {
                            // A broken file of the host is left for nginx to report.
                            found |= self.includes_demae(&file, depth + 1).unwrap_or(false);
                        }
                    }
                }
                _ => {}
            }
        }
        Ok(found)
    }

    /// Copies a file if it includes demae's, directly or not.
    fn copy(&mut self, path: &Path, main: bool, depth: usize) -> Result<Option<PathBuf>, StageError> {
        if depth > MAX_DEPTH || !self.includes_demae(path, depth)? {
            return Ok(None);
        }
        let text = self.read(path)?;
        let mut out = String::with_capacity(text.len());
        let mut done = 0;
        for directive in directives(&text) {
            let [name, pattern] = directive.words.as_slice() else { continue };
            if name != "include" {
                continue;
            }
            let replacement = if self.is_ours(pattern) {
                let rest = self.prefix.join(path_of(pattern));
                let rest = rest.strip_prefix(self.live).unwrap_or(Path::new("*.conf"));
                vec![self.set.join(rest)]
            } else {
                let mut files = Vec::new();
                let mut copied = false;
                for file in self.expand(pattern) {
                    match self.copy(&file, false, depth + 1).unwrap_or(None) {
                        Some(copy) => {
                            copied = true;
                            files.push(copy);
                        }
                        None => files.push(file),
                    }
                }
                if !copied {
                    continue;
                }
                files
            };
            out.push_str(&text[done..directive.start]);
            for file in replacement {
                let file = text_of(OsStr::as_bytes(file.as_os_str()));
                out.push_str(&format!("include \"{file}\";\n"));
            }
            done = directive.end;
        }
        out.push_str(&text[done..]);
        self.copies += 1;
        let name = if main { "demae-test.conf".to_owned() } else { format!("demae-test-{}.inc", self.copies) };
        let copy = self.test.join(name);
        files::write_unsynced(&copy, &bytes_of(&out), 0o644)?;
        Ok(Some(copy))
    }
}

/// A path of nginx on this machine.
fn under(root: &Path, path: &Path) -> PathBuf {
    match path.strip_prefix("/") {
        Ok(rest) if root != Path::new("/") => root.join(rest),
        _ => path.to_owned(),
    }
}

/// A simple directive: its words, and its range in the text, with the semicolon.
struct Directive {
    words: Vec<String>,
    start: usize,
    end: usize,
}

/// The simple directives of a configuration file, at any depth of blocks. Block headers are skipped.
fn directives(text: &str) -> Vec<Directive> {
    let mut found = Vec::new();
    let mut words: Vec<String> = Vec::new();
    let mut start = 0;
    let mut chars = text.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        match c {
            '#' => while chars.next_if(|(_, c)| *c != '\n').is_some() {},
            ';' => {
                if !words.is_empty() {
                    found.push(Directive { words: std::mem::take(&mut words), start, end: at + 1 });
                }
            }
            '{' | '}' => words.clear(),
            c if c.is_whitespace() => {}
            first => {
                if words.is_empty() {
                    start = at;
                }
                let mut word = String::new();
                if matches!(first, '"' | '\'') {
                    while let Some((_, c)) = chars.next() {
                        match c {
                            '\\' => word.extend(chars.next().map(|(_, c)| c)),
                            c if c == first => break,
                            c => word.push(c),
                        }
                    }
                } else {
                    word.push(first);
                    let mut variable = false;
                    while let Some((_, c)) =
                        chars.next_if(|(_, c)| variable || !(c.is_whitespace() || matches!(c, ';' | '{' | '}')))
                    {
                        // `${name}` is part of a word.
                        match c {
                            '$' if chars.peek().is_some_and(|(_, n)| *n == '{') => variable = true,
                            '}' => variable = false,
                            _ => {}
                        }
                        word.push(c);
                    }
                }
                words.push(word);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directives_are_found_through_quotes_comments_and_blocks() {
        let text = "user www; # include a;\nhttp { include \"b c/*.conf\"; log_format x '{; include d; }'; server { include e; } }";
        let found: Vec<Vec<String>> = directives(text).into_iter().map(|d| d.words).collect();
        assert_eq!(found[0], ["user", "www"]);
        assert_eq!(found[1], ["include", "b c/*.conf"]);
        assert_eq!(found[2], ["log_format", "x", "{; include d; }"]);
        assert_eq!(found[3], ["include", "e"]);
        assert_eq!(found.len(), 4);
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "a test writes its own files")]
    fn staged_copy_includes_the_set_under_test() {
        let dir = tempfile::tempdir().expect("a directory");
        let at = |p: &str| dir.path().join(p);
        for d in ["etc/conf.d", "live", "7.set"] {
            fs::create_dir_all(at(d)).expect("a directory");
        }
        let live = at("live");
        fs::write(at("etc/nginx.conf"), "pid run.pid;\nhttp { include mime.types; include conf.d/*.conf; }\n")
            .expect("a file");
        fs::write(at("etc/mime.types"), "types { }\n").expect("a file");
        fs::write(at("etc/conf.d/other.conf"), "server { }\n").expect("a file");
        fs::write(at("etc/conf.d/demae.conf"), format!("include {}/*.conf;\n", live.display())).expect("a file");
        let (copy, tree) =
            stage(Path::new("/"), &at("etc/nginx.conf"), &live, &at("7.set"), &at("test")).expect("it is staged");
        let main = fs::read_to_string(copy).expect("a copy");
        assert!(main.contains("include mime.types;"), "{main}");
        assert!(main.contains("conf.d/other.conf\";"), "{main}");
        assert!(main.contains("demae-test-1.inc"), "{main}");
        let inner = fs::read_to_string(at("test/demae-test-1.inc")).expect("a copy");
        assert!(inner.contains(&format!("include \"{}/*.conf\";", at("7.set").display())), "{inner}");
        assert!(at("test/mime.types").exists());
        assert_eq!(tree.pid, Some(at("etc/run.pid")));
        fs::write(at("etc/conf.d/demae.conf"), "").expect("a file");
        let error = stage(Path::new("/"), &at("etc/nginx.conf"), &live, &at("7.set"), &at("test"))
            .expect_err("it is not included");
        assert!(error.to_string().contains("add `include"), "{error}");
    }
}
