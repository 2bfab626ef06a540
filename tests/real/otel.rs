//! The export of spans to the endpoint in OpenTelemetry's environment variable.

use std::{
    io::{Read as _, Write as _},
    net::TcpListener,
    sync::{Arc, Mutex},
    thread,
};

use crate::support::{
    lab::{Lab, Setup},
    wait::until,
};

/// An empty SETTINGS frame of HTTP/2, and an acknowledgement of the other side's: RFC 9113, 6.5.
const SETTINGS: [u8; 18] = [0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 4, 1, 0, 0, 0, 0];

#[test]
fn spans_of_a_deploy_are_exported() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
    let received = Arc::new(Mutex::new(Vec::new()));
    let sink = received.clone();
    // Span names are plain text in the payload, so no more of the protocol has to be parsed.
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let sink = sink.clone();
            thread::spawn(move || {
                let mut bytes = [0; 4096];
                stream.write_all(&SETTINGS).ok()?;
                loop {
                    match stream.read(&mut bytes).ok()? {
                        0 => return Some(()),
                        n => sink.lock().ok()?.extend_from_slice(&bytes[..n]),
                    }
                }
            });
        }
    });
    let mut lab = Lab::with(&Setup { no_agent: true, ..Setup::default() });
    lab.start_agent(&[("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint), ("OTEL_BSP_SCHEDULE_DELAY", "200")]);
    lab.wait_ready();
    let secret = "canary-in-the-environment";
    lab.put("env/web/TOKEN", secret);
    lab.deploy("web", "apps/web/spec", &lab.socket_spec(&lab.image("v1"), "web.test", ""));
    let has = |text: &str| {
        let received = received.lock().expect("no thread panicked with it");
        received.windows(text.len()).any(|w| w == text.as_bytes())
    };
    for span in ["deploy", "create", "health", "switch", "prove"] {
        until(span, || has(span));
    }
    assert!(has("demae") && has("web") && !has(secret));
}
