//! Who gives a command, for the history of an app.

use std::env;

/// Variables that name the person behind a run, the most specific first: our own, those of GitHub and GitLab, and those of
/// a shell.
const NAMES: [&str; 6] = ["DEMAE_BY", "GITHUB_ACTOR", "GITLAB_USER_LOGIN", "SUDO_USER", "USER", "LOGNAME"];

/// `alice@laptop: why`. In a run of CI, where the machine says nothing, `alice: why`.
pub(super) fn signature(message: Option<&str>) -> String {
    let (name, variable) = NAMES
        .iter()
        .find_map(|variable| Some((env::var(variable).ok().filter(|name| !name.is_empty())?, *variable)))
        .unwrap_or_else(|| ("unknown".to_owned(), ""));
    let machine = rustix::system::uname();
    let machine = machine.nodename().to_string_lossy();
    let who = match variable {
        "DEMAE_BY" | "GITHUB_ACTOR" | "GITLAB_USER_LOGIN" => name,
        _ => format!("{name}@{machine}"),
    };
    match message.map(str::trim).filter(|message| !message.is_empty()) {
        Some(message) => format!("{who}: {message}"),
        None => who,
    }
}
