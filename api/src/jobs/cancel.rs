//! Cancelling a job: at once while it waits, by its worker while it runs. The API ends nothing itself.

use http::StatusCode;
use serde::Serialize;
use shared::clock;
use shared::id::JobId;
use shared::job::{CancelReason, Job, JobStatus};
use shared::storage::CancelOutcome;
use warp::reply::Response;

use super::view::{self, Detail};
use crate::context::Context;
use crate::http::problem::Problem;
use crate::http::reply::{self, Headers, etag};
use crate::http::request::Request;
use crate::http::request::fields::text;

/// `POST /jobs/{id}/cancel`: 200 when the job is cancelled, 202 when its worker has been asked to end it. Asking again changes
/// nothing and gets the same.
pub async fn cancel(context: &Context, request: &Request, job: Job) -> Result<Response, Problem> {
    check_body(request).await?;
    let store = &context.store;
    let status = match store
        .cancel_job(job.job_id, CancelReason::User, clock::now())
        .await?
    {
        CancelOutcome::Cancelled | CancelOutcome::AlreadyFinal(JobStatus::Cancelled) => StatusCode::OK,
        CancelOutcome::Requested | CancelOutcome::AlreadyRequested => StatusCode::ACCEPTED,
        CancelOutcome::AlreadyFinal(status) => return Err(Problem::JobFinal(status)),
        CancelOutcome::NoSuchJob => return Err(Problem::NoSuch("Job")),
    };
    let (job, view) = view::show(context, job.job_id, Detail::Full).await?;
    Ok(reply::data(request, status, view)?.etag(&etag(job.version)))
}

/// The members of the body are for the reader of the request; the job keeps that its owner asked.
async fn check_body(request: &Request) -> Result<(), Problem> {
    let mut body = request.json_or_nothing().await?.fields()?;
    body.optional("reason", text(0..=200));
    body.finish(Some(()))
}

/// What the Python service answers to a cancel.
#[derive(Debug, Serialize)]
pub struct Cancelling {
    id: JobId,
    status: &'static str,
}

/// `POST /sessions/{s}/jobs/{id}/cancel`: as in the Python service 200 whether the job waits or runs, and 409 when it
/// has ended, however.
pub async fn cancel_of_session(context: &Context, request: &Request, job: &Job) -> Result<Response, Problem> {
    check_body(request).await?;
    let outcome = context
        .store
        .cancel_job(job.job_id, CancelReason::User, clock::now())
        .await?;
    match outcome {
        CancelOutcome::AlreadyFinal(status) => Err(Problem::JobFinal(status)),
        CancelOutcome::NoSuchJob => Err(Problem::NoSuch("Job")),
        _ => reply::data(
            request,
            StatusCode::OK,
            Cancelling {
                id: job.job_id,
                status: "cancelling",
            },
        ),
    }
}
