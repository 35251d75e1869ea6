//! Jobs that wait for the Messages API, and how such waits end: the API answers again, a person lifts the pauses, or
//! the wait has lasted too long.

use super::{AuditEntry, Result, Store, Tx, execute, fetch, read};
use crate::clock::Timestamp;
use crate::id::{JobId, KeyId};
use crate::job::{CancelReason, Ending, Hold, Job, JobStatus};
use std::time::Duration;

/// Later than every time of a job.
const WHENEVER: Timestamp = Timestamp(i64::MAX);

impl Store {
    /// How often somebody has lifted the workers' pauses. A worker that sees it grow lifts its own.
    pub async fn resumes(&self) -> Result<i64> {
        let row = read!(self, "read the queue", fetch_one => (i64,), "select resumes from queue")?;
        Ok(row.0)
    }

    /// Lifts the pauses of all workers and makes ready what waits for the Messages API, usage limits included. Gives
    /// the number of those jobs. `entry` is noted with it.
    pub async fn resume_queue(&self, entry: &AuditEntry) -> Result<u64> {
        let mut tx = self.begin().await?;
        execute!(tx, "lift the pauses", "update queue set resumes = resumes + 1")?;
        tx.audit(entry).await?;
        tx.ring();
        tx.commit().await?;
        self.release_waits(Hold::UsageLimit).await
    }

    /// Makes jobs ready that wait because the Messages API couldn't serve them: it answers again.
    pub async fn release_upstream(&self) -> Result<u64> {
        self.release_waits(Hold::Upstream).await
    }

    /// Those, and the jobs with this hold too.
    async fn release_waits(&self, too: Hold) -> Result<u64> {
        let mut count = 0;
        loop {
            let held = read!(
                self,
                "look for jobs that wait for the API",
                fetch_all => (KeyId, JobId),
                "select key_id, job_id from job
                 where status = 'queued' and hold in ('delay', 'usage_limit', 'upstream') and hold in ('upstream', $1)
                 order by run_after limit 100",
                too.as_str()
            )?;
            let full = held.len() == 100;
            let released = self.release_jobs(held, WHENEVER).await?;
            count += released;
            if !full || released == 0 {
                return Ok(count);
            }
        }
    }

    /// Waiting jobs, 100 at most, whose wait for the Messages API began before this time.
    pub async fn waited_since(&self, before: Timestamp) -> Result<Vec<JobId>> {
        let rows = read!(
            self,
            "look for waits that are too long",
            fetch_all => (JobId,),
            "select job_id from job where wait_since is not null and status = 'queued' and wait_since <= $1 limit 100",
            before
        )?;
        Ok(rows.into_iter().map(|row| row.0).collect())
    }

    /// Fails a waiting job that has waited for the Messages API for this long, with the code of its last attempt.
    pub async fn fail_waited(&self, job_id: JobId, longest: Duration, now: Timestamp) -> Result<()> {
        let Some(job) = self.job(job_id).await? else {
            return Ok(());
        };
        let since = job.wait_since.filter(|since| now.since(*since) >= longest);
        if job.status != JobStatus::Queued || since.is_none() {
            return Ok(());
        }
        let mut tx = self.begin().await?;
        tx.lock_group(&job.key_id, job.group_key.as_deref()).await?;
        tx.lock_lane(&job.key_id).await?;
        let code = tx.last_code(job_id).await?;
        let ending = Ending::Failed {
            code: code.unwrap_or_else(|| "api_unavailable".to_owned()),
            message: waited_message(&job, longest),
        };
        tx.end_waiting(job_id, &ending, CancelReason::User, now).await?;
        tx.commit().await
    }
}

impl Tx {
    async fn last_code(&mut self, job_id: JobId) -> Result<Option<String>> {
        let row = fetch!(
            self,
            "read the last attempt",
            fetch_optional => (Option<String>,),
            "select error_code from attempt where job_id = $1 order by attempt desc limit 1",
            job_id
        )?;
        Ok(row.and_then(|row| row.0))
    }
}

fn waited_message(job: &Job, longest: Duration) -> String {
    let reason = job.wait_reason.as_deref().unwrap_or_default();
    let hours = longest.as_secs() / 3600;
    format!(
        "The job waited {hours} h for the Messages API, which is as long as JOB_WAIT_MAX_HOURS allows. {reason}"
    )
    .trim_end()
    .to_owned()
}
