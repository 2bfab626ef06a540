//! Requests and responses of ordinary apps and clients, through the built-in template on a real nginx.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::{Duration, Instant},
};

use crate::support::{
    http::{Answer, get, read, send},
    lab::{Lab, Setup},
    wait::until,
};
use demae::model::status::State;

/// A request, and a check of its response.
type Row = (&'static str, Vec<u8>, fn(&Answer) -> bool);

fn request(target: &str, headers: &str) -> Vec<u8> {
    format!("GET {target} HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n{headers}\r\n").into_bytes()
}

fn upload(bytes: usize) -> Vec<u8> {
    let head = format!("POST /seen HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\nContent-Length: {bytes}\r\n\r\n");
    [head.into_bytes(), vec![b'x'; bytes]].concat()
}

/// True if the app received this line of a request.
fn saw(answer: &Answer, line: &str) -> bool {
    answer.status == 200 && answer.body.lines().any(|l| l.eq_ignore_ascii_case(line))
}

fn saw_header(answer: &Answer, name: &str) -> bool {
    let name = format!("{name}:");
    answer.body.lines().any(|l| l.to_ascii_lowercase().starts_with(&name.to_ascii_lowercase()))
}

/// Responses and requests of the size, form or slowness that real apps and browsers have.
#[test]
fn ordinary_apps_are_served() {
    let lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "a.test", ""));
    let chunked = b"POST /seen HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n";
    let expecting = b"POST /seen HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\nhello";
    let rows: Vec<Row> = vec![
        ("4,200 bytes of cookies set", request("/cookies?4200", ""), |a| a.status == 200 && a.body == "ok"),
        ("30,000 bytes of cookies set", request("/cookies?30000", ""), |a| a.head.matches("Set-Cookie").count() == 8),
        ("no header but the length", request("/long?0", ""), |a| a.status == 200 && a.body.is_empty()),
        ("an answer of 3 MB", request("/long?3000000", ""), |a| a.body.len() == 3_000_000),
        ("a body of 20 MB", upload(20_000_000), |a| saw(a, "body=20000000")),
        ("a body in chunks", chunked.to_vec(), |a| saw(a, "body=11")),
        ("a body that waits to be asked for", expecting.to_vec(), |a| {
            a.head.contains("100 Continue") || saw(a, "body=5")
        }),
        ("16,000 bytes of cookies sent", request("/seen", &format!("Cookie: {}\r\n", "c".repeat(16_000))), |a| {
            saw_header(a, "cookie")
        }),
        (
            "60 headers of 400 bytes",
            request("/seen", &(0..60).map(|n| format!("X-H{n}: {}\r\n", "h".repeat(400))).collect::<String>()),
            |a| saw_header(a, "X-H59"),
        ),
        ("a target of 16,000 bytes", request(&format!("/seen?{}", "q".repeat(16_000)), ""), |a| {
            a.status == 200 && a.body.contains(&"q".repeat(16_000))
        }),
        ("what is escaped stays so", request("/seen/a%2Fb%20c//d/..;x?y=%3D&z=%", ""), |a| {
            saw(a, "GET /seen/a%2Fb%20c//d/..;x?y=%3D&z=% HTTP/1.1") || a.body.contains("version=")
        }),
        ("a redirect stays as the app gave it", request("/location", ""), |a| {
            a.status == 302 && a.head.contains("Location: /elsewhere?a=1")
        }),
        ("an answer after 8 s", request("/slow?8000", ""), |a| a.status == 200),
        ("a stream of 2 s", request("/stream?20", ""), |a| a.body.contains("line 19 of version v1")),
        ("an old client", b"GET /seen HTTP/1.0\r\nHost: a.test\r\n\r\n".to_vec(), |a| a.status == 200),
        ("an upgrade to a websocket", request("/seen", "Connection: Upgrade\r\nUpgrade: websocket\r\n"), |a| {
            saw(a, "Upgrade: websocket")
        }),
    ];
    assert!(rows.len() >= 15, "fifteen at least");
    for (what, bytes, fits) in &rows {
        let answer = send(lab.ingress, bytes);
        let body: String = answer.body.chars().take(400).collect();
        assert!(fits(&answer), "{what}: {} {}\n{body}", answer.status, answer.head);
    }
}

/// Forged proxy headers of a client, to an app that trusts its proxy.
#[test]
fn forged_client_headers_are_removed() {
    let lab = Lab::new();
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "a.test", ""));
    let absolute = b"GET http://a.test/seen HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n".to_vec();
    let answer = send(lab.ingress, &absolute);
    assert!(saw(&answer, "Host: a.test") && saw(&answer, "X-Forwarded-Host: a.test"), "{}", answer.body);
    assert!(!answer.body.contains("evil"), "{}", answer.body);
    let port = get(lab.ingress, "a.test:8443", "/seen", "");
    assert!(saw(&port, "Host: a.test:8443"), "a port is part of the host: {}", port.body);

    let forged = "X-Forwarded-For: 6.6.6.6\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: evil.example\r\n\
                  X-Real-IP: 6.6.6.6\r\nForwarded: for=6.6.6.6;host=evil.example\r\nX-Forwarded-Port: 666\r\n\
                  X-Forwarded-Ssl: on\r\nX-Forwarded-Scheme: https\r\nX-Forwarded-Server: evil.example\r\n\
                  X-Forwarded-Prefix: /evil\r\nProxy: http://evil.example\r\nX-Original-URL: /evil\r\nX-Rewrite-URL: /evil\r\n";
    let answer = get(lab.ingress, "a.test", "/seen", forged);
    assert!(saw(&answer, "X-Forwarded-For: 127.0.0.1") && saw(&answer, "X-Real-IP: 127.0.0.1"), "{}", answer.body);
    assert!(saw(&answer, "X-Forwarded-Proto: http"), "{}", answer.body);
    assert!(
        !answer.body.contains("evil") && !answer.body.contains("666") && !answer.body.contains("6.6.6.6"),
        "{}",
        answer.body
    );
    for gone in ["Forwarded", "X-Forwarded-Port", "X-Forwarded-Ssl", "Proxy", "X-Original-URL", "X-Forwarded-Prefix"] {
        assert!(!saw_header(&answer, gone), "{gone}: {}", answer.body);
    }
    // HTTP/2 without TLS could carry further requests past nginx.
    let h2c = get(
        lab.ingress,
        "a.test",
        "/seen",
        "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n",
    );
    assert!(!saw_header(&h2c, "upgrade") && saw(&h2c, "Connection: close"), "{}", h2c.body);
}

#[test]
fn trusted_proxy_headers_are_passed_on() {
    let lab = Lab::with(&Setup { nginx: "trusted_proxies = [\"127.0.0.0/8\"]", ..Setup::default() });
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "a.test", ""));
    let answer = get(
        lab.ingress,
        "a.test",
        "/seen",
        "X-Forwarded-For: 203.0.113.7\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: shop.example\r\nX-Forwarded-Port: 443\r\nForwarded: for=203.0.113.7\r\nProxy: x\r\n",
    );
    for line in [
        "X-Forwarded-For: 203.0.113.7, 127.0.0.1",
        "X-Forwarded-Proto: https",
        "X-Forwarded-Host: shop.example",
        "X-Forwarded-Port: 443",
        "Forwarded: for=203.0.113.7",
        "X-Real-IP: 203.0.113.7",
    ] {
        assert!(saw(&answer, line), "{line}: {}", answer.body);
    }
    assert!(!saw_header(&answer, "proxy"), "{}", answer.body);
    let plain = get(lab.ingress, "a.test", "/seen", "");
    assert!(saw(&plain, "X-Forwarded-For: 127.0.0.1") && saw(&plain, "X-Forwarded-Proto: http"), "{}", plain.body);
}

#[test]
fn request_that_crashes_its_instance_is_not_retried() {
    let lab = Lab::new();
    let spec = lab.socket_spec(&lab.image("v1"), "a.test", "deploy: {replicas_per_host: 3}\n");
    lab.deploy("web", "apps/web/spec", &spec);
    let before = lab.metric("demae_container_restarts_total", "web");
    let answer = get(lab.ingress, "a.test", "/die", "");
    assert_eq!(answer.status, 502, "{}", answer.head);
    until("the instance runs again", || lab.metric("demae_container_restarts_total", "web") > before);
    lab.wait_app("web", "healthy", |s| s.state == State::Converged && s.healthy == 3);
    assert_eq!(lab.metric("demae_container_restarts_total", "web") - before, 1.0, "only one was ended by it");
}

#[test]
fn request_that_reached_no_instance_is_retried_on_another() {
    let lab = Lab::with(&Setup { top: "resync = \"1h\"\n", ..Setup::default() });
    let spec = lab.port_spec(&lab.image("v1"), "a.test", "deploy: {replicas_per_host: 3}\n");
    lab.deploy("web", "apps/web/spec", &spec);
    // Without an agent a dead instance stays in service.
    let mut lab = lab;
    lab.stop_agent();
    let ids = crate::support::containers::ids(&lab, "web");
    crate::support::process::docker(&["update", "--restart=no", &ids[0]]);
    crate::support::process::docker(&["kill", &ids[0]]);
    for n in 0..30 {
        let answer = get(lab.ingress, "a.test", "/", "");
        assert_eq!(answer.status, 200, "request {n}: {}", answer.head);
    }
}

#[test]
fn request_body_is_buffered_unless_disabled() {
    let lab = Lab::new();
    let spec = |host: &str, more: &str| {
        lab.socket_spec(&lab.image("v1"), host, "").replace("drain: 10s", &format!("drain: 10s{more}"))
    };
    lab.deploy("whole", "apps/whole/spec", &spec("whole.test", ""));
    lab.deploy("early", "apps/early/spec", &spec("early.test", ", request_buffering: false"));
    let begin = |host: &str| {
        let mut stream = TcpStream::connect(lab.ingress).expect("a connection");
        let head = format!("POST /early HTTP/1.1\r\nHost: {host}\r\nContent-Length: 1000000\r\n\r\nxxxx");
        stream.write_all(head.as_bytes()).expect("sent");
        stream.set_read_timeout(Some(Duration::from_secs(1))).expect("a timeout");
        let mut first = [0; 16];
        stream.read(&mut first).map(|n| String::from_utf8_lossy(&first[..n]).into_owned())
    };
    assert!(begin("early.test").expect("an answer before the body has come").starts_with("HTTP/1.1 200"));
    assert!(begin("whole.test").is_err(), "nginx waits for the whole body");
}

#[test]
fn slow_upload_across_a_deploy_completes_in_port_mode() {
    let lab = Lab::new();
    let spec = lab.port_spec(&lab.image("v1"), "a.test", "").replace("drain: 10s", "drain: 1s");
    lab.deploy("web", "apps/web/spec", &spec);
    let mut stream = TcpStream::connect(lab.ingress).expect("a connection");
    let head = "POST /seen HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\nContent-Length: 7000\r\n\r\n";
    stream.write_all(head.as_bytes()).expect("sent");
    lab.put("apps/web/image", &lab.image("v2"));
    until("the new release answers", || lab.get("a.test", "/").is_ok_and(|(_, body)| body.contains("version=v2")));
    // Seven times the drain. The duration is under test, so it is waited for.
    let began = Instant::now();
    for n in 1..=7 {
        until("a second has passed", || began.elapsed() >= Duration::from_secs(n));
        stream.write_all(&[b'x'; 1000]).expect("sent");
    }
    let answer = read(stream);
    assert!(saw(&answer, "body=7000"), "{} {}", answer.status, answer.head);
    lab.wait_app("web", "converged once no request is in flight", |s| s.state == State::Converged);
}

#[test]
fn wildcard_hosts_and_paths_are_routed_to_their_own_apps() {
    let lab = Lab::new();
    let spec = |version: &str, host: &str, more: &str| {
        lab.socket_spec(&lab.image(version), host, "").replace("drain: 10s", &format!("drain: 10s{more}"))
    };
    lab.deploy("root", "apps/root/spec", &spec("root", "a.test, b.test", ""));
    lab.deploy("shop", "apps/shop/spec", &spec("shop", "a.test", ", path: /shop, strip_path: true"));
    lab.deploy("api", "apps/api/spec", &spec("api", "a.test, only.test", ", path: /api/v1.0"));
    let load = crate::support::load::Load::start(lab.ingress, "a.test", vec![crate::support::load::Client::get(false)]);
    let version = |host: &str, path: &str| {
        let (status, body) = lab.get(host, path).expect("an answer");
        let word = body.split("version=").nth(1).and_then(|r| r.split_whitespace().next());
        word.map_or(status.to_string(), str::to_owned)
    };
    for (host, path, wanted) in [
        ("a.test", "/", "root"),
        ("a.test", "/shop", "shop"),
        ("a.test", "/shop/", "shop"),
        ("a.test", "/shop/x/y?z=1", "shop"),
        ("a.test", "/shopping", "root"),
        ("a.test", "/api/v1.0/x", "api"),
        ("a.test", "/api/v1x0/x", "root"),
        ("b.test", "/shop/", "root"),
        ("only.test", "/api/v1.0/", "api"),
        ("only.test", "/", "404"),
        ("other.test", "/", "404"),
    ] {
        assert_eq!(version(host, path), wanted, "{host}{path}");
    }
    let stripped = get(lab.ingress, "a.test", "/shop/seen?a=%2F&b=//", "");
    assert!(saw(&stripped, "GET /seen?a=%2F&b=// HTTP/1.1"), "{}", stripped.body);
    assert!(saw(&stripped, "X-Forwarded-Prefix: /shop"), "{}", stripped.body);
    let escaped = get(lab.ingress, "a.test", "/shop/seen%2Fx", "");
    assert!(escaped.body.contains("version=shop"), "what is escaped is no other path: {}", escaped.body);
    let around = get(lab.ingress, "a.test", "/x/../shop/seen", "");
    assert_eq!(around.status, 400, "{}", around.body);

    // A second app for the same path is blocked, and the reason names the path.
    lab.put("apps/thief/spec", &spec("thief", "a.test", ", path: /shop"));
    let blocked = lab.wait_app("thief", "blocked by the app that has the path", |s| s.state == State::Blocked);
    assert!(
        blocked.is("host_taken") && ["a.test/shop", "`shop`"].iter().all(|name| blocked.reason.contains(name)),
        "{blocked:?}"
    );

    // The root app is removed; the apps below it stay.
    let tally = load.stop();
    assert_eq!(tally.failed, 0, "{:#?}", tally.reasons);
    lab.del("apps/root/");
    until("the root app is removed", || version("a.test", "/") == "404");
    assert_eq!(version("a.test", "/shop/"), "shop");

    // Customer domains.
    lab.deploy("rest", "apps/rest/spec", &spec("rest", "\"*\"", ""));
    assert_eq!(version("customer.example", "/"), "rest");
    assert_eq!(version("a.test", "/"), "404", "a host of another app is not matched by the wildcard");
    assert_eq!(version("a.test", "/shop/"), "shop");
    lab.deploy("rest", "apps/rest/image", &lab.image("v2"));
    assert_eq!(version("customer.example", "/"), "v2");
    lab.del("apps/rest/");
    until("unknown hosts get 404 again", || version("customer.example", "/") == "404");
}

#[test]
fn app_with_several_endpoints_is_deployed_as_one() {
    let lab = Lab::new();
    let image = lab.image("v1");
    let check = "healthcheck: {http: /healthz, interval: 1s, start_period: 10s}\nstop_grace_period: 2s\n";
    let user = crate::support::lab::user_line();
    let by_port = format!(
        "image: \"{image}\"\nenvironment: {{ALSO_PORT: \"9090\"}}\n{check}ingress:\n  - {{hosts: [p.test], port: 8080, drain: 5s}}\n  - {{hosts: [padmin.test], port: 9090}}\n"
    );
    let by_socket = format!(
        "image: \"{image}\"\n{user}environment: {{SOCKET: /run/app/a.sock, ALSO_SOCKET: /run/app/b.sock}}\n{check}ingress:\n  - {{hosts: [s.test], socket: /run/app/a.sock, drain: 5s}}\n  - {{hosts: [sadmin.test], socket: /run/app/b.sock}}\n"
    );
    lab.deploy("port", "apps/port/spec", &by_port);
    lab.deploy("socket", "apps/socket/spec", &by_socket);
    let way = |host: &str| {
        let (_, body) = lab.get(host, "/").expect("an answer");
        let word =
            |name: &str| body.split(name).nth(1).and_then(|r| r.split_whitespace().next()).unwrap_or("").to_owned();
        (word("version="), word("way="))
    };
    for (host, wanted) in
        [("p.test", "first"), ("padmin.test", "second"), ("s.test", "first"), ("sadmin.test", "second")]
    {
        let first = way(host).1 != "second";
        assert_eq!(first, wanted == "first", "{host}");
    }
    let reloads = lab.metric("demae_nginx_reloads_total", "done");
    for (app, hosts) in [("socket", ["s.test", "sadmin.test"]), ("port", ["p.test", "padmin.test"])] {
        let load = hosts.map(|host| {
            crate::support::load::Load::start(
                lab.ingress,
                host,
                vec![crate::support::load::Client::get(false), crate::support::load::Client::post(false)],
            )
        });
        lab.deploy(app, &format!("apps/{app}/image"), &lab.image("v2"));
        for load in load {
            let tally = load.stop();
            assert_eq!((tally.failed, tally.stale), (0, 0), "{app}: {:#?}", tally.reasons);
        }
        for host in hosts {
            assert_eq!(way(host).0, "v2", "{host}");
        }
        if app == "socket" {
            assert_eq!(lab.metric("demae_nginx_reloads_total", "done"), reloads, "two symlinks, and no reload");
        }
    }
    // In another order each host keeps its endpoint, at every moment.
    let turned = |spec: &str| {
        let (head, ways) = spec.split_once("ingress:\n").expect("a list");
        let ways: Vec<&str> = ways.lines().rev().collect();
        format!("{head}ingress:\n{}\n", ways.join("\n"))
    };
    for (app, spec, hosts) in
        [("socket", &by_socket, ["s.test", "sadmin.test"]), ("port", &by_port, ["p.test", "padmin.test"])]
    {
        let done = std::sync::atomic::AtomicBool::new(false);
        let asked = std::thread::scope(|scope| {
            let asking = scope.spawn(|| {
                let mut asked = 0;
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    for (host, is_second) in hosts.iter().zip([false, true]) {
                        assert_eq!(way(host).1 == "second", is_second, "{host} is served by another endpoint");
                        asked += 1;
                    }
                }
                asked
            });
            let deployed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                lab.deploy(app, &format!("apps/{app}/spec"), &turned(spec));
            }));
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            let asked = asking.join().expect("every response is from the right endpoint");
            assert!(deployed.is_ok(), "{app} is deployed");
            asked
        });
        assert!(asked > 100, "{asked} requests");
    }
    // An app that does not listen on all its endpoints is not healthy.
    let half = by_port.replace("image: ", "x-a: b\nimage: ").replace("{ALSO_PORT: \"9090\"}", "{ALSO_PORT: \"9091\"}");
    let half = half.replace("start_period: 10s", "start_period: 500ms, retries: 1");
    lab.put("apps/port/spec", &half);
    let failed = lab.wait_app("port", "refused", |s| s.state == State::Blocked);
    assert!(failed.reason.contains("nothing listens on port 9090"), "{}", failed.reason);
    for (host, is_second) in [("p.test", false), ("padmin.test", true)] {
        let (version, way) = way(host);
        assert_eq!((version.as_str(), way == "second"), ("v2", is_second), "the old one serves {host}");
    }
    for app in ["port", "socket"] {
        lab.del(&format!("apps/{app}/"));
    }
    until("nothing is left", || lab.containers().is_empty() && lab.traces().is_empty());
}
