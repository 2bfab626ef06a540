//! What reads or writes what others wrote, held to its promises on inputs made from the corpus of `fuzz/`: the short run.
//!
//! The checks are those that libFuzzer calls (`make fuzz`). Here nothing tells what code an input reaches, so breadth
//! counts: every file of the corpus, then mutations of them, the same ones in every run. `DEMAE_FUZZ_SEED` makes others,
//! `DEMAE_FUZZ_INPUTS` or `DEMAE_FUZZ_SECONDS` more.

#[path = "../fuzz/src/checks/mod.rs"]
mod checks;

use std::{
    cell::{Cell, RefCell},
    collections::BTreeSet,
    env, fmt, fs,
    io::Write as _,
    panic,
    path::{Path, PathBuf},
    sync::Once,
    time::{Duration, Instant},
};

use demae::model::yaml::MAX_TEXT;
use serde_json::{Value, json};

/// Mutations for each target, unless said otherwise …
const INPUTS: u64 = 1500;
/// … and the longest time for them, in seconds.
const SECONDS: u64 = 8;
/// Longest input that is made, in bytes.
const LONGEST: usize = 4096;
/// Longest time to make an input that breaks a promise shorter.
const SHRINKING: Duration = Duration::from_secs(20);
/// Bytes that mean something to one of the formats.
const ODD: &[u8] = b"\0\n\r\t \"'\\/.:;{}[],#-=$%&*!|>~09\x1b\x7f\x80\xc2\xe2\xff";

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

/// A check: it panics where a promise is broken.
type Check = fn(&[u8]);

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
        // Past what the harness catches of the macros: how much was tried is part of the result.
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

struct Search<'a> {
    target: &'a str,
    check: Check,
    /// Names of files, and what is in them.
    corpus: &'a [(String, Vec<u8>)],
    tokens: &'a [Vec<u8>],
    seed: u64,
    first: u64,
    inputs: u64,
    until: Option<Instant>,
}

impl Search<'_> {
    /// Tries the corpus, then mutations; answers with how many.
    fn run(&self) -> Result<u64, Broken> {
        for (name, input) in self.corpus {
            self.attempt(input, || format!("fuzz/corpus/{}/{name}", self.target))?;
        }
        let mut tried = 0;
        while tried < self.inputs && self.until.is_none_or(|until| Instant::now() < until) {
            let number = self.first + tried;
            let input = self.input(number);
            self.attempt(&input, || format!("input {number} of seed {}", self.seed))?;
            tried += 1;
        }
        Ok(tried)
    }

    /// An input by its number: the same for the same seed, corpus and tokens.
    fn input(&self, number: u64) -> Vec<u8> {
        let mut chance = Chance(self.seed.rotate_left(32) ^ number);
        let mut input = chance.pick(self.corpus).map(|(_, bytes)| bytes.clone()).unwrap_or_default();
        for _ in 0..=chance.below(5) {
            mutate(&mut chance, &mut input, self.corpus, self.tokens);
            input.truncate(LONGEST);
        }
        input
    }

    fn attempt(&self, input: &[u8], origin: impl Fn() -> String) -> Result<(), Broken> {
        let Err(first) = attempt(self.check, input) else { return Ok(()) };
        let shorter = shrink(self.check, input);
        // A promise about time may be kept on the second try.
        let (input, why) = match attempt(self.check, &shorter) {
            Err(why) => (shorter, why),
            Ok(()) => (input.to_vec(), first),
        };
        Err(Broken { target: self.target.to_owned(), origin: origin(), input, why })
    }
}

/// A promise that an input breaks.
#[derive(Debug)]
struct Broken {
    target: String,
    origin: String,
    /// As short as it was made.
    input: Vec<u8>,
    why: String,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { target, origin, input, why } = self;
        let octal: String = input.iter().map(|b| format!("\\{b:03o}")).collect();
        writeln!(f, "{target} breaks a promise, by {origin}, shrunk to {} bytes:", input.len())?;
        writeln!(f, "    \"{}\"", input.escape_ascii())?;
        writeln!(f, "{why}")?;
        writeln!(f, "again: DEMAE_FUZZ_INPUT={} cargo test --test fuzz -- --exact {target}", hex(input))?;
        writeln!(f, "kept, and tried first from then on: printf '{octal}' > fuzz/corpus/{target}/NAME")
    }
}

thread_local! {
    static IS_TRYING: Cell<bool> = const { Cell::new(false) };
    static CAUGHT: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Runs a check; answers with what it panicked with, and where.
fn attempt(check: Check, input: &[u8]) -> Result<(), String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if IS_TRYING.get() {
                CAUGHT.set(info.to_string());
            } else {
                usual(info);
            }
        }));
    });
    IS_TRYING.set(true);
    let ended = panic::catch_unwind(|| check(input));
    IS_TRYING.set(false);
    ended.map_err(|_| CAUGHT.take())
}

/// Takes parts out of an input for as long as it still breaks a promise.
fn shrink(check: Check, input: &[u8]) -> Vec<u8> {
    let until = Instant::now() + SHRINKING;
    let mut best = input.to_vec();
    let mut step = best.len() / 2;
    while step > 0 {
        let mut at = 0;
        while at < best.len() {
            if Instant::now() > until {
                return best;
            }
            let mut shorter = best.clone();
            shorter.drain(at..(at + step).min(best.len()));
            if attempt(check, &shorter).is_err() {
                best = shorter;
            } else {
                at += step;
            }
        }
        step /= 2;
    }
    best
}

/// One change of an input.
fn mutate(chance: &mut Chance, input: &mut Vec<u8>, corpus: &[(String, Vec<u8>)], tokens: &[Vec<u8>]) {
    let other = chance.pick(corpus).map_or(&[][..], |(_, bytes)| bytes.as_slice());
    let token = chance.pick(tokens).map_or(&[][..], Vec::as_slice);
    let at = chance.below(input.len() + 1);
    // Short parts more often than long ones.
    let most = chance.below(input.len() - at + 1);
    let length = 1 + chance.below(most + 1);
    let end = (at + length).min(input.len());
    match chance.below(14) {
        0 => {
            if let Some(byte) = input.get_mut(at) {
                *byte ^= 1_u8 << chance.below(8);
            }
        }
        1 => {
            if let (Some(byte), Some(odd)) = (input.get_mut(at), chance.pick(ODD)) {
                *byte = *odd;
            }
        }
        2 => put(input, at, chance.pick(ODD).map_or(&[][..], std::slice::from_ref)),
        3 => put(input, at, token),
        4 => {
            let end = (at + token.len()).min(input.len());
            input.splice(at..end, token.iter().copied());
        }
        5 => drop(input.drain(at..end)),
        6 => input.truncate(at),
        7 => {
            let part = input[at..end].to_vec();
            let to = chance.below(input.len() + 1);
            put(input, to, &part);
        }
        8 => {
            input.truncate(at);
            input.extend_from_slice(&other[chance.below(other.len() + 1)..]);
        }
        9 => {
            let noise: Vec<u8> = (0..length.min(16)).map(|_| chance.byte()).collect();
            put(input, at, &noise);
        }
        10 => {
            let part = input[at..end].repeat(1 + chance.below(64));
            put(input, at, &part[..part.len().min(LONGEST)]);
        }
        // Lines are what most of the formats are made of.
        11 => {
            let at = line(chance, input);
            put(input, at, &[token, b"\n"].concat());
        }
        12 => {
            let (from, at) = (line(chance, other), line(chance, input));
            let rest = &other[from..];
            let end = rest.iter().position(|b| *b == b'\n').map_or(rest.len(), |n| n + 1);
            put(input, at, &rest[..end]);
        }
        _ => {
            let from = line(chance, input);
            let end = input[from..].iter().position(|b| *b == b'\n').map_or(input.len(), |n| from + n + 1);
            drop(input.drain(from..end));
        }
    }
}

fn put(input: &mut Vec<u8>, at: usize, part: &[u8]) {
    input.splice(at..at, part.iter().copied());
}

/// Where some line begins.
fn line(chance: &mut Chance, input: &[u8]) -> usize {
    let at = chance.below(input.len() + 1);
    input[..at].iter().rposition(|b| *b == b'\n').map_or(0, |n| n + 1)
}

/// Everything that is left to chance comes from its seed. SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom
/// number generators", 2014).
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[7]
    }

    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(n.max(1)).expect("64 bits")).expect("small")
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        from.get(self.below(from.len()))
    }
}

/// Files of a directory below `fuzz/`, by name.
fn files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    names(dir).into_iter().map(|name| (name.clone(), fs::read(fuzz(dir).join(&name)).expect("a file"))).collect()
}

fn names(dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(fuzz(dir)).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    entries.map(|e| e.expect("an entry").file_name().into_string().expect("UTF-8")).collect()
}

fn fuzz(path: &Path) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(path)
}

/// The words of a target, from the file that libFuzzer is given too: a word in quotes on each line.
fn tokens(target: &str) -> Vec<Vec<u8>> {
    let path = fuzz(Path::new("dictionaries")).join(format!("{target}.dict"));
    let text = fs::read_to_string(path).expect("a dictionary");
    let lines = text.lines().filter(|l| !l.is_empty() && !l.starts_with('#'));
    lines.map(|l| token(l).unwrap_or_else(|| panic!("not a word of a dictionary: {l}"))).collect()
}

/// A word as libFuzzer reads it: in quotes, with `\"`, `\\` and `\x00` in it.
fn token(line: &str) -> Option<Vec<u8>> {
    let mut rest = line.strip_prefix('"')?.strip_suffix('"')?.as_bytes();
    let mut token = Vec::new();
    while let [first, more @ ..] = rest {
        rest = more;
        if *first != b'\\' {
            token.push(*first);
            continue;
        }
        match rest {
            [escaped @ (b'"' | b'\\'), more @ ..] => {
                token.push(*escaped);
                rest = more;
            }
            [b'x', high, low, more @ ..] => {
                token.push(u8::from_str_radix(std::str::from_utf8(&[*high, *low]).ok()?, 16).ok()?);
                rest = more;
            }
            _ => return None,
        }
    }
    Some(token)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn from_hex(text: &str) -> Vec<u8> {
    let byte = |pair: &[u8]| std::str::from_utf8(pair).ok().and_then(|p| u8::from_str_radix(p, 16).ok());
    text.as_bytes().chunks(2).map(|pair| byte(pair).expect("two hexadecimal digits for each byte")).collect()
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
        ("keys that are no one's business", many("x-a: {", &|i| format!("{i:x},"), "}")),
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
fn a_broken_promise_is_told_with_a_way_to_see_it_again() {
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
    let broken = search.run().expect_err("a word of the dictionary is put in sooner or later");
    assert_eq!(broken.input, b"evil", "shrunk");
    assert_eq!(from_hex(&hex(&broken.input)), b"evil");
    let told = broken.to_string();
    for part in
        ["of seed 1", "there is evil in it", "tests/fuzz.rs", "DEMAE_FUZZ_INPUT=6576696c", "'\\145\\166\\151\\154'"]
    {
        assert!(told.contains(part), "`{part}` is not in:\n{told}");
    }
}

#[test]
fn a_body_that_asks_for_the_rights_of_the_host_is_noticed() {
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
fn files_with_something_slipped_in_are_noticed() {
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
