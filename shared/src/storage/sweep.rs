//! What the sweeper does in the database: the same work every time, safe in every worker at once.

use super::macros::on_connection;
use super::{Db, Error, Queue, Result, Store, Tx, TxDb, read};
use crate::budget::{BudgetStatus, Scope};
use crate::clock::Timestamp;
use crate::id::{JobId, KeyId};
use sqlx::{Postgres, QueryBuilder, Sqlite};
use std::collections::BTreeMap;
use std::time::Duration;

/// The lease of a running job, as a sweeper watches it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, sqlx::FromRow)]
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
    /// Jobs that could begin, counted up to 64.
    pub runnable: i64,
    /// Tickets that were missing.
    pub tickets: u64,
}

/// Tickets are topped up to this many: each idle slot that finds work claims again until nothing is left.
const TOP_UP: i64 = 64;

/// A ticket that was taken so long ago and isn't used up is nobody's.
const ABANDONED_TICKET: Duration = Duration::from_mins(10);

/// A worker of the queue library that hasn't been seen for so long is gone. It registers by its own machine's clock,
/// which may be wrong, and can't work without its row.
const GONE_WORKER: Duration = Duration::from_hours(24);

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

    /// One sweep: jobs whose time has come, lanes that may have money again, tickets that are
    /// missing, leftovers of the queue library.
    pub async fn sweep(&self, now: Timestamp) -> Result<Swept> {
        let mut swept = Swept {
            due: self.release_due(now).await?,
            ..Swept::default()
        };
        self.release_budget_holds(now).await?;
        let rest = self.sweep_tickets().await?;
        swept.runnable = rest.runnable;
        swept.tickets = rest.tickets;
        Ok(swept)
    }

    /// The part of a sweep that needs no clock: tickets that are missing, leftovers of the queue library.
    pub async fn sweep_tickets(&self) -> Result<Swept> {
        let mut swept = Swept::default();
        let mut tx = self.begin().await?;
        swept.runnable = tx.runnable().await?.min(TOP_UP);
        if swept.runnable > 0 {
            let waiting = tx.count_tickets(Queue::Jobs).await?;
            let missing = swept.runnable - waiting;
            if missing > 0 {
                swept.tickets = missing.unsigned_abs();
                tx.push_tickets(Queue::Jobs, usize::try_from(missing).unwrap_or(0))
                    .await?;
                tx.wakes = true;
            }
        }
        tx.commit().await?;

        self.clean_queue().await?;
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

    /// Makes jobs ready whose time has come, up to a thousand. A transaction for each lane, because one that locked
    /// several could wait in a circle.
    async fn release_due(&self, now: Timestamp) -> Result<u64> {
        let mut count = 0;
        for _ in 0..10 {
            let due = read!(
                self,
                "look for due jobs",
                fetch_all => (KeyId, JobId),
                "select key_id, job_id from job
                 where status = 'queued' and hold in ('delay', 'usage_limit', 'upstream') and run_after <= $1
                 order by run_after limit 100",
                now
            )?;
            let full = due.len() == 100;
            count += self.release_jobs(due, now).await?;
            if !full {
                break;
            }
        }
        Ok(count)
    }

    /// Makes these held jobs ready, those of them whose time has come by `now`.
    pub(super) async fn release_jobs(&self, held: Vec<(KeyId, JobId)>, now: Timestamp) -> Result<u64> {
        let mut count = 0;
        let mut lanes: BTreeMap<KeyId, Vec<JobId>> = BTreeMap::new();
        for (key_id, job_id) in held {
            lanes.entry(key_id).or_default().push(job_id);
        }
        for (key_id, job_ids) in lanes {
            let mut tx = self.begin().await?;
            tx.lock_lane(&key_id).await?;
            count += tx.release(&key_id, &job_ids, now).await?;
            tx.commit().await?;
        }
        Ok(count)
    }

    /// Lanes, and the queue, that wait for money look again when there is some: a period may have turned. A
    /// transaction for each, because one that held several lanes and budgets could wait in a circle.
    async fn release_budget_holds(&self, now: Timestamp) -> Result<()> {
        let mut after: Option<KeyId> = None;
        loop {
            let held = read!(
                self,
                "look for what waits for money",
                fetch_all => (KeyId,),
                "select key_id from (
                   select key_id from lane where hold = 'budget' union all select '' from queue where hold = 'budget'
                 ) as held
                 where $1 = 0 or key_id > $2 order by key_id limit 100",
                i64::from(after.is_some()),
                after.as_ref().map_or("", KeyId::as_str)
            )?;
            for (key_id,) in &held {
                // Most look in vain; they needn't wait for a lock.
                if self
                    .budgets_of(key_id, now)
                    .await?
                    .iter()
                    .all(BudgetStatus::has_room)
                {
                    self.release_budget_hold(key_id, now).await?;
                }
            }
            if held.len() < 100 {
                return Ok(());
            }
            after = held.into_iter().next_back().map(|row| row.0);
        }
    }

    pub(super) async fn release_budget_hold(&self, key_id: &KeyId, now: Timestamp) -> Result<()> {
        let mut tx = self.begin().await?;
        tx.lock_lane(key_id).await?;
        let budgets = tx.lock_budgets(key_id, now).await?;
        if budgets.iter().all(super::budget::Applicable::has_room) {
            // What waits for everybody's money has no key.
            let scope = match key_id.as_str() {
                "" => Scope::Global,
                _ => Scope::Key(key_id.clone()),
            };
            tx.free_from_budget(&scope, now).await?;
        }
        tx.commit().await
    }

    /// Removes used tickets, and what nobody has touched for long, by the clock that the library uses: the database's.
    async fn clean_queue(&self) -> Result<()> {
        let (tickets, workers) = (
            i64::try_from(ABANDONED_TICKET.as_secs()).unwrap_or(0),
            i64::try_from(GONE_WORKER.as_secs()).unwrap_or(0),
        );
        match &*self.db {
            Db::Sqlite { writer, .. } => {
                sqlx::query(
                    "delete from Jobs where rowid in (
                       select rowid from Jobs
                       where job_type in ($1, $2) and (status in ('Done', 'Killed', 'Failed')
                         or (status in ('Queued', 'Running') and lock_at < strftime('%s', 'now') - $3))
                       limit 1000)",
                )
                .bind(Queue::Jobs.name())
                .bind(Queue::Webhooks.name())
                .bind(tickets)
                .execute(writer)
                .await
                .map_err(Error::during("delete tickets"))?;
                sqlx::query(
                    "delete from Workers where last_seen < strftime('%s', 'now') - $1
                       and not exists (select 1 from Jobs where lock_by = Workers.id)",
                )
                .bind(workers)
                .execute(writer)
                .await
                .map_err(Error::during("delete the queue's workers"))?;
            }
            Db::Postgres(pool) => {
                let used = sqlx::query(
                    "delete from apalis.jobs where id = any(array(
                       select id from apalis.jobs
                       where job_type in ($1, $2) and (status in ('Done', 'Killed', 'Failed')
                         or (status in ('Queued', 'Running') and lock_at < now() - $3 * interval '1 second'))
                       limit 1000 for update skip locked))",
                )
                .bind(Queue::Jobs.name())
                .bind(Queue::Webhooks.name())
                .bind(tickets);
                let deleted = on_connection!(self, pool, |connection| used.execute(connection));
                deleted.map_err(Error::during("delete tickets"))?;
                let gone = sqlx::query(
                    "delete from apalis.workers as w where w.last_seen < now() - $1 * interval '1 second'
                       and not exists (select 1 from apalis.jobs where lock_by = w.id)",
                )
                .bind(workers);
                let deleted = on_connection!(self, pool, |connection| gone.execute(connection));
                deleted.map_err(Error::during("delete the queue's workers"))?;
            }
        }
        Ok(())
    }
}

impl Tx {
    /// Makes these jobs of one lane, which is locked, ready: those of them that still are due.
    async fn release(&mut self, key_id: &KeyId, job_ids: &[JobId], now: Timestamp) -> Result<u64> {
        // Two builders, because a builder is of one database.
        macro_rules! update {
            ($db:ty, $tx:expr) => {{
                let mut query = QueryBuilder::<$db>::new(
                    "update job set hold = '', run_after = null, version = version + 1
                     where status = 'queued' and hold in ('delay', 'usage_limit', 'upstream') and run_after <= ",
                );
                query.push_bind(now).push(" and job_id in (");
                let mut list = query.separated(", ");
                for job_id in job_ids {
                    list.push_bind(*job_id);
                }
                query.push(") returning job_id, priority");
                query
                    .build_query_as::<(JobId, i64)>()
                    .fetch_all(&mut **$tx)
                    .await
            }};
        }
        self.store.work.statement();
        let released = match &mut self.db {
            TxDb::Sqlite(tx) => update!(Sqlite, tx),
            TxDb::Postgres(tx) => {
                let releasing = async { update!(Postgres, tx) };
                self.store.liveness.in_time(releasing).await
            }
        }
        .map_err(Error::during("make due jobs ready"))?;
        let count = u64::try_from(released.len()).unwrap_or(0);
        for (job_id, priority) in released {
            self.touch(job_id);
            self.became_ready(key_id, priority);
        }
        Ok(count)
    }
}
