//! Whether the process lives, whether it can do its work, and how the service as a whole is.

use http::{Method, StatusCode};
use serde_json::json;
use std::time::Duration;
use tokio::time::timeout;
use warp::reply::Response;

use crate::problem::Problem;
use crate::reply::{self, Meta};
use crate::request::Request;

/// A database that hasn't answered by then can't be used.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// `GET /livez`: the process lives. Touches nothing else.
pub async fn livez(request: &Request) -> Result<Response, Problem> {
    only_get(request)?;
    Ok(reply::text(StatusCode::OK, "ok".to_owned()))
}

/// `GET /readyz`: 200 when requests can be served, 503 while the process stops or the database can't be used.
pub async fn readyz(request: &Request) -> Result<Response, Problem> {
    only_get(request)?;
    let (database, draining) = (
        database_answers(request).await,
        request.context.stopping.is_cancelled(),
    );
    if !database || draining {
        return Err(Problem::NotReady { database, draining });
    }
    reply::json(
        StatusCode::OK,
        &json!({"status": "ok", "checks": {"database": "ok", "draining": false}}),
    )
}

/// `GET /api/v1/health`: always 200; the body says how things are.
pub async fn health(request: &Request) -> Result<Response, Problem> {
    only_get(request)?;
    let (status, database) = if database_answers(request).await {
        ("ok", "ok")
    } else {
        ("degraded", "error")
    };
    let body = json!({"status": status, "checks": {"database": database}, "meta": Meta::of(request)});
    reply::json(StatusCode::OK, &body)
}

async fn database_answers(request: &Request) -> bool {
    matches!(
        timeout(ANSWER_WITHIN, request.context.store.ping()).await,
        Ok(Ok(()))
    )
}

fn only_get(request: &Request) -> Result<(), Problem> {
    if request.method == Method::GET {
        Ok(())
    } else {
        Err(Problem::MethodNotAllowed(&[Method::GET]))
    }
}
