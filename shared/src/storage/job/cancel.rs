//! Somebody wants a job ended: a waiting one is cancelled at once, the worker of a running one is asked.

use crate::clock::{self, Timestamp};
use crate::event::{EventType, NewEvent};
use crate::id::{JobId, KeyId};
use crate::job::{CancelReason, Ending, Job, JobStatus};
use crate::storage::columns::columns;
use crate::storage::{Result, Store, Tx, execute, fetch_locked, read};
use serde_json::json;

/// Jobs that are cancelled between two looks for more.
const CANCEL_BATCH: i64 = 500;

/// The outcome of a request to cancel a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CancelOutcome {
    /// It waited and is cancelled now.
    Cancelled,
    /// It runs; its worker has been told.
    Requested,
    /// It runs and had been told before.
    AlreadyRequested,
    /// It has ended like this.
    AlreadyFinal(JobStatus),
    /// There is no such job.
    NoSuchJob,
}

impl Store {
    /// Cancels a waiting job, or asks the worker of a running one to end it.
    pub async fn cancel_job(
        &self,
        job_id: JobId,
        reason: CancelReason,
        now: Timestamp,
    ) -> Result<CancelOutcome> {
        loop {
            let Some(job) = self.job(job_id).await? else {
                return Ok(CancelOutcome::NoSuchJob);
            };
            if job.status.is_final() {
                return Ok(CancelOutcome::AlreadyFinal(job.status));
            }
            let mut tx = self.begin().await?;
            let outcome = if job.status == JobStatus::Queued {
                // A running job is locked before its lane everywhere, a waiting one after it.
                tx.cancel_waiting(&job, reason, now).await?
            } else {
                tx.request_cancel(job_id, reason, now).await?
            };
            // It may have begun or been handed back between the look and the lock; then look again.
            if let Some(outcome) = outcome {
                tx.commit().await?;
                return Ok(outcome);
            }
            tx.rollback().await?;
        }
    }

    /// Up to `limit` jobs of this key that wait or run. The newest come first: cancelling them in this order makes none
    /// of them the next of its group.
    pub async fn unended_jobs(&self, key_id: &KeyId, limit: i64) -> Result<Vec<JobId>> {
        let rows = read!(
            self,
            "list a key's jobs",
            fetch_all => (JobId,),
            "select job_id from job where key_id = $1 and status = 'queued'
             union all select job_id from job where key_id = $1 and status = 'running' and cancel_requested_at is null
             order by job_id desc limit $2",
            key_id,
            limit
        )?;
        Ok(rows.into_iter().map(|row| row.0).collect())
    }

    /// Cancels all jobs of a revoked key, those that run included: how many. A job that is submitted
    /// meanwhile may be left.
    pub async fn cancel_jobs_of(&self, key_id: &KeyId) -> Result<u64> {
        let mut cancelled = 0;
        loop {
            let jobs = self.unended_jobs(key_id, CANCEL_BATCH).await?;
            if jobs.is_empty() {
                return Ok(cancelled);
            }
            for job_id in jobs {
                self.cancel_job(job_id, CancelReason::KeyRevoked, clock::now())
                    .await?;
                cancelled += 1;
            }
        }
    }
}

impl Tx {
    async fn cancel_waiting(
        &mut self,
        job: &Job,
        reason: CancelReason,
        now: Timestamp,
    ) -> Result<Option<CancelOutcome>> {
        self.lock_group(&job.key_id, job.group_key.as_deref()).await?;
        self.lock_lane(&job.key_id).await?;
        let ended = self
            .end_waiting(job.job_id, &Ending::Cancelled, reason, now)
            .await?;
        Ok(ended.then_some(CancelOutcome::Cancelled))
    }

    async fn request_cancel(
        &mut self,
        job_id: JobId,
        reason: CancelReason,
        now: Timestamp,
    ) -> Result<Option<CancelOutcome>> {
        let row = fetch_locked!(self, "read a job", fetch_optional => Job, concat!("select ", columns!(Job), " from job where job_id = $1"), job_id)?;
        let Some(job) = row else {
            return Ok(Some(CancelOutcome::NoSuchJob));
        };
        match job.status {
            JobStatus::Running if job.cancel_requested_at.is_some() => {
                return Ok(Some(CancelOutcome::AlreadyRequested));
            }
            JobStatus::Running => {}
            JobStatus::Queued => return Ok(None),
            status => return Ok(Some(CancelOutcome::AlreadyFinal(status))),
        }
        execute!(
            self,
            "ask for a cancel",
            "update job set cancel_requested_at = $2, cancel_reason = $3, version = version + 1 where job_id = $1",
            job_id,
            now,
            reason
        )?;
        self.finish_events(
            &job,
            &[NewEvent::new(
                EventType::Cancelling,
                json!({ "reason": reason.as_str() }),
            )],
            now,
        )
        .await?;
        self.direct(job_id);
        Ok(Some(CancelOutcome::Requested))
    }
}
