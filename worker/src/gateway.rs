//! The way from a run to the Messages API: one Unix socket per run, and the only holder of the Anthropic credential.
//!
//! A run proves itself with a token of its own; the gateway puts the real credential in its place and passes the
//! bytes on as they stream, both ways. It serves the two paths that the CLI needs and no other of the account.

pub mod credentials;
pub mod failure;
mod media;
mod provider;
pub mod question;
mod relay;
pub mod request;
pub mod secret;
pub mod upstream;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode, Uri};
use http_body_util::{Either, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use shared::clock;
use subtle::ConstantTimeEq as _;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, oneshot};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::pause::Pause;
use crate::spend::meter::Meter;
use credentials::Credentials;
use failure::{ApiFailure, NO_CREDENTIAL, NOT_THE_API, UNREACHABLE};
use relay::{Head, Passing};
use request::{Permissions, Refusal};
use secret::Secret;

pub use upstream::Upstream;

/// Connections of one run at once. The CLI opens one or two, and one for each subagent.
const MAX_CONNECTIONS: usize = 64;

/// Requests of one run at once; more wait.
const MAX_REQUESTS: usize = 32;

/// How often a run may count tokens: so many at once, and so many more each second.
const COUNTS_AT_ONCE: f64 = 60.0;
const COUNTS_PER_SECOND: f64 = 20.0;

/// The part of an error's body that is read.
const MAX_ERROR_BODY: usize = 64 * 1024;

/// Headers that belong to one connection and not to the message.
const HOP_BY_HOP: [HeaderName; 8] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

const API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// The gateway of one run. Dropping it closes its socket and every request that is under way.
#[derive(Debug)]
pub struct Gateway {
    run: Arc<Run>,
    server: JoinHandle<()>,
}

#[derive(Debug)]
struct Run {
    credentials: Arc<Credentials>,
    token: Secret,
    upstream: Upstream,
    /// Is told what the answers mean for the runs of this worker.
    pause: Arc<Pause>,
    /// The attempt that may send requests.
    attempt: Mutex<Option<Arc<Attempt>>>,
    requests: Arc<Semaphore>,
    memory: Arc<Semaphore>,
    counts: Mutex<Counts>,
    /// The last request that failed, unless a later one succeeded.
    last_failure: Mutex<Option<ApiFailure>>,
    /// The last request that was refused here, unless a later one was sent.
    last_refusal: Mutex<Option<Refusal>>,
    /// What was refused here, and what could not be served, by reason.
    refused: Mutex<Tally>,
    failed: Mutex<Tally>,
}

type Tally = BTreeMap<&'static str, Noted>;

/// An attempt whose requests are served.
#[derive(Debug)]
struct Attempt {
    meter: Arc<Meter>,
    permissions: Permissions,
    /// The requests under way.
    relays: TaskTracker,
    ending: CancellationToken,
}

/// How many counts of tokens are left.
#[derive(Debug)]
struct Counts {
    left: f64,
    at: Instant,
}

/// What happened to requests for one reason.
#[derive(Debug)]
struct Noted {
    count: u64,
    first: String,
}

type Answer = Response<Either<Passing, Full<Bytes>>>;

impl Gateway {
    /// Listens at `socket`, whose path may have 107 bytes, for requests that hold `token`, and sends them to
    /// `upstream` with one of `credentials`, while it is armed for an attempt.
    /// Has to be called inside a runtime.
    pub fn start(
        socket: &Path,
        credentials: Arc<Credentials>,
        token: &str,
        upstream: &Upstream,
        pause: Arc<Pause>,
    ) -> io::Result<Self> {
        match std::fs::remove_file(socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // The run sees the path in /proc/net/unix, so it is given relative to the open folder.
        let folder = std::fs::File::open(socket.parent().unwrap_or(Path::new(".")))?;
        let name = socket.file_name().unwrap_or_default();
        let shown = Path::new("/proc/self/fd")
            .join(folder.as_raw_fd().to_string())
            .join(name);
        let listener = UnixListener::bind(shown)?;
        std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
        let run = Arc::new(Run {
            credentials,
            token: Secret::new(token.to_owned()),
            upstream: upstream.clone(),
            pause,
            attempt: Mutex::default(),
            requests: Arc::new(Semaphore::new(MAX_REQUESTS)),
            memory: request::memory(),
            counts: Mutex::new(Counts {
                left: COUNTS_AT_ONCE,
                at: Instant::now(),
            }),
            last_failure: Mutex::default(),
            last_refusal: Mutex::default(),
            refused: Mutex::default(),
            failed: Mutex::default(),
        });
        let server = tokio::spawn(serve(listener, Arc::clone(&run)));
        Ok(Self { run, server })
    }

    /// Serves the requests of an attempt from now on: what they cost is added to `meter`, and they may ask for what
    /// `permissions` allow.
    pub fn arm(&self, meter: Arc<Meter>, permissions: Permissions) {
        let attempt = Attempt {
            meter,
            permissions,
            relays: TaskTracker::new(),
            ending: CancellationToken::new(),
        };
        *lock(&self.run.attempt) = Some(Arc::new(attempt));
    }

    /// Serves no more requests, ends those that are under way, and waits until what they cost is known: two seconds at
    /// most. Tells the log what was refused.
    pub async fn disarm(&self) {
        let attempt = lock(&self.run.attempt).take();
        if let Some(attempt) = attempt {
            attempt.ending.cancel();
            attempt.relays.close();
            attempt.relays.wait().await;
        }
        self.run.tell();
    }

    /// The last request that failed, unless a later one succeeded.
    pub fn last_failure(&self) -> Option<ApiFailure> {
        lock(&self.run.last_failure).clone()
    }

    /// The last request of the attempt that was refused here, unless a later one was sent.
    pub fn last_refusal(&self) -> Option<Refusal> {
        lock(&self.run.last_refusal).clone()
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        // The connections' tasks are owned by this one and end with it.
        self.server.abort();
        if let Some(attempt) = lock(&self.run.attempt).take() {
            attempt.ending.cancel();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn serve(listener: UnixListener, run: Arc<Run>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                Ok((socket, _)) => {
                    connections.spawn(connection(socket, Arc::clone(&run)));
                }
                // Out of file descriptors, most likely: it passes.
                Err(error) => {
                    note(&run.failed, "no connection", || error.to_string());
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn connection(socket: UnixStream, run: Arc<Run>) {
    let service = service_fn(move |request| {
        let run = Arc::clone(&run);
        async move { Ok::<_, Infallible>(run.answer(request).await) }
    });
    // It ends with an error when either side hangs up in the middle, which both do as they like.
    let _ = http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(socket), service)
        .await;
}

impl Run {
    async fn answer(&self, request: Request<Incoming>) -> Answer {
        match self.serve(request).await {
            Ok(answer) => answer,
            Err(refusal) => self.refuse(&refusal),
        }
    }

    async fn serve(&self, request: Request<Incoming>) -> Result<Answer, Refusal> {
        if !self.knows(request.headers()) {
            return Err(Refusal::Token);
        }
        if !is_served(request.method(), request.uri()) {
            return Err(Refusal::Path);
        }
        let attempt = lock(&self.attempt).clone().ok_or(Refusal::Disarmed)?;
        let (parts, body) = request.into_parts();
        let is_message = parts.uri.path() == "/v1/messages";
        if !is_message && !self.may_count() {
            return Err(Refusal::TooOften);
        }
        let slot = Arc::clone(&self.requests).acquire_owned().await;
        let slot = slot.map_err(|_| Refusal::Disarmed)?;
        let aliases = attempt.meter.prices().aliases();
        let asked = request::read(&parts.headers, body, &self.memory, &attempt.permissions, aliases).await?;
        let metered = if is_message {
            let admitted = tokio::select! {
                admitted = attempt.meter.admit(asked.planned.clone()) => admitted,
                () = attempt.ending.cancelled() => return Err(Refusal::Disarmed),
            };
            Some(admitted.map_err(|_| Refusal::NothingLeft)?)
        } else {
            None
        };
        let (name, value) = match self.credentials.header().await {
            Ok(credential) => credential,
            Err(error) => {
                return Ok(self.failed(
                    StatusCode::UNAUTHORIZED,
                    NO_CREDENTIAL,
                    "authentication_error",
                    &error.to_string(),
                ));
            }
        };
        *lock(&self.last_refusal) = None;
        let mut headers = asked.headers.clone();
        // What passes must be readable here.
        headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        headers.insert(name, value.clone());
        let (upstream, is_stream) = (self.upstream.clone(), asked.is_stream);
        let send = async move {
            // The body's part of the memory is given back when it was sent.
            upstream
                .post(&passed_uri(&parts.uri), headers, asked.body.clone())
                .await
        };
        let (head, came) = oneshot::channel();
        let relay = relay::relay(send, is_stream, metered, head, attempt.ending.clone());
        attempt.relays.spawn(async move {
            relay.await;
            drop(slot);
        });
        match came.await {
            Ok(Head::Answer(response, body)) => {
                if is_message && upstream::is_page(response.headers()) {
                    let status = response.status().as_u16();
                    self.note_failure(ApiFailure::own(status, NOT_THE_API, ""));
                } else if is_message {
                    *lock(&self.last_failure) = None;
                    self.pause.served();
                }
                let (mut parts, ()) = response.into_parts();
                parts.headers = end_to_end(&parts.headers);
                Ok(Response::from_parts(parts, Either::Left(body)))
            }
            Ok(Head::Failure(response)) => Ok(self.pass_failure(response, &value, is_message).await),
            Ok(Head::Unreachable(error)) => {
                Ok(self.failed(StatusCode::BAD_GATEWAY, UNREACHABLE, "api_error", &error))
            }
            // The attempt has ended.
            Err(_) => Err(Refusal::Disarmed),
        }
    }

    /// Whether the request holds the token of this run, in whichever header.
    fn knows(&self, headers: &HeaderMap) -> bool {
        let bearer = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
        let key = headers.get(API_KEY).map(HeaderValue::as_bytes);
        let token = self.token.expose().as_bytes();
        [bearer, key]
            .into_iter()
            .flatten()
            .any(|given| given.ct_eq(token).into())
    }

    /// Whether tokens may be counted once more by now.
    fn may_count(&self) -> bool {
        let mut counts = lock(&self.counts);
        let now = Instant::now();
        let refilled = now.duration_since(counts.at).as_secs_f64() * COUNTS_PER_SECOND;
        counts.left = (counts.left + refilled).min(COUNTS_AT_ONCE);
        counts.at = now;
        let may = counts.left >= 1.0;
        if may {
            counts.left -= 1.0;
        }
        may
    }

    /// Takes note of an answer with an error status and hands it on.
    async fn pass_failure(
        &self,
        response: Response<Bytes>,
        credential: &HeaderValue,
        is_message: bool,
    ) -> Answer {
        let (mut parts, body) = response.into_parts();
        if parts.status == StatusCode::UNAUTHORIZED {
            // The CLI asks a second time; by then there may be a fresh credential.
            self.credentials.refused(credential).await;
        }
        parts.headers = end_to_end(&parts.headers);
        // It was read whole, so its length is known anew.
        parts.headers.remove(header::CONTENT_LENGTH);
        // Not every gateway of an operator counts tokens, and no run needs it.
        if is_message {
            let status = parts.status.as_u16();
            self.note_failure(ApiFailure::read(status, &parts.headers, &body, clock::now()));
        }
        Response::from_parts(parts, Either::Right(Full::new(body)))
    }

    /// Takes note of a failure of the gateway's own and tells the CLI in the API's words.
    fn failed(&self, status: StatusCode, observed: &'static str, kind: &str, message: &str) -> Answer {
        if note(&self.failed, observed, || message.to_owned()) {
            tracing::warn!(
                status = status.as_u16(),
                "the gateway can't serve a request: {message}"
            );
        }
        self.note_failure(ApiFailure::own(status.as_u16(), observed, message));
        error_answer(status, kind, message)
    }

    fn note_failure(&self, failure: ApiFailure) {
        self.pause.failed(&failure, clock::now());
        *lock(&self.last_failure) = Some(failure);
    }

    fn refuse(&self, refusal: &Refusal) -> Answer {
        note(&self.refused, refusal.reason(), || refusal.to_string());
        *lock(&self.last_refusal) = Some(refusal.clone());
        let (status, kind) = refusal.answer();
        let mut answer = error_answer(status, kind, &refusal.to_string());
        if matches!(refusal, Refusal::TooLarge | Refusal::Incomplete) {
            // The rest of the body isn't waited for.
            answer
                .headers_mut()
                .insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        answer
    }

    /// Tells the log what was refused and what failed, a line for each reason: a run may cause a thousand a second.
    fn tell(&self) {
        for (reason, Noted { count, first }) in std::mem::take(&mut *lock(&self.refused)) {
            tracing::warn!(count, reason, "the gateway refused requests of the run: {first}");
        }
        for (reason, Noted { count, first }) in std::mem::take(&mut *lock(&self.failed)) {
            // The first one was told when it happened.
            if count > 1 {
                tracing::warn!(
                    count,
                    reason,
                    "the gateway could not serve requests of the run: {first}"
                );
            }
        }
    }
}

/// Counts a request; whether it is the first for this reason.
fn note(tally: &Mutex<Tally>, reason: &'static str, message: impl FnOnce() -> String) -> bool {
    let mut tally = lock(tally);
    let noted = tally.entry(reason).or_insert_with(|| Noted {
        count: 0,
        first: message(),
    });
    noted.count += 1;
    noted.count == 1
}

/// An account's key can do far more than ask a model; nothing else of it is open to a run.
fn is_served(method: &Method, uri: &Uri) -> bool {
    method == Method::POST && matches!(uri.path(), "/v1/messages" | "/v1/messages/count_tokens")
}

/// The path, with the only parameter that the CLI sends.
fn passed_uri(uri: &Uri) -> Uri {
    let is_beta = uri
        .query()
        .is_some_and(|query| query.split('&').any(|part| part == "beta=true"));
    let passed = match (uri.path(), is_beta) {
        (path, false) => path.to_owned(),
        (path, true) => format!("{path}?beta=true"),
    };
    passed.parse().expect("it is a part of an address")
}

/// The headers without those of the connection, named in the standard or by the message itself.
fn end_to_end(headers: &HeaderMap) -> HeaderMap {
    let mut kept = headers.clone();
    let named = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok());
    for name in named.flat_map(|value| value.split(',')) {
        if let Ok(name) = HeaderName::try_from(name.trim()) {
            kept.remove(name);
        }
    }
    for name in HOP_BY_HOP {
        kept.remove(name);
    }
    kept
}

/// An error of the gateway's own, in the API's form.
fn error_answer(status: StatusCode, kind: &str, message: &str) -> Answer {
    let body = serde_json::json!({ "type": "error", "error": { "type": kind, "message": message } });
    let mut response = Response::new(Either::Right(Full::new(Bytes::from(body.to_string()))));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_two_paths_of_the_account_are_open() {
        let served = |method: Method, uri: &str| is_served(&method, &uri.parse().unwrap());

        assert!(served(Method::POST, "/v1/messages?beta=true"));
        assert!(served(Method::POST, "/v1/messages/count_tokens?beta=true"));
        for path in [
            "/",
            "/v1/messages/batches",
            "/v1/files",
            "/v1/organizations/me",
            "/v1/messages/../files",
        ] {
            assert!(!served(Method::POST, path), "{path}");
        }
        assert!(!served(Method::GET, "/v1/messages"));
    }

    #[test]
    fn only_one_parameter_travels_on() {
        for (uri, passed) in [
            ("/v1/messages", "/v1/messages"),
            ("/v1/messages?beta=true", "/v1/messages?beta=true"),
            ("/v1/messages?key=1&beta=true&x", "/v1/messages?beta=true"),
            ("/v1/messages?alpha=true", "/v1/messages"),
            (
                "http://gw/v1/messages/count_tokens?a",
                "/v1/messages/count_tokens",
            ),
        ] {
            assert_eq!(passed_uri(&uri.parse().unwrap()), passed, "{uri}");
        }
    }

    #[test]
    fn headers_of_the_connection_stay_behind() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "keep-alive, X-Private"),
            ("x-private", "1"),
            ("transfer-encoding", "chunked"),
            ("anthropic-beta", "oauth-2025-04-20"),
            ("content-length", "12"),
        ] {
            headers.insert(name, value.parse().unwrap());
        }

        let kept = end_to_end(&headers);

        let mut names: Vec<&str> = kept.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["anthropic-beta", "content-length"]);
    }
}
