//! The accept loop: a bounded number of connections, heads that must arrive in time, and an end with a deadline.
//! Around every request: its id, its time, the headers that every answer has. What answers is given from outside.

use http::header::{
    CACHE_CONTROL, CONTENT_DISPOSITION, CONTENT_SECURITY_POLICY, REFERRER_POLICY, VARY,
    X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty};
use hyper::body::{Body, Bytes};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use shared::shutdown::Shutdown;
use std::collections::HashMap;
use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::util::BoxCloneService;
use tower::{BoxError, ServiceExt};
use tower_http::compression::Compression;
use tower_http::compression::predicate::{NotForContentType, Predicate, SizeAbove};
use tracing::Instrument;

use crate::http::address::{self, Proxies};
use crate::http::cors::Cors;
use crate::http::problem::Problem;
use crate::http::request::Request;
use crate::http::unreadable::Explaining;

/// Connections at once, if the process may open so many files; more wait to be accepted.
const MAX_CONNECTIONS: u64 = 8_192;
/// Connections beyond those, for the paths that everybody may ask: whoever looks whether the service lives gets an
/// answer while others hold all connections.
const RESERVED_CONNECTIONS: usize = 32;
/// A reserved connection has this long to ask, and gets one answer.
const RESERVED_WITHIN: Duration = Duration::from_secs(2);
/// Files that are left for everything but connections: the database, the log, a worker in the same process.
const FILES_KEPT: u64 = 128;
/// The largest head of a request that is read, in bytes, and what is read of a body at a time.
const MAX_BUFFER: usize = 128 * 1024;
/// The longest path and query, in bytes.
pub(super) const MAX_URI: usize = 16 * 1024;
/// The most headers, and all their names and values, in bytes.
const MAX_HEADERS: (usize, usize) = (100, 64 * 1024);
/// Headers that all answers have, unless a handler has set another value.
pub(super) const DEFAULTS: [(HeaderName, &str); 5] = [
    (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (X_FRAME_OPTIONS, "DENY"),
    (REFERRER_POLICY, "no-referrer"),
    (
        CONTENT_SECURITY_POLICY,
        "default-src 'none'; frame-ancestors 'none'",
    ),
    (CACHE_CONTROL, "no-store"),
];
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
    /// The proxies that are trusted: many clients come from each.
    pub proxies: Proxies,
    /// What stands before the code in a problem's `type`.
    pub problem_type_base: String,
    /// Whether everybody may ask for this path.
    pub is_open: fn(&str) -> bool,
    /// Connections at once; half as many from one address. More wait to be accepted.
    pub max_connections: usize,
    /// How long open requests get at shutdown.
    pub drain: Duration,
    /// Cancelled when the loop accepts no more: whoever waits for something stops waiting.
    pub stopping: CancellationToken,
}

/// Lets `app` answer what comes to `listener` until `shutdown`: then it accepts no more, ends what only waits, gives
/// the rest the time of the drain (or until the second signal), and returns.
pub async fn serve(listener: TcpListener, app: App, edge: Edge, shutdown: Shutdown) {
    let (connections, cut) = (TaskTracker::new(), CancellationToken::new());
    let slots = Slots::new(edge.max_connections);
    let app = compressed(app);
    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener, &slots, &edge.proxies) => accepted,
            () = shutdown.drain.cancelled() => break,
        };
        let Some((stream, peer, slot)) = accepted else {
            continue;
        };
        let (app, edge, cut) = (app.clone(), edge.clone(), cut.clone());
        connections.spawn(async move {
            connection(stream, peer, app, edge, slot.is_reserved(), cut).await;
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

/// Raises the limit on open files as far as this process may: each connection is a file, and the usual limit is low for
/// the sake of programs that this one doesn't start.
pub fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::debug!(%error, "the limit on open files stays as it is");
    }
}

/// How many connections fit into what the process may open.
pub fn max_connections() -> usize {
    let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(files.saturating_sub(FILES_KEPT).clamp(16, MAX_CONNECTIONS)).unwrap_or(16)
}

/// What bounds the connections.
struct Slots {
    ordinary: Arc<Semaphore>,
    reserved: Arc<Semaphore>,
    addresses: Addresses,
    per_address: usize,
}

/// How many connections each address has.
type Addresses = Arc<Mutex<HashMap<String, usize>>>;

/// Counts for one connection; dropping it makes room for another.
struct Slot {
    _permit: OwnedSemaphorePermit,
    /// `None` for a reserved one.
    address: Option<(Addresses, String)>,
}

impl Slots {
    fn new(max: usize) -> Self {
        Self {
            ordinary: Arc::new(Semaphore::new(max)),
            reserved: Arc::new(Semaphore::new(RESERVED_CONNECTIONS)),
            addresses: Arc::default(),
            per_address: (max / 2).max(1),
        }
    }

    /// A slot for a connection from this address: an ordinary one, or, when there is none or the address has too many,
    /// a reserved one. `unbounded`: many clients share the address.
    async fn take(&self, address: IpAddr, unbounded: bool) -> Option<Slot> {
        if let Some(slot) = self.take_ordinary(address, unbounded) {
            return Some(slot);
        }
        let permit = Arc::clone(&self.reserved).acquire_owned().await.ok()?;
        Some(Slot {
            _permit: permit,
            address: None,
        })
    }

    fn take_ordinary(&self, address: IpAddr, unbounded: bool) -> Option<Slot> {
        let permit = Arc::clone(&self.ordinary).try_acquire_owned().ok()?;
        let address = address::counted(address.to_canonical());
        let mut addresses = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        let count = addresses.entry(address.clone()).or_default();
        if *count >= self.per_address && !unbounded {
            return None;
        }
        *count += 1;
        Some(Slot {
            _permit: permit,
            address: Some((Arc::clone(&self.addresses), address)),
        })
    }
}

impl Slot {
    const fn is_reserved(&self) -> bool {
        self.address.is_none()
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let Some((addresses, address)) = &self.address else {
            return;
        };
        let mut addresses = addresses.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = addresses.get_mut(address) {
            *count -= 1;
            if *count == 0 {
                addresses.remove(address);
            }
        }
    }
}

/// The next connection, with a slot for it. `None` when it failed, which is no reason to stop.
async fn accept(
    listener: &TcpListener,
    slots: &Slots,
    proxies: &Proxies,
) -> Option<(TcpStream, SocketAddr, Slot)> {
    match listener.accept().await {
        Ok((stream, peer)) => {
            let slot = slots
                .take(peer.ip(), proxies.trust(peer.ip().to_canonical()))
                .await?;
            Some((stream, peer, slot))
        }
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
/// the compressor until more come. Neither are files: their tag and size are those of what is stored.
fn compressed(app: App) -> Compressed {
    let no_file = |_, _, headers: &HeaderMap, _: &_| !headers.contains_key(CONTENT_DISPOSITION);
    let predicate = SizeAbove::new(COMPRESS_ABOVE)
        .and(NotForContentType::SSE)
        .and(no_file);
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
    reserved: bool,
    cut: CancellationToken,
) {
    // Answers are written whole, so waiting for more to send would only delay them.
    let _ = stream.set_nodelay(true);
    let stopping = edge.stopping.clone();
    // Since the connection was ready for the request. This also ends connections on which nothing is asked.
    let head_timeout = if reserved {
        RESERVED_WITHIN.min(edge.head_timeout)
    } else {
        edge.head_timeout
    };
    let stream = Explaining::new(stream, edge.problem_type_base.clone());
    let edge = Arc::new(edge);
    let service = service_fn(move |request| {
        let request = Arc::new(Request::new(peer, edge.body_timeout, request));
        let (app, edge) = (app.clone(), Arc::clone(&edge));
        async move { Ok::<_, Infallible>(answer(app, &edge, reserved, request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(head_timeout)
        .keep_alive(!reserved)
        .max_buf_size(MAX_BUFFER)
        .max_headers(2 * MAX_HEADERS.0)
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
async fn answer(app: Compressed, edge: &Edge, reserved: bool, request: Arc<Request>) -> Answer {
    let begun = Instant::now();
    let span = tracing::info_span!("request", request.id = %request.id);
    let refused = refuse(edge, reserved, &request);
    let mut response = if let Some(problem) = refused {
        request.discard_body().await;
        problem
            .render(&edge.problem_type_base, request.path(), &request.id)
            .map(boxed)
    } else {
        let mut routed = http::Request::new(Empty::new());
        routed.method_mut().clone_from(&request.method);
        routed.uri_mut().clone_from(request.uri());
        routed.headers_mut().clone_from(&request.headers);
        routed.extensions_mut().insert(Arc::clone(&request));
        let Ok(response) = app.oneshot(routed).instrument(span.clone()).await;
        response
    };
    let duration = begun.elapsed();
    finish(&request, &edge.cors, response.headers_mut(), duration);
    span.in_scope(|| log(&request, response.status(), duration));
    response
}

/// Why a request isn't even looked at.
fn refuse(edge: &Edge, reserved: bool, request: &Request) -> Option<Problem> {
    let (uri, headers) = (request.uri(), &request.headers);
    let uri = uri.path().len() + uri.query().map_or(0, str::len);
    let size = headers
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len())
        .sum::<usize>();
    if uri > MAX_URI {
        Some(Problem::UriTooLong(MAX_URI))
    } else if headers.len() > MAX_HEADERS.0 || size > MAX_HEADERS.1 {
        Some(Problem::HeadersTooLarge)
    } else if reserved && !(edge.is_open)(request.path()) {
        Some(Problem::TooManyConnections)
    } else {
        None
    }
}

/// Gives an answer the headers that all answers have.
fn finish(request: &Request, cors: &Cors, headers: &mut HeaderMap, duration: Duration) {
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

    #[tokio::test]
    async fn one_address_never_has_all_connections_and_some_are_kept_for_open_paths() {
        let slots = Slots::new(4);
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        let (one, other) = (address("192.0.2.1"), address("192.0.2.2"));

        let mut held = Vec::new();
        for (from, reserved) in [
            (one, false),
            (one, false),
            (one, true),
            (other, false),
            (other, false),
            (other, true),
            (address("::1"), true),
        ] {
            let slot = slots.take(from, false).await.unwrap();
            assert_eq!(slot.is_reserved(), reserved, "{from}");
            held.push(slot);
        }
        held.clear();

        for _ in 0..4 {
            let slot = slots.take(one, true).await.unwrap();
            assert!(!slot.is_reserved(), "a proxy's address is everybody's");
            held.push(slot);
        }
    }

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
