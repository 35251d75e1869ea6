//! The one way to the database: SQLite or PostgreSQL, one SQL text, typed twice.
//!
//! Reads are methods of [`Store`], and so are writes that are a whole transaction (`claim`, `record`, `finish`,
//! `cancel_job`); a write that is a part of its caller's transaction is a method of [`Tx`]. Only this folder contains
//! SQL. Rules for its text: lower case, `$1` parameters, times bound from Rust, `cast(x as bigint)` around
//! sums (PostgreSQL's are numeric), no arrays and no JSON operators, singular table names.
//!
//! Locks are taken in one order, so that no two transactions wait for each other: a session, the claim lock, a group,
//! a running job, a lane (one at a time), queued jobs, budgets, the queue's row. The lock of the global budget comes
//! before all of them but the claim lock, the shared lock of a lane before a group.

mod audit;
mod ballast;
mod budget;
mod claim;
mod columns;
mod connect;
mod delivery;
mod endpoint;
mod erase;
mod error;
mod event;
mod file_changes;
mod group;
mod group_commit;
mod idempotency;
mod inspect;
mod instance;
mod job;
mod key;
mod lane;
mod ledger;
mod limit;
mod liveness;
mod macros;
mod notifier;
mod open;
mod outage;
mod retention;
mod run;
mod session;
mod stream;
mod sweep;
mod ticket;
mod tx;
mod url;
mod usage;
mod wait;
mod wakeups;
mod work;
mod worker;

use crate::clock::Timestamp;
use sqlx::SqlSafeStr;
use sqlx::postgres::PgPool;
use sqlx::sqlite::SqlitePool;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use tokio::sync::Notify;
use tx::{SqliteTx, TxDb};

#[doc(hidden)]
pub use audit::{AUDIT_OF_ACTOR, AUDIT_OF_ALL};
pub use audit::{AuditEntry, AuditRow, Refused};
pub use budget::{AdjustBudget, DeleteBudget, PutBudget};
pub use claim::{Claim, Claimant};
pub use delivery::{Busy, DeliveryFilter, Resend};
pub use error::{Error, Result};
pub use idempotency::{IdempotencyOutcome, IdempotencyRecord};
pub use inspect::{Inspection, inspect};
pub use job::{Argument, Attempt, CancelOutcome, JobDetails, JobFilter, JobPart, Position};
#[doc(hidden)]
pub use key::keys_sql;
pub use key::{KeyFilter, NewSecret};
#[doc(hidden)]
pub use ledger::ledger_entries_sql;
pub use ledger::{LedgerEntry, LedgerGroup, LedgerPart, LedgerSum};
pub use limit::{Quota, Rate};
pub use retention::{Removal, Workspace};
pub use run::{Finish, RunDirective};
#[doc(hidden)]
pub use session::{
    EXCHANGES_OF_ALL, EXCHANGES_OF_KEY, EXCHANGES_OF_SESSION, SESSIONS_OF_ALL, SESSIONS_OF_KEY,
};
pub use session::{Exchange, MessagesOf};
pub use sweep::{RunningLease, Swept};
pub use ticket::{Queue, Ticket};
pub use tx::Tx;
pub use url::DatabaseUrl;
pub use usage::Usage;
#[doc(hidden)]
pub use usage::{USAGE, ledger_borders, ledger_sums_sql};
pub use wakeups::{JobWakeup, Wakeups};
pub use work::Work;
pub use worker::WorkerRow;

use macros::{execute, fetch, fetch_locked, lock, read};

/// How long a statement waits for a lock or a connection before the caller hears that the database is unavailable.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a writer waits for its turn on SQLite's one writing connection: a burst of submissions takes turns, and
/// on a slow disk the last of them waits longer than any single statement may.
const WRITER_TIMEOUT: Duration = Duration::from_secs(10);

/// How long connections may take to close.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// The database, whichever it is. Cloning is cheap.
#[derive(Clone, Debug)]
pub struct Store {
    db: Arc<Db>,
    tickets: Arc<ticket::Backlogs>,
    outage: Arc<outage::Outage>,
    liveness: Arc<liveness::ConnectionLiveness>,
    work: Arc<work::Counters>,
    notifier: notifier::Notifier,
    /// The last claim of this process saw another job in the same lane, so that the next needs no look beforehand.
    more_ready: Arc<AtomicBool>,
}

#[derive(Debug)]
enum Db {
    /// One connection writes, so that writers of this process queue fairly; the others read. Rate limits have a file
    /// of their own.
    Sqlite {
        writer: SqlitePool,
        reader: SqlitePool,
        limits: SqlitePool,
        /// Submissions that wait for the writer share its transactions.
        submissions: group_commit::GroupCommit,
        /// This process has committed something: its own wake-ups needn't wait for the next look at the file, nor its
        /// slots for what is found there.
        committed: Notify,
        rings: AtomicBool,
    },
    Postgres(PgPool),
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
    /// Begins a transaction that may write. On SQLite it is the one writer until it ends.
    pub async fn begin(&self) -> Result<Tx> {
        self.begin_with("begin").await
    }

    /// The same, with another statement that begins on PostgreSQL: one that takes a lock in the same round trip. SQLite
    /// needs no such locks, since a transaction is the only writer.
    async fn begin_with(&self, postgres: impl SqlSafeStr) -> Result<Tx> {
        self.work.transaction();
        let db = match &*self.db {
            Db::Sqlite { writer, .. } => TxDb::Sqlite(SqliteTx::Own(
                writer
                    .begin_with("BEGIN IMMEDIATE")
                    .await
                    .map_err(Error::during("begin a transaction"))?,
            )),
            Db::Postgres(pool) => {
                let begun = self.liveness.begun(pool.begin_with(postgres)).await;
                TxDb::Postgres(begun.map_err(Error::during("begin a transaction"))?)
            }
        };
        Ok(Tx::new(db, self.clone()))
    }

    /// The same, with the lock under which all claims are made, one at a time.
    async fn begin_claim(&self) -> Result<Tx> {
        self.begin_with(concat!("begin; ", lock!("", "1"))).await
    }

    /// The same for what ends a run: who sets or removes the global budget has to wait.
    async fn begin_end_of_run(&self) -> Result<Tx> {
        self.begin_with(concat!("begin; ", lock!("_shared", "2"))).await
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

    /// Waits until a statement of this process gets no answer in time. The queue library waits for the answers to its
    /// own statements without a limit.
    pub async fn connection_lost(&self) {
        self.liveness.lost().await;
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
                Db::Postgres(pool) => {
                    self.outage.close().await;
                    self.notifier.flush().await;
                    pool.close().await;
                }
            }
        };
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, closing).await;
    }
}

/// Whether there is such a time and it is still to come.
fn in_future(at: Option<Timestamp>, now: Timestamp) -> bool {
    at.is_some_and(|at| at > now)
}
