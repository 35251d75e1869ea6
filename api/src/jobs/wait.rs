//! Waiting for a job to change, within bounds.

use shared::job::Job;
use std::time::Duration;
use tokio::time::{Instant, sleep_until};
use warp::reply::Response;

use crate::context::Context;
use crate::gate::caller::Caller;
use crate::gate::waits::{MAX_WAITS, WaitPermit};
use crate::http::problem::Problem;
use crate::http::reply::{Headers, PREFERENCE_APPLIED};
use crate::http::request::Request;
use crate::http::request::headers::Preferences;

/// How long a client wants to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wait {
    /// What it gets: never more than `WAIT_MAX_SECONDS`, nothing if it didn't ask.
    pub limit: Duration,
    /// Whether it asked by `Prefer`, and so the answer says what it got.
    preferred: bool,
}

impl Wait {
    /// `?wait=N`, else `Prefer: wait=N`, of which it gets `max` at most.
    pub fn of(request: &Request, max: Duration) -> Result<Self, Problem> {
        let asked = request
            .query()
            .integer("wait", 0..=i64::MAX)?
            .and_then(|seconds| u64::try_from(seconds).ok());
        let preferred = Preferences::of(&request.headers).wait;
        let seconds = asked.or(preferred).unwrap_or(0);
        let limit = Duration::from_secs(seconds).min(max);
        Ok(Self {
            limit,
            preferred: preferred.is_some(),
        })
    }

    /// Counts the request among those of its key that wait, if it does.
    pub fn permit(self, context: &Context, caller: &Caller) -> Result<Option<WaitPermit>, Problem> {
        if self.limit.is_zero() {
            return Ok(None);
        }
        let permit = context.waits.enter(&caller.key_id);
        permit.map(Some).ok_or(Problem::TooManyWaits(MAX_WAITS))
    }

    /// Says in the answer what became of the preference.
    pub fn applied_to(self, response: Response) -> Response {
        let response = response.varies_by("Prefer");
        if !self.preferred {
            return response;
        }
        let others = response
            .headers()
            .get(PREFERENCE_APPLIED)
            .and_then(|value| value.to_str().ok());
        let applied = [
            Some(format!("wait={}", self.limit.as_secs())),
            others.map(str::to_owned),
        ];
        let applied = applied.into_iter().flatten().collect::<Vec<_>>().join(", ");
        response.with(PREFERENCE_APPLIED, applied)
    }
}

/// The job as soon as it is `enough`, or as it is when `limit` has passed or the process stops.
pub async fn until(
    context: &Context,
    mut job: Job,
    limit: Duration,
    enough: impl Fn(&Job) -> bool,
) -> Result<Job, Problem> {
    if limit.is_zero() || enough(&job) {
        return Ok(job);
    }
    let deadline = Instant::now() + limit;
    // Registered before the look, so that no change falls between the two.
    let mut wakeup = context.wakeups.job(job.job_id);
    loop {
        job = context
            .store
            .job(job.job_id)
            .await?
            .ok_or(Problem::NoSuch("Job"))?;
        if enough(&job) {
            return Ok(job);
        }
        tokio::select! {
            () = wakeup.changed() => {}
            () = sleep_until(deadline) => return Ok(job),
            () = context.stopping.cancelled() => return Ok(job),
        }
    }
}
