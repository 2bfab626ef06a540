//! nginx files: any valid values give the same directives, with the same nesting, as harmless values, and differ only
//! in the values.

use std::{
    collections::{BTreeMap, HashSet},
    path::PathBuf,
};

use demae::{
    host::{
        layout::{Layout, MAX_SOCKET_PATH},
        nginx::{Neighbours, Profile, Renderer, Settings},
    },
    model::{
        name::{AppName, VirtualHost},
        proxy::{Upstreams, Vhost},
    },
};

use super::{Bytes, name};

/// Letters of names of apps and virtual hosts.
const LETTERS: &[u8] = b"abcdefghijklmnopqrstuvwxyz0123456789-.";
/// More hosts test nothing new.
const MAX_HOSTS: usize = 12;
/// Bucket size of nginx's hash of server names unless set otherwise: a cache line.
const BUCKET: usize = 64;

/// A directive: its depth, its words, and whether it opens a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directive {
    /// The number of enclosing blocks.
    pub depth: usize,
    /// Its name and its arguments, with their quotes.
    pub words: Vec<String>,
    /// Whether it opens a block.
    pub is_block: bool,
}

/// The values of one app.
struct Values {
    app: AppName,
    hosts: Vec<VirtualHost>,
    ports: Vec<u16>,
    max_body_size: u64,
    read_timeout: u64,
}

thread_local! {
    // Templates are loaded once: for each profile, with and without `keepalive_min_timeout`.
    static RENDERERS: Vec<Renderer> = [Profile::Default, Profile::Strict]
        .into_iter()
        .flat_map(|profile| [((1, 22, 1), profile), ((1, 28, 0), profile)])
        .map(|(version, profile)| {
            let listen = vec!["80".to_owned(), "[::]:80".to_owned()];
            let default_server = version < (1, 27, 4);
            let settings = Settings { listen, default_server, profile, templates: None, trusted: Vec::new() };
            Renderer::new(settings, version).expect("there is no directory to read")
        })
        .collect();
}

/// Input: two numbers, the number of upstreams, their ports, then names separated by NUL: the app's, and its hosts'.
pub fn check(bytes: &[u8]) {
    let mut from = Bytes(bytes);
    let (max_body_size, read_timeout) = (from.number(), from.number());
    let slots = 1 + u16::from(from.byte() % 8);
    let ports = (0..slots).map(|_| u16::from(from.byte()) * 256 + u16::from(from.byte())).collect();
    let app = from.field().and_then(|f| name(f, LETTERS)).unwrap_or_else(|| AppName::try_from("web").expect("a name"));
    let mut hosts = Vec::new();
    while let Some(field) = from.field() {
        if hosts.len() < MAX_HOSTS {
            // A catch-all host renders differently.
            hosts.extend(name::<VirtualHost>(field, LETTERS).filter(|host| !host.is_catch_all()));
        }
    }
    if hosts.is_empty() {
        hosts.push(VirtualHost::try_from("a.example").expect("a name"));
    }
    let hostile = Values { app, hosts, ports, max_body_size, read_timeout };
    let harmless = harmless(&hostile);
    let layout = Layout::new("/var/lib/demae", "/run/demae");
    let paths: Vec<String> = (1..=slots).map(|slot| layout.route(&hostile.app, slot).display().to_string()).collect();
    for (slot, path) in (1..=slots).zip(&paths) {
        assert_eq!(*path, format!("/var/lib/demae/routes/{}/{slot}.sock", hostile.app), "the path of the route");
        assert!(path.len() <= MAX_SOCKET_PATH, "too long for a socket: {path}");
    }
    RENDERERS.with(|renderers| {
        for renderer in renderers {
            for is_socket in [true, false] {
                let text = |values: &Values| {
                    let upstreams =
                        if is_socket { Upstreams::Slots(slots) } else { Upstreams::Ports(values.ports.clone()) };
                    let vhost = vhost(values, upstreams);
                    let files = renderer.app(&values.app, &vhost, &Neighbours::of([&vhost]), &layout);
                    let files = files.expect("the default template renders");
                    files.into_values().map(|text| String::from_utf8(text).expect("text")).collect::<String>()
                };
                is_same_but_for_values(&text(&hostile), &text(&harmless), &swaps(&harmless, &hostile));
            }
            is_host_part_free_of_values(renderer, &hostile);
        }
    });
}

fn vhost(values: &Values, upstreams: Upstreams) -> Vhost {
    let (max_body_size, read_timeout) = (values.max_body_size, values.read_timeout);
    Vhost { max_body_size, read_timeout, ..Vhost::plain(values.hosts.clone(), upstreams) }
}

/// As many values, none of which occurs in a template.
fn harmless(hostile: &Values) -> Values {
    let host = |i: usize| VirtualHost::try_from(format!("host-{i}.harmless.invalid")).expect("a name");
    Values {
        app: AppName::try_from("harmless-app").expect("a name"),
        hosts: (0..hostile.hosts.len()).map(host).collect(),
        ports: (50_001..).take(hostile.ports.len()).collect(),
        max_body_size: 424_242,
        read_timeout: 434_343,
    }
}

/// Maps whole words of the harmless file to those of the hostile one.
fn swaps(from: &Values, to: &Values) -> BTreeMap<String, String> {
    let mut swaps = BTreeMap::new();
    let mut swap = |form: &dyn Fn(&Values) -> String| swaps.insert(form(from), form(to));
    swap(&|v| format!("demae_{}", v.app));
    swap(&|v| format!("http://demae_{}", v.app));
    if from.ports.len() > 1 {
        swap(&|v| format!("@demae_{}_next", v.app));
        swap(&|v| format!("@demae_{}_last", v.app));
    }
    for slot in 1..=from.ports.len() {
        swap(&|v| format!("unix:/var/lib/demae/routes/{}/{slot}.sock", v.app));
        swap(&|v| format!("127.0.0.1:{}", v.ports[slot - 1]));
    }
    for i in 0..from.hosts.len() {
        swap(&|v| v.hosts[i].to_string());
    }
    swap(&|v| v.max_body_size.to_string());
    swap(&|v| format!("{}s", v.read_timeout));
    swaps
}

fn is_same_but_for_values(hostile: &str, harmless: &str, swaps: &BTreeMap<String, String>) {
    let found = directives(hostile).unwrap_or_else(|why| panic!("nginx would not read it: {why}: {hostile}"));
    let mut wanted = directives(harmless).expect("harmless values make a file");
    let mut used = HashSet::new();
    for word in wanted.iter_mut().flat_map(|d| &mut d.words) {
        if let Some((from, to)) = swaps.get_key_value(word.as_str()) {
            used.insert(from);
            to.clone_into(word);
        }
    }
    assert!(found == wanted, "other directives than with harmless values: {found:#?} is not {wanted:#?}");
    // Every value must occur, or nothing would be compared. A file has either sockets or ports.
    let has_all = |is_wanted: &dyn Fn(&str) -> bool| swaps.keys().filter(|k| is_wanted(k)).all(|k| used.contains(k));
    let (is_socket, is_port) = (|k: &str| k.starts_with("unix:"), |k: &str| k.starts_with("127."));
    assert!(
        (has_all(&is_socket) || has_all(&is_port)) && has_all(&|k| !is_socket(k) && !is_port(k)),
        "of {swaps:?} the file has only {used:?}"
    );
}

/// The shared file contains no values, and its hash of server names fits the longest name.
fn is_host_part_free_of_values(renderer: &Renderer, values: &Values) {
    let hash = ["server_names_hash_bucket_size", "server_names_hash_max_size"];
    let vhosts = BTreeMap::from([(values.app.clone(), vhost(values, Upstreams::Slots(1)))]);
    let layout = Layout::new("/var/lib/demae", "/run/demae");
    let part = |vhosts: &BTreeMap<AppName, Vhost>, taken: &BTreeMap<String, (PathBuf, String)>| {
        let vhosts: Vec<&Vhost> = vhosts.values().collect();
        let text = renderer.host(7, &vhosts, taken, &layout).expect("the host's template renders");
        directives(&text).expect("the host's part is a file")
    };
    let nothing = BTreeMap::new();
    let taken = hash.into_iter().map(|name| (name.to_owned(), (PathBuf::new(), String::new()))).collect();
    let (sizes, rest): (Vec<Directive>, Vec<Directive>) =
        part(&vhosts, &nothing).into_iter().partition(|d| hash.contains(&d.words[0].as_str()));
    let alone = part(&BTreeMap::new(), &nothing);
    assert!(rest == alone && part(&vhosts, &taken) == alone, "names changed the shared file: {rest:#?}");
    let bucket = sizes.iter().find(|d| d.words[0] == hash[0]).map_or(BUCKET, |d| d.words[1].parse().expect("a number"));
    for host in &values.hosts {
        // nginx stores a pointer, two bytes and the name, in whole words, and a pointer after the last one.
        let needed = 8 + (host.as_str().len() + 2).next_multiple_of(8) + 8;
        assert!(needed <= bucket, "`{host}` needs a bucket of {needed} bytes, and there are {bucket}");
    }
}

/// Parses directives by the rules of nginx's own parser: words end at blanks, `;` and `{`; `#` and `}` are special only
/// at the start of a word; quotes close at the same quote; a backslash escapes the next character.
///
/// # Errors
/// Where nginx would report an error.
pub fn directives(text: &str) -> Result<Vec<Directive>, String> {
    let mut found = Vec::new();
    let mut words: Vec<String> = Vec::new();
    let mut depth = 0;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            ' ' | '\t' | '\r' | '\n' => {}
            '#' => while chars.next_if(|c| *c != '\n').is_some() {},
            ';' | '{' if words.is_empty() => return Err(format!("`{c}` with nothing in front of it")),
            ';' => found.push(Directive { depth, words: std::mem::take(&mut words), is_block: false }),
            '{' => {
                found.push(Directive { depth, words: std::mem::take(&mut words), is_block: true });
                depth += 1;
            }
            '}' if !words.is_empty() || depth == 0 => return Err("a `}` too many".to_owned()),
            '}' => depth -= 1,
            quote @ ('"' | '\'') => {
                let mut word = String::from(quote);
                loop {
                    match chars.next() {
                        None => return Err(format!("a {quote} is not closed")),
                        Some('\\') => word.extend(['\\'].into_iter().chain(chars.next())),
                        Some(end) if end == quote => break,
                        Some(inner) => word.push(inner),
                    }
                }
                word.push(quote);
                if chars.peek().is_some_and(|next| !" \t\r\n;{)".contains(*next)) {
                    return Err(format!("something follows {word}"));
                }
                words.push(word);
            }
            first => {
                let mut word = String::from(first);
                let mut last = first;
                if first == '\\' {
                    word.extend(chars.next());
                }
                while let Some(next) = chars.peek().copied() {
                    // `${` begins a variable.
                    if matches!(next, ' ' | '\t' | '\r' | '\n' | ';') || (next == '{' && last != '$') {
                        break;
                    }
                    chars.next();
                    word.push(next);
                    if next == '\\' {
                        word.extend(chars.next());
                    }
                    last = next;
                }
                words.push(word);
            }
        }
    }
    match (words.is_empty(), depth) {
        (true, 0) => Ok(found),
        (false, _) => Err(format!("the file ends in {words:?}")),
        (true, open) => Err(format!("{open} blocks are not closed")),
    }
}
