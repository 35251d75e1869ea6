//! Takes connections and routes requests: `/_sim/…` to `control.rs`, the rest to `messages.rs`.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::connection::{Connection, ResetAtEnd};
use crate::response::{self, Body};
use crate::state::State;
use crate::{answer, control, messages};

/// Requests of the CLI are below this; more is refused as the API does.
const BODY_MAX_BYTES: usize = 64 * 1024 * 1024;

/// Takes connections until it is told to stop; then drops all of them.
pub(crate) async fn accept(listener: TcpListener, state: Arc<State>, stop: CancellationToken) {
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
        let state = Arc::clone(&state);
        connections.spawn(async move {
            let service = service_fn(move |request| {
                let (state, reset) = (Arc::clone(&state), reset.clone());
                async move { Ok::<_, Infallible>(route(&state, request, reset).await) }
            });
            // A peer that leaves in the middle is part of the play.
            let _ = http1::Builder::new()
                .timer(TokioTimer::new())
                .serve_connection(io, service)
                .await;
        });
    }
}

async fn route(state: &State, request: Request<Incoming>, reset: ResetAtEnd) -> Response<Body> {
    let (head, body) = request.into_parts();
    let Ok(body) = Limited::new(body, BODY_MAX_BYTES).collect().await else {
        return response::json(
            413,
            &answer::error("request_too_large", "Request exceeds the maximum size", ""),
        );
    };
    let body = body.to_bytes();
    let path = head.uri.path();
    if let Some(path) = path.strip_prefix("/_sim/") {
        let query = head.uri.query().unwrap_or_default();
        return control::answer(state, &head.method, path, query, &body);
    }
    messages::answer(state, &head, &body, reset).await
}
