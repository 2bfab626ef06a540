//! What a registry answers instead of an image: each answer holds up the change, is reported as what it is, and takes no
//! request from what serves.

use std::time::Duration;

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
    let registry = Server::start(|path| {
        let (status, head, body) = answer(path);
        Answer::new(status, head, body)
    });
    let load = Load::start(lab.ingress, "web.test", load::mixed(Duration::from_millis(2)));
    for (name, part, needs_a_person) in [
        ("login", "unauthorized", true),
        ("denied", "denied", true),
        ("missing", "manifest unknown", true),
        ("other", "no matching manifest for linux/amd64", true),
        ("busy", "toomanyrequests", false),
        ("broken", "502", false),
    ] {
        lab.put("apps/web/image", &format!("localhost:{}/{name}/app:v2", registry.address.port()));
        let (state, kind) =
            if needs_a_person { (State::Blocked, "image_missing") } else { (State::Converging, "image") };
        let app = lab.wait_app("web", &format!("held up: {part}"), |s| {
            s.state == state && s.is(kind) && s.reason.to_lowercase().contains(part)
        });
        assert!(app.healthy > 0 && needs_a_person == app.is("image_missing"), "{name}: {app:?}");
    }
    lab.deploy("web", "apps/web/image", &lab.image("v3"));
    let tally = load.stop();
    assert_eq!(tally.failed, 0, "{:#?}", tally.reasons);
}
