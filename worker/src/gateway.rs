//! The way from a run to the Messages API: one Unix socket per run, and the only holder of the Anthropic credential.
//!
//! A run proves itself with a token of its own; the gateway puts the real credential in its place and passes the
//! bytes on as they stream, both ways. It serves the two paths that the CLI needs and no other of the account.

pub mod credentials;
pub mod failure;
pub mod secret;
pub mod upstream;

use std::convert::Infallible;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt as _, Either, Full, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use shared::clock;
use subtle::ConstantTimeEq as _;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::{JoinHandle, JoinSet};

use credentials::Credentials;
use failure::{ApiFailure, NO_CREDENTIAL, NOT_THE_API, UNREACHABLE};
use secret::Secret;

use crate::pause::Pause;

pub use upstream::Upstream;

/// Connections of one run at once. The CLI opens one or two.
const MAX_CONNECTIONS: usize = 64;

/// The part of an error's body that is read for its type and message.
const MAX_ERROR_BODY: usize = 64 * 1024;

/// How long the body of an error may take.
const ERROR_BODY_WITHIN: Duration = Duration::from_secs(10);

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
    /// The last request that failed, unless a later one succeeded.
    last_failure: Mutex<Option<ApiFailure>>,
}

type Answer = Response<Either<reqwest::Body, Full<Bytes>>>;

impl Gateway {
    /// Listens at `socket`, whose path may have 107 bytes, for requests that hold `token`, and sends them to
    /// `upstream` with one of `credentials`.
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
        let listener = UnixListener::bind(socket)?;
        std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
        let run = Arc::new(Run {
            credentials,
            token: Secret::new(token.to_owned()),
            upstream: upstream.clone(),
            pause,
            last_failure: Mutex::default(),
        });
        let server = tokio::spawn(serve(listener, Arc::clone(&run)));
        Ok(Self { run, server })
    }

    /// The last request that failed, unless a later one succeeded.
    pub fn last_failure(&self) -> Option<ApiFailure> {
        self.run.last_failure().clone()
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        // The connections' tasks are owned by this one and end with it.
        self.server.abort();
    }
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
                    tracing::warn!("a connection to the gateway was lost: {error}");
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
        if !self.knows(request.headers()) {
            let message = "This request doesn't hold the token of the run.";
            return refusal(StatusCode::UNAUTHORIZED, "authentication_error", message);
        }
        if !is_served(request.method(), request.uri()) {
            let message =
                "The gateway of a run serves POST /v1/messages and POST /v1/messages/count_tokens only.";
            return refusal(StatusCode::NOT_FOUND, "not_found_error", message);
        }
        let (name, value) = match self.credentials.header().await {
            Ok(credential) => credential,
            Err(error) => {
                return self.failed(
                    StatusCode::UNAUTHORIZED,
                    NO_CREDENTIAL,
                    "authentication_error",
                    &error.to_string(),
                );
            }
        };
        let (parts, body) = request.into_parts();
        let is_message = parts.uri.path() == "/v1/messages";
        let mut headers = end_to_end(&parts.headers);
        for own in [header::HOST, header::AUTHORIZATION, API_KEY] {
            headers.remove(own);
        }
        // What passes must be readable here.
        headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        headers.insert(name, value.clone());
        let sent = self
            .upstream
            .post(&parts.uri, headers, reqwest::Body::wrap(body))
            .await;
        let response = match sent {
            Ok(response) => response,
            Err(error) => return self.failed(StatusCode::BAD_GATEWAY, UNREACHABLE, "api_error", &error),
        };
        let status = response.status();
        if status == StatusCode::UNAUTHORIZED {
            // The CLI asks a second time; by then there may be a fresh credential.
            self.credentials.refused(&value).await;
        }
        if !status.is_success() {
            return self.pass_failure(response, is_message).await;
        }
        if is_message && upstream::is_page(response.headers()) {
            self.note_failure(ApiFailure::own(status.as_u16(), NOT_THE_API, ""));
        } else if is_message {
            *self.last_failure() = None;
            self.pause.served();
        }
        let (mut parts, body) = Response::<reqwest::Body>::from(response).into_parts();
        parts.headers = end_to_end(&parts.headers);
        Response::from_parts(parts, Either::Left(body))
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

    /// Takes note of an answer with an error status and hands it on.
    async fn pass_failure(&self, response: reqwest::Response, is_message: bool) -> Answer {
        let (mut parts, body) = Response::<reqwest::Body>::from(response).into_parts();
        parts.headers = end_to_end(&parts.headers);
        // It's read whole, so its length is known anew.
        parts.headers.remove(header::CONTENT_LENGTH);
        let read =
            tokio::time::timeout(ERROR_BODY_WITHIN, Limited::new(body, MAX_ERROR_BODY).collect()).await;
        let body = read
            .ok()
            .and_then(Result::ok)
            .map(http_body_util::Collected::to_bytes)
            .unwrap_or_default();
        // Not every gateway of an operator counts tokens, and no run needs it.
        if is_message {
            let now = clock::now();
            self.note_failure(ApiFailure::read(
                parts.status.as_u16(),
                &parts.headers,
                &body,
                now,
            ));
        }
        Response::from_parts(parts, Either::Right(Full::new(body)))
    }

    /// Takes note of a failure of the gateway's own and tells the CLI in the API's words.
    fn failed(&self, status: StatusCode, observed: &str, kind: &str, message: &str) -> Answer {
        tracing::warn!(
            status = status.as_u16(),
            "the gateway can't serve a request: {message}"
        );
        self.note_failure(ApiFailure::own(status.as_u16(), observed, message));
        refusal(status, kind, message)
    }

    fn note_failure(&self, failure: ApiFailure) {
        self.pause.failed(&failure, clock::now());
        *self.last_failure() = Some(failure);
    }

    fn last_failure(&self) -> MutexGuard<'_, Option<ApiFailure>> {
        self.last_failure.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An account's key can do far more than ask a model; nothing else of it is open to a run.
fn is_served(method: &Method, uri: &Uri) -> bool {
    method == Method::POST && matches!(uri.path(), "/v1/messages" | "/v1/messages/count_tokens")
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
fn refusal(status: StatusCode, kind: &str, message: &str) -> Answer {
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
