//! Mistakes in a host's own templates, or in nginx's other files, do not affect apps that are served.
#![expect(clippy::disallowed_methods, reason = "a test writes files of its own")]

use std::fs;

use crate::support::{
    lab::{Lab, Setup},
    load::{Client, Load},
    wait::until,
};
use demae::model::status::State;

/// The built-in template with an additional line.
fn template(line: &str) -> String {
    let text = include_str!("../../deploy/nginx/default.conf.hbs");
    text.replacen("    client_max_body_size", &format!("    {line}\n    client_max_body_size"), 1)
}

fn resyncing(nginx: &str) -> Setup<'_> {
    Setup { top: "resync = \"1s\"\n", nginx, ..Setup::default() }
}

#[test]
fn broken_or_missing_template_keeps_the_last_good_text_of_its_apps() {
    let mut lab = Lab::with(&Setup { no_agent: true, ..resyncing("") });
    let dir = lab.path("templates");
    fs::create_dir(&dir).expect("a directory");
    let write = |name: &str, line: &str| fs::write(dir.join(name), template(line)).expect("a file");
    write("default.conf.hbs", "add_header X-Template default;");
    write("own.conf.hbs", "add_header X-Template own;");
    lab.start_agent(&[]);
    let spec = |host: &str, more: &str| {
        lab.socket_spec(&lab.image("v1"), host, "").replace("drain: 10s", &format!("drain: 10s{more}"))
    };
    lab.deploy("plain", "apps/plain/spec", &spec("plain.test", ""));
    lab.deploy("own", "apps/own/spec", &spec("own.test", ", template: own"));
    let load: Vec<Load> = ["plain.test", "own.test"]
        .map(|host| Load::start(lab.ingress, host, vec![Client::get(false)]))
        .into_iter()
        .collect();
    let ingress = lab.ingress;
    let template_of = move |host: &str| {
        let answer = crate::support::http::get(ingress, host, "/", "");
        answer.head.lines().find_map(|l| l.strip_prefix("X-Template: ")).unwrap_or("none").to_owned()
    };

    // An unknown directive, in a template whose apps did not change.
    write("own.conf.hbs", "client_max_bodysize 1m;");
    let own = lab.wait_app("own", "blocked by its rejected template", |s| s.state == State::Blocked);
    assert!(own.reason.contains("client_max_bodysize"), "{}", own.reason);
    assert_eq!((template_of("own.test").as_str(), template_of("plain.test").as_str()), ("own", "default"));
    // The fixed template is used without any other change.
    write("own.conf.hbs", "add_header X-Template mended;");
    lab.wait_app("own", "converged", |s| s.state == State::Converged);
    until("the fixed template is served", || template_of("own.test") == "mended");

    // All templates are missing: their last output stays, and each app reports it.
    fs::rename(&dir, lab.path("away")).expect("renamed");
    for app in ["own", "plain"] {
        let lost = lab.wait_app(app, "blocked by its missing template", |s| s.state == State::Blocked);
        assert!(lost.is("routes_rejected") && lost.reason.contains("is missing"), "{lost:?}");
    }
    assert_eq!((template_of("own.test").as_str(), template_of("plain.test").as_str()), ("mended", "default"));
    // A restarted agent reports it too.
    lab.kill_agent();
    lab.start_agent(&[]);
    lab.wait_ready();
    lab.wait_app("plain", "blocked again", |s| s.state == State::Blocked);
    assert_eq!(template_of("plain.test"), "default");

    // An unreadable directory tells nothing about its files.
    fs::write(&dir, "not a directory").expect("a file");
    until("the status reports the directory", || {
        lab.status().and_then(|s| s.proxy).is_some_and(|p| p.contains("cannot read the templates"))
    });
    assert_eq!(template_of("plain.test"), "default");
    fs::remove_file(&dir).expect("removed");

    // Explicitly: an empty file selects the built-in template.
    fs::rename(lab.path("away"), &dir).expect("renamed");
    fs::write(dir.join("default.conf.hbs"), "").expect("a file");
    for app in ["own", "plain"] {
        lab.wait_app(app, "converged", |s| s.state == State::Converged);
    }
    until("the built-in template is served", || template_of("plain.test") == "none");
    for load in load {
        let tally = load.stop();
        assert_eq!((tally.failed, tally.stale), (0, 0), "{:#?}", tally.reasons);
    }
}

#[test]
fn faulty_app_is_found_by_the_file_that_nginx_names() {
    let mut lab = Lab::with(&Setup { no_agent: true, ..resyncing("") });
    let dir = lab.path("templates");
    fs::create_dir(&dir).expect("a directory");
    lab.start_agent(&[]);
    lab.wait_ready();
    let apps: Vec<String> = (0..12).map(|n| format!("app{n}")).collect();
    // nginx gets a socket-mode app before its container runs, so no container is needed.
    let spec = |app: &str| {
        format!("image: nowhere.invalid/{app}:v1\ningress: {{hosts: [{app}.test], socket: /run/app/app.sock}}\n")
    };
    let keys: Vec<(String, String)> = apps.iter().map(|app| (format!("apps/{app}/spec"), spec(app))).collect();
    lab.put_all(&keys);
    let live = || {
        fs::read_dir(lab.path("state/nginx/live")).map_or(0, |entries| {
            entries.flatten().filter(|e| e.file_name().to_string_lossy().starts_with("app-")).count()
        })
    };
    until("nginx has all apps", || live() == apps.len());
    let tests = || {
        let log = lab.agent_log();
        log.matches("nginx refuses the new configuration").count()
    };
    let before = tests();
    // Only the text of `app7` is faulty.
    let line = "{{#if (eq @root.app \"app7\")}}no_such_directive on;{{else}}add_header X-Template new;{{/if}}";
    fs::write(dir.join("default.conf.hbs"), template(line)).expect("a file");
    let file =
        |app: &str| fs::read_to_string(lab.path(&format!("state/nginx/live/app-{app}.conf"))).unwrap_or_default();
    until("all others have the new text", || {
        apps.iter().filter(|a| *a != "app7").all(|a| file(a).contains("X-Template"))
    });
    assert!(!file("app7").contains("no_such_directive"), "{}", file("app7"));
    assert_eq!(tests() - before, 1, "one test was enough to find it: {}", lab.agent_log());
    assert!(lab.agent_log().lines().any(|l| l.contains("\"app\":\"app7\"") && l.contains("no_such_directive")));
}

#[test]
fn directives_set_by_the_host_files_are_not_duplicated() {
    let lab = Lab::with(&resyncing(""));
    let conf = lab.path("nginx.conf");
    let text = fs::read_to_string(&conf).expect("a file");
    // A comment in another encoding, and a directive in a file that is not on the way to demae's.
    let mut bytes = b"# f\xfcr alle\n".to_vec();
    let text = text.replacen("http {", &format!("http {{ include {};", lab.path("tuning.conf").display()), 1);
    bytes.extend(text.as_bytes());
    fs::write(lab.path("tuning.conf"), "server_names_hash_max_size 1024;\n").expect("a file");
    fs::write(&conf, bytes).expect("a file");
    let long = format!("{}.{}.test", "a".repeat(40), "b".repeat(40));
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), &long, ""));
    assert_eq!(lab.get(&long, "/").expect("an answer").0, 200);
    let is_fine = || {
        let mut command = std::process::Command::new("nginx");
        let output = command.args(["-t", "-q", "-c"]).arg(&conf).output().expect("nginx runs");
        output.status.success()
    };
    assert!(is_fine(), "nginx accepts its files");
    // The host sets later what demae has set: demae removes its own directive.
    fs::write(lab.path("tuning.conf"), "server_names_hash_bucket_size 128;\n").expect("a file");
    until("nginx accepts its files again", is_fine);
    assert_eq!(lab.get(&long, "/").expect("an answer").0, 200);
    // Too small for a new app: that app is blocked, and the reason names the file.
    fs::write(lab.path("tuning.conf"), "server_names_hash_bucket_size 128;\nserver_names_hash_max_size 512;\n")
        .expect("a file");
    let longer = format!("{}.{}.{}.test", "c".repeat(60), "d".repeat(60), "e".repeat(60));
    lab.put("apps/longer/spec", &lab.socket_spec(&lab.image("v1"), &longer, ""));
    let blocked = lab.wait_app("longer", "blocked by the setting to raise", |s| s.reason.contains("tuning.conf"));
    assert!(blocked.reason.contains("server_names_hash_bucket_size 128"), "{}", blocked.reason);
    assert_eq!(lab.get(&long, "/").expect("an answer").0, 200);
}

#[test]
fn hand_written_server_keeps_its_host() {
    let lab = Lab::with(&resyncing(""));
    let conf = lab.path("nginx.conf");
    let text = fs::read_to_string(&conf).expect("a file");
    let site = lab.path("site.conf");
    fs::write(&site, format!("server {{ listen {}; server_name q.test; return 200 \"by hand\"; }}\n", lab.ingress))
        .expect("a file");
    // After demae's include: nginx would give the host to the first.
    let text = text.replacen("server { listen", &format!("include {};\nserver {{ listen", site.display()), 1);
    fs::write(&conf, text).expect("a file");
    lab.deploy("other", "apps/other/spec", &lab.socket_spec(&lab.image("v1"), "other.test", ""));
    assert_eq!(lab.get("q.test", "/").expect("an answer").1, "by hand");
    lab.put("apps/thief/spec", &lab.socket_spec(&lab.image("v1"), "q.test", ""));
    let blocked = lab.wait_app("thief", "blocked by the file that has the host", |s| s.state == State::Blocked);
    assert!(blocked.reason.contains("q.test") && blocked.reason.contains("site.conf"), "{}", blocked.reason);
    lab.deploy("third", "apps/third/spec", &lab.socket_spec(&lab.image("v1"), "third.test", ""));
    assert_eq!(lab.get("q.test", "/").expect("an answer").1, "by hand");
}

#[test]
fn broken_shared_template_is_found_in_a_few_tests_and_stops_no_app() {
    let mut lab = Lab::with(&Setup { no_agent: true, ..resyncing("") });
    let dir = lab.path("templates");
    fs::create_dir(&dir).expect("a directory");
    fs::write(dir.join("own.conf.hbs"), template("add_header X-Template own;")).expect("a file");
    lab.start_agent(&[]);
    let image = lab.image("v1");
    let apps: Vec<String> = (0..12).map(|n| format!("app-{n}")).collect();
    for app in &apps {
        let spec =
            lab.socket_spec(&image, &format!("{app}.test"), "").replace("drain: 10s", "drain: 10s, template: own");
        lab.put(&format!("apps/{app}/spec"), &spec);
    }
    for app in &apps {
        lab.wait_app(app, "converged", |s| s.state == State::Converged);
    }
    fs::write(dir.join("own.conf.hbs"), template("client_max_bodysize 1m;")).expect("a file");
    let mut untried = 0;
    for app in &apps {
        let blocked = lab.wait_app(app, "blocked by its rejected template", |s| s.state == State::Blocked);
        assert!(blocked.reason.contains("client_max_bodysize"), "{}", blocked.reason);
        untried += usize::from(blocked.reason.contains("not tried"));
        assert_eq!(lab.get(&format!("{app}.test"), "/").map(|(status, _)| status), Ok(200), "{app} is served");
    }
    assert_eq!(untried, 4, "eight are tried one by one");
    fs::write(dir.join("own.conf.hbs"), template("add_header X-Template mended;")).expect("a file");
    for app in &apps {
        lab.wait_app(app, "converged", |s| s.state == State::Converged);
    }
}

#[test]
fn path_already_in_a_template_blocks_only_the_app_that_claims_it() {
    let mut lab = Lab::with(&Setup { no_agent: true, ..resyncing("") });
    let dir = lab.path("templates");
    fs::create_dir(&dir).expect("a directory");
    let text = include_str!("../../deploy/nginx/default.conf.hbs");
    let text = text.replacen("    location / {", "    location = /api { return 418; }\n    location / {", 1);
    fs::write(dir.join("own.conf.hbs"), text).expect("a file");
    lab.start_agent(&[]);
    let spec = lab.socket_spec(&lab.image("v1"), "a.test", "").replace("drain: 10s", "drain: 10s, template: own");
    lab.deploy("root", "apps/root/spec", &spec);
    let below = lab.socket_spec(&lab.image("v1"), "a.test", "").replace("drain: 10s", "drain: 10s, path: /api");
    lab.put("apps/below/spec", &below);
    let blocked = lab.wait_app("below", "blocked by the duplicate path", |s| s.state == State::Blocked);
    assert!(
        blocked.reason.contains("app `root`") && blocked.reason.contains("duplicate location"),
        "{}",
        blocked.reason
    );
    let status = |path: &str| lab.get("a.test", path).map(|(status, _)| status);
    assert_eq!((status("/"), status("/api")), (Ok(200), Ok(418)));
    // The text of the other app can still change.
    let reloads = || lab.metric("demae_nginx_reloads_total", "done");
    let before = reloads();
    lab.put("apps/root/spec", &spec.replace("drain: 10s", "drain: 10s, read_timeout: 50s"));
    until("the new text is loaded", || reloads() > before);
    lab.wait_app("root", "converged", |s| s.state == State::Converged);
    assert_eq!((status("/"), status("/api")), (Ok(200), Ok(418)));
}
