//! Verbs about one app: its variables, its releases, its evidence, its end.
#![allow(clippy::disallowed_methods, reason = "a test runs programs")]

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    process::{Command, Output, Stdio},
};

use demae::model::status::State;
use serde_json::Value;

use crate::support::{lab::Lab, wait::until};

/// The exit code and the two outputs of a command, which gets this text on standard input.
fn run_with(lab: &Lab, args: &[&str], input: &str) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_demae"));
    command.args(args).env("DEMAE_CONFIG", lab.path("agent.toml")).env_remove("ETCDCTL_ENDPOINTS");
    command.env("DEMAE_CONTEXTS", lab.path("contexts.toml")).env("DEMAE_BY", "alice");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("demae runs");
    // A command that reads nothing may have ended.
    let _ = child.stdin.take().expect("a pipe").write_all(input.as_bytes());
    let Output { status, stdout, stderr } = child.wait_with_output().expect("it ends");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (status.code().unwrap_or(-1), text(&stdout), text(&stderr))
}

fn run(lab: &Lab, args: &[&str]) -> (i32, String, String) {
    run_with(lab, args, "")
}

/// What a command prints that succeeds.
fn told(lab: &Lab, args: &[&str]) -> String {
    let (code, out, err) = run(lab, args);
    assert_eq!(code, 0, "{args:?}: {out}{err}");
    out
}

fn json(lab: &Lab, args: &[&str]) -> Value {
    let out = told(lab, args);
    serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}"))
}

/// The variable of this name in the list of an app.
fn listed(lab: &Lab, name: &str) -> Value {
    let all = json(lab, &["env", "list", "web", "--values", "-o", "json"]);
    let all = all["variables"].as_array().expect("a list").clone();
    all.into_iter().find(|variable| variable["name"] == name).unwrap_or(Value::Null)
}

/// An app that serves its first release.
fn serving() -> (Lab, String) {
    let lab = Lab::new();
    let spec = lab.socket_spec(&lab.image("v1"), "web.test", "");
    lab.deploy("web", "apps/web/spec", &spec);
    (lab, spec)
}

#[test]
fn variables_are_set_together_and_listed_without_their_values() {
    let (lab, _) = serving();
    // Several in one release, from three sources.
    fs::write(lab.path("token"), "from a file\n").expect("a file");
    let file = format!("TOKEN=@{}", lab.path("token").display());
    let before = json(&lab, &["history", "web", "-o", "json"])["releases"].as_array().map_or(0, Vec::len);
    let (code, out, err) = run_with(&lab, &["env", "set", "web", "GREETING=hello", &file, "PIPED=-"], "from a pipe\n");
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.starts_with("web ") && out.contains("converged on 1 host"), "{out}");
    let after = json(&lab, &["history", "web", "-o", "json"])["releases"].as_array().map_or(0, Vec::len);
    assert_eq!(after, before + 1, "they are one release");
    for (name, value) in [("GREETING", "hello"), ("TOKEN", "from a file"), ("PIPED", "from a pipe")] {
        let found = listed(&lab, name);
        assert_eq!(
            (&found["value"], &found["from"], &found["deployed"]),
            (&value.into(), &"env/web/".into(), &1.into())
        );
    }
    let list = told(&lab, &["env", "list", "web"]);
    assert!(list.contains("GREETING") && list.contains("1/1") && !list.contains("hello"), "{list}");

    // What is written and not deployed is told apart; a pause keeps it so.
    told(&lab, &["pause", "web", "moving the database"]);
    lab.wait_app("web", "paused", |s| s.state == State::Paused && s.reason.contains("moving the database"));
    let (code, out, err) = run(&lab, &["env", "set", "web", "GREETING=later"]);
    assert_eq!(code, 4, "a person must act: {out}{err}");
    assert_eq!(listed(&lab, "GREETING")["deployed"], 0);
    assert!(told(&lab, &["env", "list", "web"]).contains("staged"));
    told(&lab, &["resume", "web"]);
    told(&lab, &["wait", "web"]);
    assert_eq!(listed(&lab, "GREETING")["deployed"], 1);

    // What is exported can be imported, whatever is in it.
    let odd = "it's \"odd\" $HOME \\n # no comment\nsecond line";
    let (code, _, err) = run_with(&lab, &["env", "set", "web", "ODD=-"], odd);
    assert_eq!(code, 0, "{err}");
    let exported = told(&lab, &["env", "export", "web"]);
    told(&lab, &["env", "unset", "web", "ODD", "TOKEN", "PIPED"]);
    assert_eq!(listed(&lab, "ODD"), Value::Null);
    let (code, _, err) = run_with(&lab, &["env", "import", "web"], &exported);
    assert_eq!(code, 0, "{err}");
    assert_eq!(listed(&lab, "ODD")["value"], odd);

    // What is wrong is refused as a whole, and its values are not printed.
    let revision = lab.get_key("env/web/GREETING");
    for (args, input, code, why) in [
        (&["env", "set", "web", "GREETING=x", "hidden"][..], "", 64, "NAME=VALUE"),
        (&["env", "set", "web", "GREETING=x", "GREETING=y"], "", 64, "twice"),
        (&["env", "set", "web", "GREETING=x", "--set", "common"], "", 1, "does not use the set `common`"),
        (&["env", "set", "nowhere", "GREETING=x"], "", 1, "no app `nowhere`"),
        (&["env", "unset", "web", "ABSENT"], "", 1, "has no variable ABSENT"),
        (&["env", "import", "web"], "GREETING=x\nhidden words\n", 1, "-:2:"),
        (&["env", "import", "web"], "# nothing\n", 1, "has no variables"),
        (&["env", "export", "web", "--format", "docker"], "", 1, "ODD has a line break"),
    ] {
        let (ended, out, err) = run_with(&lab, args, input);
        assert_eq!((ended, out.as_str()), (code, ""), "{args:?}: {err}");
        assert!(err.contains(why) && !err.contains("hidden"), "{args:?}: {err}");
    }
    assert_eq!(lab.get_key("env/web/GREETING"), revision, "nothing was written");
}

#[test]
fn releases_are_told_compared_and_explained() {
    let (lab, spec) = serving();
    let first =
        json(&lab, &["history", "web", "-o", "json"])["releases"][0]["release"].as_str().expect("one").to_owned();
    let v2 = lab.image("v2");
    let (code, out, err) = run(&lab, &["deploy", "web", &v2, "--env", "MOOD=exit", "-m", "a try"]);
    assert_eq!(code, 3, "{out}{err}");

    // Who wanted it, and what became of it.
    let releases = json(&lab, &["history", "web", "-o", "json"])["releases"].clone();
    let bad = &releases[0];
    assert_eq!((&bad["by"], &bad["wanted"]), (&"alice: a try".into(), &true.into()), "{releases}");
    assert_eq!(bad["image"], v2.as_str());
    assert!(bad["reason"].as_str().is_some_and(|why| why.contains("exit code")), "{releases}");
    assert_eq!((&releases[1]["release"], &releases[1]["result"]), (&first.as_str().into(), &"proven".into()));
    assert_eq!(releases[1]["by"], Value::Null, "a plain put names nobody");
    let table = told(&lab, &["history", "web"]);
    assert!(table.contains("alice: a try") && table.contains(&first), "{table}");

    // The evidence, on standard output.
    let (code, out, err) = run(&lab, &["logs", "web", "--failed"]);
    assert_eq!(code, 0, "{err}");
    assert!(out.starts_with(&format!("{} │ ", lab.host)) && err.contains("exit code"), "{out}{err}");
    // What runs prints on its own host, over a deploy.
    let out = told(&lab, &["logs", "web", "-n", "1"]);
    assert!(out.starts_with(&first) && out.contains("│ version v1 starts"), "{out}");
    let (code, _, err) = run(&lab, &["logs", "none"]);
    assert!(code == 1 && err.contains("no container of `none`"), "{err}");
    // One app is a card: what is wanted and serves, why, and what to type next.
    let card = told(&lab, &["status", "--fleet", "web"]);
    for line in
        ["App:       web", "By:        alice: a try, ", "Rollout:   reverted, ", "Next:      demae logs web --failed"]
    {
        assert!(card.lines().any(|shown| shown.starts_with(line)), "{line}: {card}");
    }
    assert!(card.contains(&format!("Serving:   {first} on 1 of 1 hosts")) && card.contains("Evidence:  "), "{card}");
    // The host itself says the same, and what serves.
    let status = lab.wait_app("web", "halted", |s| s.is("halted") && s.verdict.is_some());
    assert_eq!((status.state, status.serving.as_deref()), (State::Blocked, Some(first.as_str())));

    // What differs, without the values.
    let (code, out, err) = run(&lab, &["diff", "web"]);
    assert_eq!(code, 2, "{err}");
    assert!(out.contains(&format!("+ image: {v2}")) && out.contains("+ env/web/MOOD (4 bytes, "), "{out}");
    let (code, out, _) = run(&lab, &["diff", "web", &first, &first]);
    assert_eq!((code, out.as_str()), (0, ""));
    let (code, _, err) = run(&lab, &["diff", "web", "000000000000"]);
    assert!(code == 1 && err.contains("is no release of web that is kept"), "{err}");

    // A spec from a file: first only what would change, then the change.
    let dir = lab.path("specs");
    fs::create_dir(&dir).expect("a directory");
    let spec = spec.replace("app.sock}", "app.sock, MOOD: well}");
    fs::write(dir.join("web.yaml"), spec).expect("a file");
    let dir = dir.display().to_string();
    told(&lab, &["env", "unset", "web", "MOOD"]);
    let (code, out, err) = run(&lab, &["apply", "-f", &dir, "--dry-run"]);
    assert_eq!(code, 2, "{err}");
    assert!(out.contains("MOOD: well") && err.contains("1 of 1 apps would change"), "{out}{err}");
    let out = told(&lab, &["apply", "-f", &dir, "-m", "as in the repository"]);
    assert!(out.contains("converged on 1 host"), "{out}");
    let (code, out, err) = run(&lab, &["apply", "-f", &dir, "--dry-run"]);
    assert_eq!((code, out.as_str()), (0, ""), "{err}");
    let (code, _, err) = run_with(&lab, &["apply", "-f", "-", "--app", "web"], "imagee: x\n");
    assert!(code == 1 && err.contains("`web` would be invalid; nothing was written"), "{err}");

    // Its end is asked for twice, and waited for.
    let (code, _, err) = run(&lab, &["delete", "web"]);
    assert!(code == 1 && err.contains("--yes"), "{err}");
    let (code, out, err) = run(&lab, &["delete", "web", "--yes", "--env"]);
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.starts_with("web is removed"), "{out}");
    assert!(lab.containers().is_empty());
    assert_eq!(lab.get_key("apps/web/image"), "");
    let left: Vec<String> = ["state/", "secret/releases/"].iter().flat_map(|place| lab.list(place)).collect();
    assert!(!left.iter().any(|key| key.split('/').any(|word| word == "web")), "{left:?}");
}

#[test]
fn contexts_name_stores() {
    let (lab, _) = serving();
    let text = format!(
        "[lab]\nendpoints = [\"{0}\"]\n[prod]\nendpoints = [\"{0}\"]\nconfirm = true\n[away]\nendpoints = [\"127.0.0.1:1\"]\n",
        lab.etcd
    );
    fs::write(lab.path("contexts.toml"), text).expect("a file");
    until("the status of the fleet is published", || {
        told(&lab, &["status", "--context", "lab", "web"]).contains("1/1")
    });
    told(&lab, &["env", "list", "web", "--context", "prod"]);
    let (code, _, err) = run(&lab, &["env", "set", "web", "A=1", "--context", "prod"]);
    assert!(code == 1 && err.contains("is to be confirmed by its name"), "{err}");
    let (code, _, err) = run(&lab, &["env", "list", "web", "--context", "away"]);
    assert_eq!(code, 75, "{err}");
    let (code, _, err) = run(&lab, &["env", "list", "web", "--context", "test"]);
    assert!(code == 1 && err.contains("there is no context `test`; these are: away, lab, prod"), "{err}");
    let (code, _, err) = run(&lab, &["env", "list", "web", "--context", "lab", "--endpoints", "127.0.0.1:1"]);
    assert!(code == 64 && err.contains("`--endpoints`"), "{err}");
}

/// These changes make no release, so the release alone does not say that they are done.
#[test]
fn changes_that_make_no_release_are_waited_for() {
    let (lab, spec) = serving();
    let release = lab.app("web").and_then(|app| app.release);
    // Output is followed over a deploy.
    let first = release.clone().expect("a release");
    let mut follow = Command::new(env!("CARGO_BIN_EXE_demae"));
    follow.args(["logs", "-f", "web"]).env("DEMAE_CONFIG", lab.path("agent.toml")).stdout(Stdio::piped());
    let mut follow = follow.spawn().expect("demae runs");
    let mut lines = BufReader::new(follow.stdout.take().expect("a pipe")).lines();
    let mut next = move || lines.next().expect("a line").expect("it is text");
    assert!(next().starts_with(&first));
    told(&lab, &["redeploy", "web"]);
    assert!(!next().starts_with(&first), "the new container is followed");
    follow.kill().expect("it runs");
    follow.wait().expect("it ends");
    let release = lab.app("web").and_then(|app| app.release);
    told(&lab, &["scale", "web", "3"]);
    let status = lab.app("web").expect("a status");
    assert_eq!((status.healthy, status.wanted, lab.containers().len()), (3, 3, 3));
    assert_eq!(status.release, release);
    assert_eq!(lab.get_key("apps/web/spec"), format!("{spec}deploy:\n  replicas_per_host: 3").trim_end());
    told(&lab, &["scale", "web", "1"]);
    assert_eq!(lab.containers().len(), 1);
    let (code, _, err) = run(&lab, &["scale", "web", "101"]);
    assert_eq!(code, 64, "{err}");

    let file = lab.path("web.yaml");
    for host in ["other.test", "third.test", "fourth.test"] {
        fs::write(&file, spec.replace("web.test", host)).expect("a file");
        told(&lab, &["apply", "-f", &file.display().to_string(), "--yes"]);
        assert_eq!(lab.get(host, "/").map(|(code, _)| code), Ok(200), "nginx serves it when the command ends");
    }

    let store = json(&lab, &["store", "status", "-o", "json"]);
    assert_eq!((&store["apps"], &store["leader"]), (&Value::from(1), &Value::from(lab.host.as_str())));
    let member = &store["members"][0];
    assert_eq!((&member["leader"], &member["problems"]), (&Value::from(true), &Value::Array(Vec::new())));
    let text = told(&lab, &["store", "status"]);
    assert!(text.contains(&format!("1 of {}", env!("CARGO_PKG_VERSION"))), "{text}");

    // Apps without a file are deleted only if that is asked for, and confirmed.
    let dir = lab.path("specs");
    fs::create_dir(&dir).expect("a directory");
    fs::write(dir.join("shop.yaml"), spec.replace("web.test", "shop.test")).expect("a file");
    let dir = dir.display().to_string();
    let apply = |more: &[&str]| run(&lab, &[&["apply", "-f", &dir], more].concat());
    assert_eq!(apply(&["--prune", "--dry-run"]).0, 2);
    assert_eq!(apply(&["--prune"]).0, 1, "without a terminal it is not confirmed");
    assert_eq!(apply(&["--yes"]).0, 0);
    assert_eq!(lab.containers().len(), 2);
    // A file that cannot be read is not an app without a file.
    let broken = lab.path("specs/web.yaml");
    std::os::unix::fs::symlink("nowhere", &broken).expect("a link");
    let (code, out, err) = apply(&["--prune", "--yes"]);
    assert!(code == 1 && err.contains("web.yaml"), "{out}{err}");
    fs::remove_file(broken).expect("removed");
    assert_eq!(lab.containers().len(), 2);
    // A spec that is repaired leads to the release that runs, and no rollout is opened for it.
    told(&lab, &["apply", "-f", &dir, "--yes"]);
    lab.put("apps/shop/spec", "image: [");
    let (code, out, err) = apply(&["--yes", "--timeout", "30s"]);
    assert_eq!(code, 0, "{out}{err}");
    let (code, out, err) = apply(&["--prune", "--yes"]);
    assert!(code == 0 && out.contains("web is removed"), "{out}{err}");
    assert_eq!((lab.containers().len(), lab.get("shop.test", "/").map(|(code, _)| code)), (1, Ok(200)));
    assert_eq!(run(&lab, &["apply", "-f", &file.display().to_string(), "--prune"]).0, 64);

    told(&lab, &["delete", "shop", "--yes"]);
    assert_eq!(lab.containers().len(), 0, "its containers are gone when the command ends");
    // Also one of which no host has said anything yet.
    let image = lab.image("v1");
    let file = lab.path("specs/shop.yaml").display().to_string();
    told(&lab, &["deploy", "late", &image, "--spec", &file, "--detach"]);
    told(&lab, &["delete", "late", "--yes"]);
    assert!(lab.containers().is_empty() && lab.lists_no("late"));
    assert_eq!(run(&lab, &["delete", "late", "--yes"]).0, 1, "it is gone");
    // Members are shown where nothing else is.
    let (code, out, err) = run(&lab, &["store", "status", "--prefix", "/none"]);
    assert!(code == 1 && out.contains("yes"), "{out}{err}");
}
