//! Cancelling a job: at once while it waits, by its worker while it runs. The API ends nothing itself.

use http::StatusCode;
use shared::clock;
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
    let mut body = request.json_or_nothing().await?.fields()?;
    // For the reader of the request; the job keeps that its owner asked.
    body.optional("reason", text(0..=200));
    body.finish(Some(()))?;

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
