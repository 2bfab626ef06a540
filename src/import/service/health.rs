//! Health checks. Those that ask an HTTP server from inside of the container become `http`, which the agent does by itself:
//! sooner, and without a process for each.

use super::{Effect, Node, Translation, Value, map, scalar};
use crate::{
    import::tree::{entries, get, items, text},
    model::text::words,
};

impl Translation<'_> {
    pub(super) fn health(&mut self, node: &Node, line: usize) {
        let mut check: Vec<(String, Node)> = Vec::new();
        for (key, value) in entries(node) {
            match key.name.as_str() {
                _ if value.value == Value::Null => {}
                // The engine's own default.
                "retries" | "interval" | "timeout" if matches!(text(value), Some("0" | "0s")) => {}
                "test" => match self.asked_path(value) {
                    Some(path) => {
                        let message =
                            format!("`http: {path}`: the agent asks by itself, without a program in the container");
                        self.note(key.line, "healthcheck.test", Effect::Changed, message);
                        check.push(("http".to_owned(), scalar(path)));
                    }
                    None => check.push(("test".to_owned(), value.clone())),
                },
                "disable" | "interval" | "timeout" | "retries" | "start_period" | "start_interval" => {
                    check.push((key.name.clone(), value.clone()));
                }
                other => self.refuse(key.line, &format!("healthcheck.{other}"), "this is not a key of a health check"),
            }
        }
        let check = map(check);
        // `http` needs an ingress, which is not there when a key is looked at alone.
        let alone = match get(&check, "http") {
            None => check.clone(),
            Some(_) => {
                map(entries(&check).iter().filter(|(k, _)| k.name != "http").map(|(k, v)| (k.name.clone(), v.clone())))
            }
        };
        match self.objection("healthcheck", &alone) {
            None if entries(&check).is_empty() => {}
            None => self.put("healthcheck", check),
            Some(why) => self.refuse(line, "healthcheck", why),
        }
    }

    /// The path that a check asks the port of the ingress for, if that is all it does.
    fn asked_path(&self, test: &Node) -> Option<String> {
        let port = self.spec.get("ingress").and_then(|ingress| get(ingress, "port")).and_then(text)?;
        let all: Vec<&str> = items(test).into_iter().filter_map(text).collect();
        let command = match (&test.value, all.as_slice()) {
            (Value::Seq(_), ["CMD", command @ ..]) => command.iter().map(|word| (*word).to_owned()).collect(),
            (Value::Seq(_), ["CMD-SHELL", command]) | (Value::Scalar { .. }, [command]) => shell(command)?,
            _ => return None,
        };
        asked(&command).filter(|(asked, _)| *asked == port).map(|(_, path)| path)
    }
}

/// What a shell command may end with and still fail as its program does; a longer ending before one that it ends with.
const ENDINGS: &[&str] = &[
    "|| exit 1",
    "|| exit",
    "|| false",
    "&>/dev/null",
    "&> /dev/null",
    "2>/dev/null",
    "2> /dev/null",
    ">/dev/null",
    "> /dev/null",
    "2>&1",
];

/// The words of a shell command, if it does no more than run a program and fail as that does.
fn shell(command: &str) -> Option<Vec<String>> {
    let mut command = command.trim();
    while let Some(rest) = ENDINGS.iter().find_map(|ending| command.strip_suffix(ending)) {
        command = rest.trim_end();
    }
    let words = words(command).ok()?;
    let is_plain =
        |word: &String| !word.contains(['|', ';', '`', '<', '>', '(', '{', '$']) && word != "&&" && word != "&";
    words.iter().all(is_plain).then_some(words)
}

/// The port and the path that `curl` or `wget` asks this container for.
fn asked(command: &[String]) -> Option<(String, String)> {
    let (program, arguments) = command.split_first()?;
    if !matches!(program.rsplit('/').next()?, "curl" | "wget") {
        return None;
    }
    // Without it curl is content with any status.
    let fails =
        |word: &String| word == "--fail" || word.starts_with('-') && !word.starts_with("--") && word.contains('f');
    if program.ends_with("curl") && !arguments.iter().any(fails) {
        return None;
    }
    let mut url = None;
    let mut arguments = arguments.iter().map(String::as_str);
    while let Some(argument) = arguments.next() {
        match argument {
            "-o" | "-O" | "--output" | "--output-document" | "-m" | "--max-time" | "-T" | "--timeout" | "-t"
            | "--tries" | "--retry" | "--retry-delay" | "--connect-timeout" | "-w" | "--write-out" => {
                let _ = arguments.next();
            }
            "--fail" | "--silent" | "--show-error" | "--location" | "--quiet" | "--spider" | "--no-verbose" | "-nv"
            | "-qO-" | "-qO/dev/null" | "--tries=1" | "-t1" => {}
            option
                if option.starts_with("--tries=")
                    || option.starts_with("--timeout=")
                    || option.starts_with("--max-time=") => {}
            option if option.strip_prefix('-').is_some_and(|letters| letters.chars().all(|c| "fsSLqv".contains(c))) => {
            }
            // Any other may change what is asked for.
            option if option.starts_with('-') => return None,
            found if url.is_none() => url = Some(found),
            _ => return None,
        }
    }
    let url = url?;
    let rest = url.strip_prefix("http://").or_else(|| (!url.contains("://")).then_some(url))?;
    let (host, path) = match rest.find('/') {
        Some(at) => rest.split_at(at),
        None => (rest, "/"),
    };
    let (name, port) = match host.strip_prefix("[::1]") {
        Some(port) => ("localhost", port.strip_prefix(':').unwrap_or("80")),
        None => host.split_once(':').unwrap_or((host, "80")),
    };
    let is_own = matches!(name, "localhost" | "127.0.0.1" | "0.0.0.0");
    (is_own && !path.contains('#')).then(|| (port.to_owned(), path.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_that_only_ask_a_server_are_recognised() {
        for (command, expected) in [
            ("curl -f http://localhost:3000/health || exit 1", Some(("3000", "/health"))),
            ("curl --fail --silent http://127.0.0.1/ > /dev/null 2>&1 || exit 1", Some(("80", "/"))),
            ("wget -qO- http://localhost:8000/health?a=b || exit 1", Some(("8000", "/health?a=b"))),
            ("wget --no-verbose --tries=1 --spider http://localhost:9000", Some(("9000", "/"))),
            ("wget -q -O /dev/null localhost:80/ping", Some(("80", "/ping"))),
            ("curl -f http://[::1]:80/", Some(("80", "/"))),
            ("curl -fsS -H 'Host: a' http://localhost:80/", None),
            ("curl -f http://localhost:80/ | grep ok", None),
            ("curl -f http://localhost:80/ && test -f /ok", None),
            ("curl -f http://other:80/", None),
            ("curl -fk https://localhost/", None),
            ("curl -s http://localhost:80/", None),
            ("curl -f -uuser:pass http://localhost:80/", None),
            ("curl -f -XPOST http://localhost:80/", None),
            ("curl -f http://localhost:$PORT/", None),
            ("pg_isready -U postgres", None),
        ] {
            let found = shell(command).and_then(|words| asked(&words));
            let expected = expected.map(|(port, path)| (port.to_owned(), path.to_owned()));
            assert_eq!(found, expected, "{command}");
        }
    }
}
