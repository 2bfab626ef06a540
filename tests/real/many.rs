//! Many apps at once, and an idle agent after them.
#![expect(
    clippy::disallowed_methods,
    reason = "a test prints its figures, and runs programs and writes files of its own"
)]

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use crate::support::{
    lab::{Lab, Setup},
    process::docker,
    wait::until,
};

#[test]
fn fifty_apps_converge_then_idle_writes_nothing_then_all_are_removed() {
    let lab = Lab::with(&Setup { top: "resync = \"1s\"", ..Setup::default() });
    let image = lab.image("v1");
    let count = 50;
    let spec = |n: usize| lab.socket_spec(&image, &format!("app{n}.test"), "network_mode: none\n");
    let all: Vec<(String, String)> = (0..count).map(|n| (format!("apps/app{n}/spec"), spec(n))).collect();
    let before = lab.metric("demae_nginx_reloads_total", "done");
    lab.put_all(&all);
    let status = lab.wait_converged(lab.revision());
    assert_eq!(status.apps.len(), count);
    let reloads = lab.metric("demae_nginx_reloads_total", "done") - before;
    println!("{count} apps converged with {reloads} reloads");
    assert!(reloads <= 3.0, "{reloads} reloads");
    for n in [0, 17, count - 1] {
        assert_eq!(lab.get(&format!("app{n}.test"), "/").expect("an answer").0, 200);
    }

    // With nothing to do, the agent resyncs and writes nothing anywhere.
    let state = || (lab.revision(), files(lab.dir.path()), nginx_workers(&lab));
    until("the last status is published", || {
        let first = lab.revision();
        let lists = lab.metric("demae_docker_lists_total", "");
        until("two full lists of containers", || lab.metric("demae_docker_lists_total", "") >= lists + 2.0);
        lab.revision() == first
    });
    let since = docker(&["info", "--format", "{{.SystemTime}}"]);
    let (quiet, lists) = (state(), lab.metric("demae_docker_lists_total", ""));
    until("four full lists of containers", || lab.metric("demae_docker_lists_total", "") >= lists + 4.0);
    let now = docker(&["info", "--format", "{{.SystemTime}}"]);
    let later = state();
    let output = Command::new("etcdctl")
        .env("ETCDCTL_API", "3")
        .args([
            "--endpoints",
            &lab.etcd.to_string(),
            "get",
            "--prefix",
            "--order",
            "DESCEND",
            "--sort-by",
            "MODIFY",
            "--limit",
            "1",
            "/demae/",
        ])
        .output()
        .expect("etcdctl runs");
    assert_eq!(quiet.0, later.0, "the store was written: {}", String::from_utf8_lossy(&output.stdout));
    assert!(quiet.1 == later.1, "files were written though there was nothing to do");
    assert_eq!(quiet.2, later.2, "nginx was reloaded though there was nothing to do");
    let filter = format!("label=demae.host={}", lab.host);
    let events =
        docker(&["events", "--since", &since, "--until", &now, "--filter", &filter, "--format", "{{.Action}}"]);
    assert_eq!(events, "", "Docker was called");

    // Removing all of them at once triggers the brake.
    lab.del("apps/");
    until("the removal is held back", || lab.status().is_some_and(|s| s.store.block.is_some()));
    let confirm = lab.demae(&["confirm", "--yes"]);
    assert!(confirm.status.success(), "{}", String::from_utf8_lossy(&confirm.stderr));
    until("no container is left", || lab.containers().is_empty());
    until("no file is left", || lab.traces().is_empty());
    until("nginx serves no app", || {
        !fs::read_dir(lab.path("state/nginx/live/"))
            .is_ok_and(|mut d| d.any(|f| f.is_ok_and(|f| f.file_name().to_string_lossy().starts_with("app-"))))
    });
    assert_eq!(lab.get("app0.test", "/").expect("an answer").0, 404);
    until("the published statuses are removed", || {
        let output = Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .args(["--endpoints", &lab.etcd.to_string(), "get", "--prefix", "--keys-only", "/demae/state/apps/"])
            .output()
            .expect("etcdctl runs");
        output.stdout.is_empty()
    });
}

/// Every file of demae with its modification time.
fn files(dir: &Path) -> BTreeMap<String, std::time::SystemTime> {
    let mut found = BTreeMap::new();
    let mut todo = vec![dir.join("state"), dir.join("run")];
    while let Some(path) = todo.pop() {
        let meta = fs::symlink_metadata(&path).expect("it exists");
        found.insert(path.display().to_string(), meta.modified().expect("a time"));
        if meta.is_dir() {
            todo.extend(fs::read_dir(&path).expect("a directory").map(|e| e.expect("an entry").path()));
        }
    }
    found
}

fn nginx_workers(lab: &Lab) -> String {
    let master = fs::read_to_string(lab.path("nginx.pid")).expect("nginx runs").trim().to_owned();
    fs::read_to_string(format!("/proc/{master}/task/{master}/children")).expect("its workers")
}
