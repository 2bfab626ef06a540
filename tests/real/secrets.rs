//! Values of variables reach the container unchanged, and nothing else.

use std::{fs, os::unix::fs::PermissionsExt as _};

use crate::support::{
    lab::{Lab, Setup},
    process::docker,
    receiver::Receiver,
    wait::until,
};
use demae::model::status::State;

const CANARY: &str = "canary-5f1e0c";

#[test]
fn secret_values_reach_the_container_and_nothing_else() {
    let receiver = Receiver::start(|_| 204);
    let sections = format!(
        "[webhook]\nurl = \"http://{}/\"\nevents = [\"step\", \"verdict\", \"block\", \"converged\"]\n",
        receiver.address
    );
    let setup = Setup { no_agent: true, top: "log = \"trace\"", sections: &sections, ..Setup::default() };
    let mut lab = Lab::with(&setup);
    lab.start_agent(&[("RUST_LOG", "trace")]);
    lab.put("env/web/KEY", &format!("-----BEGIN\n{CANARY} \"quoted\" $x\n-----END\n"));
    lab.put("env/common/SHARED", CANARY);
    lab.put("env/common/GREETING", "from-the-set");
    lab.put("env/web/GREETING", "from-the-app");
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", "env_from: [common]\n"));
    assert_eq!(
        lab.get("web.test", "/env?KEY").expect("an answer").1,
        format!("-----BEGIN\n{CANARY} \"quoted\" $x\n-----END\n")
    );
    assert_eq!(lab.get("web.test", "/env?GREETING").expect("an answer").1, "from-the-app");
    assert_eq!(lab.get("web.test", "/env?DEMAE_APP").expect("an answer").1, "web");

    let release = lab.app("web").and_then(|a| a.release).expect("a release");
    let file = lab.path(&format!("run/env/web/{release}/env"));
    assert_eq!(fs::metadata(&file).expect("an env-file").permissions().mode() & 0o777, 0o600);
    let text = fs::read_to_string(&file).expect("an env-file");
    assert!(
        text.contains(&format!("SHARED={CANARY}\n")) && text.contains("# KEY cannot be written to an env-file"),
        "{text}"
    );
    assert_eq!(
        docker(&["run", "--rm", "--env-file", &file.display().to_string(), "-e", "MOOD=exit", &lab.image("v1")]),
        "version v1 starts, mood `exit`"
    );

    // A failing release that prints its environment.
    lab.put("env/web/MOOD", CANARY);
    lab.wait_app("web", "converged", |s| s.state == State::Converged);
    lab.put("env/web/VERSION", CANARY);
    lab.put("env/web/LONG", &format!("{CANARY}{}", "y".repeat(5000)));
    lab.put("env/web/MOOD", "exit");
    let failed = lab.wait_app("web", "blocked", |s| s.state == State::Blocked && s.verdict.is_some());
    let tail = failed.verdict.expect("a verdict").log_tail;
    assert!(tail.contains("version *** starts"), "{tail}");

    let plan = lab.demae(&["plan"]);
    let events = lab.demae(&["events", "--no-follow"]);
    let delivered = || receiver.deliveries().into_iter().map(|t| t.body).collect::<String>();
    until("the verdict was delivered to the webhook", || delivered().contains("\"verdict\""));
    let (_, metrics) = crate::support::load::get(lab.metrics, "localhost", "/metrics").expect("metrics");
    let (_, status) = crate::support::load::get(lab.metrics, "localhost", "/status").expect("a status");
    for (what, text) in [
        ("the log", lab.agent_log()),
        ("metrics", metrics),
        ("status", status),
        ("events", String::from_utf8_lossy(&events.stdout).into_owned()),
        ("the webhook", delivered()),
        ("plan", String::from_utf8_lossy(&[plan.stdout, plan.stderr].concat()).into_owned()),
        (
            "labels",
            docker(&[
                "ps",
                "-a",
                "--filter",
                &format!("label=demae.host={}", lab.host),
                "--format",
                "{{.Labels}} {{.Names}}",
            ]),
        ),
    ] {
        assert!(!text.is_empty(), "{what} is empty");
        assert!(!text.contains(CANARY), "{what} contains a value");
    }
    assert!(lab.agent_log().contains("\"DEBUG\""), "the log is at its most verbose level");
    until("env-files of old releases are removed", || lab.traces().iter().filter(|t| t.ends_with("/env")).count() <= 3);
}
