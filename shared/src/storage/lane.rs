//! Lanes: a row for each API key, which is its queue. It counts the key's running jobs against its cap, says whether
//! the key's jobs are held, when it was last served, and the highest priority among its ready jobs. All SQL about lanes,
//! and about the one row that holds the whole queue, is here.
//!
//! `top_priority` is a hint: it may be too high, which costs one claim in vain, but never too low, which would starve the
//! key. Whoever makes jobs ready raises it, under the lane's row or its shared lock; only claims lower it.

use super::macros::lock;
use super::{Db, Error, Result, SqliteTx, Store, Tx, TxDb, execute, fetch, read};
use crate::budget::Scope;
use crate::clock::Timestamp;
use crate::id::KeyId;
use crate::job::Hold;

/// The highest priority among a lane's ready jobs; `$1` is the key.
macro_rules! head {
    () => {
        "(select max(priority) from job where key_id = $1 and status = 'queued' and hold = '')"
    };
}

/// Takes the lock that says: numbers of jobs after the present one are being used.
const NUMBERS_IN_USE: &str = lock!(
    "_shared",
    "(select cast(last_value % 2147483647 as integer) from job_job_number_seq)",
    of = numbers
);

impl Store {
    /// Makes sure that the key has a lane, with this cap on jobs that run at once.
    pub async fn put_lane(&self, key_id: &KeyId, max_running: i64) -> Result<()> {
        let mut tx = self.begin().await?;
        tx.put_lane(key_id, max_running).await?;
        tx.commit().await
    }

    /// Begins a transaction that accepts jobs of this key. On SQLite it may be committed together with others.
    pub async fn begin_submission(&self, key_id: &KeyId) -> Result<Tx> {
        if let Db::Sqlite {
            writer, submissions, ..
        } = &*self.db
        {
            let member = submissions.join(writer, &self.work).await?;
            return Ok(Tx::new(TxDb::Sqlite(SqliteTx::Shared(member)), self.clone()));
        }
        let locks = format!(
            concat!("begin; ", lock!("_shared", "{}", of = lanes), "; {}"),
            lock_number(key_id),
            NUMBERS_IN_USE
        );
        let mut tx = self.begin_with(sqlx::AssertSqlSafe(locks)).await?;
        tx.announced = Some(key_id.clone());
        Ok(tx)
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

    /// Repairs lanes whose counter isn't the number of their running jobs, or whose hint is too low. Neither can be, since
    /// each transaction keeps both true; but a lane that was wrong for ever would starve its key. Gives how many there
    /// were.
    pub async fn repair_lanes(&self) -> Result<u64> {
        // One statement sees one moment, in which both are true.
        let wrong = read!(
            self,
            "look for wrong lanes",
            fetch_all => (KeyId, i64, i64, Option<i64>, Option<i64>),
            "select key_id, running, counted, top_priority, highest from (
               select key_id, running,
                 (select count(*) from job where job.key_id = lane.key_id and job.status = 'running') as counted,
                 top_priority,
                 (select max(priority) from job
                  where job.key_id = lane.key_id and job.status = 'queued' and job.hold = '') as highest
               from lane) as lanes
             where running <> counted or coalesce(highest, -99) > coalesce(top_priority, -99)"
        )?;
        let mut repaired = 0;
        for (key_id, running, counted, hint, highest) in wrong {
            let mut tx = self.begin().await?;
            tx.lock_lane(&key_id).await?;
            let rows = tx.repair_lane(&key_id).await?;
            if rows > 0 {
                tx.ring();
                tracing::error!(
                    key.id = key_id.as_str(),
                    running,
                    counted,
                    top_priority = hint,
                    highest,
                    "the lane of {key_id} was wrong and is repaired: {running} jobs counted as running, {counted} run"
                );
                repaired += rows;
            }
            tx.commit().await?;
        }
        Ok(repaired)
    }
}

impl Tx {
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

    /// Raises the lane's hint to this priority, unless it is as high.
    pub(super) async fn raise_hint(&mut self, key_id: &KeyId, priority: i64) -> Result<()> {
        execute!(
            self,
            "raise a lane's hint",
            "update lane set top_priority = $2 where key_id = $1 and (top_priority is null or top_priority < $2)",
            key_id,
            priority
        )
        .map(drop)
    }

    async fn repair_lane(&mut self, key_id: &KeyId) -> Result<u64> {
        execute!(
            self,
            "repair a lane",
            concat!(
                "update lane set running = (select count(*) from job where key_id = $1 and status = 'running'),
                   top_priority = ",
                head!(),
                " where key_id = $1 and (
                   running <> (select count(*) from job where key_id = $1 and status = 'running')
                   or coalesce(",
                head!(),
                ", -99) > coalesce(top_priority, -99))"
            ),
            key_id
        )
    }

    /// Says until the end of the transaction that it is about to store a job which others can't see yet: claims don't lower
    /// the hint of its lane, and whoever reads jobs in the order of their numbers sees which ones are being used. Many may
    /// hold these locks at once. SQLite, where nobody writes at the same time, needs none.
    pub(super) async fn announce_submission(&mut self, key_id: &KeyId) -> Result<()> {
        if let TxDb::Postgres(tx) = &mut self.db
            && self.announced.as_ref() != Some(key_id)
        {
            self.store.work.statement();
            let locking = sqlx::query(lock!("_shared", "$1", of = lanes))
                .bind(lock_number(key_id))
                .execute(&mut **tx);
            let locked = self.store.liveness.in_time(locking).await;
            locked.map_err(Error::during("wait for a lock"))?;
            self.postgres_lock(NUMBERS_IN_USE, None).await?;
        }
        Ok(())
    }

    /// The lane whose turn it is, with its hint.
    pub(super) async fn take_turn(&mut self) -> Result<Option<(KeyId, i64, i64)>> {
        fetch!(
            self,
            "take a turn",
            fetch_optional => (KeyId, i64, i64),
            "update lane set running = running + 1, last_served = (select max(last_served) + 1 from lane)
             where hold is null and running < max_running and key_id = (
               select key_id from lane
               where top_priority is not null and hold is null and running < max_running
                 and not exists (select 1 from queue where paused or hold is not null)
               order by top_priority desc, last_served limit 1)
             returning key_id, top_priority, endpoints"
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
        self.lower_hint(key_id).await
    }

    /// Corrects a hint that is too high, unless somebody is about to store a job in this lane: a hint may be too high, but
    /// never too low.
    pub(super) async fn lower_hint(&mut self, key_id: &KeyId) -> Result<()> {
        if let TxDb::Postgres(tx) = &mut self.db {
            self.store.work.statement();
            let locking = sqlx::query_as(lock!(try, "$1", of = lanes))
                .bind(lock_number(key_id))
                .fetch_one(&mut **tx);
            let locked = self.store.liveness.in_time(locking).await;
            let (locked,): (bool,) = locked.map_err(Error::during("wait for a lock"))?;
            if !locked {
                return Ok(());
            }
        }
        // A statement of its own, so that it sees what was committed before the lock.
        execute!(
            self,
            "lower a lane's hint",
            concat!(
                "update lane set top_priority = ",
                head!(),
                " where key_id = $1 and top_priority is distinct from ",
                head!()
            ),
            key_id
        )
        .map(drop)
    }

    /// Holds a lane whose first job waits for money, or, when nothing is left for anybody, the whole queue.
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

    /// Lets the key's jobs look for money again; with everybody's money, the queue at once and all lanes that wait after
    /// the commit.
    pub(super) async fn free_from_budget(&mut self, scope: &Scope, now: Timestamp) -> Result<()> {
        match scope {
            Scope::Key(key_id) => self.free_lane(key_id).await,
            Scope::Global => {
                let held = fetch!(
                    self,
                    "look for what waits for money",
                    fetch_all => (KeyId,),
                    "select key_id from lane where hold = 'budget'
                     union all select '' from queue where hold = 'budget'"
                )?;
                for (key_id,) in held {
                    if key_id.as_str().is_empty() {
                        self.free_queue().await?;
                    } else {
                        self.freed.push((key_id, now));
                    }
                }
                Ok(())
            }
        }
    }

    async fn free_lane(&mut self, key_id: &KeyId) -> Result<()> {
        let rows = execute!(
            self,
            "free a lane",
            "update lane set hold = null where key_id = $1 and hold = 'budget'",
            key_id
        )?;
        if rows > 0 {
            self.ring();
        }
        Ok(())
    }

    async fn free_queue(&mut self) -> Result<()> {
        let rows = execute!(
            self,
            "free the queue",
            "update queue set hold = null where hold = 'budget'"
        )?;
        if rows > 0 {
            self.ring();
        }
        Ok(())
    }

    /// Frees the slot of a run that has ended. A lane that waits for money looks again. The end of a run doesn't fail
    /// because its lane counted wrong: [`Store::repair_lanes`] corrects the count.
    ///
    /// Whether the key has endpoints that want to hear of it.
    pub(super) async fn free_slot(&mut self, key_id: &KeyId) -> Result<bool> {
        let lane = fetch!(
            self,
            "free a lane's slot",
            fetch_optional => (Option<i64>, i64, Option<String>, i64),
            "update lane set running = case when running > 0 then running - 1 else 0 end where key_id = $1
             returning top_priority, max_running - running, hold, endpoints",
            key_id
        )?;
        let endpoints = lane.as_ref().is_some_and(|lane| lane.3 > 0);
        if let Some((top, room, hold, _)) = lane {
            if hold.as_deref() == Some(Hold::Budget.as_str()) {
                self.free_lane(key_id).await?;
            }
            // Only a lane that was full has a job that could not begin before.
            if top.is_some() && room == 1 {
                self.ring();
            }
        }
        Ok(endpoints)
    }

    /// Whether the key has endpoints that want to hear of its events.
    pub(super) async fn has_endpoints(&mut self, key_id: &KeyId) -> Result<bool> {
        let lane = fetch!(
            self,
            "look for endpoints",
            fetch_optional => (i64,),
            "select endpoints from lane where key_id = $1",
            key_id
        )?;
        Ok(lane.is_some_and(|lane| lane.0 > 0))
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

/// The number of a lane's lock. Two lanes of one number wait for each other now and then.
fn lock_number(key_id: &KeyId) -> i32 {
    i32::from_ne_bytes(crc32fast::hash(key_id.as_str().as_bytes()).to_ne_bytes())
}
