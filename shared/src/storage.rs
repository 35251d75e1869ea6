//! The one way to the database: SQLite or PostgreSQL, one SQL text, typed twice.
//!
//! Reads are methods of [`Store`], writes are methods of [`Tx`]: the type says who may write. Only this folder
//! contains SQL. Rules for its text: lower case, `$1` parameters, times bound from Rust, `cast(x as bigint)` around
//! sums (PostgreSQL's are numeric), no arrays and no JSON operators, singular table names.
//!
//! Locks are taken in one order, so that no two transactions wait for each other: a session, the claim lock, a group,
//! a running job, a lane (one at a time), queued jobs, the lock of the global budget, budgets (the key's before the
//! global one), the queue's row.

mod audit;
mod budget;
mod claim;
mod error;
mod event;
mod idempotency;
mod job;
mod key;
mod ledger;
mod limit;
mod outage;
mod queue;
mod retention;
mod run;
mod session;
mod silence;
mod sweep;
mod url;
mod wait;
mod wakeups;
mod worker;

#[cfg(test)]
mod tests;

use crate::clock::{self, Timestamp};
use crate::id::{JobId, KeyId};
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{ConnectOptions, Connection, Postgres, Sqlite, Transaction};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::Notify;

pub use audit::{AuditEntry, AuditRow, Refused};
pub use budget::{AdjustBudget, DeleteBudget, PutBudget};
pub use claim::{Claim, Claimant};
pub use error::{Error, Result};
pub use idempotency::{IdempotencyOutcome, IdempotencyRecord};
pub use job::{CancelOutcome, JobFilter, Position};
pub use key::{KeyFilter, NewSecret};
pub use ledger::{LedgerEntry, LedgerGroup, LedgerPart, LedgerSum, Usage};
pub use limit::{Quota, Rate};
pub use queue::{QUEUE, Ticket};
pub use retention::{Removal, Workspace};
pub use run::{Finish, RunDirective};
pub use sweep::{RunningLease, Swept};
pub use url::DatabaseUrl;
pub use wakeups::{JobWakeup, Wakeups};
pub use worker::WorkerRow;

/// Runs a statement in a transaction; gives the number of rows.
macro_rules! execute {
    ($tx:expr, $operation:literal, $sql:expr $(, $bind:expr)* $(,)?) => {
        match &mut $tx.db {
            $crate::storage::TxDb::Sqlite(tx) => {
                sqlx::query($sql)$(.bind($bind))*.execute(&mut **tx).await.map(|done| done.rows_affected())
            }
            $crate::storage::TxDb::Postgres(tx) => {
                let statement = sqlx::query($sql)$(.bind($bind))*.execute(&mut **tx);
                $tx.store.silence.in_time(statement).await.map(|done| done.rows_affected())
            }
        }
        .map_err($crate::storage::Error::during($operation))
    };
}

/// Runs a statement in a transaction; gives its rows with `fetch_optional` or `fetch_all`.
macro_rules! fetch {
    ($tx:expr, $operation:literal, $fetch:ident => $row:ty, $sql:expr $(, $bind:expr)* $(,)?) => {
        match &mut $tx.db {
            $crate::storage::TxDb::Sqlite(tx) => {
                sqlx::query_as::<_, $row>($sql)$(.bind($bind))*.$fetch(&mut **tx).await
            }
            $crate::storage::TxDb::Postgres(tx) => {
                let statement = sqlx::query_as::<_, $row>($sql)$(.bind($bind))*.$fetch(&mut **tx);
                $tx.store.silence.in_time(statement).await
            }
        }
        .map_err($crate::storage::Error::during($operation))
    };
}

/// Reads rows and locks them until the end of the transaction: PostgreSQL needs to be told; on SQLite the
/// transaction is the only writer anyway.
macro_rules! fetch_locked {
    ($tx:expr, $operation:literal, $fetch:ident => $row:ty, $sql:literal $(, $bind:expr)* $(,)?) => {
        match &mut $tx.db {
            $crate::storage::TxDb::Sqlite(tx) => {
                sqlx::query_as::<_, $row>($sql)$(.bind($bind))*.$fetch(&mut **tx).await
            }
            $crate::storage::TxDb::Postgres(tx) => {
                let statement =
                    sqlx::query_as::<_, $row>(concat!($sql, " for update"))$(.bind($bind))*.$fetch(&mut **tx);
                $tx.store.silence.in_time(statement).await
            }
        }
        .map_err($crate::storage::Error::during($operation))
    };
}

/// Reads rows outside a transaction.
macro_rules! read {
    ($store:expr, $operation:literal, $fetch:ident => $row:ty, $sql:expr $(, $bind:expr)* $(,)?) => {
        match &*$store.db {
            $crate::storage::Db::Sqlite { reader, .. } => {
                sqlx::query_as::<_, $row>($sql)$(.bind($bind))*.$fetch(reader).await
            }
            $crate::storage::Db::Postgres(pool) => {
                let statement = sqlx::query_as::<_, $row>($sql)$(.bind($bind))*.$fetch(pool);
                $store.silence.in_time(statement).await
            }
        }
        .map_err($crate::storage::Error::during($operation))
    };
}

pub(crate) use {execute, fetch, fetch_locked, read};

/// How long a statement waits for a lock or a connection before the caller hears that the database is unavailable.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a writer waits for its turn on SQLite's one writing connection: a burst of submissions takes turns, and
/// on a slow disk the last of them waits longer than any single statement may.
const TURN: Duration = Duration::from_secs(10);

/// How long connections may take to close.
const CLOSE: Duration = Duration::from_secs(2);

/// The database, whichever it is. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Store {
    db: Arc<Db>,
    tickets: Arc<queue::Backlog>,
    outage: Arc<outage::Outage>,
    silence: Arc<silence::Silence>,
}

#[derive(Debug)]
enum Db {
    /// One connection writes, so that writers of this process queue fairly; the others read. Rate limits have a file
    /// of their own.
    Sqlite {
        writer: SqlitePool,
        reader: SqlitePool,
        limits: SqlitePool,
        /// This process has committed something: its own wake-ups needn't wait for the next look at the file, nor its
        /// slots for what is found there.
        committed: Notify,
        rings: AtomicBool,
    },
    Postgres(PgPool),
}

/// One transaction. Dropped without [`Tx::commit`], it leaves no trace.
#[derive(Debug)]
pub struct Tx {
    db: TxDb,
    store: Store,
    /// Lanes that got ready jobs, with the highest priority of each call.
    ready: Vec<(KeyId, i64)>,
    /// Lanes whose hint this transaction lowered.
    lowered: Vec<KeyId>,
    /// Jobs that changed.
    touched: BTreeSet<JobId>,
    /// Whether a slot should look although no job became ready.
    rings: bool,
    /// Thresholds of budgets that this transaction found reached.
    alerts: Vec<budget::Alert>,
}

#[derive(Debug)]
enum TxDb {
    Sqlite(Transaction<'static, Sqlite>),
    Postgres(Transaction<'static, Postgres>),
}

/// For the layers that must know: the queue library and the wake-ups.
#[derive(Clone, Debug)]
pub enum Pool {
    /// SQLite's one writing connection.
    Sqlite(SqlitePool),
    /// PostgreSQL's connections.
    Postgres(PgPool),
}

impl Store {
    /// Opens the database, making a SQLite file that isn't there, and brings its tables up to date.
    /// `slots`: how many runs this process holds at once, which decides the number of connections.
    pub async fn open(url: &DatabaseUrl, slots: u32) -> Result<Self> {
        let silence = Arc::default();
        let db = match url {
            DatabaseUrl::Sqlite(path) => Self::open_sqlite(path).await?,
            DatabaseUrl::Postgres(url) => Self::open_postgres(url, slots, &silence).await?,
        };
        let store = Self {
            db: Arc::new(db),
            tickets: Arc::default(),
            outage: Arc::default(),
            silence,
        };
        store.wait_for_lock().await?;
        Ok(store)
    }

    async fn open_sqlite(path: &std::path::Path) -> Result<Db> {
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder)
                .map_err(Error::with("make the folder of the database", folder))?;
        }
        // Already the switch to WAL can fail when several processes make it at once. Unlocked when the file is
        // closed, also by a kill.
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".migrate-lock");
        let lock = path.with_file_name(name);
        let lock =
            std::fs::File::create(&lock).map_err(Error::with("make the lock file of the database", &lock))?;
        let lock = tokio::task::spawn_blocking(move || lock.lock().map(|()| lock))
            .await
            .map_err(|error| Error::during("lock the lock file")(error.to_string()))?
            .map_err(Error::during("lock the lock file"))?;
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            // A 202 survives a power cut.
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(PATIENCE)
            .disable_statement_logging();
        let pool = |connections| {
            SqlitePoolOptions::new()
                .max_connections(connections)
                .acquire_timeout(TURN)
                .test_before_acquire(false)
                // A full disk makes SQLite roll back by itself. The library doesn't learn of it, and would refuse to
                // begin another transaction on this connection for ever.
                .before_acquire(|connection, _| {
                    let usable = !connection.is_in_transaction();
                    Box::pin(async move { Ok(usable) })
                })
        };
        let writer = pool(1)
            .connect_with(options.clone())
            .await
            .map_err(Error::during("open the database"))?;
        Self::migrate_sqlite(&writer).await?;
        let limits = limit::open_limits(path).await?;
        drop(lock);
        let reader = pool(4)
            .min_connections(1)
            .connect_with(options.read_only(true).create_if_missing(false))
            .await
            .map_err(Error::during("open the database"))?;
        Ok(Db::Sqlite {
            writer,
            reader,
            limits,
            committed: Notify::new(),
            rings: AtomicBool::new(false),
        })
    }

    async fn open_postgres(url: &str, slots: u32, silence: &Arc<silence::Silence>) -> Result<Db> {
        let options = url
            .parse::<PgConnectOptions>()
            .map_err(Error::during("read DATABASE_URL"))?
            .application_name("claude-queue")
            .options([
                // Plans made while the tables were empty would scan them for ever, and the penalty starts the JIT.
                ("enable_seqscan", "off"),
                ("jit", "off"),
                // A process that was stopped in a transaction must not hold the others for longer.
                ("idle_in_transaction_session_timeout", "5s"),
                ("lock_timeout", "5s"),
            ])
            .disable_statement_logging();
        let pool = silence
            .guard(PgPoolOptions::new())
            .max_connections((slots + 5).min(16))
            .min_connections(1)
            .acquire_timeout(PATIENCE)
            .connect_with(options)
            .await
            .map_err(Error::during("connect to the database"))?;
        Self::migrate_postgres(&pool).await?;
        Ok(Db::Postgres(pool))
    }

    /// Brings the tables up to date, ours and the queue library's. The caller holds the lock over all processes.
    async fn migrate_sqlite(writer: &SqlitePool) -> Result<()> {
        let mut ours = sqlx::migrate!("../migrations/sqlite");
        ours.dangerous_set_table_name("migration");
        ours.run(writer)
            .await
            .map_err(Error::during("bring the tables up to date"))?;
        apalis_sqlite::SqliteStorage::<()>::migrations()
            .run(writer)
            .await
            .map_err(Error::during("bring the queue's tables up to date"))?;
        // It would make each acknowledgement walk all rows of its worker.
        sqlx::query("drop index if exists LIdx")
            .execute(writer)
            .await
            .map_err(Error::during("bring the queue's tables up to date"))?;
        Ok(())
    }

    /// Brings the tables up to date, ours and the queue library's, under one lock over all processes.
    async fn migrate_postgres(pool: &PgPool) -> Result<()> {
        let options = pool
            .connect_options()
            .as_ref()
            .clone()
            .options([("lock_timeout", "0")]);
        let mut lock = options
            .connect()
            .await
            .map_err(Error::during("connect to the database"))?;
        sqlx::query("select pg_advisory_lock(7262180437)")
            .execute(&mut lock)
            .await
            .map_err(Error::during("lock the database for migration"))?;
        let mut ours = sqlx::migrate!("../migrations/postgres");
        ours.dangerous_set_table_name("migration");
        ours.run(pool)
            .await
            .map_err(Error::during("bring the tables up to date"))?;
        apalis_postgres::PostgresStorage::setup(pool)
            .await
            .map_err(Error::during("bring the queue's tables up to date"))?;
        let _ = lock.close().await;
        Ok(())
    }

    /// Begins a transaction that may write. On SQLite it is the one writer until it ends.
    pub async fn begin(&self) -> Result<Tx> {
        let db = match &*self.db {
            Db::Sqlite { writer, .. } => TxDb::Sqlite(
                writer
                    .begin_with("BEGIN IMMEDIATE")
                    .await
                    .map_err(Error::during("begin a transaction"))?,
            ),
            Db::Postgres(pool) => {
                let begun = self.silence.in_time(pool.begin()).await;
                TxDb::Postgres(begun.map_err(Error::during("begin a transaction"))?)
            }
        };
        let store = self.clone();
        Ok(Tx {
            db,
            store,
            ready: Vec::new(),
            lowered: Vec::new(),
            touched: BTreeSet::new(),
            rings: false,
            alerts: Vec::new(),
        })
    }

    /// Asks the database whether it answers.
    pub async fn ping(&self) -> Result<()> {
        read!(
            self,
            "ask the database",
            fetch_optional => (i64,),
            "select cast(1 as bigint)"
        )
        .map(drop)
    }

    /// Waits until the database has left a statement of this process without an answer. The queue library waits for
    /// its own without an end.
    pub async fn silence(&self) {
        self.silence.begins().await;
    }

    /// The connections, for the queue library.
    pub fn pool(&self) -> Pool {
        match &*self.db {
            Db::Sqlite { writer, .. } => Pool::Sqlite(writer.clone()),
            Db::Postgres(pool) => Pool::Postgres(pool.clone()),
        }
    }

    /// Closes all connections. Statements under way end first, in two seconds at most: a database that doesn't answer
    /// must not keep a process that has ended everything else.
    pub async fn close(&self) {
        let closing = async {
            match &*self.db {
                Db::Sqlite {
                    writer,
                    reader,
                    limits,
                    ..
                } => {
                    limits.close().await;
                    reader.close().await;
                    writer.close().await;
                }
                Db::Postgres(pool) => pool.close().await,
            }
        };
        let _ = tokio::time::timeout(CLOSE, closing).await;
    }

    /// The name of this database's content, made with it. `DATA_DIR` must hold the same.
    pub async fn instance_id(&self) -> Result<String> {
        let mut tx = self.begin().await?;
        execute!(
            tx,
            "name the database",
            "insert into instance (instance_number, instance_id, created_at) values (1, $1, $2) on conflict do nothing",
            uuid::Uuid::new_v4().to_string(),
            clock::now()
        )?;
        let row = fetch!(
            tx,
            "name the database",
            fetch_optional => (String,),
            "select instance_id from instance"
        )?;
        tx.commit().await?;
        row.map(|row| row.0)
            .ok_or_else(|| Error::during("name the database")("no row".to_owned()))
    }

    /// Makes sure that the key has a lane, with this cap on jobs that run at once.
    pub async fn put_lane(&self, key_id: &KeyId, max_running: i64) -> Result<()> {
        let mut tx = self.begin().await?;
        tx.put_lane(key_id, max_running).await?;
        tx.commit().await
    }
}

impl Tx {
    /// Makes it so: hints, tickets and wake-ups of this transaction are part of it.
    pub async fn commit(mut self) -> Result<()> {
        let ready = std::mem::take(&mut self.ready);
        for (key_id, priority) in &ready {
            self.raise_to(key_id, *priority).await?;
        }
        let rings = self.rings || !ready.is_empty();
        if rings {
            self.push_tickets(ready.len().max(1)).await?;
        }
        self.notify(rings).await?;
        let Self {
            db,
            store,
            lowered,
            alerts,
            ..
        } = self;
        match db {
            TxDb::Sqlite(tx) => {
                tx.commit().await.map_err(Error::during(error::COMMIT))?;
                if let Db::Sqlite {
                    committed,
                    rings: rung,
                    ..
                } = &*store.db
                {
                    rung.fetch_or(rings, Ordering::Relaxed);
                    committed.notify_one();
                }
            }
            TxDb::Postgres(tx) => {
                let committed = store.silence.in_time(tx.commit()).await;
                committed.map_err(Error::during(error::COMMIT))?;
                // Others may have changed the hints without seeing this transaction; from here on one of the two
                // sees the other. What fails here is mended by the sweeper within a second.
                let _ = store.raise_again(&ready, &lowered).await;
            }
        }
        alerts.iter().for_each(budget::Alert::log);
        Ok(())
    }

    /// Undoes it. Dropping does the same, but later.
    pub async fn rollback(self) -> Result<()> {
        match self.db {
            TxDb::Sqlite(tx) => tx.rollback().await,
            TxDb::Postgres(tx) => self.store.silence.in_time(tx.rollback()).await,
        }
        .map_err(Error::during("roll back"))
    }

    /// Takes the lock under which all claims are made, one at a time.
    async fn lock_claims(&mut self) -> Result<()> {
        self.postgres_lock("select pg_advisory_xact_lock(1)", None).await
    }

    /// Takes the lock of a group: who decides its order decides alone.
    async fn lock_group(&mut self, key_id: &KeyId, group_key: Option<&str>) -> Result<()> {
        match group_key {
            Some(group) => {
                let name = format!("{key_id}/{group}");
                self.postgres_lock(
                    "select pg_advisory_xact_lock(hashtextextended($1, 0))",
                    Some(name),
                )
                .await
            }
            None => Ok(()),
        }
    }

    /// SQLite needs no such locks: a transaction is the only writer.
    async fn postgres_lock(&mut self, sql: &'static str, name: Option<String>) -> Result<()> {
        if let TxDb::Postgres(tx) = &mut self.db {
            let query = match name {
                Some(name) => sqlx::query(sql).bind(name),
                None => sqlx::query(sql),
            };
            let locked = self.store.silence.in_time(query.execute(&mut **tx)).await;
            locked.map_err(Error::during("wait for a lock"))?;
        }
        Ok(())
    }

    async fn raise_to(&mut self, key_id: &KeyId, priority: i64) -> Result<bool> {
        let rows = execute!(
            self,
            "raise a lane's hint",
            "update lane set top = $2 where key_id = $1 and (top is null or top < $2)",
            key_id,
            priority
        )?;
        Ok(rows > 0)
    }

    /// Says that a job of this key became ready: its lane is raised and a ticket pushed when this commits.
    fn became_ready(&mut self, key_id: &KeyId, priority: i64) {
        self.ready.push((key_id.clone(), priority));
    }

    /// Whoever waits for this job is told when this commits.
    fn touch(&mut self, job_id: JobId) {
        self.touched.insert(job_id);
    }
}

/// Microseconds from now on, or `None` when it has passed.
fn in_future(at: Option<Timestamp>, now: Timestamp) -> bool {
    at.is_some_and(|at| at > now)
}
