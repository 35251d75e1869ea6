//! Runs whose worker is gone, or never knew of them.

use super::finish::EndedBy;
use crate::clock::Timestamp;
use crate::id::{JobId, WorkerId};
use crate::job::{Ending, Hold, Job, OnWorkerLost, Report, Spend};
use crate::storage::columns::columns;
use crate::storage::{Result, Store, Tx, fetch};
use std::collections::HashSet;
use std::time::Duration;

impl Store {
    /// Hands back jobs that this worker has claimed without knowing: a connection can be lost after the commit. `known`
    /// are its live leases, as job and attempt; its other runs never began. Gives how many there were. The caller makes
    /// no claim meanwhile.
    pub async fn release_unknown(
        &self,
        worker_id: WorkerId,
        known: &HashSet<(JobId, i64)>,
        now: Timestamp,
    ) -> Result<u64> {
        // Whoever commits a claim still holds this lock.
        let mut tx = self.begin_claim().await?;
        let claimed = fetch!(
            tx,
            "look for unknown claims",
            fetch_all => Job,
            concat!("select ", columns!(Job), " from job where status = 'running' and lease_owner = $1"),
            worker_id
        )?;
        tx.rollback().await?;
        let unknown = claimed
            .into_iter()
            .filter(|job| !known.contains(&(job.job_id, job.attempt)));
        let mut released = 0;
        for job in unknown {
            released += u64::from(self.release_run(job.job_id, job.attempt, now).await?);
        }
        Ok(released)
    }

    /// Hands back a job that this worker has claimed and not begun; whether it still held it.
    pub(in crate::storage) async fn release_run(
        &self,
        job_id: JobId,
        attempt: i64,
        now: Timestamp,
    ) -> Result<bool> {
        let Some(job) = self.job(job_id).await? else {
            return Ok(false);
        };
        let mut tx = self.begin_end_of_run().await?;
        tx.lock_session(job.session_id).await?;
        tx.lock_group(&job.key_id, job.group_key.as_deref()).await?;
        let Some(job) = tx.lock_running(job_id, attempt).await? else {
            tx.rollback().await?;
            return Ok(false);
        };
        let before = tx.settled(job_id).await?;
        tx.end_run(&job, before, &never_began(), EndedBy::Worker, now)
            .await?;
        tx.commit().await?;
        Ok(true)
    }

    /// Takes the lease of a run that hasn't been renewed since `renewals` was read, and decides what becomes of the
    /// job. `false` when it was renewed or ended meanwhile.
    pub async fn take_lost(&self, job: &Job, attempt: i64, renewals: i64, now: Timestamp) -> Result<bool> {
        let mut tx = self.begin_end_of_run().await?;
        tx.lock_session(job.session_id).await?;
        tx.lock_group(&job.key_id, job.group_key.as_deref()).await?;
        let current = tx.lock_running(job.job_id, attempt).await?;
        let same = match &current {
            Some(job) => tx.renewals(job.job_id).await? == renewals,
            None => false,
        };
        let Some(job) = current.filter(|_| same) else {
            tx.rollback().await?;
            return Ok(false);
        };
        let report = tx.report_of_lost(&job, now).await?;
        let before = tx.settled(job.job_id).await?;
        tx.end_run(&job, before, &report, EndedBy::LostLease, now).await?;
        tx.commit().await?;
        Ok(true)
    }
}

impl Tx {
    async fn renewals(&mut self, job_id: JobId) -> Result<i64> {
        fetch!(
            self,
            "read a lease",
            fetch_one => (i64,),
            "select renewals from job where job_id = $1",
            job_id
        )
        .map(|row| row.0)
    }

    /// What is known of a run whose worker is gone.
    async fn report_of_lost(&mut self, job: &Job, now: Timestamp) -> Result<Report> {
        let (spend, started_at) = fetch!(
            self,
            "read an attempt",
            fetch_one => (Option<String>, Timestamp),
            "select job.spend, attempt.started_at from job
             join attempt on attempt.job_id = job.job_id and attempt.attempt = job.attempt
             where job.job_id = $1 and job.attempt = $2",
            job.job_id,
            job.attempt
        )?;
        let spend: Option<Spend> = spend.and_then(|text| serde_json::from_str(&text).ok());
        let (code, message) = ("worker_lost".to_owned(), lost_message(job));
        let ending = match job.on_worker_lost {
            _ if job.cancel_requested_at.is_some() => Ending::Cancelled,
            OnWorkerLost::Resume => Ending::Retry {
                code,
                message,
                run_after: now,
                hold: Hold::Delay,
                counts: true,
            },
            OnWorkerLost::Fail => Ending::Failed { code, message },
        };
        Ok(Report {
            ending,
            result: None,
            spend: Spend {
                estimated: true,
                ..spend.unwrap_or_default()
            },
            duration: now.since(started_at),
            turns: 0,
            claude_session_id: None,
            stderr_tail: String::new(),
            exit: "its worker was lost".to_owned(),
            events: Vec::new(),
        })
    }
}

fn never_began() -> Report {
    Report {
        ending: Ending::Released,
        result: None,
        spend: Spend::default(),
        duration: Duration::ZERO,
        turns: 0,
        claude_session_id: None,
        stderr_tail: String::new(),
        exit: "not started".to_owned(),
        events: Vec::new(),
    }
}

fn lost_message(job: &Job) -> String {
    match job.on_worker_lost {
        OnWorkerLost::Fail => {
            "The worker that ran the job was lost, and the job asked not to be run again. Check what \
                               it has done before you submit it again."
                .to_owned()
        }
        OnWorkerLost::Resume => format!(
            "The worker that ran the job was lost, at failure {} of at most {}. If the job itself ends its worker \
             (memory, disk), make it smaller; else submit it again.",
            job.failures + 1,
            job.max_attempts
        ),
    }
}
