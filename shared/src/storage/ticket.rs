//! Tickets: what rides the queue. A ticket wakes a free slot; the claim decides what the slot runs.

use super::{Error, Result, Tx, TxDb};
use apalis_core::task::Task;
use apalis_core::task::builder::TaskBuilder;
use serde::{Deserialize, Serialize};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// A queue of tickets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// For slots that run jobs.
    Jobs,
    /// For those who deliver webhooks.
    Webhooks,
}

impl Queue {
    /// As the queue library names it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Jobs => "jobs",
            Self::Webhooks => "webhooks",
        }
    }

    /// More waiting tickets than this are of no use, and on PostgreSQL each makes a fetch dearer. A process delivers
    /// everything that is due once it is woken, so few are enough.
    const fn max_waiting(self) -> i64 {
        match self {
            Self::Jobs => 64,
            Self::Webhooks => 4,
        }
    }
}

/// Wakes a slot. It says nothing: it may come twice, late, or when nothing is left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ticket {}

fn ticket() -> Task<Vec<u8>> {
    TaskBuilder::new(b"{}".to_vec())
        .max_attempts(1)
        .run_at_timestamp(0)
        .build()
}

/// How long a count of the waiting tickets is used.
const COUNT_TTL: Duration = Duration::from_millis(500);

/// What this process knows of the waiting tickets, so that not every submission has to count them.
#[derive(Debug, Default)]
pub(super) struct Backlogs {
    jobs: Backlog,
    webhooks: Backlog,
}

impl Backlogs {
    fn of(&self, queue: Queue) -> &Backlog {
        match queue {
            Queue::Jobs => &self.jobs,
            Queue::Webhooks => &self.webhooks,
        }
    }
}

#[derive(Debug, Default)]
struct Backlog(Mutex<Option<Counted>>);

/// So many waited at that time, those that this process has pushed since included.
#[derive(Clone, Copy, Debug)]
struct Counted {
    at: Instant,
    waiting: i64,
}

impl Backlog {
    /// How many wait, if that was counted lately.
    fn waiting(&self) -> Option<i64> {
        let counted = self.0.lock().ok().and_then(|counted| *counted)?;
        (counted.at.elapsed() < COUNT_TTL).then_some(counted.waiting)
    }

    fn set(&self, waiting: i64) {
        if let Ok(mut counted) = self.0.lock() {
            let at = Instant::now();
            *counted = Some(Counted { at, waiting });
        }
    }

    fn add(&self, pushed: i64) {
        if let Ok(mut counted) = self.0.lock()
            && let Some(counted) = counted.as_mut()
        {
            counted.waiting += pushed;
        }
    }
}

impl Tx {
    /// Pushes tickets, unless enough are waiting: a slot that finds a job claims again until nothing is left.
    #[doc(hidden)]
    pub async fn push_tickets(&mut self, queue: Queue, count: usize) -> Result<()> {
        let waiting = match self.store.tickets.of(queue).waiting() {
            Some(waiting) => waiting,
            None => self.count_tickets(queue).await?,
        };
        let room = usize::try_from(queue.max_waiting() - waiting).unwrap_or(0);
        let count = count.min(room);
        if count == 0 {
            return Ok(());
        }
        self.store
            .tickets
            .of(queue)
            .add(i64::try_from(count).unwrap_or(queue.max_waiting()));
        let tickets: Vec<_> = (0..count).map(|_| ticket()).collect();
        self.store.work.statement();
        match &mut self.db {
            TxDb::Sqlite(tx) => apalis_sqlite::queries::push_tasks(&mut **tx, queue.name(), &tickets)
                .await
                .map_err(Error::during("push a ticket")),
            TxDb::Postgres(tx) => {
                let pushing = apalis_postgres::queries::push_tasks(&mut **tx, queue.name(), tickets);
                let pushed = self.store.liveness.in_time(pushing).await;
                pushed.map_err(Error::during("push a ticket"))
            }
        }
    }

    /// Counts the waiting tickets, as far as it matters, and remembers how many there are.
    pub(super) async fn count_tickets(&mut self, queue: Queue) -> Result<i64> {
        let waiting = self.waiting_tickets(queue).await?;
        self.store.tickets.of(queue).set(waiting);
        Ok(waiting)
    }

    /// How many tickets wait, counted as far as it matters.
    async fn waiting_tickets(&mut self, queue: Queue) -> Result<i64> {
        // The two tables are the queue library's, and named by it.
        self.store.work.statement();
        let row: (i64,) = match &mut self.db {
            TxDb::Sqlite(tx) => {
                sqlx::query_as(
                    "select count(*) from (
                       select 1 from Jobs where job_type = $1 and status = 'Pending' and lock_by is null limit $2)",
                )
                .bind(queue.name())
                .bind(queue.max_waiting())
                .fetch_one(&mut **tx)
                .await
            }
            TxDb::Postgres(tx) => {
                let counting = sqlx::query_as(
                    "select count(*) from (
                       select 1 from apalis.jobs where job_type = $1 and status = 'Pending' limit $2) as waiting",
                )
                .bind(queue.name())
                .bind(queue.max_waiting())
                .fetch_one(&mut **tx);
                self.store.liveness.in_time(counting).await
            }
        }
        .map_err(Error::during("count tickets"))?;
        Ok(row.0)
    }
}
