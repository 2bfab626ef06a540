//! Verbs that run a command of a person on this host: what they share.

pub(super) mod exec;
pub(super) mod run;

use std::io::{ErrorKind, IsTerminal as _, Write as _, stderr, stdin, stdout};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    signal::unix::{Signal, SignalKind, signal},
};

use super::{Exit, Failed};
use crate::host::docker::{Docker, DockerError, Task, Terminal};

/// The command could not be run at all, as with `docker run`.
const NOT_RUN: u8 = 125;
/// It is there, and cannot be started.
const NOT_STARTED: u8 = 126;
/// It is not there.
const NOT_FOUND: u8 = 127;

/// The reader of its output has gone: 128 and SIGPIPE, as shells have it.
const PIPE_CLOSED: u8 = 141;

/// Signals that end this program: Ctrl-C, a lost connection, SIGTERM.
struct Ends([Signal; 3]);

impl Ends {
    fn new() -> Result<Self, Failed> {
        let [pressed, hung_up, terminated] = [SignalKind::interrupt(), SignalKind::hangup(), SignalKind::terminate()];
        Ok(Self([signal(pressed)?, signal(hung_up)?, signal(terminated)?]))
    }

    async fn next(&mut self) {
        let [pressed, hung_up, terminated] = &mut self.0;
        tokio::select! {
            _ = pressed.recv() => {}
            _ = hung_up.recv() => {}
            _ = terminated.recv() => {}
        }
    }
}

/// How the command is connected.
#[derive(Debug, clap::Args)]
struct TerminalArgs {
    /// Pass standard input on
    #[arg(short, long)]
    interactive: bool,
    /// Give it a terminal
    #[arg(short, long)]
    tty: bool,
}

impl TerminalArgs {
    fn check(&self) -> Result<Terminal, Failed> {
        if self.tty && !(stdin().is_terminal() && stdout().is_terminal()) {
            return Err(Failed::child(NOT_RUN, "`--tty` needs a terminal, and standard input or output is none"));
        }
        Ok(Terminal { input: self.interactive, tty: self.tty })
    }
}

/// Passes input and output on until the command ends. Returns the last piece of its output.
async fn pass_on(docker: &Docker, task: &mut Task, terminal: Terminal) -> Result<Vec<u8>, Failed> {
    // Without input, Ctrl-C is for this program.
    let _raw = if terminal.tty && terminal.input { Some(Raw::new()?) } else { None };
    let mut resized = signal(SignalKind::window_change())?;
    if terminal.tty {
        resize(docker, task).await;
    }
    let mut typed = tokio::io::stdin();
    let (mut buffer, mut is_open, mut last) = (vec![0; 8192], terminal.input, Vec::new());
    // What was read and not passed on yet: the command may print before it reads more.
    let mut pending: Vec<u8> = Vec::new();
    loop {
        tokio::select! {
            printed = task.output.next() => match printed {
                Some(Ok(printed)) => {
                    let written = match printed.is_error {
                        true => stderr().write_all(&printed.bytes),
                        false => stdout().write_all(&printed.bytes).and_then(|()| stdout().flush()),
                    };
                    match written {
                        // As a program of a pipe ends whose reader has gone.
                        Err(e) if e.kind() == ErrorKind::BrokenPipe => return Err(Failed::child(PIPE_CLOSED, "")),
                        written => written?,
                    }
                    last = printed.bytes;
                }
                // It may have ended with input left over; its exit code says how.
                Some(Err(e)) => {
                    tracing::debug!("{e}");
                    return Ok(last);
                }
                None => return Ok(last),
            },
            read = typed.read(&mut buffer), if is_open && pending.is_empty() => match read? {
                0 => {
                    is_open = false;
                    // It may have ended already.
                    let _ = task.input.shutdown().await;
                }
                count => pending.extend_from_slice(&buffer[..count]),
            },
            written = task.input.write(&pending), if !pending.is_empty() => match written {
                Ok(count) if count > 0 => drop(pending.drain(..count)),
                // It takes no more.
                _ => (is_open, pending) = (false, Vec::new()),
            },
            Some(()) = resized.recv(), if terminal.tty => resize(docker, task).await,
        }
    }
}

async fn resize(docker: &Docker, task: &Task) {
    if let Ok(size) = rustix::termios::tcgetwinsize(stdout()) {
        // One that has ended has no terminal.
        let _ = docker.resize(task, size.ws_col, size.ws_row).await;
    }
}

/// The terminal of this program, which passes every key on until this is dropped.
struct Raw(rustix::termios::Termios);

impl Raw {
    fn new() -> Result<Self, Failed> {
        let before = rustix::termios::tcgetattr(stdin()).map_err(std::io::Error::from)?;
        let mut raw = before.clone();
        raw.make_raw();
        let when = rustix::termios::OptionalActions::Now;
        rustix::termios::tcsetattr(stdin(), when, &raw).map_err(std::io::Error::from)?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = rustix::termios::tcsetattr(stdin(), rustix::termios::OptionalActions::Now, &self.0);
    }
}

/// Whether the engine says that a program is not there.
fn is_not_found(message: &str) -> bool {
    message.contains("executable file not found") || message.contains("no such file or directory")
}

/// Why a command could not be started, by the engine's message.
fn not_started(e: &DockerError) -> Failed {
    let message = crate::model::problem::chain(e);
    let lower = message.to_lowercase();
    let code = if is_not_found(&lower) {
        NOT_FOUND
    } else if lower.contains("permission denied") || lower.contains("exec format error") {
        NOT_STARTED
    } else {
        NOT_RUN
    };
    Failed::child(code, message)
}

/// What is wrong before the command is run.
fn not_run(failed: Failed) -> Failed {
    match failed.exit {
        Exit::Usage | Exit::Child(_) => failed,
        _ => Failed::child(NOT_RUN, failed.message),
    }
}

/// The exit code of a command, as a shell has it.
fn ended(code: i64) -> Exit {
    Exit::Child(u8::try_from(code.rem_euclid(256)).unwrap_or(NOT_RUN))
}
