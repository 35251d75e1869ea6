//! Tickets: what rides the queue. A ticket wakes a free slot; the claim decides what the slot runs.

use super::{Error, Result, Tx, TxDb};
use apalis_core::task::Task;
use apalis_core::task::builder::TaskBuilder;
use serde::{Deserialize, Serialize};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// The queue of job tickets, as the queue library names it.
pub const QUEUE: &str = "jobs";

/// More waiting tickets than this are of no use, and on PostgreSQL each makes a fetch dearer.
const MAX_WAITING: i64 = 1000;

/// Wakes a slot. It says nothing: it may come twice, late, or when nothing is left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ticket {}

fn ticket() -> Task<Vec<u8>> {
    TaskBuilder::new(b"{}".to_vec())
        .max_attempts(1)
        .run_at_timestamp(0)
        .build()
}

/// What this process knows of the waiting tickets, so that not every submission has to count them.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    full_until: Mutex<Option<Instant>>,
}

impl Backlog {
    fn is_full(&self) -> bool {
        self.full_until
            .lock()
            .is_ok_and(|until| until.is_some_and(|until| Instant::now() < until))
    }

    fn set_full(&self) {
        if let Ok(mut until) = self.full_until.lock() {
            // Even the fastest workers need longer for so many tickets, so none goes hungry meanwhile.
            *until = Some(Instant::now() + Duration::from_millis(500));
        }
    }
}

impl Tx {
    /// Pushes tickets, unless enough are waiting.
    #[doc(hidden)]
    pub async fn push_tickets(&mut self, count: usize) -> Result<()> {
        if self.store.tickets.is_full() {
            return Ok(());
        }
        if self.waiting_tickets(MAX_WAITING).await? >= MAX_WAITING {
            self.store.tickets.set_full();
            return Ok(());
        }
        let tickets: Vec<_> = (0..count.min(64)).map(|_| ticket()).collect();
        match &mut self.db {
            TxDb::Sqlite(tx) => apalis_sqlite::queries::push_tasks(&mut **tx, QUEUE, &tickets)
                .await
                .map_err(Error::during("push a ticket")),
            TxDb::Postgres(tx) => {
                let pushing = apalis_postgres::queries::push_tasks(&mut **tx, QUEUE, tickets);
                let pushed = self.store.liveness.in_time(pushing).await;
                pushed.map_err(Error::during("push a ticket"))
            }
        }
    }

    /// How many tickets wait, counted up to `limit`.
    pub(super) async fn waiting_tickets(&mut self, limit: i64) -> Result<i64> {
        // The two tables are the queue library's, and named by it.
        let row: (i64,) = match &mut self.db {
            TxDb::Sqlite(tx) => {
                sqlx::query_as(
                    "select count(*) from (
                       select 1 from Jobs where job_type = $1 and status = 'Pending' and lock_by is null limit $2)",
                )
                .bind(QUEUE)
                .bind(limit)
                .fetch_one(&mut **tx)
                .await
            }
            TxDb::Postgres(tx) => {
                let counting = sqlx::query_as(
                    "select count(*) from (
                       select 1 from apalis.jobs where job_type = $1 and status = 'Pending' limit $2) as waiting",
                )
                .bind(QUEUE)
                .bind(limit)
                .fetch_one(&mut **tx);
                self.store.liveness.in_time(counting).await
            }
        }
        .map_err(Error::during("count tickets"))?;
        Ok(row.0)
    }

    /// Tells other processes, when this commits, which jobs changed and whether a slot should look. On SQLite they
    /// see the commit itself.
    pub(super) async fn notify(&mut self, ring: bool) -> Result<()> {
        let TxDb::Postgres(tx) = &mut self.db else {
            return Ok(());
        };
        let ring = ring.then(|| super::wakeups::RING.to_owned());
        let words: Vec<String> = ring
            .into_iter()
            .chain(self.touched.iter().map(ToString::to_string))
            .collect();
        // A notification holds less than 8,000 bytes.
        for words in words.chunks(200) {
            let notifying = sqlx::query("select pg_notify($1, $2)")
                .bind(super::wakeups::CHANNEL)
                .bind(words.join(" "))
                .execute(&mut **tx);
            let notified = self.store.liveness.in_time(notifying).await;
            notified.map_err(Error::during("notify"))?;
        }
        Ok(())
    }
}
