//! Outages: the database can't be reached, or is locked, full or read-only. All parts of the process see the same
//! outage, so it is logged only twice: when it starts and when it is over.

use super::{Db, Error, Result, Store, connect, execute};
use crate::disk;
use crate::telemetry::chain;
use sqlx::postgres::{PgConnection, PgPool};
use sqlx::{Connection, Executor};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

/// How often the database is tried during an outage. No error may have occurred for as long before it is over.
const TRY_AGAIN: Duration = Duration::from_millis(500);

/// A database that hasn't committed a write within this time is unavailable.
const WRITES_WITHIN: Duration = Duration::from_secs(2);

/// How long a starting process waits for a lock of another process.
const LOCKED_FOR: Duration = Duration::from_secs(30);

/// How long the result of a check is reused.
const CHECKED_FOR: Duration = Duration::from_secs(1);

const WRITE: &str = "write to the database";

/// How often the log says that the database is overloaded or locked.
const LOGGED_EVERY: Duration = Duration::from_secs(10);

/// Writes as a submission does: with its locks, in one message, so that a process which is stopped in it holds nothing.
/// What it writes is a row that nobody waits for. A lane's row is locked by claims for moments; that all are locked for
/// long holds up every submission.
const WRITE_TO_POSTGRES: &str = "
    begin;
    set local lock_timeout = '1s';
    lock table job, prompt, event, lane, idempotency, apalis.jobs in row exclusive mode;
    update instance set instance_number = instance_number;
    do $$
    begin
      perform 1 from lane limit 1 for no key update skip locked;
      if not found then
        perform 1 from lane limit 1 for no key update;
      end if;
    end $$;
    commit";

/// Whether the database is available, as far as this process knows.
#[derive(Debug, Default)]
pub(super) struct Outage {
    /// When the current outage began.
    since: watch::Sender<Option<Instant>>,
    last_error: Mutex<Option<Instant>>,
    /// The result of the last check.
    checked: tokio::sync::Mutex<Option<(Instant, bool)>>,
    /// When this process last committed something.
    wrote: Mutex<Option<Instant>>,
    /// The check's own connection to PostgreSQL: a pool that is in full use says nothing about the database.
    own: tokio::sync::Mutex<Option<PgConnection>>,
    /// When the log last said that it is overloaded or locked.
    logged: Mutex<Option<Instant>>,
}

impl Store {
    /// Records an error. Returns true if it belongs to an outage or an overload, which is logged for the whole process.
    /// The caller logs other errors. Needs a runtime.
    pub fn note(&self, error: &Error) -> bool {
        if error.is_overload() {
            self.note_overload(error);
            return true;
        }
        let outage = error.is_outage();
        if outage {
            self.note_outage(&chain(error));
        }
        outage
    }

    /// Records that no connection was free: load, or the first sign of an outage, which a look will show.
    fn note_overload(&self, error: &Error) {
        if self.outage.may_log() {
            tracing::warn!(error = %chain(error), "all database connections are in use, retrying");
            let store = self.clone();
            tokio::spawn(async move { store.is_usable().await });
        }
    }

    /// Records that the database is unavailable.
    fn note_outage(&self, why: &str) {
        self.give_up_ballast();
        *self.outage.last_error() = Some(Instant::now());
        let begins = self.outage.since.send_if_modified(|since| {
            let begins = since.is_none();
            since.get_or_insert_with(Instant::now);
            begins
        });
        if !begins {
            tracing::debug!(error = why, "the database is still unavailable");
            return;
        }
        tracing::warn!(error = why, "the database is unavailable, retrying");
        let store = self.clone();
        tokio::spawn(async move { store.watch_outage().await });
    }

    /// Whether there is an outage.
    pub fn is_out(&self) -> bool {
        self.outage.since.borrow().is_some()
    }

    /// Waits until there is no outage.
    pub async fn answers(&self) {
        // The sender lives as long as this store.
        let _ = self.outage.since.subscribe().wait_for(Option::is_none).await;
    }

    /// Checks whether the database is available, at most once a second, by a write that changes nothing. A read would
    /// also succeed on a full disk, a locked or a read-only file.
    pub async fn is_usable(&self) -> bool {
        if self.is_out() {
            return false;
        }
        let mut checked = self.outage.checked.lock().await;
        // Another task may have checked while this one waited for the lock.
        if self.is_out() {
            return false;
        }
        if let Some((at, usable)) = *checked
            && at.elapsed() < CHECKED_FOR
        {
            return usable;
        }
        let usable = match timeout(WRITES_WITHIN, self.try_to_write()).await {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                if !self.note(&error) && self.outage.may_log() {
                    tracing::warn!(error = %chain(&error), "the database refuses writes, retrying");
                }
                false
            }
            Err(_) => {
                self.note_outage("it doesn't write within 2 s");
                false
            }
        };
        *checked = Some((Instant::now(), usable));
        usable && !self.is_out()
    }

    /// Waits at start for the holder of SQLite's write lock, which may be a stopped process.
    pub(super) async fn wait_for_lock(&self) -> Result<()> {
        let begin = Instant::now();
        loop {
            match self.try_to_write().await {
                Err(error) if error.is_locked() && begin.elapsed() < LOCKED_FOR => {
                    tracing::warn!(error = %chain(&error), "the database is locked, waiting");
                }
                tried => return tried,
            }
        }
    }

    async fn try_to_write(&self) -> Result<()> {
        let reader = match &*self.db {
            Db::Postgres(pool) => return self.write_to_postgres(pool).await,
            Db::Sqlite { reader, .. } => reader,
        };
        // SQLite's write-ahead log has reserved space, so a small write may succeed when a large one doesn't.
        let file = reader.connect_options().get_filename().to_owned();
        let tried = spawn_blocking(move || disk::try_to_write(file.parent().unwrap_or(Path::new("."))));
        tried
            .await
            .unwrap_or_else(|error| Err(std::io::Error::other(error)))
            .map_err(Error::during("write beside the database"))?;
        // Who writes all the time holds the one lock all the time.
        if self.outage.wrote_lately() {
            return Ok(());
        }
        let mut tx = self.begin().await?;
        execute!(
            tx,
            "write to the database",
            "update instance set instance_number = instance_number"
        )?;
        tx.commit().await
    }

    async fn write_to_postgres(&self, pool: &PgPool) -> Result<()> {
        let mut own = self.outage.own.lock().await;
        // Taken out, so that a connection on which this was given up is closed.
        if let Some(mut connection) = own.take() {
            match connection
                .execute(sqlx::raw_sql(WRITE_TO_POSTGRES))
                .await
                .map_err(Error::during(WRITE))
            {
                Ok(_) => {
                    *own = Some(connection);
                    return Ok(());
                }
                // The server may have closed it long ago.
                Err(error) if error.is_outage() => {}
                Err(error) => return Err(error),
            }
        }
        let mut connection = connect::connect(&pool.connect_options())
            .await
            .map_err(Error::during("connect to the database"))?;
        connection
            .execute(sqlx::raw_sql(WRITE_TO_POSTGRES))
            .await
            .map_err(Error::during(WRITE))?;
        *own = Some(connection);
        Ok(())
    }

    async fn watch_outage(&self) {
        loop {
            tokio::time::sleep(TRY_AGAIN).await;
            let tried = timeout(WRITES_WITHIN, self.try_to_write()).await;
            let quiet = self
                .outage
                .last_error()
                .is_none_or(|last| last.elapsed() >= TRY_AGAIN);
            if matches!(tried, Ok(Ok(()))) && quiet {
                break;
            }
        }
        let since = self.outage.since.send_replace(None);
        let seconds = since.map_or(0.0, |since| since.elapsed().as_secs_f64());
        tracing::info!("the database is available again after {seconds:.1} s");
    }
}

impl Outage {
    /// Whether the log may say again that the database is overloaded or locked.
    fn may_log(&self) -> bool {
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        let may = logged.is_none_or(|at| at.elapsed() >= LOGGED_EVERY);
        if may {
            *logged = Some(Instant::now());
        }
        may
    }

    /// Records a commit of this process.
    pub(super) fn wrote(&self) {
        *self.wrote.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    fn wrote_lately(&self) -> bool {
        let wrote = *self.wrote.lock().unwrap_or_else(PoisonError::into_inner);
        wrote.is_some_and(|at| at.elapsed() < CHECKED_FOR)
    }

    /// Closes what the checks have open.
    pub(super) async fn close(&self) {
        if let Some(connection) = self.own.lock().await.take() {
            let _ = connection.close().await;
        }
    }

    fn last_error(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.last_error.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
