//! What a registry answers instead of an image: each answer holds up the change, is reported as what it is, and takes no
//! request from what serves.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use demae::model::status::State;

use crate::support::{
    lab::Lab,
    load::{self, Load},
    server::{Answer, Server},
};

/// The status, further lines of the head, and the body of what a registry without images answers: by the first part of
/// the name that is asked for.
fn answer(path: &str) -> (&'static str, &'static str, &'static str) {
    const LIST: &str = r#"{"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.list.v2+json",
        "manifests": [{"mediaType": "application/vnd.docker.distribution.manifest.v2+json", "size": 7, "digest":
        "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
        "platform": {"architecture": "s390x", "os": "linux"}}]}"#;
    let name = path.strip_prefix("v2/").unwrap_or_default().split('/').next().unwrap_or_default();
    match name {
        "" => ("200 OK", "", "{}"),
        "login" => (
            "401 Unauthorized",
            "www-authenticate: Basic realm=\"test\"\r\n",
            r#"{"errors": [{"code": "UNAUTHORIZED", "message": "authentication required"}]}"#,
        ),
        "denied" => (
            "403 Forbidden",
            "",
            r#"{"errors": [{"code": "DENIED", "message": "requested access to the resource is denied"}]}"#,
        ),
        "missing" => {
            ("404 Not Found", "", r#"{"errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]}"#)
        }
        "busy" => (
            "429 Too Many Requests",
            "retry-after: 60\r\n",
            r#"{"errors": [{"code": "TOOMANYREQUESTS", "message": "slow down"}]}"#,
        ),
        "broken" => ("502 Bad Gateway", "", "<html>"),
        "other" => ("200 OK", "content-type: application/vnd.docker.distribution.manifest.list.v2+json\r\n", LIST),
        _ => ("404 Not Found", "", "{}"),
    }
}

#[test]
fn each_answer_of_a_registry_is_reported_as_what_it_is() {
    let lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = asked.clone();
    let registry = Server::start(move |path| {
        if path.starts_with("v2/other/") {
            counted.fetch_add(1, Relaxed);
        }
        let (status, head, body) = answer(path);
        Answer::new(status, head, body)
    });
    let load = Load::start(lab.ingress, "web.test", load::mixed(Duration::from_millis(2)));
    for (name, part, (state, kind)) in [
        // A person logs this host in, or the registry recovers; the release waits.
        ("login", "unauthorized", (State::Blocked, "image_missing")),
        ("denied", "denied", (State::Blocked, "image_missing")),
        ("busy", "toomanyrequests", (State::Converging, "image")),
        ("broken", "502", (State::Converging, "image")),
        // No host will ever do better: the release has failed.
        ("missing", "manifest unknown", (State::Blocked, "halted")),
        ("other", "no matching manifest for linux/amd64", (State::Blocked, "halted")),
    ] {
        lab.put("apps/web/image", &format!("localhost:{}/{name}/app:v2", registry.address.port()));
        let app = lab.wait_app("web", &format!("held up: {part}"), |s| {
            s.state == state && s.is(kind) && s.reason.to_lowercase().contains(part)
        });
        assert!(app.healthy > 0, "{name}: {app:?}");
        assert_eq!(app.verdict.is_some(), kind == "halted", "{name}: {app:?}");
    }
    // Another try asks again.
    let before = asked.load(Relaxed);
    let (code, _, err) = lab.ask(&["retry", "web", "--timeout", "30s"]);
    assert_eq!(code, 3, "{err}");
    assert!(asked.load(Relaxed) > before, "the registry was not asked again");
    lab.deploy("web", "apps/web/image", &lab.image("v3"));
    let tally = load.stop();
    assert_eq!(tally.failed, 0, "{:#?}", tally.reasons);
}
