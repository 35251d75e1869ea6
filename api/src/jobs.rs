//! Jobs over HTTP: which method of which path is answered where. Others than those of the route table don't come here.

pub mod cancel;
pub mod read;
pub mod remove;
pub mod stream;
pub mod submit;
pub mod view;
pub mod wait;

pub use submit::submit_in_session;

use http::Method;
use shared::job::Job;
use warp::reply::Response;

use crate::caller::Caller;
use crate::problem::Problem;
use crate::request::{Request, Segment};

/// `/api/v1/jobs`.
pub async fn collection(request: &Request, caller: &Caller) -> Result<Response, Problem> {
    match request.method {
        Method::POST => submit::submit(request, caller).await,
        _ => read::list(request, caller).await,
    }
}

/// `/api/v1/jobs/{id}`.
pub async fn item(request: &Request, caller: &Caller, id: &Segment) -> Result<Response, Problem> {
    let job = find(request, caller, id).await?;
    match request.method {
        Method::DELETE => remove::remove(request, &job).await,
        _ => read::show(request, job).await,
    }
}

/// `/api/v1/jobs/{id}/result`.
pub async fn result(request: &Request, caller: &Caller, id: &Segment) -> Result<Response, Problem> {
    read::result(request, &find(request, caller, id).await?).await
}

/// `/api/v1/jobs/{id}/cancel`.
pub async fn cancel(request: &Request, caller: &Caller, id: &Segment) -> Result<Response, Problem> {
    cancel::cancel(request, find(request, caller, id).await?).await
}

/// `/api/v1/jobs/{id}/events`.
pub async fn events(request: &Request, caller: &Caller, id: &Segment) -> Result<Response, Problem> {
    stream::events(request, caller, find(request, caller, id).await?).await
}

/// `/api/v1/jobs/{id}/stream`.
pub async fn stream(request: &Request, caller: &Caller, id: &Segment) -> Result<Response, Problem> {
    stream::stream(request, caller, &find(request, caller, id).await?).await
}

/// The jobs of one session: `GET /api/v1/sessions/{s}/jobs`.
pub use read::list_of_session;

/// The job of this id, if it exists for the caller.
async fn find(request: &Request, caller: &Caller, id: &Segment) -> Result<Job, Problem> {
    let job = request.context.store.job(id.id("Job")?).await?;
    job.filter(|job| caller.sees(&job.key_id))
        .ok_or(Problem::NoSuch("Job"))
}
