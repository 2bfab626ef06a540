use super::{super::fields::KEYS, *};
use crate::model::{
    name::AppName,
    policy::{Asked, BUILT_IN},
};

fn problems(text: &str) -> String {
    match spec(text.as_bytes()) {
        Ok(_) => "fine".to_owned(),
        Err(problems) => problems.iter().map(|p| format!("{p}\n")).collect(),
    }
}

#[test]
fn full_spec_is_parsed() {
    let text = r#"
image: registry.example.com/web:v41
command: [shop, serve, --listen, /run/shop/http.sock]
environment: {MODE: live, PORT: 8080}
env_from: [common]
volumes: ["/srv/shop/media:/media:ro", "cache:/cache"]
user: "1000:1000"
healthcheck: {http: /healthz, interval: 5s, timeout: 2s, retries: 3, start_period: 30s, start_interval: 20ms}
stop_grace_period: 10s
ingress: {hosts: [shop.example.com, "*.shop.example.com"], drain: 45s, socket: /run/shop/http.sock}
deploy:
  mode: global
  replicas_per_host: 2
  placement: {constraints: ["tier == front", "zone != b"]}
  update_config: {order: start-first, parallelism: 2, failure_action: rollback, monitor: 5s}
  resources: {limits: {cpus: "1.5", memory: 512M}}
"#;
    let spec = spec(text.as_bytes()).expect("this spec is fine");
    assert_eq!(spec.container.memory, Some(536_870_912));
    assert_eq!(spec.container.nano_cpus, Some(1_500_000_000));
    assert_eq!(spec.deploy.replicas_per_host, 2);
    assert_eq!(spec.deploy.constraints[1].to_string(), "zone != b");
    assert_eq!(spec.health.probe, Probe::Http("/healthz".into()));
    assert_eq!(spec.environment.len(), 2);
}

#[test]
fn json_spec_is_parsed_like_yaml() {
    let spec = spec(br#"{"image":"web:v1","ingress":{"hosts":["a.example"],"port":8080}}"#).expect("this spec is fine");
    assert_eq!(spec.ingress.map(|i| i.endpoint), Some(Endpoint::Port(8080)));
}

#[test]
fn every_problem_is_reported_with_line_and_remedy() {
    let text = "image: web:v1\nhealthchek: {}\nports: ['80:80']\ningress:\n  hosts: ['x; } server {']\n  sockt: /run/a/b.sock\nstop_grace_period: 10\ndeploy:\n  replicas_per_host: many\n";
    expect_test::expect![[r#"
        line 2: `healthchek`: unknown key (did you mean `healthcheck`?)
        line 3: `ports`: this key is not supported (use `ingress.port`; nginx is the way in)
        line 5: `ingress`: say where the app listens: `socket: /run/app/web.sock` or `port: 8080`
        line 5: `ingress.hosts[0]`: virtual host `x; } server {` is not valid: use a lower-case host name such as `web.example.com`, `*.example.com`, or `*` for all that no other app claims; at most 253 characters, labels at most 63 (international names in their `xn--` form), no wildcard for a whole top-level domain, and neither `demae-proof` as the first label nor anything below `demae.invalid`
        line 6: `ingress.sockt`: unknown key (did you mean `socket`?)
        line 7: `stop_grace_period`: `10` is not a duration; write it like `10s`, `1m30s` or `500ms`
        line 9: `deploy.replicas_per_host`: `many` is not a whole number from 1 to 100
    "#]]
    .assert_eq(&problems(text));
}

#[test]
fn spec_cannot_request_host_privileges() {
    for text in [
        "volumes: ['/:/host']",
        "volumes: ['/etc/shadow:/x']",
        "volumes: ['/usr/local/bin:/x']",
        "volumes: ['/var/spool/cron:/x']",
        "volumes: ['/srv:/x']",
        "volumes: ['/srvother/a:/x']",
        "volumes: ['/var/run/docker.sock:/x']",
        "volumes: ['/srv/../etc:/x']",
        "volumes: ['/srv/docker.sock:/x']",
        "network_mode: host",
        "network_mode: 'container:x'",
        "privileged: true",
        "cap_add: [SYS_ADMIN]",
        "pid: host",
        "devices: ['/dev/sda']",
        "sysctls: {kernel.core_pattern: x}",
        "ingress: {hosts: [a.example], socket: /etc/web.sock}",
        "ingress: {hosts: [a.example], socket: /web.sock}",
        "labels: {demae.app: other}",
        "environment: {DEMAE_APP: other}",
    ] {
        let spec = Spec::parse(format!("image: web:v1\n{text}\n").as_bytes());
        // What a host may allow is no error of the spec.
        let is_refused = spec.map_or(true, |spec| {
            let app = AppName::try_from("web").expect("a name");
            let (image, container, ingress) = (spec.image.as_ref(), &spec.container, spec.ingress.as_ref());
            let asked = Asked { app: &app, image, container, ingress };
            !BUILT_IN.refusals_of(asked, spec.environment.keys()).is_empty()
        });
        assert!(is_refused, "{text} was accepted");
    }
}

#[test]
fn schema_and_reader_have_the_same_keys() {
    let schema: serde_json::Value = serde_json::from_str(super::super::SCHEMA).expect("the schema is JSON");
    for (path, keys) in KEYS {
        let mut at = &schema;
        for part in path.split('.').filter(|p| !p.is_empty()) {
            at = if part == "*" { &at["additionalProperties"] } else { &at["properties"][part] };
            // One item or a list of them: the item is defined once, under `$defs`.
            if let Some(name) = at["oneOf"][0]["$ref"].as_str().and_then(|r| r.strip_prefix("#/$defs/")) {
                at = &schema["$defs"][name];
            }
        }
        let mut schema_keys: Vec<&str> = at["properties"]
            .as_object()
            .unwrap_or_else(|| panic!("the schema has no `{path}`"))
            .keys()
            .map(String::as_str)
            .collect();
        schema_keys.sort_unstable();
        let mut read = keys.to_vec();
        read.sort_unstable();
        assert_eq!(schema_keys, read, "keys of `{path}`");
        assert_eq!(at["additionalProperties"], false, "`{path}` allows no other keys");
    }
}

#[test]
fn keys_of_compose_are_read_as_compose_has_them() {
    let text = r#"
image: web:v1
restart: unless-stopped
hostname: web-1.example.com
dns: 10.0.0.53
tmpfs: /tmp
extra_hosts: {db: 10.0.0.5}
group_add: [audio, 999]
security_opt: ["no-new-privileges:true"]
shm_size: 256m
ulimits: {nofile: 65536, core: {soft: 0, hard: -1}}
mem_limit: 512m
cpus: 0.5
pids_limit: 200
stdin_open: false
tty: false
deploy: {restart_policy: {condition: on-failure, delay: 5s, max_attempts: 3, window: 120s}}
"#;
    let container = spec(text.as_bytes()).expect("this spec is fine").container;
    assert_eq!(
        (container.hostname.as_deref(), container.dns.as_slice()),
        (Some("web-1.example.com"), &["10.0.0.53".to_owned()][..])
    );
    assert_eq!(
        (container.tmpfs.as_slice(), container.extra_hosts.as_slice()),
        (&["/tmp".to_owned()][..], &["db:10.0.0.5".to_owned()][..])
    );
    assert!(container.no_new_privileges && container.group_add == ["audio", "999"]);
    assert_eq!((container.shm_size, container.memory), (Some(256 << 20), Some(512 << 20)));
    assert_eq!((container.nano_cpus, container.pids), (Some(500_000_000), Some(200)));
    let ulimit = |name: &str| container.ulimits.get(name).map(|limit| (limit.soft, limit.hard));
    assert_eq!((ulimit("nofile"), ulimit("core")), (Some((65536, 65536)), Some((0, -1))));
    // An older release has the same id as before these keys.
    let plain = spec(b"image: web:v1\n").expect("this spec is fine").container;
    let keys = serde_json::to_value(&plain).expect("JSON");
    assert_eq!(
        keys.as_object().map(|keys| keys.keys().cloned().collect::<Vec<_>>()),
        Some(vec!["init".to_owned(), "read_only".to_owned(), "stop_grace_period".to_owned()])
    );
}

#[test]
fn keys_of_compose_that_ask_for_too_much_are_refused() {
    for (text, why) in [
        ("restart: 'no'", "release_command"),
        ("restart: sometimes", "unless-stopped"),
        ("deploy: {restart_policy: {condition: none}}", "release_command"),
        ("tty: true", "leave it out"),
        ("security_opt: ['seccomp:unconfined']", "no-new-privileges"),
        ("security_opt: ['no-new-privileges:false']", "no-new-privileges"),
        ("hostname: 'a b'", "not a host name"),
        ("dns: example.com", "name server"),
        ("ulimits: {rtprio: 99}", "not a limit that can be given"),
        ("ulimits: {nofile: many}", "whole number"),
        ("ulimits: {nofile: {soft: 5}}", "`soft` and `hard`"),
        ("ulimits: {nofile: {soft: 5, hard: 4}}", "above `hard`"),
        ("ulimits: [nofile]", "a mapping"),
        ("shm_size: 0", "1k"),
        ("mem_limit: 1k", "6M"),
        ("mem_limit: 1g\ndeploy: {resources: {limits: {memory: 1g}}}", "one of them"),
        ("services: {web: {image: x}}", "whole Compose file"),
        ("platform: linux/arm64", "platform of the host"),
    ] {
        let found = problems(&format!("image: web:v1\n{text}\n"));
        assert!(found.contains(why), "{text}: {found}");
    }
}
