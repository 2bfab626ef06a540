//! Parsers and writers of untrusted data, checked on inputs derived from the corpus of `fuzz/`: the short run.
//!
//! libFuzzer runs the same checks (`make fuzz`). Here there is no coverage feedback, so breadth counts: every file of
//! the corpus, then mutations of them, the same ones in every run. `DEMAE_FUZZ_SEED` selects others,
//! `DEMAE_FUZZ_INPUTS` or `DEMAE_FUZZ_SECONDS` more.

#[path = "../../fuzz/src/checks/mod.rs"]
mod checks;

mod corpus;
mod mutate;
mod search;

use std::{
    collections::BTreeSet,
    env, fs,
    io::Write as _,
    path::Path,
    time::{Duration, Instant},
};

use corpus::{files, fuzz, names, tokens};
use demae::model::yaml::MAX_TEXT;
use search::{Check, Search, attempt, from_hex, hex};
use serde_json::{Value, json};

/// Default number of mutations per target …
const INPUTS: u64 = 1500;
/// … and the longest time for them, in seconds.
const SECONDS: u64 = 8;

macro_rules! targets {
    ($($name:ident),*) => {
        const TARGETS: &[&str] = &[$(stringify!($name)),*];

        $(
            #[test]
            fn $name() {
                run(stringify!($name), checks::$name);
            }
        )*
    };
}

targets!(spec, keys, env_file, templates, ledger);

fn run(target: &str, check: Check) {
    if let Ok(hex) = env::var("DEMAE_FUZZ_INPUT") {
        return check(&from_hex(&hex));
    }
    let many = env::var("DEMAE_FUZZ_INPUTS").is_ok();
    let seconds = number("DEMAE_FUZZ_SECONDS", if many { u64::MAX } else { SECONDS });
    let search = Search {
        target,
        check,
        corpus: &files(&Path::new("corpus").join(target)),
        tokens: &tokens(target),
        seed: number("DEMAE_FUZZ_SEED", 1),
        first: number("DEMAE_FUZZ_FIRST", 0),
        inputs: number("DEMAE_FUZZ_INPUTS", if seconds == SECONDS { INPUTS } else { u64::MAX }),
        until: Instant::now().checked_add(Duration::from_secs(seconds)),
    };
    let begun = Instant::now();
    match search.run() {
        // Written past the output capture of the test macros: the number of inputs is part of the result.
        Ok(tried) => {
            let (corpus, seed, took) = (search.corpus.len(), search.seed, begun.elapsed());
            let _ = writeln!(
                std::io::stderr(),
                "fuzz: {target}: {corpus} files and {tried} mutations of seed {seed} in {took:.1?}"
            );
        }
        Err(broken) => panic!("{broken}"),
    }
}

fn number(name: &str, default: u64) -> u64 {
    env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("`{name}` is no number: {text}")))
}

#[test]
fn the_largest_texts_are_read_in_bounded_time() {
    let many = |head: &str, part: &dyn Fn(usize) -> String, tail: &str| {
        let mut text = head.to_owned();
        for i in 0.. {
            let part = part(i);
            if text.len() + part.len() + tail.len() > MAX_TEXT {
                break;
            }
            text.push_str(&part);
        }
        text + tail
    };
    let same = |head: &str, part: &str, tail: &str| many(head, &|_| part.to_owned(), tail);
    for (what, text) in [
        ("keys", many("", &|i| format!("{i:x}:\n"), "")),
        ("keys that are ignored", many("x-a: {", &|i| format!("{i:x},"), "}")),
        ("virtual hosts", many("ingress: {port: 1, hosts: [", &|i| format!("{i:x},"), "]}")),
        ("virtual hosts, all the same", same("ingress: {port: 1, hosts: [", "a,", "]}")),
        ("variables", many("environment:\n", &|i| format!(" A{i:x}: 1\n"), "")),
        ("labels in a list", many("labels: [", &|i| format!("{i:x}=,"), "]")),
        ("volumes", many("volumes: [", &|i| format!("aa:/{i:x},"), "]")),
        ("a long key", same("", "imag", ": 1")),
        ("a long word", same("image: ", "a", "")),
        ("a long duration", same("stop_grace_period: ", "1h", "")),
        ("a long command", same("command: ", "a\\ ", "")),
        ("escapes", same("image: \"", "\\e", "\"")),
        ("a long text", same("command: |\n", " a\n", "")),
        ("brackets", same("", "[", "")),
        ("braces", same("", "{", "")),
        ("dashes", same("", "- ", "")),
        ("question marks", same("", "? ", "")),
        ("colons", same("", ": ", "")),
        ("quotes", same("", "'' ", "")),
        ("comments", same("", "#\n", "")),
        ("line breaks", same("image: a", "\r", "")),
        ("documents", same("", "---\n", "")),
        ("tags", many("", &|i| format!("%TAG !{i:x}! a\n"), "--- a")),
        ("anchors", same("", "&a ", "")),
        ("too much", "a".repeat(MAX_TEXT + 1)),
    ] {
        if let Err(why) = attempt(checks::spec, text.as_bytes()) {
            panic!("{what}: {}", why.chars().take(2000).collect::<String>());
        }
    }
}

#[test]
fn libfuzzer_has_the_same_targets() {
    let targets: BTreeSet<String> = TARGETS.iter().map(|t| (*t).to_owned()).collect();
    let without = |dir: &str, end: &str| -> BTreeSet<String> {
        names(Path::new(dir)).iter().map(|n| n.strip_suffix(end).unwrap_or(n).to_owned()).collect()
    };
    assert_eq!(without("fuzz_targets", ".rs"), targets);
    assert_eq!(without("dictionaries", ".dict"), targets);
    assert_eq!(names(Path::new("corpus")), targets);
    let manifest = fs::read_to_string(fuzz(Path::new("Cargo.toml"))).expect("a manifest");
    for target in &targets {
        assert!(manifest.contains(&format!("path = \"fuzz_targets/{target}.rs\"")), "{target} is not built");
        assert!(!names(&Path::new("corpus").join(target)).is_empty(), "{target} has nothing to begin with");
    }
}

#[test]
fn broken_check_is_reported_with_a_way_to_reproduce_it() {
    fn check(bytes: &[u8]) {
        assert!(!bytes.windows(4).any(|w| w == b"evil"), "there is evil in it");
    }
    let corpus = [("good".to_owned(), b"a: 1\nb: 2\n".to_vec())];
    let tokens = [b"evil".to_vec()];
    let search = Search {
        target: "spec",
        check,
        corpus: &corpus,
        tokens: &tokens,
        seed: 1,
        first: 0,
        inputs: 1000,
        until: None,
    };
    let broken = search.run().expect_err("a token of the dictionary is inserted sooner or later");
    assert_eq!(broken.input, b"evil", "shrunk");
    assert_eq!(from_hex(&hex(&broken.input)), b"evil");
    let report = broken.to_string();
    for part in [
        "of seed 1",
        "there is evil in it",
        "tests/fuzz/main.rs",
        "DEMAE_FUZZ_INPUT=6576696c",
        "'\\145\\166\\151\\154'",
    ] {
        assert!(report.contains(part), "`{part}` is not in:\n{report}");
    }
}

#[test]
fn container_body_that_asks_for_host_privileges_is_detected() {
    let body = |key: &str, value: Value| {
        let own = ["DEMAE_APP=a", "DEMAE_HOST=b", "DEMAE_RELEASE=c", "DEMAE_REPLICA=1"];
        let mut body = json!({"Image": "web", "Env": own, "HostConfig": {"RestartPolicy": {"Name": "no"}}});
        body["HostConfig"][key] = value;
        body
    };
    let mount = |kind: &str, source: &str, target: &str| json!([{"Type": kind, "Source": source, "Target": target}]);
    for (key, value) in [
        ("NetworkMode", json!("backend")),
        ("Mounts", mount("bind", "/srv/web", "/data")),
        ("Mounts", mount("volume", "cache", "/cache")),
        ("PortBindings", json!({"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": "20001"}]})),
    ] {
        let body = body(key, value);
        assert_eq!(checks::denied(&body), Vec::<String>::new(), "{body}");
    }
    for (key, value) in [
        ("Privileged", json!(true)),
        ("CapAdd", json!(["SYS_ADMIN"])),
        ("Devices", json!([])),
        ("DeviceRequests", json!([])),
        ("SecurityOpt", json!(["seccomp=unconfined"])),
        ("Sysctls", json!({})),
        ("PidMode", json!("host")),
        ("IpcMode", json!("host")),
        ("UTSMode", json!("host")),
        ("UsernsMode", json!("host")),
        ("CgroupnsMode", json!("host")),
        ("CgroupParent", json!("/")),
        ("Runtime", json!("other")),
        ("Binds", json!(["/:/host"])),
        ("VolumesFrom", json!(["other"])),
        ("GroupAdd", json!(["0"])),
        ("NetworkMode", json!("host")),
        ("NetworkMode", json!("container:other")),
        ("RestartPolicy", json!({"Name": "always"})),
        ("Tmpfs", json!({"/run": "exec,suid"})),
        ("PortBindings", json!({"80/tcp": [{"HostIp": "0.0.0.0", "HostPort": "80"}]})),
        ("Mounts", mount("bind", "/", "/host")),
        ("Mounts", mount("bind", "/srv", "/host")),
        ("Mounts", mount("bind", "/srv/../etc", "/host")),
        ("Mounts", mount("bind", "/proc", "/host")),
        ("Mounts", mount("bind", "/var/run/docker.sock", "/s")),
        ("Mounts", mount("bind", "/srv/docker.sock", "/s")),
        ("Mounts", mount("bind", "/srv/web", "/")),
        ("Mounts", mount("volume", "../web", "/data")),
        ("Mounts", mount("npipe", "cache", "/data")),
    ] {
        let body = body(key, value);
        assert!(!checks::denied(&body).is_empty(), "{body}");
    }
}

#[test]
fn files_with_injected_text_are_detected() {
    let file = |name: &str| checks::directives(&format!("server {{\n    server_name {name};\n}}\n"));
    let shape = |name: &str| {
        let found: Vec<checks::Directive> = file(name).ok()?;
        Some(found.into_iter().map(|d| (d.depth, d.words.len(), d.is_block)).collect::<Vec<_>>())
    };
    let harmless = shape("web.example.com");
    assert_eq!(harmless.as_ref().map(Vec::len), Some(2));
    for name in ["a; root /etc", "a; } server { listen 81", "a b", "a # ", "\"a", "a }", "a {", "", "a\nb"] {
        assert_ne!(shape(name), harmless, "{name:?}");
    }
    assert_eq!(file("${a}{b").map(|d| d.len()), Err("1 blocks are not closed".to_owned()));

    assert_eq!(checks::variables("A=1\nB= 2 \n# C=3\n").map(|v| v.len()), Ok(2));
    for text in ["A=1\nA=2\n", "A\n", "=1\n", "A B=1\n"] {
        assert!(checks::variables(text).is_err(), "{text:?}");
    }
}
