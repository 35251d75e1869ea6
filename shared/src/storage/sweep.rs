//! What the sweeper does in the database: the same work every time, safe in every worker at once.

use super::{Error, QUEUE, Result, Store, Tx, TxDb, execute, fetch, read};
use crate::clock::Timestamp;
use crate::id::{JobId, KeyId};
use crate::job::Job;
use std::time::Duration;

/// The lease of a running job, as a sweeper watches it.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
pub struct RunningLease {
    /// The job.
    pub job_id: JobId,
    /// The run.
    pub attempt: i64,
    /// Grows with each renewal.
    pub renewals: i64,
}

/// What one sweep did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Jobs whose time had come.
    pub due: u64,
    /// Tickets that were missing.
    pub tickets: u64,
    /// Used tickets that were removed.
    pub used_tickets: u64,
    /// Entries of queue workers that are gone.
    pub queue_workers: u64,
}

/// Tickets are topped up to this many: each idle slot that finds work claims again until nothing is left.
const TOP_UP: i64 = 64;

/// Entries of the queue library that nobody has touched for so long belong to nobody.
const ABANDONED: Duration = Duration::from_mins(10);

impl Store {
    /// The leases of all running jobs.
    pub async fn running_leases(&self) -> Result<Vec<RunningLease>> {
        read!(
            self,
            "read the leases",
            fetch_all => RunningLease,
            "select job_id, attempt, renewals from job where status = 'running'"
        )
    }

    /// One sweep: jobs whose time has come, lanes that may have money again, hints that are too low, tickets that
    /// are missing, leftovers of the queue library.
    pub async fn sweep(&self, now: Timestamp) -> Result<Swept> {
        let mut swept = Swept::default();
        let mut tx = self.begin().await?;
        tx.lock_claims().await?;
        swept.due = tx.release_due(now).await?;
        tx.commit().await?;
        self.release_budget_holds(now).await?;

        let mut tx = self.begin().await?;
        tx.repair_hints().await?;
        let wanted = tx.runnable().await?.min(TOP_UP);
        if wanted > 0 {
            let missing = wanted - tx.waiting_tickets(TOP_UP).await?;
            if missing > 0 {
                swept.tickets = missing.unsigned_abs();
                tx.push_tickets(usize::try_from(missing).unwrap_or(0)).await?;
                tx.notify(true).await?;
            }
        }
        tx.commit().await?;

        (swept.used_tickets, swept.queue_workers) = self.clean_queue(now).await?;
        Ok(swept)
    }

    /// Jobs that should have ended by now and don't know it yet, 100 at most.
    pub async fn overdue_jobs(&self, now: Timestamp) -> Result<Vec<JobId>> {
        let rows = read!(
            self,
            "look for passed deadlines",
            fetch_all => (JobId,),
            "select job_id from job
             where deadline_at is not null and deadline_at <= $1 and status in ('queued', 'running')
               and cancel_requested_at is null
             limit 100",
            now
        )?;
        Ok(rows.into_iter().map(|row| row.0).collect())
    }

    /// Jobs that ended before this time and still have their data, 100 at most.
    pub async fn expired_jobs(&self, before: Timestamp) -> Result<Vec<Job>> {
        read!(
            self,
            "look for expired jobs",
            fetch_all => Job,
            "select * from job where completed_at is not null and not data_removed and completed_at < $1
             order by completed_at limit 100",
            before
        )
    }

    /// Removes the prompt, result and events of an ended job; its row and its ledger stay. The caller has removed
    /// its workspace first, so that a crash in between leaves work for the next sweep and nothing behind.
    /// `false` when the job hasn't ended.
    pub async fn remove_data(&self, job_id: JobId) -> Result<bool> {
        let mut tx = self.begin().await?;
        let marked = execute!(
            tx,
            "remove a job's data",
            "update job set data_removed = true, version = version + 1
             where job_id = $1 and completed_at is not null and not data_removed",
            job_id
        )?;
        if marked == 0 {
            tx.rollback().await?;
            return Ok(false);
        }
        for table in [
            "delete from prompt where job_id = $1",
            "delete from result where job_id = $1",
            "delete from event where job_id = $1",
        ] {
            execute!(tx, "remove a job's data", table, job_id)?;
        }
        execute!(
            tx,
            "remove a job's data",
            "update attempt set stderr_tail = null where job_id = $1",
            job_id
        )?;
        tx.touch(job_id);
        tx.commit().await?;
        Ok(true)
    }

    /// Forgets idempotency keys older than this, 500 at most.
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

    /// Lanes, and the queue, that wait for money look again when there is some: a period may have turned. A
    /// transaction for each, because one that held several lanes and budgets could wait in a circle.
    async fn release_budget_holds(&self, now: Timestamp) -> Result<()> {
        let held = read!(
            self,
            "look for what waits for money",
            fetch_all => (String,),
            "select key_id from lane where hold = 'budget' union all select '' from queue where hold = 'budget' limit 100"
        )?;
        for (key_id,) in held {
            let mut tx = self.begin().await?;
            let key_id = KeyId::known(key_id);
            tx.lock_lane(&key_id).await?;
            let budgets = tx.lock_budgets(&key_id, now).await?;
            if budgets.iter().all(super::budget::Applicable::has_room) {
                tx.free_from_budget(&key_id).await?;
            }
            tx.commit().await?;
        }
        Ok(())
    }

    async fn clean_queue(&self, now: Timestamp) -> Result<(u64, u64)> {
        let before = now.unix_seconds() - i64::try_from(ABANDONED.as_secs()).unwrap_or(0);
        let cleaned = match &*self.db {
            super::Db::Sqlite { writer, .. } => {
                let used = sqlx::query(
                    "delete from Jobs where rowid in (
                       select rowid from Jobs
                       where job_type = $1 and (status in ('Done', 'Killed', 'Failed')
                         or (status in ('Queued', 'Running') and lock_at < $2))
                       limit 1000)",
                )
                .bind(QUEUE)
                .bind(before)
                .execute(writer)
                .await;
                let workers = sqlx::query(
                    "delete from Workers where last_seen < $1 and not exists (select 1 from Jobs where lock_by = Workers.id)",
                )
                .bind(before)
                .execute(writer)
                .await;
                used.map(|used| {
                    (
                        used.rows_affected(),
                        workers.map_or(0, |workers| workers.rows_affected()),
                    )
                })
            }
            super::Db::Postgres(pool) => {
                let used = sqlx::query(
                    "delete from apalis.jobs where id = any(array(
                       select id from apalis.jobs
                       where job_type = $1 and (status in ('Done', 'Killed', 'Failed')
                         or (status in ('Queued', 'Running') and lock_at < to_timestamp($2)))
                       limit 1000 for update skip locked))",
                )
                .bind(QUEUE)
                .bind(before)
                .execute(pool)
                .await;
                let workers = sqlx::query(
                    "delete from apalis.workers as w
                     where w.last_seen < to_timestamp($1) and not exists (select 1 from apalis.jobs where lock_by = w.id)",
                )
                .bind(before)
                .execute(pool)
                .await;
                used.map(|used| {
                    (
                        used.rows_affected(),
                        workers.map_or(0, |workers| workers.rows_affected()),
                    )
                })
            }
        };
        cleaned.map_err(Error::during("clean the queue's tables"))
    }
}

impl Tx {
    /// Lets the key's jobs, or with an empty key the whole queue, look for money again.
    pub(super) async fn free_from_budget(&mut self, key_id: &KeyId) -> Result<()> {
        let freed = if key_id.as_str().is_empty() {
            execute!(
                self,
                "free the queue",
                "update queue set hold = null where hold = 'budget'"
            )?
        } else {
            execute!(
                self,
                "free a lane",
                "update lane set hold = null where key_id = $1 and hold = 'budget'",
                key_id
            )?
        };
        if freed > 0 {
            self.ring();
        }
        Ok(())
    }

    /// Makes jobs ready whose time has come, 100 at most. Under the claim lock, since it locks several lanes.
    async fn release_due(&mut self, now: Timestamp) -> Result<u64> {
        let lanes = execute!(
            self,
            "lock the lanes of due jobs",
            "update lane set running = running where key_id in (
               select key_id from job
               where status = 'queued' and hold in ('delay', 'usage_limit') and run_after <= $1
               order by run_after limit 100)",
            now
        )?;
        if lanes == 0 {
            return Ok(0);
        }
        let due = fetch!(
            self,
            "make due jobs ready",
            fetch_all => (JobId, KeyId, i64),
            "update job set hold = '', run_after = null, version = version + 1 where job_id in (
               select job_id from job
               where status = 'queued' and hold in ('delay', 'usage_limit') and run_after <= $1
               order by run_after limit 100)
             returning job_id, key_id, priority",
            now
        )?;
        let count = u64::try_from(due.len()).unwrap_or(0);
        for (job_id, key_id, priority) in due {
            self.touch(job_id);
            self.became_ready(&key_id, priority);
        }
        Ok(count)
    }

    /// Corrects hints that are too low because a process died between its commit and its correction.
    async fn repair_hints(&mut self) -> Result<()> {
        if matches!(self.db, TxDb::Postgres(_)) {
            execute!(
                self,
                "repair the lanes' hints",
                "update lane set top = (
                   select max(priority) from job where key_id = lane.key_id and status = 'queued' and hold = '')
                 where coalesce((
                   select max(priority) from job where key_id = lane.key_id and status = 'queued' and hold = ''), -99)
                   > coalesce(top, -99)"
            )?;
        }
        Ok(())
    }
}
