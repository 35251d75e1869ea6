//! Every path of the API and who answers it. Warp matches the path and nothing else: from there on everything is
//! answered, never rejected, so that one route's refusal can't hide another's.

use futures_util::FutureExt;
use http::StatusCode;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use warp::Filter;
use warp::filters::BoxedFilter;
use warp::reply::Response;

use crate::problem::Problem;
use crate::request::{Request, Segment};
use crate::{cors, health, jobs, reply, sessions};

/// A path whose handler gets the request and the path's variable parts: `keyed` after its caller is known, `open` for
/// everybody.
macro_rules! route {
    (keyed $($part:tt)/ + $(, $param:ident)* => $handler:path) => {
        warp::path!($($part)/ +)
            .and(warp::ext::get::<Arc<Request>>())
            .then(|$($param: Segment,)* request: Arc<Request>| async move {
                let handled = async {
                    let caller = request.caller()?;
                    $handler(&request, &caller $(, &$param)*).await
                };
                answer(&request, handled).await
            })
            .boxed()
    };
    (open $($part:tt)/ + => $handler:path) => {
        warp::path!($($part)/ +)
            .and(warp::ext::get::<Arc<Request>>())
            .then(|request: Arc<Request>| async move { answer(&request, $handler(&request)).await })
            .boxed()
    };
}

/// The table.
pub fn routes() -> BoxedFilter<(Response,)> {
    let table = [
        route!(keyed "api" / "v1" / "jobs" => jobs::collection),
        route!(keyed "api" / "v1" / "jobs" / Segment, id => jobs::item),
        route!(keyed "api" / "v1" / "jobs" / Segment / "events", id => jobs::events),
        route!(keyed "api" / "v1" / "jobs" / Segment / "stream", id => jobs::stream),
        route!(keyed "api" / "v1" / "jobs" / Segment / "result", id => jobs::result),
        route!(keyed "api" / "v1" / "jobs" / Segment / "cancel", id => jobs::cancel),
        route!(keyed "api" / "v1" / "sessions" => sessions::collection),
        route!(keyed "api" / "v1" / "sessions" / Segment, name => sessions::item),
        route!(keyed "api" / "v1" / "sessions" / Segment / "jobs", name => sessions::jobs),
        route!(open "api" / "v1" / "health" => health::health),
        route!(open "livez" => health::livez),
        route!(open "readyz" => health::readyz),
    ];
    let nothing = warp::ext::get::<Arc<Request>>()
        .then(
            |request: Arc<Request>| async move { answer(&request, async { Err(Problem::NoSuchPath) }).await },
        )
        .boxed();
    table
        .into_iter()
        .rev()
        .fold(nothing, |others, route| route.or(others).unify().boxed())
}

/// What a handler makes of the request, as a response: also when it failed, and when it panicked.
async fn answer(request: &Request, handled: impl Future<Output = Result<Response, Problem>>) -> Response {
    if cors::is_preflight(&request.method, &request.headers) {
        return reply::empty(StatusCode::NO_CONTENT);
    }
    let answered = AssertUnwindSafe(handled).catch_unwind().await;
    let answered = answered.unwrap_or_else(|_| Err(Problem::internal("the handler panicked")));
    request.discard_body().await;
    answered.unwrap_or_else(|problem| problem.reply(request))
}
