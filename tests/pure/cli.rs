//! The command line, without any other process.
#![expect(clippy::disallowed_methods, reason = "a test starts the program and writes files of its own")]

use std::{fs, process::Command};

fn demae(args: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_demae"))
        .args(args)
        .env_remove("ETCDCTL_ENDPOINTS")
        .output()
        .expect("demae runs");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

#[test]
fn validate_reports_every_problem_with_its_position() {
    let dir = tempfile::tempdir().expect("a directory");
    let (good, bad) = (dir.path().join("good.yaml"), dir.path().join("bad.yaml"));
    fs::write(&good, "image: web:v1\n").expect("a file");
    fs::write(&bad, "image: web:v1\nimagee: x\nstop_grace_period: soon\n").expect("a file");
    let (code, out, _) = demae(&["validate", &good.display().to_string()]);
    assert_eq!((code, out), (0, format!("{}: fine\n", good.display())));
    let (code, out, _) = demae(&["validate", &good.display().to_string(), &bad.display().to_string()]);
    assert_eq!(code, 1);
    assert!(out.contains("bad.yaml:2:1: `imagee`: unknown key (did you mean `image`?)"), "{out}");
    assert!(out.contains("bad.yaml:3:20: `stop_grace_period`: `soon` is not a duration"), "{out}");
}

#[test]
fn the_shipped_examples_are_valid() {
    let examples = format!("{}/deploy/examples", env!("CARGO_MANIFEST_DIR"));
    let mut files: Vec<String> =
        fs::read_dir(examples).expect("examples").map(|f| f.expect("a file").path().display().to_string()).collect();
    files.retain(|f| f.ends_with(".yaml"));
    assert!(!files.is_empty());
    let args: Vec<&str> = std::iter::once("validate").chain(files.iter().map(String::as_str)).collect();
    let (code, out, err) = demae(&args);
    assert_eq!(code, 0, "{out}{err}");
}

#[test]
fn schema_is_json() {
    let (code, out, _) = demae(&["schema"]);
    let schema: serde_json::Value = serde_json::from_str(&out).expect("it is JSON");
    assert_eq!((code, schema["type"].as_str()), (0, Some("object")));
}

#[test]
fn errors_have_distinct_exit_codes() {
    assert_eq!(demae(&["nonsense"]).0, 64, "a wrong command line");
    assert_eq!(demae(&["--help"]).0, 0);
    let (code, _, err) = demae(&["plan", "--config", "/nonexistent/agent.toml"]);
    assert_eq!(code, 1);
    assert!(err.starts_with("error: cannot read `/nonexistent/agent.toml`"), "{err}");
    let (code, _, err) =
        demae(&["status", "--agent", "http://127.0.0.1:1", "--endpoints", "127.0.0.1:1", "--dial-timeout", "500ms"]);
    assert_eq!(code, 75, "try again later: {err}");
    assert!(err.contains("no agent answers at 127.0.0.1:1"), "{err}");
}
