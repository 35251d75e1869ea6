//! Worker processes, for people to look at. Leases decide, not these rows.

use super::columns::columns;
use super::{Result, Store, execute, read};
use crate::clock::Timestamp;
use crate::id::WorkerId;

/// A worker process as it last said.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
pub struct WorkerRow {
    /// Its id, new with each start.
    pub worker_id: WorkerId,
    /// The machine's name.
    pub host: String,
    /// Runs it can hold at once.
    pub slots: i64,
    /// Runs it holds.
    pub busy: i64,
    /// The version of its CLI.
    pub cli_version: String,
    /// When it started.
    pub started_at: Timestamp,
    /// When it last said so.
    pub last_seen_at: Timestamp,
    /// It claims nothing until then.
    pub paused_until: Option<Timestamp>,
    /// Why, in a sentence.
    pub pause_reason: Option<String>,
    /// What the Messages API last answered to the worker's own question, in words; `None` before the first one.
    pub upstream: Option<String>,
    /// The seconds by which its clock is ahead of the database's, if they differ by more than 10 s.
    pub clock_ahead: Option<i64>,
}

impl Store {
    /// Says how a worker is, and forgets workers that haven't said so since `gone_before`.
    pub async fn put_worker(&self, worker: &WorkerRow, gone_before: Timestamp) -> Result<()> {
        let mut tx = self.begin().await?;
        execute!(
            tx,
            "say how the worker is",
            "insert into worker (worker_id, host, slots, busy, cli_version, started_at, last_seen_at, paused_until,
               pause_reason, upstream, clock_ahead)
             values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
             on conflict (worker_id) do update set slots = excluded.slots, busy = excluded.busy,
               last_seen_at = excluded.last_seen_at, paused_until = excluded.paused_until,
               pause_reason = excluded.pause_reason, upstream = excluded.upstream,
               clock_ahead = excluded.clock_ahead",
            worker.worker_id,
            &worker.host,
            worker.slots,
            worker.busy,
            &worker.cli_version,
            worker.started_at,
            worker.last_seen_at,
            worker.paused_until,
            &worker.pause_reason,
            &worker.upstream,
            worker.clock_ahead
        )?;
        execute!(
            tx,
            "forget workers",
            "delete from worker where last_seen_at < $1",
            gone_before
        )?;
        tx.commit().await
    }

    /// Takes a worker off the list.
    pub async fn remove_worker(&self, worker_id: WorkerId) -> Result<()> {
        let mut tx = self.begin().await?;
        execute!(
            tx,
            "take a worker off the list",
            "delete from worker where worker_id = $1",
            worker_id
        )?;
        tx.commit().await
    }

    /// The workers that have said how they are since this time.
    pub async fn workers(&self, since: Timestamp) -> Result<Vec<WorkerRow>> {
        read!(
            self,
            "list workers",
            fetch_all => WorkerRow,
            concat!("select ", columns!(WorkerRow), " from worker where last_seen_at >= $1 order by started_at"),
            since
        )
    }
}
