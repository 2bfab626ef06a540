//! Architecture checks: import direction, file size, and one home per library.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

/// Allowed imports: the module on the left uses only itself and the modules on the right.
const MAY_USE: &[(&str, &[&str])] = &[
    ("model", &[]),
    ("plan", &["model"]),
    ("fleet", &["model"]),
    ("import", &["model"]),
    ("store", &["model", "retry"]),
    ("host", &["model", "retry", "failpoint"]),
    ("world", &["model", "host"]),
    ("execute", &["model", "plan", "host", "world", "failpoint"]),
    ("command", &["model", "host", "world", "execute"]),
    ("machine", &["model", "plan", "host", "world", "execute", "command", "retry"]),
    ("rollout", &["model", "fleet", "store", "metrics", "retry"]),
    (
        "agent",
        &[
            "model",
            "plan",
            "fleet",
            "host",
            "store",
            "rollout",
            "world",
            "execute",
            "machine",
            "events",
            "metrics",
            "retry",
            "failpoint",
        ],
    ),
    ("metrics", &["model", "plan", "host", "store", "execute"]),
    ("events", &["metrics", "model"]),
    ("host_gauges", &["host", "metrics"]),
    ("webhook", &["events", "metrics", "model", "retry"]),
    ("http", &["events", "metrics", "model"]),
    ("config", &["host", "model", "store", "agent", "webhook"]),
    (
        "cli",
        &[
            "agent",
            "config",
            "events",
            "execute",
            "fleet",
            "host",
            "http",
            "import",
            "metrics",
            "model",
            "plan",
            "rollout",
            "shutdown",
            "store",
            "telemetry",
            "host_gauges",
            "webhook",
            "world",
        ],
    ),
    ("retry", &[]),
    ("shutdown", &[]),
    ("telemetry", &[]),
    ("failpoint", &[]),
];

fn sources() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut found, mut todo) = (Vec::new(), vec![root.clone()]);
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(&dir).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                todo.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let name = path.strip_prefix(&root).expect("below the root").display().to_string();
                found.push((name, fs::read_to_string(&path).expect("a source")));
            }
        }
    }
    found.sort();
    assert!(found.len() > 30, "the sources were found");
    found
}

/// The code of a file, without its tests.
fn code(text: &str) -> &str {
    text.split("#[cfg(test)]").next().unwrap_or(text)
}

#[test]
fn imports_run_one_way() {
    let mut wrong = Vec::new();
    for (name, text) in sources() {
        let part = name.split(['/', '.']).next().expect("a name");
        if matches!(part, "lib" | "main") {
            continue;
        }
        let (_, allowed) =
            MAY_USE.iter().find(|(p, _)| *p == part).unwrap_or_else(|| panic!("`{part}` has no place in the order"));
        // `use crate::{a::…, b::…}` spans lines, so modules are searched for wherever one can occur.
        let text = code(&text);
        let lines: Vec<&str> = text.lines().collect();
        let mut in_use = false;
        for line in lines {
            let starts = line.starts_with("use crate::{");
            in_use |= starts;
            let mentioned = if in_use && !starts && line.starts_with("    ") && !line.starts_with("     ") {
                line.trim().split([':', ',', '{']).next().map(str::to_owned)
            } else {
                line.split("crate::")
                    .nth(1)
                    .map(|r| r.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect())
            };
            if let Some(other) = mentioned.filter(|o| !o.is_empty() && o != part && o != "}")
                && !allowed.contains(&other.as_str())
            {
                wrong.push(format!("{name} uses `{other}`: {}", line.trim()));
            }
            in_use &= !line.trim_end().ends_with("};");
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The paths of the `use` lines of a source, with braces expanded.
fn used_paths(text: &str) -> Vec<String> {
    fn expand(prefix: &str, rest: &str, out: &mut Vec<String>) {
        let Some((head, body)) = rest.split_once('{') else {
            out.push(format!("{prefix}{}", rest.trim()));
            return;
        };
        let body = body.trim_end().strip_suffix('}').expect("braces match");
        let (mut depth, mut part) = (0, String::new());
        for c in body.chars().chain([',']) {
            match c {
                ',' if depth == 0 => {
                    if !part.trim().is_empty() {
                        expand(&format!("{prefix}{}", head.trim()), part.trim(), out);
                    }
                    part.clear();
                    continue;
                }
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            part.push(c);
        }
    }
    let mut out = Vec::new();
    for statement in code(text).split("\nuse ").skip(1).chain(code(text).split("\npub use ").skip(1)) {
        let statement = statement.split(';').next().unwrap_or_default();
        expand("", &statement.split_whitespace().collect::<Vec<_>>().join(" "), &mut out);
    }
    out
}

/// Files of one folder import each other in one direction; folders do by the table above.
#[test]
fn no_files_import_each_other_in_a_circle() {
    let mut arrows: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let names: BTreeSet<String> = sources().into_iter().map(|(name, _)| name).collect();
    for (name, text) in sources() {
        let folder = name.rsplit_once('/').map_or("", |(folder, _)| folder);
        let module = folder.replace('/', "::");
        for path in used_paths(&text) {
            let sibling = match path.split_once("::") {
                Some(("super", rest)) => rest.to_owned(),
                Some(("crate", rest)) if module.is_empty() => rest.to_owned(),
                Some(("crate", rest)) => match rest.strip_prefix(&format!("{module}::")) {
                    Some(rest) => rest.to_owned(),
                    None => continue,
                },
                _ => continue,
            };
            let first = sibling.split("::").next().unwrap_or_default();
            let dir = if folder.is_empty() { String::new() } else { format!("{folder}/") };
            let candidates = [format!("{dir}{first}.rs"), format!("{dir}{first}/mod.rs")];
            if let Some(other) = candidates.into_iter().find(|c| names.contains(c) && *c != name) {
                arrows.entry(name.clone()).or_default().insert(other);
            }
        }
    }
    assert!(arrows.values().map(BTreeSet::len).sum::<usize>() > 150, "the imports were found: {}", arrows.len());
    // What imports nothing that is left is no part of a circle.
    loop {
        let done: Vec<String> = arrows
            .iter()
            .filter(|(_, to)| to.iter().all(|other| !arrows.contains_key(other)))
            .map(|(name, _)| name.clone())
            .collect();
        if done.is_empty() {
            break;
        }
        for name in done {
            arrows.remove(&name);
        }
    }
    assert!(arrows.is_empty(), "a circle, or what leads to one: {arrows:#?}");
}

#[test]
fn libraries_have_one_home() {
    for (library, homes) in [
        ("etcd_client", &["store/"][..]),
        ("bollard::", &["host/docker/"]),
        ("backoff::", &["retry.rs"]),
        ("handlebars", &["host/nginx/render.rs"]),
        ("saphyr_parser", &["model/yaml.rs"]),
        ("prometheus::", &["metrics/", "http.rs"]),
        ("x509_cert", &["host/certificate.rs"]),
        ("rustls::", &["webhook.rs", "host/tls.rs"]),
        ("opentelemetry", &["telemetry.rs"]),
        ("println!", &[]),
    ] {
        for (name, text) in sources() {
            let used = code(&text).lines().any(|l| l.contains(library) && !l.trim_start().starts_with("//"));
            assert!(
                !used || homes.iter().any(|h| name.starts_with(h)),
                "{name} uses `{library}`, whose home is {homes:?}"
            );
        }
    }
}

#[test]
fn the_planner_is_pure() {
    for (name, text) in
        sources().into_iter().filter(|(n, _)| ["plan/", "fleet/", "model/"].iter().any(|p| n.starts_with(p)))
    {
        for word in ["async ", ".await", "tracing::", "tokio", "std::fs", "std::net", "Instant::now", "rand"] {
            let at = code(&text).lines().find(|l| l.contains(word) && !l.trim_start().starts_with("//"));
            assert!(at.is_none(), "{name} is pure and has `{word}`: {at:?}");
        }
    }
}

#[test]
fn files_are_of_reading_size() {
    for (name, text) in sources() {
        let lines = code(&text).lines().filter(|l| !l.trim().is_empty() && !l.trim_start().starts_with("//")).count();
        assert!(lines <= 500, "{name} has {lines} lines of code: is there a second idea in it?");
    }
}
