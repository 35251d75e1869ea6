//! Removing what an ended job has left. The row and the ledger stay.

use http::StatusCode;
use shared::job::Job;
use shared::storage::{Removal, Workspace};
use warp::reply::Response;

use crate::context::Context;
use crate::http::problem::Problem;
use crate::http::reply;

/// `DELETE /jobs/{id}`: 204 when prompt, result and events are gone, now or before. Its workspace, which may be on
/// another machine, is a worker's to remove, within seconds.
pub async fn remove(context: &Context, job: &Job) -> Result<Response, Problem> {
    let removed = context.store.remove_data(job.job_id, Workspace::Left).await?;
    match removed {
        Removal::Removed => Ok(reply::empty(StatusCode::NO_CONTENT)),
        Removal::Active => Err(Problem::JobActive),
        Removal::NoSuchJob => Err(Problem::NoSuch("Job")),
    }
}
