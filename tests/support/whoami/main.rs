//! Answers as the image `traefik/whoami` does, as far as the README goes: a program of its own, built without cargo.

use std::{
    env,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    thread,
};

fn main() {
    let port = env::var("WHOAMI_PORT_NUMBER").unwrap_or_else(|_| "80".to_owned());
    let Ok(port) = port.parse::<u16>() else {
        eprintln!("invalid port: {port}");
        std::process::exit(1);
    };
    let name = env::var("WHOAMI_NAME").map(|name| format!("Name: {name}\n")).unwrap_or_default();
    let listener = TcpListener::bind(("0.0.0.0", port)).expect("the port is free");
    for client in listener.incoming().flatten() {
        let name = name.clone();
        thread::spawn(move || answer(client, &name));
    }
}

/// One request for each connection.
fn answer(mut client: TcpStream, name: &str) -> Option<()> {
    let mut lines = BufReader::new(client.try_clone().ok()?).lines();
    let first = lines.next()?.ok()?;
    lines.take_while(|line| line.as_ref().is_ok_and(|line| !line.is_empty())).for_each(drop);
    let body = format!("{name}{first}\n");
    write!(client, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len()).ok()
}
