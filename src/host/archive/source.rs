//! Where an archive comes from: a path of this host, an address, or a program that root has named for a scheme.

use std::{
    fs::OpenOptions,
    io,
    os::{fd::AsRawFd as _, unix::fs::OpenOptionsExt as _},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use http_body_util::BodyExt as _;
use hyper::{Response, Uri, body::Bytes, body::Incoming, header};
use rustix::fs::OFlags;
use tokio::{io::AsyncReadExt as _, sync::mpsc};

use super::{ArchiveError, Fetchers, PIECES, Received, blocking, plain};
use crate::{
    host::{
        registry::{PATH, shown},
        tls,
    },
    model::{archive::Archive, problem::chain},
};

/// Longest wait for the next bytes.
const IDLE: Duration = Duration::from_secs(60);
/// Longest download, and longest run of a program.
const TOTAL: Duration = Duration::from_secs(30 * 60);
/// Between two looks at the disk while a program writes to it.
const LOOK: Duration = Duration::from_secs(1);
/// Most redirections.
const REDIRECTIONS: u8 = 5;
/// What is needed at the beginning: the file as it comes and without compression, by its size.
const ROOM: u64 = 2;
/// Why a path is not read.
const ELSEWHERE: &str = "its path leads to another place, where no archive of this app may be";
/// Most bytes that a program may say about its failure.
const MOST_MESSAGE: u64 = 300;

/// Fetches an archive, and writes it to `to` without compression. `admits` says whether a path may be read, once links are
/// followed: the agent may read all of the host.
///
/// # Errors
/// If it cannot be fetched, has another sum than it should, or there is no room for it.
pub(super) async fn fetch(
    archive: Archive<'_>,
    admits: impl Fn(&Path) -> bool,
    fetchers: &Fetchers,
    spool: &Path,
    to: &Path,
) -> Result<(), ArchiveError> {
    let found = match archive.scheme() {
        None => {
            let path = PathBuf::from(archive.place());
            match std::fs::canonicalize(&path) {
                Ok(real) if !admits(&real) => return Err(ArchiveError::Here(ELSEWHERE.to_owned())),
                Ok(real) => of_file(real, to, true).await,
                // It says so.
                Err(_) => of_file(path, to, false).await,
            }
        }
        Some(scheme) => match fetchers.get(scheme) {
            Some(words) => {
                let file = spool.join("fetched");
                run(words, archive.place(), &file).await?;
                of_file(file, to, false).await
            }
            None if matches!(scheme, "http" | "https") => download(archive.place(), to).await,
            None => {
                let message =
                    format!("no program fetches `{scheme}://…` on this host: `[fetch]` in the agent's file names it");
                return Err(ArchiveError::Away(message));
            }
        },
    }?;
    match archive.sha256() {
        Some(wanted) if wanted != found => {
            Err(ArchiveError::wrong("its SHA-256 is another one than the one that is wanted"))
        }
        _ => Ok(()),
    }
}

/// Reads a file. `is_real` says that no link is in its path: an app that may write there must not put one in its place.
async fn of_file(path: PathBuf, to: &Path, is_real: bool) -> Result<String, ArchiveError> {
    let to = to.to_owned();
    let away = move |path: &Path, e: io::Error| match e.kind() {
        // A person puts it there, or writes another name.
        io::ErrorKind::NotFound => ArchiveError::Here(format!("there is no `{}` on this host", path.display())),
        _ => ArchiveError::Away(format!("cannot read `{}`: {}", path.display(), chain(&e))),
    };
    blocking(move || {
        // A pipe is not waited for: it is no file.
        let without_waiting = OFlags::NONBLOCK.bits().cast_signed();
        let file =
            OpenOptions::new().read(true).custom_flags(without_waiting).open(&path).map_err(|e| away(&path, e))?;
        let opened = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).map_err(|e| away(&path, e))?;
        if is_real && opened != path {
            return Err(ArchiveError::Here(ELSEWHERE.to_owned()));
        }
        let found = file.metadata().map_err(|e| away(&path, e))?;
        if !found.is_file() {
            return Err(ArchiveError::Here(format!("`{}` is not a file", path.display())));
        }
        plain::room(&to, found.len().saturating_mul(ROOM))?;
        plain::write(file, &to)
    })
    .await
}

/// Runs a program of root's own. It gets no secret of the agent.
#[expect(clippy::disallowed_methods, reason = "the home of programs that fetch")]
async fn run(words: &[String], url: &str, file: &Path) -> Result<(), ArchiveError> {
    let (path, file) = (file.to_owned(), file.display().to_string());
    let mut words = words.iter().map(|word| word.replace("{url}", url).replace("{file}", &file));
    let program = words.next().unwrap_or_default();
    let failed = |message: String| ArchiveError::Away(format!("`{program}` {message}"));
    let mut command = tokio::process::Command::new(&program);
    let passed_on = ["HOME", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"];
    let environment = passed_on.iter().filter_map(|name| Some((*name, std::env::var_os(name)?)));
    command.args(words).env_clear().env("PATH", PATH).envs(environment);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
    // Of its own, so that what it has started ends with it.
    command.process_group(0);
    let mut child = command.spawn().map_err(|e| failed(format!("cannot be started: {e}")))?;
    let _group = Group(child.id());
    let stderr = child.stderr.take();
    let work = async {
        let mut said = Vec::new();
        if let Some(mut stderr) = stderr {
            (&mut stderr).take(MOST_MESSAGE).read_to_end(&mut said).await?;
            // Else it could wait for a reader.
            tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await?;
        }
        Ok::<_, io::Error>((child.wait().await?, said))
    };
    // It may write what has no end.
    let filling = async {
        loop {
            tokio::time::sleep(LOOK).await;
            if let Err(full) = plain::room(&path, 0) {
                return full;
            }
        }
    };
    let ended = tokio::select! {
        ended = tokio::time::timeout(TOTAL, work) => ended,
        full = filling => return Err(full),
    };
    match ended {
        Ok(Ok((status, _))) if status.success() => Ok(()),
        Ok(Ok((status, said))) => {
            Err(failed(format!("failed with {status}: {}", shown(&String::from_utf8_lossy(&said)))))
        }
        Ok(Err(e)) => Err(failed(format!("cannot be waited for: {e}"))),
        Err(_) => Err(failed(format!("has not ended within {} minutes", TOTAL.as_secs() / 60))),
    }
}

/// Ends a program with all that it has started.
struct Group(Option<u32>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0.and_then(|id| rustix::process::Pid::from_raw(id.cast_signed())) {
            // It has mostly ended.
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
    }
}

async fn download(url: &str, to: &Path) -> Result<String, ArchiveError> {
    let work = async {
        let answer = answer(url).await?;
        let length = answer.headers().get(header::CONTENT_LENGTH).and_then(|n| n.to_str().ok()?.parse().ok());
        plain::room(to, length.unwrap_or(0_u64).saturating_mul(ROOM))?;
        let (into, pieces) = mpsc::channel(PIECES);
        let to = to.to_owned();
        let writing = blocking(move || plain::write(Received { pieces, piece: Bytes::new() }, &to));
        let (summed, ()) = tokio::join!(writing, pass_on(answer.into_body(), into));
        summed
    };
    let late = |_| Err(ArchiveError::Away(format!("not complete after {} minutes", TOTAL.as_secs() / 60)));
    tokio::time::timeout(TOTAL, work).await.unwrap_or_else(late)
}

async fn pass_on(mut body: Incoming, into: mpsc::Sender<io::Result<Bytes>>) {
    loop {
        let piece = match tokio::time::timeout(IDLE, body.frame()).await {
            Ok(None) => return,
            Ok(Some(Ok(frame))) => match frame.into_data() {
                Ok(bytes) => Ok(bytes),
                Err(_) => continue,
            },
            Ok(Some(Err(e))) => Err(io::Error::new(io::ErrorKind::ConnectionReset, chain(&e))),
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("no data for {} s", IDLE.as_secs()))),
        };
        let is_over = piece.is_err();
        // A reader that has ended says why.
        if into.send(piece).await.is_err() || is_over {
            return;
        }
    }
}

/// The answer with the file, after redirections. Its sum says that it is the right one, so it need not be secret.
async fn answer(url: &str) -> Result<Response<Incoming>, ArchiveError> {
    let client = tls::client();
    let not_url = |e: &dyn std::fmt::Display| ArchiveError::wrong(format!("`{url}` is no address: {e}"));
    let mut at: Uri = url.parse().map_err(|e| not_url(&e))?;
    for _ in 0..=REDIRECTIONS {
        let host = at.host().unwrap_or_default().to_owned();
        let answer = match tokio::time::timeout(IDLE, client.get(at.clone())).await {
            Err(_) => return Err(ArchiveError::Away(format!("`{host}` does not answer within {} s", IDLE.as_secs()))),
            Ok(Err(e)) => return Err(ArchiveError::Away(format!("`{host}`: {}", chain(&e)))),
            Ok(Ok(answer)) => answer,
        };
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let next =
            answer.headers().get(header::LOCATION).and_then(|to| to.to_str().ok()).filter(|_| status.is_redirection());
        if let Some(next) = next {
            at = redirected(&at, next).ok_or_else(|| ArchiveError::wrong(format!("`{host}` leads to no address")))?;
            continue;
        }
        let message = format!("`{host}` answers {status}");
        // There may be room, or a server, later; what is not there or not allowed stays so.
        let is_final = status.is_client_error() && !matches!(status.as_u16(), 408 | 425 | 429);
        // It may let other hosts in.
        let is_of_rights = matches!(status.as_u16(), 401 | 403 | 407);
        return Err(match is_final {
            _ if is_of_rights => ArchiveError::Here(message),
            true => ArchiveError::Wrong(message),
            false => ArchiveError::Away(message),
        });
    }
    Err(ArchiveError::wrong(format!("more than {REDIRECTIONS} redirections")))
}

/// Where a redirection leads: an address, or a path at the same host.
fn redirected(from: &Uri, to: &str) -> Option<Uri> {
    let to: Uri = to.parse().ok()?;
    if to.scheme().is_some() {
        return matches!(to.scheme_str(), Some("http" | "https")).then_some(to);
    }
    let path = to.path_and_query().filter(|path| path.as_str().starts_with('/'))?;
    Uri::builder()
        .scheme(from.scheme_str()?)
        .authority(from.authority()?.as_str())
        .path_and_query(path.as_str())
        .build()
        .ok()
}
