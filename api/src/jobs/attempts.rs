//! `GET /jobs/{id}/attempts`: how often a job was tried, what each try has cost, and what the CLI said about that.

use http::StatusCode;
use serde::Serialize;
use shared::clock::Timestamp;
use shared::job::Job;
use shared::money::MicroUsd;
use shared::storage::Attempt;
use warp::reply::Response;

use crate::context::Context;
use crate::gate::caller::Caller;
use crate::http::problem::Problem;
use crate::http::reply;
use crate::http::request::Request;

/// An attempt as clients see it.
#[derive(Debug, Serialize)]
struct AttemptView {
    attempt: i64,
    started_at: Timestamp,
    ended_at: Option<Timestamp>,
    ending: Option<String>,
    error_code: Option<String>,
    turns: i64,
    reserved: MicroUsd,
    cost: MicroUsd,
    reported_cost: Option<MicroUsd>,
    #[serde(flatten)]
    operation: Option<Operation>,
}

/// What only administrators see.
#[derive(Debug, Serialize)]
struct Operation {
    worker_id: String,
    cli_version: Option<String>,
    exit: Option<String>,
}

impl AttemptView {
    fn of(attempt: Attempt, caller: &Caller) -> Self {
        Self {
            attempt: attempt.attempt,
            started_at: attempt.started_at,
            ended_at: attempt.ended_at,
            ending: attempt.ending,
            error_code: attempt.error_code,
            turns: attempt.turns,
            reserved: attempt.reserved,
            cost: attempt.cost,
            reported_cost: attempt.reported_cost,
            operation: caller.admin.then_some(Operation {
                worker_id: attempt.worker_id,
                cli_version: attempt.cli_version,
                exit: attempt.exit,
            }),
        }
    }
}

/// The attempts of the job, the first one first.
pub async fn list(
    context: &Context,
    request: &Request,
    caller: &Caller,
    job: &Job,
) -> Result<Response, Problem> {
    let attempts = context.store.attempts(job.job_id).await?;
    let shown = attempts
        .into_iter()
        .map(|attempt| AttemptView::of(attempt, caller));
    reply::data(request, StatusCode::OK, shown.collect::<Vec<_>>())
}
