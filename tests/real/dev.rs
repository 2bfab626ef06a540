//! `demae dev`, and the README's five minutes with it.
#![expect(clippy::disallowed_methods, reason = "a test runs programs and writes files of its own")]

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use crate::support::{
    images,
    lab::{Lab, Setup},
    load,
    process::docker,
    wait::until,
};

/// Kills what `dev` leaves running if a test ends early.
struct Leftovers<'d>(&'d Path);

impl Drop for Leftovers<'_> {
    fn drop(&mut self) {
        let pids = Command::new("pgrep").args(["-f", &self.0.display().to_string()]).output().expect("pgrep runs");
        for pid in String::from_utf8_lossy(&pids.stdout).lines() {
            // It may have exited with another.
            let _ = Command::new("kill").arg(pid).stderr(Stdio::null()).status();
        }
        let file = fs::read_to_string(self.0.join("agent.toml")).unwrap_or_default();
        let Some(host) = file.split('"').nth(1) else { return };
        let ids = docker(&["ps", "-aq", "--filter", &format!("label=demae.host={host}")]);
        for id in ids.lines() {
            docker(&["rm", "-fv", id]);
        }
    }
}

/// What `dev` says that commands need.
fn environment(dir: &Path) -> Vec<(String, String)> {
    let text = fs::read_to_string(dir.join("dev.env")).expect("a file");
    let pairs = text.lines().filter_map(|line| line.trim_start_matches("export ").split_once('='));
    pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

/// The commands of the README's section about two hosts, without those that build and start demae itself.
fn commands() -> Vec<String> {
    let readme = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).expect("the README");
    let section = readme.split("\n## ").find(|section| section.starts_with("Five minutes")).expect("the section");
    let blocks = section.split("```sh\n").skip(2).map(|rest| rest.split("```").next().expect("its end"));
    blocks.flat_map(str::lines).map(str::to_owned).collect()
}

/// What differs from run to run, by what it is.
fn normalised(text: &str) -> String {
    let is_hex = |word: &str, digits: usize| {
        word.len() == digits && word.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    };
    let mut out = String::new();
    for line in text.lines() {
        let mut words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        for at in 0..words.len() {
            let is_number = words[at].parse::<f64>().is_ok();
            let next = words.get(at + 1).map(String::as_str);
            if is_hex(&words[at], 12) {
                words[at] = "RELEASE".to_owned();
            } else if is_hex(words[at].trim_end_matches(')'), 8) {
                words[at] = "DIGEST)".to_owned();
            } else if words[at].starts_with("dev-") {
                words[at] = "HOST".to_owned();
            } else if is_number && matches!(next, Some("s" | "ms" | "min")) {
                words[at] = "N".to_owned();
                words[at + 1] = "s".to_owned();
            } else if words[at].ends_with(')') && at > 0 && words[at - 1] == "(revision" {
                words[at] = "N)".to_owned();
            }
        }
        // Columns are as wide as what is in them.
        words.retain(|word| !word.is_empty());
        out.push_str(&words.join(" "));
        out.push('\n');
    }
    out
}

#[test]
fn five_minutes_of_the_readme_are_as_printed() {
    let lab = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    let dir = lab.path("dev");
    fs::create_dir(&dir).expect("a directory");
    let (_first, _second) = (Leftovers(&dir), Leftovers(&dir.join("host2")));
    let image = images::Whoami::new(&lab.tag, &lab.path("whoami"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_demae"));
    command.args(["dev", "--hosts", "2", "--dir"]).arg(&dir).stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(fs::File::create(lab.path("dev.log")).expect("a log"));
    let mut dev = command.spawn().expect("it starts");
    until("dev is up", || dir.join("dev.env").exists());

    let mut script = String::new();
    for line in commands() {
        let shown = line.replace('\'', "'\\''");
        // The directory is this test's own, and the image is made here, where there is no registry.
        let line = line.replace("/tmp/demae", &dir.display().to_string()).replace("traefik/whoami", &image.name);
        script.push_str(&format!("echo '$ {shown}'\n{{ {line}\n}} 2>>err.log\ncode=$?\n"));
        script.push_str("[ $code = 0 ] || echo \"(exit code $code)\"\n");
    }
    let programs = Path::new(env!("CARGO_BIN_EXE_demae")).parent().expect("a directory").display();
    let mut bash = Command::new("bash");
    bash.args(["-c", &script]).current_dir(lab.path(".")).env("PATH", format!("{programs}:/usr/bin:/bin"));
    let output = bash.env("DEMAE_BY", "you").stdin(Stdio::null()).output().expect("bash runs");
    let errors = fs::read_to_string(lab.path("err.log")).unwrap_or_default();
    let text = String::from_utf8_lossy(&output.stdout).replace(&image.name, "traefik/whoami");
    println!("{errors}");
    expect_test::expect_file!["../golden/five-minutes.txt"].assert_eq(&normalised(&text));

    assert!(Command::new("kill").args(["-INT", &dev.id().to_string()]).status().expect("kill runs").success());
    assert!(dev.wait().expect("it ends").success());
    assert_eq!(fs::read_dir(&dir).expect("a directory").count(), 0, "files are left");
}

#[test]
fn dev_starts_resumes_and_cleans_up() {
    let lab = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    let dir = lab.path("dev");
    let start = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_demae"));
        command.arg("dev").arg("--dir").arg(&dir).stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(fs::File::options().create(true).append(true).open(lab.path("dev.log")).expect("a log"));
        command.spawn().expect("it starts")
    };
    fs::create_dir(&dir).expect("a directory");
    let _leftovers = Leftovers(&dir);
    fs::write(dir.join("precious"), "").expect("a file");
    assert!(!start().wait().expect("it ends").success(), "a directory with files of others is refused");
    fs::remove_file(dir.join("precious")).expect("it still exists");
    let mut dev = start();
    until("dev is up", || dir.join("dev.env").exists());
    assert!(!start().wait().expect("it ends").success(), "two cannot share a directory");
    assert!(dir.join("dev.env").exists(), "the second one removes nothing of the first");
    let env = environment(&dir);
    let get = |name: &str| env.iter().find(|(k, _)| k == name).map(|(_, v)| v.clone()).expect("a variable");
    let ingress = get("DEMAE_INGRESS").trim_start_matches("http://").parse().expect("an address");
    let put = |key: &str, value: &str| {
        let mut etcdctl = Command::new("etcdctl");
        etcdctl.envs(env.iter().cloned()).args(["put", &format!("/demae/{key}"), value]).stdout(Stdio::null());
        assert!(etcdctl.status().expect("etcdctl runs").success());
    };
    let serves = |word: &str| load::get(ingress, "web.test", "/").is_ok_and(|(_, body)| body.contains(word));
    put("apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    until("it serves", || serves("version=v1"));
    // While nginx reloads, workers without the app may still answer.
    until("the status says that it has converged", || {
        let mut status = Command::new(env!("CARGO_BIN_EXE_demae"));
        let status = status.arg("status").envs(env.iter().cloned()).output().expect("it runs");
        String::from_utf8_lossy(&status.stdout).lines().any(|l| l.contains("web") && l.contains("converged"))
    });

    // A killed `dev` leaves everything serving; started again, it continues.
    dev.kill().expect("killed");
    dev.wait().expect("it ends");
    assert!(serves("version=v1"), "the app is still served");
    let mut dev = start();
    put("apps/web/image", &lab.image("v2"));
    until("the change is served", || serves("version=v2"));

    let host = fs::read_to_string(dir.join("agent.toml")).expect("a file");
    let host = host.split('"').nth(1).expect("a host").to_owned();
    let processes = || {
        let output = Command::new("pgrep").args(["-f", &dir.display().to_string()]).output().expect("pgrep runs");
        String::from_utf8_lossy(&output.stdout).lines().filter(|p| Path::new(&format!("/proc/{p}")).exists()).count()
    };
    assert!(processes() >= 3);
    assert!(Command::new("kill").args(["-INT", &dev.id().to_string()]).status().expect("kill runs").success());
    assert!(dev.wait().expect("it ends").success());
    assert_eq!(docker(&["ps", "-aq", "--filter", &format!("label=demae.host={host}")]), "", "containers are left");
    assert_eq!(processes(), 0, "processes are left");
    assert_eq!(fs::read_dir(&dir).expect("a directory").count(), 0, "files are left");
}
