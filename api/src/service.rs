//! The API as a service: the routes behind the accept loop, and the housekeeping beside it.

use shared::shutdown::Shutdown;
use std::io;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::context::Context;
use crate::http::serve::{self, Edge};
use crate::{housekeeping, routes};

/// Serves the API on `listener` until `shutdown`: then it accepts no more, ends what only waits, gives the rest
/// `DRAIN_SECONDS` (or until the second signal), and returns.
pub async fn serve(listener: TcpListener, context: Context, shutdown: Shutdown) -> io::Result<()> {
    serve::raise_file_limit();
    let ended = CancellationToken::new();
    let housekeeping = tokio::spawn(housekeeping::keep(context.clone(), ended.clone()));
    let counting = tokio::spawn(housekeeping::count_usage(context.clone(), ended.clone()));
    let edge = Edge {
        cors: context.config.cors.clone(),
        head_timeout: context.config.head_timeout,
        body_timeout: context.config.body_timeout,
        proxies: context.config.proxies.clone(),
        problem_type_base: context.config.problem_type_base.clone(),
        is_open: routes::is_open,
        max_connections: serve::max_connections(),
        drain: context.config.drain,
        stopping: context.stopping.clone(),
    };
    serve::serve(listener, routes::app(context), edge, shutdown).await;
    ended.cancel();
    counting.await.map_err(io::Error::other)?;
    housekeeping.await.map_err(io::Error::other)
}
