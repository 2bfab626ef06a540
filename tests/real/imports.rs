//! What other tools run, taken over: Compose projects and containers.
#![expect(clippy::disallowed_methods, reason = "a test runs programs and writes files of its own")]

use std::fs;

use crate::support::{
    lab::{Lab, Setup},
    process::docker,
    wait::until,
};

/// A web app with a database, a worker and a migration: imported by one command, deployed by the next one.
#[test]
fn compose_project_is_imported_and_deployed() {
    let lab = Lab::with(&Setup { tcp_routes: true, ..Setup::default() });
    let (v1, v2) = (lab.image("v1"), lab.image("v2"));
    let dir = lab.path("shop");
    fs::create_dir(&dir).expect("a directory");
    let file = format!(
        "x-app: &app\n  image: {v1}\n  env_file: .env\n  restart: unless-stopped\n\
         services:\n  web:\n    <<: *app\n    ports: ['3000:8080']\n    environment:\n      PORT: 8080\n      \
         GREETING: ${{GREETING:-hello}} from ${{PLACE}}\n      SECRET: ${{NOT_GIVEN}}\n    depends_on:\n      \
         db: {{condition: service_started}}\n      migrate: {{condition: service_completed_successfully}}\n    \
         healthcheck: {{test: curl -f http://localhost:8080/healthz || exit 1, interval: 10s}}\n  \
         migrate:\n    <<: *app\n    command: [exit, '0']\n    restart: 'no'\n  \
         db:\n    image: {v2}\n    environment: [PORT=5432]\n    volumes: [data:/data]\nvolumes: {{data: }}\n"
    );
    fs::write(dir.join("compose.yml"), file).expect("a file");
    fs::write(dir.join(".env"), "PLACE=a kitchen\n").expect("a file");
    let (file, out) = (dir.join("compose.yml").display().to_string(), dir.join("specs").display().to_string());
    // A volume of Docker's is not removed with its app, so this one has a name of the lab's.
    let project = format!("shop-{}", lab.host);
    let args = ["import", "compose", &file, "--host", "shop.test", "--project", &project, "--out", &out];
    let (code, _, err) = lab.ask(&args);
    assert_eq!(code, 2, "it is imported, with notes: {err}");
    assert!(err.contains("$NOT_GIVEN") && err.contains("release_command"), "{err}");
    let (code, printed, err) = lab.ask(&["apply", "-f", &out, "--env-file", &out, "--timeout", "60s"]);
    assert_eq!(code, 0, "{printed}{err}");
    assert_eq!(printed.lines().filter(|line| line.contains("converged")).count(), 2, "{printed}");
    let get = |path: &str| lab.get("shop.test", path).expect("an answer").1;
    assert_eq!(get("/env?GREETING"), "hello from a kitchen");
    assert_eq!((get("/env?SECRET"), get("/env?PLACE")), (String::new(), "a kitchen".to_owned()));
    until("the web app reaches its database by the name of the service", || {
        get("/reach?db:5432").contains("version=v2")
    });
    // The way out is as short.
    let (code, printed, err) = lab.ask(&["export", "web"]);
    assert_eq!(code, 2, "{err}");
    assert!(printed.contains("127.0.0.1:8080:8080") && err.contains("shop.test"), "{printed}{err}");
    let (code, printed, _) = lab.ask(&["export", "web", "--format", "env"]);
    assert!(code == 0 && printed.contains("GREETING='hello from a kitchen'"), "{printed}");
    let history = lab.ask(&["history", "web", "-o", "json"]).1;
    assert!(history.contains("\"proven\""), "the migration has ended well: {history}");
    lab.del("apps/");
    until("the apps are gone", || lab.containers().is_empty());
    docker(&["volume", "rm", &format!("{project}_data")]);
}

/// A container that was started by hand becomes an app: the spec has what its image does not say.
#[test]
fn container_is_imported_and_deployed() {
    let lab = Lab::with(&Setup { tcp_routes: true, ..Setup::default() });
    let name = format!("old-{}", lab.host);
    let label = format!("demae.host={}", lab.host);
    let image = lab.image("v1");
    docker(&[
        "create",
        "--name",
        &name,
        "--label",
        &label,
        "-p",
        "127.0.0.1::8080",
        "-e",
        "PORT=8080",
        "-e",
        "A=b c",
        &image,
    ]);
    let out = lab.path("specs").display().to_string();
    let service = format!("{name}=web");
    let (code, _, err) =
        lab.ask(&["import", "container", &name, "--app", &service, "--host", "web.test", "--out", &out]);
    assert_eq!(code, 2, "{err}");
    docker(&["rm", "-f", &name]);
    let spec = fs::read_to_string(lab.path("specs/web.yaml")).expect("a spec");
    assert!(!spec.contains("VERSION") && spec.contains("port: 8080"), "{spec}");
    let (code, _, err) = lab.ask(&["apply", "-f", &out, "--env-file", &out]);
    assert_eq!(code, 0, "{err}");
    assert_eq!(lab.get("web.test", "/env?A").expect("an answer").1, "b c");
    let (code, _, err) = lab.ask(&["import", "container", "no-such-container"]);
    assert!(code == 1 && err.contains("no-such-container"), "{err}");
}
