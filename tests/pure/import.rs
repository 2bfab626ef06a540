//! Specs from Compose files, `docker run` lines and containers.
#![expect(clippy::disallowed_methods, reason = "a test starts the program and reads files of its own")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use demae::{
    import::{
        Effect, Options, Outcome, compose,
        container::container,
        export::{Source, to_compose, to_run},
        kamal::kamal,
        run_line,
    },
    model::{
        name::{AppName, EnvName, VirtualHost},
        policy::BUILT_IN,
        spec::Spec,
        yaml,
    },
};
use expect_test::expect_file;

fn projects() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/compose")
}

fn options(read: &dyn Fn(&str) -> Result<Vec<u8>, String>) -> Options<'_> {
    Options {
        project: "shop".to_owned(),
        is_project_given: false,
        variables: BTreeMap::new(),
        services: BTreeSet::new(),
        hosts: Vec::new(),
        names: BTreeMap::new(),
        dropped: BTreeSet::new(),
        policy: BUILT_IN.clone(),
        read,
    }
}

fn no_files(path: &str) -> Result<Vec<u8>, String> {
    Err(format!("`{path}` is not there"))
}

/// One file, without variables.
fn imported(text: &str) -> Outcome {
    compose(&[("compose.yml".to_owned(), text.as_bytes().to_vec())], &options(&no_files)).expect("it is imported")
}

/// The exit code and both outputs of `demae import`.
fn demae_import(args: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_demae")).arg("import").args(args).output().expect("demae runs");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

/// Files as people write them: what becomes of each key, each spec, and the names of its variables.
#[test]
fn ten_projects_are_imported() {
    // What these need has no meaning here: devices, the host's network, rights.
    let dropped = [
        ("mail", "cap_add,volumes"),
        ("media", "cap_add,devices,network_mode,privileged,sysctls,volumes"),
        ("monitoring", "devices,pid,privileged,volumes"),
        ("php", "restart"),
        ("stack", "volumes"),
    ];
    let dropped = BTreeMap::from(dropped);
    for entry in fs::read_dir(projects()).expect("projects") {
        let dir = entry.expect("an entry").path();
        let name = dir.file_name().and_then(|name| name.to_str()).expect("a name").to_owned();
        let out = tempfile::tempdir().expect("a directory");
        let file = ["compose.yml", "docker-compose.yml"].map(|file| dir.join(file)).into_iter().find(|f| f.exists());
        let file = file.expect("a Compose file").display().to_string();
        let to = out.path().display().to_string();
        let mut args = vec!["compose", file.as_str(), "--out", to.as_str()];
        if let Some(keys) = dropped.get(name.as_str()) {
            let (code, _, err) = demae_import(&args);
            assert_eq!(code, 1, "{name} needs what has no meaning here: {err}");
            assert!(err.contains("refused") && err.contains("--drop"), "{err}");
            assert!(fs::read_dir(&to).expect("a directory").next().is_none(), "nothing was written");
            args.extend(["--drop", keys]);
        }
        let (code, _, err) = demae_import(&args);
        assert_eq!(code, 2, "{name} is imported, with notes: {err}");
        let mut files: Vec<PathBuf> =
            fs::read_dir(&to).expect("a directory").map(|entry| entry.expect("an entry").path()).collect();
        files.sort();
        let mut text = err.replace(&to, "DIR");
        for path in &files {
            let content = fs::read_to_string(path).expect("a file");
            let name = path.file_name().and_then(|name| name.to_str()).expect("a name");
            text.push_str(&format!("\n# {name}\n{content}"));
            if name.ends_with(".yaml") {
                let spec = Spec::parse(content.as_bytes()).unwrap_or_else(|e| panic!("{name}: {e}"));
                assert!(spec.image.is_some(), "{name} has an image");
            }
        }
        expect_file![dir.join("imported.txt")].assert_eq(&text);
        // The same again is no change.
        assert_eq!(demae_import(&args).0, 2);
        fs::write(&files[0], "changed by hand").expect("a file");
        let (code, _, err) = demae_import(&args);
        assert!(code == 1 && err.contains("differs"), "{err}");
        assert_eq!(fs::read_to_string(&files[0]).expect("a file"), "changed by hand");
    }
}

/// The way out: what was imported is exported, and imported again, and has the same container.
#[test]
fn exported_apps_are_imported_as_they_were() {
    let read = |_: &str| Ok(b"A='b'\n".to_vec());
    let mut seen = 0;
    for entry in fs::read_dir(projects()).expect("projects") {
        let text = fs::read_to_string(entry.expect("an entry").path().join("imported.txt")).expect("a file");
        let mut specs: Vec<(String, String)> = Vec::new();
        for line in text.lines() {
            match line.strip_prefix("# ").filter(|name| !name.contains(' ') && name.contains('.')) {
                Some(name) => specs.push((name.to_owned(), String::new())),
                None => specs.iter_mut().last().into_iter().for_each(|(_, spec)| spec.push_str(&format!("{line}\n"))),
            }
        }
        specs.retain(|(name, _)| name.ends_with(".yaml"));
        for (name, spec) in specs {
            let app = AppName::try_from(name.trim_end_matches(".yaml")).expect("a name");
            let parsed = Spec::parse(spec.as_bytes()).expect("a valid spec");
            let tree = yaml::parse(spec.as_bytes()).expect("a tree");
            let image = parsed.image.as_ref().expect("an image").as_str();
            let source = Source { app: &app, tree: &tree, spec: &parsed, image, has_variables: true };
            let (file, _) = to_compose(source);
            let files = [("compose.yml".to_owned(), file.clone().into_bytes())];
            let again = compose(&files, &options(&read)).unwrap_or_else(|e| panic!("{e}: {file}"));
            let again = Spec::parse(again.apps[0].spec.as_bytes()).unwrap_or_else(|e| panic!("{e}: {file}"));
            assert_eq!((&again.container, &again.image), (&parsed.container, &parsed.image), "{file}");
            let (line, _) = to_run(source);
            let words = run_line::split(&line).expect("words");
            let again = run_line::run_line(&words, &options(&read)).unwrap_or_else(|e| panic!("{e}: {line}"));
            assert_ne!(again.worst(), Some(Effect::Refused), "{line}");
            let again = Spec::parse(again.apps[0].spec.as_bytes()).unwrap_or_else(|e| panic!("{e}: {line}"));
            let command = |spec: &Spec| {
                let all = spec.container.entrypoint.iter().chain(&spec.container.command).flatten();
                all.cloned().collect::<Vec<String>>()
            };
            assert_eq!(command(&again), command(&parsed), "{line}");
            assert_eq!(again.container.volumes, parsed.container.volumes, "{line}");
            seen += 1;
        }
    }
    assert!(seen > 30, "{seen} apps");
}

/// Keys to which 92.1 % of 1,519 services keep, counted in three public collections of Compose files; each in a form that
/// is common there.
const COMMON: &[&str] = &[
    "image: a:1",
    "volumes: ['./data:/data', 'named:/var/lib/x', '/etc/localtime:/etc/localtime:ro']",
    "environment: {A: b}",
    "environment: [A=b, BARE]",
    "restart: unless-stopped",
    "restart: always",
    "restart: on-failure:5",
    "depends_on: [db]",
    "depends_on: {db: {condition: service_healthy}}",
    "ports: ['8080:80', '53:53/udp', '6000-6010:6000-6010']",
    "expose: [80]",
    "healthcheck: {test: [CMD, curl, '-f', 'http://localhost:80/'], interval: 10s}",
    "healthcheck: {test: 'pg_isready -U x', retries: 5}",
    "container_name: other",
    "command: a 'b c'",
    "entrypoint: [a, b]",
    "logging: {driver: json-file, options: {max-size: 10m}}",
    "pull_policy: always",
    "user: '1000:1000'",
    "working_dir: /app",
    "stop_grace_period: 1m",
    "init: true",
    "read_only: true",
    "tmpfs: [/tmp]",
    "cap_drop: [ALL]",
    "extra_hosts: ['a:1.2.3.4']",
    "labels: {a: b}",
    "labels: ['traefik.enable=true']",
    "deploy: {replicas: 2, mode: replicated, restart_policy: {condition: on-failure}, resources: {limits: {memory: 1G}}}",
    "networks: [backend]",
    "hostname: web",
    "env_file: values.env",
    "build: .",
    "network_mode: bridge",
];
/// Further keys that a spec takes, or that can be left out.
const RARE: &[&str] = &[
    "secrets: [password]",
    "configs: [{source: c, target: /etc/c}]",
    "security_opt: ['no-new-privileges:true']",
    "ulimits: {nofile: 65536}",
    "links: [db]",
    "dns: 1.1.1.1",
    "stdin_open: true",
    "tty: true",
    "shm_size: 1gb",
    "pids_limit: 100",
    "mem_limit: 512m",
    "group_add: ['109']",
    "platform: linux/amd64",
    "runtime: runc",
];
/// Which part of these services ends, and says so: ten of them have `restart: no`.
const ENDING: f64 = 10.0 / 1519.0;

#[test]
fn nine_of_ten_public_services_are_imported() {
    let read = |_: &str| Ok(b"C=d\n".to_vec());
    for key in COMMON.iter().chain(RARE) {
        let image = if key.starts_with("image") { "" } else { "image: a:1, " };
        let image = if key.starts_with("build") { "" } else { image };
        let text = format!("services: {{web: {{{image}{key}}}}}\n");
        let outcome = compose(&[("compose.yml".to_owned(), text.clone().into_bytes())], &options(&read));
        let outcome = outcome.unwrap_or_else(|e| panic!("{text}: {e}"));
        assert_ne!(outcome.worst(), Some(Effect::Refused), "{text}: {:?}", outcome.apps[0].notes);
    }
    // As many as confine themselves to these keys, without those that end.
    const { assert!(0.921 - ENDING >= 0.9) };
}

#[test]
fn keys_that_need_the_host_are_refused_by_name() {
    for (key, name) in [
        ("privileged: true", "privileged"),
        ("cap_add: [NET_ADMIN]", "cap_add"),
        ("devices: ['/dev/dri:/dev/dri']", "devices"),
        ("network_mode: host", "network_mode"),
        ("network_mode: service:vpn", "network_mode"),
        ("pid: host", "pid"),
        ("volumes: ['/var/run/docker.sock:/var/run/docker.sock']", "volumes"),
        ("restart: 'no'", "restart"),
        ("security_opt: ['seccomp:unconfined']", "security_opt"),
        ("deploy: {replicas: 0}", "deploy.replicas"),
        ("imagee: a", "imagee"),
    ] {
        let outcome = imported(&format!("services: {{web: {{image: 'a:1', {key}}}}}\n"));
        let refused: Vec<&str> =
            outcome.apps[0].notes.iter().filter(|n| n.effect == Effect::Refused).map(|n| n.key.as_str()).collect();
        assert_eq!(refused, [name], "{key}");
        let mut options = options(&no_files);
        options.dropped.insert(name.split('.').next().expect("a key").to_owned());
        let text = format!("services: {{web: {{image: 'a:1', {key}}}}}\n");
        let outcome = compose(&[("compose.yml".to_owned(), text.into_bytes())], &options).expect("it is imported");
        assert_eq!(outcome.worst(), Some(Effect::Dropped), "{key}");
    }
}

#[test]
fn what_is_no_compose_file_is_said() {
    let error = |text: &str| {
        let outcome = compose(&[("compose.yml".to_owned(), text.as_bytes().to_vec())], &options(&no_files));
        outcome.expect_err("it is no Compose file").to_string()
    };
    for (text, says) in [
        ("image: a:1\n", "has no `services`"),
        ("services: [", "this is not YAML"),
        ("services: {web: {image: '${A:?set it}'}}\n", "A: set it"),
        ("services: {web: {image: '${A'}}\n", "not closed"),
        ("services: {web: a}\n", "expected a mapping"),
        ("services: {web: {image: a, extends: {service: none}}}\n", "names no other service"),
        ("services: {web: {image: a, extends: web}}\n", "names no other service"),
        ("services: {web: {image: a, env_file: none.env}}\n", "`none.env` is not there"),
        ("services: {'+': {image: a}}\n", "no app can have this name"),
        ("services: {a_b: {image: a}, a-b: {image: a}}\n", "two services become the app `a-b`"),
    ] {
        let error = error(text);
        assert!(error.contains(says), "{text}: {error}");
    }
}

#[test]
fn host_names_go_to_the_service_that_takes_requests() {
    let text = "services: {web: {image: 'a:1', ports: ['80:3000']}, db: {image: 'b:1', ports: ['5432:5432']}}\n";
    let host = VirtualHost::try_from("shop.example.com").expect("a host");
    let mut with_host = options(&no_files);
    with_host.hosts.push((None, host.clone()));
    let files = [("compose.yml".to_owned(), text.as_bytes().to_vec())];
    let outcome = compose(&files, &with_host).expect("it is imported");
    let specs: Vec<Spec> =
        outcome.apps.iter().map(|app| Spec::parse(app.spec.as_bytes()).expect("a valid spec")).collect();
    let ingress = specs[1].ingress.as_ref().expect("the web app takes requests");
    assert_eq!((&ingress.hosts, specs[0].ingress.is_none()), (&vec![host.clone()], true));
    with_host.hosts = vec![(Some("nothing".to_owned()), host)];
    assert!(compose(&files, &with_host).expect_err("no such service").to_string().contains("no service `nothing`"));
}

#[test]
fn roles_of_kamal_are_imported() {
    let text = "service: shop\nimage: acme/shop\nservers:\n  web:\n    - 10.0.0.1\n    - 10.0.0.2\n  job:\n    hosts: [10.0.0.3]\n    \
                cmd: bin/jobs\nproxy:\n  ssl: true\n  host: shop.example.com\n  app_port: 3000\n  healthcheck: {path: /up}\n\
                registry: {server: registry.example.com}\nenv:\n  clear:\n    DB_HOST: 10.0.0.9\n  secret:\n    - RAILS_MASTER_KEY\n\
                volumes: ['storage:/rails/storage']\nbuilder: {arch: amd64}\naccessories:\n  db: {image: postgres:16}\n";
    let files = [("deploy.yml".to_owned(), text.as_bytes().to_vec())];
    let outcome = kamal(&files, &options(&no_files)).expect("it is imported");
    assert_eq!(outcome.worst(), Some(Effect::Dropped), "{:?}", outcome.notes);
    let apps: Vec<&str> = outcome.apps.iter().map(|app| app.app.as_str()).collect();
    assert_eq!(apps, ["shop", "shop-job"]);
    let body = |at: usize| {
        let lines = outcome.apps[at].spec.lines().filter(|line| !line.starts_with('#'));
        lines.collect::<Vec<&str>>().join("\n")
    };
    let web = "image: registry.example.com/acme/shop
ingress:
  hosts: [shop.example.com]
  port: 3000
healthcheck:
  http: /up
volumes: [storage:/rails/storage]
deploy:
  placement:
    constraints: [role == web]
  update_config:
    order: stop-first";
    assert_eq!(body(0), web.replace("[role == web]", "[\"role == web\"]"));
    assert!(body(1).contains("command: bin/jobs") && !body(1).contains("ingress"), "{}", body(1));
    let said = |key: &str| outcome.notes.iter().any(|note| note.key == key);
    for key in ["accessories.db", "registry", "builder", "proxy.ssl", "env.secret.RAILS_MASTER_KEY", "servers.web"] {
        assert!(said(key), "{key}: {:?}", outcome.notes);
    }
    for (text, says) in [("image: a\n", "has no `service`"), ("service: <%= x %>\n", "is not run")] {
        let files = [("deploy.yml".to_owned(), text.as_bytes().to_vec())];
        let error = kamal(&files, &options(&no_files)).expect_err("it is not Kamal's").to_string();
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn command_lines_are_imported() {
    let line = "docker run -d --name shop -p127.0.0.1:8080:80 -e A=1 --env B=2 -v data:/data -v /srv/x:/x:ro --restart=always \
                -m 512m --ulimit nofile=1024:2048 --health-cmd 'curl -f http://localhost/' -it --label a=b \
                --log-opt max-size=1m registry.example.com/shop:v1 serve --port 80";
    let words = run_line::split(line).expect("words");
    let outcome = run_line::run_line(&words, &options(&no_files)).expect("it is imported");
    let app = &outcome.apps[0];
    let variables: Vec<&str> = app.env.keys().map(EnvName::as_str).collect();
    assert_eq!((app.app.as_str(), variables), ("shop", vec!["A", "B"]));
    let body: Vec<&str> = app.spec.lines().filter(|line| !line.starts_with('#')).collect();
    let expected = "image: registry.example.com/shop:v1
command: [serve, \"--port\", 80]
ingress:
  hosts: [shop.localhost]
  port: 80
healthcheck:
  http: /
volumes: [data:/data, /srv/x:/x:ro]
ulimits:
  nofile:
    soft: 1024
    hard: 2048
mem_limit: 512m
labels:
  a: b
logging:
  driver: json-file
  options:
    max-size: 1m
restart: always
deploy:
  update_config:
    order: stop-first";
    assert_eq!(body.join("\n"), expected);
    for (line, says) in [
        ("docker run", "no image"),
        ("docker run --no-such-option a", "`--no-such-option` is not an option"),
        ("docker run -e", "has no value"),
    ] {
        let words = run_line::split(line).expect("words");
        let error = run_line::run_line(&words, &options(&no_files)).expect_err("it is wrong").to_string();
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn containers_are_imported_without_what_their_image_says() {
    let image = serde_json::json!({"Config": {
        "Env": ["PATH=/bin", "LANG=C"], "Cmd": ["serve"], "Entrypoint": ["/init"], "User": "app", "Volumes": {"/cache": {}},
    }});
    let found = serde_json::json!({
        "Id": "0123456789abcdef", "Name": "/old_shop",
        "Config": {
            "Image": "registry.example.com/shop:v1", "Hostname": "0123456789ab", "User": "app",
            "Env": ["PATH=/bin", "LANG=C", "PASSWORD=secret"], "Cmd": ["serve", "-v"], "Entrypoint": ["/init"],
            "Labels": {"com.docker.compose.project": "x", "team": "a"},
        },
        "HostConfig": {
            "NetworkMode": "x_default", "RestartPolicy": {"Name": "unless-stopped"}, "Memory": 536_870_912,
            "NanoCpus": 1_500_000_000, "PortBindings": {"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": "8080"}]},
            "ShmSize": 67_108_864, "LogConfig": {"Type": "json-file", "Config": {}}, "Privileged": false,
        },
        "Mounts": [
            {"Type": "volume", "Name": "f".repeat(64), "Destination": "/cache", "RW": true},
            {"Type": "volume", "Name": "shop_data", "Destination": "/data", "RW": true},
            {"Type": "bind", "Source": "/srv/conf", "Destination": "/conf", "RW": false},
        ],
    });
    let outcome = container(&found, &image, &options(&no_files)).expect("it is imported");
    let app = &outcome.apps[0];
    let variables: Vec<&str> = app.env.keys().map(EnvName::as_str).collect();
    assert_eq!((app.app.as_str(), variables), ("old-shop", vec!["PASSWORD"]));
    assert!(!app.spec.contains("secret"), "secrets are not in the spec");
    let body: Vec<&str> = app.spec.lines().filter(|line| !line.starts_with('#')).collect();
    let expected = "image: registry.example.com/shop:v1
command: [serve, \"-v\"]
ingress:
  hosts: [old-shop.localhost]
  port: 80
volumes: [shop_data:/data, /srv/conf:/conf:ro]
mem_limit: 536870912
cpus: 1.500
labels:
  team: a
restart: unless-stopped
deploy:
  update_config:
    order: stop-first";
    assert_eq!(body.join("\n"), expected);
}
