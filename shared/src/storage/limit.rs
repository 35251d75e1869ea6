//! Rate limits, counted in the database so that they hold over any number of processes.
//!
//! The limiter is GCRA: a bucket is one time, at which it will be full again. A call moves that time by the interval
//! between two calls, if it stays within one window from now. So `Remaining`, `Reset` and `Retry-After` follow from
//! one number and are exact.
//!
//! On SQLite the tables are in a file of their own beside the database, so that reading, which is limited too, never
//! waits for the one writer of jobs. Losing that file lets everybody begin anew, which does no harm.

use super::macros::on_connection;
use super::{Db, Error, LOCK_TIMEOUT, Result, Store, read};
use crate::clock::{self, Timestamp};
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{ConnectOptions, Executor};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// So many calls in a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    limit: i64,
    window_seconds: i64,
}

impl Rate {
    /// `limit` calls (1 to 1,000,000) in so many seconds (1 to 86,400); what is outside is moved inside.
    pub fn new(limit: i64, window_seconds: i64) -> Self {
        Self {
            limit: limit.clamp(1, 1_000_000),
            window_seconds: window_seconds.clamp(1, 86_400),
        }
    }

    /// How many calls.
    pub const fn limit(self) -> i64 {
        self.limit
    }

    /// In how many seconds.
    pub const fn window_seconds(self) -> i64 {
        self.window_seconds
    }

    /// Microseconds after which one more call is allowed.
    const fn interval(self) -> i64 {
        self.window_seconds * 1_000_000 / self.limit
    }

    /// How far ahead of now, in microseconds, the time of the full bucket may lie.
    const fn burst(self) -> i64 {
        self.interval() * self.limit
    }
}

/// What a bucket answered, and all that follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// The limit that was asked about.
    pub rate: Rate,
    /// Whether the call is allowed.
    pub granted: bool,
    /// When it was asked.
    pub now: Timestamp,
    /// When the bucket will be full, if nobody calls till then.
    pub full_at: Timestamp,
}

impl Quota {
    /// How many more calls would be allowed right now.
    pub fn remaining(&self) -> i64 {
        (self.rate.burst() - self.debt()) / self.rate.interval()
    }

    /// How many calls of the limit are used up.
    pub fn used(&self) -> i64 {
        self.rate.limit - self.remaining()
    }

    /// The second (since 1970) at which the whole limit is there again.
    pub fn reset(&self) -> i64 {
        ceil_seconds(self.full_at.0.max(self.now.0))
    }

    /// Seconds until one more call is allowed than now; `None` when all are.
    pub fn more_in(&self) -> Option<i64> {
        let interval = self.rate.interval();
        let rest = (self.rate.burst() - self.debt()) % interval;
        (self.debt() > 0).then(|| ceil_seconds(interval - rest))
    }

    /// How long until a call is allowed; zero when one is.
    pub fn wait(&self) -> Duration {
        let micros = self.debt() + self.rate.interval() - self.rate.burst();
        Duration::from_micros(u64::try_from(micros).unwrap_or(0))
    }

    /// The same in whole seconds, at least 1: for `Retry-After` of a refused call.
    pub fn retry_after(&self) -> i64 {
        ceil_seconds(i64::try_from(self.wait().as_micros()).unwrap_or(i64::MAX)).max(1)
    }

    /// The same bucket so much later, when nobody has called meanwhile.
    #[must_use]
    pub fn after(&self, elapsed: Duration) -> Self {
        Self {
            now: self.now.plus(elapsed),
            ..*self
        }
    }

    /// How far the full bucket is away, in microseconds.
    fn debt(&self) -> i64 {
        (self.full_at.0 - self.now.0).clamp(0, self.rate.burst())
    }
}

const fn ceil_seconds(micros: i64) -> i64 {
    (micros + 999_999).div_euclid(1_000_000)
}

/// Where the full bucket lies before this call: not in the past, and never beyond a window from now, so that a limit
/// that was lowered locks nobody out for longer. When the clock was set back by more than a window, the bucket is as far
/// from full as it was then.
macro_rules! before {
    () => {
        "case when held.full_at <= excluded.asked_at then excluded.asked_at
              when held.asked_at > excluded.asked_at + $3 and held.full_at < held.asked_at + $3
                then excluded.asked_at + held.full_at - held.asked_at
              when held.full_at > excluded.asked_at + $3 then excluded.asked_at + $3
              else held.full_at end"
    };
}

/// One statement decides and counts. `$1` bucket, `$2` interval, `$3` burst, `$4` the time.
macro_rules! take {
    ($now:literal) => {
        concat!(
            "insert into rate_limit as held (bucket, full_at, asked_at, granted)
             select $1, asked.at + $2, asked.at, true from (select ",
            $now,
            " as at) as asked where true
             on conflict (bucket) do update set
               granted = ",
            before!(),
            " + $2 <= excluded.asked_at + $3,
               full_at = ",
            before!(),
            " + case when ",
            before!(),
            " + $2 <= excluded.asked_at + $3 then $2 else 0 end,
               asked_at = excluded.asked_at
             returning granted, asked_at, full_at"
        )
    };
}

/// The limiter's file: `<database>.limits`.
pub(super) fn limits_file(database: &Path) -> PathBuf {
    let mut name = database.file_name().unwrap_or_default().to_owned();
    name.push(".limits");
    database.with_file_name(name)
}

/// Opens the file beside a SQLite database. One that a crash has spoilt is begun anew. The caller holds the lock over
/// all processes.
pub(super) async fn open_limits(database: &Path) -> Result<SqlitePool> {
    let file = limits_file(database);
    match open_file(&file)
        .await
        .map_err(Error::during("open the rate limits"))
    {
        Err(error) if !error.is_unavailable() => {}
        opened => return opened,
    }
    for ending in ["", "-wal", "-shm"] {
        let mut name = file.file_name().unwrap_or_default().to_owned();
        name.push(ending);
        let _ = std::fs::remove_file(file.with_file_name(name));
    }
    open_file(&file)
        .await
        .map_err(Error::during("open the rate limits"))
}

async fn open_file(file: &Path) -> sqlx::Result<SqlitePool> {
    let options = SqliteConnectOptions::new()
        .filename(file)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Off)
        .busy_timeout(LOCK_TIMEOUT)
        .disable_statement_logging();
    let pool = SqlitePoolOptions::new()
        .max_connections(1)
        .min_connections(1)
        .acquire_timeout(LOCK_TIMEOUT)
        .test_before_acquire(false)
        .connect_with(options)
        .await?;
    for table in [
        "create table if not exists rate_limit (
           bucket text not null primary key,
           full_at integer not null,
           asked_at integer not null,
           granted integer not null
         ) strict, without rowid",
        "create table if not exists open_stream (
           stream_id text not null primary key,
           process_id text not null,
           key_id text not null,
           valid_until integer not null
         ) strict",
        "create index if not exists open_stream_key on open_stream (key_id)",
        "create index if not exists open_stream_process on open_stream (process_id)",
    ] {
        pool.execute(table).await?;
    }
    Ok(pool)
}

/// Runs a statement on the limiter's tables; gives the number of rows.
macro_rules! change {
    ($store:expr, $operation:literal, $sql:expr $(, $bind:expr)* $(,)?) => {
        match &*$store.db {
            $crate::storage::Db::Sqlite { limits, .. } => {
                sqlx::query($sql)$(.bind($bind))*.execute(limits).await.map(|done| done.rows_affected())
            }
            $crate::storage::Db::Postgres(pool) => {
                let statement = sqlx::query($sql)$(.bind($bind))*;
                $crate::storage::macros::on_connection!($store, pool, |connection| statement.execute(connection))
                    .map(|done| done.rows_affected())
            }
        }
        .map_err($crate::storage::Error::during($operation))
    };
}

pub(super) use change;

impl Store {
    /// Takes one call out of a bucket, or finds that there is none left, by the database's clock (this machine's on
    /// SQLite).
    pub async fn take(&self, bucket: &str, rate: Rate) -> Result<Quota> {
        self.take_at(bucket, rate, None).await
    }

    /// The same at a given time.
    #[doc(hidden)]
    pub async fn take_at(&self, bucket: &str, rate: Rate, now: Option<Timestamp>) -> Result<Quota> {
        const ON_SQLITE: &str = take!("$4");
        // Read before the statement waits for the bucket's row, so it may be a little early: on the safe side.
        const ON_POSTGRES: &str = take!(
            "coalesce(cast($4 as bigint), cast(extract(epoch from clock_timestamp()) * 1000000 as bigint))"
        );
        self.work.statement();
        let (granted, now, full_at): (bool, Timestamp, Timestamp) = match &*self.db {
            Db::Sqlite { limits, .. } => {
                sqlx::query_as(ON_SQLITE)
                    .bind(bucket)
                    .bind(rate.interval())
                    .bind(rate.burst())
                    .bind(now.unwrap_or_else(clock::now))
                    .fetch_one(limits)
                    .await
            }
            Db::Postgres(pool) => {
                let taking = sqlx::query_as(ON_POSTGRES)
                    .bind(bucket)
                    .bind(rate.interval())
                    .bind(rate.burst())
                    .bind(now);
                on_connection!(self, pool, |connection| taking.fetch_one(connection))
            }
        }
        .map_err(Error::during("count a request"))?;
        Ok(Quota {
            rate,
            granted,
            now,
            full_at,
        })
    }

    /// The time by which limits and streams are counted: the database's own, since the clocks of several machines don't
    /// agree; this machine's on SQLite.
    pub async fn limits_now(&self) -> Result<Timestamp> {
        match &*self.db {
            Db::Sqlite { .. } => Ok(clock::now()),
            Db::Postgres(_) => read!(
                self,
                "ask for the time",
                fetch_one => (Timestamp,),
                "select cast(extract(epoch from clock_timestamp()) * 1000000 as bigint)"
            )
            .map(|row| row.0),
        }
    }

    /// How a bucket stands, without taking anything.
    pub async fn quota(&self, bucket: &str, rate: Rate) -> Result<Quota> {
        let sql = "select full_at from rate_limit where bucket = $1";
        let row: Option<(Timestamp,)> = match &*self.db {
            Db::Sqlite { limits, .. } => sqlx::query_as(sql).bind(bucket).fetch_optional(limits).await,
            Db::Postgres(pool) => {
                let reading = sqlx::query_as(sql).bind(bucket);
                on_connection!(self, pool, |connection| reading.fetch_optional(connection))
            }
        }
        .map_err(Error::during("read a rate limit"))?;
        let now = self.limits_now().await?;
        let quota = Quota {
            rate,
            granted: true,
            now,
            full_at: row.map_or(now, |row| row.0),
        };
        Ok(Quota {
            granted: quota.remaining() > 0,
            ..quota
        })
    }

    /// Forgets buckets that are full and streams that count no more, as of [`Store::limits_now`].
    pub async fn sweep_limits(&self, now: Timestamp) -> Result<()> {
        change!(
            self,
            "forget full buckets",
            "delete from rate_limit where full_at < $1",
            now
        )?;
        change!(
            self,
            "forget event streams",
            "delete from open_stream where valid_until < $1",
            now
        )
        .map(drop)
    }
}
