//! A single request to an instance, to nginx or to an agent.

use std::{io, net::SocketAddr, path::Path, time::Duration};

use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{Request, body::Bytes, client::conn::http1, header::HOST};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpStream, UnixStream};

/// Largest body that is read: the status of a thousand apps with their log tails.
const MAX_BODY: usize = 16 * 1024 * 1024;

/// A response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// Whether it came from demae's own default server.
    pub unknown_host: bool,
    /// The `Date` header.
    pub date: Option<String>,
    /// The beginning of the body.
    pub body: String,
}

/// Why there was no response, for people.
pub type NoAnswer = String;

/// Sends a request over a unix socket.
///
/// # Errors
/// In words, if there is no answer in time.
pub async fn get_unix(path: &Path, host: &str, uri: &str, within: Duration) -> Result<Answer, NoAnswer> {
    bounded(within, async {
        let stream = UnixStream::connect(path).await.map_err(|e| refused(&e, &path.display().to_string()))?;
        get(TokioIo::new(stream), host, uri).await
    })
    .await
}

/// Sends a request over TCP.
///
/// # Errors
/// In words, if there is no answer in time.
pub async fn get_tcp(address: &str, host: &str, uri: &str, within: Duration) -> Result<Answer, NoAnswer> {
    bounded(within, async {
        let stream = TcpStream::connect(address).await.map_err(|e| refused(&e, address))?;
        get(TokioIo::new(stream), host, uri).await
    })
    .await
}

/// Streams the lines of a response for as long as `each` returns true; `opened` is called when the stream begins. The
/// timeout is for the response head: a stream may be silent for hours.
///
/// # Errors
/// In words, if there is no answer in time, or one that is no stream.
pub async fn lines(
    address: &str,
    uri: &str,
    within: Duration,
    opened: impl FnOnce(),
    mut each: impl FnMut(&str) -> bool,
) -> Result<(), NoAnswer> {
    let stream = bounded(within, async { TcpStream::connect(address).await.map_err(|e| refused(&e, address)) }).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|e| no_http(&e))?;
    let request = Request::get(uri).header(HOST, "localhost").body(Empty::<Bytes>::new()).map_err(|e| e.to_string())?;
    let reading = async {
        let answer = bounded(within, async { sender.send_request(request).await.map_err(|e| no_http(&e)) }).await?;
        if !answer.status().is_success() {
            return Err(format!("answered with status {}", answer.status().as_u16()));
        }
        opened();
        let mut body = answer.into_body();
        let mut rest = Vec::new();
        // A partial line at the end is dropped: the next stream sends it again.
        while let Some(Ok(frame)) = body.frame().await {
            rest.extend_from_slice(frame.data_ref().map_or(&[], |data| data));
            while let Some(end) = rest.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = rest.drain(..=end).collect();
                if !each(String::from_utf8_lossy(&line).trim_end()) {
                    return Ok(());
                }
            }
        }
        Ok(())
    };
    tokio::pin!(reading);
    let mut connection = std::pin::pin!(connection);
    let mut open = true;
    loop {
        tokio::select! {
            ended = &mut reading => return ended,
            _ = &mut connection, if open => open = false,
        }
    }
}

/// Connects to a unix socket.
///
/// # Errors
/// In words, if it does not in time.
pub async fn connect_unix(path: &Path, within: Duration) -> Result<(), NoAnswer> {
    bounded(within, async {
        UnixStream::connect(path).await.map(drop).map_err(|e| refused(&e, &path.display().to_string()))
    })
    .await
}

/// Connects to an address. It must be the container's own: Docker's proxy accepts connections to a published port
/// whether the app listens or not.
///
/// # Errors
/// In words, if it does not in time.
pub async fn connect_tcp(address: SocketAddr, within: Duration) -> Result<(), NoAnswer> {
    let peer = format!("port {} of the container", address.port());
    bounded(within, async { TcpStream::connect(address).await.map(drop).map_err(|e| refused(&e, &peer)) }).await
}

async fn bounded<T>(
    within: Duration,
    request_future: impl Future<Output = Result<T, NoAnswer>>,
) -> Result<T, NoAnswer> {
    match tokio::time::timeout(within, request_future).await {
        Ok(answer) => answer,
        Err(_) => Err(format!("no answer within {} ms", within.as_millis())),
    }
}

async fn get<S>(stream: TokioIo<S>, host: &str, uri: &str) -> Result<Answer, NoAnswer>
where
    TokioIo<S>: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (mut sender, connection) = http1::handshake(stream).await.map_err(|e| no_http(&e))?;
    let request = Request::get(uri)
        .header(HOST, host)
        .header("user-agent", concat!("demae/", env!("CARGO_PKG_VERSION")))
        .header("connection", "close")
        .body(Empty::<Bytes>::new())
        .map_err(|e| e.to_string())?;
    let request_future = async {
        let response = sender.send_request(request).await.map_err(|e| no_http(&e))?;
        let status = response.status().as_u16();
        let unknown_host = response.headers().contains_key("x-demae-unknown-host");
        let date = response.headers().get(hyper::header::DATE).and_then(|d| d.to_str().ok()).map(str::to_owned);
        // A truncated body is still a response: only the status matters.
        let body = Limited::new(response.into_body(), MAX_BODY).collect().await;
        let body = body.map_or_else(|_| String::new(), |b| String::from_utf8_lossy(&b.to_bytes()).into_owned());
        Ok(Answer { status, unknown_host, date, body })
    };
    // The connection must be polled beside the request, and ends with it.
    tokio::pin!(request_future);
    let mut connection = std::pin::pin!(connection);
    let mut open = true;
    loop {
        tokio::select! {
            answer = &mut request_future => return answer,
            _ = &mut connection, if open => open = false,
        }
    }
}

fn refused(error: &io::Error, peer: &str) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "its socket does not exist yet".to_owned(),
        io::ErrorKind::ConnectionRefused => format!("connection refused: nothing listens on {peer}"),
        io::ErrorKind::PermissionDenied => {
            format!(
                "permission denied on `{peer}`; run the agent as root, or the app as the agent's user (`user` in the spec)"
            )
        }
        _ => format!("cannot connect: {error}"),
    }
}

fn no_http(error: &hyper::Error) -> String {
    let mut text = format!("invalid HTTP response: {error}");
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
