//! Keys: each has one meaning or none, no two mean the same, and names in them are valid. A prefix is stripped only
//! where it was added.

use std::path::{Component, Path};

use demae::store::keys::{BadKey, Key, Prefix};

use super::{is_control, is_label, is_variable};

/// Input: a key; or, with a NUL, a prefix and a key.
pub fn check(bytes: &[u8]) {
    match bytes.iter().position(|b| *b == 0) {
        Some(at) => {
            let (prefix, key) = (&bytes[..at], &bytes[at + 1..]);
            one(key);
            if let Ok(prefix) = std::str::from_utf8(prefix) {
                below(prefix, key);
            }
        }
        None => one(bytes),
    }
}

fn one(bytes: &[u8]) {
    let read = Key::parse(bytes);
    assert_eq!(read, Key::parse(bytes), "the same key is read in two ways");
    let known = std::str::from_utf8(bytes).is_ok_and(is_known);
    assert_eq!(read.is_ok(), known, "by its form: {read:?}");
    match &read {
        Ok(key) => {
            assert_eq!(written(key).as_bytes(), bytes, "two keys with one meaning");
            for name in names(key) {
                is_one_step(name);
            }
        }
        Err(bad) => {
            let (owner, problem) = match bad {
                BadKey::App(app, problem) => (Some(format!("apps/{app}/")), problem),
                BadKey::Set(set, problem) => (Some(format!("env/{set}/")), problem),
                BadKey::Unowned(problem) => (None, problem),
            };
            let text = problem.to_string();
            assert!(!problem.message.trim().is_empty(), "a problem without a message: {problem:?}");
            assert!(!text.contains(is_control), "a terminal would interpret this: {text:?}");
            // A bad key breaks an app only if it is below that app.
            assert!(owner.is_none_or(|o| bytes.starts_with(o.as_bytes())), "not its key: {bad:?}");
        }
    }
}

/// The forms of docs/keys.md.
fn is_known(text: &str) -> bool {
    match text.split('/').collect::<Vec<&str>>()[..] {
        ["cluster"] | ["freeze"] => true,
        ["apps", app, "spec" | "image" | "restart" | "paused" | "release" | "promote" | "retry"] => is_label(app),
        ["env", set, name] => is_label(set) && is_variable(name),
        ["hosts", host, "labels" | "mode"] => is_label(host),
        _ => false,
    }
}

fn written(key: &Key) -> String {
    match key {
        Key::Spec(app) => format!("apps/{app}/spec"),
        Key::Image(app) => format!("apps/{app}/image"),
        Key::Restart(app) => format!("apps/{app}/restart"),
        Key::Paused(app) => format!("apps/{app}/paused"),
        Key::Env(set, name) => format!("env/{set}/{name}"),
        Key::HostLabels(host) => format!("hosts/{host}/labels"),
        Key::HostMode(host) => format!("hosts/{host}/mode"),
        Key::Cluster => "cluster".to_owned(),
        Key::Freeze => "freeze".to_owned(),
        Key::Pin(app) => format!("apps/{app}/release"),
        Key::Promote(app) => format!("apps/{app}/promote"),
        Key::Retry(app) => format!("apps/{app}/retry"),
        Key::By(app) => format!("apps/{app}/by"),
    }
}

fn names(key: &Key) -> Vec<&str> {
    match key {
        Key::Spec(app)
        | Key::Image(app)
        | Key::Restart(app)
        | Key::Paused(app)
        | Key::Pin(app)
        | Key::Promote(app)
        | Key::Retry(app)
        | Key::By(app) => vec![app.as_str()],
        Key::Env(set, name) => vec![set.as_str(), name.as_str()],
        Key::HostLabels(host) | Key::HostMode(host) => vec![host.as_str()],
        Key::Cluster | Key::Freeze => Vec::new(),
    }
}

/// A name must be a single normal path component.
fn is_one_step(name: &str) {
    let parts: Vec<Component<'_>> = Path::new(name).components().collect();
    assert!(matches!(parts[..], [Component::Normal(part)] if part == name), "{name:?} is a path");
}

fn below(text: &str, key: &[u8]) {
    let prefix = match Prefix::new(text) {
        Ok(prefix) => prefix,
        Err(why) => {
            assert!(!why.contains(is_control), "a terminal would interpret this: {why:?}");
            return;
        }
    };
    let begin = prefix.as_str();
    assert!(begin.starts_with('/') && !begin.ends_with('/') && begin.len() > 1, "{begin:?}");
    assert!(!begin.contains(|c: char| c.is_control() || c.is_whitespace()), "{begin:?}");
    assert_eq!(Prefix::new(begin), Ok(prefix.clone()), "the normalised prefix is stable");
    if let Ok(rest) = std::str::from_utf8(key) {
        let whole = prefix.key(rest);
        assert_eq!(prefix.strip(whole.as_bytes()), Some(key), "an added prefix is stripped");
        let (from, to) = prefix.desired_range();
        let is_read = (from.as_slice()..to.as_slice()).contains(&whole.as_bytes());
        assert!(is_read || Key::parse(key).is_err(), "a known key is not read: {whole:?}");
        assert!(!is_read || !["state/", "secret/"].iter().any(|s| rest.starts_with(s)), "agents' own: {whole:?}");
        // Keys of another cluster may begin with the same letters.
        assert_eq!(prefix.strip(format!("{begin}x/{rest}").as_bytes()), None, "a neighbouring prefix");
    }
    if let Some(rest) = prefix.strip(key) {
        assert_eq!([begin.as_bytes(), b"/", rest].concat(), key, "a stripped prefix was there");
    }
}
