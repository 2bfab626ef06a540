//! The roles in etcd that `deploy/etcd-roles.sh` makes: enough for an agent that leads the fleet, and not more than the
//! table in `docs/security.md` says.
#![expect(clippy::disallowed_methods, reason = "a test runs programs and reads files of its own")]

use std::{
    collections::BTreeSet,
    fs,
    process::{Command, Output},
};

use crate::{
    etcd_tls::{authority, certificate, secured},
    support::{
        etcd::Etcd,
        images::build_failing,
        lab::{Lab, Setup},
        names::free_address,
        wait::until,
    },
};
use demae::model::status::State;

/// A program with the variables by which etcdctl is this user: the name in its certificate.
pub fn with_user(lab: &Lab, program: &str, user: &str) -> Command {
    let at = |file: String| lab.path(&file).display().to_string();
    let mut command = Command::new(program);
    command.env("ETCDCTL_API", "3").env("ETCDCTL_ENDPOINTS", format!("https://{}", lab.etcd));
    command.env("ETCDCTL_CACERT", at("ca.crt".to_owned())).env("ETCDCTL_CERT", at(format!("{user}.crt")));
    command.env("ETCDCTL_KEY", at(format!("{user}.key")));
    command
}

fn etcdctl(lab: &Lab, user: &str, args: &[&str]) -> Output {
    with_user(lab, "etcdctl", user).args(args).output().expect("etcdctl runs")
}

fn as_root(lab: &Lab, args: &[&str]) {
    let output = etcdctl(lab, "root", args);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    // On some versions `root` has its role from the start.
    assert!(output.status.success() || text.contains("role name not found"), "{args:?}: {text}");
}

/// Whether this user may do that. Any other failure is one of the test.
fn may(lab: &Lab, user: &str, args: &[&str]) -> bool {
    let output = etcdctl(lab, user, args);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() || text.contains("permission denied"), "{user} {args:?}: {text}");
    output.status.success()
}

/// The table of the documentation: keys, and what each role may do with it.
fn table() -> (Vec<String>, Vec<(String, Vec<String>)>) {
    let page = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/security.md")).expect("the page");
    let cells = |line: &str| line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
    let mut lines = page.lines().skip_while(|line| !line.starts_with("| key |"));
    let roles = cells(lines.next().expect("the table"))[1..].to_vec();
    let rows = lines.skip(1).take_while(|line| line.starts_with('|')).map(cells);
    let rows = rows.map(|row| (row[0].trim_matches('`').to_owned(), row[1..].to_vec()));
    (roles, rows.collect())
}

/// Users beside that of the host of the lab.
const USERS: [&str; 5] = ["host-other", "leads", "deploy-web", "put-web", "team-web"];

/// A host whose agent has the rights of one that may lead, and an etcd with the roles of the script for the app `web`.
pub fn lab_with_roles(spec: impl Fn(&Lab) -> String) -> (Lab, Etcd) {
    let mut lab = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    lab.stop_etcd();
    let dir = lab.dir.path().to_owned();
    authority(&dir);
    let host = format!("host-{}", lab.host);
    for name in ["server", "root", &host].iter().chain(&USERS) {
        certificate(&dir, name);
    }
    let etcd = secured(&dir, lab.etcd, free_address());
    until("etcd answers", || etcdctl(&lab, "root", &["get", "x"]).status.success());
    as_root(&lab, &["put", "/demae/apps/web/spec", &spec(&lab)]);
    as_root(&lab, &["user", "add", "root", "--no-password"]);
    as_root(&lab, &["user", "grant-role", "root", "root"]);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/etcd-roles.sh");
    let own = lab.host.clone();
    let own = own.as_str();
    // The second time changes nothing.
    for _ in 0..2 {
        for args in
            [["host", own], ["host", "other"], ["lead", own], ["deploy", "web"], ["put", "web"], ["team", "web"]]
        {
            let output = with_user(&lab, script, "root").args(args).output().expect("it runs");
            assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
    }
    as_root(&lab, &["user", "add", "leads", "--no-password"]);
    as_root(&lab, &["user", "grant-role", "leads", "lead"]);
    as_root(&lab, &["auth", "enable"]);

    let at = dir.display();
    let with = format!(
        "endpoints = [\"https://{}\"]\ncacert = \"{at}/ca.crt\"\ncert = \"{at}/{host}.crt\"\nkey = \"{at}/{host}.key\"",
        lab.etcd
    );
    let config = fs::read_to_string(lab.path("agent.toml")).expect("a file");
    fs::write(lab.path("agent.toml"), config.replace(&format!("endpoints = [\"{}\"]", lab.etcd), &with))
        .expect("a file");
    lab.start_agent(&[]);
    (lab, etcd)
}

#[test]
fn roles_suffice_for_agents_and_have_the_documented_rights_and_no_others() {
    let (mut lab, _etcd) = lab_with_roles(|lab| {
        lab.socket_spec(&lab.image("v1"), "web.test", "deploy: {update_config: {monitor: 200ms}}\n")
    });
    let host = format!("host-{}", lab.host);

    // An agent with the rights of a host that may lead, and CI with its own: a good release, a bad one, and back.
    lab.wait_app("web", "converged", |a| a.state == State::Converged);
    let ci = |args: &[&str]| {
        let output = with_user(&lab, env!("CARGO_BIN_EXE_demae"), "deploy-web").args(args).output().expect("it runs");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (v2, bad) = (lab.image("v2"), format!("{}-bad", lab.image("v1")));
    build_failing(&bad, &lab.path("bad"));
    lab.remove_on_drop(bad.clone());
    for (code, args) in [
        (0, &["deploy", "web", &v2][..]),
        (3, &["deploy", "web", &bad]),
        (3, &["retry", "web"]),
        (0, &["rollback", "web"]),
        (0, &["redeploy", "web"]),
        (0, &["deploy", "web", &v2]),
        (1, &["env", "set", "web", "A=b"]),
        (1, &["scale", "web", "2"]),
        (1, &["delete", "web", "--yes"]),
    ] {
        let (found, err) = ci(args);
        // A pin is ended by a deploy, and not by a redeploy.
        let expected = if args[0] == "redeploy" { 1 } else { code };
        assert_eq!(found, Some(expected), "{args:?}: {err}");
    }
    let doctor = lab.demae(&["doctor"]);
    let doctor = String::from_utf8_lossy(&doctor.stdout).into_owned();
    assert!(doctor.contains("this host takes turns, and may be the leader"), "{doctor}");
    let rights = |lab: &Lab| {
        let doctor = String::from_utf8_lossy(&lab.demae(&["doctor"]).stdout).into_owned();
        doctor.lines().find(|line| line.contains(" rights ")).map(|line| line[..4].to_owned())
    };
    assert_eq!(rights(&lab).as_deref(), Some("ok  "));
    as_root(&lab, &["user", "grant-role", &host, "root"]);
    assert_eq!(rights(&lab).as_deref(), Some("warn"), "it may do more than an agent needs");
    as_root(&lab, &["user", "revoke-role", &host, "root"]);
    // So does one right too many, and it is named.
    for (key, what) in [("env/web/A", "variables"), ("freeze", "`freeze`")] {
        let (key, role) = (format!("/demae/{key}"), "more");
        let from = if what == "variables" { "/demae/env/" } else { key.as_str() };
        as_root(&lab, &["role", "add", role]);
        as_root(&lab, &["role", "grant-permission", "--prefix=true", role, "write", from]);
        as_root(&lab, &["user", "grant-role", &host, role]);
        let (_, out, _) = lab.ask(&["doctor"]);
        let line = out.lines().find(|line| line.contains(" rights ")).expect("a line");
        assert!(line.starts_with("warn") && line.contains(what) && !line.contains("spec"), "{line}");
        as_root(&lab, &["role", "delete", role]);
    }
    // Debian's etcd is older than what holds these rights against nested transactions.
    let is_old = |line: &&str| line.contains(" etcd ") && line.contains("etcd 3.4.");
    let (_, out, _) = lab.ask(&["doctor"]);
    assert!(out.lines().filter(is_old).all(|line| line.starts_with("warn")), "{out}");
    let log = lab.agent_log();
    assert!(!log.contains("permission denied"), "{log}");
    lab.kill_agent();

    // Every cell, of a host that does not lead.
    let (roles, rows) = table();
    assert_eq!(
        (roles.len(), rows.len()),
        (USERS.len(), rows.iter().map(|(key, _)| key).collect::<BTreeSet<_>>().len())
    );
    let mut wrong = Vec::new();
    for (key, cells) in &rows {
        let key = format!("/demae/{}", key.replace("web1", "other"));
        for (user, cell) in USERS.iter().zip(cells) {
            let reads = may(&lab, user, &["get", "--keys-only", &key]);
            let writes = may(&lab, user, &["put", &key, "x"]);
            let found = [if reads { "r" } else { "" }, if writes { "w" } else { "" }].concat();
            let found = if found.is_empty() { "-".to_owned() } else { found };
            if found != *cell {
                wrong.push(format!("{user} {key}: {found}, documented as {cell}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
