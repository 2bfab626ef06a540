//! Programs that hand out logins, by the protocol of `docker-credential-helpers`: `PROGRAM get` reads a registry from
//! standard input and prints a JSON object (<https://github.com/docker/docker-credential-helpers#development>).

use std::{
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use serde::Deserialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{DOCKER_HUB, DOCKER_HUB_URL, Login, LoginError};

/// Longest run.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Most bytes of an answer.
const MOST: u64 = 64 * 1024;
/// Where helpers are looked for, and what they find: never the agent's own `PATH`.
pub(in crate::host) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Most characters of a helper's message.
const MOST_MESSAGE: usize = 200;
/// What a helper prints that has no login (`credentials.NewErrCredentialsNotFound`).
const NOT_FOUND: &str = "credentials not found in native keychain";
/// The name that stands for an identity token.
const TOKEN: &str = "<token>";

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    username: String,
    secret: String,
}

/// The program of a helper: a path, or the end of a name.
pub(super) fn find(helper: &str) -> Result<PathBuf, LoginError> {
    let failed = |message: String| LoginError::Helper { helper: helper.to_owned(), message };
    let is_program = |path: &Path| {
        std::fs::metadata(path).is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
    };
    if helper.starts_with('/') {
        let path = PathBuf::from(helper);
        return if is_program(&path) { Ok(path) } else { Err(failed("is not a program on this host".to_owned())) };
    }
    if helper.is_empty() || !helper.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) {
        return Err(failed("is not the name of a helper".to_owned()));
    }
    let name = format!("docker-credential-{helper}");
    let found = PATH.split(':').map(|dir| Path::new(dir).join(&name)).find(|path| is_program(path));
    found.ok_or_else(|| failed(format!("is not on this host: there is no `{name}` in {PATH}")))
}

/// Asks for the login at a registry; `None` if the helper has none.
#[expect(clippy::disallowed_methods, reason = "the home of credential helpers")]
pub(super) async fn ask(helper: &str, registry: &str) -> Result<Option<Login>, LoginError> {
    let failed = |message: String| LoginError::Helper { helper: helper.to_owned(), message };
    let program = find(helper)?;
    let server = if registry == DOCKER_HUB { DOCKER_HUB_URL } else { registry };
    let mut command = tokio::process::Command::new(program);
    command.arg("get").env("PATH", PATH).env_remove("ETCDCTL_PASSWORD").env_remove("ETCDCTL_USER");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
    // Of its own, so that what it has started ends with it.
    command.process_group(0);
    let mut child = command.spawn().map_err(|e| failed(format!("cannot be started: {e}")))?;
    let group = child.id();
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let work = async {
        if let Some(mut stdin) = stdin {
            // One that does not read it says what is wrong.
            let _ = stdin.write_all(format!("{server}\n").as_bytes()).await;
        }
        let mut answer = Vec::new();
        if let Some(stdout) = stdout {
            stdout.take(MOST).read_to_end(&mut answer).await?;
        }
        Ok::<_, std::io::Error>((child.wait().await?, answer))
    };
    let ended = tokio::time::timeout(TIMEOUT, work).await;
    if ended.is_err()
        && let Some(group) = group.and_then(|id| rustix::process::Pid::from_raw(id.cast_signed()))
    {
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
    }
    let (status, answer) = match ended {
        Ok(Ok(ended)) => ended,
        Ok(Err(e)) => return Err(failed(format!("cannot be read: {e}"))),
        Err(_) => return Err(failed(format!("does not answer within {} s", TIMEOUT.as_secs()))),
    };
    let text = String::from_utf8_lossy(&answer);
    if !status.success() {
        if text.contains(NOT_FOUND) {
            return Ok(None);
        }
        // It may have printed its answer before it failed.
        return Err(failed(format!("failed with {status}: {}", shown(&text))));
    }
    // What it printed may be a password, and is not repeated.
    let answer: Answer = serde_json::from_slice(&answer)
        .map_err(|_| failed("printed something else than a JSON object with `Username` and `Secret`".to_owned()))?;
    Ok(Some(match answer.username.as_str() {
        TOKEN => Login::Token(answer.secret),
        _ => Login::Password { username: answer.username, password: answer.secret },
    }))
}

/// What a program printed that failed, as far as it may be seen by all who read a status: not what looks like a login.
pub(in crate::host) fn shown(printed: &str) -> String {
    const SECRET: [&str; 7] = ["{", "secret", "password", "token", "authorization", "credential", "signature"];
    let is_secret = SECRET.iter().any(|word| printed.to_lowercase().contains(word));
    let text = printed.trim().chars().map(|c| if c.is_control() { ' ' } else { c });
    let text: String = text.take(MOST_MESSAGE).collect();
    match text.as_str() {
        "" => "it printed nothing".to_owned(),
        _ if is_secret => "what it printed is not shown, since it may be a login".to_owned(),
        _ => text,
    }
}
