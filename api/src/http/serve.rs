//! The accept loop: a bounded number of connections, heads that must arrive in time, and an end with a deadline.
//! Around every request: its id, its time, the headers that every answer has. What answers is given from outside.

use http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, REFERRER_POLICY, VARY, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty};
use hyper::body::{Body, Bytes};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::process::{Resource, getrlimit};
use shared::shutdown::Shutdown;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::util::BoxCloneService;
use tower::{BoxError, ServiceExt};
use tower_http::compression::Compression;
use tower_http::compression::predicate::{NotForContentType, Predicate, SizeAbove};
use tracing::Instrument;

use crate::http::cors::Cors;
use crate::http::request::Request;

/// Connections at once, if the process may open so many files; more wait to be accepted.
const MAX_CONNECTIONS: u64 = 8_192;
/// Files that are left for everything but connections: the database, the log, a worker in the same process.
const FILES_KEPT: u64 = 128;
/// The largest head of a request, in bytes, and what is read of a body at a time.
const MAX_HEAD: usize = 64 * 1024;
/// Answers below this size aren't compressed.
const COMPRESS_ABOVE: u64 = 1_024;

/// What answers requests: it finds the [`Request`] among the extensions, as an `Arc`. Its own body is empty.
pub type App = BoxCloneService<http::Request<Empty<Bytes>>, warp::reply::Response, Infallible>;

/// What the accept loop needs to know beside what answers.
#[derive(Clone, Debug)]
pub struct Edge {
    /// The web pages that may read the answers.
    pub cors: Cors,
    /// How long a client may take to send the head of a request.
    pub head_timeout: Duration,
    /// How long it may take to send the body.
    pub body_timeout: Duration,
    /// How long open requests get at shutdown.
    pub drain: Duration,
    /// Cancelled when the loop accepts no more: whoever waits for something stops waiting.
    pub stopping: CancellationToken,
}

/// Lets `app` answer what comes to `listener` until `shutdown`: then it accepts no more, ends what only waits, gives
/// the rest the time of the drain (or until the second signal), and returns.
pub async fn serve(listener: TcpListener, app: App, edge: Edge, shutdown: Shutdown) {
    let (connections, cut) = (TaskTracker::new(), CancellationToken::new());
    let slots = Arc::new(Semaphore::new(max_connections()));
    let app = compressed(app);
    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener, &slots) => accepted,
            () = shutdown.drain.cancelled() => break,
        };
        let Some((stream, peer, slot)) = accepted else {
            continue;
        };
        let (app, edge, cut) = (app.clone(), edge.clone(), cut.clone());
        connections.spawn(async move {
            connection(stream, peer, app, edge, cut).await;
            drop(slot);
        });
    }
    drop(listener);
    edge.stopping.cancel();
    connections.close();
    tokio::select! {
        drained = timeout(edge.drain, connections.wait()) => if drained.is_err() {
            tracing::warn!("{} connections were cut: DRAIN_SECONDS have passed", connections.len());
        },
        () = shutdown.at_once.cancelled() => {}
    }
    cut.cancel();
    connections.wait().await;
}

/// How many connections fit into what the process may open.
fn max_connections() -> usize {
    let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(files.saturating_sub(FILES_KEPT).clamp(16, MAX_CONNECTIONS)).unwrap_or(16)
}

/// The next connection, once there's a slot for it. `None` when it failed, which is no reason to stop.
async fn accept(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
) -> Option<(TcpStream, SocketAddr, tokio::sync::OwnedSemaphorePermit)> {
    let slot = Arc::clone(slots).acquire_owned().await.ok()?;
    match listener.accept().await {
        Ok((stream, peer)) => Some((stream, peer, slot)),
        Err(error) => {
            // The process may be out of file descriptors; others will be closed.
            tracing::warn!(%error, "could not accept a connection");
            sleep(Duration::from_millis(100)).await;
            None
        }
    }
}

type Compressed = BoxCloneService<http::Request<Empty<Bytes>>, Answer, Infallible>;
type Answer = http::Response<UnsyncBoxBody<Bytes, BoxError>>;

/// The same, with its larger answers compressed for clients that ask for it. Streams never are: an event would wait in
/// the compressor until more come.
fn compressed(app: App) -> Compressed {
    let predicate = SizeAbove::new(COMPRESS_ABOVE).and(NotForContentType::SSE);
    let compressed = Compression::new(app).compress_when(predicate);
    let boxed = |response: http::Response<_>| response.map(boxed);
    BoxCloneService::new(ServiceExt::<http::Request<Empty<Bytes>>>::map_response(
        compressed, boxed,
    ))
}

fn boxed<B>(body: B) -> UnsyncBoxBody<Bytes, BoxError>
where
    B: Body<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
{
    body.map_err(Into::into).boxed_unsync()
}

/// Serves one connection until it ends, the drain is over, or it is idle when the drain begins.
async fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    app: Compressed,
    edge: Edge,
    cut: CancellationToken,
) {
    // Answers are written whole, so waiting for more to send would only delay them.
    let _ = stream.set_nodelay(true);
    let stopping = edge.stopping.clone();
    // Since the connection was ready for the request. This also ends connections on which nothing is asked.
    let (head_timeout, body_timeout) = (edge.head_timeout, edge.body_timeout);
    let service = service_fn(move |request| {
        let request = Arc::new(Request::new(peer, body_timeout, request));
        let (app, cors) = (app.clone(), edge.cors.clone());
        async move { Ok::<_, Infallible>(answer(app, &cors, request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(head_timeout)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    // What fails here is a client that went away or never spoke HTTP.
    tokio::select! {
        _ = connection.as_mut() => return,
        () = stopping.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    tokio::select! {
        _ = connection => {}
        () = cut.cancelled() => {}
    }
}

/// Answers one request, and says in the log how long it took.
async fn answer(app: Compressed, cors: &Cors, request: Arc<Request>) -> Answer {
    let begun = Instant::now();
    let span = tracing::info_span!("request", request.id = %request.id);
    let mut routed = http::Request::new(Empty::new());
    routed.method_mut().clone_from(&request.method);
    routed.uri_mut().clone_from(request.uri());
    routed.headers_mut().clone_from(&request.headers);
    routed.extensions_mut().insert(Arc::clone(&request));
    let Ok(mut response) = app.oneshot(routed).instrument(span.clone()).await;
    let duration = begun.elapsed();
    finish(&request, cors, response.headers_mut(), duration);
    span.in_scope(|| log(&request, response.status(), duration));
    response
}

/// Gives an answer the headers that all answers have. The fixed ones are defaults: a handler that needs another
/// value has set it.
fn finish(request: &Request, cors: &Cors, headers: &mut HeaderMap, duration: Duration) {
    const DEFAULTS: [(HeaderName, &str); 5] = [
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (X_FRAME_OPTIONS, "DENY"),
        (REFERRER_POLICY, "no-referrer"),
        (
            CONTENT_SECURITY_POLICY,
            "default-src 'none'; frame-ancestors 'none'",
        ),
        (CACHE_CONTROL, "no-store"),
    ];
    for (name, value) in DEFAULTS {
        headers.entry(name).or_insert(HeaderValue::from_static(value));
    }
    vary(headers);
    if let Ok(id) = HeaderValue::from_str(&request.id) {
        headers.insert(HeaderName::from_static("x-request-id"), id);
    }
    if let Ok(time) = HeaderValue::from_str(&format!("{}ms", duration.as_millis())) {
        headers.insert(HeaderName::from_static("x-response-time"), time);
    }
    cors.apply_to(&request.headers, headers);
}

/// Says of which request headers the answer depends: always these two, and those that the handler named.
fn vary(headers: &mut HeaderMap) {
    let named = headers
        .get_all(VARY)
        .iter()
        .filter_map(|value| value.to_str().ok());
    let named = named.filter(|value| !value.eq_ignore_ascii_case("accept-encoding"));
    let all = ["Accept-Encoding", "Origin"]
        .into_iter()
        .chain(named)
        .collect::<Vec<_>>()
        .join(", ");
    if let Ok(value) = HeaderValue::from_str(&all) {
        headers.insert(VARY, value);
    }
}

/// One line per request. Polling is most of the traffic and says little, so reads stand one level lower.
fn log(request: &Request, status: StatusCode, duration: Duration) {
    let (method, path, status) = (request.method.as_str(), request.path(), status.as_u16());
    let duration_ms = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    if request.method == Method::GET {
        tracing::debug!(
            http.method = method,
            http.path = path,
            http.status = status,
            duration_ms,
            "answered"
        );
    } else {
        tracing::info!(
            http.method = method,
            http.path = path,
            http.status = status,
            duration_ms,
            "answered"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_answer_says_what_it_depends_on_once() {
        let mut headers = HeaderMap::new();
        headers.append(VARY, HeaderValue::from_static("Prefer"));
        headers.append(VARY, HeaderValue::from_static("accept-encoding"));
        vary(&mut headers);
        assert_eq!(
            headers.get_all(VARY).iter().collect::<Vec<_>>(),
            ["Accept-Encoding, Origin, Prefer"]
        );
    }
}
