//! Jobs over HTTP: which method of which path is answered where. Others than those of the route table don't come here.

pub mod accept;
pub mod attempts;
pub mod cancel;
pub mod read;
pub mod remove;
pub mod stream;
pub mod submit;
pub mod view;
pub mod wait;

use http::Method;
use shared::job::Job;
use warp::reply::Response;

use crate::context::Context;
use crate::gate::caller::Caller;
use crate::http::problem::Problem;
use crate::http::request::{Request, Segment};
use crate::sessions;

/// `/api/v1/jobs`.
pub async fn collection(context: &Context, request: &Request, caller: &Caller) -> Result<Response, Problem> {
    match request.method {
        Method::POST => submit::submit(context, request, caller, None).await,
        _ => read::list(context, request, caller).await,
    }
}

/// `/api/v1/jobs/{id}`.
pub async fn item(
    context: &Context,
    request: &Request,
    caller: &Caller,
    id: &Segment,
) -> Result<Response, Problem> {
    match request.method {
        Method::DELETE => remove::remove(context, &find(context, caller, id).await?).await,
        _ => read::show(context, request, caller, id.id("Job")?).await,
    }
}

/// `/api/v1/jobs/{id}/result`.
pub async fn result(
    context: &Context,
    request: &Request,
    caller: &Caller,
    id: &Segment,
) -> Result<Response, Problem> {
    read::result(context, request, caller, id.id("Job")?).await
}

/// `/api/v1/jobs/{id}/cancel`.
pub async fn cancel(
    context: &Context,
    request: &Request,
    caller: &Caller,
    id: &Segment,
) -> Result<Response, Problem> {
    cancel::cancel(context, request, find(context, caller, id).await?).await
}

/// `/api/v1/jobs/{id}/attempts`.
pub async fn attempts(
    context: &Context,
    request: &Request,
    caller: &Caller,
    id: &Segment,
) -> Result<Response, Problem> {
    attempts::list(context, request, caller, &find(context, caller, id).await?).await
}

/// `/api/v1/jobs/{id}/events`.
pub async fn events(
    context: &Context,
    request: &Request,
    caller: &Caller,
    id: &Segment,
) -> Result<Response, Problem> {
    stream::events(context, request, caller, find(context, caller, id).await?).await
}

/// `/api/v1/jobs/{id}/stream`.
pub async fn stream(
    context: &Context,
    request: &Request,
    caller: &Caller,
    id: &Segment,
) -> Result<Response, Problem> {
    stream::stream(context, request, caller, &find(context, caller, id).await?).await
}

/// `/api/v1/sessions/{s}/jobs`.
pub async fn of_session(
    context: &Context,
    request: &Request,
    caller: &Caller,
    name: &Segment,
) -> Result<Response, Problem> {
    let session = sessions::find(context, caller, name.as_ref()).await?;
    match request.method {
        Method::POST => submit::submit(context, request, caller, Some(session)).await,
        _ => read::list_of_session(context, request, &session).await,
    }
}

/// `/api/v1/sessions/{s}/jobs/{id}`.
pub async fn item_of_session(
    context: &Context,
    request: &Request,
    caller: &Caller,
    name: &Segment,
    id: &Segment,
) -> Result<Response, Problem> {
    let job = find_in_session(context, caller, name, id).await?;
    read::show(context, request, caller, job.job_id).await
}

/// `/api/v1/sessions/{s}/jobs/{id}/cancel`.
pub async fn cancel_of_session(
    context: &Context,
    request: &Request,
    caller: &Caller,
    name: &Segment,
    id: &Segment,
) -> Result<Response, Problem> {
    let job = find_in_session(context, caller, name, id).await?;
    cancel::cancel_of_session(context, request, &job).await
}

async fn find_in_session(
    context: &Context,
    caller: &Caller,
    name: &Segment,
    id: &Segment,
) -> Result<Job, Problem> {
    let session = sessions::find(context, caller, name.as_ref()).await?;
    let job = find(context, caller, id).await?;
    if job.session_id == Some(session.session_id) {
        Ok(job)
    } else {
        Err(Problem::NoSuch("Job"))
    }
}

/// The job of this id, if it exists for the caller.
async fn find(context: &Context, caller: &Caller, id: &Segment) -> Result<Job, Problem> {
    read::find(context, caller, id.id("Job")?).await
}
