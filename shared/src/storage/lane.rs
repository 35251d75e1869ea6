//! Lanes: a row for each API key, which is its queue. It counts the key's running jobs against its cap, says whether
//! the key's jobs are held, when it was last served, and the highest priority among its ready jobs. All SQL about lanes,
//! and about the one row that holds the whole queue, is here.
//!
//! `top_priority` is a hint: it may be too high, which costs one claim in vain, but not too low for long.

use super::macros::on_connection;
use super::{Db, Error, Result, Store, Tx, TxDb, execute, fetch, read};
use crate::budget::Scope;
use crate::id::KeyId;
use crate::job::Hold;
use std::collections::BTreeMap;

/// The highest priority among a lane's ready jobs; `$1` is the key.
macro_rules! head {
    () => {
        "(select max(priority) from job where key_id = $1 and status = 'queued' and hold = '')"
    };
}

/// Corrects a hint that is too low.
const RAISE: &str = concat!(
    "update lane set top_priority = ",
    head!(),
    " where key_id = $1 and coalesce(",
    head!(),
    ", -99) > coalesce(top_priority, -99)"
);

impl Store {
    /// Makes sure that the key has a lane, with this cap on jobs that run at once.
    pub async fn put_lane(&self, key_id: &KeyId, max_running: i64) -> Result<()> {
        let mut tx = self.begin().await?;
        tx.put_lane(key_id, max_running).await?;
        tx.commit().await
    }

    /// Whether some lane seems to have a job that may run. Takes no lock.
    pub(super) async fn seems_runnable(&self) -> Result<bool> {
        let any = read!(
            self,
            "look for a runnable job",
            fetch_optional => (i64,),
            "select cast(1 as bigint) from lane
             where top_priority is not null and hold is null and running < max_running
               and not exists (select 1 from queue where paused or hold is not null)
             limit 1"
        )?;
        Ok(any.is_some())
    }

    /// What holds all jobs of this key, whatever their own state.
    pub async fn lane_hold(&self, key_id: &KeyId) -> Result<Option<Hold>> {
        let row = read!(
            self,
            "read a lane",
            fetch_optional => (Option<String>, Option<String>, bool),
            "select lane.hold, queue.hold, queue.paused from queue left join lane on lane.key_id = $1",
            key_id
        )?;
        Ok(row.and_then(|(lane, queue, paused)| {
            let own = lane.or(queue).and_then(|word| Hold::parse(&word));
            own.or(paused.then_some(Hold::Paused))
        }))
    }

    /// Corrects hints that are too low because a process died between its commit and its correction. On SQLite,
    /// where nobody writes at the same time, none can be.
    pub(super) async fn repair_hints(&self) -> Result<()> {
        if matches!(&*self.db, Db::Sqlite { .. }) {
            return Ok(());
        }
        let low = read!(
            self,
            "look for hints that are too low",
            fetch_all => (KeyId,),
            "select key_id from lane
             where coalesce((
               select max(priority) from job where key_id = lane.key_id and status = 'queued' and hold = ''), -99)
               > coalesce(top_priority, -99)"
        )?;
        let low: Vec<KeyId> = low.into_iter().map(|row| row.0).collect();
        self.raise_again(&BTreeMap::new(), &low).await
    }

    /// Corrects lanes whose counter isn't the number of their running jobs. None should be, since each transaction keeps
    /// it; but a lane that counts too many would starve its key for ever. Gives how many were wrong.
    pub async fn repair_counters(&self) -> Result<u64> {
        // One statement sees one moment, in which the counter is right.
        let wrong = read!(
            self,
            "look for wrong lanes",
            fetch_all => (KeyId, i64, i64),
            "select lane.key_id, lane.running, cast(coalesce(counts.running, 0) as bigint)
             from lane left join (
               select key_id, count(*) as running from job where status = 'running' group by key_id) as counts
             on counts.key_id = lane.key_id
             where lane.running <> coalesce(counts.running, 0)"
        )?;
        let mut repaired = 0;
        for (key_id, running, counted) in wrong {
            let mut tx = self.begin().await?;
            tx.lock_lane(&key_id).await?;
            let corrected = tx.correct_counter(&key_id).await?;
            tx.commit().await?;
            if corrected {
                tracing::error!(
                    key.id = key_id.as_str(),
                    running,
                    counted,
                    "the lane of {key_id} counted {running} running jobs instead of {counted}; it is repaired"
                );
                repaired += 1;
            }
        }
        Ok(repaired)
    }

    /// After a commit on PostgreSQL: corrects hints that another transaction changed without seeing this one.
    pub(super) async fn raise_again(&self, ready: &BTreeMap<KeyId, i64>, lowered: &[KeyId]) -> Result<()> {
        let Db::Postgres(pool) = &*self.db else {
            return Ok(());
        };
        let to = ready.iter().map(|(key_id, priority)| {
            sqlx::query("update lane set top_priority = $2 where key_id = $1 and (top_priority is null or top_priority < $2)")
                .bind(key_id)
                .bind(priority)
        });
        let again = lowered.iter().map(|key_id| sqlx::query(RAISE).bind(key_id));
        let mut changed = 0;
        for raising in to.chain(again) {
            let raised = on_connection!(self, pool, |connection| raising.execute(connection));
            changed += raised
                .map_err(Error::during("raise a lane's hint"))?
                .rows_affected();
        }
        if changed > 0 {
            let mut tx = self.begin().await?;
            tx.push_tickets(1).await?;
            tx.notify(true).await?;
            let TxDb::Postgres(tx) = tx.db else { return Ok(()) };
            let committed = self.liveness.in_time(tx.commit()).await;
            committed.map_err(Error::during(super::error::COMMIT))?;
        }
        Ok(())
    }
}

impl Tx {
    /// Whether the counter was wrong. The caller holds the lane.
    async fn correct_counter(&mut self, key_id: &KeyId) -> Result<bool> {
        let rows = execute!(
            self,
            "repair a lane",
            "update lane set running = (select count(*) from job where key_id = $1 and status = 'running')
             where key_id = $1
               and running <> (select count(*) from job where key_id = $1 and status = 'running')",
            key_id
        )?;
        if rows > 0 {
            self.ring();
        }
        Ok(rows > 0)
    }

    /// Makes sure that the key has a lane, with this cap on jobs that run at once. With another cap there may be room
    /// for one that waits.
    pub(super) async fn put_lane(&mut self, key_id: &KeyId, max_running: i64) -> Result<()> {
        let changed = fetch!(
            self,
            "set up a key's lane",
            fetch_optional => (Option<i64>,),
            "insert into lane (key_id, max_running) values ($1, $2)
             on conflict (key_id) do update set max_running = excluded.max_running
             where lane.max_running <> excluded.max_running
             returning top_priority",
            key_id,
            max_running
        )?;
        if let Some((Some(_),)) = changed {
            self.ring();
        }
        Ok(())
    }

    /// Locks the lane of this key until the end of the transaction; `false` when there is none.
    #[doc(hidden)]
    pub async fn lock_lane(&mut self, key_id: &KeyId) -> Result<bool> {
        execute!(
            self,
            "lock a lane",
            "update lane set running = running where key_id = $1",
            key_id
        )
        .map(|rows| rows > 0)
    }

    pub(super) async fn raise_to(&mut self, key_id: &KeyId, priority: i64) -> Result<bool> {
        let rows = execute!(
            self,
            "raise a lane's hint",
            "update lane set top_priority = $2 where key_id = $1 and (top_priority is null or top_priority < $2)",
            key_id,
            priority
        )?;
        Ok(rows > 0)
    }

    /// The lane whose turn it is, with its hint.
    pub(super) async fn take_turn(&mut self) -> Result<Option<(KeyId, i64)>> {
        fetch!(
            self,
            "take a turn",
            fetch_optional => (KeyId, i64),
            "update lane set running = running + 1, last_served = (select max(last_served) + 1 from lane)
             where hold is null and running < max_running and key_id = (
               select key_id from lane
               where top_priority is not null and hold is null and running < max_running
                 and not exists (select 1 from queue where paused or hold is not null)
               order by top_priority desc, last_served limit 1)
             returning key_id, top_priority"
        )
    }

    /// The turn led to no run.
    pub(super) async fn give_back_turn(&mut self, key_id: &KeyId) -> Result<()> {
        execute!(
            self,
            "give a turn back",
            "update lane set running = running - 1 where key_id = $1",
            key_id
        )?;
        self.lower(key_id).await
    }

    /// Corrects a hint that is too high.
    pub(super) async fn lower(&mut self, key_id: &KeyId) -> Result<()> {
        let rows = execute!(
            self,
            "lower a lane's hint",
            concat!(
                "update lane set top_priority = ",
                head!(),
                " where key_id = $1 and top_priority is distinct from ",
                head!()
            ),
            key_id
        )?;
        if rows > 0 {
            self.lowered.push(key_id.clone());
        }
        Ok(())
    }

    pub(super) async fn hold_for_budget(&mut self, key_id: &KeyId, everybody: bool) -> Result<()> {
        if everybody {
            execute!(
                self,
                "hold the queue",
                "update queue set hold = 'budget' where hold is null"
            )
            .map(drop)
        } else {
            execute!(
                self,
                "hold a lane",
                "update lane set hold = 'budget' where key_id = $1 and hold is null",
                key_id
            )
            .map(drop)
        }
    }

    /// How many jobs could begin, more or less: ready jobs of lanes with room, counted up to 64 in each of 64 lanes.
    pub(super) async fn runnable(&mut self) -> Result<i64> {
        let row = fetch!(
            self,
            "look for runnable jobs",
            fetch_one => (i64,),
            "select cast(coalesce(sum(ready), 0) as bigint) from (
               select (
                 select count(*) from (
                   select 1 from job
                   where job.key_id = lane.key_id and job.status = 'queued' and job.hold = '' limit 64) as heads) as ready
               from lane
               where top_priority is not null and hold is null and running < max_running
                 and not exists (select 1 from queue where paused or hold is not null)
                 and exists (
                   select 1 from job
                   where job.key_id = lane.key_id and job.status = 'queued' and job.hold = '')
               limit 64) as lanes"
        )?;
        Ok(row.0)
    }

    /// Lets the key's jobs, or the whole queue, look for money again.
    pub(super) async fn free_from_budget(&mut self, scope: &Scope) -> Result<()> {
        let freed = match scope {
            Scope::Global => execute!(
                self,
                "free the queue",
                "update queue set hold = null where hold = 'budget'"
            )?,
            Scope::Key(key_id) => execute!(
                self,
                "free a lane",
                "update lane set hold = null where key_id = $1 and hold = 'budget'",
                key_id
            )?,
        };
        if freed > 0 {
            self.ring();
        }
        Ok(())
    }

    /// Frees the slot of a run that has ended. A lane that waits for money looks again. The end of a run doesn't fail
    /// because its lane counted wrong: [`Store::repair_counters`] corrects the count.
    pub(super) async fn free_slot(&mut self, key_id: &KeyId) -> Result<()> {
        let lane = fetch!(
            self,
            "free a lane's slot",
            fetch_optional => (Option<i64>, i64, Option<String>),
            "update lane set running = case when running > 0 then running - 1 else 0 end where key_id = $1
             returning top_priority, max_running - running, hold",
            key_id
        )?;
        if let Some((top, room, hold)) = lane {
            if hold.as_deref() == Some(Hold::Budget.as_str()) {
                self.free_from_budget(&Scope::Key(key_id.clone())).await?;
            }
            // Only a lane that was full has a job that could not begin before.
            if top.is_some() && room == 1 {
                self.ring();
            }
        }
        Ok(())
    }

    /// Gives the lanes of keys that have no cap of their own this cap.
    pub(super) async fn put_default_caps(&mut self, max_running: i64) -> Result<()> {
        let lanes = execute!(
            self,
            "set up keys' lanes",
            "update lane set max_running = $1 where max_running <> $1
               and key_id in (select key_id from api_key where max_running_jobs is null)",
            max_running
        )?;
        if lanes > 0 {
            self.ring();
        }
        Ok(())
    }
}
