//! What an operator may do to the queue as a whole.

use http::StatusCode;
use serde_json::json;
use warp::reply::Response;

use crate::audit;
use crate::context::Context;
use crate::gate::caller::Caller;
use crate::http::problem::Problem;
use crate::http::reply::{self, Meta};
use crate::http::request::Request;

/// `POST /queue/resume`: lifts the pauses that the Messages API made the workers begin, and makes ready the jobs that
/// wait for it. Workers follow within about a second; if nothing has changed for the better, they pause again.
pub async fn resume(context: &Context, request: &Request, caller: &Caller) -> Result<Response, Problem> {
    let entry = audit::entry(context, request, caller, "queue.resume", "", json!({}));
    let released = context.store.resume_queue(&entry).await?;
    let body = json!({ "data": { "released_jobs": released }, "meta": Meta::of(request) });
    reply::json(StatusCode::OK, &body)
}
