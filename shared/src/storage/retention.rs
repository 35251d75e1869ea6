//! Deletes the data of ended jobs: after the retention time, or when the owner requests it. A job's row, its attempts and
//! its ledger entries stay.

use super::columns::columns;
use super::{Result, Store, Tx, execute, fetch_locked, read};
use crate::clock::{self, Timestamp};
use crate::id::JobId;
use crate::job::{Job, JobStatus};

/// Whether a job's workspace still exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workspace {
    /// It was removed.
    Gone,
    /// A worker still has to remove it.
    Left,
}

/// The outcome of a request to remove a job's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// The data is removed, now or earlier.
    Removed,
    /// The job hasn't ended.
    Active,
    /// There is no such job.
    NoSuchJob,
}

impl Store {
    /// Up to 100 jobs that ended before this time and still have their data, oldest first, after the job `after`.
    pub async fn expired_jobs(&self, before: Timestamp, after: Option<&Job>) -> Result<Vec<Job>> {
        let ended = after.and_then(|job| job.completed_at).unwrap_or(Timestamp(0));
        let number = after.map_or(0, |job| job.job_number);
        read!(
            self,
            "look for expired jobs",
            fetch_all => Job,
            concat!("select ", columns!(Job), " from job
             where completed_at is not null and not data_removed and completed_at < $1
               and (completed_at, job_number) > ($2, $3)
             order by completed_at, job_number limit 100"),
            before,
            ended,
            number
        )
    }

    /// Removes the prompt, result and events of an ended job. A caller that also removes the workspace does so first, so
    /// that after a crash in between the next sweep finishes the work.
    pub async fn remove_data(&self, job_id: JobId, workspace: Workspace) -> Result<Removal> {
        let mut tx = self.begin().await?;
        let row = fetch_locked!(
            tx,
            "read a job",
            fetch_optional => (JobStatus, bool),
            "select status, data_removed from job where job_id = $1",
            job_id
        )?;
        let removal = match row {
            None => Removal::NoSuchJob,
            Some((status, _)) if !status.is_final() => Removal::Active,
            Some((_, true)) => Removal::Removed,
            Some((_, false)) => {
                tx.remove_data(job_id, workspace).await?;
                tx.commit().await?;
                return Ok(Removal::Removed);
            }
        };
        tx.rollback().await?;
        Ok(removal)
    }

    /// Up to 100 jobs whose owners requested the removal of their workspaces, after the job with this number.
    pub async fn workspaces_to_remove(&self, after: i64) -> Result<Vec<Job>> {
        read!(
            self,
            "look for workspaces to remove",
            fetch_all => Job,
            concat!("select ", columns!(Job), " from job where remove_requested and job_number > $1 order by job_number limit 100"),
            after
        )
    }

    /// Records that the workspace of a job was removed.
    pub async fn workspace_removed(&self, job_id: JobId) -> Result<()> {
        let mut tx = self.begin().await?;
        execute!(
            tx,
            "note that a workspace is gone",
            "update job set remove_requested = false where job_id = $1",
            job_id
        )?;
        tx.commit().await
    }

    /// Deletes up to 500 idempotency keys older than this.
    pub async fn forget_idempotency(&self, before: Timestamp) -> Result<u64> {
        let mut tx = self.begin().await?;
        let rows = execute!(
            tx,
            "forget idempotency keys",
            "delete from idempotency where (key_id, route, idempotency_key) in (
               select key_id, route, idempotency_key from idempotency where created_at < $1 limit 500)",
            before
        )?;
        tx.commit().await?;
        Ok(rows)
    }
}

impl Tx {
    async fn remove_data(&mut self, job_id: JobId, workspace: Workspace) -> Result<()> {
        self.remove_bodies(job_id, clock::now()).await?;
        execute!(
            self,
            "remove a job's data",
            "update job set data_removed = true, remove_requested = $2, version = version + 1 where job_id = $1",
            job_id,
            workspace == Workspace::Left
        )?;
        for statement in [
            "delete from prompt where job_id = $1",
            "delete from result where job_id = $1",
            "delete from event where job_id = $1",
            "update attempt set stderr_tail = null where job_id = $1",
        ] {
            execute!(self, "remove a job's data", statement, job_id)?;
        }
        self.touch(job_id);
        Ok(())
    }
}
