//! Takes connections and routes requests: `/_sim/…` to `control.rs`, the rest to `messages.rs`.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::connection::{Connection, ResetAtEnd};
use crate::recorder::Recorder;
use crate::scenario::Scenarios;
use crate::{answer, control, messages};

/// Requests of the CLI are below this; more is refused as the API does.
const BODY_MAX_BYTES: usize = 64 * 1024 * 1024;

pub(crate) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// What all connections share.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) scenarios: Scenarios,
    pub(crate) recorder: Recorder,
}

impl Server {
    pub(crate) fn new() -> Self {
        Self {
            scenarios: Scenarios::builtin(),
            recorder: Recorder::default(),
        }
    }
}

/// Takes connections until it is told to stop; then drops all of them.
pub(crate) async fn accept(listener: TcpListener, server: Arc<Server>, stop: CancellationToken) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        // Out of file descriptors, most likely: others will be given back.
        let Ok((stream, _)) = accepted else {
            sleep(Duration::from_millis(50)).await;
            continue;
        };
        let _ = stream.set_nodelay(true);
        let reset = ResetAtEnd::default();
        let io = TokioIo::new(Connection::new(stream, reset.clone()));
        let server = Arc::clone(&server);
        connections.spawn(async move {
            let service = service_fn(move |request| {
                let (server, reset) = (Arc::clone(&server), reset.clone());
                async move { Ok::<_, Infallible>(route(&server, request, reset).await) }
            });
            // A peer that leaves in the middle is part of the play.
            let _ = http1::Builder::new()
                .timer(TokioTimer::new())
                .serve_connection(io, service)
                .await;
        });
    }
}

async fn route(server: &Server, request: Request<Incoming>, reset: ResetAtEnd) -> Response<Body> {
    let (head, body) = request.into_parts();
    let Ok(body) = Limited::new(body, BODY_MAX_BYTES).collect().await else {
        return json_response(
            413,
            &answer::error("request_too_large", "Request exceeds the maximum size", ""),
        );
    };
    let body = body.to_bytes();
    let path = head.uri.path();
    if let Some(path) = path.strip_prefix("/_sim/") {
        let query = head.uri.query().unwrap_or_default();
        return control::answer(server, &head.method, path, query, &body);
    }
    messages::answer(server, &head, &body, reset).await
}

pub(crate) fn json_response(status: u16, body: &Value) -> Response<Body> {
    let mut response = respond(status, body.to_string().into());
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

pub(crate) fn respond(status: u16, body: Bytes) -> Response<Body> {
    let mut response = Response::new(Full::new(body).map_err(|never| match never {}).boxed_unsync());
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response
}
